"""The gradient of a GPT and of a ResNet in bfloat16: jmp_lite's autocast, by hand in Flax, jmp and mpx.

python -m benchmarks.autocast            # both models; replaces its section of RESULTS.md
python -m benchmarks.autocast --quick    # tiny models, in a minute or two
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import _command, _jaxprs, _measure, _models, _precisions, _report

MODULE = "benchmarks.autocast"
HEADER = (
    "design", "matmuls", "backward", "with leak", "residuals MB", "/ hand", "converts", "/ hand", "trace s", "/ hand",
    "compile s", "/ hand", "temp MB", "accessed MB", "gradient error", "ms", "/ hand",
)  # fmt: skip
LEGEND = """- **matmuls**: of the forward pass's matmuls and convolutions, those of two bfloat16 operands;
  **backward**: of the backward pass's; **with leak**: of both, when one float32 constant touches the activations.
- **residuals**: arrays that the closure of `jax.vjp` holds, each once and without the arguments; **converts**: between
  floating dtypes in the jaxpr of the gradient.
- **trace**, **compile**: processor time, the least of the rounds of one interleaved run, each of a new function;
  compile holds lowering.
- **temp**, **accessed**: scratch memory and bytes accessed, as XLA says of the compiled gradient.
- **gradient error**: |gradient - float32 gradient| / |float32 gradient|, over all parameters.
- **/ hand**: over Flax with `dtype=bfloat16`, softmax and loss in float32."""


class Trace(NamedTuple):
    """Figures of the traced gradient, exact and independent of the machine."""

    forward: _jaxprs.Products
    both: _jaxprs.Products
    leaked: _jaxprs.Products
    residuals: int
    converts: int


class Built(NamedTuple):
    """The compiled gradient and the least processor time to get there, in seconds."""

    compiled: Any
    trace: float
    compile: float


class Row(NamedTuple):
    """All figures of one design on one model; `step` is NaN where no step was timed."""

    design: str
    trace: Trace
    built: Built
    error: float
    step: float
    step_ratio: float

    def cells(self, hand: Row) -> list[str]:
        """The row as text, in the order of `HEADER`."""
        number, trace, built = _report.number, self.trace, self.built
        return [
            self.design,
            str(trace.forward),
            str(trace.both - trace.forward),
            str(trace.leaked),
            number(trace.residuals / 1e6, 1),
            number(trace.residuals / hand.trace.residuals),
            str(trace.converts),
            number(trace.converts / hand.trace.converts),
            number(built.trace),
            number(built.trace / hand.built.trace),
            number(built.compile),
            number(built.compile / hand.built.compile),
            number(built.compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
            number(accessed(built.compiled) / 1e6, 0),
            f"{self.error:.4f}",
            number(self.step * 1e3, 2),
            number(self.step_ratio),
        ]


def accessed(compiled: Any) -> float:
    """Bytes accessed as XLA estimates them; NaN where it gives no estimate."""
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return float((cost or {}).get("bytes accessed", math.nan))


def trace(design: _precisions.Design, task: _models.Task) -> Trace:
    """Reads the figures of one design off its jaxprs."""
    shapes, dtype = task.shapes(), _precisions.COMPUTE

    def products(function: Callable[..., Any]) -> _jaxprs.Products:
        return _jaxprs.products(jax.make_jaxpr(function)(*shapes).jaxpr, dtype)

    gradient = jax.make_jaxpr(design.gradient(task))(*shapes).jaxpr
    return Trace(
        products(design.loss(task, False)),
        _jaxprs.products(gradient, dtype),
        products(design.gradient(task, leak=True)),
        _jaxprs.residual_bytes(design.loss(task, False), *shapes),
        _jaxprs.converts(gradient),
    )


def build(
    designs: Mapping[str, _precisions.Design], task: _models.Task, *, traces: int, compiles: int
) -> dict[str, Built]:
    """Traces and compiles the gradients in turns; more often traces than compiles, as that takes less time."""
    shapes = task.shapes()
    traced: dict[str, list[float]] = {name: [] for name in designs}
    taken: dict[str, list[float]] = {name: [] for name in designs}
    programs: dict[str, Any] = {}
    for index, names in enumerate(_measure.rotated(list(designs), traces)):
        for name in names:
            gradient = jax.jit(designs[name].gradient(task))
            gc.collect()
            start = time.process_time()
            staged = gradient.trace(*shapes)
            traced[name].append(time.process_time() - start)
            if index < compiles:
                start = time.process_time()
                programs[name] = staged.lower().compile()
                taken[name].append(time.process_time() - start)
    return {name: Built(programs[name], min(traced[name]), min(taken[name])) for name in designs}


def flat_gradient(outputs: Any) -> np.ndarray:
    """The gradients in one vector, from what a compiled gradient returns."""
    leaves = jax.tree.leaves(outputs[1])
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])


def errors(built: Mapping[str, Built], arguments: Any) -> dict[str, float]:
    """Distance of each gradient from that in float32, relative to the latter's length."""
    gradients = {name: flat_gradient(made.compiled(*arguments)) for name, made in built.items()}
    exact = gradients[_precisions.FLOAT32]
    length = np.linalg.norm(exact)
    return {name: float(np.linalg.norm(found - exact) / length) for name, found in gradients.items()}


