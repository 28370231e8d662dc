"""Functions with derivative rules or batching rules of the user's.

The function itself is retyped like any call. The rule is not: it is traced on the dtypes that it was written for, by
differentiating (or batching) the original equation, and the program found that way is autocast. A rule that checks its
dtypes finds what it expects, and residuals still cross from the forward to the backward pass in the compute dtype.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call

from jmp_lite._compat import run
from jmp_lite.autocast._interpreter import Call, Handler, Interpreter, Retyped
from jmp_lite.autocast._values import Tag, Value, cast


class _Parts(NamedTuple):
    """A call of a custom function: what it closed over, its arguments, and the function at the dtypes they have."""

    interpreter: Interpreter
    call: Call
    inner: Retyped
    n_closed: int

    @property
    def closed(self) -> list[Any]:
        return self.call.arrays[: self.n_closed]

    @property
    def arguments(self) -> list[Any]:
        return self.call.arrays[self.n_closed :]

    @property
    def avals(self) -> list[Any]:
        """What the original equation takes."""
        return [v.aval for v in self.call.eqn.invars]

    def run(self, *arguments: Any) -> list[Any]:
        return run(self.inner.jaxpr, *self.closed, *arguments)

    def original(self, *arrays: Any) -> list[Any]:
        return self.call.bind(arrays)

    def evaluate(self, fun: Callable[..., Any], avals: Sequence[Any], operands: Sequence[Value]) -> list[Any]:
        """Traces a function of the original equation at the original dtypes, and autocasts it."""
        jaxpr = jax.make_jaxpr(fun)(*avals)
        return [value.array for value in self.interpreter.evaluate(jaxpr, operands, self.call.scope)]


def _parts(interpreter: Interpreter, call: Call, parameter: str = "call_jaxpr") -> _Parts:
    call = dataclasses.replace(call, operands=interpreter.rounded(call, parameter))
    inner = interpreter.retype(call.params[parameter], call.operands, call.scope, call.wants)
    return _Parts(interpreter, call, inner, call.params.get("num_consts", 0))


def _like(arrays: Sequence[Any], dtypes: Sequence[Any]) -> list[Any]:
    """Casts the floating arrays among some to the dtypes of others."""
    return [_cast_floating(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)]


def _cast_floating(array: Any, dtype: Any) -> Any:
    return cast(array, dtype) if dtype is not None and jnp.issubdtype(dtype, jnp.floating) else array


def _custom_jvp(interpreter: Interpreter, call: Call) -> list[Value]:
    parts = _parts(interpreter, call)
    call = parts.call
    n = parts.n_closed
    function = jax.custom_jvp(parts.run)

    @function.defjvp
    def rule(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        def jvp(*arrays: Any) -> list[Any]:
            closed, arrays = arrays[:n], arrays[n:]
            primals, tangents = arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]
            outs, tangents_out = jax.jvp(lambda *a: parts.original(*closed, *a), primals, tangents)
            return [*outs, *tangents_out]

        avals = [*parts.avals, *(aval.to_tangent_aval() for aval in parts.avals[n:])]
        operands = [value._replace(array=array) for value, array in zip(call.operands[n:], primals, strict=True)]
        results = parts.evaluate(jvp, avals, [*call.operands[:n], *operands, *map(Value, tangents)])
        dtypes = parts.inner.dtypes
        return _like(results[: len(dtypes)], dtypes), _like(results[len(dtypes) :], dtypes)

    return interpreter.results(parts.inner, function(*parts.arguments))


def _custom_vjp(interpreter: Interpreter, call: Call) -> list[Value]:
    parts = _parts(interpreter, call)
    call = parts.call
    n, n_results = parts.n_closed, len(parts.inner.results)
    function = jax.custom_vjp(parts.run)
    backward: dict[str, Any] = {}  # what the forward pass learns about the backward one: its tree and dtypes

    def forward(*arguments: Any) -> tuple[list[Any], list[Any]]:
        def vjp(*arrays: Any) -> list[Any]:
            outs, pullback = jax.vjp(lambda *a: parts.original(*arrays[:n], *a), *arrays[n:])
            residuals, backward["tree"] = jax.tree.flatten(pullback)
            backward["avals"] = [jax.typeof(residual) for residual in residuals]
            return [*outs, *residuals]

        operands = [value._replace(array=array) for value, array in zip(call.operands[n:], arguments, strict=True)]
        results = parts.evaluate(vjp, parts.avals, [*call.operands[:n], *operands])
        return _like(results[:n_results], parts.inner.dtypes), results[n_results:]

    def pull_back(residuals: list[Any], cotangents: Any) -> tuple[Any, ...]:
        def vjp(residuals: Any, cotangents: Any) -> Any:
            return jax.tree.unflatten(backward["tree"], residuals)(cotangents)

        wanted = [v.aval.to_tangent_aval() for v in call.eqn.outvars]
        jaxpr = jax.make_jaxpr(vjp)(backward["avals"], wanted)
        operands = [_held(array) for array in [*residuals, *cotangents]]
        results = [value.array for value in interpreter.evaluate(jaxpr, operands, call.scope)]
        return tuple(_like(results, [getattr(array, "dtype", None) for array in parts.arguments]))

    function.defvjp(forward, pull_back)
    return interpreter.results(parts.inner, function(*parts.arguments))


def _held(array: Any) -> Value:
    """A value whose history is unknown: what is held in 16 bits was made by a product, or from one."""
    dtype = getattr(array, "dtype", None)
    is_low = dtype is not None and dtype.itemsize == 2 and jnp.issubdtype(dtype, jnp.floating)
    return Value(array, Tag.LOW if is_low else Tag.NEUTRAL)


def _custom_vmap(interpreter: Interpreter, call: Call) -> list[Value]:
    parts = _parts(interpreter, call, "call")
    call = parts.call
    function = jax.custom_batching.custom_vmap(parts.run)

    @function.def_vmap
    def rule(axis_size: int, in_batched: Sequence[bool], *arrays: Any) -> tuple[list[Any], list[bool]]:
        axes = [0 if batched else None for batched in in_batched]
        batched = jax.vmap(parts.original, in_axes=axes, axis_size=axis_size)
        avals = [
            jax.ShapeDtypeStruct((axis_size, *aval.shape) if is_batched else aval.shape, aval.dtype)
            for aval, is_batched in zip(parts.avals, in_batched, strict=True)
        ]
        operands = [value._replace(array=array) for value, array in zip(call.operands, arrays, strict=True)]
        results = parts.evaluate(batched, avals, operands)
        return _like(results, parts.inner.dtypes), [True] * len(results)

    return interpreter.results(parts.inner, function(*parts.arguments))


def _linear_call(interpreter: Interpreter, call: Call) -> list[Value]:
    """A linear function with a transpose of its own; ``num_res`` operands are not linear."""
    parts = _parts(interpreter, call, "callee")
    call = parts.call
    n = call.params["num_callee_consts"] + call.params["num_res"]
    dtypes = [getattr(array, "dtype", None) for array in call.arrays[n:]]

    def transpose(fixed: list[Any], cotangents: list[Any]) -> list[Any]:
        def transposed(*arrays: Any) -> Any:
            return jax.linear_transpose(lambda *a: parts.original(*arrays[:n], *a), *parts.avals[n:])(list(arrays[n:]))

        avals = [*parts.avals[:n], *(v.aval for v in call.eqn.outvars)]
        operands = [value._replace(array=array) for value, array in zip(call.operands[:n], fixed, strict=True)]
        return _like(parts.evaluate(transposed, avals, [*operands, *map(_held, cotangents)]), dtypes)

    results = linear_call(lambda fixed, linear: parts.run(*fixed, *linear), transpose, call.arrays[:n], call.arrays[n:])
    return interpreter.results(parts.inner, results)


HANDLERS: Mapping[str, Handler] = {
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "custom_vmap_call": _custom_vmap,
    "linear_call": _linear_call,
}
