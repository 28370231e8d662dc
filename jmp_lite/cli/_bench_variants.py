"""The ways to train that are compared, one row each."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jmp_lite.autocast import autocast
from jmp_lite.cli._bench_models import Loss
from jmp_lite.optim import from_full_precision, master_weights, stored
from jmp_lite.quant import FP8
from jmp_lite.scaling._apply import apply_gradients
from jmp_lite.scaling._grad import scaled_value_and_grad
from jmp_lite.scaling._loss_scaled import loss_scaled

#: (params, opt_state, batch) -> (params, opt_state, loss)
Step = Callable[[Any, Any, Any], tuple[Any, Any, jax.Array]]
Optimizer: TypeAlias = optax.GradientTransformation


def _adamw() -> Optimizer:
    return optax.adamw(3e-4)


def _started(tx: Optimizer, params: Any) -> tuple[Any, Any]:
    return params, tx.init(params)


def _plain_step(loss_fn: Loss, tx: Optimizer) -> Step:
    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def _scaled_step(loss_fn: Loss, tx: Optimizer) -> Step:
    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = scaled_value_and_grad(loss_fn, loss_scale=opt_state)(params, batch)
        params, opt_state = apply_gradients(tx, grads, opt_state, params)
        return params, opt_state, loss

    return step


class Variant(NamedTuple):
    """One way to train.

    Attributes:
        loss: From the model's ``loss_in`` to the loss that is differentiated.
        optimizer: Makes the optimizer.
        start: Optimizer and float32 parameters -> what training begins with.
        step_of: Loss and optimizer -> step.
    """

    loss: Callable[[Callable[[Any], Loss]], Loss]
    optimizer: Callable[[], Optimizer] = _adamw
    start: Callable[[Optimizer, Any], tuple[Any, Any]] = _started
    step_of: Callable[[Loss, Optimizer], Step] = _plain_step

    def step(self, loss_in: Callable[[Any], Loss]) -> Step:
        """A step of a model."""
        return self.step_of(self.loss(loss_in), self.optimizer())

    def begin(self, params: Any) -> tuple[Any, Any]:
        """Parameters as they are kept, and the state of the optimizer."""
        return self.start(self.optimizer(), params)


def _autocast(policy: str, **settings: Any) -> Callable[[Callable[[Any], Loss]], Loss]:
    return lambda loss_in: autocast(loss_in(jnp.float32), policy, **settings)


BASELINE = "float32"
_BF16 = _autocast("mixed_bfloat16")

VARIANTS: dict[str, Variant] = {
    BASELINE: Variant(lambda loss_in: loss_in(jnp.float32)),
    "bf16 by hand": Variant(lambda loss_in: loss_in(jnp.bfloat16)),
    "autocast bf16": Variant(_BF16),
    "autocast fp16, loss scale": Variant(
        _autocast("mixed_float16"), lambda: loss_scaled(_adamw()), step_of=_scaled_step
    ),
    "autocast bf16, FP8 products": Variant(_autocast("mixed_bfloat16", dot=FP8)),
    "autocast bf16, master weights": Variant(_BF16, lambda: master_weights(_adamw()), from_full_precision),
    "autocast bf16, split8 + 8bit": Variant(
        _BF16, lambda: stored(_adamw(), params="split8", state="8bit"), from_full_precision
    ),
}
