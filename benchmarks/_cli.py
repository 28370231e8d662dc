"""What the step benchmarks share: their options, and the loop over trees and gradient dtypes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from benchmarks import _command, _designs, _report

TREES = ("one", "65", "300")
GRADS = ("float32", "float16")
FUSED = "jmp_lite apply_gradients"


class Row(Protocol):
    """Figures of one design on one tree."""

    def cells(self) -> list[str]:
        """The row as text, one entry per column."""
        ...


R = TypeVar("R", bound=Row)


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options common to the step benchmarks."""
    made = _command.parser(module, description, quick="a tiny tree and float32", baseline="bare Optax")
    made.add_argument("--trees", nargs="+", choices=_designs.TREES, help="parameter trees (default: one 65 300)")
    made.add_argument("--grads", nargs="+", choices=GRADS, help="gradient dtypes (default: all)")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line and fills in the defaults that depend on `--quick`."""
    options = made.parse_args(argv)
    options.trees = options.trees or (["tiny"] if options.quick else list(TREES))
    options.grads = options.grads or (["float32"] if options.quick else list(GRADS))
    _command.fill_in_results_file(options)
    return options


def tables(
    options: argparse.Namespace,
    header: Sequence[str],
    measure: Callable[[str, str], tuple[list[R], list[str]]],
    targets: Callable[[list[R]], list[_report.Target]],
) -> str:
    """Measures every tree with every gradient dtype and prints the tables as they come.

    Args:
      options: of `parse`.
      header: names of the columns.
      measure: (tree, gradient dtype) -> one row per design, and notes to set under the table.
      targets: rows of one tree -> the limits they are held against.

    Returns:
      All tables and verdicts as Markdown.
    """
    parts: list[str] = []
    for tree in options.trees:
        rows: list[R] = []
        for grad_dtype in options.grads:
            sys.stderr.write(f"{_designs.TREES[tree]}, {grad_dtype} gradients ...\n")
            measured, notes = measure(tree, grad_dtype)
            rows += measured
            heading = f"### {_designs.TREES[tree]}, {grad_dtype} gradients"
            cells = _report.table(header, [row.cells() for row in measured])
            parts.append(_command.show("\n\n".join([heading, cells, *notes])))
        held = "\n".join(target.line() for target in targets(rows))
        parts.append(_command.show(f"`{FUSED}` on this tree:\n\n{held}"))
    return "\n\n".join(parts)
