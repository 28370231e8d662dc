"""Small trainings that ways to keep parameters and state are held against: a ResNet, a GPT, and perceptrons."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jmp_lite as jmp
from benchmarks import _examples, _storage

#: Steps at the end over which a loss is averaged.
LAST = 50


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is trained.

    Attributes:
      init: seed -> parameters in float32, and statistics that are not parameters.
      loss: (params, statistics, batch) -> (loss, statistics).
      batch: (seed, step) -> batch.
      steps: how many.
      rate: learning rate at the beginning; it falls to nothing along a cosine.
    """

    init: Callable[[int], tuple[Any, Any]]
    loss: Callable[[Any, Any, Any], tuple[jax.Array, Any]]
    batch: Callable[[int, int], Any]
    steps: int
    rate: float


def _digits() -> Problem:
    data, model = _examples.module("_digits_data"), _examples.module("_digits_model")
    network = model.linen_network(jmp.get_policy("float32"))
    load = functools.lru_cache(data.load)

    def batch(seed: int, step: int) -> Any:
        digits = load(seed)
        return data.batch(digits.train_images, digits.train_labels, size=64, step=step, seed=seed)

    def loss(params: Any, statistics: Any, batch: Any) -> tuple[jax.Array, Any]:
        logits, statistics = network.apply(params, statistics, batch[0], train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), statistics

    return Problem(lambda seed: network.init(jax.random.key(seed)), loss, batch, 270, 4e-3)


def _gpt() -> Problem:
    data, model = _examples.module("_gpt_data"), _examples.module("_gpt_model")
    text = data.load()

    def batch(seed: int, step: int) -> Any:
        return data.batch(text.train, size=16, length=model.CONTEXT + 1, step=step, seed=seed)

    return Problem(
        lambda seed: (model.init(jax.random.key(seed)), None),
        lambda params, _, batch: (model.loss(params, batch), None),
        batch,
        1000,
        5e-3,
    )


def _mlp() -> Problem:
    """A student of a random teacher."""
    sizes = (32, 128, 128, 8)

    def weights(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return [
            {"w": jnp.asarray(rng.standard_normal((n, m)) / np.sqrt(n), jnp.float32), "b": jnp.zeros(m)}
            for n, m in itertools.pairwise(sizes)
        ]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    teacher = jax.jit(functools.partial(apply, jax.tree.map(lambda leaf: 2 * leaf, weights(10**6))))

    def batch(seed: int, step: int) -> Any:
        x = jnp.asarray(np.random.default_rng([seed, step]).standard_normal((128, sizes[0])), jnp.float32)
        return x, teacher(x)

    def loss(params: Any, _: Any, batch: Any) -> tuple[jax.Array, Any]:
        return jnp.mean((apply(params, batch[0]) - batch[1]) ** 2), None

    return Problem(lambda seed: (weights(seed), None), loss, batch, 2000, 2e-3)


PROBLEMS: dict[str, Callable[[], Problem]] = {"digits ResNet": _digits, "character GPT": _gpt, "MLP": _mlp}


def train(
    problem: Problem, scheme: _storage.Scheme, inner: Callable[[Any], Any], seed: int, rate: float
) -> list[float]:
    """Losses of all steps of one training.

    Args:
      problem: what is trained.
      scheme: how parameters and state are kept.
      inner: makes the optimizer of a learning rate.
      seed: of parameters, batches and random bits.
      rate: the learning rate at the beginning.
    """
    tx = scheme.around(inner(optax.cosine_decay_schedule(rate, problem.steps)), seed)
    params, statistics = problem.init(seed)
    params, opt_state = jmp.optim.from_full_precision(tx, params) if scheme.is_narrow else (params, tx.init(params))

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, statistics: Any, opt_state: Any, batch: Any) -> Any:
        def in_float32(params: Any) -> Any:
            return problem.loss(jmp.cast_to_full(params), statistics, batch)

        (loss, statistics), grads = jax.value_and_grad(in_float32, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), statistics, opt_state, loss

    losses = []
    for index in range(problem.steps):
        params, statistics, opt_state, loss = step(params, statistics, opt_state, problem.batch(seed, index))
        losses.append(loss)
    return [float(loss) for loss in jax.device_get(losses)]


def final(losses: list[float]) -> float:
    """The mean over the last steps."""
    return float(np.mean(losses[-LAST:]))
