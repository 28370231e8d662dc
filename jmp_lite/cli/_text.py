"""Tables with a title: plain for pipes and files, with lines and color where a person reads a terminal."""

import contextlib
import io
import sys
from collections.abc import Sequence

from jmp_lite._text import table


def titled(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, is_right: Sequence[bool]) -> str:
    """Lays out a table with a title: by rich on a terminal where it is installed, else as plain text."""
    if sys.stdout.isatty():
        with contextlib.suppress(ModuleNotFoundError):
            return _drawn(title, header, rows, is_right)
    return f"{title}\n\n{table(header, rows, is_right=is_right)}"


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
