"""Calls, loops and branches: programs inside a program, each retyped at the dtypes of its operands."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jmp_lite._compat import Jaxpr, manual_axes, open_jaxpr, program, run, scan_counts
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite._tree import cast
from jmp_lite.autocast._demand import AS_WRITTEN, KEPT, LOW, Want
from jmp_lite.autocast._interpreter import Call, Handler, Interpreter, Retyped
from jmp_lite.autocast._programs import PROGRAMS, programs_of, rebuilt
from jmp_lite.autocast._residuals import saves_low
from jmp_lite.autocast._values import INPUT, Known, Origin, Tag, Value, is_eligible

#: A carry that is used by these alone is a sum, a moving average, a state: it stays float32.
_ACCUMULATING = frozenset({"add", "add_any", "sub", "mul", "div", "neg", "max", "min"})


# --- Calls ---


def _call(interpreter: Interpreter, call: Call) -> list[Value]:
    """Serves primitives that call one program with all their operands."""
    [body] = programs_of(call.eqn).bodies
    inner = interpreter.retype(body.jaxpr, call.operands, call.scope, call.wants)
    return interpreter.results(inner, rebuilt(call.eqn, call.arrays, [inner.jaxpr]))


def _checkpoint(interpreter: Interpreter, call: Call) -> list[Value]:
    """What enters is kept for the backward pass: it is rounded where that loses nothing."""
    return _call(interpreter, dataclasses.replace(call, operands=interpreter.rounded(call)))


def _shard_map(interpreter: Interpreter, call: Call) -> list[Value]:
    """Rebuilds the map, because its program can be traced only inside it."""
    params = call.params
    known: list[Value] = []

    def body(*arrays: Any) -> tuple[Any, ...]:
        operands = [value._replace(array=array) for value, array in zip(call.operands, arrays, strict=True)]
        known[:] = interpreter.evaluate(params["jaxpr"], operands, call.scope, call.wants)
        return tuple(value.array for value in known)

    results = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        axis_names=manual_axes(params),
        check_vma=params["check_vma"],
    )(*call.arrays)
    return [value._replace(array=array) for value, array in zip(known, results, strict=True)]


def _run_state(interpreter: Interpreter, call: Call) -> list[Value]:
    """References keep their dtype, so their contents enter and leave in it."""
    arrays = call.originals
    operands = [Value(v.aval) for v in program(call.params["jaxpr"])[0].invars]
    inner = interpreter.retype(call.params["jaxpr"], operands, call.scope)
    jaxpr, consts = open_jaxpr(inner.jaxpr)
    interpreter.records.extend(inner.records)
    return _in_float32(call, call.bind(arrays) if consts else call.bind(arrays, jaxpr=jaxpr))


def _in_float32(call: Call, results: Sequence[Any]) -> list[Value]:
    return [
        Value(array, Known(Tag.HIGH if is_eligible(v.aval) else Tag.NEUTRAL))
        for v, array in zip(call.eqn.outvars, results, strict=True)
    ]


# --- Branches ---


def _cond(interpreter: Interpreter, call: Call) -> list[Value]:
    """Each result has one dtype in all branches: float32 if a branch needs it or none is low."""
    operands = call.operands[1:]
    branches = [body.jaxpr for body in programs_of(call.eqn).bodies]

    def retype(forced: tuple[DType | None, ...] | None) -> list[Retyped]:
        return [interpreter.retype(branch, operands, call.scope, call.wants, forced) for branch in branches]

    found = retype(None)
    results = [
        _agreed([(branch.dtypes[index], branch.results[index]) for branch in found], is_eligible(v.aval))
        for index, v in enumerate(call.eqn.outvars)
    ]
    forced = tuple(dtype for dtype, _ in results)
    agreed = retype(forced) if any(forced) else found
    for branch in agreed:
        interpreter.records.extend(branch.records)
    arrays = rebuilt(call.eqn, call.arrays, [branch.jaxpr for branch in agreed])
    return [Value(array, known) for array, (_, known) in zip(arrays, results, strict=True)]


def _agreed(found: Sequence[tuple[Any, Known]], is_float: bool) -> tuple[DType | None, Known]:
    """Returns the dtype that a result is forced to if branches disagree, and what is known of it."""
    tags, origins = [known.tag for _, known in found], {known.origin for _, known in found}
    known = Known(max(tags), origins.pop() if len(origins) == 1 else Origin.COMPUTED)
    if not is_float or len({dtype for dtype, _ in found}) == 1:
        return None, known
    low = [dtype for dtype, known in found if known.tag is Tag.LOW]
    return low[0] if low and Tag.HIGH not in tags else FLOAT32, known


# --- Loops ---


def _scan(interpreter: Interpreter, call: Call) -> list[Value]:
    """A carry is low if it feeds only matmuls, or if it starts low and the body keeps it low; a sum stays float32.

    An activation to which no layer was added yet, such as an embedding, starts low if the weights are stacked, one set
    per layer. Weights that are the same in all iterations make a recurrence, in which errors accumulate: there, a carry
    that feeds anything but matmuls is float32.

    Constants enter as float32 and are cast inside: the backward pass sums their gradients over all iterations in the
    dtype in which they entered. XLA moves such casts out of the loop.

    Low carries are found by trying: each round either succeeds, or moves at least one low carry to float32, so there
    are at most as many rounds as carries, plus one.
    """
    body = call.params["jaxpr"]
    n_consts, n_carry = scan_counts(call.params)
    carried = slice(n_consts, n_consts + n_carry)
    wants, of_results = interpreter.through(call)
    operands = list(call.operands)
    operands[:n_consts] = map(_constant, operands[:n_consts])
    low = interpreter.precision(call.scope, "scan").dtype
    inner_program, _ = program(body)
    weights = [value.is_weight and want == LOW for value, want in zip(operands, wants, strict=True)]
    repeats, stacks = any(weights[:n_consts]), any(weights[n_consts + n_carry :])
    operands[carried] = [
        _carry(inner_program, v, value, want, low, repeats=repeats, stacks=stacks)
        for v, value, want in zip(inner_program.invars[carried], operands[carried], wants[carried], strict=True)
    ]
    pairs = list(zip(call.eqn.outvars, of_results, strict=True))[n_carry:]
    stacked = [low if want == LOW and is_eligible(v.aval) and low != FLOAT32 else None for v, want in pairs]
    while True:
        asked = [
            want if value.tag is Tag.LOW else _kept_in_float32(want)
            for want, value in zip(of_results[:n_carry], operands[carried], strict=True)
        ]
        forced = (*map(_float_dtype, operands[carried]), *stacked)
        inner = interpreter.retype(body, operands, call.scope, (*asked, *of_results[n_carry:]), forced)
        too_low = [
            n_consts + index
            for index, value in enumerate(operands[carried])
            if value.tag is Tag.LOW and not inner.results[index].tag.is_rounded and of_results[index] != LOW
        ]
        if not too_low:
            break
        for index in too_low:
            known = Known(origin=operands[index].known.origin)
            operands[index] = Value(cast(call.operands[index].array, FLOAT32), known)
    jaxpr = inner.jaxpr
    if interpreter.settings.residuals == "low":
        jaxpr = _saving_low(jaxpr)
    results = rebuilt(call.eqn, [value.array for value in operands], [jaxpr])
    values = interpreter.results(inner, results, trips=call.params["length"])
    was_low = [*(carry.tag is Tag.LOW for carry in operands[carried]), *(dtype is not None for dtype in stacked)]
    return [
        Value(value.array, Known(Tag.LOW if is_low else value.tag, _left(value.known.origin)))
        for value, is_low in zip(values, was_low, strict=True)
    ]


def _left(origin: Origin) -> Origin:
    """Where a result of a loop comes from, seen from outside."""
    return origin if origin in (Origin.FOUND, Origin.TANGENT) else Origin.COMPUTED


@functools.lru_cache(maxsize=256)
def _saving_low(jaxpr: Jaxpr) -> Jaxpr:
    """Applies ``residuals="low"`` to a loop body, which would otherwise keep float32 residuals of all iterations."""
    body = jax.checkpoint(lambda *arrays: run(jaxpr, *arrays), policy=saves_low, prevent_cse=False)
    return jax.make_jaxpr(body)(*program(jaxpr)[0].in_avals)


def _kept_in_float32(want: Want) -> Want:
    """What the next iteration wants of a carry that is held in float32."""
    return want & AS_WRITTEN | KEPT


def _float_dtype(value: Value) -> DType | None:
    dtype = getattr(value.array, "dtype", None)
    return dtype if dtype is not None and jnp.issubdtype(dtype, jnp.floating) else None


def _constant(value: Value) -> Value:
    if value.tag is not Tag.LOW:
        return value
    return Value(cast(value.array, FLOAT32), Known(Tag.SOFT, Origin.INPUT))


def _carry(body: Any, v: Any, value: Value, want: Want, low: DType, *, repeats: bool, stacks: bool) -> Value:
    """Returns how a carry enters a loop with the same weights in each iteration, or with stacked layers."""
    origin = Origin.TANGENT if value.known.origin is Origin.TANGENT else Origin.INPUT
    if not is_eligible(v.aval):
        return Value(value.array, Known(value.tag, origin))
    if _adds_up(body, v):
        return Value(cast(value.array, FLOAT32), Known(Tag.HIGH, origin))
    if (want == LOW or (stacks and not repeats and value.is_activation)) and low != FLOAT32:
        return Value(cast(value.array, low), Known(Tag.LOW, origin))
    if value.tag is Tag.LOW and not repeats and not want & AS_WRITTEN:
        return Value(value.array, Known(Tag.LOW, origin))
    return Value(cast(value.array, FLOAT32), Known(origin=origin))


def _adds_up(jaxpr: Any, v: Any) -> bool:
    """Whether a loop body uses an input only in arithmetic."""
    users = [eqn for eqn in jaxpr.eqns if any(atom is v for atom in eqn.invars)]
    return bool(users) and all(eqn.primitive.name in _ACCUMULATING for eqn in users)


def _while(interpreter: Interpreter, call: Call) -> list[Value]:
    """Carries keep their dtype; float computations that the condition depends on run as written.

    A root search whose matmuls are rounded to 16 bits may never reach its tolerance.
    """
    n_cond, n_body = call.params["cond_nconsts"], call.params["body_nconsts"]
    test, body = programs_of(call.eqn).bodies
    _, of_results = interpreter.through(call)
    operands = [Value(array, INPUT) for array in call.originals]
    operands[n_cond : n_cond + n_body] = call.operands[n_cond : n_cond + n_body]
    carries = operands[n_cond + n_body :]
    asked = tuple(map(_kept_in_float32, of_results))
    inner = interpreter.retype(body.jaxpr, operands[n_cond:], call.scope, asked, tuple(map(_float_dtype, carries)))
    interpreter.records.extend(inner.records)
    results = _in_float32(call, rebuilt(call.eqn, [value.array for value in operands], [test.jaxpr, inner.jaxpr]))
    if not interpreter.is_search(call):
        return results
    return [value._replace(known=value.known._replace(origin=Origin.FOUND)) for value in results]


_BY_KIND: Mapping[str, Handler] = {
    "call": _call,
    "checkpoint": _checkpoint,
    "branch": _cond,
    "map": _shard_map,
    "references": _run_state,
}
_LOOPS: Mapping[str, Handler] = {"scan": _scan, "while": _while}

HANDLERS: Mapping[str, Handler] = {
    **{name: _BY_KIND[row.kind] for name, row in PROGRAMS.items() if row.kind in _BY_KIND},
    **_LOOPS,
}
