"""The gradients of ten models compiled for H100 without one: by hand in bfloat16, under autocast, and in float32.

    pip install 'jmp_lite[aot]'
    python -m benchmarks.aot.models                           # replaces its section of RESULTS.md, in some minutes
    python -m benchmarks.aot.models --models ViT,LSTM         # these alone; written nowhere unless --out
    python -m benchmarks.aot.models --models ViT --differ 20  # and which launches autocast and by hand differ in

Bytes, kernels and scratch memory of the optimized program are exact; nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jmp_lite.analysis._estimation._compiled import _targets

# All matmuls by cuBLAS, as casts that XLA puts into its own would not show; LLVM's part changes no figure.
_targets.configure(
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import jmp_lite as jmp  # noqa: E402
from benchmarks import _command, _report, _zoo  # noqa: E402
from benchmarks.aot import _differences, _section, gemm  # noqa: E402
from benchmarks.aot.step import COMPILERS  # noqa: E402
from jmp_lite.analysis._estimation._compiled import _cost, _hlo  # noqa: E402

MODULE = "benchmarks.aot.models"
TARGET = "h100"
BY_HAND, AUTOCAST, NARROW, FLOAT32 = "by hand", "autocast", "autocast, r=bfloat16", "float32"
POLICIES = {AUTOCAST: "mixed_bfloat16", NARROW: "p=float32,c=bfloat16,o=float32,r=bfloat16"}
FIGURES = ("MB", "temp MB", "kernels", "float32 matmuls")
RATIOS = ("MB / hand", "temp / hand", "kernels / hand", FIGURES[3])
HEADER = (
    "model",
    *(f"{BY_HAND}: {name}" for name in FIGURES),
    *(f"{form}: {name}" for form in (*POLICIES, FLOAT32) for name in RATIOS),
)
LEGEND = """`jax.value_and_grad` of each loss by its float32 parameters. **By hand**: weights cast where they are used,
so that their gradients leave each matmul in bfloat16; statistics, softmax, loss, rotary positions, routers, cell and
recurrent states in float32. **autocast**: `"mixed_bfloat16"`, under which gradients of weights leave in float32.
**autocast, r=bfloat16**: with `reduce=bfloat16` they leave in bfloat16, as by hand. **MB**: bytes that the compiled
program reads and writes, loops as often as they run (counted by `_cost.py`). **temp**: scratch memory.
**float32 matmuls**: matmuls and convolutions of two float32 operands in the compiled program, one in a loop
once. Kernel autotuning is off, and matmuls are left to cuBLASLt."""
LIMITS = {"LSTM": 1.02}
"""What autocast may move over by hand where it is not 1."""
TEMP_LIMIT = 1.02


class Program(NamedTuple):
    """Figures of one compiled gradient."""

    moved: float
    temp: float
    kernels: int
    products: int

    @classmethod
    def of(cls, compiled: Any, module: _hlo.Module) -> Program:
        """Reads the figures of a program and of its text."""
        cost = _cost.cost(module)
        precise = sum(product.formats == ("f32", "f32") for product in gemm.products(module))
        return cls(cost.bytes, compiled.memory_analysis().temp_size_in_bytes, cost.launches, precise)

    def over(self, hand: Program) -> tuple[float, float, float]:
        """Bytes, scratch memory and kernels over those of another program."""
        return self.moved / hand.moved, self.temp / hand.temp, self.kernels / hand.kernels

    def cells(self, hand: Program) -> list[str]:
        """The figures as text, in the order of `RATIOS`."""
        return [*(_report.number(ratio, 3) for ratio in self.over(hand)), str(self.products)]


def forms(model: _zoo.Model, residuals: str) -> dict[str, Callable[[Any, Any], jax.Array]]:
    """The loss of (parameters, batch) in every form; new functions each time."""

    def in_dtype(dtype: Any) -> Callable[[Any, Any], jax.Array]:
        return lambda params, batch: model.loss(params, batch, dtype)

    mixed = {
        form: jmp.autocast(in_dtype(jnp.float32), policy, residuals=residuals) for form, policy in POLICIES.items()
    }
    return {BY_HAND: in_dtype(jnp.bfloat16), **mixed, FLOAT32: in_dtype(jnp.float32)}


def row(name: str, found: Mapping[str, Program]) -> list[str]:
    """The figures of a model as text, in the order of `HEADER`."""
    hand, number = found[BY_HAND], _report.number
    own = [number(hand.moved / 1e6, 0), number(hand.temp / 1e6, 1), str(hand.kernels), str(hand.products)]
    return [name, *own, *(cell for form in (*POLICIES, FLOAT32) for cell in found[form].cells(hand))]


def targets(name: str, found: Mapping[str, Program]) -> list[_report.Target]:
    """The limits set for autocast on a model."""
    limits = []
    for form in POLICIES:
        moved, temp, _ = found[form].over(found[BY_HAND])
        limits += [
            _report.Target(f"{name}, {form}: MB / hand", LIMITS.get(name, 1.0), [moved]),
            _report.Target(f"{name}, {form}: temp / hand", TEMP_LIMIT, [temp]),
        ]
    return limits


def measure(name: str, options: argparse.Namespace, device: jax.Device) -> dict[str, Program]:
    """Compiles one model in every form, and prints what they differ in where that is asked for."""
    model, found, texts = _zoo.MODELS[name], {}, {}
    for form, loss in forms(model, options.residuals).items():
        sys.stderr.write(f"{name}: {form} ...\n")
        compiled = _targets.compiled(jax.value_and_grad(loss), (model.params, model.batch), device)
        texts[form] = compiled.as_text()
        found[form] = Program.of(compiled, _hlo.parse(texts[form]))
    if options.differ:
        one, other = (_differences.launches(texts[form]) for form in (AUTOCAST, BY_HAND))
        _command.show(_differences.text(f"{name}, {AUTOCAST}", one, other, options.differ))
        _command.show(_differences.text(f"{name}, {BY_HAND}", other, one, options.differ))
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    made = _command.parser(MODULE, __doc__, quick="one model", baseline="nothing")
    made.add_argument("--models", default=",".join(_zoo.MODELS), help="names with commas (default: all)")
    made.add_argument("--residuals", choices=("all", "low"), default="all", help="of autocast (default: all)")
    made.add_argument(
        "--differ", type=int, default=0, metavar="N", help="print the N most expensive launches that differ"
    )
    options = made.parse_args(argv)
    options.models = ["MoE"] if options.quick else options.models.split(",")
    if unknown := set(options.models) - set(_zoo.MODELS):
        made.error(f"unknown models {sorted(unknown)}: expected some of {list(_zoo.MODELS)}")
    if len(options.models) == len(_zoo.MODELS):
        _command.fill_in_results_file(options)
    return options


def report(options: argparse.Namespace) -> None:
    """Compiles everything, prints the table and writes the section."""
    device = _targets.devices(TARGET)[0]
    found = {name: measure(name, options, device) for name in options.models}
    sizes = "\n".join(f"- {name}: {_zoo.MODELS[name].sizes}" for name in found)
    table = _report.table(HEADER, [row(name, programs) for name, programs in found.items()])
    held = "\n".join(limit.line() for name, programs in found.items() for limit in targets(name, programs))
    body = _command.show(f"{LEGEND}\n\n{sizes}\n\n{table}\n\n{held}")
    if options.out:
        _section.write(
            options.out, MODULE, body, target=TARGET, compilers=COMPILERS[TARGET], title="Gradients of ten models"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark; exits with a message if the compiler is absent."""
    options = parse(argv)
    _targets.for_each([TARGET], lambda _: report(options))


if __name__ == "__main__":
    main()
