"""Models of token sequences: shapes of parameters and batch, and a loss that takes the dtype to compute in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import _layers as layers

F32 = jnp.float32
WIDTH = 768
HEADS = 12
VOCABULARY = 8192
BATCH, TIME = 8, 512
TOKENS = {"inputs": layers.integers(BATCH, TIME), "labels": layers.integers(BATCH, TIME)}


def embed(p: Any, batch: Any, dtype: Any) -> jax.Array:
    """The embedding of a batch, and the one place where a model by hand chooses its dtype."""
    x = p["embedding"].astype(dtype)[batch["inputs"]]
    return x + p["positions"].astype(dtype) if "positions" in p else x


def tied_loss(x: jax.Array, p: Any, batch: Any) -> jax.Array:
    """Cross-entropy of logits by the embedding."""
    return layers.cross_entropy(x @ p["embedding"].astype(x.dtype).T, batch["labels"])


# --- GPT, in a row and scanned, and BERT ---


def gpt_params(depth: int, *, is_stacked: bool = False) -> Any:
    """Of blocks in a list, or stacked for a scan."""
    block = layers.transformer_block(WIDTH)
    blocks = (
        jax.tree.map(lambda sizes: (depth, *sizes), block, is_leaf=lambda leaf: type(leaf) is tuple)
        if is_stacked
        else [block] * depth
    )
    return layers.floats(
        {
            "embedding": (VOCABULARY, WIDTH),
            "positions": (TIME, WIDTH),
            "blocks": blocks,
            "norm": layers.affine(WIDTH),
        }
    )


def gpt(p: Any, batch: Any, dtype: Any) -> jax.Array:
    """Decoder with a list of blocks."""
    x = embed(p, batch, dtype)
    for block in p["blocks"]:
        x = layers.pre_norm(x, block, HEADS, is_causal=True)
    return tied_loss(layers.layer_norm(x, p["norm"]), p, batch)


def scanned_gpt(p: Any, batch: Any, dtype: Any) -> jax.Array:
    """Decoder with a scan over stacked blocks."""

    def step(x: jax.Array, block: Any) -> tuple[jax.Array, None]:
        return layers.pre_norm(x, block, HEADS, is_causal=True), None

    x, _ = lax.scan(step, embed(p, batch, dtype), p["blocks"])
    return tied_loss(layers.layer_norm(x, p["norm"]), p, batch)


def bert(p: Any, batch: Any, dtype: Any) -> jax.Array:
    """Encoder whose norms stand last."""
    x = layers.layer_norm(embed(p, batch, dtype), p["norm"])
    for block in p["blocks"]:
        x = layers.post_norm(x, block, HEADS)
    return tied_loss(x, p, batch)


# --- LLaMA ---

LLAMA_WIDTH, LLAMA_HEADS, LLAMA_KEYS, LLAMA_HIDDEN = 1024, 16, 4, 2816


def llama_params(
    depth: int, *, width: int = LLAMA_WIDTH, hidden: int = LLAMA_HIDDEN, vocabulary: int = VOCABULARY
) -> Any:
    """Grouped queries and gated hidden layers."""
    keys = LLAMA_KEYS * width // LLAMA_HEADS
    block = {
        "norm1": (width,),
        "q": (width, width),
        "k": (width, keys),
        "v": (width, keys),
        "out": (width, width),
        "norm2": (width,),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    return layers.floats(
        {
            "embedding": (vocabulary, width),
            "head": (width, vocabulary),
            "norm": (width,),
            "blocks": [block] * depth,
        }
    )


def grouped_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention of groups of heads to one key each."""
    key, value = (jnp.repeat(x, LLAMA_HEADS // LLAMA_KEYS, 2) for x in (key, value))
    return layers.attention(query, key, value, is_causal=True)


def llama(
    p: Any, batch: Any, dtype: Any, attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = grouped_attention
) -> jax.Array:
    """Decoder with rotary positions, grouped queries and SwiGLU."""
    x = embed(p, batch, dtype)
    width = x.shape[-1]

    def heads(x: jax.Array, weight: jax.Array) -> jax.Array:
        return layers.dense(x, weight).reshape(*x.shape[:2], -1, width // LLAMA_HEADS)

    for block in p["blocks"]:
        normal = layers.rms_norm(x, block["norm1"])
        query, key = layers.rotate(heads(normal, block["q"])), layers.rotate(heads(normal, block["k"]))
        mixed = attend(query, key, heads(normal, block["v"]))
        x = x + layers.dense(mixed.reshape(x.shape), block["out"])
        normal = layers.rms_norm(x, block["norm2"])
        gate = jax.nn.silu(layers.dense(normal, block["gate"]))
        x = x + layers.dense(gate * layers.dense(normal, block["up"]), block["down"])
    with jax.named_scope("head"):
        logits = layers.dense(layers.rms_norm(x, p["norm"]), p["head"])
    return layers.cross_entropy(logits, batch["labels"])


# --- LSTM ---

LSTM_WIDTH = 1024
LSTM_TOKENS = {"inputs": layers.integers(128, 64), "labels": layers.integers(128, 64)}
"""Time comes first."""


def lstm_params() -> Any:
    """One layer between an embedding and a head."""
    width = LSTM_WIDTH
    return layers.floats(
        {
            "embedding": (VOCABULARY, width),
            "head": (width, VOCABULARY),
            "input": (width, 4 * width),
            "hidden": (width, 4 * width),
            "bias": (4 * width,),
        }
    )


def lstm(p: Any, batch: Any, dtype: Any) -> jax.Array:
    """One layer; by hand too, the cell state is float32 and the gradient of the hidden weight adds up in it."""

    def step(state: Any, gates: jax.Array) -> Any:
        h, c = state
        enter, forget, new, leave = jnp.split(gates + layers.dense(h, p["hidden"]), 4, -1)
        entering = jax.nn.sigmoid(enter) * jnp.tanh(new)
        c = jax.nn.sigmoid(forget).astype(F32) * c + entering.astype(F32)
        h = jax.nn.sigmoid(leave) * jnp.tanh(c).astype(dtype)
        return (h, c), h

    x = embed(p, batch, dtype)
    start = jnp.zeros((x.shape[1], LSTM_WIDTH))
    _, states = lax.scan(step, (start.astype(dtype), start), layers.dense(x, p["input"], p["bias"]))
    return layers.cross_entropy(layers.dense(states, p["head"]), batch["labels"])


# --- Mixture of experts ---

MOE_WIDTH, EXPERTS, CAPACITY, MOE_HIDDEN = 768, 8, 160, 2048


def moe_params() -> Any:
    """A router and its experts, between an embedding and tied logits."""
    width = MOE_WIDTH
    return layers.floats(
        {
            "embedding": (VOCABULARY, width),
            "norm1": (width,),
            "norm2": (width,),
            "router": (width, EXPERTS),
            "up": (EXPERTS, width, MOE_HIDDEN),
            "down": (EXPERTS, MOE_HIDDEN, width),
        }
    )


def _routes(x: jax.Array, router: jax.Array) -> jax.Array:
    """Weights of (batch, time, expert, place), for the two best experts as long as they have places; in float32."""
    weights, chosen = lax.top_k(jax.nn.softmax(x.astype(F32) @ router), 2)
    is_chosen = jax.nn.one_hot(chosen, EXPERTS, dtype=jnp.int32)
    place = is_chosen.sum(2).cumsum(1) - 1
    slot = jnp.where(is_chosen > 0, place[:, :, None], -1)
    return jnp.einsum("btk,btkec->btec", weights, jax.nn.one_hot(slot, CAPACITY))


def moe(p: Any, batch: Any, dtype: Any) -> jax.Array:
    """Experts by einsum over places; the router is float32 by hand too."""
    x = embed(p, batch, dtype)
    normal = layers.rms_norm(x, p["norm1"])
    combine = _routes(normal, p["router"])
    dispatch = (combine > 0).astype(dtype)
    rows = jnp.einsum("btec,btd->becd", dispatch, normal)
    hidden = jax.nn.gelu(jnp.einsum("becd,edf->becf", rows, p["up"].astype(dtype)))
    rows = jnp.einsum("becf,efd->becd", hidden, p["down"].astype(dtype))
    x = x + jnp.einsum("btec,becd->btd", combine.astype(dtype), rows)
    return tied_loss(layers.rms_norm(x, p["norm2"]), p, batch)


# --- Mamba ---

MAMBA_WIDTH, INNER, STATES, RANK = 768, 1536, 16, 48


def mamba_params() -> Any:
    """One selective state space."""
    width = MAMBA_WIDTH
    return layers.floats(
        {
            "embedding": (VOCABULARY, width),
            "norm1": (width,),
            "norm2": (width,),
            "in": (width, 2 * INNER),
            "out": (INNER, width),
            "skip": (INNER,),
            "rates": (INNER, STATES),
            "step_down": (INNER, RANK),
            "step_up": (RANK, INNER),
            "step_bias": (INNER,),
            "input_output": (INNER, 2 * STATES),
        }
    )


def _selective_scan(delta: jax.Array, x: jax.Array, enter: jax.Array, leave: jax.Array, rates: jax.Array) -> jax.Array:
    """A linear recurrence over time in float32; what goes in and out has the dtype of `x`."""

    def step(state: jax.Array, now: Any) -> tuple[jax.Array, jax.Array]:
        delta, x, enter, leave = now
        x, enter, leave = x.astype(F32), enter.astype(F32), leave.astype(F32)
        state = jnp.exp(delta[..., None] * rates) * state + (delta * x)[..., None] * enter[:, None]
        return state, jnp.einsum("ben,bn->be", state, leave).astype(now[1].dtype)

    timed = [item.swapaxes(0, 1) for item in (delta, x, enter, leave)]
    _, found = lax.scan(step, jnp.zeros((x.shape[0], INNER, STATES)), timed)
    return found.swapaxes(0, 1)


def mamba(p: Any, batch: Any, dtype: Any) -> jax.Array:
    """A gated selective state space; step sizes and states are float32 by hand too."""
    x = embed(p, batch, dtype)
    inner, gate = jnp.split(layers.dense(layers.rms_norm(x, p["norm1"]), p["in"]), 2, -1)
    inner = jax.nn.silu(inner)
    step = layers.dense(layers.dense(inner, p["step_down"]), p["step_up"])
    delta = jax.nn.softplus(step.astype(F32) + p["step_bias"])
    enter, leave = jnp.split(layers.dense(inner, p["input_output"]), 2, -1)
    mixed = _selective_scan(delta, inner, enter, leave, -jnp.exp(p["rates"]))
    mixed = (mixed + inner * p["skip"].astype(dtype)) * jax.nn.silu(gate)
    return tied_loss(layers.rms_norm(x + layers.dense(mixed, p["out"]), p["norm2"]), p, batch)
