"""GPT-2 of Transformers generates text: a loop that stops at an end token."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .hugging_face import VOCABULARY, gpt2_config, pretrained
from .model import fast_jit, integers, normal

PROMPTS, LENGTH, STEPS, END = 4, 6, 16, 2
KEY = jax.random.PRNGKey(1)  # Transformers draws with keys of the old kind


class Decoder(NamedTuple):
    """A model, weights large enough that some tokens are likelier than others, and prompts."""

    model: Any
    params: Any
    prompts: jax.Array

    def generate(self, params: Any, prompts: jax.Array, *, sample: bool) -> jax.Array:
        """The prompts with what follows, padded after the end token."""
        options = {"eos_token_id": END, "pad_token_id": 0, "max_new_tokens": STEPS, "top_k": 0}
        return self.model.generate(prompts, params=params, do_sample=sample, prng_key=KEY, **options).sequences

    def logits(self, params: Any, tokens: jax.Array) -> jax.Array:
        """The logits of what follows each token."""
        return self.model(tokens, params=params).logits


def decoder() -> Decoder:
    from transformers import FlaxGPT2LMHeadModel

    rng = np.random.default_rng(0)
    model, params = pretrained(FlaxGPT2LMHeadModel, gpt2_config(bos_token_id=1, eos_token_id=END))
    params = jax.tree.map(lambda p: p + 0.2 * normal(rng, p.shape), params)
    return Decoder(model, params, integers(rng, VOCABULARY, (PROMPTS, LENGTH)))


def noise(step: int, shape: tuple[int, ...]) -> jax.Array:
    """What sampling adds to the logits of one step before it takes the largest."""
    key = KEY
    for _ in range(step):
        _, key = jax.random.split(key)
    return jax.random.gumbel(jax.random.split(key)[0], shape)


class Difference(NamedTuple):
    """The first token of a text that differs from float32's.

    Attributes:
      gap: by how much float32 prefers its token.
      rounding: the largest change of a logit there by computing in 16 bits, of float32's largest.
      largest: the largest logit of float32.
    """

    gap: float
    rounding: float
    largest: float


def differences(decoder: Decoder, cast: Any, exact: np.ndarray, found: np.ndarray, *, sample: bool) -> list[Difference]:
    """The first difference of each text.

    Args:
      decoder: what generated the texts.
      cast: `autocast` with a policy.
      exact: in float32.
      found: under autocast.
      sample: whether the texts were sampled.
    """
    wide = np.asarray(fast_jit(decoder.logits)(decoder.params, exact))
    low = np.asarray(fast_jit(cast(decoder.logits))(decoder.params, exact))
    listed = []
    for row in np.flatnonzero((exact != found).any(1)):
        place = int(np.argmax(exact[row] != found[row])) - 1
        before = wide[row, place]
        scores = before + (np.asarray(noise(place + 1 - LENGTH, wide[:, place].shape))[row] if sample else 0)
        gap = float(scores[exact[row, place + 1]] - scores[found[row, place + 1]])
        listed.append(Difference(gap, float(np.abs(low[row, place] - before).max()), float(np.abs(before).max())))
    return listed


def tokens(decoder: Decoder, cast: Any, *, sample: bool) -> np.ndarray:
    """The texts under a transformation of the whole loop, such as `autocast`."""

    def run(params: Any, prompts: jax.Array) -> jax.Array:
        return decoder.generate(params, prompts, sample=sample)

    return np.asarray(fast_jit(cast(run))(decoder.params, jnp.asarray(decoder.prompts)))
