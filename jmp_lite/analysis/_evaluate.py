"""Evaluates a program with extra data for each value: a float32 shadow, the culprit of a NaN, or nothing.

Every analysis that runs programs shares one loop over the equations and one way through calls, branches, loops and
maps. An analysis sees each equation after it is computed, keeps a state that follows program order, and returns the
extra data of the results.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import Jaxpr, as_traced, bind, is_literal, manual_axes, program, scan_counts, varied
from jmp_lite.analysis._sites import Step
from jmp_lite.autocast._programs import PROGRAMS, programs_of

#: A pytree of arrays whose shapes and dtypes never change.
State = Any


class Value(NamedTuple):
    """An array, and the extra data that an analysis keeps with it: a pytree of arrays."""

    array: Any
    beside: Any = ()


class Analysis:
    """What an analysis does at each equation.

    ``per_iteration`` says whether the extra data of a stacked array is stacked too, one per iteration of a scan, and
    sharded like the array; otherwise all iterations share it.
    """

    per_iteration = True

    def literal(self, array: Any) -> Any:
        """Returns the extra data of a literal, or of an array that the program closes over."""
        del array
        return ()

    def equation(
        self, step: Step, operands: list[Value], results: list[Any], state: State
    ) -> tuple[list[Value], State]:
        """Handles an equation that holds no programs; may replace its results."""
        raise NotImplementedError

    def joined(self, beside: Any) -> Any:
        """Merges the extra data of the slices of an array, stacked along the first axis."""
        raise NotImplementedError

    def across(self, beside: Any, axes: tuple[Any, ...]) -> Any:
        """Merges the extra data of the parts of an array on devices along some axes."""
        raise NotImplementedError

    def entered(self, state: State) -> State:
        """Returns the state in which a device starts its part of a map."""
        return state

    def left(self, before: State, after: State, axes: tuple[Any, ...]) -> State:
        """Returns the state after a map, equal on all devices, from the state before and the states of the devices."""
        raise NotImplementedError


class Evaluator:
    """Evaluates programs for one analysis.

    Inside a map for which JAX tracks variation along its ``axes``, states vary along all of these, and so does extra
    data, unless it follows its value.
    """

    def __init__(self, analysis: Analysis, axes: frozenset[Any] = frozenset()) -> None:
        self.analysis = analysis
        self.axes = axes

    def run(
        self, jaxpr: Jaxpr, steps: Sequence[Step], operands: Sequence[Value], state: State
    ) -> tuple[list[Value], State]:
        """Evaluates a program, closed or open, with known steps."""
        inner, consts = program(jaxpr)
        held = dict(zip(inner.constvars, map(self._literal, consts), strict=True))
        held |= dict(zip(inner.invars, operands, strict=True))
        last_use = {v: i for i, step in enumerate(steps) for v in step.eqn.invars if not is_literal(v)}
        kept = {v for v in inner.outvars if not is_literal(v)}

        def read(atom: Any) -> Value:
            return self._literal(np.asarray(atom.val, atom.aval.dtype)) if is_literal(atom) else held[atom]

        for index, step in enumerate(steps):
            with as_traced(step.eqn):
                results, state = self._step(step, [read(v) for v in step.eqn.invars], state)
            held.update(zip(step.eqn.outvars, results, strict=True))
            for v in {v for v in step.eqn.invars if not is_literal(v)} - kept:
                if last_use[v] == index:
                    del held[v]
        return [read(v) for v in inner.outvars], state

    def _literal(self, array: Any) -> Value:
        return Value(array, self._varied(self.analysis.literal(array)))

    def _step(self, step: Step, operands: list[Value], state: State) -> tuple[list[Value], State]:
        if step.eqn.primitive.name in HANDLERS:
            handled: tuple[list[Value], State] = HANDLERS[step.eqn.primitive.name](self, step, operands, state)
            return handled
        arrays = [v.val if is_literal(v) else value.array for v, value in zip(step.eqn.invars, operands, strict=True)]
        results, state = self.analysis.equation(step, operands, bind(step.eqn, arrays, step.eqn.params), state)
        return [value._replace(beside=self._varied(value.beside)) for value in results], varied(state, self.axes)

    def _varied(self, beside: Any) -> Any:
        return beside if self.analysis.per_iteration else varied(beside, self.axes)

    def call(self, step: Step, operands: list[Value], state: State) -> tuple[list[Value], State]:
        """Serves calls of one program with all operands, custom rules included: differentiation is done by now."""
        [body] = programs_of(step.eqn).bodies
        return self.run(body.jaxpr, step.bodies[0], operands, state)

    def branch(self, step: Step, operands: list[Value], state: State) -> tuple[list[Value], State]:
        """Serves ``cond``."""
        index, *others = operands
        programs = [
            functools.partial(self.run, body.jaxpr, steps)
            for body, steps in zip(programs_of(step.eqn).bodies, step.bodies, strict=True)
        ]
        results: tuple[list[Value], State] = jax.lax.switch(
            jnp.asarray(index.array, jnp.int32), programs, others, state
        )
        return results

    def scan(self, step: Step, operands: list[Value], state: State) -> tuple[list[Value], State]:
        """Serves ``scan``."""
        params = step.eqn.params
        n_consts, n_carry = scan_counts(params)
        consts, carry, xs = operands[:n_consts], operands[n_consts : n_consts + n_carry], operands[n_consts + n_carry :]
        stacked = xs if self.analysis.per_iteration else [x.array for x in xs]

        def body(held: tuple[State, list[Value]], sliced: list[Any]) -> tuple[Any, Any]:
            state, carry = held
            inner = sliced if self.analysis.per_iteration else _paired(sliced, xs)
            results, state = self.run(params["jaxpr"], step.bodies[0], [*consts, *carry, *inner], state)
            return (state, [_like(r, c) for r, c in zip(results, carry, strict=False)]), results[n_carry:]

        (state, carry), ys = jax.lax.scan(
            body,
            (state, carry),
            stacked,
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        if not self.analysis.per_iteration:
            ys = [Value(y.array, self.analysis.joined(y.beside)) for y in ys]
        return [*carry, *ys], state

    def loop(self, step: Step, operands: list[Value], state: State) -> tuple[list[Value], State]:
        """Serves ``while``; skips its condition, which makes no number."""
        n_cond, n_body = step.eqn.params["cond_nconsts"], step.eqn.params["body_nconsts"]
        test, body = programs_of(step.eqn).bodies
        for_test, consts, carry = operands[:n_cond], operands[n_cond : n_cond + n_body], operands[n_cond + n_body :]

        def goes_on(held: tuple[State, list[Value]]) -> Any:
            arrays = [value.array for value in (*for_test, *held[1])]
            inner, closed = program(test.jaxpr)
            [answer] = jax.core.eval_jaxpr(inner, closed, *arrays)
            return answer

        def iterate(held: tuple[State, list[Value]]) -> tuple[State, list[Value]]:
            state, carry = held
            results, state = self.run(body.jaxpr, step.bodies[1], [*consts, *carry], state)
            return state, list(map(_like, results, carry))

        state, carry = jax.lax.while_loop(goes_on, iterate, (state, carry))
        return list(carry), state

    def map(self, step: Step, operands: list[Value], state: State) -> tuple[list[Value], State]:
        """Serves ``shard_map``: each device has its own state until the end."""
        params, analysis, nowhere = step.eqn.params, self.analysis, jax.sharding.PartitionSpec()
        axes = tuple(sorted(manual_axes(params), key=str))
        inside = Evaluator(analysis, self.axes | set(axes) if params["check_vma"] else self.axes)

        def body(operands: list[Value], state: State) -> tuple[list[Value], State]:
            operands = [value._replace(beside=inside._varied(value.beside)) for value in operands]
            entered = varied(analysis.entered(state), inside.axes)
            results, after = inside.run(params["jaxpr"], step.bodies[0], operands, entered)
            if not analysis.per_iteration:
                results = [Value(value.array, analysis.across(value.beside, axes)) for value in results]
            return results, analysis.left(state, after, axes)

        def specs(specs: Sequence[Any]) -> Any:
            return [Value(spec, spec if analysis.per_iteration else nowhere) for spec in specs]

        mapped = jax.shard_map(
            body,
            mesh=params["mesh"],
            in_specs=(specs(params["in_specs"]), nowhere),
            out_specs=(specs(params["out_specs"]), nowhere),
            axis_names=manual_axes(params),
            check_vma=params["check_vma"],
        )
        results: tuple[list[Value], State] = jax.jit(mapped)(operands, state)
        return results


def _paired(arrays: Sequence[Any], values: Sequence[Value]) -> list[Value]:
    return [value._replace(array=array) for array, value in zip(arrays, values, strict=True)]


def _like(result: Value, before: Value) -> Value:
    """Casts the inputs of the next iteration back to their first dtypes."""

    def cast(new: Any, old: Any) -> Any:
        dtype = jnp.result_type(old)
        return new if jnp.result_type(new) == dtype else jnp.asarray(new, dtype)

    return Value(result.array, jax.tree.map(cast, result.beside, before.beside))


_BY_KIND: Mapping[str, Any] = {
    "call": Evaluator.call,
    "checkpoint": Evaluator.call,
    "rule": Evaluator.call,
    "branch": Evaluator.branch,
    "map": Evaluator.map,
}
_LOOPS: Mapping[str, Any] = {"scan": Evaluator.scan, "while": Evaluator.loop}

#: By primitive; programs on references are not entered.
HANDLERS: Mapping[str, Any] = {
    **{name: _BY_KIND[row.kind] for name, row in PROGRAMS.items() if row.kind in _BY_KIND},
    **_LOOPS,
}
