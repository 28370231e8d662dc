"""The collectives of a compiled program, read from its optimized HLO text: how much travels, and in which dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jmp_lite.analysis._estimation._compiled import _hlo

_OPCODES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One array that one collective carries.

    Attributes:
      opcode: such as "all-gather".
      dtype: HLO name of what travels.
      elements: of the whole array: gathered, or before it is scattered.
    """

    opcode: str
    dtype: str
    elements: int

    @property
    def bytes(self) -> float:
        """Bytes of the whole array."""
        return self.elements * _hlo.element_bytes(self.dtype)


def collectives(module: _hlo.Module, devices: int) -> list[Collective]:
    """Lists the collectives of a program for so many devices, each once."""
    return [found for name in module.computations for found in _of_computation(module, name, devices)]


def _of_computation(module: _hlo.Module, name: str, devices: int) -> Iterator[Collective]:
    instructions = module.computations[name]
    # A TPU carries on with one collective in several fusions; the first of them starts it.
    starts = any('"AsyncCollectiveStart"' in instruction.attributes for instruction in instructions)
    for instruction in instructions:
        opcode = instruction.opcode.removesuffix("-start")
        if opcode not in _OPCODES or ("chain_id=" in instruction.attributes and not starts):
            continue
        held = [(dtype, elements) for dtype, elements, _ in _hlo.arrays(instruction.shape)]
        if instruction.shape.startswith("((") or instruction.opcode == "all-gather-start":  # operands and results
            held = held[len(held) // 2 :]
        scattered = opcode == "reduce-scatter"
        # On a TPU, the sum and the split of a reduce-scatter are two instructions of one fusion.
        is_fused = name.startswith("all-reduce-scatter")
        for dtype, elements in held:
            whole = elements * devices if scattered else elements
            yield Collective("reduce-scatter" if is_fused else opcode, dtype, whole)
