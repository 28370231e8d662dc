"""Static checks: which matmuls run in which dtype, and what is wrong with them."""
