"""Searches a program backwards for what the consumers of every variable want.

A precise operation is only as precise as its operands: where a square root or an exponential wants float32, the mild
arithmetic that feeds nothing else is done in float32 too, so that variances, norms and softmax are computed as a whole.
What feeds matrix products alone is cast before it is moved.

References:
    The passes of TensorFlow's ``auto_mixed_precision.cc`` find such chains forward and backward between deny nodes.
"""

import enum
import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from jmp_lite._compat import Atom, Equation, Jaxpr, Var, is_literal, program
from jmp_lite.autocast._ops import (
    Op,
    OpClass,
    classify,
    moves_whole_arrays,
    rounds_to_integers,
    treats_operands_separately,
)
from jmp_lite.autocast._values import is_eligible


class Want(enum.Enum):
    """What all consumers of a variable agree on; ``None`` stands for no consumer."""

    STRICT = "float32, whatever others want: to be rounded to an integer"
    HIGH = "float32"
    LOW = "compute dtype"
    MIXED = "either"


Wants = tuple[Want | None, ...]
WANTS_FLOAT32 = frozenset({Want.STRICT, Want.HIGH})

#: Primitives whose operands and results are those of the program they hold, with the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "shard_map": "jaxpr",
    "closed_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
}


def meet(a: Want | None, b: Want | None) -> Want | None:
    """Joins the wants of two consumers."""
    if a is None or a is b:
        return b
    if Want.STRICT in (a, b):
        return Want.STRICT
    return a if b is None else Want.MIXED


def agreed(wants: Wants) -> Want | None:
    """Joins the wants of all results of an equation."""
    return functools.reduce(meet, wants, None)


class Demands:
    """Finds wants, and remembers them per program."""

    def __init__(self, ops: Mapping[str, Op]) -> None:
        self.ops = ops
        self._found: Any = weakref.WeakKeyDictionary()

    def of(self, jaxpr: Jaxpr, wanted: Wants) -> Mapping[Var, Want]:
        """Returns the want of every variable that has a consumer.

        Args:
            jaxpr: A program.
            wanted: What the consumers of its results want.
        """
        inner, _ = program(jaxpr)
        found = self._found.setdefault(inner, {})
        if wanted not in found:
            found[wanted] = self._search(inner, wanted)
        wants: Mapping[Var, Want] = found[wanted]
        return wants

    def _search(self, inner: Any, wanted: Wants) -> dict[Var, Want]:
        wants: dict[Var, Want] = {}
        for atom, want in zip(inner.outvars, wanted, strict=True):
            _add(wants, atom, want)
        for eqn in reversed(inner.eqns):
            for atom, want in zip(eqn.invars, self._of_operands(eqn, wants), strict=True):
                _add(wants, atom, want)
        return wants

    def _of_operands(self, eqn: Equation, wants: Mapping[Var, Want]) -> Sequence[Want | None]:
        name = eqn.primitive.name
        of_results = tuple(wants.get(v) for v in eqn.outvars)
        if name in CALLS:
            inner = eqn.params[CALLS[name]]
            inner_wants = self.of(inner, of_results)
            return [inner_wants.get(v) for v in program(inner)[0].invars]
        if treats_operands_separately(name) and len(eqn.invars) == len(eqn.outvars):
            return [want if want in WANTS_FLOAT32 else Want.MIXED for want in of_results]
        return [self._of_operand(eqn, of_results)] * len(eqn.invars)

    def _of_operand(self, eqn: Equation, of_results: Wants) -> Want | None:
        op, _ = classify(eqn, self.ops)
        if rounds_to_integers(eqn):
            return Want.STRICT
        if op is OpClass.DENY:
            return Want.HIGH
        if op is OpClass.ALLOW or not isinstance(op, OpClass):
            return Want.LOW
        if op is OpClass.FOLLOW:
            if not any(is_eligible(v.aval) for v in eqn.outvars):
                return None  # a comparison of low values is as good as they are
            want = agreed(of_results)
            if want in WANTS_FLOAT32 or (want is Want.LOW and moves_whole_arrays(eqn.primitive.name)):
                return want
        return Want.MIXED


def _add(wants: dict[Var, Want], atom: Atom, want: Want | None) -> None:
    if not is_literal(atom):
        joined = meet(wants.get(atom), want)
        if joined is not None:
            wants[atom] = joined
