"""What the README claims in figures, each read from its table in RESULTS.md.

python -m benchmarks.readme     # writes the block between the markers of README.md again
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from benchmarks import _report

README = _report.RESULTS.parents[1] / "README.md"
_OPEN, _CLOSE = "<!-- figures: python -m benchmarks.readme -->\n", "<!-- end of figures -->\n"

GRADIENTS = ("GPT: 6 layers", "ResNet: 3 stages")
TREES = ("1 leaf", "65 leaves", "300 leaves")
STORED = {"5 bytes": "split8, 8bit", "4 bytes": "stochastic, 8bit"}
OURS, PEERS = "jmp_lite apply_gradients", ("jmp", "flax DynamicScale", "mpx", "optax.apply_if_finite")


class Table(NamedTuple):
    """A Markdown table; a column with a name that occurs before is ``"MB > / hand"``, the ``/ hand`` after ``MB``."""

    header: list[str]
    rows: list[list[str]]

    def cell(self, row: str, column: str) -> str:
        """The text in the row that begins with the cells of ``row``, which ``" | "`` divides.

        Raises:
          LookupError: if there is no such row or column, or more than one row.
        """
        *before, name = column.split(" > ")
        start = self.header.index(before[0]) + 1 if before else 0
        begin = row.split(" | ")
        [found] = [cells for cells in self.rows if cells[: len(begin)] == begin]
        return found[self.header.index(name, start)]

    def figures(self, column: str, rows: str = "") -> dict[str, float]:
        """The numbers of a column by the first cell of their rows: of all, or of those with ``rows`` in the second."""
        kept = [cells for cells in self.rows if not rows or cells[1] == rows]
        return {cells[0]: float(self.cell(" | ".join(cells[: 1 + bool(rows)]), column)) for cells in kept}


class Section(NamedTuple):
    """One section of RESULTS.md: the command that wrote it, and its tables under their headings."""

    command: str
    tables: list[tuple[str, Table]]

    def table(self, heading: str = "", holding: str = "") -> Table:
        """The first table under the heading that starts with ``heading`` and that has a column ``holding``."""
        return next(
            table
            for title, table in self.tables
            if title.startswith(heading) and (not holding or holding in table.header)
        )


def sections(text: str) -> dict[str, Section]:
    """The sections of RESULTS.md by the titles of their headings, without the version of JAX."""
    found = {}
    for body in re.findall(r"<!-- section: .*? -->\n(.*?)<!-- end of section -->", text, re.DOTALL):
        [title] = re.findall(r"^## (.*?)(?:, jax [\d.]+)?$", body, re.MULTILINE)
        [command] = re.findall(r"^- command: `?(python [^`\n]*?)`?$", body, re.MULTILINE)
        found[title] = Section(command, list(_tables(body)))
    return found


def _tables(body: str) -> Iterator[tuple[str, Table]]:
    heading: str = ""
    lines: list[list[str]] = []
    for line in [*body.splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
        elif lines:
            yield heading, Table(lines[0], lines[2:])
            lines = []
        if line.startswith("### "):
            heading = line[4:]


class Claim(NamedTuple):
    """One row of the README: figures by what they are of, the better ones being the smaller unless told otherwise."""

    text: str
    figures: Mapping[str, float]
    command: str
    larger_is_better: bool = False

    def line(self) -> str:
        """A row of a Markdown table: the best figure, the worst, and the command that measures both."""
        ordered = sorted(self.figures, key=self.figures.__getitem__, reverse=self.larger_is_better)
        best, worst = (f"{figure(self.figures[name])} ({name})" for name in (ordered[0], ordered[-1]))
        return f"| {self.text} | {best} | {worst} | `{self.command.split(' --')[0].removeprefix('python -m ')}` |"


def figure(value: float) -> str:
    """Two decimals, and as many more as two digits of a small number need."""
    return f"{value:.2g}" if 0 < abs(value) < 0.1 else f"{value:.2f}"


def ratio(top: Mapping[str, float], bottom: Mapping[str, float]) -> dict[str, float]:
    """Figures over others of the same names."""
    return {name: top[name] / bottom[name] for name in top}


def memory(found: Mapping[str, Section]) -> Iterator[Claim]:
    """Bytes and scratch memory of gradients under autocast."""
    models = found["Gradients of ten models compiled for NVIDIA H100 80GB HBM3"]
    table = models.table(holding="autocast: MB / hand")
    by_hand = table.figures("autocast: MB / hand")
    yield Claim(
        "bytes that a gradient moves on an H100, over float32",
        ratio(by_hand, table.figures("float32: MB / hand")),
        models.command,
    )
    yield Claim("the same, over bfloat16 written by hand", by_hand, models.command)
    yield Claim(
        "scratch memory of that gradient, over bfloat16 by hand", table.figures("autocast: temp / hand"), models.command
    )
    yield Claim(
        "the same with `reduce=bfloat16`, which rounds gradients of weights as by hand",
        table.figures("autocast, r=bfloat16: temp / hand"),
        models.command,
    )
    tpu = found["Gradients in bfloat16 compiled for TPU v5e"]
    yield Claim(
        "bytes on a TPU v5e, over bfloat16 by hand",
        _of_gradients(tpu, "jmp_lite autocast", "MB > / hand"),
        tpu.command,
    )
    cpu = found["Gradients in bfloat16 on CPU"]
    yield Claim(
        '`residuals="low"`: bytes kept for the backward pass, over bfloat16 by hand',
        _of_gradients(cpu, 'jmp_lite autocast, residuals="low"', "residuals MB > / hand"),
        cpu.command,
    )
    text = "matmuls in bfloat16, where one float32 constant touches the activations"
    yield Claim(text, _shares(cpu, ["jmp_lite autocast"]), cpu.command, larger_is_better=True)
    yield Claim("the same with casts by jmp and mpx", _shares(cpu, ["jmp", "mpx"]), cpu.command, larger_is_better=True)


def accuracy(found: Mapping[str, Section]) -> Iterator[Claim]:
    """Gradient errors in models from packages."""
    zoo = found["Models from packages"]
    table = zoo.table(holding="own bfloat16")
    table = table._replace(rows=[row for row in table.rows if not table.cell(row[0], "low").startswith("0/")])
    yield Claim(
        f"error of a bfloat16 gradient, over that of the model's own bfloat16; {len(table.rows)} models from packages",
        table.figures("/ own"),
        zoo.command,
    )
    yield Claim("relative error of their float16 gradients", table.figures("float16"), zoo.command)


def state(found: Mapping[str, Section]) -> Iterator[Claim]:
    """AdamW with parameters and state in 4 and 5 bytes."""
    training = found["Trainings with parameters and state in few bytes"]
    losses = {"digits": "digits ResNet, AdamW", "GPT": "character GPT, AdamW", "MLP": "MLP, AdamW"}
    yield Claim(
        "training loss with weights and AdamW's state in 4 or 5 bytes per parameter, over float32's 12",
        {
            f"{name}, {size}": float(training.table(heading).cell(scheme, "/ float32"))
            for name, heading in losses.items()
            for size, scheme in STORED.items()
        },
        training.command,
    )
    h100 = found["Parameters and AdamW's state compiled for NVIDIA H100 80GB HBM3"]
    bare = {tree: float(h100.table(tree).cell("optax.adamw, float32", "moved")) for tree in TREES}
    moved = {
        f"{tree}, {size}": float(h100.table(tree).cell(scheme, "moved")) / bare[tree]
        for tree in TREES
        for size, scheme in STORED.items()
    }
    yield Claim("bytes that the step of AdamW moves on an H100, over float32", moved, h100.command)
    step = training.table("Step of AdamW on this CPU")
    times = {size: float(step.cell(scheme, "/ bare")) for size, scheme in STORED.items()}
    yield Claim("time of that step on a CPU, which these formats are not made for", times, training.command)


def float8(found: Mapping[str, Section]) -> Iterator[Claim]:
    """Roofline estimates of programs compiled for an H100."""
    compiled = found["Estimates against programs compiled for NVIDIA H100 80GB HBM3"]
    table = compiled.table(holding="precision")
    speedup = ratio(table.figures("ms", "bfloat16"), table.figures("ms", "FP8"))
    text = "speed-up of FP8 over bfloat16 on an H100: a roofline estimate of compiled programs"
    yield Claim(text, speedup, compiled.command, larger_is_better=True)


def loss_scaling(found: Mapping[str, Section]) -> Iterator[Claim]:
    """The cost of a checked, loss-scaled AdamW step."""
    step = found["Loss-scaled AdamW step on CPU"]
    text = "time of a loss-scaled AdamW step on a CPU, over AdamW alone"
    yield Claim(text, _of_trees(step, [OURS], "time / bare"), step.command)
    yield Claim("the same for jmp, mpx, Flax and Optax", _of_trees(step, PEERS, "time / bare"), step.command)
    compiled = "Loss-scaled AdamW step compiled for"
    h100, v5e = found[f"{compiled} NVIDIA H100 80GB HBM3"], found[f"{compiled} TPU v5e"]
    for text, section, column in (
        ("bytes that it moves on an H100, over the least possible", h100, "/ ideal"),
        ("kernels that it launches there, over AdamW alone", h100, "kernels / bare"),
        ("kernels on a TPU v5e, over AdamW alone", v5e, "kernels / bare"),
        ("its compile time for an H100, over AdamW alone", h100, "compile / bare"),
    ):
        yield Claim(text, _of_trees(section, [OURS], column), section.command)


def _of_trees(section: Section, designs: Iterable[str], column: str) -> dict[str, float]:
    """Figures by the tree of parameters and the dtype of its gradients, and by the design where there are several."""
    found = {}
    for design in designs:
        for heading, table in section.tables:
            tree, _, gradients = heading.split(", ")
            name = f"{tree}, {gradients.removesuffix(' gradients')}"
            found[name if design == OURS else f"{design}, {name}"] = float(table.cell(design, column))
    return found


def _shares(section: Section, designs: Iterable[str]) -> dict[str, float]:
    """Of all matmuls, those with bfloat16 operands, written as ``"111/111"``."""
    return {
        f"{name.split(':')[0]}, {design.removesuffix(' autocast')}": int(low) / int(every)
        for design in designs
        for name in GRADIENTS
        for low, every in [section.table(name).cell(design, "with leak").split("/")]
    }


def _of_gradients(section: Section, design: str, column: str) -> dict[str, float]:
    return {name.split(":")[0]: float(section.table(name).cell(design, column)) for name in GRADIENTS}


GROUPS = {
    "Memory and bytes": memory,
    "Accuracy": accuracy,
    "Optimizer state": state,
    "FP8": float8,
    "Cost of loss scaling": loss_scaling,
}


def block(results: str) -> str:
    """The README's table, best and worst figure of each claim side by side."""
    found = sections(results)
    lines = ["| | best | worst | `python -m benchmarks.…` |", "|---|--:|--:|---|"]
    for title, claims in GROUPS.items():
        lines += [f"| **{title}** | | | |", *(claim.line().replace("`benchmarks.", "`") for claim in claims(found))]
    return "\n".join(lines) + "\n"


def quoted(readme: str) -> str:
    """What stands between the markers of a README."""
    return readme.partition(_OPEN)[2].partition(_CLOSE)[0]


def main() -> None:
    """Writes the block again."""
    text = README.read_text()
    README.write_text(text.replace(_OPEN + quoted(text), _OPEN + block(_report.RESULTS.read_text())))


if __name__ == "__main__":
    main()
