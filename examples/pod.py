"""Training on a TPU pod, several GPU hosts or one machine, with checkpoints that survive the loss of a host.

python examples/pod.py                    # one machine: its accelerators, or 8 simulated devices
python examples/pod.py --mode jit --checkpoint-dir runs/pod    # sharded parameters; run it again to continue
srun python examples/pod.py               # every process of a SLURM, Open MPI, Cloud TPU or Kubernetes job joins
python examples/pod.py --coordinator 10.0.0.1:1234 --num-processes 2 --process-id 0  # by hand
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _devices
import _digits_data
import _digits_model
import _pod_data
import _pod_modes
import jax
import jax.numpy as jnp
import optax
from _options import policy, positive
from _pod_checkpoints import Checkpoints, ResumeError, preempted
from _pod_report import Log, fingerprint
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jmp_lite as jmp

LEARNING_RATE = 4e-3
DECAY_PER_EPOCH = 0.8
PREEMPTED = 143  # as if SIGTERM had ended the process: launchers know what to do

# --- The cluster ----------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses and checks the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    add("--mode", choices=tuple(_pod_modes.MODES), default="pmap", help="default: %(default)s; jit shards parameters")
    add("--policy", type=policy, default="mixed_float16", help="default: %(default)s")
    add("--epochs", type=positive, default=12, help="default: %(default)s")
    add("--steps", type=positive, help="stop after so many steps, whatever --epochs says")
    add("--batch-size", type=positive, default=8, help="per device; default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--simulate", type=positive, metavar="N", help="train on N simulated devices of this CPU")
    add(
        "--checkpoint-dir",
        metavar="DIR",
        help="a folder that all hosts see, or gs://...: resume from the checkpoints there, and write more",
    )
    add("--checkpoint-every", type=positive, default=50, metavar="STEPS", help="default: %(default)s")
    add("--logdir", type=Path, metavar="DIR", help="process 0 writes TensorBoard event files there")
    cluster = options.add_argument_group("several hosts")
    add = cluster.add_argument
    add("--coordinator", metavar="HOST:PORT", help="address of process 0, the same on every host")
    add("--num-processes", type=positive)
    add("--process-id", type=int)
    add("--timeout", type=positive, default=300, metavar="SECONDS", help="wait for all; default: %(default)s")
    parsed = options.parse_args(arguments)
    by_hand = (parsed.coordinator, parsed.num_processes, parsed.process_id)
    if None in by_hand and by_hand != (None, None, None):
        options.error("--coordinator, --num-processes and --process-id go together")
    if parsed.policy == "all":
        options.error("--policy all is for digits.py: choose one here")
    return parsed


def start(options: argparse.Namespace) -> None:
    """Joins the other hosts if there are any; simulates devices on a machine that has but one CPU."""
    _devices.avoid_wrong_code()
    by_hand = (options.coordinator, options.num_processes, options.process_id)
    joined = jmp.distributed.initialize(*by_hand, timeout=options.timeout)
    if options.simulate:
        jax.config.update("jax_platforms", "cpu")
        _devices.simulate(options.simulate)
    elif not joined:
        _devices.simulate(8)  # what a machine with accelerators never notices


# --- Training -------------------------------------------------------------------------------------


def make_optimizer(steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """AdamW; every device takes a step, or every device skips it."""
    learning_rate = optax.exponential_decay(LEARNING_RATE, steps_per_epoch, DECAY_PER_EPOCH)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate))
    return jmp.loss_scaled(inner, jmp.DynamicLossScale(2.0**15, period=25))


def make_accuracy(network: _digits_model.Network, digits: _digits_data.Digits, mesh: Any) -> Callable[..., float]:
    """The share of all test images that is classified correctly; every host does its part."""
    everyone, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(_devices.AXIS))
    test = _pod_data.padded(digits.test_images, digits.test_labels, mesh.size)
    mine = _pod_data.my_rows(len(test[0]))
    images, labels = _pod_data.to_global(tuple(array[mine] for array in test), rows)

    def count_correct(params: Any, statistics: Any, images: Any, labels: Any) -> jax.Array:
        logits, _ = network.apply(params, statistics, images, train=False)
        return jnp.sum(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.int32)

    count = jax.jit(count_correct, out_shardings=everyone)
    return lambda params, statistics: int(count(params, statistics, images, labels)) / len(digits.test_labels)


class Training:
    """A run of the example: what to compute, and from where to where."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.mesh = options, _pod_modes.make_mesh()
        self.digits = _digits_data.load(options.seed)
        self.batch_size = options.batch_size * self.mesh.size
        self.steps_per_epoch = len(self.digits.train_labels) // self.batch_size
        if self.steps_per_epoch == 0:
            raise SystemExit(f"error: {len(self.digits.train_labels)} images do not fill a batch of {self.batch_size}")
        self.total = options.steps or options.epochs * self.steps_per_epoch
        policy = jmp.get_policy(options.policy)
        self.tx = make_optimizer(self.steps_per_epoch)
        self.network = _digits_model.linen_network(policy)
        self.mode = _pod_modes.MODES[options.mode](_digits_model.linen_network, self.tx, policy, self.mesh)
        self.accuracy = make_accuracy(self.network, self.digits, self.mesh)

    def settings(self) -> dict[str, Any]:
        """What a run must share with the run that it resumes from; the mode and the number of hosts may change."""
        return {"policy": self.options.policy, "seed": self.options.seed, "batch size": self.batch_size}

    def initial_state(self) -> _pod_modes.State:
        """Global arrays. Every host makes the same parameters from the same seed."""
        params, statistics = self.network.init(jax.random.key(self.options.seed, impl="rbg"))
        state = params, statistics, self.tx.init(params)
        return _pod_modes.put(state, self.mode.layout(state))

    def batch(self, step: int) -> Any:
        """The images and labels of one step, counted from 1."""
        digits, seed = self.digits, self.options.seed
        rows = _pod_data.my_batch(
            digits.train_images, digits.train_labels, size=self.batch_size, step=step - 1, seed=seed
        )
        return self.mode.split(rows)

    def run(self, checkpoints: Checkpoints) -> int:
        """Trains from the last checkpoint, or from the beginning, to the end; returns the exit status."""
        first, whole = checkpoints.restore(self.initial_state())
        with Log(self.options.logdir, first) as log:
            log.print(
                f"{self.options.policy} with {self.options.mode} on {self.mesh.size} "
                f"{jax.devices()[0].platform.upper()} devices of {jax.process_count()} host(s), "
                f"{self.options.batch_size} images each per step" + f", going on after step {first}" * (first > 0)
            )
            return self.take_steps(first, self.mode.enter(whole), checkpoints, log)

    def take_steps(self, first: int, state: Any, checkpoints: Checkpoints, log: Log) -> int:
        """Trains a state that has seen ``first`` steps; returns the exit status."""
        metrics: dict[int, Any] = {}
        began = time.perf_counter()
        for step in range(first + 1, self.total + 1):
            state, metrics[step] = self.mode.step(state, self.batch(step))
            if step == first + 1:
                jax.block_until_ready(metrics)
                log.print(f"compiled in {time.perf_counter() - began:.1f} s")
                began = time.perf_counter()
            stop = preempted(step)
            if stop or checkpoints.due(step) or step == self.total:
                checkpoints.save(step, self.mode.leave(state))
            if stop or step % self.steps_per_epoch == 0 or step == self.total:
                params, statistics, opt_state = self.mode.leave(state)
                jmp.check_loss_scale(opt_state)
                log.steps(self.mode.host(metrics), self.accuracy(params, statistics))
                metrics.clear()
            if stop:
                log.print(f"preempted after step {step}")
                return PREEMPTED
        if self.total > first + 1:
            speed = (self.total - first - 1) / (time.perf_counter() - began)
            log.print(f"{speed:.1f} steps/s, evaluation included")
        checksum, agreed = fingerprint(self.mode.leave(state), self.mesh)
        log.print(f"all replicas bit-identical: {agreed and self.mode.agree(state)} (checksum {checksum:08x})")
        return 0


def main(arguments: list[str] | None = None) -> int:
    """Trains on whatever hosts and devices there are."""
    options = parse(arguments)
    try:
        start(options)
        training = Training(options)
        with Checkpoints(options.checkpoint_dir, options.checkpoint_every, training.settings()) as checkpoints:
            return training.run(checkpoints)
    except (jmp.errors.JmpLiteError, ResumeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
