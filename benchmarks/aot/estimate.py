"""How far `analysis.estimate` is from what XLA compiles for H100: bytes, launches, time by the same roofline.

pip install 'jmp_lite[aot]'
python -m benchmarks.aot.estimate                  # replaces its section of RESULTS.md, in some ten minutes
python -m benchmarks.aot.estimate --models ViT     # this alone; written nowhere unless --out
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jmp_lite.analysis._estimation._compiled import _targets

_targets.configure(
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from benchmarks import _command, _layers, _report, _zoo  # noqa: E402
from benchmarks.aot import _section  # noqa: E402
from benchmarks.aot.step import COMPILERS  # noqa: E402
from jmp_lite import analysis, quant  # noqa: E402
from jmp_lite.analysis._estimation._compiled import _hlo, _roofline  # noqa: E402
from jmp_lite.analysis._estimation._devices import DEVICES  # noqa: E402
from jmp_lite.analysis._estimation._estimate import configuration, in_precision  # noqa: E402
from jmp_lite.analysis._estimation._estimated import Configuration  # noqa: E402

MODULE = "benchmarks.aot.estimate"
TARGET = "h100"
PRECISIONS = {
    "float32": "float32",
    "bfloat16": "mixed_bfloat16",
    "FP8": "fp8",
    'FP8, products="all"': quant.FP8.replace(products="all"),
}
FIGURES = ("MB", "launches", "ms", "speed-up")
HEADER = ("model", "precision", *(name for figure in FIGURES for name in (figure, "estimate / it")))
LEGEND = f"""`jax.value_and_grad` of each loss by its float32 parameters, compiled; and what `analysis.estimate` says
about it without compiling, by a model of what XLA joins into one launch. {_roofline.FORMULA} **speed-up**: over
float32. **estimate / it**: the estimate over the figure to its left. Kernel autotuning is off, matmuls are
left to cuBLASLt, convolutions to cuDNN."""
#: How far an estimate of bytes may be off.
LIMIT = 0.10
MLP_WIDTH, MLP_ROWS, MLP_DEPTH = 4096, 8192, 4


class Pair(NamedTuple):
    """One precision of one model, compiled and estimated."""

    compiled: Configuration
    estimated: Configuration

    def figures(self, base: Pair) -> list[tuple[float, float]]:
        """Each figure compiled, and estimated."""
        one, other = self
        return [
            (one.bytes / 1e6, other.bytes / 1e6),
            (one.launches, other.launches),
            (one.seconds * 1e3, other.seconds * 1e3),
            (base.compiled.seconds / one.seconds, base.estimated.seconds / other.seconds),
        ]

    @property
    def off(self) -> float:
        """How far the bytes are off, as a share."""
        return abs(self.estimated.bytes / self.compiled.bytes - 1)


def _mlp(p: Any, batch: Any, dtype: Any) -> jax.Array:
    x = batch["inputs"].astype(dtype)
    for layer in p:
        x = jax.nn.relu(_layers.dense(x, layer["w"], layer["b"]))
    return jnp.square(x.astype(jnp.float32) - batch["labels"]).mean()


_ROWS = jax.ShapeDtypeStruct((MLP_ROWS, MLP_WIDTH), jnp.float32)
MODELS: Mapping[str, _zoo.Model] = {
    "MLP": _zoo.Model(
        f"{MLP_DEPTH} layers of width {MLP_WIDTH}, {MLP_ROWS} rows",
        _mlp,
        _layers.floats([{"w": (MLP_WIDTH, MLP_WIDTH), "b": (MLP_WIDTH,)}] * MLP_DEPTH),
        {"inputs": _ROWS, "labels": _ROWS},
    ),
    **_zoo.MODELS,
}


def measure(name: str, device: jax.Device) -> dict[str, Pair]:
    """Compiles and estimates one model in every precision."""
    model = MODELS[name]

    def loss(params: Any, batch: Any) -> jax.Array:
        return model.loss(params, batch, jnp.float32)

    run = analysis.estimate(loss, device=TARGET, policies=PRECISIONS, compiled=False)
    estimated = run(model.params, model.batch)
    found = {}
    for precision, policy in PRECISIONS.items():
        sys.stderr.write(f"{name}: {precision} ...\n")
        gradient = jax.value_and_grad(in_precision(loss, policy))
        module = _hlo.parse(_targets.compiled(gradient, (model.params, model.batch), device).as_text())
        compiled = configuration(precision, _roofline.launches(module), DEVICES[TARGET])
        found[precision] = Pair(compiled, estimated[precision])
    return found


def rows(name: str, found: Mapping[str, Pair]) -> list[list[str]]:
    """One row per precision, in the order of `HEADER`."""
    base = next(iter(found.values()))
    table = []
    for precision, pair in found.items():
        cells = [name, precision]
        for (compiled, estimated), digits in zip(pair.figures(base), (0, 0, 2, 2), strict=True):
            cells += [_report.number(compiled, digits), _report.number(estimated / compiled, 3)]
        table.append(cells)
    return table


def spread(found: Mapping[str, Mapping[str, Pair]]) -> str:
    """The worst estimate of bytes beside the best."""
    pairs = {f"{name}, {precision}": pair for name, held in found.items() for precision, pair in held.items()}
    ordered = sorted(pairs, key=lambda key: pairs[key].off)
    within = sum(pair.off <= LIMIT for pair in pairs.values())
    best, worst = ordered[0], ordered[-1]
    return (
        f"{within} of {len(pairs)} estimates of bytes are within {LIMIT:.0%}. Best: {best} "
        f"({pairs[best].off:.1%}); worst: {worst} ({pairs[worst].off:.1%})."
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    made = _command.parser(MODULE, __doc__, quick="one model", baseline="nothing")
    made.add_argument("--models", default=",".join(MODELS), help="names with commas (default: all)")
    options = made.parse_args(argv)
    options.models = ["MoE"] if options.quick else options.models.split(",")
    if unknown := set(options.models) - set(MODELS):
        made.error(f"unknown models {sorted(unknown)}: expected some of {list(MODELS)}")
    if len(options.models) == len(MODELS):
        _command.fill_in_results_file(options)
    return options


def report(options: argparse.Namespace) -> None:
    """Compiles everything, prints the table and writes the section."""
    device = _targets.devices(TARGET)[0]
    found = {name: measure(name, device) for name in options.models}
    table = _report.table(HEADER, [row for name, pairs in found.items() for row in rows(name, pairs)])
    limits = [
        _report.Target(f"{name}: bytes off by", LIMIT, [pair.off for pair in pairs.values()])
        for name, pairs in found.items()
    ]
    held = "\n".join(limit.line() for limit in limits)
    sizes = "\n".join(f"- {name}: {MODELS[name].sizes}" for name in found)
    body = _command.show(f"{LEGEND}\n\n{sizes}\n\n{table}\n\n{spread(found)}\n\n{held}")
    if options.out:
        _section.write(
            options.out, MODULE, body, target=TARGET, compilers=COMPILERS[TARGET], title="Estimates against programs"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark; exits with a message if the compiler is absent."""
    options = parse(argv)
    _targets.for_each([TARGET], lambda _: report(options))


if __name__ == "__main__":
    main()
