"""Searches a program forward for sums of layers: of what a layer made and what goes around it.

Each may be kept in 16 bits, so that float32 for the one would double what is kept for the backward pass. A bias, noise,
a logarithm, a target, or two terms that are made of the same logits are not layers: a matmul beside them may leave in
float32.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jmp_lite._compat import Equation, Var, is_literal, program
from jmp_lite.autocast import _ops
from jmp_lite.autocast._ops import Op, OpClass, classify
from jmp_lite.autocast._programs import programs_of
from jmp_lite.autocast._values import is_eligible


class Made(NamedTuple):
    """What a value is made of."""

    layers: frozenset[Var] = frozenset()
    """The results of matmuls, and the inputs, that it is made of by anything but matmuls."""
    is_precise: bool = False
    """Whether it is float32 anyway: then it has no layers."""


_NOTHING = Made()
_PRECISE = Made(is_precise=True)


class Layers:
    """Finds what values are made of, and remembers it per program."""

    def __init__(self, ops: Mapping[str, Op]) -> None:
        self.ops = ops
        self._found: Any = weakref.WeakKeyDictionary()

    def sums(self, inner: Any) -> frozenset[Var]:
        """Returns the sums of two layers, neither of which is made of what the other is made of.

        Args:
            inner: An open program; what it is given, such as a target, is not a layer.
        """
        made, given = self._of(inner, (False,) * len(inner.invars)), frozenset(inner.invars)

        def is_sum(eqn: Equation) -> bool:
            shape = eqn.outvars[0].aval.shape if eqn.primitive.name == "add" else None
            if shape is None or any(is_literal(v) or v.aval.shape != shape for v in eqn.invars):
                return False
            first, second = (made.get(v, _NOTHING).layers - given for v in eqn.invars)
            return bool(first and second) and not (first <= second or second <= first)

        return frozenset(eqn.outvars[0] for eqn in inner.eqns if is_sum(eqn))

    def _of(self, inner: Any, are_precise: tuple[bool, ...]) -> Mapping[Var, Made]:
        """Returns what every variable of a program is made of, some of whose inputs are float32 anyway."""
        found = self._found.setdefault(inner, {})
        if are_precise not in found:
            found[are_precise] = self._search(inner, are_precise)
        made: Mapping[Var, Made] = found[are_precise]
        return made

    def _search(self, inner: Any, are_precise: Sequence[bool]) -> dict[Var, Made]:
        made = {
            v: _NOTHING if not is_eligible(v.aval) else _PRECISE if is_precise else Made(frozenset([v]))
            for v, is_precise in zip(inner.invars, are_precise, strict=True)
        }
        for eqn in inner.eqns:
            operands = [_NOTHING if is_literal(v) else made.get(v, _NOTHING) for v in eqn.invars]
            made.update(zip(eqn.outvars, self._of_results(eqn, operands), strict=True))
        return made

    def _of_results(self, eqn: Equation, operands: Sequence[Made]) -> list[Made]:
        op, _ = classify(eqn, self.ops)
        if op is OpClass.NESTED and programs_of(eqn).bodies:
            return self._of_programs(eqn, operands)
        if op is OpClass.ALLOW or not isinstance(op, OpClass):
            return [Made(frozenset([v])) for v in eqn.outvars]
        if op is OpClass.DENY or _ops.solves(eqn.primitive.name):
            return [_PRECISE] * len(eqn.outvars)
        if op is OpClass.AS_WRITTEN or _ops.adds_axes(eqn):
            return [_NOTHING] * len(eqn.outvars)
        if _ops.treats_operands_separately(eqn.primitive.name) and len(eqn.invars) == len(eqn.outvars):
            return list(operands)
        return [_joined(eqn, operands)] * len(eqn.outvars)

    def _of_programs(self, eqn: Equation, operands: Sequence[Made]) -> list[Made]:
        programs = programs_of(eqn)
        found: list[list[Made]] = [[] for _ in eqn.outvars]
        for body in programs.bodies:
            inner, _ = program(body.jaxpr)
            outside = {v: operands[i] for v, i in zip(inner.invars, body.operands, strict=True)}
            are_precise = [operands[i].is_precise and i not in programs.carried for i in body.operands]
            made = self._of(inner, tuple(are_precise))
            for result, v in zip(body.results or (), inner.outvars, strict=body.results is not None):
                of_result = _NOTHING if is_literal(v) else made.get(v, _NOTHING)
                found[result].append(_seen_from_outside(of_result, outside, eqn.outvars[result]))
        return [
            _PRECISE if each and all(x.is_precise for x in each) else Made(frozenset().union(*(x.layers for x in each)))
            for each in found
        ]


def _joined(eqn: Equation, operands: Sequence[Made]) -> Made:
    result = eqn.outvars[0].aval.shape
    whole = [made for v, made in zip(eqn.invars, operands, strict=True) if not _is_repeated(v.aval.shape, result)]
    if any(made.is_precise for made in whole):
        return _PRECISE
    return Made(frozenset().union(*(made.layers for made in whole)))


def _is_repeated(shape: Sequence[Any], result: Sequence[Any]) -> bool:
    """Whether an operand has less to say than the result, such as the statistics of a norm."""
    return not shape or (len(shape) == len(result) and any(a == 1 != b for a, b in zip(shape, result, strict=True)))


def _seen_from_outside(made: Made, outside: Mapping[Var, Made], result: Var) -> Made:
    """Names inputs by what they are made of outside, and layers inside by the result."""
    if made.is_precise:
        return _PRECISE
    of_inputs = [outside[v].layers for v in made.layers if v in outside]
    is_made_inside = any(v not in outside for v in made.layers)
    return Made(frozenset([result] if is_made_inside else []).union(*of_inputs))
