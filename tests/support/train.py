"""Trains a small network in float16 on all devices of all processes; a program for ``tests/multiprocess``.

Its one argument is a JSON object, see ``Settings``. What happens depends on it alone, not on the number of processes.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
import traceback
import warnings

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jmp_lite as jmp

FEATURES, WIDTH, ROWS_PER_DEVICE = 6, 32, 4
POLICY = "mixed_float16"
START = 2**40  # in the data: a number that no int32 holds


@dataclasses.dataclass
class Settings:
    """What a job is told."""

    coordinator: str | None
    processes: int
    process: int
    devices: int  # per process
    output: str  # folder for the results
    seed: int
    steps: int
    fault_rate: float = 0.0  # share of the steps in which one device meets an infinity
    directory: str | None = None  # of checkpoints
    every: int = 5
    ballast: int = 0  # megabytes, which make a checkpoint slow to write
    pause: float = 0.0  # seconds per step, so that a step can be aimed at
    hidden: int | None = None  # a step whose checkpoint the last process cannot read


def batch_of(seed, rate, step, devices):
    """Rows, targets, and what is added to the reduced gradients of each device; the same for any hosts."""
    rng = np.random.default_rng([seed, step])
    x = rng.standard_normal((devices * ROWS_PER_DEVICE, FEATURES), np.float32)
    y = np.sin(x.sum(axis=1, keepdims=True))
    fault = np.zeros(devices, np.float32)
    if rng.random() < rate:
        device = rng.integers(devices)
        if rng.random() < 0.5:
            fault[device] = np.inf  # in one shard of the gradients: only a verdict of all devices saves the others
        else:
            x[device * ROWS_PER_DEVICE, 0] = np.inf  # in one row, from where the mean of the gradients carries it
    return x, y, fault


def has_fault(*args):
    """Whether the batch of a step has an infinity in it."""
    return not all(np.isfinite(part).all() for part in batch_of(*args))


def predict(params, x):
    """Two layers."""
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]


def loss_fn(params, x, y):
    """Mean squared error of the prediction in float16."""
    return jnp.mean((jmp.with_policy(predict, POLICY)(params, x) - y) ** 2)


def mean_in_order(tree):
    """The mean over devices in one message, added up in one order however devices are spread over processes."""
    flat, unravel = jax.flatten_util.ravel_pytree(tree)
    return unravel(functools.reduce(jnp.add, jax.lax.all_gather(flat, "data")) / jax.lax.axis_size("data"))


def make_step(mesh, tx):
    """One step of all devices, as ``(state, x, y, fault) -> (state, loss, last_finite)``."""

    def on_device(state, x, y, fault):
        rng, noise = jax.random.split(state["rng"])
        x = x + 0.01 * jax.random.normal(jax.random.fold_in(noise, jax.lax.axis_index("data")), x.shape)
        loss, grads = jmp.scaled_value_and_grad(loss_fn, loss_scale=state["opt_state"])(state["params"], x, y)
        loss, grads = mean_in_order((loss, jmp.cast_to_full(grads)))
        grads = jax.tree.map(lambda g: g + fault[0], grads)
        params, opt_state = jmp.apply_gradients(tx, grads, state["opt_state"], state["params"])
        finite = jmp.metrics(opt_state)["last_finite"]
        seen = jnp.where(jnp.isfinite(x), 0.9 * state["seen"] + 0.1 * x, state["seen"])
        state = {**state, "params": params, "opt_state": opt_state, "rng": rng, "seen": seen}
        return state, loss, finite

    spec = state_spec()
    step = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(spec, P("data"), P("data"), P("data")),
        out_specs=(spec, P(), P()),
        check_vma=False,
    )
    return jax.jit(step, donate_argnums=0)


def state_spec():
    """Everything on every device, but the running mean of the inputs and the ballast, which are sharded."""
    return {"params": P(), "opt_state": P(), "rng": P(), "seen": P("data"), "ballast": P("data")}


def initial_arrays(settings, tx, devices):
    """The state without its counters, made from the seed."""
    w1, w2, rng = jax.random.split(jax.random.key(settings.seed), 3)
    params = {
        "w1": jax.random.normal(w1, (FEATURES, WIDTH)) / FEATURES**0.5,
        "b1": jnp.zeros(WIDTH),
        "w2": jax.random.normal(w2, (WIDTH, 1)) / WIDTH**0.5,
    }
    size = (devices, max(1, settings.ballast * 2**18 // devices))
    ballast = np.random.default_rng(settings.seed).standard_normal(size, np.float32)
    seen = jnp.zeros((devices * ROWS_PER_DEVICE, FEATURES))
    params, opt_state = jmp.optim.from_full_precision(tx, params)
    return {"params": params, "opt_state": opt_state, "rng": rng, "seen": seen, "ballast": ballast}


def optimizer():
    """Adam that keeps 5 bytes, behind a dynamic loss scale, with one verdict for all devices."""
    adam = jmp.optim.stored(optax.adam(1e-2), params="split8", state="8bit")
    return jmp.loss_scaled(adam, jmp.DynamicLossScale(2.0**12, period=8), axis_name="data")


def place(tree, mesh, spec):
    """Spreads arrays that every process has over all devices of all processes."""

    def put(leaf, sharding):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding))
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return {
        name: jax.tree.map(functools.partial(put, sharding=NamedSharding(mesh, spec[name])), part)
        for name, part in tree.items()
    }


def local_shards(tree):
    """What the local devices hold, by path and first row: equal names must have equal bits everywhere."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for shard in data.addressable_shards:
            row = shard.index[0].start or 0 if shard.index else 0
            name, block = f"{jax.tree_util.keystr(path)} {row}", np.asarray(shard.data)
            assert found.setdefault(name, block).tobytes() == block.tobytes(), f"{name} differs between devices"
    return found


