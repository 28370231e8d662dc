"""Rounding to a format: up or down with the probabilities that make it right on average, or to nearest."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jmp_lite._dtypes import FLOAT32, DType


def counted_bits(seed: Any, shape: tuple[int, ...]) -> jax.Array:
    """Random bits for the elements of an array, made of their places in it: the same however it is sharded.

    Args:
        seed: ``uint32``; a scalar, or of the rank of ``shape`` with the size 1 along axes whose places count. Along the
            others every array has a seed of its own, and the bits that it would have alone.
        shape: Of the array.

    Returns:
        ``uint32`` of that shape.

    References:
        The integer hash "lowbias32" of Chris Wellons, "Prospecting for Hash Functions" (nullprogram.com, 2018).
    """
    seed = jnp.asarray(seed)
    sizes = [n if own == 1 else 1 for n, own in zip(shape, seed.shape or (1,) * len(shape), strict=True)]
    places = [
        lax.broadcasted_iota(jnp.uint32, sizes, axis) * np.uint32(math.prod(sizes[axis + 1 :]) % 2**32)
        for axis in range(len(sizes))
    ]
    place = functools.reduce(operator.add, places, jnp.zeros(sizes, jnp.uint32))
    return jnp.broadcast_to(_hash(_hash(place) ^ seed), shape)


def _hash(x: Any) -> Any:
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def stochastic_round(bits: jax.Array, x: Any, dtype: DType) -> jax.Array:
    """Rounds to one of the two neighbors in a floating format, so that the expected value is ``x``.

    Finite values beyond the largest of the format become the largest; infinities and NaN become NaN.

    Args:
        bits: Random bits, ``uint32`` of the shape of ``x``.
        x: Floating array, computed with in float32.
        dtype: A floating dtype of at most 16 bits.

    Returns:
        An array of the shape of ``x`` and that dtype.

    References:
        Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv:1502.02551.
    """
    return _rounded(x, dtype, functools.partial(stochastic_floor, bits))


def nearest_round(x: Any, dtype: DType) -> jax.Array:
    """Rounds to the nearest number of a floating format, ties to even, as a cast should.

    XLA on CPU may cast to formats of 4 bits by way of another format, and so round twice.

    Args:
        x: Floating array, computed with in float32.
        dtype: As for ``stochastic_round``.

    Returns:
        As ``stochastic_round``.
    """
    return _rounded(x, dtype, jnp.round)


def _rounded(x: Any, dtype: DType, to_integer: Callable[[Any], Any]) -> jax.Array:
    info: Any = jnp.finfo(dtype)  # type: ignore[no-untyped-call]
    x = jnp.asarray(x).astype(FLOAT32)
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0x7F800000), FLOAT32)
    power = jnp.maximum(power, float(info.smallest_normal))
    rounded = to_integer(x / power * 2.0**info.nmant) * 2.0**-info.nmant * power
    saturated: jax.Array = jnp.clip(rounded, -float(info.max), float(info.max)) + (x - x)
    return saturated.astype(dtype)


def stochastic_floor(bits: jax.Array, x: jax.Array) -> jax.Array:
    """Rounds to the integer below or above, so that the expected value is ``x``; integers stay what they are."""
    below = jnp.floor(x)
    between_0_and_1 = (bits >> 8).astype(FLOAT32) * 2.0**-24
    return below + (between_0_and_1 < x - below).astype(x.dtype)
