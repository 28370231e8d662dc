"""``report``: results of analyses as text, JSON, CSV, plots, scalars for a logger, and one HTML page."""

import csv
import dataclasses
import functools
import importlib.util
import io
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from jmp_lite._text import table as laid_out
from jmp_lite.analysis._finding import Finding, ordered
from jmp_lite.analysis._ranges._check_ranges import diagnose
from jmp_lite.analysis._ranges._range import parse_format
from jmp_lite.analysis._ranges._ranges import Ranges
from jmp_lite.analysis._reports._rows import (
    Entry,
    History,
    Table,
    cell,
    entries_of,
    finding_row,
    flat_rows,
    histories_of,
    is_metrics,
    plain,
    shortened,
    tables_of,
)
from jmp_lite.errors import InvalidAnalysisError

#: Rows of a table that are printed; files have all of them.
_PRINTED = 12
#: Characters of a cell that are printed, and of a figure, which may be a sentence.
_WIDEST, _LONGEST = 56, 500


@dataclasses.dataclass(frozen=True)
class Report:
    """Results of analyses, worst findings first; it prints as a verdict, findings and tables.

    Attributes:
        title: The subject of the report.
        format: The format that ranges are judged by.
        findings: Findings of all parts, worst first.
        entries: The parts, each with its training step.
        histories: The ranges among them, by program.

    Example:
        >>> report = jmp.analysis.report(jmp.analysis.audit(jnp.matmul)(jnp.ones((2, 3)), jnp.ones((3, 2))))
        >>> report.title, report.verdict
        ('Mixed precision', 'Found nothing.')
    """

    title: str
    format: str
    findings: tuple[Finding, ...]
    entries: tuple[Entry, ...]
    histories: tuple[History, ...]

    @property
    def verdict(self) -> str:
        """The number of findings, as one sentence.

        Example:
            >>> jmp.analysis.report(jmp.analysis.ranges(jnp.ones(3))).verdict
            'Found nothing.'
        """
        counts = [(s, sum(f.severity == s for f in self.findings)) for s in ("error", "warning", "note")]
        said = ", ".join(f"{n} {severity}{'s' if n > 1 else ''}" for severity, n in counts if n)
        return f"Found {said or 'nothing'}."

    @functools.cached_property
    def tables(self) -> tuple[Table, ...]:
        """Everything except the findings."""
        return tuple(tables_of(self.entries, self.histories, self.format))

    def __str__(self) -> str:
        table = _rich_table if importlib.util.find_spec("rich") else _plain_table
        parts = [self.title, self.verdict, *map(str, self.findings), *(table(one) for one in self.tables if one.rows)]
        return "\n\n".join(filter(None, parts))

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as dictionaries, lists, strings and numbers."""
        parts = [
            {"part": type(part).__name__, "step": step, "data": part.to_dict() if hasattr(part, "to_dict") else part}
            for step, part in self.entries
            if not isinstance(part, Finding)
        ]
        findings = list(map(finding_row, self.findings))
        about = {"title": self.title, "format": self.format, "verdict": self.verdict}
        found: dict[str, Any] = plain({**about, "findings": findings, "parts": parts})
        return found

    def to_json(self, path: Any = None) -> str:
        """Returns everything as JSON, and writes it to a file if you pass a path.

        Example:
            >>> import json
            >>> text = jmp.analysis.report(jmp.analysis.ranges({"w": jnp.zeros(3)}, "gradient")).to_json()
            >>> json.loads(text)["findings"][0]["kind"]
            'dead'
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            pathlib.Path(path).write_text(text, "utf-8")
        return text

    def to_csv(self, path: Any) -> None:
        """Writes everything as one table, whose first columns give the part and the step of a row.

        Histograms are left out; JSON has them.
        """
        rows = list(flat_rows(self.entries, self.findings))
        columns = dict.fromkeys(["table", "step", *(column for row in rows for column in row)])
        with pathlib.Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(rows)

    def to_tensorboard(self, writer: Any, step: int = 0) -> None:
        """Logs ranges, metrics and the number of findings as scalars.

        Args:
            writer: Anything with ``add_scalar(tag, value, step)``, as in tensorboardX and PyTorch, or with
                ``scalar(tag, value, step)``, as in Flax.
            step: The step for parts without one.

        Raises:
            InvalidAnalysisError: If the writer has neither.

        Example:
            >>> class Printer:
            ...     def add_scalar(self, tag, value, step):
            ...         print(tag, value, step)
            >>> jmp.analysis.report({7: {"loss_scale": 2.0}}).to_tensorboard(Printer(), 9)
            findings/error 0 9
            findings/warning 0 9
            findings/note 0 9
            loss_scaling/loss_scale 2.0 7
        """
        add = getattr(writer, "add_scalar", None) or getattr(writer, "scalar", None)
        if add is None:
            raise InvalidAnalysisError(
                f"A writer of scalars has a method add_scalar(tag, value, step) or scalar(tag, value, step); "
                f"{type(writer).__name__} has neither."
            )
        for severity in ("error", "warning", "note"):
            add(f"findings/{severity}", sum(f.severity == severity for f in self.findings), step)
        for entry in self.entries:
            for tag, value in _scalars(entry.part, self.format):
                add(tag, value, step if entry.step is None else entry.step)

    def save_png(self, folder: Any) -> tuple[pathlib.Path, ...]:
        """Draws histograms of exponents, a heat map of modules by steps, and the loss scale by steps, if there are any.

        Args:
            folder: Where to write ``histograms.png``, ``modules.png`` and ``loss_scale.png``; created if missing.

        Returns:
            The files. Without ranges there are no histograms, and with ranges of only one step no heat map.

        Raises:
            ModuleNotFoundError: Without the ``analysis`` extra.
        """
        from jmp_lite.analysis._reports._plots import save_png

        return save_png(self.entries, self.histories, self.format, pathlib.Path(folder))

    def save_html(self, path: Any) -> None:
        """Writes one page that needs no other file and no network: findings, sortable tables, and figures.

        Raises:
            ModuleNotFoundError: Without the ``analysis`` extra.
        """
        from jmp_lite.analysis._reports._html import page

        pathlib.Path(path).write_text(page(self), "utf-8")


