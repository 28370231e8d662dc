"""Digests of arrays that do not depend on sharding.

Every element is hashed together with its position, and the hashes are summed modulo 2**32. So each device hashes its
shards in place, and an array restored onto another mesh has the same digest as the saved one. The hash of one element
of up to 32 bits is a bijection, so a change to one element is always detected; other accidents are missed with
probability 2**-64. The digest holds no secret: anyone who can write a file can also write a matching digest. Array
formats on disk do not verify this: OCDBT leaves the values of a checkpoint unchecked.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from jmp_lite.checkpoint._processes import gather, without_mesh

#: Shards of up to so many bytes are hashed by NumPy, for which nothing needs to be compiled.
_SMALL = 1 << 16
#: A whole array in the memory of the host is hashed in pieces of so many elements, and the rest by NumPy. A few sizes
#: mean a few programs, whatever the shapes.
_PIECES = (1 << 22, 1 << 20, 1 << 18, 1 << 16, 1 << 14)
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
_NARROW = (jnp.int4, jnp.uint4)
#: Odd factors of the position, one for each of the two hashes.
_STEPS = (0x9E3779B1, 0xB5297A4D)


# --- Hashes of one block, with NumPy or JAX -------------------------------------------------------


def _mix(x: Any) -> Any:
    """A bijection of uint32 in which every bit of the input affects every bit of the output."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def _sums(words: Any, starts: Any, strides: Any, xp: Any) -> Any:
    """Two sums, uint32[2], over the words of a block that begins at ``starts`` in an array with these ``strides``."""
    position = xp.arange(words.shape[-1], dtype=np.uint32).reshape((1,) * (words.ndim - 1) + (-1,))
    for axis, size in enumerate(words.shape[:-1]):
        along = (starts[axis] + xp.arange(size, dtype=np.uint32)) * strides[axis]
        position = position + along.reshape([-1 if i == axis else 1 for i in range(words.ndim)])
    hashes = [_mix(words + position * np.uint32(step)) for step in _STEPS]
    return np.stack([h.sum(dtype=np.uint32) for h in hashes]) if xp is np else _add_up(*hashes)


def _add_up(first: jax.Array, second: jax.Array) -> jax.Array:
    """Both sums in one pass: XLA on CPU vectorizes this loop, ten times as fast as two ``sum``."""
    zero = np.uint32(0)
    both = lax.reduce((first, second), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(first.ndim)))
    return jnp.stack(both)


def _host_words(array: NDArray[Any]) -> NDArray[Any]:
    """The bits of an array as unsigned[elements], and two uint32 for an element of eight bytes."""
    array = array.astype(np.int8) if array.dtype in _NARROW else array
    return np.ascontiguousarray(array).reshape(-1).view(f"u{min(array.dtype.itemsize, 4)}")


def _device_words(array: jax.Array) -> jax.Array:
    """The bits of an array as uint32[*shape, width], on a device."""
    shape, width = array.shape, _width(array.dtype)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    elif array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    elif array.dtype in _NARROW:
        array = array.astype(jnp.int8)
    words = lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize]).astype(jnp.uint32)
    return words.reshape(*shape, width)


