"""Mixed precision on this machine, beside float32: ``bench``."""

import importlib
from pathlib import Path

import jax

from jmp_lite._compat import QUICK_COMPILATION
from jmp_lite._messages import first_few
from jmp_lite.cli._files import check_file
from jmp_lite.cli._outcome import Outcome
from jmp_lite.cli._progress import progress


def bench(*, tiny: bool = False, json: str | None = None, png: str | None = None) -> Outcome:
    """Trains models in every variant, and compares them.

    Args:
        tiny: Whether to show only that everything runs.
        json: A file for all figures.
        png: A file for a drawing of them.

    Returns:
        A table; with status 2 if a variant did not run, or its loss is not finite.

    Raises:
        JmpLiteError: If a file cannot be written.
        ModuleNotFoundError: If there is no matplotlib to draw with.
    """
    # Only this command needs Optax.
    from jmp_lite.cli import _bench_measure, _bench_plot, _bench_report, _bench_sizes, _bench_variants

    check_file(json)
    check_file(png)
    if png:
        _bench_plot.require_matplotlib()
    device = jax.local_devices()[0]
    size = _bench_sizes.TINY if tiny else _bench_sizes.size_for(device)
    is_quick = tiny and device.platform == "cpu"
    models, variants = size.models(), _bench_variants.VARIANTS
    with progress(_bench_measure.parts(models, variants, size.rounds)) as report:
        runs = _bench_measure.measure(
            models,
            variants,
            steps=size.steps,
            rounds=size.rounds,
            report=report,
            compiler_options=QUICK_COMPILATION if is_quick else None,
        )
    version = importlib.import_module("jmp_lite").__version__
    setting = _bench_report.Setting(device.device_kind, version, size.name, size.steps, size.rounds, not is_quick)
    text = _bench_report.as_text(setting, runs)
    if json:
        Path(json).write_text(_bench_report.as_json(setting, runs), encoding="utf-8")
    if png:
        _bench_plot.draw(png, setting, runs)
    failed = [f"{run.model.name}, {run.variant}" for run in runs if run.error]
    if failed:
        return Outcome(text, 2, f"{len(failed)} of {len(runs)} runs failed: {first_few(failed)}.")
    return Outcome(text)
