"""``collect``: the ranges of arguments, results and matmuls, as extra results of a function."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import run
from jmp_lite._dtypes import is_floating
from jmp_lite._functions import check_function, refuse_modules, require_arrays
from jmp_lite._messages import quote, warn
from jmp_lite._patterns import matches
from jmp_lite.analysis._evaluate import Analysis, Evaluator, State, Value
from jmp_lite.analysis._ranges._copies import Axes, Copies
from jmp_lite.analysis._ranges._ranges import Ranges, Row, named
from jmp_lite.analysis._ranges._tally import Tally, across, empty, merged, only_if, stacked, tally
from jmp_lite.analysis._sites import Step, flat, steps_of, traced
from jmp_lite.autocast._ops import PRODUCTS
from jmp_lite.autocast._programs import PROGRAMS
from jmp_lite.errors import InvalidAnalysisError, UnmatchedRuleWarning

P = ParamSpec("P")
R = TypeVar("R")


def collect(
    fun: Callable[P, R], *, where: str | None = None, when: Callable[..., Any] | None = None
) -> Callable[P, tuple[R, Ranges]]:
    """Makes a function also return the ranges of its numbers, and how each format would round them.

    The ranges are ordinary results: nothing calls back to the host, and you can jit, shard, map and scan the function.
    Pass a gradient or a whole step to see the backward pass, gradients and updates. Wrap it in ``jax.jit`` if you
    call it more than once: each call outside ``jit`` traces and compiles.

    Numbers that several devices hold copies of are counted once.

    Args:
        fun: The function, such as ``jax.value_and_grad(jmp.autocast(loss, policy))``.
        where: Which equations to count: a pattern for their name scopes followed by the primitive, as in
            ``"mlp/.*"``, ``"exp"`` or ``".*"`` for all. By default matmuls and convolutions, with their operands.
            Arguments and results are always counted.
        when: When to count: a function of the same arguments that returns a boolean, such as ``lambda params, step:
            step % 100 == 0``. Otherwise the function runs unchanged and the ranges are empty.

    Returns:
        A function with the arguments of ``fun`` that returns the results of ``fun`` and ``Ranges``.

    Raises:
        InvalidFunctionError: If ``fun`` or ``when`` cannot be called, or ``fun`` takes an NNX module.
        InvalidAnalysisError: When called, if ``when`` returns anything but one boolean, or an argument is only a shape.
        InvalidPatternError: If ``where`` is not a regular expression.

    Warns:
        UnmatchedRuleWarning: If ``where`` matches nothing.

    Example:
        >>> def apply(w, x):
        ...     return jax.nn.relu(x @ w)
        >>> w, x = jnp.full((64, 8), 100.0), jnp.full((2, 64), 20.0)
        >>> _, ranges = jmp.analysis.collect(apply)(w, x)
        >>> product = ranges["dot_general out"]
        >>> product.largest, product.fates["float16"].overflow
        (128000.0, 1.0)

    References:
        TransformerEngine's ``LogTensorStats`` and ``LogFp8TensorStats`` count the same for layers in PyTorch.
    """
    check_function(fun, "collect")
    if when is not None:
        check_function(when, "when= of collect")

    @functools.wraps(fun)
    def collecting(*args: P.args, **kwargs: P.kwargs) -> tuple[R, Ranges]:
        refuse_modules(fun, args, kwargs, "collect", twin=False)
        require_arrays((args, kwargs), "collect")
        call = traced(fun, args, kwargs)
        steps = steps_of(call.jaxpr)
        roles = {step.site.number: _roles(step) for step in flat(steps) if _is_chosen(step, where)}
        looks = _Collecting(roles, Copies(call.jaxpr, steps))
        if where is not None and not roles:
            _warn(where)
        condition = True if when is None else _checked(when(*args, **kwargs))

        def looking(arrays: Sequence[Any]) -> tuple[list[Any], Any]:
            values, state = Evaluator(looks).run(call.jaxpr, steps, list(map(Value, arrays)), looks.start())
            return [value.array for value in values], state

        def resting(arrays: Sequence[Any]) -> tuple[list[Any], Any]:
            return run(call.jaxpr, *arrays), looks.start()

        def both(arrays: Sequence[Any]) -> tuple[list[Any], Any]:
            return looking(arrays) if when is None else jax.lax.cond(condition, looking, resting, arrays)

        results, state = jax.jit(both)(call.arrays)
        output = call.output(results)
        inputs, outputs = named("argument", args), named("result", output)
        ends = _tallies(condition if when else None, [array for _, array in (*inputs, *outputs)])
        sites = {step.site.number: step.site for step in flat(steps)}
        rows = [Row("equation", role, sites[index]) for index, role in state]
        tallies = [*ends[: len(inputs)], *state.values(), *ends[len(inputs) :]]
        return output, Ranges((*(row for row, _ in inputs), *rows, *(row for row, _ in outputs)), stacked(tallies))

    return collecting


def _checked(condition: Any) -> Any:
    """Returns what ``when`` returned, if it is one boolean."""
    is_one = isinstance(condition, (bool, np.bool_, np.ndarray, jax.Array)) and jnp.shape(condition) == ()
    if not is_one or jnp.result_type(condition) != jnp.bool_:
        what = jax.typeof(condition).str_short() if isinstance(condition, (np.ndarray, jax.Array)) else quote(condition)
        raise InvalidAnalysisError(
            f"when= of collect must return one boolean, such as step % 100 == 0, got {what}. Use jnp.any or jnp.all "
            "for an array."
        )
    return condition


def _tallies(condition: Any, arrays: list[Any]) -> list[Tally]:
    """Counts arrays; with a condition, only if it holds."""

    def looking(arrays: list[Any]) -> list[Tally]:
        return list(map(tally, arrays))

    def resting(arrays: list[Any]) -> list[Tally]:
        return [empty() for _ in arrays]

    return looking(arrays) if condition is None else jax.lax.cond(condition, looking, resting, arrays)


def _is_chosen(step: Step, where: str | None) -> bool:
    name = step.site.primitive
    if name in PROGRAMS or not any(is_floating(v.aval) for v in step.eqn.outvars):
        return False
    return name in PRODUCTS if where is None else matches(where, f"{step.site.scope}/{name}")


def _roles(step: Step) -> tuple[str, ...]:
    return ("lhs", "rhs", "out") if step.site.primitive in PRODUCTS else ("out",)


def _warn(where: str) -> None:
    warn(
        f"where={quote(where)} matches no equation: only arguments and results are counted. Patterns are searched "
        "for in name scopes followed by the primitive, such as 'encoder/layer_0/dot_general'; jmp_lite.explain lists "
        "both.",
        UnmatchedRuleWarning,
    )


class _Key(NamedTuple):
    site: int
    role: str


class _Collecting(Analysis):
    """Counts operands and results of chosen equations."""

    def __init__(self, roles: Mapping[int, tuple[str, ...]], copies: Copies) -> None:
        self.roles = roles
        self.copies = copies
        self.nothing: Tally | None = None

    def start(self) -> dict[_Key, Tally]:
        self.nothing = empty()
        return {_Key(index, role): self.nothing for index, roles in self.roles.items() for role in roles}

    def equation(
        self, step: Step, operands: list[Value], results: list[Any], state: State
    ) -> tuple[list[Value], State]:
        index = step.site.number
        taken = list(zip([value.array for value in operands], self.copies.operands[index], strict=True))
        made = list(zip(results, self.copies.results[index], strict=True))
        found: dict[_Key, Tally] = {}
        for role in self.roles.get(index, ()):
            key = _Key(index, role)
            for array, copies in {"lhs": taken[:1], "rhs": taken[1:2], "out": made}[role]:
                if is_floating(array):
                    found[key] = self._added(found.get(key, state[key]), _once(tally(array), copies))
        return list(map(Value, results)), {**state, **found}

    def entered(self, state: State) -> State:
        del state
        return self.start()

    def left(self, before: State, after: State, axes: tuple[Any, ...]) -> State:
        return {key: self._added(before[key], across(after[key], axes)) for key in before}

    def _added(self, before: Tally, more: Tally) -> Tally:
        """Adds two tallies; most equations run once, and to add to nothing would be a fifth of what XLA compiles."""
        return more if before is self.nothing else merged(before, more)


def _once(found: Tally, copies: Axes) -> Tally:
    """Counts only the first of the copies that all devices along some axes hold."""
    if not copies:
        return found
    is_first = [jax.lax.axis_index(axis) == 0 for axis in sorted(copies, key=str)]
    return only_if(functools.reduce(jnp.logical_and, is_first), found)
