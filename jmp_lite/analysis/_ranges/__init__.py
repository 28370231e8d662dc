"""The ranges of numbers, and what each format would make of them."""
