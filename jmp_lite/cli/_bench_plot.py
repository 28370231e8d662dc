"""What the benchmark found, as a figure: a row of panels per model, a bar per variant."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jmp_lite._messages import naming_extra
from jmp_lite.cli._bench_measure import Run, baseline_of
from jmp_lite.cli._bench_report import Setting, memory_source, peak, significant

_INK, _MUTED, _BASE, _OURS = "#1f2933", "#6b7785", "#a3adb8", "#2563a8"


class _Panel(NamedTuple):
    """A figure of a run beside that of float32: how long its bar is, and what stands at its end."""

    title: str
    value: Callable[[Run, Run], float]
    label: Callable[[Run, Run, Sequence[Run]], str]


_PANELS = (
    _Panel(
        "Speed over that of float32",
        lambda run, base: run.ratio_to(base),
        lambda run, base, _: f"{run.ratio_to(base):.2f}   {significant(run.rate)} {run.model.unit}/s",
    ),
    _Panel(
        "Peak memory over that of float32",
        lambda run, base: run.peak_bytes / base.peak_bytes,
        lambda run, base, all_: f"{run.peak_bytes / base.peak_bytes:.2f}   {peak(run, all_)}",
    ),
    _Panel(
        "Loss in the end, distance from float32",
        lambda run, base: abs(run.loss / base.loss - 1),
        lambda run, base, _: f"{run.loss:.4f}" + ("" if run is base else f"   {run.loss / base.loss - 1:+.2%}"),
    ),
)


def require_matplotlib() -> None:
    """Raises in time, before anything is measured.

    Raises:
        ModuleNotFoundError: It names the extra.
    """
    with naming_extra("jmp-lite bench --png", "analysis"):
        import matplotlib as mpl  # noqa: F401


def draw(path: str, setting: Setting, runs: Sequence[Run]) -> None:
    """Writes the figure to a file.

    Args:
        path: Of a PNG.
        setting: For the title.
        runs: Those that failed have no bars.
    """
    from matplotlib.figure import Figure

    models = dict.fromkeys(run.model.name for run in runs)
    of_model = [[run for run in runs if run.model.name == name] for name in models]
    heights = [0.33 * len(of) + 0.9 for of in of_model]
    figure = Figure(figsize=(13.5, sum(heights) + 0.8), layout="constrained")
    figure.suptitle(setting.title(), x=0.012, ha="left", fontsize=14, fontweight="bold", color=_INK)
    figure.supxlabel(_note(setting, runs), x=0.012, ha="left", fontsize=9, color=_MUTED)
    parts = figure.subfigures(len(models), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, of in zip(parts, of_model, strict=True):
        part.suptitle(f"{of[0].model.name}: {of[0].model.size}", x=0.012, ha="left", fontsize=11, color=_INK)
        for index, (axis, panel) in enumerate(zip(part.subplots(1, len(_PANELS)), _PANELS, strict=True)):
            _fill(axis, panel, of, has_names=index == 0)
    figure.savefig(path, dpi=150, format="png", bbox_inches="tight", pad_inches=0.25)


def _note(setting: Setting, runs: Sequence[Run]) -> str:
    speed = f"Speed: median of {setting.rounds} rounds in turns" + ("" if setting.is_optimized else ", not optimized")
    return f"{speed}. Peak memory: {memory_source(runs)}. Loss: at step {setting.steps} on one batch of random data."


def _fill(axis: Any, panel: _Panel, runs: Sequence[Run], *, has_names: bool) -> None:
    """Draws the bars of one panel."""
    base = baseline_of(runs, runs[0])
    values = [0.0 if run.error or base.error else panel.value(run, base) for run in runs]
    axis.barh(range(len(runs)), values, height=0.68, color=[_BASE if run is base else _OURS for run in runs])
    for place, (run, value) in enumerate(zip(runs, values, strict=True)):
        text = "failed" if run.error else "float32 failed" if base.error else panel.label(run, base, runs)
        at = {"xy": (value, place), "xytext": (5, 0), "textcoords": "offset points"}
        axis.annotate(text, **at, va="center", fontsize=9, color=_INK)
    axis.set_xlim(0, max(*values, 1e-9) * 1.75)  # room for the labels
    axis.set_ylim(len(runs) - 0.4, -0.6)
    axis.set_yticks(range(len(runs)), [run.variant if has_names else "" for run in runs], fontsize=10, color=_INK)
    axis.set_title(panel.title, fontsize=10, color=_MUTED, loc="left")
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.spines["left"].set_color(_MUTED)
