"""Matmuls whose operands have one scale per tile: a fixed number of neighbors along the contracted axes.

Such scales cannot be applied to a result. JAX has a tiled matmul for devices that support it; elsewhere, and for other
formats and tiles, the dequantized operands are multiplied, in the dtype of operands or result.

References:
    Rouhani et al., "Microscaling Data Formats for Deep Learning", arXiv:2310.10537; NVIDIA, "Introducing NVFP4";
    ``jax.nn.scaled_matmul``; DeepSeek-AI, "DeepSeek-V3 Technical Report", arXiv:2412.19437, section 3.3.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmp_lite._compat import mesh_is_explicit, sharding_in_type, varying_axes
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite._tree import mapped_axes
from jmp_lite.products._dimensions import Axes, Dimensions
from jmp_lite.quant._operands import prepared, to_format
from jmp_lite.quant._product import Call, plain_product
from jmp_lite.quant._scale import FORMATS, SMALLEST_NORMAL, absmax_scale, amax_of, largest
from jmp_lite.quant._spec import QuantSpec

_SMALLEST_E4M3 = 2.0**-9
#: The first major compute capability with units for tiles.
_BLACKWELL = 10


def tile_scale(amax: Any, spec: QuantSpec, axis_name: Any = None) -> tuple[jax.Array, jax.Array]:
    """Returns the scales of tiles with these largest magnitudes, and a common factor."""
    if spec.scale_dtype is None:
        return absmax_scale(amax, spec.dtype, margin=spec.margin, pow2=spec.pow2), jnp.ones((), FLOAT32)
    amax = amax * (2.0**spec.margin / largest(spec.dtype))
    of_all = jnp.max(amax, initial=0) * (1 / largest(spec.scale_dtype))  # XLA divides by constants so
    whole = jnp.maximum(of_all if axis_name is None else lax.pmax(of_all, mapped_axes(axis_name)), SMALLEST_NORMAL)
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


def _tiled(x: Any, spec: QuantSpec, side: int, call: Call) -> _Tiles:
    groups, tile = _order(x.ndim, call.dims, side), spec.tile or 1
    batch, rows, columns = (math.prod(x.shape[axis] for axis in axes) for axes in groups)
    matrix = lax.transpose(_gathered(x, groups[2]), sum(groups, ())).reshape(batch, rows, columns)
    padded = jnp.pad(matrix, ((0, 0), (0, 0), (0, -columns % tile)))
    tiles = padded.reshape(batch, rows, -(-columns // tile), tile)
    amax = amax_of(tiles, -1, keepdims=True, dtype=spec.dtype)
    scale, whole = tile_scale(amax, spec, call.specs.axis_name)
    return _Tiles(to_format(tiles, scale * whole, spec), scale, whole)


def _gathered(x: Any, axes: Axes) -> Any:
    """An array gathered along some axes, if shardings are part of types: a tile must be on one device."""
    sharding = sharding_in_type(jax.typeof(x))
    if sharding is None or all(sharding.spec[axis] is None for axis in axes):
        return x
    spec = [None if axis in axes else name for axis, name in enumerate(sharding.spec)]
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec)))


def both_rounded(lhs: Any, rhs: Any, call: Call, specs: Sequence[QuantSpec | None]) -> tuple[Any, Any]:
    """Returns both operands, quantized and dequantized."""
    return _rounded(lhs, specs[0], 0, call), _rounded(rhs, specs[1], 1, call)


def _rounded(x: Any, spec: QuantSpec | None, side: int, call: Call) -> Any:
    if spec is None:
        return x.astype(call.operand_dtype)
    if spec.tile is None:
        whole = prepared(x, spec, call.dims.contracted[side], call.specs.axis_name)
        return whole.dequantized(call.operand_dtype)
    tiles, groups = _tiled(x, spec, side, call), _order(x.ndim, call.dims, side)
    numbers = (tiles.values.astype(FLOAT32) * (tiles.scale * tiles.whole)).astype(call.operand_dtype)
    order, columns = sum(groups, ()), math.prod(x.shape[axis] for axis in groups[2])
    moved = tiles._replace(values=numbers).matrix()[:, :, :columns].reshape([x.shape[axis] for axis in order])
    return lax.transpose(moved, [order.index(axis) for axis in range(x.ndim)])


def has_kernel(*specs: QuantSpec | None) -> bool:
    """Whether ``jax.nn.scaled_matmul`` supports these tiles: those of MXFP8 or NVFP4."""
    kinds = {(spec.tile, spec.pow2, spec.scale_dtype) for spec in specs if spec is not None}
    dtypes = {spec.dtype for spec in specs if spec is not None}
    is_mx = kinds == {(32, True, None)} and dtypes <= {FORMATS["e4m3"], FORMATS["e5m2"]}
    return None not in specs and (is_mx or (kinds == {(16, False, FORMATS["e4m3"])} and dtypes == {FORMATS["e2m1"]}))


def tiled_product(lhs: Any, rhs: Any, call: Call, specs: Sequence[QuantSpec | None]) -> Any:
    """Multiplies two arrays, at least one of which has a spec with tiles; supports any dimension numbers."""

    def emulated(lhs: Any, rhs: Any) -> Any:
        return plain_product(*both_rounded(lhs, rhs, call, specs), call)

    is_split = mesh_is_explicit() or varying_axes(lhs) or varying_axes(rhs)
    if is_split or call.out_sharding is not None or not (has_kernel(*specs) and has_units()):
        return emulated(lhs, rhs)

    @jax.custom_batching.custom_vmap
    def multiply(lhs: Any, rhs: Any) -> Any:
        return kernel_product(lhs, rhs, call, specs)

    @multiply.def_vmap  # which JAX's matmul of tiles may not support
    def _(_: int, is_mapped: Sequence[bool], lhs: Any, rhs: Any) -> tuple[Any, bool]:
        return jax.vmap(emulated, in_axes=[0 if mapped else None for mapped in is_mapped])(lhs, rhs), True

    return multiply(lhs, rhs)


def has_units() -> bool:
    """Whether the first device multiplies tiles: NVIDIA GPUs from Blackwell on. On others XLA would use float32."""
    device = jax.local_devices()[0]
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]  # of other vendors a name
    return device.platform == "gpu" and major.isdigit() and int(major) >= _BLACKWELL


def kernel_product(lhs: Any, rhs: Any, call: Call, specs: Any) -> Any:
    """Multiplies two arrays with ``jax.nn.scaled_matmul``, which XLA runs with cuDNN on Blackwell."""
    dims = call.dims
    left, right = (_tiled(x, specs[side], side, call) for side, x in enumerate((lhs, rhs)))
    of_scales = specs[0].scale_dtype or jnp.float8_e8m0fnu
    of_left, of_right = (tiles.scale[..., 0].astype(of_scales) for tiles in (left, right))
    result = jax.nn.scaled_matmul(left.matrix(), right.matrix(), of_left, of_right, FLOAT32)
    shape = [lhs.shape[axis] for axis in (*dims.batched[0], *dims.kept(0, lhs.ndim))]
    shape += [rhs.shape[axis] for axis in dims.kept(1, rhs.ndim)]
    return (result * (left.whole * right.whole)).astype(call.dtype).reshape(shape)


# --- Arrays that are held -------------------------------------------------------------------------


def tile_lengths(shape: Sequence[int], shared: Axes, tile: int | None) -> tuple[int, ...] | None:
    """Returns how many neighbors along each axis share a scale; ``None`` if tiles do not divide the shared axes.

    Without a tile, or with one that is longer, all neighbors along the shared axes share one. A tile is filled from the
    last shared axis on.
    """
    sizes, lengths = [max(n, 1) for n in shape], [1] * len(shape)
    total = math.prod(sizes[axis] for axis in shared)
    missing = min(tile or total, total)
    for axis in sorted(shared, reverse=True):
        lengths[axis] = min(sizes[axis], missing)
        if sizes[axis] % lengths[axis] or missing % lengths[axis]:
            return None
        missing //= lengths[axis]
    return tuple(lengths)


def amax_of_tiles(x: Any, lengths: Sequence[int], dtype: DType) -> Any:
    """Returns the largest magnitude of each tile; with size 1 along axes that are one tile."""
    shape = [
        size for n, length in zip(x.shape, lengths, strict=True) for size in (-(-n // length) or 1, min(n, length))
    ]
    return amax_of(jnp.asarray(x).reshape(shape), tuple(range(1, len(shape), 2)), dtype=dtype)
