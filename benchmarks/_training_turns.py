"""Trainings that take turns on one device, until they are done or the time is up."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _models, _training_sizes
from jmp_lite.cli._bench_measure import Program, Run, noted, rotated
from jmp_lite.cli._bench_variants import Variant

#: Steps at the end over which a loss is averaged.
LAST = 20


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model of Flax and its data.

    Attributes:
      name: how tables call it.
      unit: what of it a step counts.
      sizes: of the model and its batches.
      task: the model.
    """

    name: str
    unit: str
    sizes: _training_sizes.Sizes
    task: _models.Task

    @property
    def units(self) -> int:
        """How many of them a step takes."""
        return self.sizes.units

    def loss_in(self, dtype: Any) -> Callable[[Any, Any], jax.Array]:
        """Dtype of the modules -> loss of (params, batch); batch norm has no running averages."""
        loss = self.task.loss(None if dtype == jnp.float32 else dtype)
        statistics = {name: {} for name in self.task.shapes()[1]}
        return lambda params, batch: loss(params, statistics, batch)[0]


def workload(name: str, sizes: _training_sizes.Sizes) -> Workload:
    """The model of these sizes."""
    if isinstance(sizes, _training_sizes.Text):
        text = (sizes.batch, sizes.length)
        network = functools.partial(_models.GPT, sizes.layers, sizes.width, sizes.heads, sizes.vocabulary, scanned=True)
        return Workload(
            name, "tokens/s", sizes, _models.Task(name, network, (text, np.int32), (text, sizes.vocabulary))
        )
    network = functools.partial(_models.BottleneckResNet, sizes.stages, sizes.classes)
    images = ((sizes.batch, sizes.pixels, sizes.pixels, 3), np.float32)
    return Workload(name, "images/s", sizes, _models.Task(name, network, images, ((sizes.batch,), sizes.classes)))


class Clock:
    """Counts down from so many seconds."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, negative when the time is up."""
        return self._end - time.monotonic()


@dataclasses.dataclass
class Training:
    """A variant of a model, and how far it has come.

    Attributes:
      run: its figures.
      program: its compiled step; None if there is none.
      held: parameters and state of the optimizer, on the host, so that no two trainings share the device's memory.
      losses: one of each step.
    """

    run: Run
    program: Program | None = None
    held: Any = None
    losses: list[float] = dataclasses.field(default_factory=list)

    def compile(self, variant: Variant, params: Any, options: Mapping[str, Any] | None) -> None:
        """Compiles the step; a failure is noted in the run."""
        run = self.run
        with noted(run):
            data = params, run.model.sizes.draw(0)
            self.program, run.compile_seconds = Program.of(run.model, variant, data, options)
            run.peak_bytes = self.program.reserved_bytes()

    def advance(self, batches: Sequence[Any], steps: int) -> None:
        """Trains for so many steps, of which the first is not timed; a failure is noted, and ends the training."""
        with noted(self.run):
            self._advance(batches, steps)
        if self.run.error:
            self.held = None

    def _advance(self, batches: Sequence[Any], steps: int) -> None:
        program, done = self.program, len(self.losses)
        params, opt_state = jax.device_put(self.held) if done else program.begin(jax.device_put(program.params))
        losses = []
        for index in range(steps):
            if index == 1:
                jax.block_until_ready((params, opt_state))
                begun = time.perf_counter()
            params, opt_state, loss = program.step(params, opt_state, batches[(done + index) % len(batches)])
            losses.append(loss)
        jax.block_until_ready((params, opt_state, losses))
        self.run.rates.append(self.run.model.units * (steps - 1) / (time.perf_counter() - begun))
        self.losses += [float(loss) for loss in jax.device_get(losses)]
        self.held = jax.device_get((params, opt_state))
        self.run.loss = statistics.mean(self.losses[-LAST:])
        if not math.isfinite(self.run.loss):
            raise FloatingPointError(f"the mean of the last {LAST} losses is {self.run.loss}")


def train(
    workloads: Sequence[Workload],
    variants: Mapping[str, Variant],
    clock: Clock,
    *,
    steps: int,
    rounds: int,
    options: Mapping[str, Any] | None = None,
) -> tuple[list[Run], int]:
    """Trains every model in every variant; they take turns, in an order that rotates.

    Args:
      workloads: the models.
      variants: by name.
      clock: when it leaves too little for another round, there is none. The first always runs.
      steps: in a turn; the first is not timed.
      rounds: turns of each, if there is time.
      options: of XLA.

    Returns:
      The figures, model by model, and the number of rounds that ran.
    """
    trainings = []
    for work in workloads:
        params = jax.device_get(work.task.arguments()[0])
        for name, variant in variants.items():
            sys.stderr.write(f"{work.name}, {name}: compiling, {clock.left():.0f} s left ...\n")
            training = Training(Run(work, name))
            training.compile(variant, params, options)
            trainings.append(training)
    batches = {
        work.name: [jax.device_put(work.sizes.draw(step)) for step in range(min(work.sizes.distinct, steps * rounds))]
        for work in workloads
    }
    done, took = 0, 0.0
    while done < rounds and not (done and clock.left() < took):
        begun = clock.left()
        sys.stderr.write(f"round {done + 1} of {rounds}, {begun:.0f} s left ...\n")
        for training in rotated(trainings, done):
            if not training.run.error:
                training.advance(batches[training.run.model.name], steps)
        done, took = done + 1, begun - clock.left()
    return [training.run for training in trainings], done
