"""The handwritten digits that ship inside scikit-learn: 1797 images of 8 x 8 pixels, ten classes."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

NUM_TRAIN = 1347
NUM_TEST = 450


class Digits(NamedTuple):
    """Images are float32[n, 8, 8, 1] with mean 0 and variance 1 over the training set; labels int32[n]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(seed: int) -> Digits:
    """Splits the images at random into 1347 for training and 450 for testing."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images = pixels.reshape(-1, 8, 8, 1)[order].astype(np.float32)
    labels = labels[order].astype(np.int32)
    train, test = slice(NUM_TEST, None), slice(NUM_TEST)
    images = (images - images[train].mean()) / images[train].std()
    return Digits(images[train], labels[train], images[test], labels[test])


def batch(images: np.ndarray, labels: np.ndarray, *, size: int, step: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The batch of one step: the data reshuffled for each epoch, an incomplete last batch dropped.

    It depends on nothing but the arguments, so that a resumed run continues with the batches that
    an uninterrupted one would have seen.
    """
    epoch, index = divmod(step, len(labels) // size)
    order = np.random.default_rng((seed, epoch)).permutation(len(labels))
    chosen = order[index * size : (index + 1) * size]
    return images[chosen], labels[chosen]
