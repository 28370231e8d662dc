"""What XLA makes of a Dense layer of 8-bit operands and its gradient on H100, without one.

python -m benchmarks.aot.gemm    # 1024 to 16384, no multiples of 16, sequences, and a GPT; replaces its section
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

import jmp_lite as jmp
from benchmarks import _command, _models, _products, _report
from jmp_lite import quant
from jmp_lite.analysis._estimation._compiled import _cost, _hlo, _targets

MODULE = "benchmarks.aot.gemm"
TARGET = "h100"
COMPILERS = ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")
SIZES = (1024, 4096, 16384, 1000, 100)
SEQUENCES = {"(8, 512, 1024) x (1024, 4096)": ((8, 512, 1024), 4096)}
HEADER = ("design", "cuBLASLt calls", "operands", "scales inside", "precise", "kernels", "MB", "/ bf16", "temp / bf16")
LEGEND = """A Dense layer of n features on n rows, or on sequences, forward and backward: three matmuls. `operands`:
formats of the matmuls, as often as they occur. `scales inside`: calls that multiply by the scales themselves.
`precise`: calls that add up precisely; forward matmuls need not. `MB`: bytes that the program reads and writes. Kernel
autotuning is off, and matmuls are left to cuBLASLt (`--xla_gpu_enable_triton_gemm=false`). XLA makes one
matmul of several that share an operand."""
RECIPES = (None, "fp8", "fp8_rowwise", "int8_train")


class Product(NamedTuple):
    """One call of a matmul in compiled code."""

    target: str
    formats: tuple[str, str]
    has_scales: bool
    is_precise: bool


class Program(NamedTuple):
    """Figures of a compiled layer."""

    products: list[Product]
    kernels: int
    moved: float
    temp: float

    def cells(self, name: str, base: Program) -> list[str]:
        """The row as text, in the order of `HEADER`."""
        number = _report.number
        formats = Counter(" x ".join(product.formats) for product in self.products)
        return [
            name,
            str(sum(product.target.startswith("__cublas$lt$matmul") for product in self.products)),
            ", ".join(f"{count} {pair}" for pair, count in sorted(formats.items())),
            str(sum(product.has_scales for product in self.products)),
            str(sum(product.is_precise for product in self.products)),
            str(self.kernels),
            number(self.moved / 1e6, 1),
            number(self.moved / base.moved),
            number(self.temp / base.temp) if base.temp else "-",
        ]


def products(module: _hlo.Module) -> list[Product]:
    """The matmuls and convolutions among the custom calls of a module, and any that are left as they were."""
    found = []
    for computation in module.computations.values():
        lines = {line.name: line for line in computation}
        for line in computation:
            target = re.search(r'custom_call_target="(__cu(?:blas|dnn\$conv)[^"]*)"', line.attributes)
            if target is None and line.opcode not in {"dot", "convolution"}:
                continue
            name = target.group(1) if target else "dot"
            formats = [next(_hlo.arrays(lines[operand].shape))[0] for operand in line.operands[:2]]
            scales = line.operands[2:3] if name.endswith("$f8") else ()
            has_scales = any(lines[scale].opcode != "constant" for scale in scales)
            precise = '"operand_precision":["HIGHEST"' in line.attributes
            found.append(Product(name, (formats[0], formats[1]), has_scales, precise))
    return found


def compiled(step: Callable[..., Any], shapes: Any, device: jax.Device) -> Program:
    """Compiles a step."""
    program = _targets.compiled(step, shapes, device)
    module = _hlo.parse(program.as_text())
    cost = _cost.cost(module)
    return Program(products(module), cost.launches, cost.bytes, program.memory_analysis().temp_size_in_bytes)


def dense(designs: Mapping[str, _products.Design], layer: _products.Layer, device: jax.Device) -> dict[str, Program]:
    """A Dense layer in all designs at one size."""
    return {name: compiled(design.step, _products.shapes(design, layer), device) for name, design in designs.items()}


def models(task: _models.Task, device: jax.Device) -> dict[str, Program]:
    """The gradient of a model under autocast in mixed bfloat16, without and with recipes."""

    def gradient(dot: quant.DotRecipe | None) -> Callable[..., Any]:
        return jax.grad(jmp.autocast(task.loss(), "mixed_bfloat16", dot=dot), has_aux=True)

    dots = {f"jmp_lite {name}" if name else _products.BASELINE: name and quant.get_recipe(name) for name in RECIPES}
    dots |= {
        "jmp_lite fp8, all products": quant.FP8.replace(products="all"),
        "jmp_lite fp8, fixed scales": quant.FP8.static(lhs=16, rhs=1, grad=1),
    }
    return {name: compiled(gradient(dot), task.shapes(), device) for name, dot in dots.items()}


def targets(found: Mapping[str, Program], expected: int | None) -> list[_report.Target]:
    """The limits set for float8: so many calls and no other matmul in a layer, no matmul of two e5m2."""
    programs = [program for name, program in found.items() if name.startswith("jmp_lite fp8")]
    calls = [sum(p.target == "__cublas$lt$matmul$f8" for p in program.products) for program in programs]
    refused = [sum(p.formats == ("f8e5m2", "f8e5m2") for p in program.products) for program in programs]
    others = [len(program.products) - count for program, count in zip(programs, calls, strict=True)]
    always = [_report.Target("matmuls of e5m2 by e5m2", 0, refused)]
    if expected is None:
        return always
    differ = [abs(count - expected) for count in calls]
    return [
        _report.Target(f"float8 calls that differ from {expected}", 0, differ),
        _report.Target("other matmuls", 0, others),
        *always,
    ]


def table(title: str, found: Mapping[str, Program], expected: int | None) -> str:
    """One row per design, and the limits."""
    base = found[_products.BASELINE]
    cells = _report.table(HEADER, [program.cells(name, base) for name, program in found.items()])
    held = "\n".join(limit.line() for limit in targets(found, expected))
    return f"### {title}\n\n{cells}\n\n{held}"


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles everything, prints the tables and writes the section; exits with a message if a compiler is absent."""
    made = _command.parser(MODULE, __doc__, quick="one small size", baseline="bfloat16")
    made.add_argument("--sizes", nargs="+", type=int, help="features and rows (default: 1024 to 16384, 1000, 100)")
    options = made.parse_args(argv)
    _command.fill_in_results_file(options)
    _targets.configure("--xla_gpu_enable_triton_gemm=false")

    def report(target: str) -> None:
        device = _targets.devices(target)[0]
        designs, missing = _products.available(options.skip_peers)
        facts = {
            "command": f"`{_report.command(MODULE)}`",
            "versions": _report.versions(COMPILERS),
            "compiled for": f"{_targets.TARGETS[target]}, without one",
            **{f"{name} left out": reason for name, reason in missing.items()},
        }
        parts = [LEGEND]
        sizes = options.sizes or ((256,) if options.quick else SIZES)
        layers = {f"n = {n}": _products.square(n) for n in sizes}
        for title, layer in {**layers, **({} if options.quick else SEQUENCES)}.items():
            sys.stderr.write(f"{title} ...\n")
            parts.append(_command.show(table(title, dense(designs, layer, device), 3)))
        if not options.quick:
            task = _models.TASKS["gpt"]
            parts.append(_command.show(table(task.title, models(task, device), None)))
        if options.out:
            section = f"gemm, {target} without a device, jax {jax.__version__}"
            title = f"Matmuls of 8-bit operands compiled for {_targets.TARGETS[target]}, jax {jax.__version__}"
            _report.write_section(options.out, section, title, facts, "\n\n".join(parts))

    _targets.for_each([TARGET], report)


if __name__ == "__main__":
    main()
