"""Products whose operands have one scale per block: a reference for its numerics, not for speed.

Every product, forward and backward, quantises both operands along the axis that it adds up over, and multiplies what
the 8-bit numbers stand for.

References:
    DeepSeek-AI, "DeepSeek-V3 Technical Report", arXiv:2412.19437, section 3.3: tiles of 1 x 128 for activations and
    gradients, blocks of 128 x 128 for weights.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jmp_lite._dimensions import Axes, Dimensions, transposed
from jmp_lite._dtypes import FLOAT32
from jmp_lite.quant._scale import absmax_scale, dequantize, quantize
from jmp_lite.quant._spec import QuantSpec, Specs


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def block_product(lhs: Any, rhs: Any, dims: Dimensions, specs: Specs) -> jax.Array:
    """Multiplies two arrays blockwise, into ``float32``; any dimension numbers will do."""
    result: jax.Array = _product((lhs, specs.spec(0)), (rhs, specs.spec(1)), dims)
    return result


def _forward(lhs: Any, rhs: Any, dims: Dimensions, specs: Specs) -> tuple[jax.Array, tuple[Any, Any]]:
    return block_product(lhs, rhs, dims, specs), (lhs, rhs)


def _backward(dims: Dimensions, specs: Specs, operands: tuple[Any, Any], cotangent: Any) -> tuple[Any, ...]:
    ndims = operands[0].ndim, operands[1].ndim
    results = []
    for side, operand in enumerate(operands):
        found = transposed(dims, ndims, side)
        other = operands[1 - side], specs.spec(1 - side)
        result = _product(*found.ordered((cotangent, specs.of_gradients), other), found.dims)
        results.append(lax.transpose(result, found.permutation).astype(operand.dtype))
    return tuple(results)


block_product.defvjp(_forward, _backward)


def _product(lhs: tuple[Any, QuantSpec | None], rhs: tuple[Any, QuantSpec | None], dims: Dimensions) -> Any:
    return lax.dot_general(_rounded(*lhs, dims, 0), _rounded(*rhs, dims, 1), dims, preferred_element_type=FLOAT32)


def _rounded(x: Any, spec: QuantSpec | None, dims: Dimensions, side: int) -> Any:
    """Rounds an operand, seen as ``[batch, kept, contracted]``, to what its blocks can hold; in ``float32``."""
    if spec is None:
        return x.astype(FLOAT32)
    groups: list[Axes] = [dims.batched[side], dims.kept(side, x.ndim), dims.contracted[side]]
    order = sum(groups, ())
    moved = lax.transpose(x, order)
    matrix = moved.reshape([math.prod(x.shape[axis] for axis in axes) for axes in groups])
    block = spec.granularity if isinstance(spec.granularity, tuple) else (1, spec.granularity)
    rounded = _rounded_matrix(matrix, spec, block).reshape(moved.shape)
    return lax.transpose(rounded, [order.index(axis) for axis in range(x.ndim)])


def _rounded_matrix(matrix: Any, spec: QuantSpec, block: Any) -> Any:
    batch, rows, columns = matrix.shape
    padded = jnp.pad(matrix, ((0, 0), (0, -rows % block[0]), (0, -columns % block[1])))
    tiles = padded.reshape(batch, padded.shape[1] // block[0], block[0], padded.shape[2] // block[1], block[1])
    amax = jnp.max(jnp.abs(tiles), axis=(2, 4), keepdims=True, initial=0).astype(FLOAT32)
    scale = absmax_scale(amax, spec.dtype, margin=spec.margin, pow2=spec.pow2)
    rounded = dequantize(quantize(tiles, spec.dtype, scale), scale)
    return rounded.reshape(padded.shape)[:, :rows, :columns]
