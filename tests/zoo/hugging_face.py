"""Models of Transformers in Flax: tiny configurations, random weights."""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .model import Model, cross_entropy, fast_jit, integers, normal

os.environ["HF_HUB_OFFLINE"] = "1"  # configurations are built here: whatever asks the hub is a mistake

VOCABULARY = 67


def pretrained(cls: Any, config: Any) -> tuple[Any, Any]:
    """A model without weights, and weights for it, which compile faster on their own."""
    model = cls(config, _do_init=False)
    return model, fast_jit(lambda key: model.init_weights(key, model.input_shape))(jax.random.key(0))


def trained(
    cls: Any,
    config: Any,
    batch: Callable[[np.random.Generator], dict[str, jax.Array]],
    loss: Callable[[Any, dict[str, jax.Array]], jax.Array],
) -> Model:
    """A model of Transformers and a loss of its outputs and the batch; labels are not inputs."""

    def with_dtype(model: Any) -> Any:
        def evaluate(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            return loss(model(**inputs, params=params, train=False), batch)

        return evaluate

    model, params = pretrained(cls, config)
    return Model(with_dtype(model), with_dtype(cls(config, _do_init=False, dtype=jnp.bfloat16)), params, batch)


def _next_token(outputs: Any, batch: dict[str, jax.Array]) -> jax.Array:
    return cross_entropy(outputs.logits[:, :-1], batch["input_ids"][:, 1:])


def _labels(outputs: Any, batch: dict[str, jax.Array]) -> jax.Array:
    return cross_entropy(outputs.logits, batch["labels"])


def bert() -> Model:
    from transformers import BertConfig, FlaxBertForMaskedLM

    def batch(rng: np.random.Generator) -> dict[str, jax.Array]:
        ids, labels = (integers(rng, VOCABULARY, (4, 16)) for _ in range(2))
        return {"input_ids": ids, "attention_mask": jnp.ones((4, 16), jnp.int32).at[0, 12:].set(0), "labels": labels}

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    return trained(FlaxBertForMaskedLM, config, batch, _labels)


def gpt2_config(**more: Any) -> Any:
    from transformers import GPT2Config

    return GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2, **more)


def gpt2() -> Model:
    from transformers import FlaxGPT2LMHeadModel

    def batch(rng: np.random.Generator) -> dict[str, jax.Array]:
        return {"input_ids": integers(rng, VOCABULARY, (4, 16))}

    return trained(FlaxGPT2LMHeadModel, gpt2_config(), batch, _next_token)


def t5() -> Model:
    from transformers import FlaxT5ForConditionalGeneration, T5Config
    from transformers.models.t5 import modeling_flax_t5

    # The module calls `jnp.clip(x, a_max=...)`, an argument that JAX has removed.
    numpy = vars(jnp) | {"clip": lambda x, *, a_max: jnp.minimum(x, a_max)}
    modeling_flax_t5.jnp = types.SimpleNamespace(**numpy)

    def batch(rng: np.random.Generator) -> dict[str, jax.Array]:
        names = ("input_ids", "decoder_input_ids", "labels")
        return {name: integers(rng, VOCABULARY, (4, 12)) for name in names}

    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0,
    )  # fmt: skip
    return trained(FlaxT5ForConditionalGeneration, config, batch, _labels)


def vit() -> Model:
    from transformers import FlaxViTForImageClassification, ViTConfig

    def batch(rng: np.random.Generator) -> dict[str, jax.Array]:
        return {"pixel_values": normal(rng, (4, 3, 16, 16)), "labels": integers(rng, 10, (4,))}

    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        num_labels=10,
    )  # fmt: skip
    return trained(FlaxViTForImageClassification, config, batch, _labels)


def whisper() -> Model:
    from transformers import FlaxWhisperForConditionalGeneration, WhisperConfig

    def batch(rng: np.random.Generator) -> dict[str, jax.Array]:
        ids, labels = (integers(rng, VOCABULARY, (2, 12)) for _ in range(2))
        return {"input_features": normal(rng, (2, 16, 32)), "decoder_input_ids": ids, "labels": labels}

    config = WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=16, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_source_positions=16, max_target_positions=16, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return trained(FlaxWhisperForConditionalGeneration, config, batch, _labels)
