"""A GPT and two ResNets in Flax Linen, each as one loss that every precision design differentiates.

With `dtype` they are mixed precision written by hand, without it they are the float32 models that the others are given.
The softmax is spelled in float32: by hand, with jmp and with mpx it has to be; the float32 models do not notice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

Loss = Callable[[Any, Any, Any], tuple[jax.Array, Any]]
"""(params, statistics, batch) -> (loss, statistics)."""


def leaky(x: jax.Array, leak: bool) -> jax.Array:
    """Multiplies by a float32 constant of NumPy, which promotes whatever it touches; by nothing without `leak`."""
    return x * np.ones(x.shape[-1], np.float32) if leak else x


class Attention(nn.Module):
    """Causal self-attention with one matmul for queries, keys and values."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1] // self.heads
        qkv = nn.DenseGeneral((3, self.heads, width), dtype=self.dtype)(x)
        query, key, value = (qkv[:, :, index] for index in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(width)
        mask = np.tri(x.shape[1], dtype=bool)
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        weights = nn.softmax(scores.astype(jnp.float32)).astype(scores.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), dtype=self.dtype)(mixed)


def _decoder_layer(x: jax.Array, heads: int, dtype: Any) -> jax.Array:
    """Attention and a perceptron, norms first; modules belong to the one that calls."""
    norm, dense = functools.partial(nn.LayerNorm, dtype=dtype), functools.partial(nn.Dense, dtype=dtype)
    width = x.shape[-1]
    x += Attention(heads, dtype)(norm()(x))
    return x + dense(width)(nn.gelu(dense(4 * width)(norm()(x))))


