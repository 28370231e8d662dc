"""Tables and picture of the runs of ``lowbit.py``."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from _lowbit_models import Model
from _lowbit_training import Result
from _lowbit_variants import VARIANTS
from _report import STYLE
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from rich import box
from rich.table import Table

FEWEST_STEPS_OF_INSET = 100  # with fewer it would hide the curves
# Okabe and Ito's palette. Marks: circles compute in the precision that they were trained in, diamonds were quantized
# afterwards, squares are pruned.
MARKS = {
    "fp32": ("black", "o"),
    "bf16": ("#56B4E9", "o"),
    "fp8": ("#E69F00", "o"),
    "int8_qat": ("#004D80", "o"),
    "w8a16": ("#CC79A7", "D"),
    "w8a8": ("#7A3E9D", "D"),
    "sparse_80": ("#D55E00", "s"),
    "sparse_2_4": ("#009E73", "s"),
}


def score(model: Model, result: Result) -> str:
    """The score with its unit."""
    return f"{result.score:.2%} correct" if model.is_accuracy else f"{result.score:.3f} nats"


def difference(model: Model, result: Result, reference: Result) -> str:
    """How far the score is from that of the reference."""
    if result is reference:
        return ""
    if model.is_accuracy:
        return f"{100 * (result.score - reference.score):+.2f} pts"
    return f"{result.score / reference.score - 1:+.2%}"


def table(model: Model, results: list[Result]) -> Table:
    """The summary, one line per variant."""
    reference, *_ = results
    summary = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    summary.add_column("variant")
    summary.add_column("")
    name = "test\naccuracy" if model.is_accuracy else "held-out\nloss"
    for column in (name, f"over\n{reference.variant}", "weights\nKiB", "times\nsmaller", "of them\nzero"):
        summary.add_column(column, justify="right", no_wrap=True)
    for result in results:
        summary.add_row(
            result.variant,
            result.title,
            f"{result.score:.2%}" if model.is_accuracy else f"{result.score:.4f}",
            difference(model, result, reference),
            f"{result.num_bytes / 1024:.1f}",
            f"{reference.num_bytes / result.num_bytes:.2f}",
            f"{result.zeros:.1%}",
        )
    return summary


# --- Picture ----------------------------------------------------------------------------------------------------------


def draw(compared: list[tuple[Model, list[Result]]], title: str, file: Path) -> None:
    """Draws score against size, and the training loss: one row per model."""
    rows = len(compared)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(rows, 2, figsize=(13, 1.2 + 4.2 * rows), layout="constrained", squeeze=False)
        figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
        for (model, results), (sizes, training) in zip(compared, panels, strict=True):
            _draw_sizes(sizes, model, results)
            _draw_training(training, model, results)
        shown = {result.variant for _, results in compared for result in results}
        handles = [Line2D([], [], label=VARIANTS[name].title, **_mark(name)) for name in MARKS if name in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False, columnspacing=1.4)
        figure.suptitle(title, x=0.012, ha="left", fontsize=13)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
        plt.close(figure)


def _mark(name: str) -> dict[str, Any]:
    color, marker = MARKS[name]
    size = {"o": 11, "D": 6, "s": 9}[marker]  # one on top of another leaves both visible
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.8}
    return {"color": color, "marker": marker, "markersize": size, "linewidth": 0, **edge}


def _draw_sizes(panel: plt.Axes, model: Model, results: list[Result]) -> None:
    scores = (100 if model.is_accuracy else 1) * np.array([result.score for result in results])
    sizes = np.array([result.num_bytes / 1024 for result in results])
    low, high = scores.min(), scores.max()
    margin = max(0.15 * (high - low), 0.005 * high)
    panel.set(title=model.title, xscale="log", xlabel="weights on disk", xlim=(sizes[0] / 4.8, 1.75 * sizes[0]))
    panel.set(ylim=(low - margin, high + margin))
    panel.set_ylabel("test accuracy [%]" if model.is_accuracy else "held-out loss [nats per character]")
    parts = {1: "", 2: "a half", 4: "a quarter"}
    labels = [f"{sizes[0] / part:.0f} KiB\n{name}" for part, name in parts.items()]
    panel.set_xticks([sizes[0] / part for part in parts], labels)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.axhline(scores[0], color="0.45", linewidth=1, linestyle=":", zorder=1)
    for result, x, y in zip(results, sizes, scores, strict=True):
        panel.plot(x, y, zorder=3, **_mark(result.variant))
    for column in _columns(sizes):
        places = _apart(scores[column], *panel.get_ylim())
        for i, place in zip(column, places, strict=True):
            point, at = (sizes[i], scores[i]), (1.13 * sizes[column].max(), place)
            line = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4}
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            panel.annotate(results[i].title, point, at, va="center", fontsize=9, arrowprops=line, bbox=paper, zorder=2)


def _columns(sizes: np.ndarray) -> list[np.ndarray]:
    """Positions of points that are above one another, or nearly so."""
    order = np.argsort(sizes)
    return np.split(order, np.flatnonzero(np.diff(np.log(sizes[order])) > 0.3) + 1)


def _apart(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Heights for labels near their values, none over another."""
    gap = (high - low) / 18
    order = np.argsort(values, kind="stable")
    ranks = gap * np.arange(len(values))
    raised = np.maximum.accumulate(values[order] - ranks) + ranks
    lowered = np.minimum.accumulate((values[order] - ranks)[::-1])[::-1] + ranks
    places = np.empty(len(values))
    places[order] = (raised + lowered) / 2
    return places


def _draw_training(panel: plt.Axes, model: Model, results: list[Result]) -> None:
    trained = [result for result in results if result.losses]
    num_steps = len(trained[0].losses)
    width = max(1, num_steps // 20)
    panel.set(title="Training loss", xlabel="step", ylabel=f"nats, mean of {width} step{'s' * (width > 1)}")
    _draw_losses(panel, trained, width)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    if model.is_accuracy:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_locator(NullLocator())
    elif num_steps >= FEWEST_STEPS_OF_INSET:
        inset = panel.inset_axes((0.42, 0.36, 0.57, 0.55))
        _draw_losses(inset, trained, width, last=0.4)
        inset.set_title("the last steps", fontsize=9, fontweight="normal")
        inset.tick_params(labelsize=8)


def _draw_losses(panel: plt.Axes, results: list[Result], width: int, last: float = 1.0) -> None:
    """Running means over the last part of the steps, each curve thinner than the one below."""
    for i, result in enumerate(results):
        means = np.convolve(result.losses, np.full(width, 1 / width), mode="valid")
        steps = np.arange(len(means)) + (width + 1) / 2
        start = int((1 - last) * len(means))
        color, _ = MARKS[result.variant]
        panel.plot(steps[start:], means[start:], color=color, linewidth=1.2 + 0.3 * (len(results) - 1 - i))
