"""Scales, and 8-bit and 4-bit numbers: ``x`` is stored as ``q`` with ``x ~ q * scale``. Scales are float32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jmp_lite._compat import INLINE
from jmp_lite._dtypes import FLOAT32, OF_4_BITS, DType
from jmp_lite._rounding import nearest_round, stochastic_floor, stochastic_round
from jmp_lite.errors import InvalidRecipeError

#: The formats, by the names that recipes are written with.
FORMATS: dict[str, DType] = {
    "e4m3": np.dtype(jnp.float8_e4m3fn),
    "e5m2": np.dtype(jnp.float8_e5m2),
    "int8": np.dtype(np.int8),
    "e2m1": np.dtype(jnp.float4_e2m1fn),
    "int4": np.dtype(jnp.int4),
}
#: Of float32; XLA takes smaller numbers for zero.
SMALLEST_NORMAL = 2.0**-126


def checked_format(dtype: Any) -> DType:
    """Returns the dtype if it is one of ``FORMATS``, given by its name or as anything NumPy accepts as a dtype.

    Raises:
        InvalidRecipeError: If it is not.
    """
    try:
        found = FORMATS[dtype] if isinstance(dtype, str) and dtype in FORMATS else np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in FORMATS.values():
        raise InvalidRecipeError(
            f"dtype must be one of {', '.join(f'{kind} ({name!r})' for name, kind in FORMATS.items())}, got {dtype!r}. "
            "Write for example QuantSpec('e4m3')."
        )
    return found


def is_integer(dtype: DType) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.integer))


def largest(dtype: DType) -> float:
    """The largest magnitude that is used: 448 of e4m3, 57344 of e5m2, 127 of int8 (-128 is not), 6 of e2m1."""
    return float(jnp.iinfo(dtype).max if is_integer(dtype) else jnp.finfo(dtype).max)  # type: ignore[no-untyped-call]


@functools.partial(jax.jit, static_argnames=("axis", "keepdims", "dtype"), inline=INLINE)
def amax_of(x: Any, axis: Any = None, *, keepdims: bool = False, dtype: DType | None = None) -> jax.Array:
    """Returns the largest magnitudes along axes in float32, for scales of a format.

    NaN counts as infinite: XLA on CPU loses NaN in a maximum. Floats of 8 bits show it themselves.
    """
    x = lax.stop_gradient(jnp.asarray(x))
    amax = jnp.max(jnp.abs(x), axis=axis, keepdims=keepdims, initial=0).astype(FLOAT32)
    if dtype is not None and dtype not in OF_4_BITS and not is_integer(dtype):
        return amax
    return jnp.where(jnp.isnan(x).any(axis=axis, keepdims=keepdims), jnp.inf, amax)


def absmax_scale(amax: Any, dtype: Any, *, margin: int = 0, pow2: bool = False) -> jax.Array:
    """Returns the scale that maps the largest magnitude of an array to the largest number of a format.

    Args:
        amax: Largest magnitudes, of any shape. Infinities and NaN give scales and so matmuls that are not finite.
        dtype: ``float8_e4m3fn``, ``float8_e5m2``, ``int8``, ``float4_e2m1fn`` or ``int4``.
        margin: Leaves room for values ``2**margin`` times as large.
        pow2: Rounds the scale up to a power of two: scaling is exact, and int8 loses up to one bit.

    Returns:
        ``float32`` of the shape of ``amax``; 1 where that is zero, or so small that the scale would be subnormal.

    Raises:
        InvalidRecipeError: If the format is unknown.

    Example:
        >>> print(jmp.quant.absmax_scale(jnp.array([0.0, 127.0, 254.0]), jnp.int8))
        [1. 1. 2.]
        >>> print(jmp.quant.absmax_scale(jnp.float32(1000.0), "e4m3", pow2=True))
        4.0

    References:
        Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433.
    """
    found: jax.Array = _absmax_scale(jnp.asarray(amax), 2.0**margin / largest(checked_format(dtype)), pow2)
    return found


@functools.partial(jax.jit, static_argnums=(1, 2), inline=INLINE)
def _absmax_scale(amax: jax.Array, factor: float, pow2: bool) -> jax.Array:
    scale = amax.astype(FLOAT32) * factor
    is_tiny = scale < SMALLEST_NORMAL  # false for NaN, which stays
    if pow2:
        scale = jnp.where(jnp.isfinite(scale), _power_of_two_from(scale), scale)
    return jnp.where(is_tiny, 1.0, scale)


def _power_of_two_from(x: jax.Array) -> jax.Array:
    """The least power of two not below a positive normal number, by carrying its mantissa into the exponent."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) + np.uint32(0x007FFFFF)
    return lax.bitcast_convert_type(bits & np.uint32(0xFF800000), FLOAT32)


