"""Several devices and hosts: dtypes of gathers and reductions, non-finite gradients by replica, cluster start."""

from jmp_lite.distributed._cluster import initialize
from jmp_lite.distributed._gather import gather_params
from jmp_lite.distributed._reduce import reduce_gradients
from jmp_lite.distributed._telemetry import nonfinite_leaves

__all__ = ["gather_params", "initialize", "nonfinite_leaves", "reduce_gradients"]
