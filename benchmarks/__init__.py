"""Benchmarks: jmp_lite and its peers side by side in one run."""