def time_steps(
    built: Mapping[str, Built], arguments: Any, *, rounds: int, steps: int
) -> dict[str, tuple[float, float]]:
    """Median seconds of a gradient, and median over the rounds of its ratio to the one written by hand."""
    calls = {name: functools.partial(made.compiled, *arguments) for name, made in built.items()}
    return _measure.interleaved(calls, _precisions.BY_HAND, rounds=rounds, steps=steps)


def measure(
    designs: Mapping[str, _precisions.Design], task: _models.Task, options: argparse.Namespace
) -> dict[str, Row]:
    """All figures of all designs on one model."""
    built = build(designs, task, traces=options.repeats, compiles=options.compiles)
    arguments = task.arguments()
    error = errors(built, arguments)
    steps = dict.fromkeys(designs, (math.nan, math.nan))
    if options.time:
        steps = time_steps(built, arguments, rounds=options.repeats, steps=options.steps)
    return {name: Row(name, trace(designs[name], task), built[name], error[name], *steps[name]) for name in designs}


def targets(rows: Mapping[str, Row]) -> list[_report.Target]:
    """The limits set for autocast."""
    hand, ours, low = (rows[name] for name in (_precisions.BY_HAND, _precisions.AUTOCAST, _precisions.SAVE_LOW))
    counted = [products for row in (ours, low) for products in (row.trace.both, row.trace.leaked)]
    make = _report.Target
    return [
        make("matmuls not in bfloat16", 0, [products.total - products.wanted for products in counted]),
        make("residuals / hand", 1.1, [ours.trace.residuals / hand.trace.residuals]),
        make('residuals / hand, residuals="low"', 0.9, [low.trace.residuals / hand.trace.residuals]),
        make("converts / hand", 1.1, [ours.trace.converts / hand.trace.converts]),
        make("trace / hand", 1.4, [ours.built.trace / hand.built.trace]),
        make("compile / hand", 1.2, [ours.built.compile / hand.built.compile]),
        make("gradient error / hand", 1.0, [ours.error / hand.error]),
        make("step / hand", 1.02, [ours.step_ratio]),
    ]


def avoid_wrong_code() -> None:
    """Switches off the fusion with which XLA on CPU computes some bfloat16 programs wrongly."""
    flag, flags = "--xla_cpu_experimental_ynn_fusion_type=", os.environ.get("XLA_FLAGS", "")
    if (0, 11) <= jax.__version_info__[:2] <= (0, 12) and flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The options common to this benchmark and to the one without a device."""
    made = _command.parser(module, description, quick="tiny models", baseline="Flax")
    made.add_argument("--models", nargs="+", choices=_models.TASKS, help="default: gpt resnet")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line and fills in the defaults that depend on `--quick`."""
    options = made.parse_args(argv)
    options.models = options.models or (["tiny-gpt", "tiny-resnet"] if options.quick else ["gpt", "resnet"])
    _command.fill_in_results_file(options)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark, prints its tables and writes its section."""
    made = parser(MODULE, __doc__)
    made.add_argument("--repeats", type=int, help="rounds of tracing, and of timing (default: 7)")
    made.add_argument("--compiles", type=int, help="rounds that compile too (default: 3)")
    made.add_argument("--steps", type=int, default=10, help="consecutive gradients in a round (default: 10)")
    made.add_argument("--time", action="store_true", help="time the gradient on the CPU too, where it says little")
    options = parse(made, argv)
    options.repeats = options.repeats or (3 if options.quick else 7)
    options.compiles = min(options.compiles or (1 if options.quick else 3), options.repeats)
    avoid_wrong_code()
    device = jax.devices()[0]
    options.time |= device.platform != "cpu"
    designs, missing = _precisions.available(options.skip_peers)
    facts = {
        "command": f"`{_report.command(MODULE)}`",
        "versions": _report.versions(),
        "hardware": f"{device.device_kind}; {_report.hardware()}",
        "run": f"{options.repeats} rounds, of which {options.compiles} compile",
        **{f"{name} left out": reason for name, reason in missing.items()},
    }
    parts = [LEGEND]
    for name in options.models:
        task = _models.TASKS[name]
        rows = measure(designs, task, options)
        hand = rows[_precisions.BY_HAND]
        table = _report.table(HEADER, [row.cells(hand) for row in rows.values()])
        held = "\n".join(target.line() for target in targets(rows))
        parts.append(_command.show(f"### {task.title}\n\n{table}\n\n`{_precisions.AUTOCAST}` on this model:\n\n{held}"))
    if options.out:
        section = f"autocast, {device.platform}, jax {jax.__version__}"
        title = f"Gradients in bfloat16 on {device.platform.upper()}, jax {jax.__version__}"
        _report.write_section(options.out, section, title, facts, "\n\n".join(parts))


if __name__ == "__main__":
    main()
