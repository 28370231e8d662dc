"""One device or several: what ``pmap`` needs around a training step."""

import os
from typing import Any

import jax
import numpy as np

AXIS = "batch"


def simulate(count: int) -> None:
    """Makes the CPU pose as several devices. Call it before anything asks JAX for its devices."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count)


def choose(count: int) -> list[jax.Device]:
    """The first devices of the machine; simulated ones on the CPU where it has fewer.

    Raises:
        ValueError: If there are not enough of either.
    """
    devices = jax.devices()
    if len(devices) < count:
        devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(f"{count} devices asked for, {len(devices)} found")
    return devices[:count]


def replicate(tree: Any, devices: list[jax.Device] | None = None) -> Any:
    """Copies a tree to every device (None: all, of all hosts), with a leading device axis."""
    # The name of the axis is part of the sharding: under another one the first step would be
    # compiled for this tree, and the second once more for what the first returns.
    copy = jax.pmap(lambda _, tree: tree, AXIS, in_axes=(0, None), devices=devices)
    return copy(np.zeros(len(devices or jax.local_devices())), tree)


def first_replica(tree: Any) -> Any:
    """The tree of the first local device, as NumPy arrays without the device axis."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data).reshape(x.shape[1:]), tree)


def replicas_agree(tree: Any) -> bool:
    """Whether all local devices hold the same bits."""

    def agree(x: jax.Array) -> bool:
        first, *others = (np.asarray(shard.data).tobytes() for shard in x.addressable_shards)
        return all(other == first for other in others)

    return all(agree(x) for x in jax.tree.leaves(tree))


def shard(tree: Any, count: int) -> Any:
    """Splits the leading axis of every array among devices: ``[n, ...] -> [count, n / count, ...]``."""
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)
