"""Data-parallel training with pmap: a TPU pod, several GPU hosts, or one machine.

python examples/pod.py                    # one machine: its accelerators, or 8 simulated devices
srun python examples/pod.py               # every host of a SLURM, MPI or Cloud TPU job finds the others
python examples/pod.py --coordinator 10.0.0.1:1234 --num-processes 2 --process-id 0  # by hand
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import _devices
import _digits_data
import _digits_model
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _options import policy, positive

import jmp_lite as jmp

LEARNING_RATE = 4e-3
DECAY_PER_EPOCH = 0.8

# --- The cluster ----------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses and checks the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    add("--policy", type=policy, default="mixed_float16", help="default: %(default)s")
    add("--epochs", type=positive, default=12, help="default: %(default)s")
    add("--steps", type=positive, help="stop after so many steps, whatever --epochs says")
    add("--batch-size", type=positive, default=8, help="per device; default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--simulate", type=positive, metavar="N", help="train on N simulated devices of this CPU")
    cluster = options.add_argument_group("several hosts")
    add = cluster.add_argument
    add("--distributed", action="store_true", help="let jax.distributed find the other hosts")
    add("--coordinator", metavar="HOST:PORT", help="address of process 0, the same on every host")
    add("--num-processes", type=positive)
    add("--process-id", type=int)
    parsed = options.parse_args(arguments)
    by_hand = (parsed.coordinator, parsed.num_processes, parsed.process_id)
    if None in by_hand and by_hand != (None, None, None):
        options.error("--coordinator, --num-processes and --process-id go together")
    if parsed.policy == "all":
        options.error("--policy all is for digits.py: choose one here")
    return parsed


def in_cluster() -> bool:
    """Whether the environment is that of one process among several."""
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    several = any(int(os.environ.get(name, "1")) > 1 for name in counts)
    return several or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def start(options: argparse.Namespace) -> None:
    """Joins the other hosts if there are any; simulates devices on a machine that has but one CPU."""
    _devices.avoid_wrong_code()
    if options.coordinator:
        jax.distributed.initialize(options.coordinator, options.num_processes, options.process_id)
    elif options.distributed or in_cluster():
        jax.distributed.initialize()
    elif not options.simulate:
        _devices.simulate(8)  # what a machine with accelerators never notices
    if options.simulate:
        jax.config.update("jax_platforms", "cpu")
        _devices.simulate(options.simulate)


# --- Data -----------------------------------------------------------------------------------------


def my_slice(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """The rows that belong to this host: as many on every host, those left over on none."""
    rows = len(arrays[0]) // jax.process_count()
    first = rows * jax.process_index()
    return tuple(array[first : first + rows] for array in arrays)


# --- Training -------------------------------------------------------------------------------------


def make_optimizer(steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """AdamW; every device takes a step, or every device skips it."""
    learning_rate = optax.exponential_decay(LEARNING_RATE, steps_per_epoch, DECAY_PER_EPOCH)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate))
    return jmp.loss_scaled(inner, jmp.DynamicLossScale(2.0**15, period=25), axis_name=_devices.AXIS)


def make_train_step(network: _digits_model.Network, tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    """One step on one device: ``(params, statistics, opt_state, images, labels)``."""

    def loss_fn(params: Any, statistics: Any, images: jax.Array, labels: jax.Array) -> Any:
        logits, statistics = network.apply(params, statistics, images, train=True)
        logits = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), statistics

    def train_step(params: Any, statistics: Any, opt_state: Any, images: Any, labels: Any) -> Any:
        value_and_grad = jmp.scaled_value_and_grad(loss_fn, has_aux=True)
        (loss, seen), grads = value_and_grad(params, statistics, images, labels, state=opt_state)
        loss, grads = jax.lax.pmean((loss, jmp.cast_to_full(grads)), _devices.AXIS)
        params, opt_state = jmp.apply_gradients(tx, grads, opt_state, params)
        metrics = jmp.metrics(opt_state)
        statistics = jmp.select_tree(metrics["last_finite"], seen, statistics)
        return params, statistics, opt_state, {"loss": loss, **metrics}

    return jax.pmap(train_step, _devices.AXIS, donate_argnums=(0, 1, 2))


def make_accuracy(network: _digits_model.Network, digits: _digits_data.Digits) -> Callable[..., float]:
    """The share of all test images that is classified correctly; every host does its part."""
    local = jax.local_device_count()
    images, labels = my_slice(digits.test_images, digits.test_labels)
    missing = -len(labels) % local
    images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
    labels = np.pad(labels, (0, missing), constant_values=-1)  # which no prediction equals
    images, labels = _devices.shard((images, labels), local)
    total = len(digits.test_labels) // jax.process_count() * jax.process_count()

    def count_correct(params: Any, statistics: Any, images: Any, labels: Any) -> jax.Array:
        logits, _ = network.apply(params, statistics, images, train=False)
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.int32)
        return jax.lax.psum(correct, _devices.AXIS)

    count = jax.pmap(count_correct, _devices.AXIS)

    def accuracy(params: Any, statistics: Any) -> float:
        return int(_devices.first_replica(count(params, statistics, images, labels))) / total

    return accuracy


def train(options: argparse.Namespace) -> None:
    """Trains; process 0 prints."""
    report = print if jax.process_index() == 0 else lambda _: None
    digits = _digits_data.load(options.seed)
    images, labels = my_slice(digits.train_images, digits.train_labels)
    local_batch = options.batch_size * jax.local_device_count()
    steps_per_epoch = len(labels) // local_batch
    if steps_per_epoch == 0:
        raise SystemExit(f"error: {len(labels)} images per host do not fill a batch of {local_batch}")
    total = options.steps or options.epochs * steps_per_epoch

    network = _digits_model.linen_network(jmp.get_policy(options.policy), _devices.AXIS)
    tx = make_optimizer(steps_per_epoch)
    train_step, accuracy = make_train_step(network, tx), make_accuracy(network, digits)
    # Every host makes the same parameters from the same seed.
    params, statistics = network.init(jax.random.key(options.seed, impl="rbg"))
    state = _devices.replicate((params, statistics, tx.init(params)))
    report(
        f"{options.policy} on {jax.device_count()} {jax.devices()[0].platform.upper()} devices of "
        f"{jax.process_count()} host(s), {options.batch_size} images each per step"
    )
    began = time.perf_counter()
    for step in range(total):
        batch = _digits_data.batch(images, labels, size=local_batch, step=step, seed=options.seed)
        *state, metrics = train_step(*state, *_devices.shard(batch, jax.local_device_count()))
        if step == 0:
            jax.block_until_ready(metrics)
            report(f"compiled in {time.perf_counter() - began:.1f} s")
            began = time.perf_counter()
        if (step + 1) % steps_per_epoch == 0 or step + 1 == total:
            values = _devices.first_replica(metrics)
            jmp.check_loss_scale(_devices.first_replica(state[2]))
            report(
                f"step {step + 1:4d}  loss {values['loss']:.4f}  "
                f"test accuracy {accuracy(*state[:2]):.2%}  loss scale {values['loss_scale']:g}  "
                f"skipped {values['total_notfinite']}"
            )
    seconds = time.perf_counter() - began
    report(f"{(total - 1) / seconds:.1f} steps/s, evaluation included")
    report(f"all local replicas bit-identical: {_devices.replicas_agree(state)}")


def main(arguments: list[str] | None = None) -> int:
    """Trains on whatever hosts and devices there are."""
    options = parse(arguments)
    start(options)
    try:
        train(options)
    except jmp.JmpLiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