def _width(dtype: Any) -> int:
    """How many uint32 hold one element."""
    return int(max(1, dtype.itemsize // 4))


# --- Hashes of whole arrays -----------------------------------------------------------------------


def _line_sums(words: Any, start: Any, xp: Any) -> Any:
    """Sums over consecutive words of an array."""
    return _sums(words.astype(np.uint32)[:, None], start[None], np.ones(1, np.uint32), xp)


_piece_sums = jax.jit(functools.partial(_line_sums, xp=jnp))


def _whole_sums(array: NDArray[Any]) -> NDArray[np.uint32]:
    """Sums over an array in the memory of the host, uint32[2]."""
    words, at = _host_words(array), 0
    pending: list[Any] = []
    for size in _PIECES:
        while len(words) - at >= size:
            pending.append(_piece_sums(words[at : at + size], np.uint32(at % 2**32)))
            at += size
    pending.append(_line_sums(words[at:], np.uint32(at % 2**32), np))
    total: NDArray[np.uint32] = np.sum([np.asarray(pair) for pair in pending], axis=0, dtype=np.uint32)
    return total


# --- Hashes of all that this process has of a leaf ------------------------------------------------


@functools.lru_cache
def _program(mesh: jax.sharding.Mesh) -> Callable[..., jax.Array]:
    """Hashes one block on each device of a mesh at once: one program, however many devices."""

    def one(block: jax.Array, starts: jax.Array, strides: jax.Array) -> Any:
        return _sums(_device_words(block), starts[0], strides, jnp)[None]

    spec = jax.P("local")
    program: Callable[..., jax.Array] = jax.jit(
        jax.shard_map(one, mesh=mesh, in_specs=(spec, spec, jax.P()), out_specs=spec, check_vma=False)
    )
    return program


def _hash_on_devices(blocks: Sequence[jax.Array], starts: NDArray[np.uint32], strides: NDArray[np.uint32]) -> jax.Array:
    """Sums of blocks of one shape, each on its own device, as uint32[blocks, 2]."""
    devices: list[Any] = [next(iter(block.sharding.device_set)) for block in blocks]
    mesh = jax.sharding.Mesh(np.array(devices), ("local",))
    memory = devices[0].default_memory().kind  # blocks in the memory of the host come to the device first
    places = [jax.sharding.SingleDeviceSharding(device, memory_kind=memory) for device in devices]
    stacked = jax.make_array_from_single_device_arrays(
        (len(blocks) * blocks[0].shape[0], *blocks[0].shape[1:]),
        jax.sharding.NamedSharding(mesh, jax.P("local"), memory_kind=memory),
        [jax.device_put(block, place) for block, place in zip(blocks, places, strict=True)],
    )
    return _program(mesh)(stacked, starts, strides)


def is_shared(leaf: Any) -> bool:
    """Whether the processes hold parts of one array, rather than each its own array."""
    return isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable)


def _is_in_host_memory(leaf: jax.Array) -> bool:
    """Whether NumPy sees the whole array without a copy."""
    devices: list[Any] = list(leaf.sharding.device_set)
    return leaf.is_fully_addressable and len(devices) == 1 and devices[0].platform == "cpu"


def _strides(shape: Sequence[int], width: int) -> NDArray[np.uint32]:
    """Row-major strides in words, modulo 2**32."""
    return np.array([width * math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))], np.uint32)


def _local_sums(leaf: Any) -> tuple[list[int], Any]:
    """For every block of a leaf on this process, the number of the copy that it belongs to, and its two sums."""
    if not is_shared(leaf):
        return [jax.process_index()], _whole_sums(np.asarray(leaf))[None]
    if _is_in_host_memory(leaf):
        return [0], _whole_sums(np.asarray(leaf))[None]
    shards = leaf.addressable_shards
    strides = _strides(leaf.shape, _width(leaf.dtype))
    starts = np.array([[i.start or 0 for i in shard.index] for shard in shards]).astype(np.uint32)
    copies = [shard.replica_id for shard in shards]
    if shards[0].data.nbytes > _SMALL:
        return copies, _hash_on_devices([shard.data for shard in shards], starts, strides)
    blocks = [np.asarray(shard.data) for shard in shards]
    words = [_host_words(b).reshape(*b.shape, _width(b.dtype)).astype(np.uint32) for b in blocks]
    return copies, np.stack([_sums(w, start, strides, np) for w, start in zip(words, starts, strict=True)])


def _copies(leaf: Any) -> int:
    """How many copies of the whole leaf exist."""
    if not is_shared(leaf):
        return int(jax.process_count())
    blocks: list[str] = [str(index) for index in leaf.sharding.devices_indices_map(leaf.shape).values()]
    return len(blocks) // len(set(blocks))


def local_sums(leaves: Sequence[Any]) -> NDArray[np.uint32]:
    """Hashes this process's part of the leaves: uint32[leaves, (first copy, all copies), 2]; not a collective."""
    with without_mesh(), jax.transfer_guard("allow"):
        pending = [_local_sums(leaf) for leaf in leaves]
    table = np.zeros((len(leaves), 2, 2), np.uint32)
    for row, (copies, sums) in zip(table, pending, strict=True):
        for copy, pair in zip(copies, np.asarray(sums), strict=True):
            row[1] += pair
            row[0] += pair if copy == 0 else np.zeros_like(pair)
    return table


def combine(leaves: Sequence[Any], sums: NDArray[np.uint32]) -> tuple[list[str], list[bool]]:
    """Sums the hashes of all processes; a collective."""
    table = gather(sums).sum(axis=0, dtype=np.uint32)
    times = np.array([_copies(leaf) for leaf in leaves], np.uint32)
    alike = (table[:, 1] == table[:, 0] * times[:, None]).all(axis=1)
    return [f"{first:08x}{second:08x}" for first, second in table[:, 0]], alike.tolist()


def digests(leaves: Sequence[Any]) -> tuple[list[str], list[bool]]:
    """Hashes the leaves of a state; a collective.

    Args:
        leaves: Arrays of any sharding, on this process or on many, NumPy arrays, Python numbers.

    Returns:
        For each leaf the digest of its first copy, and whether all copies (replicas on devices, or arrays of the same
        name in the processes of a job) have the same digest.
    """
    return combine(leaves, local_sums(leaves))
