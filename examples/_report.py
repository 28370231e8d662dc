"""Table, curves and TensorBoard files of the runs."""

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from _history import History
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from rich import box
from rich.table import Table

# Okabe and Ito's palette, which readers of every color vision tell apart.
COLORS = ("#56B4E9", "#E69F00", "#004D80", "#CC79A7", "#009E73", "#D55E00")
SKIP_COLOR = "#B00020"
SMOOTHING = 15

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One trained policy. Times are None when a resumed run had nothing left to do."""

    history: History
    parameter_bytes: int
    activation_bytes: int
    compile_seconds: float | None
    steps_per_second: float | None

    @property
    def name(self) -> str:
        """The policy, as the user wrote it."""
        return self.history.policy

    @property
    def accuracy(self) -> float:
        """Fraction of test images classified correctly after the last step."""
        return self.history.accuracy[max(self.history.accuracy)]

    @property
    def loss_scale(self) -> float:
        """The loss scale after the last step."""
        return self.history.steps[-1]["loss_scale"]

    @property
    def skipped(self) -> int:
        """Steps whose gradients were not finite."""
        return int(self.history.curve("total_notfinite")[-1])


def power_of_two(value: float) -> str:
    """Writes 32768 as 2^15, and other numbers as they are."""
    exponent = np.log2(value)
    return f"2^{exponent:.0f}" if value != 1 and exponent == round(exponent) else f"{value:g}"


def table(results: list[Result]) -> Table:
    """The summary, one line per policy."""
    summary = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    summary.add_column("policy", overflow="fold")
    for column in (
        "test\naccuracy",
        "loss\nscale",
        "skipped\nsteps",
        "params\nKiB",
        "activations\nKiB",
        "compile\ns",
        "steps\nper s",
    ):
        summary.add_column(column, justify="right", no_wrap=True)
    for result in results:
        summary.add_row(
            result.name,
            f"{result.accuracy:.2%}",
            power_of_two(result.loss_scale),
            f"{result.skipped}",
            f"{result.parameter_bytes / 1024:.0f}",
            f"{result.activation_bytes / 1024:.0f}",
            "-" if result.compile_seconds is None else f"{result.compile_seconds:.1f}",
            "-" if result.steps_per_second is None else f"{result.steps_per_second:.0f}",
        )
    return summary


def log_to_tensorboard(folder: Path, history: History, start: int) -> None:
    """Writes the scalars of one run, from step ``start`` on, as an event file under ``folder/<policy>``."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder / history.policy.replace("=", "-")), purge_step=start) as writer:
        for step in range(start, len(history.steps)):
            for metric, value in history.steps[step].items():
                writer.add_scalar(f"train/{metric}", value, step)
            if step + 1 in history.accuracy:
                writer.add_scalar("test/accuracy", history.accuracy[step + 1], step)


# --- Curves ---------------------------------------------------------------------------------------


def draw(results: list[Result], title: str, file: Path) -> None:
    """Draws loss, test accuracy and loss scale over the steps."""
    with plt.rc_context(STYLE):
        figure, (loss, accuracy, scale) = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
        lines = line_styles(len(results))
        for result, line in zip(results, lines, strict=True):
            draw_loss(loss, result.history, line)
            _draw_accuracy(accuracy, result.history, line)
            draw_loss_scale(scale, result.history, line)
        _finish_loss(loss)
        _finish_accuracy(accuracy)
        finish_loss_scale(scale, [r.name for r in results if not is_scaled(r.history)])
        for panel in (loss, accuracy, scale):
            panel.set(xlabel="step", xlim=(0, 1.02 * max(len(r.history.steps) for r in results)))
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        _add_legend(figure, results, lines)
        figure.suptitle(title, x=0.012, ha="left", fontsize=13)
        figure.savefig(file, dpi=150)
        plt.close(figure)


