"""The input of the rules: an equation, its operands as they are held, and what is known of its results."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import Atom, Equation, is_literal
from jmp_lite.autocast import _ops
from jmp_lite.autocast._demand import SOLVED, Want
from jmp_lite.autocast._library import library_of
from jmp_lite.autocast._ops import Op, OpClass
from jmp_lite.autocast._rules import Precision
from jmp_lite.autocast._values import OF_WEIGHTS, Known, Origin, Tag, Value, is_eligible, size


class Facts:
    """An equation in its place."""

    def __init__(self, eqn: Equation, operands: Sequence[Value], op: Op, precision: Precision, want: Want) -> None:
        self.eqn, self.operands, self.op, self.precision, self.want = eqn, operands, op, precision, want
        self.name: str = eqn.primitive.name

    @functools.cached_property
    def floats(self) -> list[Value]:
        """The operands that were float32, literals too."""
        return [value for v, value in zip(self.eqn.invars, self.operands, strict=True) if is_eligible(v.aval)]

    @functools.cached_property
    def arrays(self) -> list[Value]:
        """The same without literals."""
        return [value for v, value in zip(self.eqn.invars, self.operands, strict=True) if _is_float_array(v)]

    @functools.cached_property
    def whole(self) -> list[Value]:
        """The arrays that are not broadcast to the shape of the result; all floats if there are none."""
        shape = self.eqn.outvars[0].aval.shape
        return [value for value in self.arrays if not _is_repeated(value, shape)] or self.floats

    @functools.cached_property
    def tag(self) -> Tag:
        """The largest of all tags."""
        return max(value.tag for value in self.floats)

    @functools.cached_property
    def tag_of_whole(self) -> Tag:
        """The largest tag of the whole operands."""
        return max(value.tag for value in self.whole)

    @functools.cached_property
    def has_float_results(self) -> bool:
        """Whether a result was float32; those of comparisons are not."""
        return any(is_eligible(v.aval) for v in self.eqn.outvars)

    @functools.cached_property
    def takes_solution(self) -> bool:
        """Whether an operand comes from linear algebra."""
        return any(value.known.origin is Origin.SOLVED for value in self.arrays)

    @functools.cached_property
    def tangent(self) -> int | None:
        """The operand of a matmul that is a tangent, in which the matmul must be linear."""
        return next((i for i, value in enumerate(self.operands) if value.known.origin is Origin.TANGENT), None)

    @functools.cached_property
    def is_between_solutions(self) -> bool:
        """Whether a matmul takes a result of linear algebra to make an operand of linear algebra, as Kalman gains."""
        return self.op is OpClass.ALLOW and self.takes_solution and bool(self.want & SOLVED)

    @functools.cached_property
    def is_made_as_written(self) -> bool:
        """Whether all operands are made as written, such as random numbers, or are broadcast from something smaller."""
        origins = {value.known.origin for value in self.arrays}
        return Origin.AS_WRITTEN in origins and origins <= {Origin.AS_WRITTEN, Origin.REPEATED}

    @functools.cached_property
    def number(self) -> float | None:
        """The number that the result repeats, if it is known."""
        moves = _ops.moves_whole_arrays(self.name) or self.name == "convert_element_type"
        is_one_array = len(self.eqn.outvars) == 1 and is_eligible(self.eqn.outvars[0].aval)
        return (
            self.operands[0].known.number if moves and is_one_array and is_eligible(self.eqn.invars[0].aval) else None
        )

    @functools.cached_property
    def origin(self) -> Origin:
        """Where the results come from."""
        if self.tangent is not None:
            return Origin.TANGENT
        origins = {value.known.origin for value in self.arrays}
        of_whole = {value.known.origin for value in self.whole}
        if self.op is OpClass.AS_WRITTEN:
            if self.name in _ops.PRODUCTS:
                library = library_of(self.eqn)
                return Origin.SOLVED if library and library.is_algebra else Origin.COMPUTED
            return Origin.SOLVED if _ops.solves(self.name) else Origin.AS_WRITTEN
        if self.is_made_as_written:
            return Origin.AS_WRITTEN
        if _repeats_something_smaller(self.eqn, self.operands):
            return Origin.REPEATED
        if origins == {Origin.FOUND} and (_ops.moves_whole_arrays(self.name) or _ops.picks_values(self.name)):
            return Origin.FOUND
        if self.is_between_solutions or (self.op is OpClass.FOLLOW and origins and of_whole == {Origin.SOLVED}):
            return Origin.SOLVED
        if self.name in _ops.UPDATES and of_whole <= {Origin.INPUT, Origin.SCALED}:
            return Origin.SCALED
        is_cast = self.name == "convert_element_type"
        moves = is_cast or self.name in _ops.MOVES_PARTS or _ops.moves_whole_arrays(self.name)
        of_floats = {
            value.known.origin
            for v, value in zip(self.eqn.invars, self.operands, strict=True)
            if not is_literal(v) and jnp.issubdtype(getattr(v.aval, "dtype", np.void), jnp.floating)
        }
        is_moved = (moves or self.precision.mode == "off") and bool(of_floats) and of_floats <= OF_WEIGHTS
        return Origin.MOVED if is_moved else Origin.COMPUTED

    def known(self, tag: Tag) -> tuple[Known, ...]:
        """What is known of each result, those that were float32 with a tag."""
        return tuple(
            Known(tag if is_eligible(v.aval) else Tag.NEUTRAL, self.origin, self.number) for v in self.eqn.outvars
        )


def _is_float_array(atom: Atom) -> bool:
    return not is_literal(atom) and is_eligible(atom.aval)


def _is_repeated(value: Value, shape: Sequence[Any]) -> bool:
    """Whether an operand has fewer distinct values than the result, such as a mean, or a bias broadcast for an add."""
    own = value.array.shape
    is_small = not own or any(a == 1 != b for a, b in zip(own, shape, strict=False))
    return is_small or value.known.origin in (Origin.REPEATED, Origin.MOVED)


def _repeats_something_smaller(eqn: Equation, operands: Sequence[Value]) -> bool:
    name = eqn.primitive.name
    if name == "iota":
        return len(eqn.params["shape"]) > 1
    if _ops.adds_axes(eqn):
        source, result = eqn.invars[0], eqn.outvars[0]
        is_copy = operands[0].known.origin is Origin.REPEATED
        return is_copy or is_literal(source) or size(source.aval) != size(result.aval)
    return name in _ops.KEEPS_BROADCAST and all(
        is_literal(v) or value.known.origin is Origin.REPEATED or getattr(v.aval, "ndim", 1) == 0
        for v, value in zip(eqn.invars, operands, strict=True)
    )
