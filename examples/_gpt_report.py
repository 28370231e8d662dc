"""Table and curves of the runs of ``gpt.py``."""

import dataclasses
import itertools
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from _history import History
from _report import (
    SKIP_COLOR,
    SMOOTHING,
    STYLE,
    draw_loss,
    draw_loss_scale,
    finish_loss_scale,
    is_scaled,
    line_styles,
    power_of_two,
)
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table

LAST_EVALUATIONS = 3
UNIFORM = "every character equally likely"


@dataclasses.dataclass(frozen=True)
class Result:
    """One trained policy; ``held_out`` maps the number of steps taken to a loss in nats per character."""

    history: History
    held_out: dict[int, float]
    sample: str
    compile_seconds: float
    steps_per_second: float | None

    @property
    def name(self) -> str:
        """The policy, as the user wrote it."""
        return self.history.policy

    @property
    def final_loss(self) -> float:
        """Mean of the last evaluations."""
        return statistics.fmean(list(self.held_out.values())[-LAST_EVALUATIONS:])


def table(results: list[Result]) -> Table:
    """The summary, one line per policy."""
    summary = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    summary.add_column("policy", overflow="fold")
    first, *_ = results
    columns = ("held-out\nloss", f"over\n{first.name}", "loss\nscale", "skipped\nsteps", "compile\ns", "steps\nper s")
    for column in columns:
        summary.add_column(column, justify="right", no_wrap=True)
    for result in results:
        speed = result.steps_per_second
        summary.add_row(
            result.name,
            f"{result.final_loss:.4f}",
            f"{result.final_loss / first.final_loss - 1:+.2%}",
            power_of_two(result.history.steps[-1]["loss_scale"]),
            f"{result.history.curve('total_notfinite')[-1]:.0f}",
            f"{result.compile_seconds:.1f}",
            "-" if speed is None else f"{speed:.0f}",
        )
    return summary


def draw(results: list[Result], uniform: float, title: str, file: Path) -> None:
    """Draws training loss, held-out loss and loss scale over the steps; ``uniform`` is the loss of knowing nothing."""
    with plt.rc_context(STYLE):
        figure, (loss, held_out, scale) = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
        lines = line_styles(len(results))
        for result, line in zip(results, lines, strict=True):
            draw_loss(loss, result.history, line)
            marker = {"marker": "o", "markersize": 1 + line["linewidth"]}
            held_out.plot(list(result.held_out), list(result.held_out.values()), **marker, **line)
            draw_loss_scale(scale, result.history, line)
        loss.set(title="Training loss", ylabel=f"nats per character, mean of {SMOOTHING} steps")
        held_out.set(title="Held-out loss", ylabel="nats per character")
        for panel in (loss, held_out):
            panel.axhline(uniform, color="0.45", linewidth=1, linestyle=":")
            place = {"transform": panel.get_yaxis_transform(), "ha": "right", "va": "bottom"}
            panel.text(0.99, uniform, UNIFORM, color="0.35", fontsize=9, **place)
            panel.set_ylim(top=1.06 * max(uniform, panel.dataLim.ymax))
        finish_loss_scale(scale, [result.name for result in results if not is_scaled(result.history)])
        for panel in (loss, held_out, scale):
            panel.set(xlabel="step", xlim=(0, 1.02 * max(len(result.history.steps) for result in results)))
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        labels = [f"{result.name}: {result.final_loss:.3f} nats" for result in results]
        handles = list(itertools.starmap(_handle, zip(labels, lines, strict=True)))
        if any((result.history.curve("last_finite") == 0).any() for result in results):
            skip = {"color": SKIP_COLOR, "marker": "x", "linestyle": "", "markeredgewidth": 1.6}
            handles.append(Line2D([], [], label="step skipped: gradients not finite", **skip))
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(title, x=0.012, ha="left", fontsize=13)
        figure.savefig(file, dpi=150)
        plt.close(figure)


def _handle(label: str, line: dict[str, float | str]) -> Line2D:
    return Line2D([], [], color=line["color"], linewidth=line["linewidth"], label=label)
