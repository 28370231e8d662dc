"""Matmuls of few terms compiled for H100 without one: where casting their operands costs more than it saves.

python -m benchmarks.aot.contractions    # replaces its section of RESULTS.md

Bytes and kernels of the optimized program are exact; nothing is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jmp_lite.analysis._estimation._compiled import _targets

_targets.configure("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from benchmarks import _command, _report  # noqa: E402
from benchmarks.aot import _section  # noqa: E402
from benchmarks.aot.step import COMPILERS  # noqa: E402
from jmp_lite.analysis._estimation._compiled import _cost, _hlo  # noqa: E402

MODULE = "benchmarks.aot.contractions"
TARGET = "h100"
ROWS = 1 << 18
TERMS = (2, 3, 4, 6, 8, 12, 16, 32, 64)
WIDTHS = (None, 64, 256)
"""Features of the result; None for as many as there are terms."""

F32, BF16 = jnp.float32, jnp.bfloat16


class Form(NamedTuple):
    """A way to compute (rows, K) x (K, N), both given in float32.

    Attributes:
      operands: dtype that they are cast to.
      result: dtype that is wanted, and that of the gradient which comes back.
    """

    operands: Any
    result: Any

    def __call__(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """The matmul."""
        return (x.astype(self.operands) @ weight.astype(self.operands)).astype(self.result)


NAMES = {F32: "float32", BF16: "bfloat16"}
FORMS = [Form(operands, result) for result in NAMES for operands in NAMES]
FIGURES = ("MB", "kernels", "cast: MB", "cast: kernels", "MB, cast / not")
HEADER = ("(rows, K) x (K, N)", *(f"{NAMES[result]} wanted, {figure}" for result in NAMES for figure in FIGURES))
LEGEND = f"""{ROWS} rows: a matmul of float32 operands as it stands, and with both cast to bfloat16; where float32 is
wanted of the result, and where bfloat16 is. Forward and gradients by both operands, which are float32; what comes back
has the dtype of the result. With autotuning on, XLA takes the faster of Triton and cuBLASLt."""


def step(form: Form) -> Callable[..., Any]:
    """The matmul and its gradients."""

    def run(x: jax.Array, weight: jax.Array, cotangent: jax.Array) -> Any:
        result, pullback = jax.vjp(form, x, weight)
        return result, pullback(cotangent)

    return run


def measure(form: Form, terms: int, width: int, device: jax.Device, *, is_triton: bool) -> _cost.Cost:
    """Compiles one matmul in one form."""
    sizes = ((ROWS, terms), F32), ((terms, width), F32), ((ROWS, width), form.result)
    shapes = [jax.ShapeDtypeStruct(*size) for size in sizes]
    compiled = _targets.compiled(step(form), shapes, device, xla_gpu_enable_triton_gemm=is_triton)
    return _cost.cost(_hlo.parse(compiled.as_text()))


def row(terms: int, width: int, device: jax.Device, *, is_triton: bool) -> list[str]:
    """The figures of one matmul as text, in the order of `HEADER`."""
    sys.stderr.write(f"K = {terms}, N = {width} ...\n")
    costs, cells = [measure(form, terms, width, device, is_triton=is_triton) for form in FORMS], []
    for plain, cast in zip(costs[::2], costs[1::2], strict=True):
        for cost in (plain, cast):
            cells += [_report.number(cost.bytes / 1e6, 1), str(cost.launches)]
        cells.append(_report.number(cast.bytes / plain.bytes))
    return [f"K = {terms}, N = {width}", *cells]


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles everything, prints the table and writes the section; exits with a message if the compiler is absent."""
    options = _command.parser(MODULE, __doc__, quick="one product", baseline="nothing").parse_args(argv)
    _command.fill_in_results_file(options)

    def report(target: str) -> None:
        device = _targets.devices(target)[0]
        sizes = [(terms, width or terms) for width in WIDTHS for terms in TERMS]
        parts = [LEGEND]
        for title, is_triton in (("Triton", True), ("cuBLASLt", False)):
            rows = [row(*size, device, is_triton=is_triton) for size in (sizes[:1] if options.quick else sizes)]
            parts.append(_command.show(f"### {title}\n\n{_report.table(HEADER, rows)}"))
        if options.out:
            _section.write(
                options.out,
                MODULE,
                "\n\n".join(parts),
                target=target,
                compilers=COMPILERS[target],
                title="Matmuls of few terms",
                note="; kernel autotuning off",
            )

    _targets.for_each([TARGET], report)


if __name__ == "__main__":
    main()
