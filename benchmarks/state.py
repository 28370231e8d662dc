"""Trainings with every way to keep parameters and state: losses beside float32, and the time of a step.

    pip install -e '.[examples]'
    python -m benchmarks.state            # 40 minutes on two cores; replaces its section of RESULTS.md
    python -m benchmarks.state --quick    # the perceptron and one seed

Bytes and kernels on accelerators: `benchmarks.aot.state`.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import _command, _designs, _measure, _report, _storage, _trainings
from benchmarks._storage import BARE, SCHEMES

MODULE = "benchmarks.state"
EIGHT_BIT = ("split8, 8bit", "stochastic, 8bit")
SOME = (BARE, "nearest", *EIGHT_BIT)
#: Of a learning rate; beside it that rate as a multiple of the problem's, at which it trains about as far as AdamW.
OPTIMIZERS: Mapping[str, tuple[Callable[[Any], Any], float]] = {
    "SGD, momentum 0.9": (lambda rate: optax.sgd(rate, momentum=0.9), 25.0),
    "Lion": (optax.lion, 0.2),
    "Adafactor": (lambda rate: optax.adafactor(rate, momentum=0.9), 5.0),
    "Muon": (optax.contrib.muon, 5.0),
}
LEGEND = f"""Mean training loss of the last {_trainings.LAST} steps, over seeds, and in brackets the distance between
the largest and the smallest of them. `/ float32`: of the means. The model sees parameters in bfloat16, computes in
float32, and its gradients are bfloat16; with float32 all is float32. `digits ResNet` and `character GPT` are those of
`examples/`, the MLP learns a random one. Learning rates fall to zero along a cosine."""


def seeds_of(options: argparse.Namespace) -> range:
    return range(1 if options.quick else 3)


def loss_rows(
    problem: _trainings.Problem,
    schemes: Sequence[str],
    inner: Callable[[Any], Any],
    seeds: Sequence[int],
    factor: float = 1.0,
) -> tuple[list[list[str]], dict[str, list[list[float]]]]:
    """One row for each scheme, and its losses of all steps for each seed."""
    rows, curves = [], {}
    for name in schemes:
        sys.stderr.write(f"{name} ...\n")
        train = functools.partial(_trainings.train, problem, SCHEMES[name], inner, rate=factor * problem.rate)
        curves[name] = [train(seed) for seed in seeds]
        finals = [_trainings.final(losses) for losses in curves[name]]
        mean = statistics.mean(finals)
        ratio = mean / statistics.mean(map(_trainings.final, curves[schemes[0]]))
        spread = max(finals) - min(finals)
        rows.append([name.removeprefix("optax.adamw, "), f"{mean:.4g} ({spread:.2g})", _report.number(ratio, 3)])
    return rows, curves


def time_rows(tree: str) -> list[list[str]]:
    """Seconds of a step on this machine, over bare Optax in the same run."""
    calls = {}
    for name, scheme in SCHEMES.items():
        shapes, _, grads = _storage.abstract(scheme, tree)
        params = _measure.random_tree(shapes, 0, 1.0)
        grads = _measure.random_tree(grads, 1, 1e-3)
        step = jax.jit(scheme.step)
        state = scheme.optimizer().init(params)
        jax.block_until_ready(step(params, state, grads))
        calls[name] = functools.partial(step, params, state, grads)
    timed = _measure.interleaved(calls, BARE, rounds=7, steps=3)
    return [[name, f"{1e3 * seconds:.1f} ms", _report.number(ratio)] for name, (seconds, ratio) in timed.items()]


def draw(curves: Mapping[str, list[list[float]]], path: Path) -> None:
    """Losses over steps, of the first seed, averaged over so many neighbors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, losses in curves.items():
        smooth = np.convolve(losses[0], np.full(_trainings.LAST, 1 / _trainings.LAST), "valid")
        axes.plot(np.arange(len(smooth)) + _trainings.LAST, smooth, label=name, linewidth=1.3)
    axes.set(xlabel="step", ylabel=f"training loss, mean of {_trainings.LAST} steps", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def body(options: argparse.Namespace) -> str:
    """All tables as Markdown."""
    parts = [LEGEND]
    header = ("scheme", "loss", "/ float32")
    problems = ["MLP"] if options.quick else list(_trainings.PROBLEMS)
    for name in problems:
        problem = _trainings.PROBLEMS[name]()
        schemes = SOME if options.quick else [name for name, scheme in SCHEMES.items() if scheme.mu_dtype is None]
        rows, curves = loss_rows(problem, schemes, optax.adamw, seeds_of(options))
        parts.append(_command.show(f"### {name}, AdamW, {problem.steps} steps\n\n{_report.table(header, rows)}"))
        if name == "MLP" and options.picture:
            draw({key: curves[key] for key in SOME}, options.picture)
    problem = _trainings.PROBLEMS["MLP"]()
    for name, (inner, factor) in {} if options.quick else OPTIMIZERS.items():
        rows, _ = loss_rows(problem, SOME, inner, seeds_of(options), factor)
        parts.append(_command.show(f"### MLP, {name}\n\n{_report.table(header, rows)}"))
    tree = "tiny" if options.quick else "300"
    rows = time_rows(tree)
    about = "No accelerator: this says what a test on a laptop costs, and not what the formats are for."
    table = _report.table(("scheme", "step", "/ bare"), rows)
    parts.append(_command.show(f"### Step of AdamW on this CPU, {_designs.TREES[tree]}\n\n{about}\n\n{table}"))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = _command.parser(MODULE, __doc__, quick="the perceptron and one seed", baseline="optax.adamw")
    parser.add_argument("--picture", type=Path, help="where to draw the losses of the MLP")
    options = parser.parse_args(argv)
    _command.fill_in_results_file(options)
    text = body(options)
    if options.out:
        facts = {
            "command": f"`{_report.command(MODULE)}`",
            "versions": _report.versions(),
            "hardware": _report.hardware(),
        }
        name = f"state, jax {jax.__version__}"
        title = f"Trainings with parameters and state in few bytes, jax {jax.__version__}"
        _report.write_section(options.out, name, title, facts, text)


if __name__ == "__main__":
    main()
