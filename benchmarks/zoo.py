"""Gradients of models from packages: autocast beside what each package does by itself.

python -m benchmarks.zoo                              # all models; replaces its section of RESULTS.md
python -m benchmarks.zoo --quick                      # three of them, written nowhere
python -m benchmarks.zoo --models "HF BERT"           # these only
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import jmp_lite as jmp
from benchmarks import _command, _jaxprs, _report
from benchmarks.autocast import avoid_wrong_code
from tests.zoo import decoding, measure, minilm
from tests.zoo.model import Loss, Model
from tests.zoo.table import MODELS

MODULE = "benchmarks.zoo"
QUICK = ("HF GPT-2", "Equinox GRU", "jraph GraphNetwork")
PACKAGES = ("transformers", "equinox", "diffrax", "flowjax", "dm-haiku", "jraph", "numpyro", minilm.PACKAGE)
HEADER = ("model", "low", "own low", "bfloat16", "own bfloat16", "/ own", "float16", "residuals", '"low"')
LEGEND = """Tiny configurations with random weights, but for MiniLM. Own: `dtype=bfloat16` in Transformers; elsewhere
parameters and inputs cast to bfloat16 at the boundary.

- **low**, **own low**: of the gradient's matmuls and convolutions, those of two 16-bit operands, under autocast
  and in the model's own bfloat16. Sums of four terms or fewer do not count.
- **bfloat16**, **own bfloat16**, **float16**: |gradient - float32 gradient| / |float32 gradient| over all parameters,
  the geometric mean over 32 draws of parameters and batches (256 of the flow); float16 with a dynamic loss scale.
- **residuals**, **"low"**: bytes that wait for the backward pass under autocast, with `residuals="all"` and `"low"`,
  over those of own bfloat16."""

autocast = functools.partial(jmp.autocast, policy=measure.BF16)


def low_of_all(loss: Loss, draw: Any) -> str:
    """Of the matmuls of a gradient, how many are low."""
    found = measure.products(jax.grad(loss), *draw)
    return f"{sum(product.is_low for product in found)}/{len(found)}"


def residual_bytes(loss: Loss, draw: Any) -> float:
    return _jaxprs.residual_bytes(lambda *arguments: (loss(*arguments), None), *draw)


def cells(model: Model) -> list[str]:
    """The figures of one model, in the order of `HEADER`."""
    draw = model.draw(0)
    errors = measure.errors(model)
    losses = autocast(model.loss), autocast(model.loss, residuals="low")
    own = residual_bytes(model.own, draw)
    return [
        low_of_all(losses[0], draw),
        low_of_all(model.own, draw),
        f"{errors[measure.BF16]:.4f}",
        f"{errors['own']:.4f}",
        _report.number(errors[measure.BF16] / errors["own"]),
        f"{errors[measure.FP16]:.4f}",
        *(_report.number(residual_bytes(loss, draw) / own) for loss in losses),
    ]


def row(name: str) -> list[str]:
    """The row of one model; dashes where autocast fails."""
    sys.stderr.write(f"{name} ...\n")
    try:
        return [name, *cells(MODELS[name]())]
    except Exception as error:  # noqa: BLE001  # a model that fails is a result too
        return [f"{name}: {type(error).__name__}", *["-"] * (len(HEADER) - 1)]


def text_row(sample: bool) -> list[str]:
    """How the text of GPT-2 under autocast compares with that of float32."""
    decoder = decoding.decoder()
    found = measure.products(
        autocast(functools.partial(decoder.generate, sample=sample)), decoder.params, decoder.prompts
    )
    exact, ours = (decoding.tokens(decoder, cast, sample=sample) for cast in (lambda fun: fun, autocast))
    same = np.mean(exact[:, decoding.LENGTH :] == ours[:, decoding.LENGTH :])
    low = f"{sum(product.is_low for product in found)}/{len(found)}"
    return ["sampled" if sample else "greedy", low, _report.number(float(same), 3)]


def vector_rows() -> list[list[str]]:
    """How vectors of MiniLM compare with those of float32."""
    lm = minilm.load()
    smooth, smoother, calibrated = minilm.smoothed(lm, 0.5), minilm.smoothed(lm, 0.7), minilm.with_fixed_scales
    models: dict[str, minilm.MiniLM] = {
        "HF `dtype=bfloat16`": lm._replace(encode=lm.own),
        "autocast bfloat16": lm._replace(encode=autocast(lm.encode)),
        "autocast float16": lm._replace(encode=jmp.autocast(lm.encode, measure.FP16)),
        "autocast bfloat16, `W8A16`": minilm.with_recipe(lm, "w8a16"),
        "`W8A8`": minilm.with_recipe(lm, "w8a8"),
        "`W8A8`, smoothed": minilm.with_recipe(smooth, "w8a8"),
        "`W8A8_STATIC`": calibrated(lm, "absmax"),
        "`W8A8_STATIC`, least error": calibrated(lm, "mse"),
        "`W8A8_STATIC`, 99.99 %, smoothed by 0.7": calibrated(smoother, "percentile"),
        "`W8A8_STATIC`, least error, smoothed by 0.7": calibrated(smoother, "mse"),
        "`W4A16`": minilm.with_recipe(lm, "w4a16"),
        "`W4A16`, `gptq`": minilm.compensated(lm, "int4:tile128"),
        "tiles of 32, `gptq`": minilm.compensated(lm, "int4:tile32"),
    }
    exact = minilm.vectors(lm, lm.encode)
    found = {name: minilm.likeness(exact, minilm.vectors(each, each.encode)) for name, each in models.items()}
    return [[name, *(f"{value:.6f}" for value in each[:2]), f"{each.same_nearest:.3f}"] for name, each in found.items()]


def parts(names: Sequence[str], *, quick: bool) -> list[str]:
    """The tables."""
    tables = [LEGEND, _command.show(_report.table(HEADER, map(row, names)))]
    if not quick:
        header = ("GPT-2 generates", "low", "tokens as in float32")
        tables.append(_command.show(_report.table(header, map(text_row, (False, True)))))
    if not quick and minilm.installed():
        header = ("MiniLM-L6", "mean cosine with float32", "least", "same nearest paragraph")
        tables.append(_command.show(_report.table(header, vector_rows())))
    return tables


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the models, prints the tables and writes their section."""
    made = _command.parser(MODULE, __doc__, quick="three models", baseline="float32")
    made.add_argument("--models", nargs="+", choices=MODELS, help="default: all")
    options = made.parse_args(argv)
    _command.fill_in_results_file(options)
    warnings.simplefilter("ignore")  # packages warn of what they will remove
    avoid_wrong_code()
    facts = {
        "command": f"`{_report.command(MODULE)}`",
        "versions": _report.versions(PACKAGES),
        "hardware": _report.hardware(),
    }
    tables = parts(options.models or (QUICK if options.quick else tuple(MODELS)), quick=options.quick)
    if options.out:
        _report.write_section(options.out, "zoo", "Models from packages", facts, "\n\n".join(tables))


if __name__ == "__main__":
    main()
