"""Matmuls whose operands have one scale per tile: a fixed number of neighbors along the contracted axes.

Such scales cannot be applied to a result. JAX has a tiled matmul for devices that support it; elsewhere, and for other
formats and tiles, the dequantized operands are multiplied, in the dtype of operands or result.

References:
    Rouhani et al., "Microscaling Data Formats for Deep Learning", arXiv:2310.10537; NVIDIA, "Introducing NVFP4";
    ``jax.nn.scaled_matmul``; DeepSeek-AI, "DeepSeek-V3 Technical Report", arXiv:2412.19437, section 3.3.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmp_lite._compat import mesh_is_explicit, sharding_in_type, varying_axes
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite.products._dimensions import Axes, Dimensions
from jmp_lite.products._matmul import product
from jmp_lite.quant._operands import prepared, to_format
from jmp_lite.quant._scale import FORMATS, SMALLEST_NORMAL, absmax_scale, largest
from jmp_lite.quant._spec import QuantSpec

Operand = tuple[Any, QuantSpec | None]
_SMALLEST_E4M3 = 2.0**-9
#: The first major compute capability with units for tiles.
_BLACKWELL = 10


def tile_scale(amax: Any, spec: QuantSpec, axis_name: Any = None) -> tuple[jax.Array, jax.Array]:
    """Returns the scales of tiles with these largest magnitudes, and a common factor."""
    if spec.scale_dtype is None:
        return absmax_scale(amax, spec.dtype, margin=spec.margin, pow2=spec.pow2), jnp.ones((), FLOAT32)
    amax = amax.astype(FLOAT32) * (2.0**spec.margin / largest(spec.dtype))
    of_all = jnp.max(amax, initial=0) * (1 / largest(spec.scale_dtype))  # XLA divides by constants so
    whole = jnp.maximum(of_all if axis_name is None else lax.pmax(of_all, axis_name), SMALLEST_NORMAL)
    whole = jnp.where(jnp.isfinite(whole), whole, jnp.nan)  # neither e2m1 nor an infinite scale would show it
    return jnp.maximum((amax / whole).astype(spec.scale_dtype).astype(FLOAT32), _SMALLEST_E4M3), whole


class _Tiles(NamedTuple):
    """An operand as one matrix per batch index."""

    values: Any
    """``[batch, kept, tiles, tile]``, of a format of 8 or 4 bits; the last tile is filled up with zeros."""
    scale: Any
    """``float32[batch, kept, tiles, 1]``."""
    whole: Any
    """``float32[]``, a factor of all scales."""

    def matrix(self) -> Any:
        """The numbers as ``[batch, kept, contracted]``."""
        batch, rows, tiles, tile = self.values.shape
        return self.values.reshape(batch, rows, tiles * tile)


def _order(ndim: int, dims: Dimensions, side: int) -> list[Axes]:
    return [dims.batched[side], dims.kept(side, ndim), dims.contracted[side]]


def _sizes(shape: Sequence[int], groups: Sequence[Axes]) -> list[int]:
    return [math.prod(shape[axis] for axis in axes) for axes in groups]


def _tiled(x: Any, spec: QuantSpec, dims: Dimensions, side: int, axis_name: Any) -> _Tiles:
    groups, tile = _order(x.ndim, dims, side), spec.tile or 1
    batch, rows, columns = _sizes(x.shape, groups)
    matrix = lax.transpose(_gathered(x, groups[2]), sum(groups, ())).reshape(batch, rows, columns)
    padded = jnp.pad(matrix, ((0, 0), (0, 0), (0, -columns % tile)))
    tiles = padded.reshape(batch, rows, -(-columns // tile), tile)
    amax = jnp.max(jnp.abs(lax.stop_gradient(tiles)), axis=-1, keepdims=True, initial=0).astype(FLOAT32)
    scale, whole = tile_scale(amax, spec, axis_name)
    return _Tiles(to_format(tiles, scale * whole, spec), scale, whole)


def _gathered(x: Any, axes: Axes) -> Any:
    """An array gathered along some axes, if shardings are part of types: a tile must be on one device."""
    sharding = sharding_in_type(jax.typeof(x))
    if sharding is None or all(sharding.spec[axis] is None for axis in axes):
        return x
    spec = [None if axis in axes else name for axis, name in enumerate(sharding.spec)]
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec)))


def rounded(x: Any, spec: QuantSpec | None, dims: Dimensions, side: int, *, axis_name: Any, dtype: DType) -> Any:
    """Returns a matmul operand, quantized and dequantized."""
    if spec is None:
        return x.astype(dtype)
    if spec.tile is None:
        return prepared(x, spec, dims.contracted[side], axis_name).dequantized(dtype)
    tiles, groups = _tiled(x, spec, dims, side, axis_name), _order(x.ndim, dims, side)
    numbers = (tiles.values.astype(FLOAT32) * (tiles.scale * tiles.whole)).astype(dtype)
    order, columns = sum(groups, ()), math.prod(x.shape[axis] for axis in groups[2])
    moved = tiles._replace(values=numbers).matrix()[:, :, :columns].reshape([x.shape[axis] for axis in order])
    return lax.transpose(moved, [order.index(axis) for axis in range(x.ndim)])


def both_rounded(
    lhs: Any, rhs: Any, specs: Sequence[QuantSpec | None], dims: Dimensions, *, axis_name: Any, dtype: DType
) -> tuple[Any, Any]:
    """Returns both operands as ``rounded``, in the narrowest dtype of the two and the result."""
    wide = narrowest(lhs, rhs, dtype)
    left = rounded(lhs, specs[0], dims, 0, axis_name=axis_name, dtype=wide)
    return left, rounded(rhs, specs[1], dims, 1, axis_name=axis_name, dtype=wide)


def narrowest(lhs: Any, rhs: Any, dtype: DType) -> DType:
    """Returns the dtype to compute a matmul in: the narrowest of the three has all the digits needed."""
    found: DType = min(lhs.dtype, rhs.dtype, dtype, key=lambda dtype: dtype.itemsize)
    return found


def has_kernel(*specs: QuantSpec | None) -> bool:
    """Whether ``jax.nn.scaled_matmul`` supports these tiles: those of MXFP8 or NVFP4."""
    kinds = {(spec.tile, spec.pow2, spec.scale_dtype) for spec in specs if spec is not None}
    dtypes = {spec.dtype for spec in specs if spec is not None}
    is_mx = kinds == {(32, True, None)} and dtypes <= {FORMATS["e4m3"], FORMATS["e5m2"]}
    return None not in specs and (is_mx or (kinds == {(16, False, FORMATS["e4m3"])} and dtypes == {FORMATS["e2m1"]}))


def tiled_product(
    lhs: Operand,
    rhs: Operand,
    dims: Dimensions,
    dtype: DType,
    *,
    axis_name: Any,
    precision: Any = None,
    out_sharding: Any = None,
) -> Any:
    """Multiplies two arrays, each with its spec, of which at least one has tiles; supports any dimension numbers."""
    (left, of_left), (right, of_right) = lhs, rhs
    params = {"specs": (of_left, of_right), "dimension_numbers": dims, "dtype": dtype, "axis_name": axis_name}
    is_split = mesh_is_explicit() or varying_axes(left) or varying_axes(right)
    if is_split or out_sharding is not None or not (has_kernel(of_left, of_right) and has_units()):
        return emulated_product(left, right, **params, precision=precision, out_sharding=out_sharding)
    return _multiplied(left, right, **params)


def has_units() -> bool:
    """Whether the first device multiplies tiles: NVIDIA GPUs from Blackwell on. On others XLA would use float32."""
    device = jax.local_devices()[0]
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]  # of other vendors a name
    return device.platform == "gpu" and major.isdigit() and int(major) >= _BLACKWELL


def _multiplied(lhs: Any, rhs: Any, **params: Any) -> Any:
    """The tiled matmul; under ``vmap``, which JAX's may not support, the matmul of dequantized operands."""

    @jax.custom_batching.custom_vmap
    def multiply(lhs: Any, rhs: Any) -> Any:
        return kernel_product(lhs, rhs, **params)

    @multiply.def_vmap
    def _(_: int, is_mapped: Sequence[bool], lhs: Any, rhs: Any) -> tuple[Any, bool]:
        emulated: Any = functools.partial(emulated_product, **params)
        return jax.vmap(emulated, in_axes=[0 if mapped else None for mapped in is_mapped])(lhs, rhs), True

    return multiply(lhs, rhs)


