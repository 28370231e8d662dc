"""The batches of a job of several hosts: every host reads the rows of its own devices and no others."""

from typing import Any

import jax
import numpy as np


def my_rows(count: int) -> slice:
    """The block of ``count`` rows that belongs to this host; as many rows on every host."""
    rows = count // jax.process_count()
    return slice(rows * jax.process_index(), rows * (jax.process_index() + 1))


def batch_rows(total: int, *, size: int, step: int, seed: int) -> np.ndarray:
    """Which rows of ``total`` make up the batch of one step: all of them, of all hosts, int64[size].

    The rows are reshuffled for each epoch and an incomplete last batch is dropped. Every host computes the same rows,
    and they depend neither on the number of hosts nor on earlier steps: a job that is resumed, on as many hosts or on
    others, continues with the batches that an uninterrupted one would have seen.
    """
    epoch, index = divmod(step, total // size)
    order = np.random.default_rng((seed, epoch)).permutation(total)
    return order[index * size : (index + 1) * size]


def my_batch(images: np.ndarray, labels: np.ndarray, *, size: int, step: int, seed: int) -> tuple[np.ndarray, ...]:
    """This host's rows of the batch of one step; the arrays may be ``np.load(..., mmap_mode="r")``."""
    rows = batch_rows(len(labels), size=size, step=step, seed=seed)[my_rows(size)]
    return images[rows], labels[rows]


def padded(images: np.ndarray, labels: np.ndarray, multiple: int) -> tuple[np.ndarray, ...]:
    """As many rows as devices can share; the labels of the new ones, -1, are what no prediction equals."""
    missing = -len(labels) % multiple
    rest = [(0, 0)] * (images.ndim - 1)
    return np.pad(images, [(0, missing), *rest]), np.pad(labels, (0, missing), constant_values=-1)


def to_global(rows: Any, sharding: jax.sharding.Sharding) -> Any:
    """Global arrays from the rows that each host has."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)
