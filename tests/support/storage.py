"""Parameters, gradients and bounds for what is stored in few bytes."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jmp_lite.optim import Float, Log, SignedLog
from support.comparisons import standard

SHAPES = {"kernel": (16, 8), "bias": (8,), "gain": ()}
WEIGHTS = ["nearest", "stochastic", "split8", "split16"]
dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def weights(rng, dtype=jnp.bfloat16, shapes=SHAPES):
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def shapes_for(alias):
    """SM3 of Optax takes no scalars."""
    return {name: shape for name, shape in SHAPES.items() if shape or alias != "sm3"}


def gradients(rng, size=1e-2, shapes=SHAPES):
    return {name: jnp.asarray(rng.standard_normal(shape) * size, jnp.float32) for name, shape in shapes.items()}


def moment_bound(kept, value, other):
    """How far what is stored of a moment may be from it: the distance of two neighbors."""
    size = np.abs(np.float64(value))
    if isinstance(kept, Float):
        info = jnp.finfo(kept.dtype)
        return size * float(info.eps) + float(info.smallest_subnormal)
    if isinstance(kept, (Log, SignedLog)):
        lowest = kept.highest - (63 if isinstance(kept, Log) else 31)
        largest = {Log: 1.25, SignedLog: 1.5}[type(kept)] * 2.0**kept.highest
        return size / 4 + 2.0**lowest + np.maximum(size - largest, 0)
    largest = kept.bound * np.sqrt(np.float64(other))
    relative = np.minimum(size / np.maximum(largest, 1e-30), 1)
    return largest * (1 + relative) ** 2 / 250 + np.maximum(size - largest, 0) + 1e-7 * size


def weight_bound(name, value, dtype):
    size = np.abs(np.float64(value))
    eps = float(jnp.finfo(dtype).eps)
    least = float(jnp.finfo(dtype).smallest_subnormal)
    kept_bits = {"nearest": 0, "stochastic": 0, "split8": 8, "split16": 16}[name]
    if name == "split16" and dtype == "bfloat16":
        return np.zeros_like(size)
    return (size * eps + least) * 2.0**-kept_bits + np.maximum(size - float(jnp.finfo(dtype).max), 0)


KEPT = {"params": "split8", "state": "8bit"}


def adam(rate=1e-2):
    return standard(optax.adam(rate))
