"""Models of images: shapes of parameters and batch, and a loss that takes the dtype to compute in."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import _layers as layers

F32 = jnp.float32
CLASSES = 1000


def images(count: int, size: int, channels: int = 3) -> jax.ShapeDtypeStruct:
    """A float32 batch."""
    return jax.ShapeDtypeStruct((count, size, size, channels), F32)


def classified(count: int, size: int) -> dict[str, Any]:
    """A batch with labels."""
    return {"inputs": images(count, size), "labels": layers.integers(count)}


def classify(x: jax.Array, p: Any, batch: Any) -> jax.Array:
    """Cross-entropy of a linear layer."""
    return layers.cross_entropy(layers.dense(x, p["head"], p["head_bias"]), batch["labels"])


# --- ViT ---

VIT_WIDTH, VIT_HEADS, PATCH = 768, 12, 16


def vit_params(depth: int, size: int) -> Any:
    """Patches of an image of so many pixels, and blocks."""
    width = VIT_WIDTH
    return layers.floats(
        {
            "patch": (PATCH, PATCH, 3, width),
            "positions": ((size // PATCH) ** 2, width),
            "blocks": [layers.transformer_block(width)] * depth,
            "norm": layers.affine(width),
            "head": (width, CLASSES),
            "head_bias": (CLASSES,),
        }
    )


def vit(p: Any, batch: Any, dtype: Any) -> jax.Array:
    """Encoder of patches, averaged over them."""
    x = layers.conv(batch["inputs"].astype(dtype), p["patch"], PATCH, "VALID")
    x = x.reshape(x.shape[0], -1, VIT_WIDTH) + p["positions"].astype(dtype)
    for block in p["blocks"]:
        x = layers.pre_norm(x, block, VIT_HEADS, is_causal=False)
    x = layers.layer_norm(x, p["norm"]).astype(F32).mean(1).astype(dtype)
    return classify(x, p, batch)


# --- ResNet ---

STAGES = ((64, 2), (128, 2))
"""Middle channels and number of blocks of the first stages of a ResNet-50."""


def _bottleneck(before: int, middle: int, stride: int) -> dict[str, Any]:
    after = 4 * middle
    block = {
        "conv1": (1, 1, before, middle),
        "conv2": (3, 3, middle, middle),
        "conv3": (1, 1, middle, after),
        "norm1": layers.affine(middle),
        "norm2": layers.affine(middle),
        "norm3": layers.affine(after),
    }
    if before != after or stride != 1:
        block |= {"project": (1, 1, before, after), "norm": layers.affine(after)}
    return block


def resnet_params() -> Any:
    """Stem, bottlenecks and head."""
    blocks, channels = [], 64
    for stage, (middle, count) in enumerate(STAGES):
        for index in range(count):
            blocks.append(_bottleneck(channels, middle, _stride(stage, index)))
            channels = 4 * middle
    stem = {"stem": (7, 7, 3, 64), "norm": layers.affine(64)}
    return layers.floats({**stem, "blocks": blocks, "head": (channels, CLASSES), "head_bias": (CLASSES,)})


def _stride(stage: int, index: int) -> int:
    return 2 if stage and not index else 1


def resnet(p: Any, batch: Any, dtype: Any) -> jax.Array:
    """Bottlenecks with batch norm, which halve the resolution with every stage."""
    x = jax.nn.relu(layers.batch_norm(layers.conv(batch["inputs"].astype(dtype), p["stem"], 2), p["norm"]))
    x = lax.reduce_window(x, np.array(-np.inf, x.dtype), lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    strides = [_stride(stage, index) for stage, (_, count) in enumerate(STAGES) for index in range(count)]
    for block, stride in zip(p["blocks"], strides, strict=True):
        y = jax.nn.relu(layers.batch_norm(layers.conv(x, block["conv1"]), block["norm1"]))
        y = jax.nn.relu(layers.batch_norm(layers.conv(y, block["conv2"], stride), block["norm2"]))
        y = layers.batch_norm(layers.conv(y, block["conv3"]), block["norm3"])
        if "project" in block:
            x = layers.batch_norm(layers.conv(x, block["project"], stride), block["norm"])
        x = jax.nn.relu(x + y)
    return classify(x.astype(F32).mean((1, 2)).astype(dtype), p, batch)


# --- UNet ---

UNET_WIDTH, UNET_TIME, UNET_BATCH, UNET_SIZE = 128, 256, 8, 32
NOISED = {
    "inputs": images(UNET_BATCH, UNET_SIZE, 4),
    "noise": images(UNET_BATCH, UNET_SIZE, 4),
    "times": jax.ShapeDtypeStruct((UNET_BATCH,), F32),
}


def _residual(before: int, after: int) -> dict[str, Any]:
    block = {
        "norm1": layers.affine(before),
        "conv1": (3, 3, before, after),
        "time": (UNET_TIME, after),
        "norm2": layers.affine(after),
        "conv2": (3, 3, after, after),
    }
    return block if before == after else {**block, "project": (1, 1, before, after)}


def unet_params() -> Any:
    """Two resolutions down, a middle, two up."""
    c = UNET_WIDTH
    return layers.floats(
        {
            "in": (3, 3, 4, c),
            "norm": layers.affine(c),
            "out": (3, 3, c, 4),
            "down1": _residual(c, c),
            "down2": _residual(c, 2 * c),
            "middle": _residual(2 * c, 2 * c),
            "up2": _residual(4 * c, 2 * c),
            "up1": _residual(3 * c, c),
        }
    )


def _residual_block(x: jax.Array, p: Any, time: jax.Array) -> jax.Array:
    y = layers.conv(jax.nn.silu(layers.group_norm(x, p["norm1"])), p["conv1"])
    y = y + layers.dense(time, p["time"])[:, None, None]
    y = layers.conv(jax.nn.silu(layers.group_norm(y, p["norm2"])), p["conv2"])
    return y + (layers.conv(x, p["project"]) if "project" in p else x)


def _time_features(times: jax.Array) -> jax.Array:
    half = UNET_TIME // 2
    rates = np.exp(-math.log(1e4) * np.arange(half, dtype=np.float32) / half)
    phase = times[:, None] * rates
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], -1)


def unet(p: Any, batch: Any, dtype: Any) -> jax.Array:
    """Predicts the noise of a diffused image; sines of the time are float32 by hand too."""
    time = jax.nn.silu(_time_features(batch["times"]).astype(dtype))
    full = _residual_block(layers.conv(batch["inputs"].astype(dtype), p["in"]), p["down1"], time)
    window = (1, 2, 2, 1)
    half = lax.reduce_window(full, np.array(0, full.dtype), lax.add, window, window, "SAME") / 4
    half = _residual_block(half, p["down2"], time)
    middle = _residual_block(half, p["middle"], time)
    up = _residual_block(jnp.concatenate([middle, half], -1), p["up2"], time)
    up = jnp.repeat(jnp.repeat(up, 2, 1), 2, 2)
    up = _residual_block(jnp.concatenate([up, full], -1), p["up1"], time)
    found = layers.conv(jax.nn.silu(layers.group_norm(up, p["norm"])), p["out"])
    return jnp.square(found.astype(F32) - batch["noise"]).mean()