def hide(step):
    """Makes the checkpoint of a step unreadable for this process alone."""
    read = ocp.JsonCheckpointHandler.restore

    def restore(self, directory, *args, **kwargs):
        if str(directory).endswith(f"/{step}/header"):
            raise OSError("stale file handle")
        return read(self, directory, *args, **kwargs)

    ocp.JsonCheckpointHandler.restore = restore


def restored_or_new(manager, arrays):
    """The last checkpoint, or the beginning."""
    template = {"arrays": arrays, "step": 0, "position": START, "local": jax.random.key(0)}
    try:
        return manager.restore(template)
    except jmp.errors.CheckpointNotFoundError:
        return 0, template


def train(settings):
    """Trains from the last checkpoint, or from the beginning, to the last step."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, tx = NamedSharding(mesh, P("data")), optimizer()
    train_step = make_step(mesh, tx)
    arrays = place(initial_arrays(settings, tx, devices), mesh, state_spec())
    directory = settings.directory or f"{settings.output}/unused"
    losses, finite = {}, {}
    with jmp.checkpoint.CheckpointManager(directory, policy=POLICY, save_interval_steps=settings.every) as manager:
        first, state = restored_or_new(manager, arrays)
        assert first == state["step"]
        local = jax.random.key(first)  # each process has this one for itself
        assert (jax.random.key_data(state["local"]) == jax.random.key_data(local)).all()
        print(f"from {first}", flush=True)
        arrays, position = state["arrays"], state["position"]
        for step in range(first + 1, settings.steps + 1):
            batch = (
                jax.make_array_from_callback(part.shape, rows, lambda index, part=part: part[index])
                for part in batch_of(settings.seed, settings.fault_rate, step, devices)
            )
            arrays, loss, verdict = train_step(arrays, *batch)
            losses[step], finite[step] = float(loss), bool(verdict)
            position += devices * ROWS_PER_DEVICE
            if settings.directory:
                print(f"save {step}", flush=True)
                local = jax.random.key(step)
                manager.save(step, {"arrays": arrays, "step": step, "position": position, "local": local})
            time.sleep(settings.pause)
            print(f"step {step}", flush=True)
    folder = pathlib.Path(settings.output)
    shards = local_shards({**arrays, "position": jnp.uint32(position - START)})
    np.savez(folder / f"process_{settings.process}.npz", **shards)
    record = {"first": first, "losses": losses, "finite": finite}
    (folder / f"process_{settings.process}.json").write_text(json.dumps(record))


def main():
    """Joins the other processes and trains."""
    settings = Settings(**json.loads(sys.argv[1]))
    warnings.simplefilter("always")
    jax.config.update("jax_num_cpu_devices", settings.devices)
    if settings.coordinator:
        jax.distributed.initialize(settings.coordinator, settings.processes, settings.process)
    if settings.hidden is not None and settings.process == settings.processes - 1:
        hide(settings.hidden)
    assert jax.device_count() == settings.processes * settings.devices
    try:
        train(settings)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # a normal exit would first wait for the other processes


if __name__ == "__main__":
    main()
