"""Convolutions and ragged matmuls of dequantized operands: the accuracy of 8 bits, not the speed.

Few devices have fast 8-bit convolutions or ragged matmuls, many have none, and rewriting them as matmuls costs copies.
So the operands are quantized, dequantized, and multiplied in their dtype. The residuals are 8-bit.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jmp_lite._compat import linear_primitive
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite.errors import InvalidRecipeError
from jmp_lite.products._dimensions import Axes, dimensions
from jmp_lite.quant._operands import Quantized, packed, prepared, result_dtype, unpacked
from jmp_lite.quant._spec import QuantSpec, Specs


class _Call(NamedTuple):
    """Everything about a bilinear function except its operands."""

    multiply: Callable[..., Any]
    """``lax.conv_general_dilated`` or ``lax.ragged_dot_general``, for arrays of the dtype of the result."""
    specs: Specs
    dtype: DType
    """Of the result."""
    shared: tuple[Axes, Axes]
    """Which axes of the left and of the right operand share a scale per channel."""
    features: int
    """The axis of the result whose cotangents share none."""
    group: int | None = None
    """The axis of the right operand along which each array has its own scales."""

    def of_bits(self, x: Any, other: Quantized, sizes: tuple[Any, ...], side: int) -> Any:
        """Multiplies an operand, or its tangent, by the other one, given as bits."""
        factor = unpacked(other, self.specs.spec(1 - side)).dequantized(self.dtype)
        return self.multiply(x, factor, *sizes) if side == 0 else self.multiply(factor, x, *sizes)


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
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    shared = _all_but(numbers.lhs_spec[0], lhs.ndim), _all_but(numbers.rhs_spec[0], rhs.ndim)
    multiply = _with_params(lax.conv_general_dilated, dimension_numbers=numbers, **params)
    dtype = result_dtype(lhs, rhs, preferred_element_type)
    return _called(lhs, rhs, (), _Call(multiply, specs, dtype, shared, numbers.out_spec[1]))


def quantized_ragged_dot(
    lhs: Any,
    rhs: Any,
    group_sizes: Any,
    specs: Specs,
    *,
    ragged_dot_dimension_numbers: Any,
    preferred_element_type: Any = None,
    **params: Any,
) -> jax.Array:
    """Multiplies ragged groups as ``DotRecipe.ragged_dot`` documents."""
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    multiply = _with_params(lax.ragged_dot_general, ragged_dot_dimension_numbers=ragged_dot_dimension_numbers, **params)
    dtype = result_dtype(lhs, rhs, preferred_element_type)
    shared, batched = dimensions(ragged_dot_dimension_numbers.dot_dimension_numbers)
    groups = tuple(ragged_dot_dimension_numbers.rhs_group_dimensions)
    [ragged] = ragged_dot_dimension_numbers.lhs_ragged_dimensions
    is_summed = ragged in shared[0]  # into one result per group
    ndim = lhs.ndim + rhs.ndim - 2 * len(shared[0]) - len(batched[0]) - len(groups) + is_summed
    call = _Call(multiply, specs, dtype, shared, ndim - 1, groups[0] if groups else None)
    return _called(lhs, rhs, (group_sizes,), call)


def _with_params(function: Callable[..., Any], **params: Any) -> Callable[..., Any]:
    """The parameters that are given: JAX versions have different ones."""
    return functools.partial(function, **{name: value for name, value in params.items() if value is not None})


def _called(lhs: Any, rhs: Any, sizes: tuple[Any, ...], call: _Call) -> jax.Array:
    if call.specs.is_tiled:
        raise InvalidRecipeError(
            f"Convolutions and ragged matmuls have scales per tensor or per channel, not per tile: got {call.specs}."
        )
    if not jnp.issubdtype(call.dtype, jnp.floating) or call.dtype.itemsize > FLOAT32.itemsize:
        return call.multiply(lhs.astype(call.dtype), rhs.astype(call.dtype), *sizes)  # type: ignore[no-any-return]
    return _emulated(lhs, rhs, sizes, call)  # type: ignore[no-any-return]


def _all_but(axis: int, ndim: int) -> Axes:
    return tuple(i for i in range(ndim) if i != axis)


def _operands(lhs: Any, rhs: Any, call: _Call) -> tuple[Quantized, Quantized]:
    """Both operands as bits and scales."""
    left = prepared(lhs, call.specs.spec(0), call.shared[0], call.specs.axis_name)
    return packed(left), packed(_by_group(rhs, call.specs.spec(1), call))


def _by_group(rhs: Any, spec: QuantSpec | None, call: _Call) -> Quantized:
    if call.group is None or spec is None or spec.granularity == "channel":
        return prepared(rhs, spec, call.shared[1], call.specs.axis_name)
    group = call.group
    held = jax.vmap(lambda x: prepared(x, spec, (), call.specs.axis_name), group, Quantized(group, 0))(rhs)
    return Quantized(held.values, held.scale.reshape([-1 if axis == group else 1 for axis in range(rhs.ndim)]))


def _multiplied(left: Quantized, right: Quantized, sizes: tuple[Any, ...], call: _Call) -> Any:
    return call.of_bits(unpacked(left, call.specs.spec(0)).dequantized(call.dtype), right, sizes, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _emulated(lhs: Any, rhs: Any, sizes: tuple[Any, ...], call: _Call) -> Any:
    return _multiplied(*_operands(lhs, rhs, call), sizes, call)


@functools.partial(_emulated.defjvp, symbolic_zeros=True)
def _emulated_jvp(call: _Call, primals: Any, tangents: Any) -> tuple[Any, Any]:
    lhs, rhs, sizes = primals
    left, right = _operands(lhs, rhs, call)
    out = _multiplied(left, right, sizes, call)
    terms = []
    for side, (tangent, other) in enumerate(zip(tangents[:2], (right, left), strict=True)):
        if not isinstance(tangent, SymbolicZero):
            # Residuals are 8-bit numbers; the backward pass dequantizes them again.
            of_tangent = jax.checkpoint(functools.partial(call.of_bits, side=side))
            terms.append(of_tangent(tangent.astype(call.dtype), other, sizes))
    total = functools.reduce(lax.add, terms) if terms else jnp.zeros_like(out)
    if call.specs.of_gradients is None:
        return out, total
    return out, _primitive().bind(total, specs=call.specs, features=call.features)


# --- Rounding of cotangents -----------------------------------------------------------------------


@functools.cache
def _primitive() -> Any:
    return linear_primitive("quantized_cotangent", _identity, _transpose, _batch, frozenset({0}))


def _identity(tangent: Any, **_: Any) -> Any:
    return tangent * jnp.ones((), tangent.dtype)


def _transpose(cotangent: Any, tangent: Any, *, specs: Specs, features: int) -> list[Any]:
    shared = _all_but(features, cotangent.ndim)
    return [prepared(cotangent, specs.of_gradients, shared, specs.axis_name).dequantized(tangent.dtype)]


def _batch(operands: Any, positions: Any, *, specs: Specs, features: int) -> tuple[Any, int]:
    tangent = jnp.moveaxis(operands[0], positions[0], 0)
    return _primitive().bind(tangent, specs=specs, features=features + 1), 0