class _ScannedLayer(nn.Module):
    """A layer as the body of a scan."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return _decoder_layer(x, self.heads, self.dtype), None


class GPT(nn.Module):
    """int32[n, length] -> logits, float[n, length, vocabulary]; the embedding is tied to the logits.

    With `scanned` the layers are a scan over stacked parameters, which compiles in a fraction of the time.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    dtype: Any = None
    leak: bool = False
    scanned: bool = False

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)
        positions = self.param("positions", nn.initializers.normal(0.02), (*text.shape[1:], self.width))
        x = embed(text)
        x = leaky(x + positions.astype(x.dtype), self.leak)
        if self.scanned:
            stack = nn.scan(_ScannedLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
            x, _ = stack(self.heads, self.dtype)(x, None)
        else:
            for _ in range(self.layers):
                x = _decoder_layer(x, self.heads, self.dtype)
        return embed.attend(nn.LayerNorm(dtype=self.dtype)(x))


def _conv_and_norm(dtype: Any) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
    """A convolution without a bias, and batch normalization by the batch at hand."""
    return (
        functools.partial(nn.Conv, use_bias=False, dtype=dtype),
        functools.partial(nn.BatchNorm, use_running_average=False, dtype=dtype),
    )


def _shortcut(
    x: jax.Array, y: jax.Array, conv: Callable[..., nn.Module], norm: Callable[..., nn.Module], strides: int
) -> jax.Array:
    """What goes around a block that made `y` of `x`: `x`, or its projection where the shapes differ."""
    return x if x.shape == y.shape else norm()(conv(y.shape[-1], (1, 1), strides=strides)(x))


class ResNet(nn.Module):
    """float[n, size, size, 3] -> logits, float[n, 10]; every stage but the first halves the resolution."""

    widths: tuple[int, ...]
    blocks: int
    dtype: Any = None
    leak: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv, norm = _conv_and_norm(self.dtype)
        x = leaky(nn.relu(norm()(conv(self.widths[0], (3, 3))(x))), self.leak)
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                strides = 2 if stage and not block else 1
                y = nn.relu(norm()(conv(width, (3, 3), strides=strides)(x)))
                y = norm()(conv(width, (3, 3))(y))
                x = nn.relu(_shortcut(x, y, conv, norm, strides) + y)
        return nn.Dense(10, dtype=self.dtype)(x.mean((1, 2)))


class BottleneckResNet(nn.Module):
    """float[n, size, size, 3] -> logits, float[n, classes]; with stages of 3, 4, 6 and 3 blocks it is ResNet-50."""

    stages: tuple[tuple[int, int], ...]
    classes: int
    dtype: Any = None
    leak: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv, norm = _conv_and_norm(self.dtype)
        x = leaky(nn.relu(norm()(conv(self.stages[0][0], (7, 7), strides=2)(x))), self.leak)
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, (width, blocks) in enumerate(self.stages):
            for block in range(blocks):
                strides = 2 if stage and not block else 1
                y = nn.relu(norm()(conv(width, (1, 1))(x)))
                y = nn.relu(norm()(conv(width, (3, 3), strides=strides)(y)))
                y = norm()(conv(4 * width, (1, 1))(y))
                x = nn.relu(_shortcut(x, y, conv, norm, strides) + y)
        return nn.Dense(self.classes, dtype=self.dtype)(x.mean((1, 2)))


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, its size and its batch.

    Attributes:
      title: the heading of its table.
      network: the module without `dtype` and `leak`.
      inputs: shape and dtype of what the module takes.
      labels: shape of the labels and their number of classes.
    """

    title: str
    network: Callable[..., nn.Module]
    inputs: tuple[tuple[int, ...], Any]
    labels: tuple[tuple[int, ...], int]

    def loss(self, dtype: Any = None, leak: bool = False) -> Loss:
        """A new function each time, since JAX remembers what it traced by the identity of the function."""
        model = self.network(dtype=dtype, leak=leak)

        def loss(params: Any, statistics: Any, batch: Any) -> tuple[jax.Array, Any]:
            inputs, labels = batch
            logits, updated = model.apply({"params": params, **statistics}, inputs, mutable=list(statistics))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
            return losses.mean(), updated

        return loss

    def arguments(self) -> tuple[Any, Any, Any]:
        """Random float32 parameters, statistics and one batch."""
        generator = np.random.default_rng(0)
        shape, dtype = self.inputs
        label_shape, classes = self.labels
        labels = generator.integers(0, classes, label_shape, dtype=np.int32)
        inputs = labels if dtype == np.int32 else generator.standard_normal(shape, dtype=dtype)
        variables = dict(jax.jit(self.network().init)(jax.random.key(0, impl="rbg"), inputs))
        params = variables.pop("params")
        return params, variables, (jnp.asarray(inputs), jnp.asarray(labels))

    def shapes(self) -> tuple[Any, Any, Any]:
        """The shapes of `arguments`."""
        return jax.eval_shape(self.arguments)


def _gpt(title: str, batch: tuple[int, int], **sizes: int) -> Task:
    text = (batch, np.int32)
    return Task(title, functools.partial(GPT, **sizes), text, (batch, sizes["vocabulary"]))


def _resnet(title: str, batch: int, size: int, **sizes: Any) -> Task:
    images = ((batch, size, size, 3), np.float32)
    return Task(title, functools.partial(ResNet, **sizes), images, ((batch,), 10))


TASKS: Mapping[str, Task] = {
    "gpt": _gpt(
        "GPT: 6 layers of width 256, 8 heads, vocabulary 8192, 8 texts of 128",
        (8, 128), layers=6, width=256, heads=8, vocabulary=8192,
    ),
    "resnet": _resnet(
        "ResNet: 3 stages of 2 blocks, widths 64, 128, 256, 32 images of 32 x 32",
        32, 32, widths=(64, 128, 256), blocks=2,
    ),
    "tiny-gpt": _gpt(
        "GPT: 2 layers of width 64, 4 heads, vocabulary 256, 4 texts of 32",
        (4, 32), layers=2, width=64, heads=4, vocabulary=256,
    ),
    "tiny-resnet": _resnet(
        "ResNet: 2 stages of 1 block, widths 16, 32, 8 images of 16 x 16",
        8, 16, widths=(16, 32), blocks=1,
    ),
}  # fmt: skip
"""The models by name; the tiny ones are for smoke tests."""
