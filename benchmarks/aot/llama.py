"""The gradient of a LLaMA block in 8 bits, compiled for H100 without one: bytes, launches, time by a roofline.

python -m benchmarks.aot.llama    # in some minutes; replaces its section of RESULTS.md
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jmp_lite.analysis._estimation._compiled import _targets

_targets.configure("--xla_gpu_enable_triton_gemm=false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import jmp_lite as jmp  # noqa: E402
from benchmarks import _command, _layers, _report  # noqa: E402
from benchmarks import _text_models as text  # noqa: E402
from benchmarks.aot import _section, gemm  # noqa: E402
from jmp_lite import quant  # noqa: E402
from jmp_lite.analysis._estimation._compiled import _cost, _hlo, _roofline  # noqa: E402
from jmp_lite.analysis._estimation._devices import DEVICES  # noqa: E402

MODULE = "benchmarks.aot.llama"
WIDTH, HIDDEN, VOCABULARY, BATCH, TIME = 2048, 5632, 32000, 4, 2048
HEADER = ("recipe", "matmuls", "in float8", "launches", "MB", "/ bf16", "temp / bf16", "ms", "bf16 / ms")
SHARED = text.LLAMA_HEADS // text.LLAMA_KEYS
LEGEND = f"""`jax.value_and_grad` under autocast in mixed bfloat16 of one block of width {WIDTH} and hidden width
{HIDDEN}, {text.LLAMA_HEADS} heads of which {SHARED} share a key, between an embedding and logits of {VOCABULARY}
tokens, for {BATCH} texts of {TIME}. {_roofline.FORMULA}
It is an estimate: no H100 was timed. Kernel autotuning is off."""
BASELINE = "bfloat16"
#: What is asked of FP8 for matmuls with a weight: bytes at most, and speed at least, over bfloat16.
LIMITS = {"einsum": (1.08, 1.21), "cuDNN": (1.13, 1.36)}


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention as one kernel of cuDNN, which takes 16 bits."""

    def attend(*arrays: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(*arrays, is_causal=True, implementation="cudnn")

    result: jax.Array = jmp.with_policy(attend, "params=f32,compute=bf16,output=f32")(query, key, value)
    return result


ATTENTIONS: Mapping[str, Callable[..., jax.Array]] = {"einsum": text.grouped_attention, "cuDNN": cudnn}
FP8, HEAD = "FP8", "FP8, head in bfloat16"
RECIPES: Mapping[str, quant.DotRecipe | None] = {
    BASELINE: None,
    FP8: quant.FP8,
    HEAD: quant.FP8,
    'FP8, products="all"': quant.FP8.replace(products="all"),
    "FP8, fixed scales": quant.FP8.static(lhs=16, rhs=1, grad=1),
    "FP8_ROWWISE": quant.FP8_ROWWISE,
}


class Program(NamedTuple):
    """Figures of one compiled gradient; seconds."""

    products: int
    float8: int
    launches: int
    moved: float
    temp: float
    time: float

    @classmethod
    def of(cls, compiled: Any) -> Program:
        module = _hlo.parse(compiled.as_text())
        found, cost = gemm.products(module), _cost.cost(module)
        float8 = sum(product.formats[0].startswith("f8") for product in found)
        temp = compiled.memory_analysis().temp_size_in_bytes
        return cls(len(found), float8, cost.launches, cost.bytes, temp, _roofline.seconds(module, DEVICES["h100"]))

    def cells(self, name: str, base: Program) -> list[str]:
        """The row as text, in the order of `HEADER`."""
        number = _report.number
        return [
            name,
            str(self.products),
            str(self.float8),
            str(self.launches),
            number(self.moved / 1e6, 0),
            number(self.moved / base.moved, 3),
            number(self.temp / base.temp, 3),
            number(self.time * 1e3, 2),
            number(base.time / self.time, 3),
        ]


def measure(attention: str, device: jax.Device) -> dict[str, Program]:
    """Compiles the gradient with every recipe."""
    params = text.llama_params(1, width=WIDTH, hidden=HIDDEN, vocabulary=VOCABULARY)
    batch = {name: _layers.integers(BATCH, TIME) for name in ("inputs", "labels")}
    found = {}
    for name, recipe in RECIPES.items():
        sys.stderr.write(f"{attention}: {name} ...\n")
        loss = functools.partial(text.llama, dtype=jnp.float32, attend=ATTENTIONS[attention])
        rules = [jmp.Rule("head", dot=jax.lax.dot_general)] if name == HEAD else ()
        mixed = jmp.autocast(loss, "mixed_bfloat16", rules=rules, dot=recipe)
        found[name] = Program.of(_targets.compiled(jax.value_and_grad(mixed), (params, batch), device))
    return found


def table(attention: str, found: Mapping[str, Program]) -> str:
    """One row per recipe, and the limits."""
    base, (moved, speed) = found[BASELINE], LIMITS[attention]
    limits = [
        limit
        for name in (FP8, HEAD)
        for limit in (
            _report.Target(f"{name}: MB / bf16", moved, [found[name].moved / base.moved]),
            _report.Target(f"{name}: {speed} / (bf16 / ms)", 1.0, [speed * found[name].time / base.time]),
        )
    ]
    cells = _report.table(HEADER, [program.cells(name, base) for name, program in found.items()])
    held = "\n".join(limit.line() for limit in limits)
    return f"### Attention by {attention}\n\n{cells}\n\n{held}"


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles everything, prints the tables and writes the section; exits with a message if a compiler is absent."""
    options = _command.parser(MODULE, __doc__, quick="the same, written nowhere", baseline="bfloat16").parse_args(argv)
    _command.fill_in_results_file(options)

    def report(target: str) -> None:
        device = _targets.devices(target)[0]
        parts = [LEGEND, *(_command.show(table(name, measure(name, device))) for name in ATTENTIONS)]
        if options.out:
            _section.write(
                options.out,
                MODULE,
                "\n\n".join(parts),
                target=target,
                compilers=gemm.COMPILERS,
                title="A LLaMA block in 8 bits",
            )

    _targets.for_each([gemm.TARGET], report)


if __name__ == "__main__":
    main()
