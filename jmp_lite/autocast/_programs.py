"""The primitives that hold programs: how values enter and leave these, and how to rebuild the equation.

One table serves everything that enters programs: the backward search, the interpreter, contracted axes.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jmp_lite._compat import Equation, Jaxpr, bind, open_jaxpr, program, scan_counts
from jmp_lite.products._matmul import as_primitive_of_jax


class Body(NamedTuple):
    """A program inside an equation."""

    jaxpr: Jaxpr
    operands: tuple[int, ...]
    """For each input, the operand of the equation that it is at first."""
    results: tuple[int, ...] | None
    """For each result, the result of the equation that it becomes; ``None`` for the condition of a loop."""


class Programs(NamedTuple):
    """The programs of one equation."""

    bodies: tuple[Body, ...]
    carried: Mapping[int, int] = {}
    """From an operand to the result that takes its place in the next iteration."""
    choice: int | None = None
    """The operand that says which of the programs runs."""


class Row(NamedTuple):
    """The table's entry for a primitive."""

    kind: str
    """``call``, ``checkpoint``, ``branch``, ``loop``; or, rebuilt by its handler, ``rule``, ``map``, ``references``."""
    programs: Callable[[Equation], Programs]
    rebuild: Callable[[Equation, Sequence[Any], Sequence[Jaxpr]], list[Any]] | None
    """Applies the equation to other operands, with other programs in place of those it holds."""


def _call(kind: str, *parameters: str) -> Row:
    """A primitive with one program, found in the first of these parameters that it has, that takes all operands."""

    def parameter(eqn: Equation) -> str:
        return next(name for name in parameters if name in eqn.params)

    def programs(eqn: Equation) -> Programs:
        everything = tuple(range(len(eqn.invars))), tuple(range(len(eqn.outvars)))
        return Programs((Body(eqn.params[parameter(eqn)], *everything),))

    def rebuild(eqn: Equation, arrays: Sequence[Any], jaxprs: Sequence[Jaxpr]) -> list[Any]:
        return bind(eqn, arrays, {**eqn.params, parameter(eqn): jaxprs[0]})

    return Row(kind, programs, rebuild if kind == "call" else None)


def _rebuilt_open(eqn: Equation, arrays: Sequence[Any], jaxprs: Sequence[Jaxpr]) -> list[Any]:
    jaxpr, consts = open_jaxpr(jaxprs[0])
    policy = eqn.params["policy"]
    policy = policy and functools.partial(_asked_as_jax, policy)
    return bind(eqn, [*consts, *arrays], {**eqn.params, "jaxpr": jaxpr, "policy": policy})


def _asked_as_jax(policy: Callable[..., Any], primitive: Any, *operands: Any, **params: Any) -> Any:
    """Asks a ``jax.checkpoint`` policy about our matmuls as if they were JAX's, which it knows."""
    return policy(as_primitive_of_jax(primitive), *operands, **params)


def _on_references(eqn: Equation) -> Programs:
    """A program on references, which returns nothing: the results of the equation are the final contents of these."""
    return Programs((Body(eqn.params["jaxpr"], tuple(range(len(eqn.invars))), ()),))


def _branches(eqn: Equation) -> Programs:
    operands, results = tuple(range(1, len(eqn.invars))), tuple(range(len(eqn.outvars)))
    return Programs(tuple(Body(branch, operands, results) for branch in eqn.params["branches"]), choice=0)


def _rebuilt_cond(eqn: Equation, arrays: Sequence[Any], jaxprs: Sequence[Jaxpr]) -> list[Any]:
    return bind(eqn, arrays, {**eqn.params, "branches": tuple(jaxprs)})


def _scan(eqn: Equation) -> Programs:
    n_consts, n_carry = scan_counts(eqn.params)
    body = Body(eqn.params["jaxpr"], tuple(range(len(eqn.invars))), tuple(range(len(eqn.outvars))))
    return Programs((body,), {n_consts + index: index for index in range(n_carry)})


def _rebuilt_scan(eqn: Equation, arrays: Sequence[Any], jaxprs: Sequence[Jaxpr]) -> list[Any]:
    return bind(eqn, arrays, {**eqn.params, "jaxpr": jaxprs[0]})


def _while(eqn: Equation) -> Programs:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    first, n_carry = n_cond + n_body, len(eqn.outvars)
    carries, results = tuple(range(first, first + n_carry)), tuple(range(n_carry))
    test = Body(eqn.params["cond_jaxpr"], (*range(n_cond), *carries), None)
    body = Body(eqn.params["body_jaxpr"], (*range(n_cond, first), *carries), results)
    return Programs((test, body), {first + index: index for index in range(n_carry)})


def _rebuilt_while(eqn: Equation, arrays: Sequence[Any], jaxprs: Sequence[Jaxpr]) -> list[Any]:
    return bind(eqn, arrays, {**eqn.params, "cond_jaxpr": jaxprs[0], "body_jaxpr": jaxprs[1]})


#: ``composite`` renamed its parameter in jax 0.11.
PROGRAMS: Mapping[str, Row] = {
    "jit": _call("call", "jaxpr"),
    "closed_call": _call("call", "call_jaxpr"),
    "eval_jaxpr": _call("call", "call_jaxpr"),
    "xla_metadata_call": _call("call", "jaxpr"),
    "composite": _call("call", "jaxpr", "call_jaxpr"),
    "remat2": _call("checkpoint", "jaxpr")._replace(rebuild=_rebuilt_open),
    "checkpoint": _call("checkpoint", "jaxpr")._replace(rebuild=_rebuilt_open),
    "cond": Row("branch", _branches, _rebuilt_cond),
    "scan": Row("loop", _scan, _rebuilt_scan),
    "while": Row("loop", _while, _rebuilt_while),
    "shard_map": _call("map", "jaxpr"),
    "run_state": Row("references", _on_references, None),
    "custom_jvp_call": _call("rule", "call_jaxpr"),
    "custom_vjp_call": _call("rule", "call_jaxpr"),
    "custom_vmap_call": _call("rule", "call"),
    "linear_call": _call("rule", "callee"),
}


def programs_of(eqn: Equation) -> Programs:
    """Returns the programs of an equation; none for a primitive that is not in the table."""
    row = PROGRAMS.get(eqn.primitive.name)
    return row.programs(eqn) if row else Programs(())


def rebuilt(eqn: Equation, arrays: Sequence[Any], jaxprs: Sequence[Jaxpr]) -> list[Any]:
    """Applies an equation to other operands, with other programs in place of those it holds, in their order."""
    rebuild = PROGRAMS[eqn.primitive.name].rebuild
    if rebuild is None:
        raise NotImplementedError(eqn.primitive.name)
    return rebuild(eqn, arrays, jaxprs)


def inputs(body: Body) -> list[Any]:
    """Returns the input variables of a program."""
    return list(program(body.jaxpr)[0].invars)
