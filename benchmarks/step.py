"""The loss-scaled AdamW step: jmp_lite and its peers against bare Optax, in one interleaved run.

python -m benchmarks.step            # all trees and gradients; replaces its section of RESULTS.md
python -m benchmarks.step --quick    # a tiny tree, in a minute
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax

from benchmarks import _cli, _designs, _measure, _probe, _report

MODULE = "benchmarks.step"
MANY_LEAVES = 100
HEADER = (
    "design", "time / bare", "ms", "skipped / bare", "B/param", "/ ideal",
    "kernels", "copies", "alias", "temp", "difference", "skips", "trace / bare", "compile / bare",
)  # fmt: skip


class Row(NamedTuple):
    """All figures of one design on one tree; `claims` says whether it is meant to skip bad steps."""

    design: str
    claims: bool
    timing: _measure.Timing
    program: _measure.Program
    verdict: _measure.Verdict
    trace_over_bare: float
    compilation_over_bare: float

    def cells(self) -> list[str]:
        """The row as text, in the order of `HEADER`."""
        number, program, timing = _report.number, self.program, self.timing
        return [
            self.design,
            number(timing.ratio),
            number(timing.step * 1e3, 1),
            number(timing.skipped_ratio),
            number(program.bytes_per_parameter),
            number(program.ideal_ratio),
            str(program.kernels),
            str(program.copies),
            f"{program.aliased:.2%}",
            number(program.temp_bytes_per_parameter),
            f"{self.verdict.difference:.0e}" if self.claims else "-",
            ("yes" if self.verdict.skips else "NO") if self.claims else "-",
            number(self.trace_over_bare, 1),
            number(self.compilation_over_bare, 1),
        ]


def measure(
    available: dict[str, _designs.Design], options: argparse.Namespace, tree: str, grad_dtype: str
) -> tuple[list[Row], list[str]]:
    """Compiles, checks and times all designs on one tree."""
    params, grads = _designs.abstract_trees(tree, grad_dtype)
    limit = options.compile_limit
    notes = []
    designs = dict(available)
    probed = len(params) >= MANY_LEAVES and jax.default_backend() == "cpu"
    for name in available:
        if probed and not _probe.compiles_within(name, tree, grad_dtype, limit):
            notes.append(f"{name}: not compiled within {limit:g} s.")
            del designs[name]
    built = {name: _designs.built(design, params, grads) for name, design in designs.items()}
    programs, bare = {name: step.compiled for name, step in built.items()}, built[_designs.BARE]
    timings = _measure.time_interleaved(designs, programs, params, grads, repeats=options.repeats, steps=options.steps)
    rows = [
        Row(
            name,
            design.skips,
            timings[name],
            _measure.program(programs[name], params, grad_dtype),
            _measure.verify(design, grad_dtype),
            built[name].trace / bare.trace,
            built[name].compilation / bare.compilation,
        )
        for name, design in designs.items()
    ]
    return rows, notes


def targets(rows: list[Row]) -> list[_report.Target]:
    """The limits set for the fused form on CPU."""
    fused = [row for row in rows if row.design == _cli.FUSED]
    return [
        _report.Target("bytes / ideal", 1.40, [row.program.ideal_ratio for row in fused]),
        _report.Target("time / bare", 2.0, [row.timing.ratio for row in fused]),
        _report.Target("skipped / bare", 0.6, [row.timing.skipped_ratio for row in fused]),
        _report.Target("copies", 0, [row.program.copies for row in fused]),
        _report.Target("output not aliased", 0, [1 - row.program.aliased for row in fused]),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark, prints its tables and writes its section."""
    parser = _cli.parser(MODULE, __doc__)
    parser.add_argument("--repeats", type=int, help="rounds of the interleaved run (default: 15)")
    parser.add_argument(
        "--compile-limit", type=float, default=180.0, help="seconds to compile a tree of many leaves (default: 180)"
    )
    parser.add_argument("--steps", type=int, default=2, help="consecutive steps in a round (default: 2)")
    options = _cli.parse(parser, argv)
    options.repeats = options.repeats or (3 if options.quick else 15)
    designs, missing = _designs.available(options.skip_peers)
    device = jax.devices()[0]
    facts = {
        "command": f"`{_report.command(MODULE)}`",
        "versions": _report.versions(),
        "hardware": f"{device.device_kind}; {_report.hardware()}",
        "run": f"{options.repeats} rounds of {options.steps} steps each",
        **{f"{name} left out": reason for name, reason in missing.items()},
    }
    body = _cli.tables(options, HEADER, functools.partial(measure, designs, options), targets)
    if options.out:
        name = f"step, {device.platform}, jax {jax.__version__}"
        title = f"Loss-scaled AdamW step on {device.platform.upper()}, jax {jax.__version__}"
        _report.write_section(options.out, name, title, facts, body)


if __name__ == "__main__":
    main()
