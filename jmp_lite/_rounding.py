"""Stochastic rounding: up or down with the probabilities that make it right on average."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jmp_lite._dtypes import FLOAT32, DType


def stochastic_round(key: jax.Array, x: Any, dtype: DType) -> jax.Array:
    """Rounds to one of the two neighbors in a floating format, so that the expected value is ``x``.

    Finite values beyond the largest of the format become the largest; infinities and NaN become NaN.

    Args:
        key: A PRNG key.
        x: Floating array, computed with in float32.
        dtype: A floating dtype of at most 16 bits.

    Returns:
        An array of the shape of ``x`` and that dtype.

    References:
        Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv:1502.02551.
    """
    info: Any = jnp.finfo(dtype)  # type: ignore[no-untyped-call]
    x = jnp.asarray(x).astype(FLOAT32)
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0x7F800000), FLOAT32)
    power = jnp.maximum(power, float(info.smallest_normal))
    rounded = stochastic_floor(key, x / power * 2.0**info.nmant) * 2.0**-info.nmant * power
    saturated: jax.Array = jnp.clip(rounded, -float(info.max), float(info.max)) + (x - x)
    return saturated.astype(dtype)


def stochastic_floor(key: jax.Array, x: jax.Array) -> jax.Array:
    """Rounds to the integer below or above, so that the expected value is ``x``; integers stay what they are."""
    below = jnp.floor(x)
    return below + (jax.random.uniform(key, x.shape, x.dtype) < x - below).astype(x.dtype)
