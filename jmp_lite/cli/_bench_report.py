"""What the benchmark found, as a table and as JSON."""

import json
import math
import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jmp_lite.cli._bench_measure import Run, baseline_of
from jmp_lite.cli._text import titled

#: Of the JSON; rises when a field changes its meaning.
SCHEMA = 1
_HEADER = (
    "model",
    "variant",
    "per second",
    "spread",
    "x float32",
    "peak memory",
    "loss",
    "/ float32",
    "compile s",
)


class Setting(NamedTuple):
    """Where and how the runs were made.

    Attributes:
        device: What it calls itself.
        version: Of this library.
        size: Name of the sizes.
        steps: In a turn.
        rounds: Turns of each variant.
        is_optimized: Whether the compiler optimized; it does not in the tiny size on a CPU.
    """

    device: str
    version: str
    size: str
    steps: int
    rounds: int
    is_optimized: bool = True

    def title(self) -> str:
        """One line, for a table or a figure."""
        return f"jmp_lite {self.version} on {self.device}, jax {jax.__version__}, sizes: {self.size}"


def as_text(setting: Setting, runs: Sequence[Run]) -> str:
    """Lays out the figures as a table, with what the columns mean below it."""
    rows = [_row(run, runs) for run in runs]
    drawn = titled(setting.title(), _HEADER, rows, is_right=[False, False, *[True] * 7])
    models = dict.fromkeys(
        f"{run.model.name}: {run.model.size}; {run.model.parameter_count() / 1e6:.3g} M parameters." for run in runs
    )
    failures = [f"{run.model.name}, {run.variant}: {run.error}" for run in runs if run.error]
    return "\n".join([drawn, "", *models, *_legend(setting, runs), *failures])


def _legend(setting: Setting, runs: Sequence[Run]) -> list[str]:
    lines = [
        f"per second: median of {setting.rounds} rounds in turns; spread: fastest less slowest, over the median.",
        "x float32: median of the ratios within a round.",
        f"peak memory: {memory_source(runs)}.",
        f"loss: at step {setting.steps} on one batch of random data, the same in all variants.",
    ]
    if not setting.is_optimized:
        lines.append("Compiled without optimization: the figures show that everything runs, not how fast.")
    return lines


def memory_source(runs: Sequence[Run]) -> str:
    """Says who counted the memory; some runs may not have raised the peak that the device knows of its whole life."""
    counted = {run.counted_by_device for run in runs if run.peak_bytes}
    reserved = "what the compiler reserves for a step (memory_analysis)"
    if True not in counted:
        return reserved
    return "counted by the device (memory_stats)" + (f"; with *, {reserved}" if False in counted else "")


def peak(run: Run, runs: Sequence[Run]) -> str:
    """Writes the memory of a run, with a star where the device counted others and not this one."""
    if not run.peak_bytes:
        return "-"
    star = "*" if not run.counted_by_device and any(other.counted_by_device for other in runs) else ""
    return f"{significant(run.peak_bytes / 1e6)} MB{star}"


def _row(run: Run, runs: Sequence[Run]) -> tuple[str, ...]:
    base = baseline_of(runs, run)
    return (
        run.model.name,
        run.variant,
        f"{significant(run.rate)} {run.model.unit}" if run.rates else "-",
        _known(run.spread, ".1%"),
        _known(run.ratio_to(base), ".2f"),
        peak(run, runs),
        _known(run.loss, ".4f"),
        _known(run.loss / base.loss, ".4f"),
        _known(run.compile_seconds, ".1f"),
    )


def _known(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def significant(value: float) -> str:
    """Writes a number of 1 and more with at least three digits, in groups of thousands.

    Example:
        >>> from jmp_lite.cli._bench_report import significant
        >>> significant(1234567.8), significant(98.76), significant(4.321)
        ('1,234,568', '98.8', '4.32')
    """
    digits = max(0, 2 - math.floor(math.log10(value))) if value >= 1 else 3
    return f"{value:,.{digits}f}"


def as_json(setting: Setting, runs: Sequence[Run]) -> str:
    """Writes all figures; those that nobody knows are ``null``."""
    found = {
        "schema": SCHEMA,
        "versions": {"jmp_lite": setting.version, "jax": jax.__version__, "python": platform.python_version()},
        **{name: value for name, value in setting._asdict().items() if name != "version"},
        "runs": [_fields(run, baseline_of(runs, run)) for run in runs],
    }
    return json.dumps(found, indent=2, allow_nan=False) + "\n"


def _fields(run: Run, base: Run) -> dict[str, Any]:
    figures = {
        "per_second": run.rate,
        "spread": run.spread,
        "ratio_to_float32": run.ratio_to(base),
        "loss": run.loss,
        "loss_ratio_to_float32": run.loss / base.loss,
        "compile_seconds": run.compile_seconds,
    }
    return {
        "model": run.model.name,
        "size": run.model.size,
        "parameters": run.model.parameter_count(),
        "variant": run.variant,
        "unit": run.model.unit,
        **{name: value if math.isfinite(value) else None for name, value in figures.items()},
        "rounds": run.rates,
        "peak_bytes": run.peak_bytes or None,
        "peak_source": "memory_stats" if run.counted_by_device else "memory_analysis" if run.peak_bytes else None,
        "error": run.error or None,
    }
