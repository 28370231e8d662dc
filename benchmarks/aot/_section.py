"""The section of RESULTS.md of a benchmark that compiles for a device that is not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks import _report
from jmp_lite.analysis._estimation._compiled import _targets


def write(
    path: Path, module: str, body: str, *, target: str, compilers: Sequence[str], title: str, note: str = ""
) -> None:
    """Writes it.

    Args:
      path: the file.
      module: what is run, such as `benchmarks.aot.models`; its last part names the section.
      body: Markdown.
      target: a key of `_targets.TARGETS`.
      compilers: packages whose versions are told.
      title: what was compiled.
      note: what is added on how it was compiled.
    """
    device, version = _targets.TARGETS[target], f"jax {jax.__version__}"
    facts = {
        "command": f"`{_report.command(module)}`",
        "versions": _report.versions(compilers),
        "compiled for": f"{device}, without one{note}",
    }
    name = f"{module.rpartition('.')[2]}, {target} without a device, {version}"
    _report.write_section(path, name, f"{title} compiled for {device}, {version}", facts, body)
