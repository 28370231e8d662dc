"""Policies and autocast for Flax NNX."""

from jmp_lite._messages import naming_extra as _naming_extra

with _naming_extra(__name__, "flax"):
    from jmp_lite.nnx._autocast import autocast as autocast
    from jmp_lite.nnx._autocast import explain as explain
    from jmp_lite.nnx._grad import accumulate_gradients as accumulate_gradients
    from jmp_lite.nnx._grad import scaled_value_and_grad as scaled_value_and_grad
    from jmp_lite.nnx._policy import with_policy as with_policy

__all__ = ["accumulate_gradients", "autocast", "explain", "scaled_value_and_grad", "with_policy"]
