"""Figures of one design: read from the compiled program, and timed against bare Optax."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _designs
from jmp_lite.analysis._estimation._compiled import _cost, _hlo


@dataclasses.dataclass(frozen=True)
class Program:
    """Figures of a compiled step, exact and independent of the machine's load.

    Attributes:
      bytes_per_parameter: bytes moved by one step over the number of parameters.
      ideal_ratio: the same over `ideal_bytes_per_parameter`.
      skipped_bytes_per_parameter: bytes moved by a step that takes the cheapest branches.
      kernels: launches.
      copies: launches that only copy a large array.
      aliased: share of the output bytes written in place, from 0 to 1.
      temp_bytes_per_parameter: scratch memory over the number of parameters.
    """

    bytes_per_parameter: float
    ideal_ratio: float
    skipped_bytes_per_parameter: float
    kernels: int
    copies: int
    aliased: float
    temp_bytes_per_parameter: float


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median seconds of a step and of a skipped step, and their medians over bare Optax.

    The ratios are medians of the ratios within each round, so slow drifts of the machine cancel.
    """

    step: float
    ratio: float
    skipped: float
    skipped_ratio: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a design does on a small tree.

    Attributes:
      difference: largest |parameter - parameter under bare Optax| after one good step.
      skips: whether a NaN gradient leaves parameters and moments bit-identical.
    """

    difference: float
    skips: bool


def parameter_count(params: Any) -> int:
    """Number of elements in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def program(compiled: Any, params: Any, grad_dtype: str) -> Program:
    """Reads the figures of a compiled step."""
    module = _hlo.parse(compiled.as_text())
    cost = _cost.cost(module)
    count = parameter_count(params)
    return Program(
        bytes_per_parameter=cost.bytes / count,
        ideal_ratio=cost.bytes / count / _designs.ideal_bytes_per_parameter(grad_dtype),
        skipped_bytes_per_parameter=cost.skipped_bytes / count,
        kernels=cost.launches,
        copies=cost.copies,
        aliased=_hlo.aliased_fraction(module),
        temp_bytes_per_parameter=compiled.memory_analysis().temp_size_in_bytes / count,
    )


def random_tree(shapes: Any, seed: int, scale: float) -> Any:
    """Normal random arrays of standard deviation `scale` with the given shapes and dtypes."""
    generator = np.random.default_rng(seed)

    def leaf(shape: jax.ShapeDtypeStruct) -> jax.Array:
        values = generator.standard_normal(shape.shape, dtype=np.float32) * np.float32(scale)
        return jnp.asarray(values.astype(shape.dtype))

    return jax.tree.map(leaf, shapes)


def with_nan(grads: Any) -> Any:
    """The same gradients with one NaN, in the middle of the last leaf."""
    leaves, treedef = jax.tree.flatten(grads)
    flat = leaves[-1].reshape(-1)
    leaves[-1] = flat.at[flat.size // 2].set(jnp.nan).reshape(leaves[-1].shape)
    return jax.tree.unflatten(treedef, leaves)


def verify(design: _designs.Design, grad_dtype: str) -> Verdict:
    """Runs one good and one bad step on a small tree."""
    shapes = {"kernel": (512, 300), "bias": (300,), "gain": ()}
    params = random_tree({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}, 0, 1.0)
    grads = random_tree(
        {name: jax.ShapeDtypeStruct(shape, grad_dtype) for name, shape in shapes.items()},
        1,
        _designs.LOSS_SCALE * 1e-3,
    )
    bare = _designs.bare()
    unscaled = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) / _designs.LOSS_SCALE, grads)
    expected, _ = jax.jit(bare.step)(params, bare.init(params), unscaled)
    step = jax.jit(design.step)
    stepped, state = step(params, design.init(params), grads)
    frozen, frozen_state = step(stepped, state, with_nan(grads))
    distances = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), stepped, expected)
    before = jax.tree.leaves((stepped, design.moments(state)))
    after = jax.tree.leaves((frozen, design.moments(frozen_state)))
    same = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    return Verdict(max(jax.tree.leaves(distances)), same)


@dataclasses.dataclass
class _Runner:
    """A compiled step with the arrays it is donated."""

    call: Callable[..., Any]
    params: Any
    state: Any

    def seconds(self, grads: Any, steps: int) -> float:
        """Mean wall time of `steps` consecutive steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self.params, self.state = self.call(self.params, self.state, grads)
        jax.block_until_ready((self.params, self.state))
        return (time.perf_counter() - start) / steps


def time_interleaved(
    designs: Mapping[str, _designs.Design],
    programs: Mapping[str, Any],
    params: Any,
    grads: Any,
    *,
    repeats: int,
    steps: int,
) -> dict[str, Timing]:
    """Times every design against bare Optax, in turns.

    Args:
      designs: by name; must hold `_designs.BARE`.
      programs: the compiled step of each design.
      params: shapes of the parameters.
      grads: shapes of the gradients.
      repeats: rounds; in each, every design runs once, in an order that rotates.
      steps: consecutive steps of one run.

    Returns:
      The timing of each design.
    """
    good = random_tree(grads, 1, _designs.LOSS_SCALE * 1e-3)
    bad = with_nan(good)
    runners = {}
    for name, design in designs.items():
        start = random_tree(params, 0, 1.0)
        runners[name] = _Runner(programs[name], start, design.init(start))
        runners[name].seconds(good, 1)
    taken: dict[str, list[float]] = {name: [] for name in designs}
    skipped: dict[str, list[float]] = {name: [] for name in designs}
    names = list(designs)
    for index in range(repeats):
        pivot = index % len(names)
        for name in names[pivot:] + names[:pivot]:
            taken[name].append(runners[name].seconds(good, steps))
            if designs[name].skips:
                skipped[name].append(runners[name].seconds(bad, steps))
    base = taken[_designs.BARE]
    return {name: _timing(taken[name], skipped[name], base) for name in names}


def _timing(taken: list[float], skipped: list[float], base: list[float]) -> Timing:
    def over_base(values: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(values, base, strict=True))

    if not skipped:
        return Timing(statistics.median(taken), over_base(taken), math.nan, math.nan)
    return Timing(statistics.median(taken), over_base(taken), statistics.median(skipped), over_base(skipped))


def rotated(names: Sequence[str], rounds: int) -> list[list[str]]:
    """The names once per round, in an order that rotates."""
    return [[*names[index % len(names) :], *names[: index % len(names)]] for index in range(rounds)]


def interleaved(
    calls: Mapping[str, Callable[[], Any]], baseline: str, *, rounds: int, steps: int
) -> dict[str, tuple[float, float]]:
    """Median seconds of each call, and the median over the rounds of its ratio to the baseline.

    Args:
      calls: by name; they have been compiled.
      baseline: one of the names.
      rounds: in each, every call runs, in an order that rotates.
      steps: consecutive runs of a call in a round.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for names in rotated(list(calls), rounds):
        for name in names:
            start = time.perf_counter()
            for _ in range(steps):
                outputs = calls[name]()
            jax.block_until_ready(outputs)
            taken[name].append((time.perf_counter() - start) / steps)
    base = taken[baseline]
    return {
        name: (statistics.median(own), statistics.median(a / b for a, b in zip(own, base, strict=True)))
        for name, own in taken.items()
    }
