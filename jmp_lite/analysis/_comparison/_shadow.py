"""Every value of a program with its shadow: the value without any earlier rounding to fewer bits."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmp_lite._compat import Jaxpr, bind
from jmp_lite._dtypes import FLOAT32, is_floating
from jmp_lite.analysis._evaluate import Analysis, Evaluator, State, Value
from jmp_lite.analysis._sites import Step, flat

#: Parameters of primitives that name the dtype of what they make or compute with.
_DTYPES = ("new_dtype", "preferred_element_type", "compute_dtype", "dtype")


class Errors(NamedTuple):
    """Errors of one equation, summed over its runs.

    Attributes:
        added: Sum of squares of the relative errors that the equation adds to its operands.
        taken: Sum of squares of the relative distances of its operands from their shadows, the largest of each run.
        carried: Sum of squares of the relative distances of its results from their shadows.
        runs: How often it ran.
    """

    added: Any
    taken: Any
    carried: Any
    runs: Any


class _Shadowing(Analysis):
    """Keeps a shadow beside each floating value; the state is the ``Errors`` of each equation, by number."""

    def literal(self, array: Any) -> Any:
        return _wide(jnp.asarray(array)) if is_floating(array) else ()

    def equation(
        self, step: Step, operands: list[Value], results: list[Any], state: State
    ) -> tuple[list[Value], State]:
        if not any(map(is_floating, results)):
            return [Value(array) for array in results], state
        shadows = _in_float32(step, [_wide(x.array) if not is_floating(x.array) else x.beside for x in operands])
        exact = _in_float32(step, [_wide(x.array) for x in operands]) if _rounds(step) else results
        pairs = zip(results, shadows, strict=True)
        values = [Value(x, _wide(shadow) if is_floating(x) else ()) for x, shadow in pairs]
        if step.site.number in state:
            made = [three for three in zip(results, exact, shadows, strict=True) if is_floating(three[0])]
            taken = [value for value in operands if is_floating(value.array)]
            state = {**state, step.site.number: _added(state[step.site.number], taken, made)}
        return values, state

    def entered(self, state: State) -> State:
        return jax.tree.map(jnp.zeros_like, state)

    def left(self, before: State, after: State, axes: tuple[Any, ...]) -> State:
        return jax.tree.map(lambda old, new: old + lax.psum(new, axes), before, after)


def evaluated(jaxpr: Jaxpr, steps: Sequence[Step], arrays: Sequence[Any]) -> tuple[list[Value], Mapping[int, Errors]]:
    """Evaluates a program, equation by equation; returns its results with their shadows, and the errors by number."""
    zero = jnp.float32(0)
    state = {
        step.site.number: Errors(zero, zero, zero, zero)
        for step in flat(steps)
        if not step.bodies and any(is_floating(v.aval) for v in step.eqn.outvars)
    }
    operands = [Value(x, _wide(x) if is_floating(x) else ()) for x in map(jnp.asarray, arrays)]
    values, state = Evaluator(_Shadowing()).run(jaxpr, steps, operands, state)
    return values, jax.device_get(state)


def _wide(array: Any) -> Any:
    is_narrow = is_floating(array) and array.dtype.itemsize < FLOAT32.itemsize
    return array.astype(FLOAT32) if is_narrow else array


def _rounds(step: Step) -> bool:
    """Whether an equation can differ from the same equation in float32."""
    avals = [v.aval for v in (*step.eqn.invars, *step.eqn.outvars)]
    named = [step.eqn.params.get(name) for name in _DTYPES]
    dtypes = [dtype for dtype in (*(getattr(aval, "dtype", None) for aval in avals), *named) if dtype is not None]
    return step.site.primitive == "reduce_precision" or any(map(_is_narrow, dtypes))


def _is_narrow(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.dtype(dtype).itemsize < FLOAT32.itemsize


def _in_float32(step: Step, operands: Sequence[Any]) -> list[Any]:
    """Computes an equation in float32, or in its own dtypes if it does not support float32."""
    params = dict(step.eqn.params)
    if step.site.primitive == "reduce_precision":
        return list(operands)
    for name in _DTYPES:
        if params.get(name) is not None and _is_narrow(params[name]):
            params[name] = FLOAT32
    if "precision" in params and step.site.primitive in ("dot_general", "conv_general_dilated"):
        params["precision"] = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    try:
        return bind(step.eqn, operands, params)
    except (TypeError, ValueError, NotImplementedError):
        atoms = step.eqn.invars
        own = [x.astype(v.aval.dtype) if is_floating(x) else x for v, x in zip(atoms, operands, strict=True)]
        return bind(step.eqn, own, step.eqn.params)


def _added(so_far: Errors, taken: list[Value], made: list[tuple[Any, Any, Any]]) -> Errors:
    """Adds one run to the errors of an equation; distances are compiled for an array, not for each set of operands."""
    operands = [_distance([(value.array, value.beside)]) for value in taken]
    is_exact = all(found is exact for found, exact, _ in made)
    added = jnp.float32(0) if is_exact else _distance([(found, exact) for found, exact, _ in made])
    carried = _distance([(found, shadow) for found, _, shadow in made])
    summed: Errors = _with_run(so_far, added, operands, carried)
    return summed


@jax.jit
def _with_run(so_far: Errors, added: Any, operands: list[Any], carried: Any) -> Errors:
    taken = jnp.max(jnp.stack([jnp.float32(0), *operands]))
    return Errors(*map(jnp.add, so_far, (added, taken, carried, jnp.float32(1))))


@jax.jit
def _distance(pairs: list[tuple[Any, Any]]) -> Any:
    """Square of the relative distance of arrays from their references, without elements that are not finite."""
    wide = [(_f32(found), _f32(wanted)) for found, wanted in pairs]
    unit = jnp.max(jnp.stack([jnp.max(jnp.abs(_finite(wanted)), initial=0) for _, wanted in wide]))
    unit = jnp.where(unit == 0, 1, unit)
    error = sum(jnp.sum(_finite((found - wanted) / unit) ** 2) for found, wanted in wide)
    return error / jnp.maximum(sum(jnp.sum(_finite(wanted / unit) ** 2) for _, wanted in wide), 1e-30)


def _f32(array: Any) -> Any:
    return array.astype(FLOAT32)


def _finite(array: Any) -> Any:
    return jnp.where(jnp.isfinite(array), array, 0)
