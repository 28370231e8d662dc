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
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite.products._dimensions import Dimensions, Transposed, mapped, transposed
from jmp_lite.products._matmul import permuted_sharding, product
from jmp_lite.quant._operands import Quantized, packed, prepared, unpacked, unscaled
from jmp_lite.quant._product import folded, scaled_product
from jmp_lite.quant._spec import Specs
from jmp_lite.quant._tiles import tiled_product

#: The position of the tangent.
_LINEAR = frozenset({0})


def tangent_product(
    tangent: Any,
    other: Quantized,
    side: int,
    *,
    dims: Dimensions,
    specs: Specs,
    dtype: DType,
    operand_dtype: DType,
    precision: Any,
    out_sharding: Any,
) -> Any:
    """Multiplies the tangent of one operand by the other operand.

    Args:
        tangent: Of the operand on ``side``, which is 0 (left) or 1 (right).
        other: The other operand, as the forward matmul used it.
        side: Which operand it is the tangent of.
        dims: Of the matmul.
        specs: The recipe.
        dtype: Of the result.
        operand_dtype: The dtype of matmuls that are not quantized.
        precision: Of matmuls that are not quantized.
        out_sharding: As for ``lax.dot_general``.
    """
    return _primitive().bind(
        tangent,
        *packed(other),
        side=side,
        dimension_numbers=dims,
        specs=specs,
        dtype=dtype,
        operand_dtype=operand_dtype,
        precision=precision,
        out_sharding=out_sharding,
    )


@functools.cache
def _primitive() -> Any:
    return linear_primitive("quantized_product_tangent", _evaluate, _transpose, _batch, _LINEAR)


def _evaluate(
    tangent: Any,
    bits: Any,
    scale: Any,
    *,
    side: int,
    specs: Specs,
    dtype: DType,
    operand_dtype: DType,
    **params: Any,
) -> Any:
    operands = [tangent, unpacked(Quantized(bits, scale), specs.kept(1 - side)).dequantized(operand_dtype)]
    lhs, rhs = operands if side == 0 else operands[::-1]
    kept = tuple((name, params[name]) for name in ("dimension_numbers", "precision", "out_sharding"))
    return product(lhs, rhs, operand_dtype, kept, dtype)


def _transpose(
    cotangent: Any,
    tangent: Any,
    bits: Any,
    scale: Any,
    *,
    side: int,
    dimension_numbers: Dimensions,
    specs: Specs,
    operand_dtype: DType,
    precision: Any,
    **_: Any,
) -> list[Any]:
    """The cotangent of the operand, and ``None`` for the others."""
    ndims = (tangent.ndim, bits.ndim) if side == 0 else (bits.ndim, tangent.ndim)
    found = transposed(dimension_numbers, ndims, side)
    other = unpacked(Quantized(bits, scale), specs.kept(1 - side))
    params = {"dtype": tangent.dtype, "out_sharding": permuted_sharding(tangent, found.axes)}
    if specs.of_gradients is None:
        of_operand = _straight_through(cotangent, other, found, operand_dtype, precision=precision, **params)
    elif specs.is_tiled:
        operands = found.ordered((cotangent, specs.of_gradients), (other.values, specs.spec(1 - side)))
        of_operand = tiled_product(*operands, found.dims, axis_name=specs.axis_name, **params)
    else:
        of_operand = _quantized(cotangent, other, found, specs, **params)
    return [lax.transpose(of_operand, found.permutation), None, None]


def _straight_through(
    cotangent: Any,
    other: Quantized,
    found: Transposed,
    operand_dtype: DType,
    *,
    dtype: DType,
    precision: Any,
    out_sharding: Any,
) -> Any:
    params = {"dimension_numbers": found.dims, "precision": precision, "out_sharding": out_sharding}
    factor = other.dequantized(operand_dtype)
    return product(*found.ordered(cotangent, factor), operand_dtype, tuple(params.items()), dtype)


def _quantized(
    cotangent: Any,
    other: Quantized,
    found: Transposed,
    specs: Specs,
    *,
    dtype: DType,
    out_sharding: Any,
) -> Any:
    spec: Any = specs.of_gradients
    if other.scale.ndim:
        cotangent = folded(cotangent.astype(FLOAT32), other.scale, found)
        other = unscaled(other.values)
    operand = prepared(cotangent, spec, found.dims.contracted[found.position], specs.axis_name)
    return scaled_product(
        *found.ordered(operand, other),
        found.dims,
        dtype,
        precision=lax.Precision.HIGHEST,
        out_sharding=out_sharding,
        has_exact_scales=all(s is not None and s.pow2 for s in (specs.spec(0), specs.spec(1), spec)),
    )


def _batch(
    operands: Any, positions: Any, *, side: int, dimension_numbers: Dimensions, **params: Any
) -> tuple[Any, int]:
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
    is_mapped = (tangent_mapped, values_mapped)
    ndims = tangent.ndim - tangent_mapped, values.ndim - values_mapped
    if side == 1:
        ndims, is_mapped = ndims[::-1], is_mapped[::-1]
    dims, axis = mapped(dimension_numbers, ndims, is_mapped)
    params = {**params, "out_sharding": _with_axis(params["out_sharding"], axis)}
    result = _primitive().bind(tangent, values, scale, side=side, dimension_numbers=dims, **params)
    return result, axis


def _with_axis(sharding: Any, axis: int) -> Any:
    """The sharding of an array that has one more axis, which is not sharded."""
    if sharding is None:
        return None
    spec = list(getattr(sharding, "spec", sharding))
    inserted = PartitionSpec(*spec[:axis], None, *spec[axis:])
    return NamedSharding(sharding.mesh, inserted) if isinstance(sharding, NamedSharding) else inserted
