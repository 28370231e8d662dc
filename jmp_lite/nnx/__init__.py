"""Policies and autocast for Flax NNX."""

from jmp_lite.nnx._autocast import autocast as autocast
from jmp_lite.nnx._policy import with_policy as with_policy

__all__ = ["autocast", "with_policy"]
