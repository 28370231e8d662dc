"""The ranges of numbers, and how each format would round them."""
