"""The gradients of `benchmarks.autocast` compiled for H100 and TPU v5e on a machine that has neither.

    pip install 'jmp_lite[aot]'
    python -m benchmarks.aot.autocast            # replaces its sections of RESULTS.md
    python -m benchmarks.aot.autocast --quick    # tiny models, in a few minutes

Bytes, kernels and scratch memory of the optimized program are exact; nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jmp_lite.analysis._estimation._compiled import _targets

_targets.configure()

import jax  # noqa: E402

from benchmarks import _command, _models, _precisions, _report, autocast  # noqa: E402
from benchmarks.aot.step import COMPILERS  # noqa: E402
from jmp_lite.analysis._estimation._compiled import _cost, _hlo  # noqa: E402

MODULE = "benchmarks.aot.autocast"
FIGURES = ("MB", "/ hand", "temp MB", "/ hand", "kernels", "XLA's MB")
HEADER = ("design", *FIGURES, *(f"leak: {name}" for name in FIGURES[:4]))
LEGEND = """- **MB**: bytes that the compiled gradient reads and writes (counted by `_cost.py`); **XLA's MB**: the
  same as XLA estimates it, where it does; **temp**: scratch memory; **kernels**: launches.
- **/ hand**: over Flax with `dtype=bfloat16`, softmax and loss in float32, with the same leak or none.
- **leak**: the same when one float32 constant touches the activations."""


class Program(NamedTuple):
    """Figures of one compiled gradient."""

    moved: float
    temp: float
    kernels: int
    accessed: float

    def cells(self, hand: Program) -> list[str]:
        """The figures as text, in the order of `FIGURES`."""
        number = _report.number
        return [
            number(self.moved / 1e6, 0),
            number(self.moved / hand.moved),
            number(self.temp / 1e6, 1),
            number(self.temp / hand.temp),
            str(self.kernels),
            number(self.accessed / 1e6, 0),
        ]


Programs = dict[str, tuple[Program, Program]]
"""Of each design: without and with the leak."""


def compiled(design: _precisions.Design, task: _models.Task, leak: bool, device: jax.Device) -> Program:
    """Compiles one gradient for `device` and reads its figures."""
    program = _targets.compiled(design.gradient(task, leak), task.shapes(), device)
    cost = _cost.cost(_hlo.parse(program.as_text()))
    temp = program.memory_analysis().temp_size_in_bytes
    return Program(cost.bytes, temp, cost.launches, autocast.accessed(program))


def measure(designs: Mapping[str, _precisions.Design], task: _models.Task, device: jax.Device) -> Programs:
    """Compiles all designs for `device`, without and with the leak."""
    found: Programs = {}
    for name, design in designs.items():
        sys.stderr.write(f"{task.title}: {name} ...\n")
        found[name] = (compiled(design, task, False, device), compiled(design, task, True, device))
    return found


def table(found: Programs) -> str:
    """One row per design."""
    plain, leaked = found[_precisions.BY_HAND]
    return _report.table(
        HEADER, [[name, *own.cells(plain), *with_leak.cells(leaked)[:4]] for name, (own, with_leak) in found.items()]
    )


def targets(found: Programs) -> list[_report.Target]:
    """The limits set for autocast, without and with the leak."""
    pairs = list(zip(found[_precisions.AUTOCAST], found[_precisions.BY_HAND], strict=True))
    return [
        _report.Target("MB / hand", 1.0, [own.moved / hand.moved for own, hand in pairs]),
        _report.Target("temp / hand", 1.0, [own.temp / hand.temp for own, hand in pairs]),
    ]


def report(target: str, options: argparse.Namespace) -> None:
    """Compiles everything for one target, prints its tables and writes its section.

    Raises:
      TargetUnavailableError: the wheels of the target's compiler are absent.
    """
    device = _targets.devices(target)[0]
    designs, missing = _precisions.available(options.skip_peers)
    facts = {
        "command": f"`{_report.command(MODULE)}`",
        "versions": _report.versions(COMPILERS[target]),
        "compiled for": f"{_targets.TARGETS[target]}, without one; kernel autotuning off",
        **{f"{name} left out": reason for name, reason in missing.items()},
    }
    parts = [LEGEND]
    sys.stdout.write(f"## {_targets.TARGETS[target]}\n\n")
    for name in options.models:
        task = _models.TASKS[name]
        found = measure(designs, task, device)
        held = "\n".join(limit.line() for limit in targets(found))
        parts.append(
            _command.show(f"### {task.title}\n\n{table(found)}\n\n`{_precisions.AUTOCAST}` on this model:\n\n{held}")
        )
    if options.out:
        section = f"autocast, {target} without a device, jax {jax.__version__}"
        title = f"Gradients in bfloat16 compiled for {_targets.TARGETS[target]}, jax {jax.__version__}"
        _report.write_section(options.out, section, title, facts, "\n\n".join(parts))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark for each target asked for; exits with a message if a compiler is absent."""
    made = autocast.parser(MODULE, __doc__)
    made.add_argument("--targets", nargs="+", choices=_targets.TARGETS, default=list(_targets.TARGETS))
    options = autocast.parse(made, argv)
    _targets.for_each(options.targets, lambda target: report(target, options))


if __name__ == "__main__":
    main()
