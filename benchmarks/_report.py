"""RESULTS.md: every script replaces its own section, and nothing else."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "RESULTS.md"

_PREAMBLE = """# Benchmark results

Every section below was written by the command that it quotes; run the command again to replace it. One step unscales
the gradients, checks them, updates float32 parameters with AdamW or skips, and adjusts the loss scale; parameters and
state are donated in the order in which they are returned.

- **time / bare**: median over the rounds of one interleaved run, each round divided by bare Optax in the same round.
- **call alone**: a step that returns its inputs; the part of a bare step that is only passing the arrays.
- **skipped / bare**: the same for a step whose gradients hold one NaN, over a good step of bare Optax.
- **B/param**, **/ ideal**: bytes that the compiled program reads and writes (counted by `_cost.py`) per parameter, and
  that over the least a checked step can move: p, m, v in and out and the gradient twice, 24 + 2g. Bare Optax, which
  checks nothing, reads the gradient once.
- **kernels**: launches; **copies**: launches that only copy an array of 1024 elements or more; **alias**: share of the
  output bytes written in place; **temp**: scratch bytes per parameter; **trace**, **compile**: processor seconds.
- **difference**: largest distance of a parameter from bare Optax after one step; **skips**: whether a NaN gradient
  leaves parameters and moments bit-identical.
"""

_SECTION = "<!-- section: {name} -->\n{body}\n<!-- end of section -->\n"
_DISTRIBUTIONS = ("jax", "jaxlib", "optax", "flax", "jmp", "mixed-precision-for-jax")


class Target(NamedTuple):
    """A limit that jmp_lite sets itself, and the figures held against it."""

    name: str
    limit: float
    values: Sequence[float]

    def line(self) -> str:
        """One Markdown list item."""
        known = [value for value in self.values if not math.isnan(value)]
        if not known:
            return f"- {self.name} <= {self.limit:g}: not measured"
        worst = max(known)
        verdict = "met" if worst <= self.limit else "MISSED"
        return f"- {self.name} <= {self.limit:g}: {verdict} (worst {worst:.3f})"


def versions(more: Iterable[str] = ()) -> str:
    """Names and versions of the installed distributions among the usual ones and `more`."""
    found = []
    for name in (*_DISTRIBUTIONS, *more):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join([f"Python {platform.python_version()}", *found])


def hardware() -> str:
    """Processor model, architecture, cores and present load of this machine."""
    model = platform.processor() or "unknown processor"
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)
        model = named.group(1) if named else model
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{model}, {platform.machine()}, {os.cpu_count()} cores, load average {load}"


def command(module: str) -> str:
    """The command line that runs `module` with the present arguments."""
    return " ".join(["python", "-m", module, *sys.argv[1:]])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column to the left and the others to the right.

    >>> print(table(["design", "ratio"], [["bare", "1.00"]]))
    | design | ratio |
    | :-- | --: |
    | bare | 1.00 |
    """
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float, digits: int = 2) -> str:
    """A figure with fixed digits; a dash when it was not measured."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def write_section(path: Path, name: str, title: str, facts: Mapping[str, str], body: str) -> None:
    """Replaces the section `name` of a results file, or appends it.

    Args:
      path: the file; made with its preamble when absent.
      name: key of the section.
      title: its heading.
      facts: command, versions, hardware and so on, listed under the heading.
      body: Markdown.
    """
    text = path.read_text() if path.exists() else _PREAMBLE
    listed = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    section = _SECTION.format(name=name, body=f"\n## {title}\n\n{listed}\n\n{body}\n")
    start = re.escape(_SECTION.split("\n", 1)[0].format(name=name))
    end = re.escape("<!-- end of section -->\n")
    replaced, count = re.subn(f"{start}\n.*?{end}", lambda _: section, text, count=1, flags=re.DOTALL)
    path.write_text(replaced if count else f"{text.rstrip()}\n\n{section}")
