"""The derivative of a quantized matmul: linear in a tangent, with a transpose that quantizes the cotangent.

It is a primitive so that ``vmap`` acts before transposition: the gradient of a weight is one matmul over the whole
batch, however it was mapped. The residual is the other operand, in 8 bits.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jmp_lite._compat import linear_primitive
from jmp_lite._dtypes import FLOAT32
from jmp_lite.products._dimensions import Transposed, mapped, transposed
from jmp_lite.products._matmul import permuted_sharding
from jmp_lite.quant._operands import Quantized, packed, prepared, unpacked, unscaled
from jmp_lite.quant._product import Call, folded, plain_product, scaled_product
from jmp_lite.quant._tiles import tiled_product


def tangent_product(tangent: Any, other: Quantized, side: int, call: Call) -> Any:
    """Multiplies the tangent of the operand on a side by the other operand, as the forward matmul used it."""
    return _primitive().bind(tangent, *packed(other), side=side, call=call)


@functools.cache
def _primitive() -> Any:
    return linear_primitive("quantized_product_tangent", _evaluate, _transpose, _batch, frozenset({0}))


def _evaluate(tangent: Any, bits: Any, scale: Any, *, side: int, call: Call) -> Any:
    other = unpacked(Quantized(bits, scale), call.specs.kept(1 - side)).dequantized(call.operand_dtype)
    lhs, rhs = (tangent, other) if side == 0 else (other, tangent)
    return plain_product(lhs, rhs, call)


def _transpose(cotangent: Any, tangent: Any, bits: Any, scale: Any, *, side: int, call: Call) -> list[Any]:
    """The cotangent of the operand, and ``None`` for the others."""
    specs, other = call.specs, unpacked(Quantized(bits, scale), call.specs.kept(1 - side))
    found = transposed(call.dims, (tangent.ndim, bits.ndim) if side == 0 else (bits.ndim, tangent.ndim), side)
    out_sharding = permuted_sharding(tangent, found.axes)
    call = call._replace(dims=found.dims, dtype=tangent.dtype, out_sharding=out_sharding)
    if specs.of_gradients is None:
        result = plain_product(*found.ordered(cotangent, other.dequantized(call.operand_dtype)), call)
    elif specs.is_tiled:
        own = found.ordered(specs.of_gradients, specs.spec(1 - side))
        result = tiled_product(*found.ordered(cotangent, other.values), call._replace(precision=None), own)
    else:
        result = _quantized(cotangent, other, found, call)
    return [lax.transpose(result, found.permutation), None, None]


def _quantized(cotangent: Any, other: Quantized, found: Transposed, call: Call) -> Any:
    specs = call.specs
    if other.scale.ndim:
        cotangent = folded(cotangent.astype(FLOAT32), other.scale, found)
        other = unscaled(other.values)
    operand = prepared(cotangent, specs.of_gradients, found.dims.contracted[found.position], specs.axis_name)
    precise = call._replace(precision=lax.Precision.HIGHEST)
    return scaled_product(*found.ordered(operand, other), precise, (*specs.operands, specs.of_gradients))


def _batch(operands: Any, positions: Any, *, side: int, call: Call) -> tuple[Any, int]:
    tangent, values, scale = (
        x if position is None else jnp.moveaxis(x, position, 0) for x, position in zip(operands, positions, strict=True)
    )
    tangent_mapped, values_mapped, scale_mapped = (position is not None for position in positions)
    if scale_mapped and not values_mapped:
        values, values_mapped = jnp.broadcast_to(values, (scale.shape[0], *values.shape)), True
    if scale_mapped and scale.ndim == 1:
        scale = scale.reshape(-1, *[1] * (values.ndim - 1))
    elif values_mapped and not scale_mapped and scale.ndim:
        scale = scale[None]
    is_mapped, lhs = (tangent_mapped, values_mapped), tangent
    if side == 1:
        is_mapped, lhs = is_mapped[::-1], values
    dims, axis = mapped(call.dims, lhs.ndim, is_mapped)
    call = call._replace(dims=dims, out_sharding=_with_axis(call.out_sharding, axis))
    return _primitive().bind(tangent, values, scale, side=side, call=call), axis


def _with_axis(sharding: Any, axis: int) -> Any:
    """The sharding of an array that has one more axis, which is not sharded."""
    if sharding is None:
        return None
    spec = list(getattr(sharding, "spec", sharding))
    inserted = PartitionSpec(*spec[:axis], None, *spec[axis:])
    return NamedSharding(sharding.mesh, inserted) if isinstance(sharding, NamedSharding) else inserted
