"""Fake quantization: rounding with a straight-through gradient."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jmp_lite._compat import varying_axes
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite._messages import quote
from jmp_lite.errors import InvalidRecipeError
from jmp_lite.products._matmul import add_terms
from jmp_lite.quant._scale import checked_format, dequantize, largest, quantize


def fake_quant(x: Any, scale: Any, dtype: Any = jnp.int8) -> jax.Array:
    """Rounds an array to an 8-bit format and a scale, with gradients for both.

    Args:
        x: Floating array.
        scale: ``float32``; a scalar, or of the rank of ``x`` with size 1 along axes that share a scale. Learn it like
            any parameter (LSQ), or compute it with ``absmax_scale``, which clips nothing.
        dtype: ``int8``, ``float8_e4m3fn`` or ``float8_e5m2``.

    Returns:
        An array like ``x``. Its gradient passes where ``x`` was within the range of the format and is zero
        where it was clipped. Infinities and NaN become NaN. The gradient of the scale is the rounding error
        within the range and the largest number outside, divided by the root of the number of elements per scale
        times the largest number. Second derivatives are zero.

    Raises:
        InvalidRecipeError: If the format is unknown, the array is not floating, or the shapes do not match.

    Example:
        >>> x = jnp.array([0.26, -1.0, 300.0])
        >>> print(jmp.quant.fake_quant(x, jnp.float32(0.5)))
        [ 0.5 -1.  63.5]
        >>> print(jax.grad(lambda x: jmp.quant.fake_quant(x, jnp.float32(0.5)).sum())(x))
        [1. 1. 0.]

    References:
        Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", arXiv:1308.3432
        (straight-through); Esser et al., "Learned Step Size Quantization", arXiv:1902.08153.
    """
    if isinstance(scale, str):
        raise InvalidRecipeError(
            f"scale is {quote(scale)}, and must be a number. Write fake_quant(x, scale, {scale!r})."
        )
    x, scale = jnp.asarray(x), jnp.asarray(scale, FLOAT32)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InvalidRecipeError(f"fake_quant takes a floating array, got {quote(x)}. Cast it to a floating dtype.")
    fits = scale.ndim == 0 or (
        scale.ndim == x.ndim and all(n in (1, size) for n, size in zip(scale.shape, x.shape, strict=True))
    )
    if not fits:
        raise InvalidRecipeError(
            f"A scale is a number, or has the rank of the array and the size 1 along shared axes: got float32"
            f"{list(scale.shape)} for an array {list(x.shape)}."
        )
    axes = tuple(sorted(varying_axes(x) - varying_axes(scale)))
    scale = jax.lax.pcast(scale, axes, to="varying") if axes else scale
    return _fake_quant(x, scale, checked_format(dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _fake_quant(x: Any, scale: Any, dtype: DType) -> jax.Array:
    rounded: jax.Array = dequantize(quantize(x, dtype, scale), scale, x.dtype) + (x - x)  # which keeps NaN
    return rounded


def _jvp(dtype: DType, primals: Any, tangents: Any) -> tuple[Any, Any]:
    x, scale = primals
    is_inside = _is_inside(_scaled(x, scale), dtype)
    # Between the passes only the named arrays are kept: no slopes in float32, and no zeros.
    of_x = jax.checkpoint(functools.partial(_of_x, is_inside), prevent_cse=False)
    of_scale = jax.checkpoint(functools.partial(_of_scale, dtype, x, scale), prevent_cse=False)
    return _fake_quant(x, scale, dtype), add_terms(tangents, of_x, of_scale)


def _of_x(is_inside: Any, tangent: Any) -> jax.Array:
    return jnp.where(is_inside, tangent, 0)


def _of_scale(dtype: DType, x: Any, scale: Any, tangent: Any) -> jax.Array:
    scaled, limit = _scaled(x, scale), largest(dtype)
    error = dequantize(quantize(scaled, dtype, 1.0), 1.0) - scaled
    slope = jnp.where(_is_inside(scaled, dtype), error, jnp.sign(scaled) * limit)
    sharing = max(x.size // max(scale.size, 1), 1)
    change: jax.Array = (slope * (tangent / math.sqrt(sharing * limit))).astype(x.dtype)
    return change


def _scaled(x: Any, scale: Any) -> Any:
    return jax.lax.stop_gradient(x.astype(FLOAT32) / scale)


def _is_inside(scaled: Any, dtype: DType) -> jax.Array:
    return jnp.abs(scaled) <= largest(dtype)


_fake_quant.defjvp(_jvp, symbolic_zeros=True)
