"""Tables as text: aligned columns for pipes and files, lines and color where a person reads a terminal."""

import contextlib
import io
import sys
from collections.abc import Sequence


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], *, is_right: Sequence[bool] = ()) -> str:
    """Lays out text in columns.

    Args:
        header: A word for each column.
        rows: As many cells as the header has.
        is_right: For each column whether its cells end together, as numbers do; without it none do.

    Returns:
        A line for the header, one of dashes, and one per row.

    Example:
        >>> from jmp_lite.cli._text import aligned
        >>> print(aligned(["dtype", "bits"], [["float32", "32"]], is_right=[False, True]))
        dtype    bits
        -------  ----
        float32    32
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    sides = [str.rjust if right else str.ljust for right in is_right or [False] * len(widths)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)).rstrip()
        for line in lines
    )


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, is_right: Sequence[bool]) -> str:
    """Lays out a table with a title: by rich on a terminal where it is installed, else as ``aligned`` does."""
    if sys.stdout.isatty():
        with contextlib.suppress(ModuleNotFoundError):
            return _drawn(title, header, rows, is_right)
    return f"{title}\n\n{aligned(header, rows, is_right=is_right)}"


def _drawn(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], is_right: Sequence[bool]) -> str:
    import rich.box
    import rich.console
    import rich.markup
    import rich.table

    drawn = rich.table.Table(
        title=rich.markup.escape(title), title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD
    )
    for name, right in zip(header, is_right, strict=True):
        drawn.add_column(name, justify="right" if right else "left")
    for row in rows:
        drawn.add_row(*map(rich.markup.escape, row))
    page = io.StringIO()
    wide = 1000  # a terminal that is too narrow breaks lines, which reads better than cells of three letters
    rich.console.Console(file=page, force_terminal=True, width=wide).print(drawn)
    return page.getvalue().rstrip()
