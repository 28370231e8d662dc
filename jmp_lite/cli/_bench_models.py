"""A GPT and a ResNet in bare JAX: small enough to read, large enough to measure.

A model casts its weights to the dtype of what it is given, as one does by hand; norms, softmax and losses are float32.
Given float32, it is the model that autocast is handed.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

F32 = jnp.float32
#: A loss of ``(params, batch)``.
Loss = Callable[[Any, Any], jax.Array]
_IMAGES = ("NHWC", "HWIO", "NHWC")


class Model(NamedTuple):
    """What is trained.

    Attributes:
        name: How tables call it.
        size: Its sizes, in words.
        unit: What of it a step counts, such as tokens.
        units: How many of them a step takes.
        shapes: Of its parameters, a tree of tuples.
        batch: Draws the data.
        loss_in: Dtype to compute in -> loss.
    """

    name: str
    size: str
    unit: str
    units: int
    shapes: Any
    batch: Callable[[np.random.Generator], Mapping[str, np.ndarray]]
    loss_in: Callable[[Any], Loss]

    def init(self, rng: np.random.Generator) -> Any:
        """Draws float32 parameters on the host, where nothing has to be compiled for it.

        Scales are 1, biases 0, weights normal with the variance 1 / inputs.
        """
        return jax.tree_util.tree_map_with_path(
            lambda path, shape: _initial(path[-1].key, shape, rng), self.shapes, is_leaf=_is_shape
        )

    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(map(math.prod, jax.tree.leaves(self.shapes, is_leaf=_is_shape)))


def _is_shape(node: Any) -> bool:
    return type(node) is tuple


def _initial(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if name in ("scale", "bias"):
        return np.full(shape, name == "scale", np.float32)
    inputs = shape[-1] if name == "embedding" else math.prod(shape[-4:-1] if name == "kernel" else shape[-2:-1])
    return rng.standard_normal(shape, np.float32) * np.float32(inputs**-0.5)


# --- Layers ---


def _dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.matmul(x, weight.astype(x.dtype))


def _normalized(x: jax.Array, p: Any, axes: tuple[int, ...]) -> jax.Array:
    """A layer norm or a batch norm, by the axes that it averages over."""
    high = x.astype(F32)
    centered = high - high.mean(axes, keepdims=True)
    normal = centered * lax.rsqrt(jnp.square(centered).mean(axes, keepdims=True) + 1e-5)
    ones = (1,) * (x.ndim - 1)
    shifted: jax.Array = normal * p["scale"].reshape(*ones, -1) + p["bias"].reshape(*ones, -1)
    return shifted.astype(x.dtype)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    high = logits.astype(F32)
    right = jnp.take_along_axis(high, labels[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(high, -1) - right)


# --- GPT ---


def gpt(*, depth: int, width: int, heads: int, vocabulary: int, time: int, batch: int) -> Model:
    """A decoder as GPT-2, its blocks in a scan: positions are learned, norms stand first; no biases, no dropout."""
    norm = {"scale": (depth, width), "bias": (depth, width)}
    shapes = {
        "embedding": (vocabulary, width),
        "positions": {"embedding": (time, width)},
        "blocks": {
            "norm1": norm,
            "qkv": (depth, width, 3 * width),
            "out": (depth, width, width),
            "norm2": norm,
            "up": (depth, width, 4 * width),
            "down": (depth, 4 * width, width),
        },
        "norm": {"scale": (width,), "bias": (width,)},
    }

    def tokens(rng: np.random.Generator) -> Mapping[str, np.ndarray]:
        drawn = rng.integers(0, vocabulary, (batch, time + 1), np.int32)
        return {"inputs": drawn[:, :-1], "labels": drawn[:, 1:]}

    def loss_in(dtype: Any) -> Loss:
        def loss(p: Any, batch: Any) -> jax.Array:
            embedding = p["embedding"].astype(dtype)
            x = embedding[batch["inputs"]] + p["positions"]["embedding"].astype(dtype)[None]
            x, _ = lax.scan(lambda x, block: (_block(x, block, heads), None), x, p["blocks"])
            return _cross_entropy(_normalized(x, p["norm"], (-1,)) @ embedding.T, batch["labels"])

        return loss

    size = f"{depth} layers, width {width}, vocabulary {vocabulary}, batch of {batch} x {time} tokens"
    return Model("GPT", size, "tokens", batch * time, shapes, tokens, loss_in)


def _block(x: jax.Array, p: Any, heads: int) -> jax.Array:
    normal = _normalized(x, p["norm1"], (-1,))
    query, key, value = jnp.split(_dense(normal, p["qkv"]).reshape(*x.shape[:2], 3 * heads, -1), 3, 2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(F32) * query.shape[-1] ** -0.5
    causal = np.tri(x.shape[1], dtype=bool)[None, None]
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9)).astype(x.dtype)
    x = x + _dense(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape), p["out"])
    return x + _dense(jax.nn.gelu(_dense(_normalized(x, p["norm2"], (-1,)), p["up"])), p["down"])


# --- ResNet ---


def resnet(*, stages: tuple[tuple[int, int], ...], stem: int, classes: int, pixels: int, batch: int) -> Model:
    """Basic blocks as in ResNet-18, with batch norm; ``stages`` are channels and blocks, ``stem`` its stride."""
    channels, blocks = stages[0][0], []
    for stage, (after, count) in enumerate(stages):
        for index in range(count):
            blocks.append((channels, after, 2 if stage and not index else 1))
            channels = after
    shapes = {
        "stem": _conv_norm(7 if stem > 1 else 3, 3, stages[0][0]),
        "blocks": [_basic_block(*block) for block in blocks],
        "head": (channels, classes),
    }

    def images(rng: np.random.Generator) -> Mapping[str, np.ndarray]:
        labels = rng.integers(0, classes, batch, np.int32)
        return {"inputs": rng.standard_normal((batch, pixels, pixels, 3), np.float32), "labels": labels}

    def loss_in(dtype: Any) -> Loss:
        def loss(p: Any, batch: Any) -> jax.Array:
            x = jax.nn.relu(_convolved(batch["inputs"].astype(dtype), p["stem"], stem))
            if stem > 1:
                x = lax.reduce_window(x, np.array(-np.inf, x.dtype), lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
            for block, (_, _, stride) in zip(p["blocks"], blocks, strict=True):
                inner = _convolved(jax.nn.relu(_convolved(x, block["first"], stride)), block["second"], 1)
                x = jax.nn.relu(inner + (_convolved(x, block["skip"], stride) if "skip" in block else x))
            return _cross_entropy(_dense(x.astype(F32).mean((1, 2)).astype(dtype), p["head"]), batch["labels"])

        return loss

    size = f"{2 * len(blocks) + 2} layers, up to {channels} channels, batch of {batch} images of {pixels} x {pixels}"
    return Model("ResNet", size, "images", batch, shapes, images, loss_in)


def _conv_norm(window: int, before: int, after: int) -> dict[str, tuple[int, ...]]:
    return {"kernel": (window, window, before, after), "scale": (after,), "bias": (after,)}


def _basic_block(before: int, after: int, stride: int) -> dict[str, Any]:
    block = {"first": _conv_norm(3, before, after), "second": _conv_norm(3, after, after)}
    return block if before == after and stride == 1 else {**block, "skip": _conv_norm(1, before, after)}


def _convolved(x: jax.Array, p: Any, stride: int) -> jax.Array:
    """A convolution and its batch norm."""
    kernel = p["kernel"].astype(x.dtype)
    x = lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=_IMAGES)
    return _normalized(x, p, (0, 1, 2))
