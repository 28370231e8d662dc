"""Functions with user-defined derivative or batching rules.

The function itself is retyped like any call. The rule is not: it is traced with the dtypes it was written for, by
differentiating (or batching) the original equation, and then autocast runs that program. A rule that checks its dtypes
finds what it expects, and residuals still pass from the forward to the backward pass in the compute dtype.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, linear_call

from jmp_lite._compat import run, symbolic_zero
from jmp_lite._tree import cast
from jmp_lite.autocast._interpreter import Call, Handler, Interpreter, Retyped
from jmp_lite.autocast._programs import programs_of
from jmp_lite.autocast._values import Known, Origin, Tag, Value


class _Parts(NamedTuple):
    """A call of a custom function without its arguments: rules outlive the call and must not keep its tracers."""

    interpreter: Interpreter
    call: Call
    inner: Retyped
    closed: list[Any]
    """What the function closed over: the first operands."""

    @property
    def avals(self) -> list[Any]:
        """What the original equation takes."""
        return [v.aval for v in self.call.eqn.invars]

    def run(self, *arguments: Any) -> list[Any]:
        return run(self.inner.jaxpr, *self.closed, *arguments)

    def original(self, *arrays: Any) -> list[Any]:
        return self.call.bind(arrays)

    def operands(self, arguments: Sequence[Any]) -> list[Value]:
        """Pairs arguments with what is known of them."""
        arrays = [*self.closed, *arguments]
        return [known._replace(array=array) for known, array in zip(self.call.operands, arrays, strict=True)]

    def evaluate(self, fun: Callable[..., Any], avals: Sequence[Any], operands: Sequence[Value]) -> list[Any]:
        """Traces a function of the original equation with the original dtypes, and autocasts it."""
        jaxpr = jax.make_jaxpr(fun)(*avals)
        return [value.array for value in self.interpreter.evaluate(jaxpr, operands, self.call.scope)]


def _parts(interpreter: Interpreter, call: Call) -> tuple[_Parts, list[Any]]:
    """Splits a call into the part that its rules may keep and the arguments."""
    operands = interpreter.rounded(call)
    [body] = programs_of(call.eqn).bodies
    inner = interpreter.retype(body.jaxpr, operands, call.scope, call.wants)
    n_closed = call.params.get("num_consts", 0)
    arrays = [value.array for value in operands]
    known = dataclasses.replace(call, operands=[value._replace(array=None) for value in operands])
    return _Parts(interpreter, known, inner, arrays[:n_closed]), arrays[n_closed:]


def _like(arrays: Sequence[Any], dtypes: Sequence[Any]) -> list[Any]:
    """Casts floating arrays to the dtypes of others."""
    return [_cast_floating(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)]


def _cast_floating(array: Any, dtype: Any) -> Any:
    return cast(array, dtype) if dtype is not None and jnp.issubdtype(dtype, jnp.floating) else array


class _Live(NamedTuple):
    """Which arguments are differentiated; the others stay constants, so rules see constants."""

    flags: tuple[bool, ...]

    def of(self, arrays: Sequence[Any]) -> list[Any]:
        """Returns those that are."""
        return list(itertools.compress(arrays, self.flags))

    def merged(self, live: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        """Puts other arrays in their places."""
        remaining = iter(live)
        return [next(remaining) if flag else array for flag, array in zip(self.flags, others, strict=True)]


def _custom_jvp(interpreter: Interpreter, call: Call) -> list[Value]:
    parts, arguments = _parts(interpreter, call)
    n = len(parts.closed)
    function = jax.custom_jvp(parts.run)

    def rule(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        live = _Live(tuple(not isinstance(tangent, SymbolicZero) for tangent in tangents))

        def jvp(*arrays: Any) -> list[Any]:
            closed, primals, tangents = arrays[:n], arrays[n : n + len(live.flags)], arrays[n + len(live.flags) :]

            def original(*moved: Any) -> list[Any]:
                return parts.original(*closed, *live.merged(moved, primals))

            outs, tangents_out = jax.jvp(original, tuple(live.of(primals)), tuple(tangents))
            return [*outs, *tangents_out]

        avals = [*parts.avals, *(aval.to_tangent_aval() for aval in live.of(parts.avals[n:]))]
        moved = [Value(tangent, Known(origin=Origin.TANGENT)) for tangent in live.of(tangents)]
        results = parts.evaluate(jvp, avals, [*parts.operands(primals), *moved])
        dtypes = parts.inner.dtypes
        return _like(results[: len(dtypes)], dtypes), _like(results[len(dtypes) :], dtypes)

    function.defjvp(rule, symbolic_zeros=True)
    return interpreter.results(parts.inner, function(*arguments))


class _Backward(NamedTuple):
    """What the forward pass learns about the backward pass."""

    tree: Any
    """Structure of the pullback, whose leaves are the residuals."""
    avals: list[Any]
    """Of the residuals, as the rule made them."""
    live: _Live


def _custom_vjp(interpreter: Interpreter, call: Call) -> list[Value]:
    parts, arguments = _parts(interpreter, call)
    n, n_results = len(parts.closed), len(parts.inner.results)
    dtypes = [getattr(array, "dtype", None) for array in arguments]
    wanted = [v.aval.to_tangent_aval() for v in call.eqn.outvars]
    learned: list[_Backward] = []
    is_search = interpreter.demands.has_search(call.params["call_jaxpr"], "")
    function = jax.custom_vjp(parts.run)

    def forward(*primals: Any) -> tuple[list[Any], list[Any]]:
        live = _Live(tuple(primal.perturbed for primal in primals))

        def vjp(*arrays: Any) -> list[Any]:
            def original(*moved: Any) -> list[Any]:
                return parts.original(*arrays[:n], *live.merged(moved, arrays[n:]))

            outs, pullback = jax.vjp(original, *live.of(arrays[n:]))
            residuals, tree = jax.tree.flatten(pullback)
            learned[:] = [_Backward(tree, [jax.typeof(residual) for residual in residuals], live)]
            return [*outs, *residuals]

        results = parts.evaluate(vjp, parts.avals, parts.operands([primal.value for primal in primals]))
        return _like(results[:n_results], parts.inner.dtypes), results[n_results:]

    def pull_back(residuals: list[Any], cotangents: Any) -> tuple[Any, ...]:
        [backward] = learned
        there = _Live(tuple(not isinstance(cotangent, SymbolicZero) for cotangent in cotangents))
        if not any(there.flags):
            return (None,) * len(dtypes)

        def vjp(*arrays: Any) -> Any:
            residuals, cotangents = arrays[: len(backward.avals)], arrays[len(backward.avals) :]
            zeros = [symbolic_zero(aval) for aval in wanted]
            return jax.tree.unflatten(backward.tree, residuals)(there.merged(cotangents, zeros))

        operands = [_held(array) for array in (*residuals, *there.of(cotangents))]
        avals = [*backward.avals, *there.of(wanted)]
        if is_search:  # the backward pass takes the steps of the forward pass again, which it must find as they were
            results = vjp(*_like([value.array for value in operands], [aval.dtype for aval in avals]))
        else:
            results = parts.evaluate(vjp, avals, operands)
        found = _like(results, backward.live.of(dtypes))
        return tuple(backward.live.merged(found, [None] * len(dtypes)))

    function.defvjp(forward, pull_back, symbolic_zeros=True)
    return interpreter.results(parts.inner, function(*arguments))


def _held(array: Any) -> Value:
    """A value with unknown history: if it is held in 16 bits, it came from a matmul."""
    dtype = getattr(array, "dtype", None)
    is_low = dtype is not None and dtype.itemsize == 2 and jnp.issubdtype(dtype, jnp.floating)
    return Value(array, Known(Tag.LOW if is_low else Tag.NEUTRAL))


def _custom_vmap(interpreter: Interpreter, call: Call) -> list[Value]:
    parts, arguments = _parts(interpreter, call)
    function = jax.custom_batching.custom_vmap(parts.run)

    @function.def_vmap
    def rule(axis_size: int, in_batched: Sequence[bool], *arrays: Any) -> tuple[list[Any], list[bool]]:
        axes = [0 if batched else None for batched in in_batched]
        batched = jax.vmap(parts.original, in_axes=axes)
        avals = [
            jax.ShapeDtypeStruct((axis_size, *aval.shape) if is_batched else aval.shape, aval.dtype)
            for aval, is_batched in zip(parts.avals, in_batched, strict=True)
        ]
        results = parts.evaluate(batched, avals, parts.operands(arrays))
        return _like(results, parts.inner.dtypes), [True] * len(results)

    return interpreter.results(parts.inner, function(*arguments))


def _linear_call(interpreter: Interpreter, call: Call) -> list[Value]:
    """A linear function with its own transpose; ``num_res`` operands are not linear."""
    parts, arguments = _parts(interpreter, call)
    n = call.params["num_callee_consts"] + call.params["num_res"]
    dtypes = [getattr(array, "dtype", None) for array in arguments[n:]]
    wanted = [v.aval for v in call.eqn.outvars]

    def transpose(fixed: list[Any], cotangents: list[Any]) -> list[Any]:
        def transposed(*arrays: Any) -> Any:
            linear = jax.linear_transpose(lambda *a: parts.original(*arrays[:n], *a), *parts.avals[n:])
            return linear(list(arrays[n:]))

        known = zip(parts.call.operands[:n], fixed, strict=True)
        operands = [value._replace(array=array) for value, array in known]
        results = parts.evaluate(transposed, [*parts.avals[:n], *wanted], [*operands, *map(_held, cotangents)])
        return _like(results, dtypes)

    results = linear_call(lambda fixed, linear: parts.run(*fixed, *linear), transpose, arguments[:n], arguments[n:])
    return interpreter.results(parts.inner, results)


HANDLERS: Mapping[str, Handler] = {
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "custom_vmap_call": _custom_vmap,
    "linear_call": _linear_call,
}
