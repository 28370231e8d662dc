"""Ten models as plain functions: each one loss, which every precision design differentiates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from benchmarks import _image_models as images
from benchmarks import _text_models as text


@dataclasses.dataclass(frozen=True)
class Model:
    """A loss and what it takes.

    Attributes:
      sizes: what its heading says beside its name.
      loss: (parameters, batch, dtype to compute in) -> a scalar; by hand with bfloat16, for autocast with float32.
      params: shapes of the float32 parameters.
      batch: shapes of the batch.
    """

    sizes: str
    loss: Callable[[Any, Any, Any], jax.Array]
    params: Any
    batch: Any


_TEXTS = f"{text.BATCH} texts of {text.TIME}, vocabulary {text.VOCABULARY}"
MODELS: Mapping[str, Model] = {
    "GPT": Model(f"2 blocks of width {text.WIDTH}, {_TEXTS}", text.gpt, text.gpt_params(2), text.TOKENS),
    "scanned GPT": Model(
        f"4 blocks of width {text.WIDTH}, {_TEXTS}", text.scanned_gpt, text.gpt_params(4, is_stacked=True), text.TOKENS
    ),
    "LLaMA": Model(f"1 block of width {text.LLAMA_WIDTH}, {_TEXTS}", text.llama, text.llama_params(1), text.TOKENS),
    "BERT": Model(f"2 blocks of width {text.WIDTH}, {_TEXTS}", text.bert, text.gpt_params(2), text.TOKENS),
    "ViT": Model(
        f"2 blocks of width {images.VIT_WIDTH}, 20 images of 224 x 224",
        images.vit,
        images.vit_params(2, 224),
        images.classified(20, 224),
    ),
    "ResNet": Model(
        "the first 4 bottlenecks of a ResNet-50, 16 images of 224 x 224",
        images.resnet,
        images.resnet_params(),
        images.classified(16, 224),
    ),
    "UNet": Model(
        f"{images.UNET_WIDTH} channels, {images.UNET_BATCH} images of {images.UNET_SIZE} x {images.UNET_SIZE}",
        images.unet,
        images.unet_params(),
        images.NOISED,
    ),
    "LSTM": Model(f"width {text.LSTM_WIDTH}, 64 texts of 128", text.lstm, text.lstm_params(), text.LSTM_TOKENS),
    "MoE": Model(
        f"{text.EXPERTS} experts of width {text.MOE_WIDTH}, {_TEXTS}", text.moe, text.moe_params(), text.TOKENS
    ),
    "Mamba": Model(
        f"{text.INNER} channels of {text.STATES} states, {_TEXTS}", text.mamba, text.mamba_params(), text.TOKENS
    ),
}
