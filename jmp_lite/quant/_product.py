"""One matmul of operands with scales.

The scales are applied to the result, as one factor if both are scalars: XLA then runs the matmul of float8 arrays as
one cuBLASLt call with the factor inside.

References:
    XLA, ``gemm_rewriter.cc``: which patterns become float8 matmuls on NVIDIA GPUs.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmp_lite._compat import INLINE
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite.products._dimensions import Dimensions, Transposed
from jmp_lite.products._matmul import Params, product
from jmp_lite.quant._operands import Quantized
from jmp_lite.quant._scale import is_integer
from jmp_lite.quant._spec import QuantSpec, Specs


class Call(NamedTuple):
    """Everything about a matmul except its operands."""

    dims: Dimensions
    specs: Specs
    dtype: DType
    """Of the result."""
    operand_dtype: DType
    """Of matmuls that are not quantized: the narrowest of operands and result has all the digits needed."""
    precision: Any
    """Of matmuls that are not quantized."""
    out_sharding: Any

    @property
    def params(self) -> Params:
        """The parameters of ``lax.dot_general``, but for the dtype of the result."""
        given = {"dimension_numbers": self.dims, "precision": self.precision, "out_sharding": self.out_sharding}
        return tuple(given.items())


def plain_product(lhs: Any, rhs: Any, call: Call) -> Any:
    """Multiplies two arrays that are not quantized, or not any more."""
    return product(lhs, rhs, call.operand_dtype, call.params, call.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3), inline=INLINE)
def scaled_product(lhs: Quantized, rhs: Quantized, call: Call, specs: Sequence[QuantSpec | None]) -> Any:
    """Multiplies two operands, of which at least one is quantized; a narrower one is cast to the other, exactly.

    If the scales of all ``specs`` are powers of two, bfloat16 results need no float32 intermediate. On NVIDIA GPUs
    float8 accumulates with fewer bits unless the precision is HIGHEST.
    """
    left, right = lhs.values, rhs.values
    if left.dtype.itemsize == right.dtype.itemsize == 1:
        is_exact = call.dtype == jnp.bfloat16 and all(spec is not None and spec.pow2 for spec in specs)
        added_up_in = jnp.int32 if is_integer(left.dtype) else call.dtype if is_exact else FLOAT32
        result = lax.dot_general(left, right, preferred_element_type=added_up_in, **dict(call.params))
        result = result if is_exact else result.astype(FLOAT32)
    else:
        wide = max(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
        result = product(left.astype(wide), right.astype(wide), wide, call.params, FLOAT32)
    return _scaled(result, lhs.scale, rhs.scale, call.dims, is_whole=is_integer(left.dtype)).astype(call.dtype)


def _scaled(result: Any, lhs_scale: Any, rhs_scale: Any, dims: Dimensions, *, is_whole: bool) -> Any:
    """Applies scales, to integer sums one after the other: the product of the scales may underflow float32."""
    if lhs_scale.ndim == rhs_scale.ndim == 0:
        if not is_whole:
            return result * (lhs_scale * rhs_scale).astype(result.dtype)
        return result * jnp.minimum(lhs_scale, rhs_scale) * jnp.maximum(lhs_scale, rhs_scale)
    for side, scale in enumerate((lhs_scale, rhs_scale)):
        factor = _along_result(scale, result.ndim, dims, side) if scale.ndim else scale
        result = result * factor.astype(result.dtype)
    return result


def _along_result(scale: Any, ndim: int, dims: Dimensions, side: int) -> Any:
    """Lays out the scale of an operand, of size 1 along contracted axes, like the result."""
    batched, kept = dims.batched[side], dims.kept(side, scale.ndim)
    sizes = [scale.shape[axis] for axis in (*batched, *kept)]
    others = [1] * (ndim - len(sizes))
    shape = [*sizes, *others] if side == 0 else [*sizes[: len(batched)], *others, *sizes[len(batched) :]]
    return lax.transpose(scale, (*batched, *kept, *dims.contracted[side])).reshape(shape)


def folded(cotangent: Any, scale: Any, found: Transposed) -> Any:
    """Multiplies a cotangent by the scale of the other operand, of its rank, along axes that the two share.

    Per-channel scales lie along axes that the transposed matmul contracts, so they cannot be applied to its result.
    """
    axes = [found.dims.contracted[operand] + found.dims.batched[operand] for operand in (0, 1)]
    shared = dict(zip(axes[found.position], axes[1 - found.position], strict=True))
    order = [shared[axis] for axis in range(cotangent.ndim) if axis in shared]
    shape = [scale.shape[shared[axis]] if axis in shared else 1 for axis in range(cotangent.ndim)]
    rest = [axis for axis in range(scale.ndim) if axis not in order]
    return cotangent * lax.transpose(scale, (*order, *rest)).reshape(shape)
