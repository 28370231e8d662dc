"""The benchmarks compiled for accelerators that this machine does not have."""
