"""The figures of a report, for PNG files and for pages."""

import contextlib
import functools
import io
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jmp_lite._messages import naming_extra
from jmp_lite.analysis._ranges._formats import FORMATS
from jmp_lite.analysis._ranges._range import Range
from jmp_lite.analysis._ranges._ranges import Row
from jmp_lite.analysis._reports._rows import Entry, History, shortened
from jmp_lite.analysis._reports._series import HeatMap, Timeline, heat_maps_of, histograms_of, timelines_of

#: Okabe and Ito's colors, which all kinds of color vision tell apart.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
_FORMAT_COLORS = dict(zip(FORMATS, (BLUE, GREEN, PURPLE, SKY), strict=True))
_SHORT = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
#: Stands for the color of text, which a page sets.
_INK = "#010203"
#: Pixels of a PNG are these times inches; a figure is 13 inches wide.
_DPI = 100
#: Culprits that are named in a timeline; more would hide it.
_NAMED = 6
#: Digits as exponents: Matplotlib takes a fifth of a second to set the labels of a logarithmic axis in mathtext.
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
#: Around one histogram, as shares of the figure: a page has one for each row, and each takes a while to lay out.
_MARGINS = {"left": 0.16, "right": 0.985, "bottom": 0.165, "top": 0.91}
#: Marks NaN and infinities.
_BROKEN = "\N{MULTIPLICATION SIGN}"
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "jmp_lite",
}


class Picture(NamedTuple):
    """A figure of a page.

    Attributes:
        title: What it shows.
        svg: The figure.
    """

    title: str
    svg: str