def report(*parts: Any, title: str = "Mixed precision", format: str = "float16") -> Report:  # noqa: A002  # what it is
    """Combines the results of analyses.

    Args:
        *parts: Results of ``audit``, ``collect``, ``ranges`` and ``first_nonfinite``; findings; dictionaries of
            ``jmp.metrics``; a list of these; and for histories a dictionary from steps to these. A dictionary of
            metrics may have ``"culprits"``: names, or the result of ``jmp.distributed.nonfinite_leaves``. Any other
            object with ``to_dict()``, ``findings`` or both is a part too: lists of dictionaries become tables.
        title: The subject of the report.
        format: The format that ranges are judged by, as in ``diagnose``.

    Returns:
        A ``Report``.

    Raises:
        InvalidAnalysisError: If an argument cannot be part of a report.
        UnknownDtypeError: If the format is unknown.

    Example:
        >>> def loss(w, x):
        ...     return jnp.mean(jnp.square(x @ w)) * 1e-9
        >>> _, ranges = jmp.analysis.collect(jax.grad(loss))(jnp.ones((8, 8)), jnp.ones((2, 8)))
        >>> report = jmp.analysis.report(ranges, title="One step")
        >>> print(report.verdict, report.findings[0].kind)
        Found 1 warning. gradient-underflow
        >>> report.tables[0].title
        'Ranges, as float16 would hold them'
    """
    name = parse_format(format)
    entries = tuple(entries_of(parts))
    found = [entry.part for entry in entries if isinstance(entry.part, Finding)]
    found += [finding for entry in entries for finding in getattr(entry.part, "findings", ())]
    histories = histories_of(entries)
    found += [finding for history in histories for finding in diagnose(history.total, format=name)]
    return Report(title, name, ordered(found), entries, histories)


def _scalars(part: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(part, Ranges):
        for row, r in part.pairs:
            fate = r.fates[name]
            figures = {"largest": r.largest, "rms": r.rms, "overflow": fate.overflow, "underflow": fate.underflow}
            yield from ((f"ranges/{row}/{figure}".replace(" ", "_"), value) for figure, value in figures.items())
    elif is_metrics(part):
        for key, value in plain(part).items():
            if isinstance(value, bool | int | float):
                yield f"loss_scaling/{key}", float(value)


def _cut(table: Table) -> tuple[list[tuple[str, ...]], str]:
    limits = [_LONGEST if column == "value" else _WIDEST for column in table.columns]
    texts = [map(cell, table.columns, row) for row in table.rows[:_PRINTED]]
    rows = [tuple(map(shortened, row, limits)) for row in texts]
    rest = len(table.rows) - _PRINTED
    return rows, f"... and {rest} more" if rest > 0 else ""


def _plain_table(table: Table) -> str:
    rows, more = _cut(table)
    return "\n".join(filter(None, [f"{table.title}:", laid_out(table.columns, rows), more]))


def _rich_table(table: Table) -> str:
    import rich.box
    import rich.console
    import rich.table
    import rich.text

    rows, more = _cut(table)
    title = rich.text.Text(table.title, style="bold")
    grid = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left", caption=more or None)
    for column, values in zip(table.columns, zip(*table.rows, strict=True), strict=True):
        grid.add_column(column, justify="right" if _is_numeric(values) else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*map(rich.text.Text, row))
    console = rich.console.Console(file=io.StringIO(), width=10_000, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().strip("\n").splitlines())


def _is_numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) or not value for value in values)
