"""The optimized HLO text of a compiled XLA program as data: its computations, their lines, and the shapes on them."""

import dataclasses
import math
import re
from collections.abc import Iterator

LARGE_ELEMENTS = 1024
"""An array with at least this many elements is tensor data; below it is bookkeeping."""

_SIZES = {"pred": 1.0, "c64": 8.0, "c128": 16.0, "token": 0.0, "opaque": 0.0}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](\{[^}]*\})?")
_ASSIGNMENT = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+)\s*\(.*\{\s*$")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
        operands: Names of the lines that compute them.
        attributes: The text after the operands.
        position: Position of a parameter, from 0; -1 for any other line.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    position: int = -1

    def called(self, key: str) -> tuple[str, ...]:
        """Names of the computations given in attribute ``key``, in order; empty when it is absent."""
        found = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        if not found:
            return ()
        names = found.group(1) or found.group(2)
        return tuple(name.strip().lstrip("%") for name in names.split(","))


@dataclasses.dataclass(frozen=True)
class Module:
    """A parsed HLO module: its computations by name and the name of the entry."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    header: str


def element_bytes(dtype: str) -> float:
    """Bytes of one element of an HLO dtype name.

    >>> element_bytes("bf16"), element_bytes("f8e4m3fn"), element_bytes("pred"), element_bytes("s4")
    (2.0, 1.0, 1.0, 0.5)
    """
    if dtype in _SIZES:
        return _SIZES[dtype]
    bits = re.match(r"[a-z]+(\d+)", dtype)
    if bits is None:
        raise ValueError(f"unknown HLO dtype {dtype!r}")
    return int(bits.group(1)) / 8


def arrays(shape: str) -> Iterator[tuple[str, int, bool]]:
    """Yields (dtype, elements, on_chip) for every array in an HLO shape, tuples flattened.

    >>> list(arrays("(f32[2,3]{1,0}, bf16[8]{0:S(1)})"))
    [('f32', 6, False), ('bf16', 8, True)]
    """
    for dtype, dims, layout in _ARRAY.findall(shape):
        elements = math.prod(int(dim.lstrip("<=")) for dim in dims.split(",") if dim)
        yield dtype, elements, "S(1)" in layout


def shape_bytes(shape: str) -> float:
    """Bytes of the arrays of ``shape`` that lie in main memory."""
    return sum(element_bytes(dtype) * n for dtype, n, on_chip in arrays(shape) if not on_chip)


def shape_elements(shape: str) -> int:
    """Number of elements of all arrays in ``shape``."""
    return sum(elements for _, elements, _ in arrays(shape))


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses in HLO: {text[:120]!r}")


def _instruction(line: str) -> Instruction | None:
    assignment = _ASSIGNMENT.match(_COMMENT.sub("", line))
    if assignment is None:
        return None
    root, name, rest = assignment.groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    opcode = rest[:opening]
    position = int(inside) if opcode == "parameter" else -1
    return Instruction(name, shape, opcode, operands, rest[closing + 1 :], root is not None, position)


def parse(text: str) -> Module:
    """Parses the text of an optimized HLO module (``compiled.as_text()``).

    Raises:
        ValueError: The text holds no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry = ""
    current: list[Instruction] | None = None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = computations.setdefault(header.group(2), [])
                entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif instruction := _instruction(line):
            current.append(instruction)
    if not entry:
        raise ValueError("no ENTRY computation in this HLO text")
    frozen = {name: tuple(lines) for name, lines in computations.items()}
    return Module(frozen, entry, text.split("\n", 1)[0])


def aliased_fraction(module: Module) -> float:
    """Share of the bytes of the large outputs that are written into donated inputs, from 0 to 1."""
    root = next(line for line in module.computations[module.entry] if line.is_root)
    sizes = [
        element_bytes(dtype) * elements if elements >= LARGE_ELEMENTS else 0.0
        for dtype, elements, _ in arrays(root.shape)
    ]
    aliases = re.search(r"input_output_alias=\{(.*?)\}(?:, \w+=|$)", module.header)
    donated = re.findall(r"\{(\d*)\}: \(", aliases.group(1)) if aliases else []
    shared = sum(sizes[int(index or 0)] for index in donated)
    return shared / sum(sizes) if sum(sizes) else 1.0
