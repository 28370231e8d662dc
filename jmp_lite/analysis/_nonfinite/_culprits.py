"""Finds the origin of a NaN or an infinity: each value carries a number for the time when it stopped being finite."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jmp_lite._compat import Jaxpr, manual_axes
from jmp_lite._dtypes import FLOAT32
from jmp_lite.analysis._evaluate import Analysis, Evaluator, State, Value
from jmp_lite.analysis._sites import Step, way_to

#: A code of a value that is finite. Codes say when a value stopped being finite, in equations from the start of the
#: program; the least is to blame.
NEVER = np.int32(2**31 - 1)
#: What is added to the time at which a number that was not finite when it came was first used: one that is written into
#: the program, or was there in an argument. What was computed is to blame before that.
WRITTEN = 2**30


class _Watching(Analysis):
    """Keeps a code with each value; the state is the time."""

    per_iteration = False

    def literal(self, array: Any) -> Any:
        del array
        return jnp.int32(NEVER)

    def equation(
        self, step: Step, operands: list[Value], results: list[Any], state: State
    ) -> tuple[list[Value], State]:
        del step
        taken = [value._replace(array=_numbers(value.array)) for value in operands]
        codes, state = _codes(taken, list(map(_numbers, results)), state)
        return list(map(Value, results, codes)), state

    def joined(self, beside: Any) -> Any:
        return jnp.min(beside, axis=0, initial=NEVER)

    def across(self, beside: Any, axes: tuple[Any, ...]) -> Any:
        return lax.pmin(beside, axes)

    def left(self, before: State, after: State, axes: tuple[Any, ...]) -> State:
        del before
        return lax.pmax(after, axes)


@jax.jit
def _codes(operands: list[Value], results: list[Any], now: Any) -> tuple[list[Any], Any]:
    """The earliest code of the operands, or now if it is new: from finite numbers, or a NaN from infinities.

    Operands and results that can be neither are ``None``.
    """
    inherited = functools.reduce(jnp.minimum, (value.beside for value in operands), jnp.int32(NEVER))
    arrays = [value.array for value in operands]
    has_nan, has_any = _any(map(is_any_nan, arrays)), _any(map(is_any_not_finite, arrays))
    first_use = jnp.where(inherited == NEVER, now + WRITTEN, NEVER)

    def code(array: Any) -> Any:
        is_new = ~has_any | (is_any_nan(array) & ~has_nan)
        code = jnp.minimum(inherited, jnp.where(is_new, now, first_use))
        return jnp.where(is_any_not_finite(array), code, NEVER)

    return list(map(code, results)), now + 1


def codes_of_results(jaxpr: Jaxpr, steps: Sequence[Step], arrays: Sequence[Any]) -> list[int]:
    """Evaluates a program, and returns for each result the origin of its NaN or infinities.

    It runs equation by equation: compiling the extra code takes much longer than running it once.
    """
    operands = []
    for number, array in enumerate(arrays):
        code = jnp.int32(number - len(arrays) + WRITTEN)
        operands.append(Value(array, jnp.where(is_any_not_finite(_numbers(array)), code, NEVER)))
    values, _ = Evaluator(_Watching()).run(jaxpr, steps, operands, jnp.int32(0))
    return [int(value.beside) for value in values]


class _Clock(Analysis):
    """Finds the step that runs at some time; the state is the time, and the number of the step."""

    def __init__(self, time: int) -> None:
        self.at = time

    def equation(
        self, step: Step, operands: list[Value], results: list[Any], state: State
    ) -> tuple[list[Value], State]:
        del operands
        time, found = state
        found = jnp.where(time == self.at, jnp.int32(step.site.number), found)
        return list(map(Value, results)), (time + 1, found)

    def left(self, before: State, after: State, axes: tuple[Any, ...]) -> State:
        del before
        return jax.tree.map(lambda number: lax.pmax(number, axes), after)


def step_at(jaxpr: Jaxpr, steps: Sequence[Step], arrays: Sequence[Any], time: int) -> Step:
    """Evaluates a program, and returns the step that ran at some time."""
    start = (jnp.int32(0), jnp.int32(-1))
    _, (_, index) = Evaluator(_Clock(time)).run(jaxpr, steps, list(map(Value, arrays)), start)
    return way_to(steps, int(index))[-1][-1]


class Capture(NamedTuple):
    """Operands and results of one run of an equation.

    Attributes:
        time: Equations so far.
        runs: How often this equation ran before.
        is_found: Whether the run was reached.
        operands: Its operands, in dtypes of 32 bits or more; ``None`` for random keys.
        results: Its results, likewise.
        device: Index of the first device that made it, along the axes of the maps around it.
    """

    time: Any
    runs: Any
    is_found: Any
    operands: list[Any]
    results: list[Any]
    device: dict[Any, Any]


class _Capturing(Analysis):
    """Waits for one run of an equation; the state is a ``Capture``."""

    def __init__(self, step: Step, axes: Sequence[Any], time: int) -> None:
        self.step = step
        self.axes = axes
        self.at = time

    def start(self) -> Capture:
        operands, results = (
            [jax.tree.map(jnp.zeros_like, _held(jnp.zeros(v.aval.shape, v.aval.dtype))) for v in atoms if _is_kept(v)]
            for atoms in (self.step.eqn.invars, self.step.eqn.outvars)
        )
        zero = jnp.int32(0)
        return Capture(zero, zero, jnp.bool_(False), operands, results, dict.fromkeys(self.axes, zero))

    def equation(
        self, step: Step, operands: list[Value], results: list[Any], state: State
    ) -> tuple[list[Value], State]:
        if step.site.number != self.step.site.number:
            return list(map(Value, results)), state._replace(time=state.time + 1)
        is_now = (state.time == self.at) & _any(map(is_any_not_finite, map(_numbers, results)))
        taken = [value.array for v, value in zip(step.eqn.invars, operands, strict=True) if _is_kept(v)]
        made = [array for v, array in zip(step.eqn.outvars, results, strict=True) if _is_kept(v)]
        device = {axis: lax.axis_index(axis) for axis in self.axes}

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda new, old: jnp.where(is_now, _held(new), old), new, old)

        return list(map(Value, results)), Capture(
            state.time + 1,
            state.runs + (state.time < self.at).astype(jnp.int32),
            state.is_found | is_now,
            kept(taken, state.operands),
            kept(made, state.results),
            kept(device, state.device),
        )

    def left(self, before: State, after: State, axes: tuple[Any, ...]) -> State:
        """Takes the capture of the first device that reached the run."""
        del before
        index = lax.axis_index(axes)
        first = lax.pmin(jnp.where(after.is_found, index, NEVER), axes)

        def of_first(array: Any) -> Any:
            return lax.psum(jnp.where(index == first, array, jnp.zeros_like(array)), axes)

        found = jax.tree.map(of_first, (after.operands, after.results, after.device))
        return Capture(lax.pmax(after.time, axes), lax.pmax(after.runs, axes), first != NEVER, *found)


def captured(jaxpr: Jaxpr, steps: Sequence[Step], arrays: Sequence[Any], step: Step, time: int) -> Capture:
    """Evaluates a program again, and returns operands and results of one of its equations at some time."""
    waiting = _Capturing(step, _axes_around(steps, step), time)
    _, state = Evaluator(waiting).run(jaxpr, steps, list(map(Value, arrays)), waiting.start())
    found: Capture = jax.device_get(state)
    dtypes = [[v.aval.dtype for v in atoms if _is_kept(v)] for atoms in (step.eqn.invars, step.eqn.outvars)]
    operands, results = (
        [np.asarray(array).astype(dtype) for array, dtype in zip(arrays, of, strict=True)]
        for arrays, of in zip((found.operands, found.results), dtypes, strict=True)
    )
    return found._replace(operands=operands, results=results)


def _axes_around(steps: Sequence[Step], wanted: Step) -> list[Any]:
    """Returns the axes of the maps that a step is in."""
    holders = [programs[-1] for programs in way_to(steps, wanted.site.number)[:-1]]
    maps = [step.eqn.params for step in holders if step.site.primitive == "shard_map"]
    return [axis for params in maps for axis in sorted(manual_axes(params), key=str)]


def _is_kept(v: Any) -> bool:
    return hasattr(v.aval, "dtype") and not jnp.issubdtype(v.aval.dtype, jax.dtypes.extended)


def _held(array: Any) -> Any:
    """Casts numbers to a dtype that collectives accept: the same numbers in 32 bits or more."""
    array = jnp.asarray(array)
    if array.dtype.itemsize >= FLOAT32.itemsize:
        return array
    return array.astype(FLOAT32 if jnp.issubdtype(array.dtype, jnp.floating) else jnp.int32)


def _any(flags: Iterable[Any]) -> Any:
    return functools.reduce(jnp.logical_or, flags, jnp.zeros((), bool))


def is_any_not_finite(array: Any) -> Any:
    """Whether an array has a NaN or an infinity."""
    return jnp.zeros((), bool) if array is None else ~jnp.all(jnp.isfinite(array))


def is_any_nan(array: Any) -> Any:
    """Whether an array has a NaN."""
    return jnp.zeros((), bool) if array is None else jnp.any(jnp.isnan(array))


def _numbers(array: Any) -> Any:
    """Returns an array if its dtype has NaN or infinity, otherwise ``None``."""
    return array if jnp.issubdtype(getattr(array, "dtype", np.int32), jnp.inexact) else None
