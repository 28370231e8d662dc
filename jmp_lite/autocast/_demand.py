"""Searches a program backward for what the consumers of every variable want.

A precise operation is only as precise as its operands: where a square root or an exponential wants float32, arithmetic
that feeds nothing else runs in float32 too, so that a whole variance, norm or softmax does. Whatever linear algebra or
the condition of a loop depends on runs as written. Values that feed only matmuls are cast before they are moved.

References:
    The passes of TensorFlow's ``auto_mixed_precision.cc`` find such chains forward and backward between deny nodes.
"""

import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jmp_lite._compat import Atom, Equation, Jaxpr, Var, is_literal, program, scope_names
from jmp_lite.autocast import _ops
from jmp_lite.autocast._layers import Layers
from jmp_lite.autocast._ops import Op, OpClass, classify
from jmp_lite.autocast._programs import Body, inputs, programs_of
from jmp_lite.autocast._values import is_eligible

#: A set of the kinds of consumers that a variable has: the sum of some of the flags below.
Want = int

#: A matmul, which rounds it to the compute dtype.
LOW: Want = 1
#: An operation that takes it as it is.
EITHER: Want = 2
#: An operation that needs float32.
HIGH: Want = 4
#: The next iteration of a loop, which holds it in float32: as precise as what it is made of.
KEPT: Want = 8
#: A cast to an integer: float32, whatever others want.
PLACE: Want = 16
#: Linear algebra: computed as written, matmuls too.
SOLVED: Want = 32
#: The test of the loop that it is in: computed as written, matmuls too.
TESTED: Want = 64

#: A sum of many terms, in which roundings average out, a matmul in float32, or a choice, where rounding makes ties:
#: float32, but for sums of layers.
SUMMED: Want = 128

AS_WRITTEN: Want = SOLVED | TESTED
FLOAT32: Want = HIGH | SUMMED
Wants = tuple[Want, ...]


def is_float32(want: Want) -> bool:
    """Whether a value should be float32: all its consumers want that, or one that decides."""
    return (want != 0 and not want & (LOW | EITHER)) or want & (PLACE | AS_WRITTEN) != 0


def joined(wants: Iterable[Want]) -> Want:
    """Joins the wants of several consumers, or of all results of an equation."""
    return functools.reduce(operator.or_, wants, 0)


