"""The two models of ``lowbit.py`` in float32, each with its data. They know nothing of precision."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import _digits_data
import _gpt_data
import _gpt_model
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from _gpt_model import CONTEXT

CLASSES = 10
DIGITS_BATCH = 64
GPT_BATCH = 16
HELD_OUT_EXCERPTS = 128


class Data(NamedTuple):
    """What a model learns from: ``batch(step)`` is for its loss, ``test`` for its score."""

    batch: Callable[[int], Any]
    test: Any


class Model(NamedTuple):
    """A model: ``load(seed)`` returns its data, ``loss`` and ``score`` take its parameters and a batch."""

    title: str
    is_accuracy: bool  # what the score is: a fraction, the more the better, or a loss
    learning_rate: float
    load: Callable[[int], Data]
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any], jax.Array]
    score: Callable[[Any, Any], jax.Array]


# --- Digits -----------------------------------------------------------------------------------------------------------


class CNN(nn.Module):
    """float[n, 8, 8, 1] -> logits, float[n, 10]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(CLASSES)(x)


def cross_entropy(module: nn.Module, params: Any, batch: Any) -> jax.Array:
    """Mean over a batch of inputs and labels."""
    inputs, labels = batch
    logits = module.apply({"params": params}, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def accuracy(module: nn.Module, params: Any, batch: Any) -> jax.Array:
    """The fraction of inputs that get their label."""
    inputs, labels = batch
    logits = module.apply({"params": params}, inputs)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32)


def load_digits(seed: int) -> Data:
    """Images and labels; a quarter of them is for testing."""
    data = _digits_data.load(seed)

    def batch(step: int) -> Any:
        return _digits_data.batch(data.train_images, data.train_labels, size=DIGITS_BATCH, step=step, seed=seed)

    return Data(batch, (data.test_images, data.test_labels))


# --- Text -------------------------------------------------------------------------------------------------------------


def load_text(seed: int) -> Data:
    """Excerpts of the standard library; those of two files are held out."""
    text = _gpt_data.load()

    def batch(step: int) -> Any:
        return _gpt_data.batch(text.train, size=GPT_BATCH, length=CONTEXT + 1, step=step, seed=seed)

    return Data(batch, _gpt_data.excerpts(text.held_out, count=HELD_OUT_EXCERPTS, length=CONTEXT + 1))


MODELS = {
    "digits": Model(
        title="CNN on handwritten digits",
        is_accuracy=True,
        learning_rate=3e-3,
        load=load_digits,
        init=jax.jit(lambda key: CNN().init(key, jnp.zeros((1, 8, 8, 1)))["params"]),
        loss=functools.partial(cross_entropy, CNN()),
        score=functools.partial(accuracy, CNN()),
    ),
    "gpt": Model(
        title="Character GPT on Python's sources",
        is_accuracy=False,
        learning_rate=5e-3,
        load=load_text,
        init=_gpt_model.init,
        loss=_gpt_model.loss,
        score=_gpt_model.loss,
    ),
}
