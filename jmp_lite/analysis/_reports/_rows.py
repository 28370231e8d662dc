"""Parts of a report as flat rows: for tables, for a CSV file, and as plain data."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jmp_lite._functions import read_on_host
from jmp_lite._messages import quote
from jmp_lite.analysis._finding import Finding
from jmp_lite.analysis._ranges._ranges import Ranges, _severity
from jmp_lite.analysis._ranges._tally import Tally
from jmp_lite.errors import InvalidAnalysisError


class Entry(NamedTuple):
    """A part of a report and its training step, or ``None``."""

    step: int | None
    part: Any


class Table(NamedTuple):
    """Rows of numbers and names under a title."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclasses.dataclass(frozen=True)
class History:
    """Ranges of one program, step after step."""

    steps: tuple[int | None, ...]
    ranges: tuple[Ranges, ...]

    @functools.cached_property
    def total(self) -> Ranges:
        """The ranges of all steps, summed on the host, where counts cannot overflow."""
        steps = read_on_host([ranges.tallies for ranges in self.ranges], "Ranges")
        return Ranges(self.ranges[0].rows, _added(steps))


def _added(parts: Sequence[Tally]) -> Tally:
    """Like ``merged``, for many tallies on the host."""
    fields: list[Any] = [np.stack(field) for field in zip(*parts, strict=True)]
    stacked = Tally(*fields)
    power = stacked.power.max(0)
    shift = stacked.power - power
    return Tally(
        stacked.classes.astype(np.int64).sum(0),
        stacked.largest.max(0),
        stacked.smallest.min(0),
        power,
        (stacked.total * np.exp2(shift)).sum(0),
        (stacked.square * np.exp2(2 * shift)).sum(0),
        (stacked.errors * np.exp2(2 * shift)[..., None]).sum(0),
        stacked.lost_in_int8.astype(np.int64).sum(0),
    )


def entries_of(parts: Iterable[Any]) -> Iterator[Entry]:
    """Splits the arguments of a report into parts.

    Raises:
        InvalidAnalysisError: If an argument cannot be part of a report.
    """
    for part in parts:
        if hasattr(part, "to_dict") or isinstance(part, Finding | str):
            yield Entry(None, _checked(part))
        elif isinstance(part, Mapping) and part and all(isinstance(key, int | np.integer) for key in part):
            yield from (Entry(int(step), _checked(one)) for step, one in part.items())
        elif isinstance(part, Sequence):
            has_steps = len(part) > 1 and all(isinstance(one, Ranges) or is_metrics(one) for one in part)
            yield from (Entry(step if has_steps else None, _checked(one)) for step, one in enumerate(part))
        else:
            yield Entry(None, _checked(part))


def _checked(part: Any) -> Any:
    if is_metrics(part):
        return {key: _culprits(x) if key.endswith("culprits") else _scalar(x) for key, x in part.items()}
    if isinstance(part, Finding) or hasattr(part, "findings") or hasattr(part, "to_dict"):
        return part
    raise InvalidAnalysisError(
        f"{quote(part)} can be no part of a report. Give what an analysis returned, findings, the dictionaries of "
        "jmp_lite.metrics, a list of them, a dictionary from steps to them, or an object with to_dict()."
    )


def _culprits(value: Any) -> str:
    """Returns names, given directly or flagged by ``nonfinite_leaves``."""
    if isinstance(value, Mapping):
        return ", ".join(str(path) for path, is_bad in value.items() if np.any(is_bad))
    return value if isinstance(value, str) else ", ".join(map(str, value or ()))


def is_metrics(part: Any) -> bool:
    """Whether an object is a dictionary from ``metrics``."""
    return isinstance(part, Mapping) and not hasattr(part, "to_dict") and all(isinstance(key, str) for key in part)


def histories_of(entries: Iterable[Entry]) -> tuple[History, ...]:
    """Returns the ranges in a report; steps of one program belong together."""
    found: list[list[Entry]] = []
    for entry in entries:
        if isinstance(entry.part, Ranges):
            is_next = (
                found and None not in (entry.step, found[-1][-1].step) and found[-1][-1].part.rows == entry.part.rows
            )
            found[-1].append(entry) if is_next else found.append([entry])
    return tuple(History(tuple(e.step for e in one), tuple(e.part for e in one)) for one in found)


def metrics_of(entries: Iterable[Entry]) -> list[tuple[int, Mapping[str, Any]]]:
    """Returns the metrics in a report with their steps, in order."""
    found = [entry for entry in entries if is_metrics(entry.part)]
    return sorted(((entry.step or 0, entry.part) for entry in found), key=lambda pair: pair[0])


# --- Tables to look at ---


