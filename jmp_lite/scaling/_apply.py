"""The cheapest form of a loss-scaled step: check, update and apply in one."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from jmp_lite._dtypes import at_least_float32
from jmp_lite._tree import is_inexact
from jmp_lite.scaling._loss_scaled import LossScaledUpdate
from jmp_lite.scaling._verdict import step_or_skip

P = TypeVar("P")


def _add(param: Any, update: Any) -> Any:
    """Adds an update in the wider dtype, at least float32, and rounds once to the dtype of the parameter."""
    if update is None or not is_inexact(update):
        return param
    param, update = jnp.asarray(param), jnp.asarray(update)
    with jax.numpy_dtype_promotion("standard"):
        wide = jnp.promote_types(at_least_float32(param.dtype), at_least_float32(update.dtype))
    return (param.astype(wide) + update.astype(wide)).astype(param.dtype)


def _apply(params: P, updates: Any) -> P:
    applied: P = jax.tree.map(_add, params, updates, is_leaf=lambda x: x is None)
    return applied


def apply_gradients(
    tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: P, **extra_args: Any
) -> tuple[P, Any]:
    """Updates parameters from scaled gradients, or skips the step: ``tx.update`` and ``optax.apply_updates`` in one.

    With ``tx`` made by ``loss_scaled`` the whole step is decided at once, so that updates are never written to memory.
    Any other transformation (such as a chain or ``MultiSteps`` around it) takes the plain two calls. Donate ``params``
    and ``opt_state`` to the jitted step, in the order in which it returns them.

    Args:
        tx: The optimizer.
        grads: Scaled gradients, a tree like ``params``.
        opt_state: State of ``tx``.
        params: Parameters of any floating dtypes; leaves with no update (``None``, ``float0``) stay.
        **extra_args: Passed on to ``tx.update``.

    Returns:
        ``(params, opt_state)``. After a skipped step ``params`` and the inner state are bit-identical to before.

    Example:
        >>> tx = jmp.loss_scaled(optax.sgd(0.5), jmp.StaticLossScale(4.0))
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> params, opt_state = jmp.apply_gradients(tx, {"w": jnp.array([4.0, 8.0])}, tx.init(params), params)
        >>> print(params["w"])
        [0.5 1. ]
    """
    update = tx.update
    if not isinstance(update, LossScaledUpdate):
        updates, opt_state = optax.with_extra_args_support(tx).update(grads, opt_state, params, **extra_args)
        return _apply(params, updates), opt_state

    def step() -> tuple[P, Any]:
        updates, inner_state = update.inner_update(grads, opt_state, params, extra_args)
        return _apply(params, updates), inner_state

    finite = update.verdict(grads, opt_state)
    params, inner_state = step_or_skip(finite, step, lambda: (params, opt_state.inner_state))
    return params, update.next_state(opt_state, inner_state, finite)
