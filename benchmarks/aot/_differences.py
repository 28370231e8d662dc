"""Which launches one compiled program has and another has not: where its bytes go."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from benchmarks import _cost, _hlo

_LAYOUT = re.compile(r"\{[^}]*\}")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_LIBRARY = re.compile(r'custom_call_target="([^"]*)"')


class Seen(NamedTuple):
    """A launch by what it does; where in the source it comes from is no part of that.

    Attributes:
      times: how often it runs.
      kind: its opcode, or the library's name for it.
      result: its shape without layouts.
      megabytes: that all its runs move, to a tenth.
    """

    times: int
    kind: str
    result: str
    megabytes: float


Launches = list[tuple[Seen, str]]
"""With the shapes of the operands and the place in the source."""


def launches(module: _hlo.Module) -> Launches:
    """All launches of a program, the dearest first."""
    lines = (line for computation in module.computations.values() for line in computation)
    shapes = {line.name: _LAYOUT.sub("", line.shape) for line in lines}
    found = []
    for launch in sorted(_cost.launches(module), key=lambda launch: -launch.bytes):
        line = launch.instruction
        library, source = _LIBRARY.search(line.attributes), _SOURCE.search(line.attributes)
        kind = library.group(1) if library else line.opcode.removesuffix("-start")
        operands = ", ".join(shapes.get(operand, "?") for operand in line.operands)
        seen = Seen(launch.times, kind, shapes[line.name], round(launch.bytes / 1e6, 1))
        found.append((seen, f"({operands}) {source.group(1) if source else ''}"))
    return found


def text(title: str, one: Launches, other: Launches, limit: int) -> str:
    """The dearest launches of one program that the other does not have as often."""
    left = Counter(seen for seen, _ in one) - Counter(seen for seen, _ in other)
    total = sum(seen.megabytes * count for seen, count in left.items())
    lines = [f"### {title}: {total:.0f} MB in {left.total()} launches of its own\n"]
    for seen, details in one:
        if left[seen] and len(lines) <= limit:
            left[seen] -= 1
            lines.append(f"- {seen.megabytes:.1f} MB, {seen.times}x {seen.kind} {seen.result} of {details}")
    return "\n".join(lines)
