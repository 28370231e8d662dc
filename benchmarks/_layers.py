"""Layers as plain functions, the precision of each spelled out as it is by hand.

A layer casts its weights to the dtype of what it is given, and returns that dtype; statistics, softmax, rotations and
losses are float32. What is given float32 stays in it throughout: that is the model which autocast is handed.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

F32 = jnp.float32
_IMAGES = ("NHWC", "HWIO", "NHWC")


def floats(tree: Any) -> Any:
    """Makes a float32 parameter of every tuple of sizes in a tree."""
    return jax.tree.map(lambda sizes: jax.ShapeDtypeStruct(sizes, F32), tree, is_leaf=lambda leaf: type(leaf) is tuple)


def integers(*sizes: int) -> jax.ShapeDtypeStruct:
    """Token ids or labels."""
    return jax.ShapeDtypeStruct(sizes, jnp.int32)


def dense(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """A linear layer."""
    y = x @ weight.astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: str = "SAME") -> jax.Array:
    """A convolution without a bias."""
    kernel = kernel.astype(x.dtype)
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=_IMAGES)


def affine(width: int) -> dict[str, Any]:
    """Parameters of a norm that centers."""
    return {"scale": (width,), "bias": (width,)}


def layer_norm(x: jax.Array, p: Any) -> jax.Array:
    """Normalizes the last axis."""
    high = x.astype(F32)
    mean = high.mean(-1, keepdims=True)
    variance = jnp.square(high - mean).mean(-1, keepdims=True)
    return ((high - mean) * lax.rsqrt(variance + 1e-6) * p["scale"] + p["bias"]).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Divides the last axis by its root mean square."""
    high = x.astype(F32)
    return (high * lax.rsqrt(jnp.square(high).mean(-1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


def moments(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Mean, and variance as the mean of squares less the square of the mean, as Flax takes them."""
    mean = x.mean(axes, keepdims=True)
    return mean, jnp.maximum(0, jnp.square(x).mean(axes, keepdims=True) - jnp.square(mean))


def batch_norm(x: jax.Array, p: Any) -> jax.Array:
    """Normalizes every channel over the batch."""
    high = x.astype(F32)
    mean, variance = moments(high, (0, 1, 2))
    return ((high - mean) * (lax.rsqrt(variance + 1e-5) * p["scale"]) + p["bias"]).astype(x.dtype)


def group_norm(x: jax.Array, p: Any, groups: int = 32) -> jax.Array:
    """Normalizes groups of channels of every image."""
    high = x.astype(F32).reshape(*x.shape[:3], groups, -1)
    mean, variance = moments(high, (1, 2, 4))
    normal = ((high - mean) * lax.rsqrt(variance + 1e-6)).reshape(x.shape)
    return (normal * p["scale"] + p["bias"]).astype(x.dtype)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, *, is_causal: bool) -> jax.Array:
    """Softmax attention of arrays of (batch, time, head, feature)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    if is_causal:
        scores = jnp.where(np.tri(query.shape[1], dtype=bool), scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores.astype(F32)).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def self_attention(x: jax.Array, p: Any, heads: int, *, is_causal: bool) -> jax.Array:
    """Attention with one matmul for queries, keys and values."""
    joined = dense(x, p["qkv"], p["qkv_bias"]).reshape(*x.shape[:2], 3 * heads, -1)
    mixed = attention(*jnp.split(joined, 3, 2), is_causal=is_causal)
    return dense(mixed.reshape(x.shape), p["out"], p["out_bias"])


def mlp(x: jax.Array, p: Any) -> jax.Array:
    """Two linear layers with a GELU between them."""
    return dense(jax.nn.gelu(dense(x, p["up"], p["up_bias"])), p["down"], p["down_bias"])


def transformer_block(width: int) -> dict[str, Any]:
    """Parameters of `self_attention`, `mlp` and two norms."""
    return {
        "norm1": affine(width),
        "qkv": (width, 3 * width),
        "qkv_bias": (3 * width,),
        "out": (width, width),
        "out_bias": (width,),
        "norm2": affine(width),
        "up": (width, 4 * width),
        "up_bias": (4 * width,),
        "down": (4 * width, width),
        "down_bias": (width,),
    }


def pre_norm(x: jax.Array, p: Any, heads: int, *, is_causal: bool) -> jax.Array:
    """A transformer block of which the norms stand first, as in GPT and ViT."""
    x = x + self_attention(layer_norm(x, p["norm1"]), p, heads, is_causal=is_causal)
    return x + mlp(layer_norm(x, p["norm2"]), p)


def post_norm(x: jax.Array, p: Any, heads: int) -> jax.Array:
    """A transformer block of which the norms stand last, as in BERT."""
    x = layer_norm(x + self_attention(x, p, heads, is_causal=False), p["norm1"])
    return layer_norm(x + mlp(x, p), p["norm2"])


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions of (batch, time, head, feature), in float32."""
    time, features = x.shape[1], x.shape[-1]
    rates = 10000 ** (-np.arange(0, features, 2, dtype=np.float32) / features)
    angles = np.arange(time, dtype=np.float32)[:, None, None] * rates
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = jnp.split(x.astype(F32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean loss; the logit of the label is taken before the cast, which changes nothing but the bytes."""
    taken = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0].astype(F32)
    return (jax.nn.logsumexp(logits.astype(F32), -1) - taken).mean()
