"""Products whose operands have one scale per block: a reference for its numerics, not for speed.

Every product, forward and backward, quantizes both operands along the axis that it adds up over, and multiplies what
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

from jmp_lite._dtypes import FLOAT32
from jmp_lite.products._dimensions import Axes, Dimensions
from jmp_lite.quant._operands import refuse_second_derivative
from jmp_lite.quant._scale import absmax_scale, dequantize, quantize
from jmp_lite.quant._spec import QuantSpec

Operand = tuple[Any, QuantSpec | None]


def block_product(lhs: Operand, rhs: Operand, dims: Dimensions, *, out_sharding: Any = None) -> jax.Array:
    """Multiplies two arrays blockwise, each with its spec, into ``float32``; any dimension numbers will do."""
    left, right = (
        x.astype(FLOAT32) if spec is None else _rounded(x, spec, dims, side)
        for side, (x, spec) in enumerate((lhs, rhs))
    )
    return lax.dot_general(left, right, dims, preferred_element_type=FLOAT32, out_sharding=out_sharding)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _rounded(x: Any, spec: QuantSpec, dims: Dimensions, side: int) -> Any:
    """Rounds an operand, seen as ``[batch, kept, contracted]``, to what its blocks can hold; in ``float32``."""
    groups: list[Axes] = [dims.batched[side], dims.kept(side, x.ndim), dims.contracted[side]]
    order = sum(groups, ())
    moved = lax.transpose(x, order)
    matrix = moved.reshape([math.prod(x.shape[axis] for axis in axes) for axes in groups])
    block = spec.granularity if isinstance(spec.granularity, tuple) else (1, spec.granularity)
    rounded = _rounded_matrix(matrix, spec, block).reshape(moved.shape)
    return lax.transpose(rounded, [order.index(axis) for axis in range(x.ndim)])


@_rounded.defjvp
def _no_derivative(spec: QuantSpec, _dims: Dimensions, _side: int, _primals: Any, _tangents: Any) -> Any:
    refuse_second_derivative(spec)


def _rounded_matrix(matrix: Any, spec: QuantSpec, block: Any) -> Any:
    batch, rows, columns = matrix.shape
    padded = jnp.pad(matrix, ((0, 0), (0, -rows % block[0]), (0, -columns % block[1])))
    tiles = padded.reshape(batch, padded.shape[1] // block[0], block[0], padded.shape[2] // block[1], block[1])
    amax = jnp.max(jnp.abs(tiles), axis=(2, 4), keepdims=True, initial=0).astype(FLOAT32)
    scale = absmax_scale(amax, spec.dtype, margin=spec.margin, pow2=spec.pow2)
    rounded = dequantize(quantize(tiles, spec.dtype, scale), scale)
    return rounded.reshape(padded.shape)[:, :rows, :columns]