def save_png(
    entries: Sequence[Entry], histories: Sequence[History], name: str, folder: pathlib.Path
) -> tuple[pathlib.Path, ...]:
    """Draws all plots of a report, and returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs, maps, lines = histograms_of(histories, name), [*heat_maps_of(histories, name)], [*timelines_of(entries)]
    figures: list[tuple[str, str, Callable[[], Any]]] = []
    if pairs:
        figures.append(("histograms", f"Exponents, the worst for {name} first", lambda: _histograms(pairs, name)))
    for number, one in enumerate(maps):
        stem = f"modules_{number}" if number else "modules"
        figures.append((stem, "Modules by steps", functools.partial(_heat_map, one, name)))
    if lines:
        figures.append(("loss_scale", "Loss scale by steps", lambda: _timelines(lines)))
    files = []
    for stem, title, draw in figures:
        with _styled("#222222"):
            figure = draw()
            figure.suptitle(title, fontsize=13, x=0.01, ha="left", weight="bold")
            files.append(folder / f"{stem}.png")
            figure.savefig(files[-1], dpi=_DPI, facecolor="white")
    return tuple(files)


def histogram_pictures(histories: Sequence[History], name: str) -> Iterator[Picture]:
    """Draws one histogram of exponents for each row."""
    pairs = histograms_of(histories, name)
    span = _span(pairs, name)
    for row, r in pairs:
        yield Picture(str(row), _svg(functools.partial(_one_histogram, row, r, name, span)))


def heat_map_pictures(histories: Sequence[History], name: str) -> Iterator[Picture]:
    """Draws modules by steps."""
    for one in heat_maps_of(histories, name):
        yield Picture("Modules by steps", _svg(functools.partial(_heat_map, one, name)))


def timeline_pictures(entries: Sequence[Entry]) -> Iterator[Picture]:
    """Draws the loss scale by steps."""
    lines = [*timelines_of(entries)]
    if lines:
        yield Picture("Loss scale by steps", _svg(lambda: _timelines(lines)))


@contextlib.contextmanager
def _styled(ink: str) -> Iterator[None]:
    with naming_extra("analysis", "analysis"):
        import matplotlib as mpl
    inks: tuple[Any, ...] = (
        "text.color",
        "axes.labelcolor",
        "axes.edgecolor",
        "xtick.color",
        "ytick.color",
        "axes.titlecolor",
    )
    with mpl.rc_context({**_STYLE, **dict.fromkeys(inks, ink)}):
        yield


def _svg(draw: Callable[[], Any]) -> str:
    """Returns a figure as SVG for a page, in the text color of the page."""
    file = io.StringIO()
    with _styled(_INK):
        draw().savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace(_INK, "currentColor")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


# --- Histograms ---


def _histograms(pairs: Sequence[tuple[Row, Range]], name: str) -> Any:
    columns = min(3, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure = _figure(13, 0.9 + 2.9 * rows)
    span = _span(pairs, name)
    axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axis, (row, r) in zip(axes, pairs, strict=False):
        _draw_histogram(axis, r, name, span)
        axis.set_title(shortened(str(row), 46), parse_math=False)
    for axis in axes[len(pairs) :]:
        axis.remove()
    return figure


def _one_histogram(row: Row, r: Range, name: str, span: tuple[int, int]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3, 2.9))
    axis = figure.subplots(gridspec_kw=_MARGINS)
    _draw_histogram(axis, r, name, span)
    axis.set_title(shortened(str(row), 48), parse_math=False)
    return figure


def _span(pairs: Sequence[tuple[Row, Range]], name: str) -> tuple[int, int]:
    """Returns the exponents that panels show: those that occur, and the window of the format."""
    found = [exponent for _, r in pairs for exponent in r.exponents]
    least, _, largest = _window(name) if name in FORMATS else (-8, 0, 8)
    shown = (max(least, -40), min(largest, 20))
    return min([*found, shown[0]]) - 2, max([*found, shown[1]]) + 3


def _window(name: str) -> tuple[int, int, int]:
    """Returns the exponents of the smallest subnormal and normal number of a format, and of the largest."""
    info: Any = jnp.finfo(name)  # type: ignore[no-untyped-call]
    numbers = (info.smallest_subnormal, info.smallest_normal, info.max)
    least, normal, largest = (math.floor(math.log2(float(number))) for number in numbers)
    return least, normal, largest


def _draw_histogram(axis: Any, r: Range, name: str, span: tuple[int, int]) -> None:
    total = sum(r.exponents.values())
    exponents = np.array(sorted(r.exponents))
    shares = np.array([r.exponents[e] / total for e in exponents])
    axis.bar(exponents, shares, width=0.85, align="edge", color=[_color(e, name) for e in exponents])
    floor = 10.0 ** math.floor(math.log10(min(shares.min() / 2, 1e-3)))
    axis.set_yscale("log")
    axis.set_ylim(floor, (1 / floor) ** 0.6 * 2)  # the formats are above the bars
    axis.set_xlim(*span)
    powers = range(round(math.log10(floor)), 1, 1 if floor > 1e-4 else 2)
    axis.set_yticks([10.0**k for k in powers], [f"10{str(k).translate(_RAISED)}" for k in powers])
    axis.minorticks_off()
    axis.set_xlabel("exponent: numbers from 2ᵉ to 2ᵉ⁺¹")
    axis.set_ylabel("share")
    if name in FORMATS:
        least, normal, largest = _window(name)
        axis.axvspan(normal, largest + 1, color=_FORMAT_COLORS[name], alpha=0.10, lw=0)
        axis.axvspan(least, normal, color=ORANGE, alpha=0.12, lw=0)
    for number, one in enumerate(FORMATS):
        _draw_window(axis, one, 0.95 - 0.075 * number)
    fate = r.fates[name]
    zero = r.zero / max(r.count, 1)
    figures = {"zeros": zero, "overflow": fate.overflow, "underflow": fate.underflow, "subnormal": fate.subnormal}
    said = " · ".join(f"{key} {100 * value:.3g} %" for key, value in figures.items() if value)
    axis.text(0.01, 0.655, said, transform=axis.transAxes, fontsize=8.5, va="center")


def _draw_window(axis: Any, name: str, height: float) -> None:
    """Draws the range of a format, subnormal numbers paler."""
    least, normal, largest = _window(name)
    for start, end, alpha in ((least, normal, 0.35), (normal, largest + 1, 0.85)):
        axis.axvspan(start, end, height - 0.02, height + 0.02, color=_FORMAT_COLORS[name], alpha=alpha, lw=0)
    low, high = axis.get_xlim()
    place = min(largest + 1, high) - 0.006 * (high - low)
    at = {"transform": axis.get_xaxis_transform(), "ha": "right", "va": "center", "fontsize": 7}
    ink = "black" if name in _SHORT else "white"  # on pale bars and on dark ones
    axis.text(place, height, _SHORT.get(name, name), color=ink, weight="bold", **at)


def _color(exponent: int, name: str) -> str:
    if name not in FORMATS:
        return BLUE
    least, normal, largest = _window(name)
    return VERMILION if not least <= exponent <= largest else ORANGE if exponent < normal else BLUE


# --- Modules by steps ---


def _heat_map(found: HeatMap, name: str) -> Any:
    count = len(found.modules)
    figure = _figure(13, 1.6 + 0.24 * max(count, 6))
    left, right = figure.subplots(1, 2, sharey=True)
    largest, lost = np.ma.masked_invalid(found.largest), np.ma.masked_equal(100 * found.lost, 0)
    share = {"cmap": "YlOrRd", "vmin": 0, "vmax": max(1.0, 100 * float(found.lost.max()))}
    for axis, values, label, style in (
        (left, largest, "Largest magnitude, binary logarithm", {"cmap": "cividis"}),
        (right, lost, f"Lost in {name}, % of the numbers", share),
    ):
        mesh = axis.pcolormesh(values, edgecolors="face", linewidth=0.4, rasterized=values.size > 5000, **style)
        figure.colorbar(mesh, ax=axis, pad=0.01, aspect=30)
        axis.set_title(label)
        axis.set_xlabel("step")
        for y, x in np.argwhere(found.broken):
            color = {"color": "white"} if axis is left else {}
            axis.text(x + 0.5, y + 0.5, _BROKEN, ha="center", va="center", weight="bold", fontsize=9, **color)
        every = max(1, math.ceil(len(found.steps) / 8))
        axis.set_xticks(np.arange(0, len(found.steps), every) + 0.5, list(map(str, found.steps[::every])))
        axis.tick_params(length=0)
    left.set_yticks(np.arange(count) + 0.5, [shortened(one, 44) for one in found.modules], parse_math=False)
    left.invert_yaxis()
    mark = f"; {_BROKEN} NaN or infinity" if found.broken.any() else ""
    right.set_title(f"Lost in {name}, % of the numbers{mark}")
    return figure


# --- Loss scale by steps ---


def _timelines(lines: Sequence[Timeline]) -> Any:
    figure = _figure(13, 0.6 + 3.4 * len(lines))
    for axis, line in zip(np.ravel(figure.subplots(len(lines), 1, squeeze=False)), lines, strict=True):
        _draw_timeline(axis, line)
    return figure


def _draw_timeline(axis: Any, line: Timeline) -> None:
    axis.step(line.steps, line.scales, where="post", color=BLUE, lw=1.8, label="loss scale")
    scales = dict(zip(line.steps, line.scales, strict=True))
    if line.skips:
        steps = [step for step, _ in line.skips]
        label = f"skipped steps ({sum(n for _, n in line.skips)})"
        heights = [scales[step] for step in steps]
        axis.scatter(steps, heights, marker="v", s=42, color=VERMILION, zorder=3, label=label)
    axis.set_yscale("log", base=2)
    low, high = math.log2(max(min(line.scales), 2.0**-126)), math.log2(max(*line.scales, 2.0**-126))
    named = line.culprits[:_NAMED]
    room = max(2.0, 0.4 * (high - low)) if named else 0.5
    axis.set_ylim(2 ** (low - 0.5), 2 ** (high + 0.5 + room))
    for number, (step, said) in enumerate(named):
        text = f"{step}: {shortened(said, 40)}"
        height = 0.95 - 0.09 * (number % 3)
        axis.axvline(step, color=VERMILION, alpha=0.35, lw=1, zorder=0)
        side = "right" if step > (line.steps[0] + line.steps[-1]) / 2 else "left"
        place = {"transform": axis.get_xaxis_transform(), "ha": side, "va": "center", "fontsize": 8.5}
        axis.text(step, height, f" {text} ", color=VERMILION, parse_math=False, **place)
    axis.set_xlabel("step")
    axis.set_ylabel(f"loss scale{f' of {line.name}' if line.name else ''}", parse_math=False)
    axis.grid(axis="y", alpha=0.25)
    axis.margins(x=0.01)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2)
