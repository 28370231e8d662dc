"""How far a long command is, on standard error: a bar of rich's on a terminal, otherwise nothing."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Shows a bar.

    Args:
        total: Number of parts.

    Yields:
        A function to call before each part, with words that say which.
    """
    if not sys.stderr.isatty():
        yield _silent
        return
    try:
        import rich.console
        import rich.progress
    except ModuleNotFoundError:
        yield _silent
        return
    columns = (
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.description}"),
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        begun = 0

        def begin(part: str) -> None:
            nonlocal begun
            bar.update(task, description=part, completed=begun)
            begun += 1

        yield begin


def _silent(_: str) -> None:
    pass
