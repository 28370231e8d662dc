"""Operands of products as 8-bit numbers: how large they are, which scale they get."""

import functools
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite.errors import SecondDerivativeError
from jmp_lite.quant._scale import absmax_scale, dequantize, is_integer, quantize
from jmp_lite.quant._spec import QuantSpec


class Quantized(NamedTuple):
    """An array as ``values * scale``; the scale is ``float32``, a scalar or with the size 1 along shared axes."""

    values: Any
    scale: Any

    def dequantized(self, dtype: DType) -> Any:
        """Returns the numbers that this stands for."""
        return dequantize(self.values, self.scale, dtype)


@custom_vmap
def amax_of_all(x: Any) -> jax.Array:
    """Largest magnitude, ``float32[]``, also over axes that ``vmap`` hides: a batch has one scale all the same."""
    return jnp.max(jnp.abs(x), initial=0).astype(FLOAT32)


@amax_of_all.def_vmap
def _amax_of_all_mapped(_axis_size: int, _in_batched: list[bool], x: Any) -> tuple[jax.Array, bool]:
    return amax_of_all(x), False


def amax_of_tensor(x: Any, axis_name: Any) -> jax.Array:
    """Returns the largest magnitude of an array, over the named axes too."""
    amax: jax.Array = amax_of_all(lax.stop_gradient(x))
    return amax if axis_name is None else lax.pmax(amax, axis_name)


def amax_of(x: Any, spec: QuantSpec, contracted: tuple[int, ...], axis_name: Any) -> jax.Array:
    """Returns largest magnitudes: of the whole array, over devices too, or along the contracted axes."""
    if spec.granularity == "channel":
        x = lax.stop_gradient(x)
        return jnp.max(jnp.abs(x), axis=contracted, keepdims=True, initial=0).astype(FLOAT32)
    return amax_of_tensor(x, axis_name)


def _key(x: Any) -> jax.Array:
    """A PRNG key made of the bits of an array; a sum of integers, the same in any order."""
    bits = lax.bitcast_convert_type(jnp.asarray(x).astype(FLOAT32), jnp.uint32)
    return jax.random.key(jnp.sum(bits, dtype=jnp.uint32))


class Seen(NamedTuple):
    """Largest magnitudes of earlier steps."""

    history: Any
    """``float32[steps]``."""
    is_known: Any
    """``bool[]``, a constant: whether there is a history at all, or the array itself is asked."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def quantized(x: Any, amax: Any, seen: Seen | None, spec: QuantSpec) -> Quantized:
    """Quantizes an operand of a product.

    Args:
        x: Floating array.
        amax: Its largest magnitudes, from ``amax_of``.
        seen: Those of earlier steps, which the scale of a whole tensor is then made of.
        spec: How.
    """
    made_of = amax
    if seen is not None and amax.ndim == 0:
        earlier, is_used = jnp.max(seen.history), seen.is_known
        if is_integer(spec.dtype):  # int8 could neither show what is not finite, nor bear a scale out of the air
            is_used = is_used & (earlier > 0) & jnp.isfinite(amax)
        made_of = jnp.where(is_used, earlier, amax)
    scale = absmax_scale(made_of, spec.dtype, margin=spec.margin, pow2=spec.pow2)
    key = _key(x) if spec.stochastic else None
    return Quantized(quantize(x, spec.dtype, scale, key=key), scale)


@quantized.defjvp
def _no_derivative(spec: QuantSpec, _primals: Any, _tangents: Any) -> Any:
    refuse_second_derivative(spec)


def refuse_second_derivative(spec: QuantSpec) -> NoReturn:
    """Raises the error for a derivative of rounding, which nothing asks for that differentiates once."""
    raise SecondDerivativeError(
        f"A product with an operand in {spec} was differentiated twice; there is no second derivative. Take second "
        "derivatives of the function without the recipe."
    )


def unscaled(x: Any) -> Quantized:
    """An operand that is not quantized."""
    return Quantized(x, jnp.ones((), FLOAT32))


def prepared(
    x: Any, spec: QuantSpec | None, contracted: tuple[int, ...], axis_name: Any, seen: Seen | None = None
) -> tuple[Quantized, jax.Array]:
    """Quantizes an operand if it has a spec; returns its largest magnitudes too, zero if it has none."""
    if spec is None:
        return unscaled(x), jnp.zeros((), FLOAT32)
    amax = amax_of(x, spec, contracted, axis_name)
    return quantized(x, amax, seen, spec), amax


def result_dtype(lhs: Any, rhs: Any, preferred_element_type: Any) -> DType:
    """Returns the dtype of a product: the one asked for, or else what the operands promote to."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype))
