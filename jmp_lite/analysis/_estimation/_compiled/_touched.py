"""The parts of its arrays that a launch of a compiled XLA program reads and writes.

A launch computes only what its results need: from an array that it slices or gathers from, it reads only those slices
and rows; in an array that it updates in place, it touches only the updated part. This looks inside fusions.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jmp_lite.analysis._estimation._compiled import _hlo
from jmp_lite.analysis._estimation._compiled._hlo import Instruction

_SEEN_THROUGH = frozenset({"bitcast", "get-tuple-element"})
_UPDATES = frozenset({"dynamic-update-slice", "scatter"})
_POINTWISE = frozenset(
    {
        *("slice", "dynamic-slice", "gather", "dynamic-update-slice", "concatenate", "pad", "reverse", "broadcast"),
        *("bitcast", "copy", "reshape", "transpose", "convert", "select", "compare", "clamp", "and", "or", "not"),
        *("add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "negate", "abs", "sign"),
        *("exponential", "log", "tanh", "logistic", "rsqrt", "sqrt", "is-finite", "floor", "sine", "cosine"),
    }
)
"""Opcodes of which one element of the result takes at most one element of each operand."""
_FUSIONS = frozenset({"fusion", "fusion-start"})
_LIBRARY = 'custom_call_target="__cu'
_SCRATCH = frozenset({"s8", "u8"})


class Part(NamedTuple):
    """Elements and bytes of one array that a launch touches; no bytes if the array is in on-chip memory."""

    elements: float
    bytes: float


def touched(module: _hlo.Module, launch: Instruction, shapes: Mapping[str, str]) -> list[Part]:
    """Returns what a launch reads and writes.

    Args:
        module: The module that holds the computations of fusions.
        launch: An instruction that is not free and calls only fused programs.
        shapes: Shapes of the lines of its computation, by name.
    """
    seen = _Launch.of(module, launch, shapes)
    return [*seen.read(), *seen.written()]


@dataclasses.dataclass(frozen=True)
class _Launch:
    """A launch as lines in order; the last ones are its results.

    Attributes:
        lines: Lines of a fusion, nested ones included; any other launch is one line.
        arguments: Names of the arrays from outside.
        shapes: Shapes of both.
        root: Name of the line that is the result.
    """

    lines: Mapping[str, Instruction]
    arguments: tuple[str, ...]
    shapes: Mapping[str, str]
    root: str

    @classmethod
    def of(cls, module: _hlo.Module, launch: Instruction, shapes: Mapping[str, str]) -> "_Launch":
        """See ``touched``."""
        lines = {line.name: line for line in _expanded(module, launch)}
        held = {name: line.shape for name, line in lines.items()}
        if launch.opcode == "fusion":
            held[launch.name] = launch.shape  # says what lies on the chip
        arguments = tuple(dict.fromkeys(launch.operands))
        return cls(lines, arguments, held | {name: shapes.get(name, "") for name in arguments}, launch.name)

    def origin(self, name: str) -> str:
        """The line that computed an array."""
        while name in self.lines and self.lines[name].opcode in _SEEN_THROUGH:
            name = self.lines[name].operands[0]
        return name

    def updated(self, name: str) -> float:
        """Elements that a line writes into an argument in place; 0 if it writes its own array."""
        line = self.lines.get(name)
        if line is None or line.opcode not in _UPDATES or self.origin(line.operands[0]) not in self.arguments:
            return 0
        # A scatter names its arrays, then where to, then as many arrays of updates.
        update = 1 if line.opcode == "dynamic-update-slice" else len(line.operands) // 2 + 1
        return _hlo.shape_elements(self.shapes[line.operands[update]])

    def outputs(self) -> list[str]:
        """The lines that computed the arrays of the result."""
        root = self.lines[self.origin(self.root)]
        if root.opcode == "tuple":
            return [self.origin(operand) for operand in root.operands]
        return [root.name] * sum(1 for _ in _hlo.arrays(self.shapes[self.root]))

    def written(self) -> Iterator[Part]:
        """The arrays of the result, without the workspace of a library."""
        arrays = zip(_hlo.arrays(self.shapes[self.root]), self.outputs(), strict=True)
        for index, ((dtype, elements, on_chip), line) in enumerate(arrays):
            is_library = line in self.lines and _LIBRARY in self.lines[line].attributes
            if not (is_library and index and dtype in _SCRATCH):
                count = self.updated(line) or elements
                yield Part(count, 0 if on_chip else count * _hlo.element_bytes(dtype))

    def read(self) -> Iterator[Part]:
        """The arrays from outside."""
        wanted = collections.defaultdict[str, float](float, {self.root: math.inf})
        results = set(self.outputs())
        for name, line in reversed(list(self.lines.items())):
            amount = min(wanted[name], _hlo.shape_elements(line.shape))
            updated = self.updated(name) if name in results else 0
            for operand, needed in zip(line.operands, _needed(line, amount, updated), strict=True):
                wanted[operand] += needed
        for name in self.arguments:
            elements = _hlo.shape_elements(self.shapes[name])
            share = min(1, wanted[name] / elements) if elements else 0
            yield Part(elements * share, _hlo.shape_bytes(self.shapes[name]) * share)


def _needed(line: Instruction, amount: float, updated: float) -> list[float]:
    """How many elements of each operand a line reads to compute this many, or to update this many in place."""
    count = len(line.operands)
    if not amount:
        return [0] * count
    if not updated:
        return [amount if line.opcode in _POINTWISE else math.inf] * count
    if line.opcode == "dynamic-update-slice":
        return [0, *[math.inf] * (count - 1)]
    return [*[updated] * (count // 2), *[math.inf] * (count - count // 2)]


def _expanded(module: _hlo.Module, line: Instruction) -> Iterator[Instruction]:
    """A fusion as the lines of its computation, in terms of its operands; any other line unchanged."""
    names = line.called("calls") if line.opcode in _FUSIONS else ()
    if not names:
        yield line
        return
    inside = {}
    for inner in module.computations[names[0]]:
        if inner.opcode == "parameter":
            inside[inner.name] = line.operands[inner.position]
            continue
        inside[inner.name] = line.name if inner.is_root else f"{line.name}/{inner.name}"
        operands = tuple(inside[operand] for operand in inner.operands)
        yield from _expanded(module, dataclasses.replace(inner, name=inside[inner.name], operands=operands))
