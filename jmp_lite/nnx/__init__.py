"""Policies and autocast for Flax NNX."""

from jmp_lite.nnx._autocast import autocast as autocast
from jmp_lite.nnx._autocast import explain as explain
from jmp_lite.nnx._delayed import delayed as delayed
from jmp_lite.nnx._policy import with_policy as with_policy

__all__ = ["autocast", "delayed", "explain", "with_policy"]
