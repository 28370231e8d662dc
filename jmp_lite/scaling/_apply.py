"""The fused loss-scaled step: check, update and apply in one."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from jmp_lite._dtypes import FLOAT32, at_least_float32
from jmp_lite._tree import is_finite, is_number, leaf_key
from jmp_lite.errors import InvalidStepError
from jmp_lite.scaling._in_state import is_loss_scale, nodes, stored_params
from jmp_lite.scaling._loss_scaled import (
    LossScaledUpdate,
    check_optimizer,
    check_trees,
    is_hidden,
    loss_scaled_states,
    nothing,
    trainable,
)
from jmp_lite.scaling._verdict import step_or_skip, watched

P = TypeVar("P")


def _sum(param: jax.Array, update: jax.Array) -> jax.Array:
    """Adds an update in the wider dtype, at least float32, and rounds once to the dtype of the parameter."""
    with jax.numpy_dtype_promotion("standard"):
        wide = jnp.promote_types(at_least_float32(param.dtype), at_least_float32(update.dtype))
    return (param.astype(wide) + update.astype(wide)).astype(param.dtype)


def _apply(params: P, updates: Any, stored: frozenset[str]) -> tuple[P, jax.Array]:
    """Returns new parameters, and whether their updates are finite.

    Elements that an update would make infinite or NaN keep their values; leaves without an update are ``None``. The
    optimizer itself handles parameters at the paths ``stored``.
    """
    seen: list[tuple[Any, jax.Array]] = []

    def apply(path: Any, leaf: Any, update: Any) -> Any:
        if is_hidden(update) or not is_number(update):
            return None
        param, update = jnp.asarray(leaf), jnp.asarray(update)
        if leaf_key(path) in stored:
            is_good = is_finite(update)  # and so is what ``stored`` makes of it
            seen.append((FLOAT32, is_good))
            # The update is selected and not the sum, which XLA on TPU would make in its own kernel.
            return _sum(param, jnp.where(is_good, update, nothing(update)))
        new = _sum(param, update)
        is_good = is_finite(new)
        seen.append((param.dtype, is_good | ~is_finite(param)))
        return jnp.where(is_good, new, param)

    applied: P = jax.tree_util.tree_map_with_path(apply, params, updates)
    return applied, watched(seen)


def _merged(params: P, applied: P) -> P:
    merged: P = jax.tree.map(lambda old, new: old if new is None else new, params, applied)
    return merged


def _update_around(
    tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any, extra_args: dict[str, Any]
) -> tuple[Any, Any]:
    """``tx.update``, where the loss scale is that of an optimizer inside ``tx``."""
    before = loss_scaled_states(opt_state)
    foreign = InvalidStepError(
        "The state is that of a loss_scaled optimizer, which is not in tx: gradients would stay scaled. Pass the tx "
        "whose init made the state."
    )

    def is_scaled() -> bool:
        return bool(nodes(jax.eval_shape(tx.init, trainable(params)), is_loss_scale))

    try:
        updates, new_state = optax.with_extra_args_support(tx).update(grads, opt_state, params, **extra_args)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if is_scaled():
            raise
        raise foreign from error
    if any(old is new for _, old in before for _, new in loss_scaled_states(new_state)) and not is_scaled():
        raise foreign
    return updates, new_state


def apply_gradients(
    tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: P, **extra_args: Any
) -> tuple[P, Any]:
    """Updates parameters from scaled gradients, or skips the step: ``tx.update`` and ``optax.apply_updates`` in one.

    If ``loss_scaled`` made ``tx``, the whole step is fused, so updates are never written to memory. Any other
    transformation (such as a chain or ``MultiSteps`` around it) runs as the two plain calls. Donate ``params`` and
    ``opt_state`` to the jitted step, in the order in which it returns them.

    No NaN or infinity reaches a parameter, even if an optimizer computes one from finite gradients: an element whose
    update would make it infinite or NaN keeps its value, and ``metrics`` counts the step in ``nonfinite_updates``. (The
    count looks at all 16-bit parameters that ``optim.stored`` does not store, and at one element of the smallest other
    parameter: looking at all would cost a pass over memory.)

    Args:
        tx: The optimizer.
        grads: Scaled gradients, a tree like ``params``.
        opt_state: State of ``tx``.
        params: Parameters of any floating dtypes; leaves without an update (``None``, ``float0``) stay, such as
            functions and integers in an Equinox module.
        **extra_args: Passed on to ``tx.update``.

    Returns:
        ``(params, opt_state)``. After a skipped step ``params`` and the inner state are bit-identical to before.

    Raises:
        InvalidStepError: If ``tx`` is not an optimizer or not the one of the state, or ``grads`` and ``params`` are
            different trees.
        LossScaleNotFoundError: If ``opt_state`` holds no loss scale: the scaled gradients would reach the parameters.
        MissingAxisError: As ``loss_scaled``.

    Example:
        >>> tx = jmp.loss_scaled(optax.sgd(0.5), jmp.StaticLossScale(4.0))
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> params, opt_state = jmp.apply_gradients(tx, {"w": jnp.array([4.0, 8.0])}, tx.init(params), params)
        >>> print(params["w"])
        [0.5 1. ]
    """
    check_optimizer(tx, "apply_gradients")
    check_trees(grads, params, "apply_gradients(tx, grads, opt_state, params)")
    update, stored = tx.update, stored_params(opt_state)
    if not isinstance(update, LossScaledUpdate):
        updates, opt_state = _update_around(tx, grads, opt_state, params, extra_args)
        return _merged(params, _apply(params, updates, stored)[0]), opt_state

    def step() -> tuple[tuple[P, Any], jax.Array]:
        updates, inner_state = update.inner_update(grads, opt_state, params, extra_args)
        new, updates_finite = _apply(params, updates, stored)
        return (new, inner_state), updates_finite

    finite = update.verdict(grads, opt_state)

    def skip() -> tuple[P, Any]:
        (applied, _), _ = jax.eval_shape(step)
        old: P = jax.tree.map(lambda param, new: None if new is None else jnp.asarray(param), params, applied)
        return old, opt_state.inner_state

    (applied, inner_state), updates_finite = step_or_skip(finite, step, skip, update.axis_name, is_stored=bool(stored))
    return _merged(params, applied), update.next_state(opt_state, inner_state, finite, updates_finite)
