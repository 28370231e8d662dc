"""A program as a compiler sees it: arrays and their producers, without calls, duplicates or unused results."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jmp_lite._compat import Equation, Jaxpr, is_literal, program
from jmp_lite.autocast._programs import PROGRAMS, Body, programs_of
from jmp_lite.autocast._record import as_count

#: The same bytes under another shape, dtype or name.
_SAME_BYTES = frozenset(
    {
        *("reshape", "squeeze", "expand_dims", "stop_gradient", "name", "copy", "copy_p", "bitcast_convert_type"),
        *("pvary", "pcast", "sharding_constraint", "layout_constraint", "convert_element_type", "broadcast_in_dim"),
        *("optimization_barrier", "custom_lin", "reduce_precision"),
    }
)
#: Kinds of rows in the table of programs that a compiler writes into the program around them.
_INLINED = frozenset({"call", "rule", "map"})


class Array(NamedTuple):
    """An array of a program.

    Attributes:
        shape: Its sizes; a symbolic one counts as 1.
        width: Bytes of an element.
    """

    shape: tuple[int, ...]
    width: float

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Of the whole array."""
        return self.elements * self.width


class Node(NamedTuple):
    """An operation that makes arrays from others.

    Attributes:
        primitive: Its name.
        eqn: The equation.
        operands: Numbers of arrays, without literals.
        results: Numbers of arrays.
        bodies: Programs that it runs: branches, or the body of a loop.
        trips: How often it runs these.
        fills: Whether its first operand is filled with one number.
    """

    primitive: str
    eqn: Equation
    operands: tuple[int, ...]
    results: tuple[int, ...]
    bodies: tuple["Dataflow", ...] = ()
    trips: int = 1
    fills: bool = False


@dataclasses.dataclass(frozen=True)
class Dataflow:
    """A program in the order of its nodes.

    Attributes:
        arrays: Arrays by number.
        nodes: Nodes with used results.
        inputs: Numbers of its input arrays.
        outputs: Numbers of its output arrays.
    """

    arrays: Sequence[Array]
    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def dataflow(jaxpr: Jaxpr) -> Dataflow:
    """Returns a program without calls, duplicate equations and unused results."""
    return _Builder().built(jaxpr)


class _Builder:
    """State while a program is converted."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self.nodes: list[Node] = []
        self.known: dict[Any, tuple[int, ...]] = {}
        self.regions = itertools.count(1)
        self.filled: set[int] = set()

    def built(self, jaxpr: Jaxpr) -> Dataflow:
        inner, _ = program(jaxpr)
        inputs = tuple(self.new(v.aval) for v in (*inner.constvars, *inner.invars))
        env: dict[Any, int | None] = dict(zip((*inner.constvars, *inner.invars), inputs, strict=True))
        outputs = self.inlined(inner, env, 0)
        used = {index for index in outputs if index is not None}
        kept = []
        for node in reversed(self.nodes):
            if used & set(node.results) or getattr(node.eqn, "effects", None):
                kept.append(node)
                used |= set(node.operands)
        returned = tuple(index for index in outputs if index is not None)
        return Dataflow(self.arrays, tuple(reversed(kept)), inputs, returned)

    def new(self, aval: Any) -> int:
        shape = tuple(map(as_count, getattr(aval, "shape", ())))
        self.arrays.append(Array(shape, _width(getattr(aval, "dtype", None))))
        return len(self.arrays) - 1

    def inlined(self, inner: Jaxpr, env: dict[Any, int | None], region: int) -> list[int | None]:
        """Converts equations; returns the numbers of the results, ``None`` for a literal."""

        def read(atom: Any) -> int | None:
            return None if is_literal(atom) else env[atom]

        for eqn in inner.eqns:
            operands = [read(atom) for atom in eqn.invars]
            row = PROGRAMS.get(eqn.primitive.name)
            if row is not None and row.kind in _INLINED:
                [body] = programs_of(eqn).bodies
                again = next(self.regions) if eqn.params.get("prevent_cse") else region
                results = self.body(body, operands, again)
            else:
                results = list(self.results(eqn, operands, region))
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in inner.outvars]

    def body(self, body: Body, operands: list[int | None], region: int) -> list[int | None]:
        inner, _ = program(body.jaxpr)
        env = {v: operands[at] for v, at in zip(inner.invars, body.operands, strict=True)}
        env |= {v: self.new(v.aval) for v in inner.constvars}
        return self.inlined(inner, env, region)

    def results(self, eqn: Equation, operands: list[int | None], region: int) -> tuple[int, ...]:
        name = eqn.primitive.name
        if operands and operands[0] is not None and _is_same(eqn):
            return (operands[0],)
        literals = tuple(repr(atom) if is_literal(atom) else None for atom in eqn.invars)
        bodies = tuple(_Builder().built(body.jaxpr) for body in programs_of(eqn).bodies)
        key = (region, name, tuple(operands), literals, str(eqn.params)) if not bodies else None
        if key is not None and key in self.known and not getattr(eqn, "effects", None):
            return self.known[key]
        results = tuple(self.new(v.aval) for v in eqn.outvars)
        trips = as_count(eqn.params.get("length", 1)) if name == "scan" else 1
        given = tuple(index for index in operands if index is not None)
        self.nodes.append(Node(name, eqn, given, results, bodies, trips, bool(given) and given[0] in self.filled))
        if not given and name in ("broadcast_in_dim", "empty"):
            self.filled.update(results)
        if key is not None:
            self.known[key] = results
        return results


def _is_same(eqn: Equation) -> bool:
    """Whether the result has the bytes of the operand."""
    name, before = eqn.primitive.name, eqn.invars[0].aval
    if name not in _SAME_BYTES or len(eqn.outvars) != 1:
        return False
    after = eqn.outvars[0].aval
    if name == "convert_element_type" and before.dtype != after.dtype:
        return False
    return _bytes(before) == _bytes(after)


def _bytes(aval: Any) -> float:
    return math.prod(map(as_count, aval.shape)) * _width(aval.dtype)


def _width(dtype: Any) -> float:
    """Returns the bytes of an element: 0.5 for 4 bits."""
    name, size = str(dtype), getattr(dtype, "itemsize", 0)
    return 0.5 if "int4" in name or "float4" in name else float(size)


def flattened(flow: Dataflow, trips: int = 1) -> Iterator[tuple[Node, int]]:
    """Yields all nodes and how often they run."""
    for node in flow.nodes:
        yield node, trips
        for body in node.bodies:
            yield from flattened(body, trips * node.trips)
