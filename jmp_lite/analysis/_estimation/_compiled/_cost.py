"""Counts the bytes and launches of a compiled XLA program from its optimized HLO text.

XLA's own ``cost_analysis`` is absent when compiling for a GPU that is not there, and does not say
which launches copy, so the figures are counted here, by the same rules for CPU, GPU and TPU:

* every instruction that becomes a launch (fusion, custom call, copy, reduction, ...) costs the bytes
  that it reads of its operands and writes of its result: slices, rows and updates, not whole arrays;
* parameters, constants, tuples, bitcasts and the waiting half of an asynchronous pair are free, and
  so is the workspace of a library;
* ``call``, ``while`` and asynchronous wrappers are entered; the body of a loop counts as often as it
  runs, or once where XLA does not know;
* a conditional costs its most expensive branch; its cheapest branch gives the cost of a skipped step;
* an asynchronous transfer is not a launch;
* arrays that live in a TPU's on-chip memory are free.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jmp_lite.analysis._estimation._compiled import _hlo, _touched
from jmp_lite.analysis._estimation._compiled._hlo import Instruction, Module

_FREE = frozenset(
    {
        *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast"),
        *("after-all", "add-dependency", "optimization-barrier", "opt-barrier", "domain"),
        *("partition-id", "replica-id"),
    }
)
_CONCAT_BITCAST = 'custom_call_target="ConcatBitcast"'
_TRANSFERS = {"copy-start": 0, "slice-start": 1, "dynamic-slice-start": 1}
"""Asynchronous transfers, and where in their result the written array stands."""
_WRAPPERS = frozenset(["call", "while", "async-start"])
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one run of a program.

    Attributes:
        bytes: Bytes read and written by all launches, taking the most expensive branch of each conditional.
        skipped_bytes: The same, taking the cheapest branch.
        launches: Number of launches.
        large_launches: Launches that touch an array of at least ``LARGE_ELEMENTS`` elements.
        copies: Launches that only copy such an array.
        conditionals: Conditionals executed.
    """

    bytes: float = 0.0
    skipped_bytes: float = 0.0
    launches: int = 0
    large_launches: int = 0
    copies: int = 0
    conditionals: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        fields = (field.name for field in dataclasses.fields(Cost))
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in fields})

    def times(self, count: int) -> "Cost":
        """Returns the cost of several runs."""
        return Cost(**{name: count * value for name, value in dataclasses.asdict(self).items()})


def cost(module: Module) -> Cost:
    """Counts bytes, launches and copies of one run of the module's entry computation."""
    return _computation_cost(module, module.entry)


def _shapes(instructions: tuple[Instruction, ...]) -> dict[str, str]:
    return {instruction.name: instruction.shape for instruction in instructions}


def _computation_cost(module: Module, name: str) -> Cost:
    instructions = module.computations[name]
    shapes = _shapes(instructions)
    total = Cost()
    for instruction in instructions:
        total += _instruction_cost(module, instruction, shapes)
    return total


def _is_free(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    is_wait = opcode.endswith(("-done", "-update"))
    return opcode in _FREE or is_wait or _CONCAT_BITCAST in instruction.attributes


def _inner(instruction: Instruction) -> tuple[str, int] | None:
    """The computation that a wrapper runs, and its number of runs."""
    for key in ("body", "to_apply", "calls") if instruction.opcode in _WRAPPERS else ():
        if bodies := instruction.called(key):
            trips = _TRIPS.search(instruction.attributes)
            return bodies[0], int(trips.group(1)) if trips else 1
    return None


def _instruction_cost(module: Module, instruction: Instruction, shapes: Mapping[str, str]) -> Cost:
    if _is_free(instruction):
        return Cost()
    opcode = instruction.opcode
    if opcode == "conditional":
        return _conditional_cost(module, instruction)
    if inner := _inner(instruction):
        name, trips = inner
        return _computation_cost(module, name).times(trips)
    if opcode in _TRANSFERS:
        return _transfer_cost(opcode, instruction.shape, shapes.get(instruction.operands[0], ""))
    parts = _touched.touched(module, instruction, shapes)
    moved = sum(part.bytes for part in parts)
    is_large = max((part.elements for part in parts), default=0) >= _hlo.LARGE_ELEMENTS
    is_copy = is_large and _only_copies(module, instruction)
    return Cost(moved, moved, 1, int(is_large), int(is_copy))


def _branches(instruction: Instruction) -> tuple[str, ...]:
    """The computations of a conditional."""
    either = (*instruction.called("true_computation"), *instruction.called("false_computation"))
    return instruction.called("branch_computations") or either


def _conditional_cost(module: Module, instruction: Instruction) -> Cost:
    branches = [_computation_cost(module, name) for name in _branches(instruction)]
    largest = max(branches, key=lambda branch: branch.bytes)
    skipped = min(branch.skipped_bytes for branch in branches)
    return dataclasses.replace(largest, skipped_bytes=skipped, conditionals=largest.conditionals + 1)


def _transfer_cost(opcode: str, shape: str, source: str) -> Cost:
    """An asynchronous copy or slice; one that moves data to or from on-chip memory is not an extra copy."""
    written = list(_hlo.arrays(shape))[_TRANSFERS[opcode]]
    dtype, elements, on_chip = written
    off_chip = (not on_chip) + (not next(_hlo.arrays(source))[2])
    moved = _hlo.element_bytes(dtype) * elements * off_chip
    is_copy = opcode == "copy-start" and off_chip == 2 and elements >= _hlo.LARGE_ELEMENTS
    return Cost(moved, moved, 0, 0, int(is_copy))


def _only_copies(module: Module, instruction: Instruction) -> bool:
    """Whether a launch only copies."""
    if instruction.opcode != "fusion":
        return instruction.opcode == "copy"
    inner = module.computations.get((instruction.called("calls") or ("",))[0], ())
    work = [inside.opcode for inside in inner if inside.opcode not in _FREE]
    return bool(work) and all(opcode == "copy" for opcode in work)


class Launch(NamedTuple):
    """An instruction that becomes a launch, and the bytes of all its runs.

    Attributes:
        instruction: Its line.
        times: How often it runs.
        bytes: Bytes read and written by all its runs.
    """

    instruction: Instruction
    times: int
    bytes: float


def launches(module: Module, name: str | None = None, times: int = 1) -> Iterator[Launch]:
    """All launches of a program, including every branch of a conditional."""
    instructions = module.computations[name or module.entry]
    shapes = _shapes(instructions)
    for instruction in instructions:
        if inner := _inner(instruction):
            yield from launches(module, inner[0], times * inner[1])
        elif instruction.opcode == "conditional":
            for branch in _branches(instruction):
                yield from launches(module, branch, times)
        elif not _is_free(instruction):
            moved = _instruction_cost(module, instruction, shapes).bytes
            yield Launch(instruction, times, times * moved)
