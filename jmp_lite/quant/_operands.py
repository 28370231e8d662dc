"""Operands of matmuls as 8-bit numbers: their largest magnitudes and their scales."""

import functools
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jmp_lite._compat import INLINE, composed_primitive
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite._rounding import counted_bits
from jmp_lite._tree import is_finite, mapped_axes
from jmp_lite.errors import SecondDerivativeError
from jmp_lite.quant._scale import absmax_scale, amax_of, as_bits, dequantize, from_bits, is_integer, rounded
from jmp_lite.quant._spec import QuantSpec

#: The least scale of a whole float8 array: two of them are multiplied, and the product is to be a normal number.
_LEAST_SCALE = 2.0**-63
#: Under which ``jax.checkpoint_policies.save_only_these_names`` finds operands of 8 bits.
NAME = "quantized"


class Quantized(NamedTuple):
    """An array as ``values * scale``; the scale is ``float32``, a scalar or with size 1 along shared axes."""

    values: Any
    scale: Any

    def dequantized(self, dtype: DType) -> Any:
        return dequantize(self.values, self.scale, dtype)


@functools.cache
def _primitive() -> Any:
    """One equation, so that no policy of ``jax.checkpoint`` can save float8 numbers on the way to their bits."""
    return composed_primitive("quantize_to_bits", _quantize_to_bits, jvp=_jvp, batch=_batch)


def _quantize_to_bits(x: Any, scale: Any, *, spec: QuantSpec, mapped: int = 0) -> Any:
    """Quantizes an array, or several along the first ``mapped`` axes, each separately."""
    bits = counted_bits(_seed(x, mapped), x.shape) if spec.stochastic else None
    return as_bits(rounded(x, spec.dtype, scale, bits, saturates=spec.amax is None))


def _seed(x: Any, mapped: int) -> Any:
    """Computed from the bits of an array: a sum of integers, the same in any order."""
    bits = lax.bitcast_convert_type(x.astype(FLOAT32), jnp.uint32)
    return jnp.sum(bits, axis=tuple(range(mapped, x.ndim)), keepdims=True, dtype=jnp.uint32)


def _batch(operands: Any, positions: Any, *, spec: QuantSpec, mapped: int) -> tuple[Any, int]:
    size = next(x.shape[at] for x, at in zip(operands, positions, strict=True) if at is not None)
    x, scale = (
        jnp.broadcast_to(operand[None], (size, *operand.shape)) if at is None else jnp.moveaxis(operand, at, 0)
        for operand, at in zip(operands, positions, strict=True)
    )
    scale = scale.reshape(*scale.shape[: mapped + 1], *[1] * (x.ndim - scale.ndim), *scale.shape[mapped + 1 :])
    return _primitive().bind(x, scale, spec=spec, mapped=mapped + 1), 0


def _jvp(_primals: Any, _tangents: Any, *, spec: QuantSpec, **_: Any) -> NoReturn:
    """A tangent of bits, which only a second derivative needs."""
    raise SecondDerivativeError(
        f"A matmul with an operand in {spec} was differentiated twice; there is no second derivative. Take second "
        "derivatives of the function without the recipe."
    )


def prepared(x: Any, spec: QuantSpec | None, contracted: tuple[int, ...], axis_name: Any) -> Quantized:
    """Quantizes an operand if it has a spec; ``jax.checkpoint`` policies see bits and scale under the name ``NAME``."""
    if spec is None:
        return unscaled(x)
    spec.observe(x)
    found: Quantized = _prepared(x, spec, contracted, axis_name)
    return found


@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=INLINE)
def _prepared(x: Any, spec: QuantSpec, contracted: tuple[int, ...], axis_name: Any) -> Quantized:
    amax = _amax(x, spec, contracted, axis_name)
    scale = absmax_scale(amax, spec.dtype, margin=spec.margin, pow2=spec.pow2)
    if not scale.ndim and not is_integer(spec.dtype):
        scale = jnp.maximum(scale, _LEAST_SCALE)
    return Quantized(to_format(jnp.asarray(x), scale, spec), checkpoint_name(scale, NAME))


def _amax(x: Any, spec: QuantSpec, contracted: tuple[int, ...], axis_name: Any) -> jax.Array:
    """Largest magnitudes: fixed, of the whole array and of all devices, or along the contracted axes."""
    if spec.amax is not None:
        fixed = jnp.asarray(spec.amax, FLOAT32)  # integers cannot show what is not finite
        return jnp.where(is_finite(x).all(), fixed, jnp.nan) if is_integer(spec.dtype) else fixed
    is_tensor = spec.granularity == "tensor"
    amax: jax.Array = amax_of(x, None if is_tensor else contracted, keepdims=not is_tensor, dtype=spec.dtype)
    return lax.pmax(amax, mapped_axes(axis_name)) if is_tensor and axis_name is not None else amax


def to_format(x: Any, scale: Any, spec: QuantSpec) -> Any:
    """Rounds an array, divided by a scale that broadcasts with it, to the numbers of a spec."""
    bits = _primitive().bind(x, scale, spec=spec, mapped=0)
    return from_bits(checkpoint_name(bits, NAME), spec.dtype)


def packed(x: Quantized) -> Quantized:
    """An operand with its numbers as bits, which is how residuals store it."""
    return Quantized(as_bits(x.values), x.scale)


def unpacked(x: Quantized, spec: QuantSpec | None) -> Quantized:
    """Undoes ``packed``."""
    return x if spec is None else Quantized(from_bits(x.values, spec.dtype), x.scale)


def unscaled(x: Any) -> Quantized:
    """An operand that is not quantized."""
    return Quantized(x, jnp.ones((), FLOAT32))


def result_dtype(lhs: Any, rhs: Any, preferred_element_type: Any) -> DType:
    """Returns the dtype of a matmul: the requested one, or the promoted dtype of the operands."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype))