def emulated_product(
    lhs: Any,
    rhs: Any,
    *,
    specs: Sequence[QuantSpec | None],
    dimension_numbers: Dimensions,
    dtype: DType,
    axis_name: Any,
    precision: Any = None,
    out_sharding: Any = None,
) -> Any:
    """Multiplies dequantized operands, in the narrowest dtype of the two operands and the result."""
    left, right = both_rounded(lhs, rhs, specs, dimension_numbers, axis_name=axis_name, dtype=dtype)
    params = {"dimension_numbers": dimension_numbers, "precision": precision, "out_sharding": out_sharding}
    return product(left, right, left.dtype, tuple(params.items()), dtype)


def kernel_product(
    lhs: Any, rhs: Any, *, specs: Any, dimension_numbers: Dimensions, dtype: DType, axis_name: Any
) -> Any:
    """Multiplies two arrays with ``jax.nn.scaled_matmul``, which XLA runs with cuDNN on Blackwell."""
    dims = dimension_numbers
    left, right = (_tiled(x, specs[side], dims, side, axis_name) for side, x in enumerate((lhs, rhs)))
    of_scales = specs[0].scale_dtype or jnp.float8_e8m0fnu
    of_left, of_right = (tiles.scale[..., 0].astype(of_scales) for tiles in (left, right))
    result = jax.nn.scaled_matmul(left.matrix(), right.matrix(), of_left, of_right, FLOAT32)
    shape = [lhs.shape[axis] for axis in (*dims.batched[0], *dims.kept(0, lhs.ndim))]
    shape += [rhs.shape[axis] for axis in dims.kept(1, rhs.ndim)]
    return (result * (left.whole * right.whole)).astype(dtype).reshape(shape)


# --- Arrays that are held -------------------------------------------------------------------------


def tile_lengths(shape: Sequence[int], shared: Axes, tile: int | None) -> tuple[int, ...] | None:
    """Returns how many neighbors along each axis share a scale; ``None`` if tiles do not divide the shared axes.

    Without a tile, all neighbors along the shared axes share one. A tile is filled from the last shared axis on.
    """
    sizes, lengths = [max(n, 1) for n in shape], [1] * len(shape)
    missing = tile or math.prod(sizes[axis] for axis in shared)
    for axis in sorted(shared, reverse=True):
        lengths[axis] = min(sizes[axis], missing)
        if sizes[axis] % lengths[axis] or missing % lengths[axis]:
            return None
        missing //= lengths[axis]
    return tuple(lengths)


def amax_of_tiles(x: Any, lengths: Sequence[int]) -> Any:
    """Returns the largest magnitude of each tile; with size 1 along axes that are one tile."""
    shape = [
        size for n, length in zip(x.shape, lengths, strict=True) for size in (-(-n // length) or 1, min(n, length))
    ]
    return jnp.max(jnp.abs(jnp.asarray(x).reshape(shape)), axis=tuple(range(1, len(shape), 2)), initial=0)
