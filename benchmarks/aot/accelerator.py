"""The training steps of `benchmarks.accelerator` compiled for H100 without one: what memory they need.

pip install 'jmp_lite[aot]'
python -m benchmarks.aot.accelerator            # replaces its section of RESULTS.md; half an hour on two cores
python -m benchmarks.aot.accelerator --quick    # tiny models; written nowhere unless --out
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from jmp_lite.analysis._estimation._compiled import _targets

# LLVM's part changes no figure.
_targets.configure("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")

import jax  # noqa: E402

from benchmarks import _command, _report, _training_sizes, _training_turns  # noqa: E402
from benchmarks.accelerator import TEXTS  # noqa: E402
from benchmarks.aot import _section, gemm  # noqa: E402
from benchmarks.aot.step import COMPILERS  # noqa: E402
from jmp_lite.analysis._estimation._compiled import _cost, _hlo  # noqa: E402
from jmp_lite.analysis._estimation._devices import DEVICES  # noqa: E402
from jmp_lite.cli._bench_variants import VARIANTS  # noqa: E402

MODULE = "benchmarks.aot.accelerator"
TARGET = "h100"
HEADER = ("model", "variant", "arguments GB", "scratch GB", "in all GB", "moved GB", "kernels", "products by operands")
LEGEND = """One step: loss, gradient, AdamW, parameters and state donated. **In all**: arguments, outputs that are not
written in place, and scratch memory, as the compiler reserves them. **moved**: bytes that the program reads and writes
(counted by `_cost.py`; a loop as often as it runs). **matmuls by operands**: calls of cuBLAS and cuDNN, one in a loop
once; kernels that XLA writes itself do not count."""


def row(work: _training_turns.Workload, name: str, device: jax.Device) -> tuple[list[str], float]:
    """The figures of one step as text, and the bytes that it needs in all."""
    sys.stderr.write(f"{work.name}, {name} ...\n")
    variant = VARIANTS[name]
    begun = jax.eval_shape(variant.begin, work.task.shapes()[0])
    shapes = (*begun, jax.eval_shape(lambda: work.sizes.draw(0)))
    compiled = _targets.compiled(variant.step(work.loss_in), shapes, device, donate=(0, 1))
    memory, module = compiled.memory_analysis(), _hlo.parse(compiled.as_text())
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    in_all = memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes
    cost = _cost.cost(module)
    formats = Counter(" x ".join(product.formats) for product in gemm.products(module))
    figures = (memory.argument_size_in_bytes, memory.temp_size_in_bytes, in_all, cost.bytes)
    cells = [work.name, name, *(_report.number(figure / 1e9) for figure in figures), str(cost.launches)]
    return [*cells, ", ".join(f"{count} {pair}" for pair, count in sorted(formats.items()))], in_all


def report(options: argparse.Namespace) -> None:
    """Compiles everything, prints the table and writes the section."""
    device = _targets.devices(TARGET)[0]
    all_sizes = _training_sizes.TINY if options.quick else _training_sizes.full(TEXTS)
    workloads = [_training_turns.workload(name, all_sizes[name]) for name in options.models or all_sizes]
    found = [row(work, name, device) for work in workloads for name in options.variants or VARIANTS]
    sizes = "\n".join(f"- {work.name}: {work.sizes}" for work in workloads)
    limit = _report.Target("GB of a step", DEVICES[TARGET].memory / 1e9, [in_all / 1e9 for _, in_all in found])
    table = _report.table(HEADER, [cells for cells, _ in found])
    body = _command.show(f"{LEGEND}\n\n{sizes}\n\n{table}\n\n{limit.line()}")
    if options.out:
        _section.write(options.out, MODULE, body, target=TARGET, compilers=COMPILERS[TARGET], title="Training steps")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark; exits with a message if the compiler is absent."""
    made = _command.parser(MODULE, __doc__, quick="tiny models", baseline="Flax")
    made.add_argument("--models", nargs="+", choices=_training_sizes.TINY, help="default: all")
    made.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all")
    options = made.parse_args(argv)
    if not (options.models or options.variants):
        _command.fill_in_results_file(options)
    _targets.for_each([TARGET], lambda _: report(options))


if __name__ == "__main__":
    main()
