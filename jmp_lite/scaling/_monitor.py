"""Metrics and checks of the loss scale for a training loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._messages import quote, warn
from jmp_lite._tree import is_array, is_finite, is_inexact, path_string
from jmp_lite.errors import (
    InvalidStepError,
    LossScaleStalledError,
    NonFiniteUpdateWarning,
    ReplicasDisagreeError,
)
from jmp_lite.scaling._loss_scale import SMALLEST_SCALE, DynamicLossScale, LossScale, can_shrink
from jmp_lite.scaling._loss_scaled import LossScaledState, loss_scaled_states

#: What is counted from step to step.
_COUNTED = ("last_finite", "notfinite_count", "total_notfinite", "nonfinite_updates", "total_nonfinite_updates")


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Returns the metrics of loss scaling as scalars; works inside and outside ``jit``.

    ``loss_scale`` is the scale for the next step; the others are fields of ``LossScaledState``. The metrics are copies,
    so they outlive a donated state. Outside ``jit``, pass ``jax.tree.map(lambda x: x.tolist(),
    jmp.metrics(opt_state))`` to ``json.dumps``.

    Args:
        opt_state: An Optax state, or any pytree around it, that holds the state of ``loss_scaled``.

    Returns:
        ``{"loss_scale": float32[], "last_finite": bool[], "notfinite_count": int32[], "total_notfinite": int32[],
        "nonfinite_updates": int32[], "total_nonfinite_updates": int32[]}``. With several such states, the path of its
        state precedes each name.

    Raises:
        LossScaleNotFoundError: If there is none.

    Example:
        >>> tx = optax.chain(jmp.loss_scaled(optax.adam(1e-3)))
        >>> for name, value in jmp.metrics(tx.init({"w": jnp.ones(2)})).items():
        ...     print(name, value)
        loss_scale 32768.0
        last_finite True
        notfinite_count 0
        total_notfinite 0
        nonfinite_updates 0
        total_nonfinite_updates 0
    """
    states = loss_scaled_states(opt_state)
    values: dict[str, jax.Array] = {}
    for path, state in states:
        prefix = f"{path}/" if len(states) > 1 else ""
        values[f"{prefix}loss_scale"] = jnp.array(state.loss_scale.loss_scale, jnp.float32)
        for field in _COUNTED:
            values[prefix + field] = jnp.array(getattr(state, field))
    return values


def _lowest(loss_scale: LossScale) -> Any:
    """Returns the scale below which this one, or each member of an ensemble, cannot go."""
    if not isinstance(loss_scale, DynamicLossScale) or not can_shrink(loss_scale):
        return np.asarray(loss_scale.loss_scale)
    return np.maximum(loss_scale.min_loss_scale, SMALLEST_SCALE)


def _replicas(leaf: Any) -> list[int]:
    """Returns where the last axis of flags is set; ``pmap`` adds a leading axis of identical rows."""
    return [] if leaf.ndim == 0 else np.flatnonzero(np.any(leaf, axis=tuple(range(leaf.ndim - 1)))).tolist()


def _nonfinite_leaves(grads: Any) -> str:
    """Names the leaves of gradients that are not finite, or those that ``distributed.nonfinite_leaves`` flagged."""
    names, separator = [], ", "
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = path_string(path)
        if is_inexact(leaf) and not is_finite(leaf).all():
            names.append(name)
        elif is_array(leaf) and leaf.dtype == np.bool_ and np.any(leaf):
            replicas = ", ".join(map(str, _replicas(leaf)))
            separator = "; " if replicas else separator
            names.append(f"{name} on replica{'s' if ',' in replicas else ''} {replicas}" if replicas else name)
    return separator.join(names)


