"""Convolutions of what 8-bit numbers stand for: their accuracy and their memory, not their speed.

A convolution of 8-bit arrays is fast on few devices and absent on many, and to write it as a matrix product costs a
copy of every input per kernel element. So the operands are quantized, and convolved in the dtype they came in.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jmp_lite._compat import linear_primitive
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite.errors import InvalidRecipeError
from jmp_lite.quant._operands import Quantized, prepared, result_dtype
from jmp_lite.quant._spec import Specs


class _Call(NamedTuple):
    """All of a convolution but its operands."""

    specs: Specs
    dtype: DType
    numbers: lax.ConvDimensionNumbers
    params: tuple[tuple[str, Any], ...]

    def convolve(self, lhs: Any, rhs: Any) -> Any:
        """Convolves two arrays of the dtype of the result."""
        return lax.conv_general_dilated(lhs, rhs, dimension_numbers=self.numbers, **dict(self.params))

    def of_dequantized(self, x: Any, other: Quantized, side: int) -> Any:
        """Convolves an operand, or its tangent, with the other one."""
        factor = other.dequantized(self.dtype)
        return self.convolve(x, factor) if side == 0 else self.convolve(factor, x)


def quantized_conv(
    lhs: Any,
    rhs: Any,
    specs: Specs,
    *,
    dimension_numbers: Any = None,
    preferred_element_type: Any = None,
    **params: Any,
) -> jax.Array:
    """Convolves two arrays as ``scaled_conv`` documents."""
    if specs.is_blockwise:
        raise InvalidRecipeError(f"Convolutions have scales per tensor or per channel, not per block: got {specs}.")
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    dtype = result_dtype(lhs, rhs, preferred_element_type)
    if params.get("out_sharding") is None:
        params.pop("out_sharding", None)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    call = _Call(specs, dtype, numbers, tuple((name, _hashable(value)) for name, value in params.items()))
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > FLOAT32.itemsize:
        return call.convolve(lhs.astype(dtype), rhs.astype(dtype))  # type: ignore[no-any-return]
    return _conv(lhs, rhs, call)  # type: ignore[no-any-return]


def _hashable(value: Any) -> Any:
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
    return tuple(map(_hashable, value)) if is_sequence else value


def _all_but(axis: int, ndim: int) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if i != axis)


def _operands(lhs: Any, rhs: Any, call: _Call) -> list[Quantized]:
    sides = enumerate(((lhs, call.numbers.lhs_spec), (rhs, call.numbers.rhs_spec)))
    return [
        prepared(x, call.specs.spec(side), _all_but(axes[0], x.ndim), call.specs.axis_name) for side, (x, axes) in sides
    ]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _conv(lhs: Any, rhs: Any, call: _Call) -> Any:
    left, right = _operands(lhs, rhs, call)
    return call.of_dequantized(left.dequantized(call.dtype), right, 0)


@functools.partial(_conv.defjvp, symbolic_zeros=True)
def _conv_jvp(call: _Call, primals: Any, tangents: Any) -> tuple[Any, Any]:
    left, right = _operands(primals[0], primals[1], call)
    terms = []
    for side, (tangent, other) in enumerate(zip(tangents, (right, left), strict=True)):
        if not isinstance(tangent, SymbolicZero):
            # What is kept are 8-bit numbers; the backward pass dequantizes them again.
            of_tangent = jax.checkpoint(functools.partial(call.of_dequantized, side=side))
            terms.append(of_tangent(tangent.astype(call.dtype), other))
    out = call.of_dequantized(left.dequantized(call.dtype), right, 0)
    total = functools.reduce(lax.add, terms)
    if call.specs.of_gradients is None:
        return out, total
    return out, _primitive().bind(total, specs=call.specs, features=call.numbers.out_spec[1])


# --- Rounding of cotangents -----------------------------------------------------------------------


@functools.cache
def _primitive() -> Any:
    return linear_primitive("quantized_cotangent", _identity, _transpose, _batch, frozenset({0}))


def _identity(tangent: Any, **_: Any) -> Any:
    return tangent * jnp.ones((), tangent.dtype)


def _transpose(cotangent: Any, tangent: Any, *, specs: Specs, features: int) -> list[Any]:
    spec: Any = specs.of_gradients
    shared = _all_but(features, cotangent.ndim)
    return [prepared(cotangent, spec, shared, specs.axis_name).dequantized(tangent.dtype)]


def _batch(operands: Any, positions: Any, *, specs: Specs, features: int) -> tuple[Any, int]:
    tangent = jnp.moveaxis(operands[0], positions[0], 0)
    return _primitive().bind(tangent, specs=specs, features=features + 1), 0
