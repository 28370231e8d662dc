"""The dataflow of a program as one graph, bodies of loops and calls included.

A value inside a body stands for the values passed in: the operand of the loop, and the result of its body in
the iteration before. So one search, backward or forward, goes through ``jit``, ``scan``, ``cond`` and derivative rules.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import Equation, Jaxpr, is_literal, program
from jmp_lite.analysis._sites import Site, Step, steps_of
from jmp_lite.autocast import _ops
from jmp_lite.autocast._programs import programs_of
from jmp_lite.autocast._record import as_count

#: Number of a value in the graph.
Value = int
#: Whether a search continues, at an equation, between one of its operands and its results.
Through = Callable[["Node", int], bool]

#: Larger constants are not looked at.
_LARGEST = 1 << 16
#: Primitives that move values: those of the first operand, or of any.
_AT_FIRST = frozenset({"dynamic_slice", "gather", "pad"})
_ANYWHERE = frozenset(
    {
        *("concatenate", "stack", "convert_element_type", "split", "unstack", "name", "tile", "optimization_barrier"),
        *("device_put", "reduce_precision"),
    }
)


class Node(NamedTuple):
    """An equation that holds no program."""

    site: Site
    eqn: Equation
    operands: tuple[Value, ...]
    results: tuple[Value, ...]

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return self.site.primitive


class Number(NamedTuple):
    """The number that fills a value."""

    written: float
    """As it stands in the program."""
    held: float
    """Rounded to the dtypes that it was cast to since."""


class Flow:
    """A program as a graph of values and of the equations that make and use them."""

    def __init__(self, jaxpr: Jaxpr) -> None:
        self.nodes: list[Node] = []
        self.avals: list[Any] = []
        self.constants: dict[Value, Any] = {}
        """Literals and small arrays that the program closed over."""
        self.carries: list[tuple[Value, Value]] = []
        """Of loops: the value inside the body, and what the body makes of it."""
        self._sources: dict[Value, list[Value]] = {}
        self._targets: dict[Value, list[Value]] = {}
        self._made_by: dict[Value, Node] = {}
        self._used_by: dict[Value, list[Node]] = {}
        inner, _ = program(jaxpr)
        self.steps = steps_of(jaxpr)
        self.inputs = [self._value(v.aval) for v in inner.invars]
        self._needed: list[Value] = []
        self._needed += self._add(jaxpr, self.steps, self.inputs)
        self._drop_unused()

    # --- Building ---

    def _value(self, aval: Any) -> Value:
        self.avals.append(aval)
        return len(self.avals) - 1

    def _join(self, source: Value, target: Value) -> None:
        self._sources.setdefault(target, []).append(source)
        self._targets.setdefault(source, []).append(target)

    def _add(self, jaxpr: Jaxpr, steps: Sequence[Step], arguments: Sequence[Value]) -> list[Value]:
        inner, consts = program(jaxpr)
        values: dict[Any, Value] = dict(zip(inner.invars, arguments, strict=True))
        for v, const in zip(inner.constvars, consts, strict=False):
            values[v] = self._value(v.aval)
            if getattr(const, "size", _LARGEST) < _LARGEST and not isinstance(const, jax.core.Tracer):
                self.constants[values[v]] = const

        def read(atom: Any) -> Value:
            if not is_literal(atom):
                if atom not in values:
                    values[atom] = self._value(atom.aval)
                return values[atom]
            literal = self._value(atom.aval)
            self.constants[literal] = atom.val
            return literal

        for step in steps:
            operands = [read(atom) for atom in step.eqn.invars]
            results = [self._value(v.aval) for v in step.eqn.outvars]
            values.update(zip(step.eqn.outvars, results, strict=True))
            self._add_step(step, operands, results)
        return [read(atom) for atom in inner.outvars]

    def _add_step(self, step: Step, operands: list[Value], results: list[Value]) -> None:
        programs = programs_of(step.eqn)
        for body, steps in zip(programs.bodies, step.bodies, strict=True):
            inside = [self._value(v.aval) for v in program(body.jaxpr)[0].invars]
            for value, operand in zip(inside, body.operands, strict=True):
                self._join(operands[operand], value)
            outcome = self._add(body.jaxpr, steps, inside)
            self._needed += outcome if body.results is None else []
            for value, result in zip(outcome, body.results or (), strict=False):
                self._join(value, results[result])
                for operand, carried in programs.carried.items():
                    if carried == result:
                        before = inside[body.operands.index(operand)]
                        self._join(value, before)
                        self.carries.append((before, value))
        if programs.choice is not None:
            self._needed.append(operands[programs.choice])
        if not programs.bodies:
            node = Node(step.site, step.eqn, tuple(operands), tuple(results))
            self.nodes.append(node)
            self._made_by.update(dict.fromkeys(results, node))
            self._needed += operands if step.eqn.effects else []

    def _drop_unused(self) -> None:
        """Drops equations with unused results, such as unused derivatives."""
        queue, used = list(self._needed), set(self._needed)
        for value in queue:
            made = self._made_by.get(value)
            new = [v for v in (*self._sources.get(value, ()), *(made.operands if made else ())) if v not in used]
            used.update(new)
            queue += new
        self.nodes = [node for node in self.nodes if node.eqn.effects or used & set(node.results)]
        for node in self.nodes:
            for operand in dict.fromkeys(node.operands):
                self._used_by.setdefault(operand, []).append(node)

    # --- Asking ---

    def dtype(self, value: Value) -> str:
        """Returns the name of the dtype of a value; empty if it has none."""
        return str(getattr(self.avals[value], "dtype", ""))

    def size(self, value: Value) -> int:
        """Returns the number of elements; a symbolic size counts as 1."""
        return int(math.prod([as_count(size) for size in getattr(self.avals[value], "shape", ())]))

    def roots(self, value: Value) -> tuple[Value, ...]:
        """Returns the values, outside of bodies or made inside, that a value can stand for."""
        return tuple(found for found in _reached(value, self._sources) if found not in self._sources)

    def producers(self, value: Value) -> list[Node]:
        """Returns the equations that make a value."""
        return [self._made_by[root] for root in self.roots(value) if root in self._made_by]

    def consumers(self, value: Value) -> list[tuple[Node, int]]:
        """Returns the equations that use a value, each with the position of the operand."""
        found = [(node, v) for v in _reached(value, self._targets) for node in self._used_by.get(v, ())]
        return [(node, i) for node, v in found for i, operand in enumerate(node.operands) if operand == v]

    def backward(
        self, value: Value, through: Through, stop: Value | None = None
    ) -> Iterator[tuple[Value, Node | None]]:
        """Yields the values that a value is computed from, nearest first, each with the equation that makes it.

        Args:
            value: Where to start.
            through: Where to continue.
            stop: A value inside a body whose origin is not searched.
        """
        queue, seen = [value], {value}
        for v in queue:
            sources = self._sources.get(v, ()) if v != stop else ()
            node = None if v == stop else self._made_by.get(v)
            if not sources:
                yield v, node
            operands = [x for i, x in enumerate(node.operands) if through(node, i)] if node else []
            new = [x for x in dict.fromkeys([*sources, *operands]) if x not in seen]
            seen.update(new)
            queue += new

    def is_from(self, value: Value, stop: Value, through: Through) -> bool:
        """Whether a value is computed from another, which may be inside a body."""
        return any(v == stop for v, _ in self.backward(value, through, stop))

    def forward(self, value: Value, through: Through) -> Iterator[tuple[Node, int]]:
        """Yields the equations that a value reaches, nearest first, each with the position of the operand."""
        queue, seen = self.consumers(value), set[tuple[int, int]]()
        for node, position in queue:
            if (node.site.number, position) not in seen:
                seen.add((node.site.number, position))
                yield node, position
                if through(node, position):
                    queue += [use for result in node.results for use in self.consumers(result)]

    def number(self, value: Value) -> Number | None:
        """Returns the number that fills a value, if the program tells."""
        roots = self.roots(value)
        if len(roots) != 1:
            return None
        root, node = roots[0], self._made_by.get(roots[0])
        if node is None:
            return _uniform(self.constants.get(root), self.dtype(root))
        if moves(node, 0) and node.operands and (found := self.number(node.operands[0])):
            others = [operand for i, operand in enumerate(node.operands) if i and moves(node, i)]
            if all(self.number(other) == found for other in others):
                return found._replace(held=rounded(found.held, self.dtype(root)))
        return None


def moves(node: Node, position: int) -> bool:
    """Whether an operand comes back unchanged, moved or cast."""
    if node.name in _AT_FIRST:
        return position == 0
    if node.name == "select_n":
        return position > 0
    if node.name in _ANYWHERE:
        return True
    return _ops.moves_whole_arrays(node.name)


def rounded(number: float, dtype: str) -> float:
    """Returns a number as a dtype holds it; infinity beyond its maximum."""
    with np.errstate(all="ignore"):
        return float(np.asarray(number).astype(jnp.dtype(dtype)))


def _uniform(array: Any, dtype: str) -> Number | None:
    if array is None or not any(kind in dtype for kind in ("float", "int", "bool")):
        return None
    numbers = np.asarray(array).astype(np.float64).ravel()
    if numbers.size == 0 or not (numbers == numbers[0]).all():
        return None
    return Number(float(numbers[0]), rounded(numbers[0], dtype))


def _reached(value: Value, edges: dict[Value, list[Value]]) -> list[Value]:
    queue, seen = [value], {value}
    for found in queue:
        new = [v for v in dict.fromkeys(edges.get(found, ())) if v not in seen]
        seen.update(new)
        queue += new
    return queue
