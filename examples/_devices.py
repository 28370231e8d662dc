"""One device or several: what ``pmap`` needs around a training step."""

import os
from typing import Any

import jax
import numpy as np

AXIS = "batch"


def avoid_wrong_code() -> None:
    """Switches off a fusion of XLA. Call it before anything asks JAX for its devices.

    On the CPU it computes a bfloat16 residual block that ends in a mean wrongly, NaN included: seen in jaxlib 0.12.0,
    not in 0.10.2, where the flag exists too.
    """
    flag, flags = "--xla_cpu_experimental_ynn_fusion_type=", os.environ.get("XLA_FLAGS", "")
    if (0, 11) <= jax.__version_info__[:2] <= (0, 12) and flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def simulate(count: int) -> None:
    """Makes the CPU pose as several devices. Call it before anything asks JAX for its devices."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count)


def choose(count: int) -> list[jax.Device]:
    """The first devices of the machine; simulated ones on the CPU where it has fewer."""
    devices = jax.devices()
    if len(devices) < count:
        devices = jax.devices("cpu")
    if len(devices) < count:
        raise SystemExit(f"error: --devices {count}: only {len(devices)} found; is XLA_FLAGS set?")
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