def line_styles(count: int) -> list[dict[str, Any]]:
    """One style per curve, each thinner than the one below, so that curves on top of each other stay visible."""
    first = max(0, 3 - count)  # a run alone gets a strong color
    return [
        {
            "color": COLORS[(first + i) % len(COLORS)],
            "linewidth": 1.4 + 1.7 * min(2, count - 1 - i),
            "solid_joinstyle": "round",
            "zorder": 2 + i,
        }
        for i in range(count)
    ]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean, over fewer values at the ends; NaN and inf are left out."""
    kernel = np.ones(min(SMOOTHING, len(values)))
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    count = np.convolve(finite.astype(float), kernel, mode="same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def draw_loss(panel: plt.Axes, history: History, line: dict[str, Any]) -> None:
    """Draws the loss of every step, and its running mean over it."""
    loss = history.curve("loss")
    steps = np.arange(1, len(loss) + 1)
    panel.plot(steps, loss, color=line["color"], alpha=0.25, linewidth=0.7, zorder=1)
    panel.plot(steps, _smooth(loss), **line)


def _draw_accuracy(panel: plt.Axes, history: History, line: dict[str, Any]) -> None:
    steps, accuracy = zip(*sorted(history.accuracy.items()), strict=True)
    marker = {"marker": "o", "markersize": 3 + line["linewidth"]}
    panel.plot(steps, 100 * np.array(accuracy), **marker, **line)


def is_scaled(history: History) -> bool:
    """Whether the run had a loss scale."""
    return bool(np.any(history.curve("loss_scale") != 1))


def draw_loss_scale(panel: plt.Axes, history: History, line: dict[str, Any]) -> None:
    """Draws the loss scale of a run that has one, and marks the steps it skipped."""
    if not is_scaled(history):
        return
    scale = history.curve("loss_scale")
    panel.plot(np.arange(1, len(scale) + 1), scale, drawstyle="steps-post", **line)
    skipped = np.flatnonzero(history.curve("last_finite") == 0)
    too_high = scale[np.maximum(skipped - 1, 0)]
    panel.plot(skipped + 1, too_high, "x", color=SKIP_COLOR, markeredgewidth=1.6, zorder=20)


def _finish_loss(panel: plt.Axes) -> None:
    ylabel = f"cross-entropy [nats], mean of {SMOOTHING} steps"
    panel.set(title="Training loss", ylabel=ylabel, yscale="log")
    low, high = panel.get_ylim()
    panel.set_ylim(low / 1.2, high * 1.2)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_locator(NullLocator())


def _finish_accuracy(panel: plt.Axes) -> None:
    panel.set(title="Test accuracy", ylabel="correct [%]")
    low, high = panel.get_ylim()
    if high - low < 4:
        middle = min((low + high) / 2, 98.2)
        panel.set_ylim(middle - 2, middle + 2)
    if low < 30:
        panel.set_ylim(bottom=0)
        panel.axhline(10, color="0.45", linewidth=1, linestyle=":")
        panel.text(0.99, 11, "chance", transform=panel.get_yaxis_transform(), ha="right", color="0.35", fontsize=9)


def finish_loss_scale(panel: plt.Axes, unscaled: list[str]) -> None:
    """Labels the panel, and names the runs without a loss scale."""
    panel.set_title("Loss scale")
    if panel.lines:
        panel.set_ylabel("factor on the loss")
        panel.set_yscale("log", base=2)
        low, high = panel.get_ylim()
        panel.set_ylim(low / 2, high * 2)
        panel.yaxis.set_minor_locator(NullLocator())
    else:
        panel.set_yticks([])
    if unscaled:
        at = (0.98, 0.03) if panel.lines else (0.66, 0.5)
        note = f"not scaled: {', '.join(unscaled)}"
        panel.text(*at, note, transform=panel.transAxes, ha="right", color="0.35", fontsize=9)


def _add_legend(figure: plt.Figure, results: list[Result], lines: list[dict[str, Any]]) -> None:
    handles = [
        Line2D([], [], color=line["color"], linewidth=line["linewidth"], label=label)
        for line, label in zip(lines, (f"{r.name}: {100 * r.accuracy:.2f} % correct" for r in results), strict=True)
    ]
    if any(result.skipped for result in results):
        skip = {"color": SKIP_COLOR, "marker": "x", "linestyle": "", "markeredgewidth": 1.6}
        handles.append(Line2D([], [], label="step skipped: gradients not finite", **skip))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
