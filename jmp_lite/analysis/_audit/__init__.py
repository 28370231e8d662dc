"""What a program shows before it runs: which products run in which dtype, and what is wrong with them."""
