"""What the benchmark found, as a figure: a row of panels per model, a bar per variant."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jmp_lite._messages import naming_extra
from jmp_lite.cli._bench_measure import Run, baseline_of
from jmp_lite.cli._bench_report import Setting, megabytes, significant

_INK, _MUTED, _BASE, _OURS = "#1f2933", "#6b7785", "#a3adb8", "#2563a8"


class _Panel(NamedTuple):
    """One column of panels: a figure of a run, and how its bars are labeled."""

    title: str
    value: Callable[[Run, Run], float]
    label: Callable[[Run, Run], str]


_PANELS = (
    _Panel(
        "Speed (× float32)",
        lambda run, base: run.ratio_to(base),
        lambda run, base: f"{run.ratio_to(base):.2f}   {significant(run.rate)} {run.model.unit}/s",
    ),
    _Panel(
        "Peak memory (× float32)",
        lambda run, base: run.peak_bytes / base.peak_bytes,
        lambda run, base: f"{run.peak_bytes / base.peak_bytes:.2f}   {megabytes(run.peak_bytes)}",
    ),
    _Panel(
        "Final loss (difference from float32)",
        lambda run, base: abs(run.loss / base.loss - 1) * 100,
        lambda run, base: f"{run.loss / base.loss - 1:+.2%}   {run.loss:.4f}",
    ),
)


def require_matplotlib() -> None:
    """Raises in time, before anything is measured.

    Raises:
        ModuleNotFoundError: It names the extra.
    """
    with naming_extra("jmp-lite bench --png", "analysis"):
        import matplotlib  # noqa: F401


def draw(path: str, setting: Setting, runs: Sequence[Run]) -> None:
    """Writes the figure to a file.

    Args:
        path: Of a PNG.
        setting: For the title.
        runs: Those that failed have no bars.
    """
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(run.model.name for run in runs))
    of_model = [[run for run in runs if run.model.name == name] for name in models]
    height = sum(0.34 * len(of) + 0.95 for of in of_model) + 0.75
    figure = Figure(figsize=(13.5, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr]
    figure.suptitle(setting.title(), x=0.012, ha="left", fontsize=14, fontweight="bold", color=_INK)
    axes = figure.subplots(len(models), len(_PANELS), squeeze=False, height_ratios=[len(of) for of in of_model])
    for row, of in zip(axes, of_model, strict=True):
        for column, (axis, panel) in enumerate(zip(row, _PANELS, strict=True)):
            _fill(axis, panel, of, has_names=column == 0)
        row[0].set_title(f"{of[0].model.name}: {of[0].model.size}\n", loc="left", fontsize=11, color=_INK)
    figure.savefig(path, dpi=150, format="png")


def _fill(axis: Any, panel: _Panel, runs: Sequence[Run], *, has_names: bool) -> None:
    """Draws the bars of one panel."""
    pairs = [(run, baseline_of(runs, run)) for run in runs]
    is_known = [bool(run.rates and base.rates and not run.error) for run, base in pairs]
    values = [panel.value(*pair) if known else 0.0 for pair, known in zip(pairs, is_known, strict=True)]
    places = range(len(runs))
    colors = [_BASE if run is base else _OURS for run, base in pairs]
    axis.barh(places, values, height=0.68, color=colors)
    for place, pair, known, value in zip(places, pairs, is_known, values, strict=True):
        text = panel.label(*pair) if known else "failed"
        axis.annotate(
            text, (value, place), (5, 0), textcoords="offset points", va="center", fontsize=9, color=_INK
        )
    axis.set_xlim(0, max([*values, 1e-9]) * 1.75)  # room for the labels
    axis.set_ylim(len(runs) - 0.4, -0.6)
    axis.set_yticks(places, [run.variant for run in runs] if has_names else [""] * len(runs), fontsize=10, color=_INK)
    axis.set_xlabel(panel.title, fontsize=10, color=_MUTED, loc="left")
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.spines["left"].set_color(_MUTED)
