"""Every way to keep parameters and AdamW's state, compiled for H100 and TPU v5e on a machine that has neither.

    pip install 'jmp_lite[aot]'
    python -m benchmarks.aot.state            # replaces its sections of RESULTS.md
    python -m benchmarks.aot.state --quick    # a tiny tree, in a minute

The least that a step can move is the gradient once (twice where it is checked), and everything that is resident in and
out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jmp_lite.analysis._estimation._compiled import _targets

_targets.configure("--xla_backend_optimization_level=0")

import jax  # noqa: E402

from benchmarks import _command, _designs, _measure, _report, _storage  # noqa: E402
from jmp_lite.analysis._estimation._compiled import _cost, _hlo  # noqa: E402

MODULE = "benchmarks.aot.state"
HEADER = ("scheme", "resident", "ideal", "moved", "/ ideal", "kernels", "/ bare", "large", "copies", "alias", "scratch")
COMPILERS = {"h100": ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"), "tpu": ("libtpu",)}
TREES = ("one", "65", "300")


def row(
    name: str, scheme: _storage.Scheme, tree: str, device: jax.Device, bare: int
) -> tuple[list[str], dict[str, float]]:
    """The figures of one scheme as cells, and those that limits are set for."""
    params, state, grads = _storage.abstract(scheme, tree)
    count = _measure.parameter_count(params)
    program = _targets.compiled(scheme.step, (params, state, grads), device, donate=(0, 1))
    module = _hlo.parse(program.as_text())
    cost = _cost.cost(module)
    resident = _storage.nbytes((params, state))
    ideal = 2 * resident + (2 if scheme.loss_scaled else 1) * _storage.nbytes(grads)
    scratch = program.memory_analysis().temp_size_in_bytes / count
    alias = _hlo.aliased_fraction(module)
    figures = {
        "resident": resident / count,
        "ratio": cost.bytes / ideal,
        "kernels": cost.launches,
        "large": cost.large_launches,
        "scratch": scratch,
        "not aliased": 1 - alias,
    }
    cells = [
        name,
        _report.number(resident / count, 3),
        _report.number(ideal / count),
        _report.number(cost.bytes / count),
        _report.number(cost.bytes / ideal, 3),
        str(cost.launches),
        _report.number(cost.launches / bare) if bare else "1.00",
        str(cost.large_launches),
        str(cost.copies),
        f"{alias:.2%}",
        _report.number(scratch),
    ]
    return cells, figures


def tables(target: str, trees: Sequence[str]) -> str:
    """Compiles all schemes for one target; returns its tables as Markdown."""
    device = _targets.devices(target)[0]
    parts = []
    for tree in trees:
        rows = []
        bare = 0
        for name, scheme in (_storage.SCHEMES | _storage.LOSS_SCALED).items():
            sys.stderr.write(f"{target}, {tree}: {name} ...\n")
            cells, figures = row(name, scheme, tree, device, bare)
            bare = bare or int(figures["kernels"])
            rows.append(cells)
        parts.append(_command.show(f"### {_designs.TREES[tree]}\n\n{_report.table(HEADER, rows)}"))
    return "\n\n".join(parts)


def report(target: str, options: argparse.Namespace) -> None:
    """Prints the tables of one target and writes its section.

    Raises:
      TargetUnavailableError: the wheels of the target's compiler are absent.
    """
    facts = {
        "command": f"`{_report.command(MODULE)}`",
        "versions": _report.versions(COMPILERS[target]),
        "compiled for": f"{_targets.TARGETS[target]}, without one; kernel autotuning and LLVM optimization off",
        "columns": "bytes per parameter; kernels over those of bare Optax; large: launches of 1024 elements or more",
    }
    sys.stdout.write(f"## {_targets.TARGETS[target]}\n\n")
    body = tables(target, options.trees)
    if options.out:
        name = f"state, {target} without a device, jax {jax.__version__}"
        title = f"Parameters and AdamW's state compiled for {_targets.TARGETS[target]}, jax {jax.__version__}"
        _report.write_section(options.out, name, title, facts, body)


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles for each target asked for; exits with a message if a compiler is absent."""
    parser = _command.parser(MODULE, __doc__, quick="a tiny tree", baseline=None)
    parser.add_argument("--targets", nargs="+", choices=_targets.TARGETS, default=list(_targets.TARGETS))
    parser.add_argument("--trees", nargs="+", choices=_designs.TREES, help="parameter trees (default: one 65 300)")
    options = parser.parse_args(argv)
    options.trees = options.trees or (["tiny"] if options.quick else list(TREES))
    _command.fill_in_results_file(options)
    _targets.for_each(options.targets, lambda target: report(target, options))


if __name__ == "__main__":
    main()
