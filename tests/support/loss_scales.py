"""Loss scales that tests share, one per setting, and what is done with them."""

import jax
import jax.numpy as jnp
import pytest

import jmp_lite as jmp

# One scale per setting that could be lost on the way.
SCALES = {
    "default": jmp.DynamicLossScale,
    "min below 1": lambda: jmp.DynamicLossScale(1.0, min_loss_scale=0.25),
    "max": lambda: jmp.DynamicLossScale(2.0**9, period=1, max_loss_scale=2.0**10),
    "factor": lambda: jmp.DynamicLossScale(3.0, period=2, factor=3),
    "backoff": lambda: jmp.DynamicLossScale(2.0**15, period=2, backoff_factor=0.75),
    "hysteresis": lambda: jmp.DynamicLossScale(2.0**15, period=3, hysteresis=2),
    "consecutive": lambda: jmp.DynamicLossScale(2.0**15, period=3, hysteresis=2, consecutive_hysteresis=True),
    "grace": lambda: jmp.DynamicLossScale(2.0**15, -2, 2, grace_steps=2),
    "constant": lambda: jmp.DynamicLossScale(5.0, factor=1),
    **{
        name: lambda name=name: jmp.DynamicLossScale.like(name, period=3)
        for name in ("torch", "flax", "megatron", "deepspeed")
    },
}

every_scale = pytest.mark.parametrize("make", SCALES.values(), ids=SCALES)


def on_device(scale):
    return jax.tree.map(jnp.asarray, scale)


def unscaled(grads, scale):
    return jax.tree.map(lambda g: g / scale.loss_scale, grads)