class Demands:
    """Finds wants, and remembers them per program."""

    def __init__(self, ops: Mapping[str, Op], is_low: Callable[[str, str], bool]) -> None:
        self.ops = ops
        self.is_low = is_low
        """Whether a primitive in a name scope is one that may run in a compute dtype."""
        self.layers = Layers(ops)
        self._found: Any = weakref.WeakKeyDictionary()

    def of(self, jaxpr: Jaxpr, wanted: Wants, scope: str) -> Mapping[Var, Want]:
        """Returns the want for every variable that has a consumer.

        Args:
            jaxpr: A program.
            wanted: What the consumers of its results want.
            scope: Name scope that it is called in.
        """
        inner, _ = program(jaxpr)
        found = self._found.setdefault(inner, {})
        if (wanted, scope) not in found:
            found[wanted, scope] = self._search(inner, wanted, scope)
        wants: Mapping[Var, Want] = found[wanted, scope]
        return wants

    def through(self, eqn: Equation, of_results: Sequence[Want], scope: str) -> tuple[list[Want], Wants]:
        """Searches the programs of an equation in a name scope, loops until nothing changes.

        Returns:
            The wants for each operand and each result; for a carry, the next iteration is a consumer too.
        """
        programs, results = programs_of(eqn), list(of_results)
        wants = [0] * len(eqn.invars)
        while True:
            before = list(wants)
            for body in programs.bodies:
                inner = self.of(body.jaxpr, _wants_of(body, results), scope)
                for v, operand in zip(inputs(body), body.operands, strict=True):
                    wants[operand] |= inner.get(v, 0)
            for operand, result in programs.carried.items():
                results[result] |= wants[operand]
            if wants == before:
                break
        if programs.choice is not None:
            wants[programs.choice] |= joined(results) & AS_WRITTEN
        if not joined(of_results) & TESTED:  # a test asks nothing of what was computed before its loop
            wants = [HIGH | (want & ~TESTED) if want & TESTED else want for want in wants]
        return wants, tuple(results)

    def has_search(self, jaxpr: Jaxpr, scope: str, wanted: Wants = ()) -> bool:
        """Whether a loop in a program iterates until what matmuls make of its carries is good enough."""
        inner, _ = program(jaxpr)
        wants = self.of(inner, wanted or (EITHER,) * len(inner.outvars), scope)
        return any(self.is_search(eqn, [wants.get(v, 0) for v in eqn.outvars], scope) for eqn in inner.eqns)

    def is_search(self, eqn: Equation, of_results: Sequence[Want], scope: str) -> bool:
        """Whether an equation is a matmul that a test depends on, or holds one."""
        if classify(eqn, self.ops)[0] is OpClass.ALLOW and joined(of_results) & TESTED:
            return True
        _, results = self.through(eqn, of_results, scope)
        return any(self.has_search(body.jaxpr, scope, _wants_of(body, results)) for body in programs_of(eqn).bodies)

    def _search(self, inner: Any, wanted: Wants, scope: str) -> dict[Var, Want]:
        wants: dict[Var, Want] = {}
        sums, live = self.layers.sums(inner), {v for v in inner.outvars if not is_literal(v)}
        for atom, want in zip(inner.outvars, wanted, strict=True):
            _add(wants, atom, want)
        for eqn in reversed(inner.eqns):
            of_results = [wants.get(v, 0) for v in eqn.outvars]
            of_operands = self._of_operands(eqn, of_results, scope)
            if live.isdisjoint(eqn.outvars) and not eqn.effects:
                # What reaches nothing rounds nothing, but its derivative may need the digits that it would have needed.
                of_operands = [want & FLOAT32 for want in of_operands]
            else:
                live.update(v for v in eqn.invars if not is_literal(v))
            if not sums.isdisjoint(eqn.outvars):
                of_operands = [want & ~SUMMED | EITHER if want & FLOAT32 == SUMMED else want for want in of_operands]
            for atom, want in zip(eqn.invars, of_operands, strict=True):
                _add(wants, atom, want)
            for atom in eqn.invars[: _ops.keys_of(eqn)]:
                _add(wants, atom, SUMMED)
        return wants

    def _of_operands(self, eqn: Equation, of_results: list[Want], scope: str) -> Sequence[Want]:
        op, _ = classify(eqn, self.ops)
        if op is OpClass.NESTED and programs_of(eqn).bodies:
            return self.through(eqn, of_results, _inner(scope, eqn))[0]
        if op is OpClass.ALLOW and not self.is_low(_inner(scope, eqn), eqn.primitive.name):
            return [SUMMED | joined(of_results) & AS_WRITTEN] * len(eqn.invars)
        if _ops.treats_operands_separately(eqn.primitive.name) and len(eqn.invars) == len(eqn.outvars):
            return [_passed_on(want) for want in of_results]
        hangs_on = joined(of_results[:1] if eqn.primitive.name in _ops.CHOOSES else of_results) & AS_WRITTEN
        if eqn.primitive.name in _ops.PLACES:
            hangs_on = 0
        return [self._of_operand(eqn, op, joined(of_results) & ~AS_WRITTEN) | hangs_on] * len(eqn.invars)

    def _of_operand(self, eqn: Equation, op: Op, want: Want) -> Want:
        name = eqn.primitive.name
        if _ops.rounds_to_integers(eqn):
            return PLACE
        if op is OpClass.AS_WRITTEN:
            return SOLVED if _ops.solves(name) else SUMMED if name in _ops.PRODUCTS else EITHER
        if op is OpClass.DENY:
            return SUMMED if _ops.sums(name) else HIGH
        if op is OpClass.ALLOW or not isinstance(op, OpClass):
            return LOW
        if not any(is_eligible(v.aval) for v in eqn.outvars):
            return 0  # a comparison of low values is as good as they are
        if _ops.moves_whole_arrays(name):
            return want
        if _ops.picks_values(name) or sum(not is_literal(v) for v in eqn.invars) == 1:
            return _passed_on(want)
        return want if is_float32(want) else EITHER


def _inner(scope: str, eqn: Equation) -> str:
    return "/".join(filter(None, (scope, scope_names(eqn.source_info.name_stack))))


def _passed_on(want: Want) -> Want:
    """The want for an operand that passes through unchanged: a later matmul may round it, but only there."""
    return want & ~LOW | EITHER if want & LOW else want


def _wants_of(body: Body, of_results: Sequence[Want]) -> Wants:
    if body.results is None:
        return (TESTED,)
    return tuple(of_results[result] for result in body.results)


def _add(wants: dict[Var, Want], atom: Atom, want: Want) -> None:
    if not is_literal(atom) and want:
        wants[atom] = wants.get(atom, 0) | want
