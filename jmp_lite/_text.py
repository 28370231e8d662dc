"""Tables as plain text."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, is_right: Sequence[bool] = ()) -> str:
    """Lays out text in columns.

    Args:
        header: A word for each column.
        rows: As many cells as the header has.
        is_right: For each column whether its cells end together, as numbers do; without it none do.

    Returns:
        A line for the header, and one per row.

    Example:
        >>> from jmp_lite._text import table
        >>> print(table(["dtype", "bits"], [["float32", "32"]], is_right=[False, True]))
        dtype    bits
        float32    32
    """
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.rjust if right else str.ljust for right in is_right or [False] * len(widths)]
    return "\n".join(
        "  ".join(side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)).rstrip()
        for line in lines
    )
