"""Sizes and data of the models that `benchmarks.accelerator` trains: by NumPy alone, so that torch shares them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from benchmarks import _examples

Batch = tuple[np.ndarray, np.ndarray]
"""Inputs, and the int32 labels that they are to be told."""
_KINDS, _GRID, _NOISE = 100, 4, 2.0


class Text(NamedTuple):
    """A GPT and its texts: characters of the Python standard library."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int
    batch: int

    @property
    def distinct(self) -> int:
        """How many batches there are before the first comes again."""
        return 200

    @property
    def units(self) -> int:
        """Tokens in a batch."""
        return self.batch * self.length

    def draw(self, step: int) -> Batch:
        """Characters, int32[batch, length], and for each the next one; they depend on nothing but the step."""
        data = _examples.module("_gpt_data")
        text = data.batch(_characters(), size=self.batch, length=self.length + 1, step=step % self.distinct, seed=0)
        return text[:, :-1], text[:, 1:]

    def __str__(self) -> str:
        return (
            f"{self.layers} layers of width {self.width}, {self.heads} heads, vocabulary {self.vocabulary}, "
            f"{self.batch} texts of {self.length}"
        )


class Images(NamedTuple):
    """A ResNet of bottlenecks and its images: one of 100 coarse patterns under noise."""

    stages: tuple[tuple[int, int], ...]
    classes: int
    pixels: int
    batch: int

    @property
    def distinct(self) -> int:
        """How many batches there are before the first comes again; they take 39 MB each."""
        return 20

    @property
    def units(self) -> int:
        """Images in a batch."""
        return self.batch

    def draw(self, step: int) -> Batch:
        """Images, float32[batch, pixels, pixels, 3], and the numbers of their patterns."""
        rng = np.random.default_rng((0, step % self.distinct))
        labels = rng.integers(0, min(_KINDS, self.classes), self.batch, dtype=np.int32)
        patterns = np.random.default_rng(0).standard_normal((_KINDS, _GRID, _GRID, 3), dtype=np.float32)
        side = self.pixels // _GRID
        images = patterns[labels].repeat(side, 1).repeat(side, 2)
        images += _NOISE * rng.standard_normal(images.shape, dtype=np.float32)
        return images, labels

    def __str__(self) -> str:
        blocks = ", ".join(str(count) for _, count in self.stages)
        return f"stages of {blocks} bottlenecks, {self.batch} images of {self.pixels} x {self.pixels}"


Sizes = Text | Images


@functools.cache
def _characters() -> Any:
    return _examples.module("_gpt_data").load().train


def full(texts: int) -> dict[str, Sizes]:
    """The sizes of GPT-2 small and of ResNet-50, with so many texts in a batch."""
    return {
        "GPT": Text(layers=12, width=768, heads=12, vocabulary=50257, length=1024, batch=texts),
        "ResNet": Images(stages=((64, 3), (128, 4), (256, 6), (512, 3)), classes=1000, pixels=224, batch=64),
    }


TINY: dict[str, Sizes] = {
    "GPT": Text(layers=2, width=64, heads=4, vocabulary=256, length=32, batch=4),
    "ResNet": Images(stages=((8, 1), (16, 1)), classes=10, pixels=16, batch=8),
}
"""To show that everything runs."""
