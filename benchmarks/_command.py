"""What the command lines of all benchmarks have in common."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import _report


def parser(module: str, description: str | None, *, quick: str, baseline: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has.

    Args:
      module: name to run it by.
      description: its docstring.
      quick: what `--quick` measures.
      baseline: what `--skip-peers` leaves beside jmp_lite.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--skip-peers", action="store_true", help=f"only {baseline} and jmp_lite")
    made.add_argument("--quick", "--tiny", action="store_true", help=f"{quick}; written nowhere unless --out")
    made.add_argument("--out", type=Path, help="results file (default: benchmarks/RESULTS.md)")
    return made


def fill_in_results_file(options: argparse.Namespace) -> None:
    """Sets the default of `--out`, which depends on `--quick`."""
    if not options.out and not options.quick:
        options.out = _report.RESULTS


def show(part: str) -> str:
    """Prints a part of the report as soon as it is there."""
    sys.stdout.write(f"{part}\n\n")
    sys.stdout.flush()
    return part