def tables_of(entries: Sequence[Entry], histories: Sequence[History], name: str) -> Iterator[Table]:
    """Returns the tables of a report, without findings.

    Args:
        entries: Its parts.
        histories: The ranges among them.
        name: The format to judge ranges by.
    """
    for step, part in entries:
        if isinstance(part, Finding | Ranges) or is_metrics(part) or not hasattr(part, "to_dict"):
            continue
        at = "" if step is None else f", step {step}"
        yield from _tables(f"{type(part).__name__}{at}", part.to_dict())
    for history in histories:
        yield _table_of_ranges(history, name)
    metrics = metrics_of(entries)
    if metrics:
        yield _table("Loss scaling", [{"step": step, **flat_row(one)} for step, one in metrics])


#: Columns of shares; those of findings and metrics are not shares.
SHARES = frozenset({"zero", "overflow", "subnormal", "underflow", "error", "share", "flop_share"})


def _table_of_ranges(history: History, name: str) -> Table:
    columns = (
        "what",
        "count",
        "nan",
        "inf",
        "zero",
        "largest",
        "smallest",
        "rms",
        "overflow",
        "subnormal",
        "underflow",
    )
    pairs = sorted(history.total.pairs, key=lambda pair: _severity(pair[1], name), reverse=True)
    rows = []
    for row, r in pairs:
        fate = r.fates[name]
        counts = (r.count, r.nan, r.inf, r.zero / max(r.count, 1), r.largest, r.smallest, r.rms)
        rows.append((str(row), *counts, fate.overflow, fate.subnormal, fate.underflow, fate.rms_error))
    steps = f" of {len(history.steps)} steps" if len(history.steps) > 1 else ""
    return Table(f"Ranges{steps}, as {name} would hold them", (*columns, "error"), tuple(rows))


def _tables(name: str, data: Any) -> Iterator[Table]:
    """Makes tables from plain data: lists of dictionaries become tables, and the rest figures."""
    if isinstance(data, Mapping):
        lists = {key: value for key, value in data.items() if _is_table(value)}
        rest = flat_row({key: value for key, value in data.items() if key not in {*lists, "findings"}})
        rest = {key: value for key, value in rest.items() if value not in ("", None)}
        if rest:
            yield Table(name, ("figure", "value"), tuple(rest.items()))
        for key, value in lists.items():
            if key != "findings":
                yield _table(f"{name}: {key.replace('_', ' ')}", [flat_row(row) for row in value])
    elif _is_table(data):
        yield _table(name, [flat_row(row) for row in data])


def _is_table(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = tuple(dict.fromkeys(itertools.chain.from_iterable(rows)))
    return Table(title, columns, tuple(tuple(row.get(column, "") for column in columns) for row in rows))


def cell(column: str, value: Any) -> str:
    """Returns a value as table text."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else ("no", "yes")[value]
    if isinstance(value, int):
        return f"{value:,}" if column != "step" else str(value)
    if isinstance(value, float):
        if column in SHARES:
            return f"{100 * value:.3g} %" if value else ""
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 2**53 else f"{value:.4g}"
    return str(value)


def shortened(text: str, limit: int) -> str:
    """Shortens long text in the middle, because ends of paths tell them apart."""
    head = limit // 5
    return text if len(text) <= limit else f"{text[:head]}…{text[head + 1 - limit :]}"


# --- Plain data ---


def flat_row(data: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens nested dictionaries; joins keys with dots and list items with commas."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": one for inner, one in flat_row(value).items()}
        elif isinstance(value, list | tuple):
            found[key] = ", ".join(map(str, value))
        else:
            found[key] = _scalar(value)
    return found


def plain(value: Any) -> Any:
    """Returns plain JSON data, with text for NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    value = _scalar(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _scalar(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "tolist"):
        found = np.asarray(value).tolist()
        return found if not isinstance(found, list) else str(found)
    return str(value)


def flat_rows(entries: Sequence[Entry], findings: Sequence[Finding]) -> Iterator[dict[str, Any]]:
    """Returns everything as rows, each with the name of its table and its step."""
    for finding in findings:
        yield {"table": "findings", "step": None, **flat_row(finding_row(finding))}
    for step, part in entries:
        if isinstance(part, Ranges):
            for row in part.to_dict():
                yield {"table": "Ranges", "step": step, **flat_row({k: v for k, v in row.items() if k != "exponents"})}
        elif is_metrics(part):
            yield {"table": "metrics", "step": step, **flat_row(part)}
        elif hasattr(part, "to_dict") and not isinstance(part, Finding):
            for table in _tables(type(part).__name__, part.to_dict()):
                for cells in table.rows:
                    yield {"table": table.title, "step": step, **dict(zip(table.columns, cells, strict=True))}


def finding_row(finding: Finding) -> dict[str, Any]:
    """Returns a finding with its severity and advice."""
    return {"severity": finding.severity, **finding._asdict(), "advice": finding.advice}
