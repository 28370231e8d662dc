"""Policies, autocast and dynamic loss scaling for Flax Linen."""

from jmp_lite._messages import naming_extra as _naming_extra

with _naming_extra(__name__, "flax"):
    from jmp_lite.linen._autocast import autocast as autocast
    from jmp_lite.linen._autocast import explain as explain
    from jmp_lite.linen._dynamic_scale import DynamicScale as DynamicScale
    from jmp_lite.linen._dynamic_scale import DynamicScaleResult as DynamicScaleResult
    from jmp_lite.linen._policy import with_policy as with_policy

__all__ = ["DynamicScale", "DynamicScaleResult", "autocast", "explain", "with_policy"]
