"""Trains a small ResNet on handwritten digits in several precisions and compares them.

python examples/digits.py                           # float32, bfloat16, float16: under a minute
python examples/digits.py --policy mixed_float16 --devices 8
python examples/digits.py --state 8bit              # 5 bytes per parameter and its state, instead of 12
python examples/digits.py --policy mixed_float16 --loss-multiplier 2**-20 --loss-scale none
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import _devices
import _digits_data
import _digits_model
import _digits_options
import _options
import _report
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _history import Checkpoint, History, ResumeError
from _progress import progress_bar
from rich.console import Console
from rich.progress import Progress

import jmp_lite as jmp

LEARNING_RATE = 4e-3
DECAY_PER_EPOCH = 0.8
WEIGHT_DECAY = 1e-4
GROWTH_PERIOD = 25  # 2000 is usual; a short run shows more of the automaton with less
MANY_ZEROS = 0.9  # as a share of all gradients; ReLU and padding make some

State = tuple[Any, Any, Any]  # parameters, BatchNorm statistics, optimizer state


def make_loss_scale(kind: str, policy: Any) -> jmp.LossScale:
    """The loss scale that the command line asks for."""
    if kind == "auto":
        kind = "dynamic" if policy.compute_dtype == jnp.float16 else "none"
    if kind == "dynamic":
        return jmp.DynamicLossScale(2.0**15, period=GROWTH_PERIOD)
    return jmp.StaticLossScale(2.0**15) if kind == "static" else jmp.NoOpLossScale()


def make_optimizer(options: argparse.Namespace, policy: Any) -> optax.GradientTransformationExtraArgs:
    """AdamW with clipping; what is inside ``loss_scaled`` sees unscaled float32 gradients."""
    steps_per_epoch = _digits_data.NUM_TRAIN // options.batch_size
    # It depends on no total: a run that is resumed with more epochs is the longer run.
    learning_rate = optax.exponential_decay(LEARNING_RATE, steps_per_epoch, DECAY_PER_EPOCH)
    inner = optax.chain(
        optax.scale(1 / options.loss_multiplier),
        optax.clip_by_global_norm(1.0),
        optax.adamw(learning_rate, weight_decay=WEIGHT_DECAY),
    )
    return jmp.loss_scaled(_options.kept(inner, options.state), make_loss_scale(options.loss_scale, policy))


def make_train_step(
    network: _digits_model.Network,
    tx: optax.GradientTransformationExtraArgs,
    loss_multiplier: float,
    axis_name: str | None,
) -> Callable[..., Any]:
    """One step of training: ``(*state, images, labels) -> (*state, metrics)``."""

    def loss_fn(params: Any, statistics: Any, images: jax.Array, labels: jax.Array) -> Any:
        logits, statistics = network.apply(params, statistics, images, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
        return losses.mean() * loss_multiplier, statistics

    def train_step(params: Any, statistics: Any, opt_state: Any, images: Any, labels: Any) -> Any:
        value_and_grad = jmp.scaled_value_and_grad(loss_fn, has_aux=True, loss_scale=opt_state)
        (loss, seen), grads = value_and_grad(params, statistics, images, labels)
        if axis_name is not None:
            loss, grads = jax.lax.pmean((loss, grads), axis_name)
        zeros = optax.tree.sum(jax.tree.map(lambda grad: jnp.count_nonzero(grad == 0), grads))
        params, opt_state = jmp.apply_gradients(tx, grads, opt_state, params)
        metrics = jmp.metrics(opt_state)
        # A step whose gradients overflow may have seen infinite activations too.
        statistics = jmp.select_tree(metrics["last_finite"], seen, statistics)
        metrics |= {"loss": loss / loss_multiplier, "zero_gradients": zeros / optax.tree.size(grads)}
        return params, statistics, opt_state, metrics

    return train_step


class Run:
    """The training of one policy: its model, its optimizer, and compiled functions of its state."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        policy = jmp.get_policy(name)
        self.name, self.options = name, options
        self.devices = _devices.choose(options.devices)
        axis_name = _devices.AXIS if len(self.devices) > 1 else None
        make_network = _digits_model.FRAMEWORKS[options.framework]
        self.network = make_network(policy)
        self.tx = make_optimizer(options, policy)
        train_step = make_train_step(make_network(policy, axis_name), self.tx, options.loss_multiplier, axis_name)
        donate = (0, 1, 2)  # in the order in which the step returns them
        if axis_name is None:
            self.train_step = jax.jit(train_step, donate_argnums=donate)
        else:
            self.train_step = jax.pmap(train_step, axis_name, devices=self.devices, donate_argnums=donate)
        self.accuracy = jax.jit(self._accuracy)

    def _accuracy(self, params: Any, statistics: Any, images: Any, labels: Any) -> jax.Array:
        logits, _ = self.network.apply(params, statistics, images, train=False)
        return jnp.mean(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32)

    def initial_state(self) -> State:
        """Random parameters, their BatchNorm statistics and the state of the optimizer."""
        # The default generator, threefry, takes three times as long to compile.
        params, statistics = self.network.init(jax.random.key(self.options.seed, impl="rbg"))
        params, opt_state = _options.start(self.tx, params, self.options.state)
        return params, statistics, opt_state

    def batch(self, digits: _digits_data.Digits, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The images and labels of one step, with a device axis if there are several devices."""
        size, seed = self.options.batch_size, self.options.seed
        images, labels = _digits_data.batch(digits.train_images, digits.train_labels, size=size, step=step, seed=seed)
        if len(self.devices) == 1:
            return images, labels
        return _devices.shard((images, labels), len(self.devices))

    def to_devices(self, state: State) -> State:
        """A copy of the state on every device."""
        return state if len(self.devices) == 1 else _devices.replicate(state, self.devices)

    def to_host(self, tree: Any) -> Any:
        """NumPy arrays, once they are computed; of the first device if there are several."""
        return jax.device_get(tree) if len(self.devices) == 1 else _devices.first_replica(tree)


@dataclasses.dataclass
class Stopwatch:
    """Seconds of the first step, which compiles, and of the others."""

    first: float | None = None
    others: float = 0.0
    steps: int = 0

    @property
    def steps_per_second(self) -> float | None:
        """Speed without compilation; None if there was but one step."""
        return self.steps / self.others if self.steps else None


def epochs(start: int, total: int, steps_per_epoch: int) -> Iterator[range]:
    """The steps from ``start`` to ``total``, one range for what is left of each epoch."""
    while start < total:
        stop = min(total, (start // steps_per_epoch + 1) * steps_per_epoch)
        yield range(start, stop)
        start = stop


def train_epoch(
    run: Run, state: State, digits: _digits_data.Digits, steps: range, watch: Stopwatch
) -> tuple[State, list[dict[str, Any]]]:
    """Takes the given steps; returns the new state and the metrics of each step."""
    metrics = []
    began = time.perf_counter()
    for step in steps:
        *state, values = run.train_step(*state, *run.batch(digits, step))
        metrics.append(values)
        if watch.first is None:
            jax.block_until_ready(values)
            watch.first, began = time.perf_counter() - began, time.perf_counter()
        else:
            watch.steps += 1
    metrics = run.to_host(metrics)
    watch.others += time.perf_counter() - began
    return tuple(state), metrics


def train(run: Run, digits: _digits_data.Digits, progress: Progress) -> _report.Result:
    """Trains one policy from the beginning, or from its checkpoint."""
    options = run.options
    state = run.initial_state()
    sample = digits.train_images[: options.batch_size]
    parameter_bytes = _digits_model.num_bytes(state[0])
    activation_bytes = _digits_model.activation_bytes(run.network, *state[:2], sample)

    checkpoint = Checkpoint(options.output, run.name)
    history = History(run.name, _digits_options.settings(options))
    if options.resume:
        state, history = checkpoint.load(state, history)
    else:
        checkpoint.remove()

    start = len(history.steps)
    steps_per_epoch = _digits_data.NUM_TRAIN // options.batch_size
    total = options.steps or options.epochs * steps_per_epoch
    task = progress.add_task(run.name, total=max(start, total), completed=start, status="compiling")
    watch = Stopwatch()
    state = run.to_devices(state)
    for steps in epochs(start, total, steps_per_epoch):
        state, metrics = train_epoch(run, state, digits, steps, watch)
        params, statistics, opt_state = on_host = run.to_host(state)
        jmp.check_loss_scale(opt_state)
        accuracy = float(run.accuracy(params, statistics, digits.test_images, digits.test_labels))
        history.extend(metrics, accuracy)
        checkpoint.save(on_host, history)
        status = f"loss {metrics[-1]['loss']:.3f}, test {accuracy:.1%}"
        progress.update(task, completed=steps.stop, status=status)
    if options.logdir:
        _report.log_to_tensorboard(options.logdir, history, start)
    return _report.Result(history, parameter_bytes, activation_bytes, watch.first, watch.steps_per_second)


def describe(options: argparse.Namespace) -> str:
    """A title for table and curves."""
    [device, *_] = _devices.choose(options.devices)
    where = f"{options.devices} {device.platform.upper()} device{'s' * (options.devices > 1)}"
    multiplied = f", loss x {_report.power_of_two(options.loss_multiplier)}" * (options.loss_multiplier != 1)
    model = f"ResNet on handwritten digits (Flax {options.framework})"
    return f"{model}, batch {options.batch_size} on {where}, seed {options.seed}{multiplied}"


def main(arguments: list[str] | None = None) -> int:
    """Trains what the command line asks for, and reports."""
    options = _digits_options.parse(__doc__, arguments)
    console = Console()
    digits = _digits_data.load(options.seed)
    try:
        with progress_bar(console) as progress:
            results = [train(Run(name, options), digits, progress) for name in options.policy]
    except (jmp.errors.JmpLiteError, ResumeError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; the same command with --resume resumes from the last epoch.")
        return 130
    title = describe(options)
    console.print(f"\n{title}", style="bold", highlight=False, soft_wrap=True)
    console.print(_report.table(results))
    picture = options.output / "digits.png"
    _report.draw(results, title, picture)
    for result in results:
        zeros = result.history.curve("zero_gradients").mean()
        if zeros > MANY_ZEROS:
            console.print(
                f"{result.name}: {zeros:.1%} of the gradients were zero. They are too small for "
                "the compute dtype; scale the loss (--loss-scale dynamic)."
            )
    console.print(f"Curves: {picture}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
