"""Which launches one compiled program has and another has not: where its bytes go."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePath
from typing import NamedTuple

from jmp_lite.analysis._estimation._compiled import _cost, _hlo

_LAYOUT = re.compile(r"\{[^}]*\}")
_LIBRARY = re.compile(r'custom_call_target="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_LOCATION = re.compile(r"file_location_id=(\d+)")
_PLACE = re.compile(r"file_name_id=(\d+) .*?line=(\d+)")


class Seen(NamedTuple):
    """A launch by what it does; where in the source it comes from does not count.

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


def _table(text: str, name: str) -> dict[str, str]:
    """One of the tables before a program, by the number that stands first in each line."""
    found = re.search(rf"^{name}\n((?:.+\n)*)", text, re.MULTILINE)
    lines = found.group(1).splitlines() if found else []
    return dict(line.split(" ", 1) for line in lines)


def _sources(text: str) -> dict[str, str]:
    """File and line of every stack frame that a program names."""
    files, places, sources = _table(text, "FileNames"), _table(text, "FileLocations"), {}
    for frame, line in _table(text, "StackFrames").items():
        location = _LOCATION.search(line)
        place = _PLACE.search(places.get(location.group(1), "")) if location else None
        if place:
            file, number = place.groups()
            sources[frame] = PurePath(files[file].strip('"')).name + f":{number}"
    return sources


def launches(text: str) -> Launches:
    """All launches of a program given as HLO text, the most expensive first."""
    module, sources, found = _hlo.parse(text), _sources(text), []
    lines = (line for computation in module.computations.values() for line in computation)
    shapes = {line.name: _LAYOUT.sub("", line.shape) for line in lines}
    for launch in sorted(_cost.launches(module), key=lambda launch: -launch.bytes):
        line = launch.instruction
        library, frame = _LIBRARY.search(line.attributes), _FRAME.search(line.attributes)
        kind = library.group(1) if library else line.opcode.removesuffix("-start")
        operands = ", ".join(shapes.get(operand, "?") for operand in line.operands)
        seen = Seen(launch.times, kind, shapes[line.name], round(launch.bytes / 1e6, 1))
        found.append((seen, f"({operands}), {sources.get(frame.group(1), '?') if frame else '?'}"))
    return found


def text(title: str, one: Launches, other: Launches, limit: int) -> str:
    """The most expensive launches of one program that the other does not have as often."""
    left = Counter(seen for seen, _ in one) - Counter(seen for seen, _ in other)
    total = sum(seen.megabytes * count for seen, count in left.items())
    lines = [f"### {title}: {total:.0f} MB in {left.total()} own launches\n"]
    for seen, details in one:
        if left[seen] and len(lines) <= limit:
            left[seen] -= 1
            lines.append(f"- {seen.megabytes:.1f} MB, {seen.times}x {seen.kind} {seen.result} of {details}")
    return "\n".join(lines)