def quantize(x: Any, dtype: Any, scale: Any, *, key: jax.Array | None = None) -> jax.Array:
    """Returns ``x / scale``, rounded to a format; finite values beyond its range saturate.

    Args:
        x: Floating array.
        dtype: ``float8_e4m3fn``, ``float8_e5m2``, ``int8``, ``float4_e2m1fn`` or ``int4``.
        scale: ``float32``; a scalar, or of the rank of ``x`` with size 1 along axes that share a scale, or with the
            number of tiles along a tiled axis.
        key: A PRNG key for stochastic rounding, exact in expectation; by default round to nearest, ties to even.

    Returns:
        An array of the shape of ``x``. Infinities and NaN become NaN; integers and e2m1 cannot hold them.

    Raises:
        InvalidRecipeError: If the format is unknown.

    Example:
        >>> x = jnp.array([0.1, -0.26, 1000.0])
        >>> print(jmp.quant.quantize(x, jnp.int8, jnp.float32(0.1)))
        [  1  -3 127]
        >>> print(jmp.quant.quantize(x, "e4m3", jnp.float32(1.0)))
        [0.101562 -0.25 448]
    """
    x = jnp.asarray(x)
    bits = None if key is None else jax.random.bits(key, x.shape)
    found: jax.Array = rounded(x, checked_format(dtype), scale, bits)
    return found


@functools.partial(jax.jit, static_argnames=("dtype", "saturates"), inline=INLINE)
def rounded(x: jax.Array, dtype: DType, scale: Any, bits: jax.Array | None, *, saturates: bool = True) -> jax.Array:
    """``quantize`` with ``uint32`` bits in place of a key; without ``saturates`` floats out of range become NaN."""
    scaled = x.astype(FLOAT32) / repeated(scale, x.shape)
    if is_integer(dtype):
        whole = jnp.round(scaled) if bits is None else stochastic_floor(bits, scaled)
        return jnp.clip(whole, -largest(dtype), largest(dtype)).astype(dtype)
    if not saturates:
        scaled = jnp.where(jnp.abs(scaled) <= largest(dtype), scaled, jnp.nan)
    if bits is not None:
        return stochastic_round(bits, scaled, dtype)
    if dtype in OF_4_BITS:
        return nearest_round(scaled, dtype)
    # What is not finite stays so through the difference; a select would be a second array for XLA to transpose.
    saturated: jax.Array = jnp.clip(scaled, -largest(dtype), largest(dtype)) + (scaled - scaled)
    return saturated.astype(dtype)


def as_bits(values: Any) -> Any:
    """8-bit and 4-bit floats as integers; other numbers unchanged.

    JAX rounds the floats that ``jax.checkpoint`` saves, which turns e4m3 numbers beyond 240 into NaN. It leaves
    integers alone. For 4 bits the integers are twice the numbers, because XLA on CPU cannot bitcast some formats.
    """
    if values.dtype.itemsize > 1 or is_integer(values.dtype):
        return values
    if values.dtype in OF_4_BITS:
        return (values.astype(FLOAT32) * 2).astype(jnp.int8)
    return lax.bitcast_convert_type(values, jnp.int8)


def from_bits(bits: Any, dtype: DType) -> Any:
    """Undoes ``as_bits``."""
    if dtype in OF_4_BITS and not is_integer(dtype):
        return (bits.astype(FLOAT32) / 2).astype(dtype)
    return bits if bits.dtype == dtype else lax.bitcast_convert_type(bits, dtype)


def dequantize(q: Any, scale: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Returns ``q * scale``, computed in float32.

    Args:
        q: Array of quantized numbers.
        scale: ``float32``, as for ``quantize``.
        dtype: Floating dtype of the result.

    Returns:
        An array of the shape of ``q``.

    Example:
        >>> print(jmp.quant.dequantize(jnp.array([1, -127], jnp.int8), jnp.float32(0.5)))
        [  0.5 -63.5]
    """
    found: jax.Array = _dequantized(jnp.asarray(q), scale, jnp.dtype(dtype))
    return found


@functools.partial(jax.jit, static_argnums=2, inline=INLINE)
def _dequantized(q: jax.Array, scale: Any, dtype: DType) -> jax.Array:
    return jnp.asarray(q.astype(FLOAT32) * repeated(scale, q.shape), dtype)


def repeated(scale: Any, shape: tuple[int, ...]) -> Any:
    """Scales that broadcast with an array: a tile's scale is repeated for each of its numbers."""
    if np.ndim(scale) == len(shape):
        for axis, (tiles, size) in enumerate(zip(np.shape(scale), shape, strict=True)):
            scale = scale if tiles in (1, size) else jnp.repeat(scale, size // tiles, axis)
    return scale
