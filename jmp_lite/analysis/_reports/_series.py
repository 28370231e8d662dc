"""Data for the figures of a report: histograms, modules by steps, and loss scales by steps."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jmp_lite.analysis._nonfinite._nonfinite import NonFinite
from jmp_lite.analysis._ranges._range import Range
from jmp_lite.analysis._ranges._ranges import Ranges, Row, _severity
from jmp_lite.analysis._reports._rows import Entry, History, metrics_of

#: As many panels can be taken in at a glance.
_PANELS = 12
#: As many modules fit below each other.
_MODULES = 40
#: Scopes deeper than this are parts of one layer.
_DEEPEST = 4


class HeatMap(NamedTuple):
    """Modules by steps.

    Attributes:
        steps: Steps of the columns.
        modules: Names of the rows, in program order.
        largest: ``float64[modules, steps]``, binary logarithm of the largest magnitude; NaN where all are zero.
        lost: ``float64[modules, steps]``, share of the numbers that overflow or become zero in the format.
        broken: ``bool[modules, steps]``, where there are NaN or infinities.
    """

    steps: tuple[int, ...]
    modules: tuple[str, ...]
    largest: Any
    lost: Any
    broken: Any


class Timeline(NamedTuple):
    """A loss scale by steps.

    Attributes:
        name: Its path, if there are several.
        steps: Steps at which it was read.
        scales: Its values.
        skips: Steps, and how many were skipped since the previous reading.
        culprits: Steps, and the names that were not finite there.
    """

    name: str
    steps: tuple[int, ...]
    scales: tuple[float, ...]
    skips: tuple[tuple[int, int], ...]
    culprits: tuple[tuple[int, str], ...]


def histograms_of(histories: Sequence[History], name: str) -> list[tuple[Row, Range]]:
    """Returns the ranges to draw as histograms: those that lose most in a format, over all steps."""
    pairs = [pair for history in histories for pair in history.total.pairs if pair[1].exponents]
    worst_first = sorted(pairs, key=lambda pair: _severity(pair[1], name), reverse=True)
    found: list[tuple[Row, Range]] = []
    for row, r in worst_first:
        if not any(r == other for _, other in found[-_PANELS:]):  # what one makes, and the next takes
            found.append((row, r))
        if len(found) == _PANELS:
            break
    return found


def heat_maps_of(histories: Sequence[History], name: str) -> Iterator[HeatMap]:
    """Returns modules by steps, for each program with several steps."""
    for history in histories:
        if len(history.steps) > 1:
            yield _heat_map(history, name)


def _heat_map(history: History, name: str) -> HeatMap:
    depth = _depth(history.ranges[0])
    columns = [_by_module(ranges, depth) for ranges in history.ranges]
    modules = tuple(columns[0])
    cells = [[_cell(column[module], name) for column in columns] for module in modules]
    largest, lost, broken = (np.array([[one[i] for one in row] for row in cells]) for i in range(3))
    return HeatMap(tuple(step or 0 for step in history.steps), modules, largest, lost, broken)


def _cell(found: Sequence[Range], name: str) -> tuple[float, float, bool]:
    largest = max(r.largest for r in found)
    finite = sum(r.count - r.nan - r.inf for r in found)
    lost = 0.0
    for r in found:
        fate, n = r.fates[name], r.count - r.nan - r.inf
        lost += fate.overflow * n + fate.underflow * (n - r.zero)
    broken = any(not r.is_finite for r in found)
    return (math.log2(largest) if largest else math.nan, lost / max(finite, 1), broken)


def _depth(ranges: Ranges) -> int:
    """Returns how many scopes to group modules by, so that there are not too many."""
    depths = [depth for depth in range(2, _DEEPEST + 1) if len(_by_module(ranges, depth)) <= _MODULES]
    return max(depths, default=1)


def _by_module(ranges: Ranges, depth: int) -> dict[str, list[Range]]:
    """Groups equations by scope, in program order; leaves by path if there is no equation."""
    has_equations = any(row.site for row in ranges.rows)
    found: dict[str, list[Range]] = {}
    for row, r in ranges.pairs:
        if has_equations == (row.site is not None):
            path = "/".join((row.site.scope if row.site else row.name).split("/")[:depth])
            direction = " backward" if row.site and row.site.is_backward else ""
            found.setdefault(f"{path or 'outside of scopes'}{direction}", []).append(r)
    return found if has_equations else dict(sorted(found.items(), key=lambda item: _numbered(item[0])))


def _numbered(path: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9: trees sort their keys as text."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", path)]


def timelines_of(entries: Sequence[Entry]) -> Iterator[Timeline]:
    """Returns the loss scales in a report, by steps."""
    metrics = metrics_of(entries)
    names = dict.fromkeys(key for _, one in metrics for key in one if re.search(r"(\A|/)loss_scale\Z", key))
    parts = [(entry.step, entry.part) for entry in entries]
    broken = [(step, _where(part)) for step, part in parts if isinstance(part, NonFinite) and step is not None]
    for key in names:
        prefix = key.removesuffix("loss_scale")
        found = [(step, one) for step, one in metrics if key in one]
        culprits = [(step, one.get(f"{prefix}culprits", "")) for step, one in found]
        yield Timeline(
            prefix.strip("/"),
            tuple(step for step, _ in found),
            tuple(float(np.min(one[key])) for _, one in found),
            tuple(_skips(prefix, found)),
            tuple(sorted([*broken, *((step, said) for step, said in culprits if said)])),
        )


def _skips(prefix: str, metrics: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterator[tuple[int, int]]:
    before: int | None = None
    for step, one in metrics:
        total = one.get(f"{prefix}total_notfinite")
        now = None if total is None else int(np.max(total))
        since = now - before if now is not None and before is not None else 0
        skipped = max(since, int(not np.all(one.get(f"{prefix}last_finite", True))))
        before = now
        if skipped:
            yield step, skipped


def _where(found: NonFinite) -> str:
    return f"{found.site.scope or found.site.primitive}" if found.site else f"argument {found.argument}"
