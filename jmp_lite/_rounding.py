"""Stochastic rounding: up or down with the probabilities that make it right on average."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._dtypes import FLOAT32, DType


def stochastic_round(key: jax.Array, x: Any, dtype: DType) -> jax.Array:
    """Rounds to one of the two neighbours in a floating format, so that the expected value is ``x``.

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
    _, exponent = jnp.frexp(x)  # |x| in [2**(exponent - 1), 2**exponent)
    exponent = jnp.maximum(exponent - 1, int(np.log2(float(info.smallest_normal))))
    spacing = jnp.ldexp(jnp.ones_like(x), exponent - info.nmant)
    rounded = stochastic_floor(key, x / spacing) * spacing
    saturated: jax.Array = jnp.clip(rounded, -float(info.max), float(info.max)) + (x - x)
    return saturated.astype(dtype)


def stochastic_floor(key: jax.Array, x: jax.Array) -> jax.Array:
    """Rounds to the integer below or above, so that the expected value is ``x``; integers stay what they are."""
    below = jnp.floor(x)
    return below + (jax.random.uniform(key, x.shape) < x - below).astype(x.dtype)