def check_loss_scale(opt_state: Any, grads: Any = None, *, max_skips: int = 10) -> None:
    """Raises if training has stalled: every step is skipped although the loss scale is at its lowest.

    Call it on the host, outside ``jit``, every so often; it waits for the state to be computed. A leading axis is an
    ensemble (``vmap``), whose members are checked separately. If each row is on a different device, the rows are
    replicas (``pmap``) and must agree, and so must the copies of a scalar.

    Args:
        opt_state: Any pytree that holds states of ``loss_scaled``.
        grads: Gradients of the last step, to name the leaves that are not finite; or what
            ``distributed.nonfinite_leaves`` returned for them, to name the replicas too.
        max_skips: How many consecutive bad steps raise: skipped at the lowest scale, or with non-finite updates from
            finite gradients. Fewer of the latter give a ``NonFiniteUpdateWarning``.

    Raises:
        LossScaleStalledError: After ``max_skips`` or more bad steps.
        ReplicasDisagreeError: If replicas have different scales or counts.
        LossScaleNotFoundError: If the state holds no ``LossScaledState``.
        InvalidStepError: Inside ``jit``, or if ``max_skips`` is not an integer of at least 1.

    Example:
        >>> tx = jmp.loss_scaled(optax.sgd(0.1))
        >>> jmp.check_loss_scale(tx.init({"w": jnp.ones(2)}))
    """
    if not isinstance(max_skips, (int, np.integer)) or max_skips < 1:
        raise InvalidStepError(f"max_skips must be a whole number, at least 1, got {quote(max_skips)}.")
    for path, state in loss_scaled_states(opt_state):
        numbers = state._replace(inner_state=())
        if any(isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct)) for leaf in jax.tree.leaves(numbers)):
            raise InvalidStepError(
                "check_loss_scale was called inside jit, or with shapes: its state has no values there. Call it on "
                "the host, with the opt_state that the jitted step returned."
            )
        where = f" (state at {path!r})" if path else ""
        _check_replicas(numbers, where)
        _check_skips(numbers, grads, max_skips, where)
        _check_updates(numbers, max_skips, where)


def _check_replicas(state: LossScaledState, where: str) -> None:
    """Raises if rows on different devices differ."""
    for name, value in (("loss scale", state.loss_scale.loss_scale), *((n, getattr(state, n)) for n in _COUNTED)):
        shards = getattr(value, "addressable_shards", ())
        is_replicated = np.ndim(value) <= 1 and len(shards) > 1 and all(shard.data.size == 1 for shard in shards)
        rows = [np.asarray(shard.data).item() for shard in shards] if is_replicated else []
        if len(set(map(repr, rows))) > 1:  # NaN is NaN here
            raise ReplicasDisagreeError(
                f"The replicas disagree{where}: {name} is {quote(rows)}. Replicas of one model must skip the same "
                "steps: write loss_scaled(inner, axis_name=...) with the axis of the pmap or shard_map. Models that "
                "are independent are checked one by one: jax.tree.map(lambda x: x[i], opt_state)."
            )


def _check_skips(state: LossScaledState, grads: Any, max_skips: int, where: str) -> None:
    skips, scales, lowest = np.broadcast_arrays(
        state.notfinite_count, state.loss_scale.loss_scale, _lowest(state.loss_scale)
    )
    stalled = np.flatnonzero((skips >= max_skips) & (scales <= lowest))
    if not stalled.size:
        return
    names = _nonfinite_leaves(grads)
    if names:
        culprits = f"Not finite in the gradients given: {names}. "
    elif grads is None:
        culprits = "Pass the gradients of a skipped step as grads= to see which leaves are not finite. "
    else:
        culprits = (
            "The gradients given are finite: either so large that their global norm may overflow, or not those of a "
            "skipped step. "
        )
    raise LossScaleStalledError(
        f"{skips.flat[stalled[0]]} steps in a row were skipped and the loss scale {scales.flat[stalled[0]]:g} cannot "
        f"go lower{_members(stalled, skips)}{where}. {culprits}"
        "The gradients overflow or are NaN even without scaling: look for NaN in the data, a learning rate that "
        "is too high or a layer that overflows in the compute dtype; try the policy 'mixed_bfloat16', or a lower "
        "min_loss_scale."
    )


def _check_updates(state: LossScaledState, max_skips: int, where: str) -> None:
    steps = np.asarray(state.nonfinite_updates)
    stuck = np.flatnonzero(steps)
    if not stuck.size:
        return
    message = (
        f"The optimizer made updates that are not finite of gradients that are, {steps.max()} steps in a "
        f"row{_members(stuck, steps)}{where}. Parameters stayed as they were there. Keep parameters and optimizer "
        "state in float32, or give the optimizer an eps that their dtype can hold."
    )
    if steps.max() >= max_skips:
        raise LossScaleStalledError(message)
    warn(message, NonFiniteUpdateWarning)


def _members(chosen: Any, of: Any) -> str:
    """Names the members of an ensemble."""
    return f" in member {', '.join(map(str, chosen))} of the ensemble" if np.ndim(of) else ""
