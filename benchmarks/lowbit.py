"""Errors of 8 bits beside qwix, which quantizes the same operands: matmuls, and a model that is trained for int8.

python -m benchmarks.lowbit    # needs qwix: pip install -e '.[zoo]'; replaces its section of RESULTS.md
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import qwix

import jmp_lite as jmp
from benchmarks import _command, _report
from jmp_lite import quant

MODULE = "benchmarks.lowbit"
ROWS, INPUTS, OUTPUTS = 256, 512, 128
DIMS = (((1,), (0,)), ((), ()))
LEGEND = f"""Relative Frobenius distances from float64. Matmuls of {ROWS} x {INPUTS} and {INPUTS} x {OUTPUTS} normal
numbers, or with every 64th channel of the activations 30 times as large; one scale per row and per output channel.
`optimum`: the same scales, rounding to nearest, in float64. The model is two Dense layers with a GELU between them, in
Flax, under a loss; `gradient` is that of all parameters. `residuals`: how far the gradient of one product's kernel is
from that of the matmul of the rounded operands, the definition of straight-through."""


def distance(found: Any, expected: Any) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def optimum(x: np.ndarray, axis: int) -> np.ndarray:
    """Numbers of 8 bits with one scale along an axis, in float64."""
    scale = np.abs(x).max(axis, keepdims=True) / 127
    return np.rint(x / scale) * scale


def product_rows(rng: np.random.Generator) -> list[list[str]]:
    """Errors of single matmuls."""
    rows = []
    for kind, factor in (("normal", 1.0), ("outliers", 30.0)):
        x = rng.standard_normal((ROWS, INPUTS)) * np.where(np.arange(INPUTS) % 64 == 0, factor, 1.0)
        w = rng.standard_normal((INPUTS, OUTPUTS))
        for dtype in (jnp.float32, jnp.bfloat16):
            lhs, rhs = jnp.asarray(x, dtype), jnp.asarray(w, dtype)
            wide = (np.asarray(a, np.float64) for a in (lhs, rhs))
            exact, best = x @ w, [optimum(a, axis) for a, axis in zip(wide, (1, 0), strict=True)]
            for name, left, recipe in (
                ("W8A8", best[0], quant.W8A8),
                ("W8A16", np.asarray(lhs, np.float64), quant.W8A16),
            ):
                theirs = qwix.quantize(lhs, "int8", channelwise_axes=[0]) if name == "W8A8" else lhs
                of_qwix = qwix.dot_general(theirs, qwix.quantize(rhs, "int8", channelwise_axes=[1]), DIMS)
                errors = [
                    distance(left @ best[1], exact),
                    distance(recipe(lhs, rhs, DIMS), exact),
                    distance(of_qwix, exact),
                ]
                rows.append([name, kind, jnp.dtype(dtype).name, *(f"{error:.5f}" for error in errors)])
    return rows


class Model(nn.Module):
    """Two layers."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Dense(INPUTS, dtype=self.dtype)(x))
        return nn.Dense(OUTPUTS, dtype=self.dtype)(x)


def model_rows(rng: np.random.Generator) -> list[list[str]]:
    """Errors of a model in int8 forward, and of its gradient."""
    x, target = (jnp.asarray(rng.standard_normal((ROWS, n)), jnp.float32) for n in (INPUTS, OUTPUTS))
    params = Model().init(jax.random.key(0), x)

    def results(apply: Callable[..., Any]) -> tuple[Any, Any]:
        def loss(params: Any) -> Any:
            return jnp.mean((apply(params, x).astype(jnp.float32) - target) ** 2)

        gradients = jax.tree.leaves(jax.grad(loss)(params))
        return apply(params, x), np.concatenate([np.ravel(g) for g in gradients])

    rule = qwix.QtRule(weight_qtype="int8", act_qtype="int8")
    designs = {
        "bfloat16, no 8 bits": Model(jnp.bfloat16).apply,
        "jmp_lite INT8_QAT, float32": jmp.autocast(Model().apply, "full", dot=quant.INT8_QAT),
        "qwix, float32": qwix.quantize_model(Model(), qwix.QtProvider([rule])).apply,
        "jmp_lite INT8_QAT, autocast bfloat16": jmp.autocast(Model().apply, "mixed_bfloat16", dot=quant.INT8_QAT),
        "qwix, `dtype=bfloat16`": qwix.quantize_model(Model(jnp.bfloat16), qwix.QtProvider([rule])).apply,
    }
    exact = results(Model().apply)
    return [
        [name, *(f"{distance(a, b):.4f}" for a, b in zip(results(apply), exact, strict=True))]
        for name, apply in designs.items()
    ]


def residual_rows(rng: np.random.Generator) -> list[list[str]]:
    """How far gradients of a kernel are from those of the matmul of rounded operands."""
    x, w, cotangent = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((ROWS, INPUTS), (INPUTS, OUTPUTS), (ROWS, OUTPUTS))
    )
    exact = optimum(np.asarray(x, np.float64), 1).T @ np.asarray(cotangent, np.float64)
    provider = qwix.QtProvider([qwix.QtRule(weight_qtype="int8", act_qtype="int8")])
    layer = nn.Dense(OUTPUTS, use_bias=False)

    def of_kernel(apply: Callable[..., Any]) -> Any:
        return jax.grad(lambda w: jnp.sum(apply({"params": {"kernel": w}}, x) * cotangent))(w)

    applies = {
        "jmp_lite INT8_QAT": jmp.autocast(layer.apply, "full", dot=quant.INT8_QAT),
        "qwix": qwix.quantize_model(layer, provider).apply,
    }
    return [[name, f"{distance(of_kernel(apply), exact):.1e}"] for name, apply in applies.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables and writes their section."""
    options = _command.parser(MODULE, __doc__, quick="the same, written nowhere", baseline="jmp_lite").parse_args(argv)
    _command.fill_in_results_file(options)
    rng = np.random.default_rng(0)
    facts = {
        "command": f"`{_report.command(MODULE)}`",
        "versions": _report.versions(("qwix",)),
        "hardware": _report.hardware(),
    }
    tables = [
        _report.table(("product", "operands", "dtype", "optimum", "jmp_lite", "qwix"), product_rows(rng)),
        _report.table(("model", "output", "gradient"), model_rows(rng)),
        _report.table(("gradient of a kernel", "residuals"), residual_rows(rng)),
    ]
    parts = [LEGEND, *map(_command.show, tables)]
    if options.out:
        _report.write_section(options.out, "qwix", "Eight bits beside qwix", facts, "\n\n".join(parts))


if __name__ == "__main__":
    main()
