"""What a program shows before it runs: which matmuls run in which dtype, and what is wrong with them."""
