"""The ways to compute a loss in mixed precision, in one common form."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _peers
from benchmarks._models import Loss, Task

COMPUTE = jnp.bfloat16
POLICY = "params=float32,compute=bfloat16,output=float32"

ValueAndGrad = Callable[[Any, Any, Any], Any]
"""(params, statistics, batch) -> ((loss, statistics), gradients by the params)."""


def _value_and_grad(loss: Loss) -> ValueAndGrad:
    return jax.value_and_grad(loss, has_aux=True)


@dataclasses.dataclass(frozen=True)
class Design:
    """One way to mix precisions.

    Attributes:
      loss: (task, whether a float32 constant leaks in) -> a new loss of float32 parameters.
      value_and_grad: differentiates the loss that `gradient_of` gives.
      gradient_of: the loss before the library's own gradient function casts; None for `loss`.
    """

    loss: Callable[[Task, bool], Loss]
    value_and_grad: Callable[[Loss], ValueAndGrad] = _value_and_grad
    gradient_of: Callable[[Task, bool], Loss] | None = None

    def gradient(self, task: Task, leak: bool = False) -> ValueAndGrad:
        """A new function each time."""
        return self.value_and_grad((self.gradient_of or self.loss)(task, leak))


def float32() -> Design:
    """No mixed precision."""
    return Design(lambda task, leak: task.loss(leak=leak))


def by_hand() -> Design:
    """Flax with `dtype=bfloat16` in every module."""
    return Design(lambda task, leak: task.loss(COMPUTE, leak))


def autocast(save: str) -> Design:
    """`jmp_lite.autocast` of the float32 loss."""
    jmp = importlib.import_module("jmp_lite")
    return Design(lambda task, leak: jmp.autocast(task.loss(leak=leak), POLICY, residuals=save))


def jmp_cast() -> Design:
    """jmp: parameters and inputs are cast before the float32 loss."""
    policy = importlib.import_module("jmp").get_policy(POLICY)

    def build(task: Task, leak: bool) -> Loss:
        loss = task.loss(leak=leak)

        def cast(params: Any, statistics: Any, batch: Any) -> tuple[jax.Array, Any]:
            value, updated = loss(policy.cast_to_compute(params), statistics, policy.cast_to_compute(batch))
            return policy.cast_to_output(value), updated

        return cast

    return Design(build)


def mpx_cast() -> Design:
    """mpx: every argument is cast before the float32 loss; its gradient function also checks and unscales."""
    mpx = importlib.import_module("mpx")
    mpx.set_half_precision_datatype(COMPUTE)

    def build(task: Task, leak: bool) -> Loss:
        loss = task.loss(leak=leak)
        return lambda *arguments: loss(*map(mpx.cast_to_half_precision, arguments))

    def value_and_grad(loss: Loss) -> ValueAndGrad:
        def differentiated(params: Any, statistics: Any, batch: Any) -> Any:
            scaling = mpx.DynamicLossScaling(jnp.float32(1.0), jnp.float32(1.0))
            found = mpx.filter_value_and_grad(loss, scaling, has_aux=True)(params, statistics, batch)
            value, scaling, finite, grads = found
            return value, grads, scaling.loss_scaling, finite

        return differentiated

    return Design(build, value_and_grad, lambda task, leak: task.loss(leak=leak))


FLOAT32 = "float32"
BY_HAND = "Flax dtype=bfloat16"
AUTOCAST = "jmp_lite autocast"
SAVE_LOW = 'jmp_lite autocast, residuals="low"'
OURS: Mapping[str, Callable[[], Design]] = {
    AUTOCAST: lambda: autocast("all"),
    SAVE_LOW: lambda: autocast("low"),
}
PEERS: Mapping[str, Callable[[], Design]] = {"jmp": jmp_cast, "mpx": mpx_cast}


def available(skip_peers: bool = False) -> tuple[dict[str, Design], dict[str, str]]:
    """Builds every design that can be built here.

    Args:
      skip_peers: leave out the other libraries, but not what is written by hand.

    Returns:
      The designs by name, and for each that is missing the reason.
    """
    return _peers.build({FLOAT32: float32, BY_HAND: by_hand, **({} if skip_peers else PEERS), **OURS})
