"""What the tests of checkpoints share: places for arrays, and a manager."""

import jax

from jmp_lite import checkpoint

POLICY = "mixed_float16"


def mesh_of(devices):
    return jax.make_mesh((devices,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])


def sharding(devices, *spec):
    return jax.sharding.NamedSharding(mesh_of(devices), jax.P(*spec))


def manage(directory, **settings):
    return checkpoint.CheckpointManager(directory, **{"policy": POLICY, **settings})
