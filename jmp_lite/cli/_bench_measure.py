"""Variants that train in turns: their speed, memory, loss and time to compile."""

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jmp_lite._messages import described
from jmp_lite.cli._bench_models import Model
from jmp_lite.cli._bench_variants import BASELINE, Variant

#: Told what begins: the name of a model, of a variant, and what is done.
Report = Callable[[str], None]


@dataclasses.dataclass
class Run:
    """A variant on a model, and what was found.

    Attributes:
        model: What is trained.
        variant: Name of the variant.
        compile_seconds: To trace, lower and compile the step.
        peak_bytes: Memory of training.
        counted_by_device: Whether the device counted it; else it is what the compiler reserves.
        rates: Tokens or images per second, one for each round.
        loss: Of the last step of a turn.
        error: What went wrong, or empty.
    """

    model: Model
    variant: str
    compile_seconds: float = math.nan
    peak_bytes: int = 0
    counted_by_device: bool = False
    rates: list[float] = dataclasses.field(default_factory=list)
    loss: float = math.nan
    error: str = ""

    @property
    def rate(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.rates) if self.rates else math.nan

    @property
    def spread(self) -> float:
        """The fastest round less the slowest, over the median."""
        return (max(self.rates) - min(self.rates)) / self.rate if self.rates else math.nan

    def ratio_to(self, other: "Run") -> float:
        """Median over the rounds of the ratios within a round, in which slow drifts of the machine cancel."""
        ratios = [own / base for own, base in zip(self.rates, other.rates, strict=False)]
        return statistics.median(ratios) if ratios else math.nan


@dataclasses.dataclass(frozen=True)
class Program:
    """Compiled functions and what they begin with: ``begin`` of parameters in float32, ``step`` of what it returns."""

    begin: Any
    step: Any
    params: Any
    batch: Any

    @classmethod
    def of(cls, model: Model, variant: Variant, data: tuple[Any, Any], options: Any) -> "tuple[Program, float]":
        """Compiles both, and returns the seconds that the step took."""
        params, batch = data
        begin = jax.jit(variant.begin).lower(params).compile(options)
        begun = time.perf_counter()
        step = jax.jit(variant.step(model.loss_in), donate_argnums=(0, 1))
        compiled = step.lower(*jax.eval_shape(variant.begin, params), batch).compile(options)
        return cls(begin, compiled, params, batch), time.perf_counter() - begun

    def reserved_bytes(self) -> int:
        """Memory that the compiler reserves for a step."""
        found = self.step.memory_analysis()
        outputs = found.output_size_in_bytes - found.alias_size_in_bytes
        return int(found.argument_size_in_bytes + outputs + found.temp_size_in_bytes)

    def turn(self, steps: int) -> tuple[float, float]:
        """Trains from the beginning; returns the seconds of a step after the first, and the last loss."""
        params, opt_state = self.begin(jax.device_put(self.params))
        batch = jax.device_put(self.batch)
        params, opt_state, loss = self.step(params, opt_state, batch)
        loss.block_until_ready()
        begun = time.perf_counter()
        for _ in range(steps - 1):
            params, opt_state, loss = self.step(params, opt_state, batch)
        jax.block_until_ready((params, opt_state, loss))
        return (time.perf_counter() - begun) / (steps - 1), float(loss)


def measure(
    models: Sequence[Model],
    variants: Mapping[str, Variant],
    *,
    steps: int,
    rounds: int,
    report: Report,
    compiler_options: Mapping[str, Any] | None = None,
) -> list[Run]:
    """Trains every model in every variant.

    Variants take turns, in an order that rotates from round to round; each turn trains again, so that no more than one
    holds memory. What fails stops there and says why; the others continue.

    Args:
        models: What is trained.
        variants: By name; holds the baseline.
        steps: In a turn; the first is not timed.
        rounds: Turns of each.
        report: Called ``parts`` times, before each compilation and turn, with words.
        compiler_options: For XLA.

    Returns:
        The runs, model by model.
    """
    runs = [Run(model, name) for model in models for name in variants]
    programs: dict[int, Program] = {}
    data = {model.name: _drawn(model) for model in models}
    for index, run in enumerate(runs):
        report(f"{run.model.name}, {run.variant}: compiling")
        with noted(run):
            programs[index], run.compile_seconds = Program.of(
                run.model, variants[run.variant], data[run.model.name], compiler_options
            )
            run.peak_bytes = programs[index].reserved_bytes()
    # The device counts its peak since the process began, so the first round goes from the least memory to the most.
    order = sorted(programs, key=lambda index: runs[index].peak_bytes)
    for number in range(rounds):
        for index in rotated(order, number):
            run = runs[index]
            report(f"{run.model.name}, {run.variant}: round {number + 1} of {rounds}")
            if not run.error:
                with noted(run):
                    _take_turn(run, programs[index], steps, is_first=number == 0)
    return runs


def _drawn(model: Model) -> tuple[Any, Any]:
    """Parameters and a batch, on the host."""
    rng = np.random.default_rng(0)
    return model.init(rng), model.batch(rng)


def parts(models: Sequence[Model], variants: Mapping[str, Variant], rounds: int) -> int:
    """Returns how often ``measure`` reports, if nothing fails."""
    return len(models) * len(variants) * (1 + rounds)


def rotated(items: Sequence[int], by: int) -> list[int]:
    """Returns the items with the first ones last."""
    start = by % max(len(items), 1)
    return [*items[start:], *items[:start]]


@contextlib.contextmanager
def noted(run: Run) -> Iterator[None]:
    """Around what may fail: compilers and devices do in as many ways as there are of them."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        run.error = described(error)


def _take_turn(run: Run, program: Program, steps: int, *, is_first: bool) -> None:
    before = _memory()
    seconds, run.loss = program.turn(steps)
    run.rates.append(run.model.units / seconds)
    after = _memory()
    if is_first and after.get("peak_bytes_in_use", 0) > before.get("peak_bytes_in_use", 0):
        run.peak_bytes, run.counted_by_device = after["peak_bytes_in_use"] - before["bytes_in_use"], True
    if not math.isfinite(run.loss):
        run.error = f"The loss is {run.loss}."


def _memory() -> dict[str, int]:
    """What the device counts; nothing on a CPU."""
    return jax.local_devices()[0].memory_stats() or {}


def baseline_of(runs: Sequence[Run], run: Run) -> Run:
    """Returns the run of the same model in float32."""
    return next(other for other in runs if other.model is run.model and other.variant == BASELINE)
