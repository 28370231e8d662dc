"""Weights on disk: dense, quantized or sparse arrays, as Flax writes them."""

from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

import jmp_lite as jmp

FEWEST_ZEROS = 0.25  # an array with fewer is written whole


dequantize = jax.jit(jmp.quant.dequantize_tree)


class Sparse(NamedTuple):
    """The weights that are not zero, in order, and one bit for every weight that says whether it is one of them."""

    bits: np.ndarray
    values: np.ndarray


def to_sparse(params: Any) -> Any:
    """Puts ``Sparse`` in place of arrays with many zeros."""

    def sparse(x: jax.Array) -> Any:
        x = np.asarray(x)
        alive = x != 0
        return x if alive.mean() > 1 - FEWEST_ZEROS else Sparse(np.packbits(alive), x[alive])

    return jax.tree.map(sparse, params)


def to_dense(weights: Any, like: Any) -> Any:
    """Ordinary arrays of the shapes and dtypes of ``like``."""

    def dense(example: Any, x: Any) -> Any:
        if not isinstance(x, Sparse):
            return jnp.asarray(x, example.dtype)
        whole = np.zeros(example.size, example.dtype)
        whole[np.unpackbits(x.bits, count=example.size).astype(bool)] = x.values
        return jnp.asarray(whole.reshape(example.shape))

    return jax.tree.map(dense, like, dequantize(weights))


def save(weights: Any, file: Path) -> int:
    """Writes the weights; returns the size of the file in bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.write_bytes(flax.serialization.to_bytes(weights))


def load(weights: Any, file: Path) -> Any:
    """Reads weights from a file; those given only say which arrays there are."""
    return flax.serialization.from_bytes(weights, file.read_bytes())


def zeros(params: Any) -> float:
    """The fraction of weights that are zero."""
    leaves = jax.tree.leaves(params)
    return sum(int(np.sum(np.asarray(x) == 0)) for x in leaves) / sum(x.size for x in leaves)
