"""A model from a package, in the form that all of them are measured in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Loss = Callable[[Any, Any], jax.Array]
"""(float32 parameters, batch) -> the loss."""

FAST = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}
"""Options of the compiler: compile fast, and round to 16 bits wherever the program says so."""


class Model(NamedTuple):
    """A loss in float32 and the same in bfloat16 without autocast.

    Attributes:
      loss: written for float32.
      own: with the `dtype=bfloat16` of the package or, where it has none, with `at_the_boundary`.
      params: float32, as the package initializes them.
      batch: draws a batch from a NumPy generator.
      draws: over how many draws errors are averaged.
      in_float32: name scopes of the matmuls that are right to stay in float32 -> why.
    """

    loss: Loss
    own: Loss
    params: Any
    batch: Callable[[np.random.Generator], Any]
    draws: int = 32
    in_float32: dict[str, str] = {}  # noqa: RUF012  # a NamedTuple has no instance to change it on

    def draw(self, seed: int) -> tuple[Any, Any]:
        """Parameters and a batch: what initialization leaves at zero or one, training would not."""
        rng = np.random.default_rng(seed)
        moved = jax.tree.map(lambda p: p + 0.02 * normal(rng, np.shape(p)), self.params)
        return moved, self.batch(rng)


def at_the_boundary(loss: Loss) -> Loss:
    """Casts parameters and inputs to bfloat16, as one does without a library."""

    def cast(leaf: Any) -> Any:
        return leaf.astype(jnp.bfloat16) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return lambda params, batch: loss(*jax.tree.map(cast, (params, batch))).astype(jnp.float32)


def fast_jit(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` for a program that runs a few times."""
    return jax.jit(fun, compiler_options=FAST)


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    """Normal deviates in float32."""
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def integers(rng: np.random.Generator, below: int, shape: tuple[int, ...]) -> jax.Array:
    """Integers from 3 on: the smaller ones are special tokens, such as those of padding."""
    return jnp.asarray(rng.integers(3, below, shape), jnp.int32)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy in float32."""
    chosen = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(chosen, labels[..., None], -1))
