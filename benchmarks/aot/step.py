"""The loss-scaled AdamW step compiled for H100 and TPU v5e on a machine that has neither.

    pip install 'jmp_lite[aot]'
    python -m benchmarks.aot.step            # replaces its sections of RESULTS.md
    python -m benchmarks.aot.step --quick    # a tiny tree, in a minute

Bytes, kernels, copies and aliasing of the optimized program are exact; only tracing and compiling are timed.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import NamedTuple

from jmp_lite.analysis._estimation._compiled import _targets

_targets.configure()

import jax  # noqa: E402

from benchmarks import _cli, _designs, _measure, _report  # noqa: E402

MODULE = "benchmarks.aot.step"
HEADER = (
    "design", "B/param", "/ ideal", "kernels", "kernels / bare", "copies", "alias", "temp",
    "trace / bare", "compile / bare",
)  # fmt: skip
COMPILERS = {
    "h100": ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"),
    "tpu": ("libtpu",),
}


class Row(NamedTuple):
    """Figures of one design on one tree."""

    design: str
    leaves: int
    program: _measure.Program
    kernels_over_bare: float
    trace_over_bare: float
    compilation_over_bare: float

    def cells(self) -> list[str]:
        """The row as text, in the order of `HEADER`."""
        program = self.program
        return [
            self.design,
            _report.number(program.bytes_per_parameter),
            _report.number(program.ideal_ratio),
            str(program.kernels),
            _report.number(self.kernels_over_bare),
            str(program.copies),
            f"{program.aliased:.2%}",
            _report.number(program.temp_bytes_per_parameter),
            _report.number(self.trace_over_bare, 1),
            _report.number(self.compilation_over_bare, 1),
        ]


def measure(
    designs: dict[str, _designs.Design], device: jax.Device, tree: str, grad_dtype: str
) -> tuple[list[Row], list[str]]:
    """Compiles all designs for `device` and reads their figures."""
    params, grads = _designs.abstract_trees(tree, grad_dtype)
    sharding = jax.sharding.SingleDeviceSharding(device)
    built = {name: _designs.built(design, params, grads, sharding) for name, design in designs.items()}
    programs = {name: _measure.program(step.compiled, params, grad_dtype) for name, step in built.items()}
    bare, bare_program = built[_designs.BARE], programs[_designs.BARE]
    rows = [
        Row(
            name,
            len(params),
            programs[name],
            programs[name].kernels / bare_program.kernels,
            step.trace / bare.trace,
            step.compilation / bare.compilation,
        )
        for name, step in built.items()
    ]
    return rows, []


def targets(rows: list[Row]) -> list[_report.Target]:
    """The limits set for the fused form on accelerators; those on kernels and traces are for many leaves."""
    fused = [row for row in rows if row.design == _cli.FUSED]
    limits = [
        _report.Target("bytes / ideal", 1.02, [row.program.ideal_ratio for row in fused]),
        _report.Target("copies", 0, [row.program.copies for row in fused]),
        _report.Target("output not aliased", 0, [1 - row.program.aliased for row in fused]),
        _report.Target("compile / bare", 1.6, [row.compilation_over_bare for row in fused]),
    ]
    traces = [row.trace_over_bare for row in fused if row.leaves >= 60]
    many = [row.kernels_over_bare for row in fused if row.leaves >= 300]
    limits += [_report.Target("trace / bare", 2.5, traces)] if traces else []
    return [*limits, _report.Target("kernels / bare", 1.05, many)] if many else limits


def report(target: str, options: argparse.Namespace) -> None:
    """Compiles everything for one target, prints its tables and writes its section.

    Raises:
      TargetUnavailableError: the wheels of the target's compiler are absent.
    """
    device = _targets.devices(target)[0]
    designs, missing = _designs.available(options.skip_peers)
    del designs[_designs.IDLE]
    facts = {
        "command": f"`{_report.command(MODULE)}`",
        "versions": _report.versions(COMPILERS[target]),
        "compiled for": f"{_targets.TARGETS[target]}, without one; kernel autotuning off",
        **{f"{name} left out": reason for name, reason in missing.items()},
    }
    sys.stdout.write(f"## {_targets.TARGETS[target]}\n\n")
    body = _cli.tables(options, HEADER, functools.partial(measure, designs, device), targets)
    if options.out:
        name = f"step, {target} without a device, jax {jax.__version__}"
        title = f"Loss-scaled AdamW step compiled for {_targets.TARGETS[target]}, jax {jax.__version__}"
        _report.write_section(options.out, name, title, facts, body)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark for each target asked for; exits with a message if a compiler is absent."""
    parser = _cli.parser(MODULE, __doc__)
    parser.add_argument("--targets", nargs="+", choices=_targets.TARGETS, default=list(_targets.TARGETS))
    options = _cli.parse(parser, argv)
    _targets.for_each(options.targets, lambda target: report(target, options))


if __name__ == "__main__":
    main()
