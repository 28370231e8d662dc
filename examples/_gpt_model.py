"""A small GPT in Flax Linen. It says nothing about dtypes: ``autocast`` decides in which one it computes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from _gpt_data import ALPHABET

CONTEXT = 64
WIDTH = 64
LAYERS = 2
HEADS = 4


class Block(nn.Module):
    """Attention and a multilayer perceptron, each behind a norm and beside a shortcut."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x += nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=mask)
        y = nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH)(nn.relu(y))


class GPT(nn.Module):
    """int32[n, length] -> logits of each next character, float[n, length, len(ALPHABET)]."""

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        positions = self.param("positions", nn.initializers.normal(0.02), (CONTEXT, WIDTH))
        x = nn.Embed(len(ALPHABET), WIDTH)(text) + positions[: text.shape[1]]
        mask = nn.make_causal_mask(text)
        for _ in range(LAYERS):
            x = Block()(x, mask)
        return nn.Dense(len(ALPHABET))(nn.LayerNorm()(x))


@jax.jit
def init(key: jax.Array) -> Any:
    """Random parameters in float32; compiled once for all policies."""
    return GPT().init(key, jnp.zeros((1, CONTEXT), jnp.int32))["params"]


def loss(params: Any, text: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats of predicting each character from those before; ``text`` is int32[n, length]."""
    logits = GPT().apply({"params": params}, text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


def next_logits(params: Any, window: jax.Array) -> jax.Array:
    """Logits of what follows a window, int32[CONTEXT] -> float[len(ALPHABET)]."""
    return GPT().apply({"params": params}, window[None])[0, -1]
