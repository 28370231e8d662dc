"""Calls, loops and branches: programs inside a program, each retyped at the dtypes of its operands."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jmp_lite._compat import Jaxpr, is_literal, manual_axes, open_jaxpr, program, scan_counts
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite._tree import cast
from jmp_lite.autocast._demand import Want
from jmp_lite.autocast._interpreter import Call, Handler, Interpreter, Retyped
from jmp_lite.autocast._values import Origin, Tag, Value, is_eligible

#: A carry that is used by these alone is a sum, a moving average, a state: it stays float32.
_ACCUMULATING = frozenset({"add", "add_any", "sub", "mul", "div", "neg", "max", "min"})


# --- Calls ---


def _call(parameter: str) -> Handler:
    """Serves primitives that call a closed program."""

    def handle(interpreter: Interpreter, call: Call) -> list[Value]:
        inner = interpreter.retype(call.params[parameter], call.operands, call.scope, call.wants)
        return interpreter.results(inner, call.bind(call.arrays, **{parameter: inner.jaxpr}))

    return handle


def _composite(interpreter: Interpreter, call: Call) -> list[Value]:
    parameter = "jaxpr" if "jaxpr" in call.params else "call_jaxpr"  # renamed in jax 0.11
    return _call(parameter)(interpreter, call)


def _open_call(interpreter: Interpreter, call: Call) -> list[Value]:
    """Serves ``checkpoint``, whose program is open."""
    inner = interpreter.retype(call.params["jaxpr"], call.operands, call.scope, call.wants)
    jaxpr, consts = open_jaxpr(inner.jaxpr)
    return interpreter.results(inner, call.bind([*consts, *call.arrays], jaxpr=jaxpr))


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
    """References keep their dtype, so their contents go in and come out in it."""
    arrays = call.originals
    operands = [Value(v.aval) for v in program(call.params["jaxpr"])[0].invars]
    inner = interpreter.retype(call.params["jaxpr"], operands, call.scope)
    jaxpr, consts = open_jaxpr(inner.jaxpr)
    interpreter.records.extend(inner.records)
    return _in_float32(call, call.bind(arrays) if consts else call.bind(arrays, jaxpr=jaxpr))


def _in_float32(call: Call, results: list[Any]) -> list[Value]:
    tags = [Tag.HIGH if is_eligible(v.aval) else Tag.NEUTRAL for v in call.eqn.outvars]
    return [Value(array, tag) for array, tag in zip(results, tags, strict=True)]


# --- Branches ---


def _cond(interpreter: Interpreter, call: Call) -> list[Value]:
    """Branches agree on the dtype of a result: float32 where one needs it, or where none has gone low."""
    branches, operands = call.params["branches"], call.operands[1:]

    def retype(forced: tuple[DType | None, ...] | None) -> list[Retyped]:
        return [interpreter.retype(branch, operands, call.scope, call.wants, forced) for branch in branches]

    found = retype(None)
    forced, known = [], []
    for index, v in enumerate(call.eqn.outvars):
        dtypes = {branch.dtypes[index] for branch in found}
        tags = [branch.results[index][0] for branch in found]
        needs_float32 = Tag.HIGH in tags or Tag.LOW not in tags
        low = next((branch.dtypes[index] for branch in found if branch.results[index][0] is Tag.LOW), FLOAT32)
        disagree = is_eligible(v.aval) and len(dtypes) > 1
        forced.append((FLOAT32 if needs_float32 else low) if disagree else None)
        origins = {branch.results[index][1] for branch in found}
        known.append((max(tags), origins.pop() if len(origins) == 1 else Origin.COMPUTED))
    agreed = retype(tuple(forced)) if any(forced) else found
    for branch in agreed:
        interpreter.records.extend(branch.records)
    results = call.bind(call.arrays, branches=tuple(branch.jaxpr for branch in agreed))
    return [Value(array, *about) for array, about in zip(results, known, strict=True)]


# --- Loops ---


def _scan(interpreter: Interpreter, call: Call) -> list[Value]:
    """A carry is low if it starts low and the body keeps it low; one that adds up stays float32.

    Constants go in as float32, and are cast inside: the backward pass adds up their gradients over all iterations, in
    the dtype in which they went in. XLA moves such casts out of the loop by itself.
    """
    body = call.params["jaxpr"]
    n_consts, n_carry = scan_counts(call.params)
    carried = slice(n_consts, n_consts + n_carry)
    operands = list(call.operands)
    operands[:n_consts] = map(_constant, operands[:n_consts])
    operands[carried] = [_carry(body, index, value) for index, value in enumerate(operands[carried], start=n_consts)]
    for _ in range(n_carry + 1):
        wants = (*map(_want, operands[carried]), *call.wants[n_carry:])
        forced = (*map(_float_dtype, operands[carried]), *[None] * (len(wants) - n_carry))
        inner = interpreter.retype(body, operands, call.scope, wants, forced)
        too_low = [
            n_consts + index
            for index, value in enumerate(operands[carried])
            if value.tag is Tag.LOW and inner.results[index][0] is Tag.HIGH
        ]
        if not too_low:
            break
        for index in too_low:
            operands[index] = Value(cast(operands[index].array, FLOAT32), origin=Origin.INPUT)
    values = interpreter.results(inner, call.bind([value.array for value in operands], jaxpr=inner.jaxpr))
    carries = [
        Value(value.array, Tag.LOW if carry.tag is Tag.LOW else value.tag)
        for value, carry in zip(values[:n_carry], operands[carried], strict=True)
    ]
    return [*carries, *(Value(value.array, value.tag) for value in values[n_carry:])]


def _want(carry: Value) -> Want:
    return Want.MIXED if carry.tag is Tag.LOW else Want.HIGH


def _float_dtype(value: Value) -> DType | None:
    dtype = getattr(value.array, "dtype", None)
    return dtype if dtype is not None and jnp.issubdtype(dtype, jnp.floating) else None


def _constant(value: Value) -> Value:
    if value.tag is not Tag.LOW:
        return value
    return Value(cast(value.array, FLOAT32), Tag.SOFT, Origin.INPUT)


def _carry(body: Jaxpr, index: int, value: Value) -> Value:
    """Returns how a carry enters the loop."""
    inner, _ = program(body)
    v = inner.invars[index]
    if not is_eligible(v.aval):
        return value._replace(origin=Origin.INPUT, number=None)
    if _adds_up(inner, v):
        return Value(cast(value.array, FLOAT32), Tag.HIGH, Origin.INPUT)
    if value.tag is Tag.LOW:
        return Value(value.array, Tag.LOW, Origin.INPUT)
    return Value(cast(value.array, FLOAT32), origin=Origin.INPUT)


def _adds_up(jaxpr: Any, v: Any) -> bool:
    """Whether a loop body does nothing with an input but arithmetic."""
    users = [eqn for eqn in jaxpr.eqns if any(atom is v for atom in eqn.invars)]
    return bool(users) and all(eqn.primitive.name in _ACCUMULATING for eqn in users)


def _while(interpreter: Interpreter, call: Call) -> list[Value]:
    """Carries keep their dtype; a loop that stops by a floating-point test runs as it was written.

    A search for a root whose products are rounded to 16 bits may never reach its tolerance.
    """
    params = call.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    if _stops_by_float(params):
        return _in_float32(call, call.bind(call.originals))
    operands = [Value(array, origin=Origin.INPUT) for array in call.originals]
    operands[n_cond : n_cond + n_body] = call.operands[n_cond : n_cond + n_body]
    forced = tuple(_float_dtype(value) for value in operands[n_cond + n_body :])
    inner = interpreter.retype(params["body_jaxpr"], operands[n_cond:], call.scope, (Want.HIGH,) * len(forced), forced)
    interpreter.records.extend(inner.records)
    return _in_float32(call, call.bind([value.array for value in operands], body_jaxpr=inner.jaxpr))


def _stops_by_float(params: Mapping[str, Any]) -> bool:
    """Whether the test of a while loop depends on a floating-point carry, at once or by way of other carries."""
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    body = program(params["body_jaxpr"])[0]
    decisive: set[int] = set()
    found = {index - n_cond for index in _inputs_behind(program(params["cond_jaxpr"])[0], {0})}
    while not found <= decisive:
        decisive |= {index for index in found if index >= 0}
        found = {index - n_body for index in _inputs_behind(body, decisive) if index >= n_body}
    carries = [v.aval for v in body.invars[n_body:]]
    return any(jnp.issubdtype(getattr(carries[index], "dtype", bool), jnp.inexact) for index in decisive)


def _inputs_behind(jaxpr: Any, results: set[int]) -> set[int]:
    """Returns which inputs of a program some of its results depend on."""
    needed = {jaxpr.outvars[k] for k in results if not is_literal(jaxpr.outvars[k])}
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            needed.update(v for v in eqn.invars if not is_literal(v))
    return {index for index, v in enumerate(jaxpr.invars) if v in needed}


HANDLERS: Mapping[str, Handler] = {
    "jit": _call("jaxpr"),
    "closed_call": _call("call_jaxpr"),
    "eval_jaxpr": _call("call_jaxpr"),
    "xla_metadata_call": _call("jaxpr"),
    "composite": _composite,
    "remat2": _open_call,
    "checkpoint": _open_call,
    "shard_map": _shard_map,
    "run_state": _run_state,
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
