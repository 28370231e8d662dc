"""Trains a model in the precision of a variant, and measures what its file of weights is worth."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _lowbit_files
import jax
import optax
from _lowbit_models import Data, Model
from _lowbit_variants import VARIANTS, Variant

WARMUP = 0.1  # of the steps
REPORT_EVERY = 20  # steps


@dataclasses.dataclass(frozen=True)
class Result:
    """One variant of one model; the losses are those of its training, none if it took over that of another."""

    variant: str
    score: float
    num_bytes: int
    zeros: float
    losses: list[float]

    @property
    def title(self) -> str:
        """What readers call the variant."""
        return VARIANTS[self.variant].title


def make_optimizer(variant: Variant, model: Model, steps: int) -> optax.GradientTransformation:
    """AdamW with clipping; pruning comes last, so that a weight that is zero stays zero."""
    warmup = round(WARMUP * steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, model.learning_rate, warmup_steps=warmup, decay_steps=steps)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule), *variant.prune(steps, params))


class Run:
    """A model in the precision of a variant: functions that are compiled once, whatever the seed."""

    def __init__(self, model: Model, name: str, steps: int) -> None:
        self.model, self.name, self.steps = model, name, steps
        self.variant = VARIANTS[name]
        self.tx = make_optimizer(self.variant, model, steps)
        self.loss = self.variant.cast(model.loss)
        self.train_step = jax.jit(self._train_step, donate_argnums=(0, 1))
        self.score = jax.jit(self.variant.cast(model.score))

    def _train_step(self, params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(self.loss)(params, batch)
        updates, opt_state = self.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def train(self, data: Data, seed: int) -> Iterator[tuple[Any, list[jax.Array]]]:
        """Trains from the beginning; every few steps yields the parameters and the losses of all steps so far."""
        # The default generator, threefry, takes three times as long to compile.
        params = self.model.init(jax.random.key(seed, impl="rbg"))
        opt_state, losses = self.tx.init(params), []
        for step in range(self.steps):
            params, opt_state, loss = self.train_step(params, opt_state, data.batch(step))
            losses.append(loss)
            if len(losses) % REPORT_EVERY == 0 or len(losses) == self.steps:
                yield params, losses

    def measure(self, params: Any, losses: list[jax.Array], data: Data, folder: Path) -> Result:
        """Writes the weights as the variant keeps them, and computes the score from what is read back."""
        file = folder / f"{self.name}.msgpack"
        packed = self.variant.pack(params)
        num_bytes = _lowbit_files.save(packed, file)
        served = _lowbit_files.to_dense(_lowbit_files.load(packed, file), params)
        score = float(self.score(served, data.test))
        return Result(self.name, score, num_bytes, _lowbit_files.zeros(served), [float(loss) for loss in losses])
