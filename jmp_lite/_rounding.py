"""Rounding to a format: up or down with the probabilities that make it right on average, or to nearest."""

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jmp_lite._dtypes import FLOAT32, DType

_ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B))
_LAST_SHIFT = 16


def counted_bits(key: Any, shape: tuple[int, ...], spec: Any = None) -> jax.Array:
    """Random bits for the elements of an array, made of their places in it: the same however it is sharded.

    Args:
        key: ``uint32``; a scalar, or of the rank of ``shape`` with the size 1 along axes whose places count. Along the
            others every array has its own key, and the bits that it would have alone.
        shape: Of the array; inside ``shard_map``, of the shard.
        spec: Inside ``shard_map``, the ``PartitionSpec`` of the array, so that a place is one in the whole array.

    Returns:
        ``uint32`` of that shape.

    References:
        The integer hash "lowbias32" of Chris Wellons, "Prospecting for Hash Functions" (nullprogram.com, 2018).
    """
    key = jnp.asarray(key)
    place: Any = np.uint32(0)
    for axis, own in enumerate(key.shape or (1,) * len(shape)):
        if own == 1:
            sizes = [n if i == axis else 1 for i, n in enumerate(shape)]
            place = place * np.uint32(_whole(shape, spec, axis) % 2**32) + _places(sizes, spec, axis)
    return jnp.broadcast_to(_hash(_hash(jnp.asarray(place)) ^ key), shape)


def _mesh_axes(spec: Any, axis: int) -> tuple[Any, ...]:
    """Mesh axes that an axis of an array is sharded over by ``shard_map``; outside of it, arrays are whole."""
    names = spec[axis] if spec is not None and axis < len(spec) else None
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(name for name in (names if isinstance(names, tuple) else (names,)) if name in manual)


def _whole(shape: tuple[int, ...], spec: Any, axis: int) -> int:
    return shape[axis] * math.prod(lax.axis_size(name) for name in _mesh_axes(spec, axis))


def _places(sizes: list[int], spec: Any, axis: int) -> jax.Array:
    """Places along one axis of the whole array."""
    places = lax.broadcasted_iota(jnp.uint32, sizes, axis)
    names = _mesh_axes(spec, axis)
    return places + lax.axis_index(names).astype(jnp.uint32) * np.uint32(sizes[axis]) if names else places


def step_key(seed: int, step: jax.Array) -> Any:
    """Returns ``uint32[]`` for the random bits of one step: what of a key changes while a program runs."""
    return _hash(jnp.asarray(step).astype(jnp.uint32) ^ np.uint32(_hash_of_int(seed)))


def key_at(key: jax.Array, path: str) -> jax.Array:
    """Returns the key of one array, which is as random as that of all of them: the path becomes a constant."""
    return key ^ np.uint32(_hash_of_int(zlib.crc32(path.encode())))


def _hash(x: Any) -> Any:
    for shift, factor in _ROUNDS:
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> _LAST_SHIFT)


def _hash_of_int(x: int) -> int:
    """The same of a Python integer; 0, which the hash leaves as it is, becomes something else."""
    x = (x + 0x9E3779B9) % 2**32
    for shift, factor in _ROUNDS:
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> _LAST_SHIFT)


def stochastic_round(bits: jax.Array, x: Any, dtype: DType) -> jax.Array:
    """Rounds to one of the two neighbors in a floating format, so that the expected value is ``x``.

    Finite values beyond the largest of the format become the largest; infinities and NaN stay what they are, where the
    format has them, or become NaN.

    Args:
        bits: Random bits, ``uint32`` of the shape of ``x``.
        x: Floating array, computed with in float32.
        dtype: A floating dtype of at most 16 bits.

    Returns:
        An array of the shape of ``x`` and that dtype.

    References:
        Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv:1502.02551.
    """
    if dtype == jnp.bfloat16:
        return _bfloat16_at_random(bits, jnp.asarray(x).astype(FLOAT32))
    return _rounded(x, dtype, functools.partial(stochastic_floor, bits))


def _bfloat16_at_random(bits: jax.Array, x: jax.Array) -> jax.Array:
    """Adds as many random bits as are cut off then, which is exact, subnormal numbers included."""
    word = lax.bitcast_convert_type(x, jnp.uint32)
    largest = np.uint32(0x7F7FFFFF) | (word & np.uint32(0x80000000))
    raised = jnp.minimum(word + (bits >> 16), largest) & np.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(jnp.where(jnp.isfinite(x), raised, word), FLOAT32).astype(jnp.bfloat16)


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
    saturated: jax.Array = jnp.clip(rounded, -float(info.max), float(info.max))
    return jnp.where(jnp.isfinite(x), saturated, x).astype(dtype)


def stochastic_floor(bits: jax.Array, x: jax.Array) -> jax.Array:
    """Rounds to the integer below or above, so that the expected value is ``x``; integers stay what they are."""
    below = jnp.floor(x)
    return jnp.where(at_random(bits) < x - below, below + 1, below)


def at_random(bits: jax.Array) -> jax.Array:
    """Returns float32 numbers from 0 to 1, without 1."""
    return (bits >> 8).astype(FLOAT32) * np.float32(2.0**-24)
