"""What autocast keeps for the backward pass, beside the same Flax model with ``dtype=bfloat16``."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jmp_lite as jmp
from benchmarks import _jaxprs

TOKENS, WIDTH, HIDDEN, HEADS, DROPOUT = 256, 32, 128, 2, 0.1


class Block(nn.Module):
    """A decoder block with a dropout mask in each place where language models have one."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask):
        def drop(x):
            return nn.Dropout(DROPOUT, deterministic=False)(x)

        attention = nn.MultiHeadDotProductAttention(
            HEADS, dtype=self.dtype, dropout_rate=DROPOUT, broadcast_dropout=False, deterministic=False
        )
        x = x + drop(attention(nn.LayerNorm(dtype=self.dtype)(x), mask=mask))
        hidden = nn.relu(nn.Dense(HIDDEN, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)))
        return x + drop(nn.Dense(WIDTH, dtype=self.dtype)(drop(hidden)))


class LanguageModel(nn.Module):
    """Embeddings are dropped in float32; logits come from a head, or from the embeddings, in float32."""

    dtype: jnp.dtype
    is_tied: bool

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(TOKENS, WIDTH)
        x = nn.Dropout(DROPOUT, deterministic=False)(embed(tokens)).astype(self.dtype)
        for _ in range(2):
            x = Block(self.dtype)(x, nn.make_causal_mask(tokens, dtype=self.dtype))
        x = nn.LayerNorm(dtype=self.dtype)(x)
        return embed.attend(x.astype(jnp.float32)) if self.is_tied else nn.Dense(TOKENS, dtype=self.dtype)(x)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_language_model_with_dropout_keeps_what_its_own_bfloat16_keeps(is_tied):
    def loss_of(dtype):
        model = LanguageModel(dtype, is_tied)

        def loss(params, tokens, key):
            logits = model.apply(params, tokens, rngs={"dropout": key}).astype(jnp.float32)
            targets = 0.9 * jax.nn.one_hot(tokens, TOKENS) + 0.1 / TOKENS
            return -jnp.mean(jnp.sum(targets * nn.log_softmax(logits), -1)), None

        return loss

    tokens, key = jax.ShapeDtypeStruct((4, 16), jnp.int32), jax.random.key(0)
    model = LanguageModel(jnp.float32, is_tied)
    params = jax.eval_shape(model.init, {"params": key, "dropout": key}, tokens)
    mixed = jmp.autocast(loss_of(jnp.float32), "mixed_bfloat16")
    with jax.numpy_dtype_promotion("standard"):  # which norms with a dtype of 16 bits need
        own = _jaxprs.residual_bytes(loss_of(jnp.bfloat16), params, tokens, key)
    wide = _jaxprs.residual_bytes(loss_of(jnp.float32), params, tokens, key)
    assert _jaxprs.residual_bytes(mixed, params, tokens, key) <= 1.05 * own < wide
