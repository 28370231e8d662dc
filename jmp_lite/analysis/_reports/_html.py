"""One self-contained HTML page."""

import html
import importlib.resources
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jmp_lite.analysis._finding import Finding
from jmp_lite.analysis._reports._plots import Picture, heat_map_pictures, histogram_pictures, timeline_pictures
from jmp_lite.analysis._reports._rows import Table, cell

if TYPE_CHECKING:
    from jmp_lite.analysis._reports._report import Report

#: No script but the page's own runs, and nothing is asked of any server.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
#: Tables longer than this get a field to search them.
_LONG = 8
#: Characters from which on a cell is broken into lines.
_WIDE = 40


def page(report: "Report") -> str:
    """Returns a report as HTML. User input, such as scopes, titles and paths, is text, never markup."""
    sections = [
        _section("Findings", _findings(report.findings)),
        *(_section(table.title, _table(table)) for table in report.tables if table.rows),
        *_figures("Exponents", "grid", histogram_pictures(report.histories, report.format)),
        *_figures("Modules by steps", "wide", heat_map_pictures(report.histories, report.format)),
        *_figures("Loss scale by steps", "wide", timeline_pictures(report.entries)),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',
            f"<title>{html.escape(report.title)}</title>",
            f"<style>{_asset('report.css')}</style></head><body>",
            f"<header><h1>{html.escape(report.title)}</h1><p>{_counts(report.findings)}</p></header>",
            "<main>",
            *sections,
            "</main>",
            f"<script>{_asset('report.js')}</script></body></html>\n",
        ]
    )


def _asset(name: str) -> str:
    return importlib.resources.files("jmp_lite.analysis._reports").joinpath(name).read_text("utf-8")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def _counts(findings: Sequence[Finding]) -> str:
    counts = [(severity, sum(f.severity == severity for f in findings)) for severity in ("error", "warning", "note")]
    badges = [f'<span class="badge {name}">{n} {name}{"s" * (n > 1)}</span>' for name, n in counts if n]
    return " ".join(badges) or '<span class="badge good">nothing found</span>'


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return "<p>Nothing was found.</p>"
    return f'<ol class="findings">{"".join(map(_finding, findings))}</ol>'


def _finding(finding: Finding) -> str:
    where = " in ".join(f"<code>{html.escape(one)}</code>" for one in (finding.source, finding.scope) if one)
    parts = [
        f'<p class="kind"><span class="badge {finding.severity}">{finding.severity}</span> ',
        f"<b>{html.escape(finding.kind)}</b></p><p>{html.escape(finding.message)}</p>",
        f'<p class="where">{where}</p>' if where else "",
        f'<p class="advice">{html.escape(finding.advice)}</p>',
    ]
    return f'<li class="{finding.severity}">{"".join(parts)}</li>'


def _table(table: Table) -> str:
    label = html.escape(f"Search in {table.title}")
    search = f'<input type="search" placeholder="Search" aria-label="{label}">' if len(table.rows) > _LONG else ""
    head = "".join(f'<th scope="col"><button type="button">{html.escape(name)}</button></th>' for name in table.columns)
    body = "".join(f"<tr>{''.join(map(_cell, table.columns, row))}</tr>" for row in table.rows)
    return (
        f'{search}<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(table.title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(column: str, value: Any) -> str:
    text = html.escape(cell(column, value))
    if isinstance(value, bool) or not isinstance(value, int | float) or column == "value":
        return f'<td class="long">{text}</td>' if len(text) > _WIDE else f"<td>{text}</td>"
    number = value if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"
    return f'<td class="n" data-v="{number}">{text}</td>'


def _figures(title: str, layout: str, pictures: Iterable[Picture]) -> Iterator[str]:
    figures = [f'<figure aria-label="{html.escape(one.title)}">{one.svg}</figure>' for one in pictures]
    if figures:
        yield _section(title, f'<div class="{layout}">{"".join(figures)}</div>')
