"""What a compiled XLA program moves and launches, read from its optimised HLO text.

XLA's own `cost_analysis` is absent when compiling for a GPU that is not there, and does not say
which launches copy, so the figures are counted here, by the same rules for CPU, GPU and TPU:

* every instruction that becomes a launch (fusion, custom call, copy, reduction, ...) costs the bytes
  of its operands plus the bytes of its result;
* parameters, constants, tuples, bitcasts and the waiting half of an asynchronous pair are free;
* `call`, `while` (its body, once) and asynchronous wrappers are looked into;
* a conditional costs its dearest branch; its cheapest branch gives the cost of the step not taken;
* a slice costs the part it takes, read and written; an asynchronous transfer is not a launch;
* arrays that live in a TPU's on-chip memory are free.
"""

from __future__ import annotations

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
_FREE = frozenset(
    {
        *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast"),
        *("after-all", "add-dependency", "optimization-barrier", "opt-barrier", "domain"),
        *("partition-id", "replica-id"),
    }
)
_CONCAT_BITCAST = 'custom_call_target="ConcatBitcast"'
_SLICES = frozenset({"slice", "dynamic-slice"})
_TRANSFERS = {"copy-start": 0, "slice-start": 1, "dynamic-slice-start": 1}
"""Asynchronous transfers, and where in their result the written array stands."""
_WRAPPERS = frozenset(["call", "while", "async-start"])


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, key: str) -> tuple[str, ...]:
        """Names of the computations given in attribute `key`, in order; empty when it is absent."""
        found = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        if not found:
            return ()
        names = found.group(1) or found.group(2)
        return tuple(name.strip().lstrip("%") for name in names.split(","))


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one run of a program does.

    Attributes:
      bytes: bytes read and written by all launches, taking the dearest branch of each conditional.
      skipped_bytes: the same, taking the cheapest branch.
      launches: number of launches.
      large_launches: launches that touch an array of at least `LARGE_ELEMENTS` elements.
      copies: launches that only copy such an array.
      copied_bytes: bytes read and written by these copies.
      conditionals: conditionals executed.
    """

    bytes: float = 0.0
    skipped_bytes: float = 0.0
    launches: int = 0
    large_launches: int = 0
    copies: int = 0
    copied_bytes: float = 0.0
    conditionals: int = 0

    def __add__(self, other: Cost) -> Cost:
        fields = (field.name for field in dataclasses.fields(Cost))
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in fields})


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
    """Bytes of the arrays of `shape` that lie in main memory."""
    return sum(element_bytes(dtype) * n for dtype, n, on_chip in arrays(shape) if not on_chip)


def largest(shape: str) -> int:
    """Number of elements of the largest array in `shape`; 0 if there is none."""
    return max((elements for _, elements, _ in arrays(shape)), default=0)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
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
    return Instruction(name, shape, rest[:opening], operands, rest[closing + 1 :], root is not None)


def parse(text: str) -> Module:
    """Parses the text of an optimised HLO module (`compiled.as_text()`).

    Raises:
      ValueError: the text holds no entry computation.
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


def cost(module: Module) -> Cost:
    """Counts bytes, launches and copies of one run of the module's entry computation."""
    return _computation_cost(module, module.entry)


def _computation_cost(module: Module, name: str) -> Cost:
    instructions = module.computations[name]
    shapes = {instruction.name: instruction.shape for instruction in instructions}
    total = Cost()
    for instruction in instructions:
        total += _instruction_cost(module, instruction, shapes)
    return total


def _instruction_cost(module: Module, instruction: Instruction, shapes: dict[str, str]) -> Cost:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or _CONCAT_BITCAST in instruction.attributes:
        return Cost()
    if opcode == "conditional":
        return _conditional_cost(module, instruction)
    if opcode in _WRAPPERS:
        for key in ("body", "to_apply", "calls"):
            if bodies := instruction.called(key):
                return _computation_cost(module, bodies[0])
    shape = instruction.shape
    touched = [shapes.get(operand, "") for operand in instruction.operands]
    if opcode in _TRANSFERS:
        return _transfer_cost(opcode, shape, touched[0])
    if opcode in _SLICES:
        touched = [shape]
    moved = shape_bytes(shape) + sum(map(shape_bytes, touched))
    is_large = max(map(largest, [shape, *touched])) >= LARGE_ELEMENTS
    is_copy = is_large and _only_copies(module, instruction)
    return Cost(moved, moved, 1, int(is_large), int(is_copy), moved * is_copy)


def _conditional_cost(module: Module, instruction: Instruction) -> Cost:
    names = instruction.called("branch_computations") or (
        *instruction.called("true_computation"),
        *instruction.called("false_computation"),
    )
    branches = [_computation_cost(module, name) for name in names]
    dearest = max(branches, key=lambda branch: branch.bytes)
    skipped = min(branch.skipped_bytes for branch in branches)
    return dataclasses.replace(dearest, skipped_bytes=skipped, conditionals=dearest.conditionals + 1)


def _transfer_cost(opcode: str, shape: str, source: str) -> Cost:
    """An asynchronous copy or slice; one that moves data to or from on-chip memory is no extra copy."""
    written = list(arrays(shape))[_TRANSFERS[opcode]]
    dtype, elements, on_chip = written
    off_chip = (not on_chip) + (not next(arrays(source))[2])
    moved = element_bytes(dtype) * elements * off_chip
    is_copy = opcode == "copy-start" and off_chip == 2 and elements >= LARGE_ELEMENTS
    return Cost(moved, moved, 0, 0, int(is_copy), moved * is_copy)


def _only_copies(module: Module, instruction: Instruction) -> bool:
    """Whether a launch does nothing but copy."""
    if instruction.opcode != "fusion":
        return instruction.opcode == "copy"
    inner = module.computations.get((instruction.called("calls") or ("",))[0], ())
    work = [inside.opcode for inside in inner if inside.opcode not in _FREE]
    return bool(work) and all(opcode == "copy" for opcode in work)


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
