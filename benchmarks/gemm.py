"""Matmuls and Dense layers of 8-bit operands against bfloat16, in one interleaved run.

python -m benchmarks.gemm                 # 1024 to 16384 on a GPU, small ones on a CPU; replaces its section
python -m benchmarks.gemm --sizes 4096    # one size
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import _command, _measure, _products, _report

MODULE = "benchmarks.gemm"
SIZES = {"gpu": (1024, 2048, 4096, 8192, 16384), "cpu": (256, 512, 1024)}
HEADER = ("design", "product ms", "TFLOP/s", "/ bf16", "layer ms", "/ bf16", "error", "gradient error")
LEGEND = """One matmul of two n x n matrices that are quantized already; and a Dense layer of n features and
n rows, forward and backward (three matmuls; scales, rounding and casts included). `/ bf16`: median of the ratios
within each round. `error`: relative Frobenius distance of the layer's output, and of the gradient of its kernel, from
float32. A CPU has no units for float8: it computes the same numbers in float32, and its times say nothing about
accelerators."""
Call = Callable[[], Any]


class Row(NamedTuple):
    """Figures of one design at one size; seconds."""

    design: str
    n: int
    product: float
    product_ratio: float
    layer: float
    layer_ratio: float
    error: float
    gradient_error: float

    def cells(self) -> list[str]:
        """The row as text, in the order of `HEADER`."""
        number = _report.number
        return [
            self.design,
            number(self.product * 1e3, 3),
            number(2 * self.n**3 / self.product / 1e12, 1),
            number(self.product_ratio),
            number(self.layer * 1e3, 3),
            number(self.layer_ratio),
            number(self.error, 4),
            number(self.gradient_error, 4),
        ]


def _distance(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))


def errors(design: _products.Design, arrays: tuple[jax.Array, ...]) -> tuple[float, float]:
    """Errors of the output and of the gradient of the kernel against float32."""
    kernel, x, cotangent = arrays
    out, (of_kernel, _) = jax.jit(design.step)(design.variables(kernel), x, cotangent)
    x, cotangent = (array.astype(jnp.float32) for array in (x, cotangent))
    highest = jax.lax.Precision.HIGHEST
    exact = jnp.dot(x, kernel, precision=highest), jnp.dot(x.T, cotangent, precision=highest)
    of_kernel = of_kernel["params"]["kernel"] if isinstance(of_kernel, dict) else of_kernel
    return _distance(out, exact[0]), _distance(of_kernel, exact[1])


def measure(designs: Mapping[str, _products.Design], n: int, options: argparse.Namespace) -> list[Row]:
    """Times all designs at one size."""
    keys = jax.random.split(jax.random.key(n), 3)
    kernel, x, cotangent = (jax.random.normal(key, (n, n)) / n**0.5 for key in keys)
    x, cotangent = x.astype(jnp.bfloat16), cotangent.astype(jnp.bfloat16)
    products: dict[str, Call] = {}
    layers: dict[str, Call] = {}
    for name, design in designs.items():
        lhs, rhs = ((64 * array).astype(dtype) for array, dtype in zip((x, kernel), design.formats, strict=True))
        compiled, variables = jax.jit(design.product), design.variables(kernel)
        step = jax.jit(design.step)
        products[name] = lambda run=compiled, lhs=lhs, rhs=rhs: run(lhs, rhs)
        layers[name] = lambda run=step, variables=variables: run(variables, x, cotangent)
    for call in (*products.values(), *layers.values()):
        jax.block_until_ready(call())
    of_products, of_layers = (
        _measure.interleaved(calls, _products.BASELINE, rounds=options.rounds, steps=options.steps)
        for calls in (products, layers)
    )
    return [
        Row(name, n, *of_products[name], *of_layers[name], *errors(design, (kernel, x, cotangent)))
        for name, design in designs.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark, prints its tables and writes its section."""
    made = _command.parser(MODULE, __doc__, quick="one small size", baseline="bfloat16")
    made.add_argument("--sizes", nargs="+", type=int, help="features and rows (default: 1024 to 16384 on a GPU)")
    made.add_argument("--rounds", type=int, default=9, help="rounds of the interleaved run (default: 9)")
    made.add_argument("--steps", type=int, default=5, help="calls in a round (default: 5)")
    options = made.parse_args(argv)
    _command.fill_in_results_file(options)
    device = jax.devices()[0]
    sizes = options.sizes or ((256,) if options.quick else SIZES.get(device.platform, SIZES["gpu"]))
    designs, missing = _products.available(options.skip_peers)
    facts = {
        "command": f"`{_report.command(MODULE)}`",
        "versions": _report.versions(),
        "hardware": f"{device.device_kind}; {_report.hardware()}",
        "run": f"{options.rounds} rounds of {options.steps} calls each",
        **{f"{name} left out": reason for name, reason in missing.items()},
    }
    parts = [LEGEND]
    for n in sizes:
        rows = measure(designs, n, options)
        parts.append(_command.show(f"### n = {n}\n\n{_report.table(HEADER, [row.cells() for row in rows])}"))
    if options.out:
        name = f"gemm, {device.platform}, jax {jax.__version__}"
        title = f"Matmuls of 8-bit operands on {device.platform.upper()}, jax {jax.__version__}"
        _report.write_section(options.out, name, title, facts, "\n\n".join(parts))


if __name__ == "__main__":
    main()
