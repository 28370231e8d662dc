"""What a training loop logs and checks about its loss scale."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._tree import is_array, is_inexact, path_string
from jmp_lite.errors import LossScaleNotFoundError, LossScaleStalledError
from jmp_lite.scaling._loss_scale import SMALLEST_SCALE, DynamicLossScale, LossScale, can_shrink
from jmp_lite.scaling._loss_scaled import LossScaledState


def _is_scaled_state(node: Any) -> bool:
    return isinstance(node, LossScaledState)


def _scaled_states(opt_state: Any) -> list[tuple[str, LossScaledState]]:
    """Returns path and node of every ``LossScaledState``, or raises if there is none."""
    nodes = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is_scaled_state)
    found = [(path_string(path), node) for path, node in nodes if _is_scaled_state(node)]
    if not found:
        raise LossScaleNotFoundError(
            f"No loss scale in the state, a {type(opt_state).__name__}. Pass the state of an optimizer wrapped in "
            "jmp_lite.loss_scaled."
        )
    return found


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Returns what to log about loss scaling, as scalars; works inside and outside ``jit``.

    ``loss_scale`` is the scale for the next step; the other three tell of the last one.

    Args:
        opt_state: An Optax state, or any pytree around it, that holds the state of ``loss_scaled``.

    Returns:
        ``{"loss_scale": float32[], "last_finite": bool[], "notfinite_count": int32[], "total_notfinite": int32[]}``. If
        there are several such states, each name has the path of its state in front.

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
    """
    states = _scaled_states(opt_state)
    values: dict[str, jax.Array] = {}
    for path, state in states:
        prefix = f"{path}/" if len(states) > 1 else ""
        values[f"{prefix}loss_scale"] = jnp.asarray(state.loss_scale.loss_scale, jnp.float32)
        for field in ("last_finite", "notfinite_count", "total_notfinite"):
            values[prefix + field] = jnp.asarray(getattr(state, field))
    return values


def _lowest(loss_scale: LossScale) -> float:
    """Returns the scale below which this one cannot go."""
    if not isinstance(loss_scale, DynamicLossScale):
        return float(loss_scale.loss_scale)
    if not can_shrink(loss_scale):
        return float(np.min(loss_scale.loss_scale))
    return max(loss_scale.min_loss_scale, SMALLEST_SCALE)


def _replicas(leaf: Any) -> list[int]:
    """Returns where the last axis of flags is set; ``pmap`` puts an axis of devices, all alike, in front."""
    return [] if leaf.ndim == 0 else np.flatnonzero(np.any(leaf, axis=tuple(range(leaf.ndim - 1)))).tolist()


def _nonfinite_leaves(grads: Any) -> str:
    """Names the leaves of gradients that are not finite, or those that ``distributed.nonfinite_leaves`` flagged."""
    names, separator = [], ", "
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = path_string(path)
        if is_inexact(leaf) and not jnp.isfinite(leaf).all():
            names.append(name)
        elif is_array(leaf) and leaf.dtype == np.bool_ and np.any(leaf):
            replicas = ", ".join(map(str, _replicas(leaf)))
            separator = "; " if replicas else separator
            names.append(f"{name} on replica{'s' if ',' in replicas else ''} {replicas}" if replicas else name)
    return separator.join(names)


def check_loss_scale(opt_state: Any, grads: Any = None, *, max_skips: int = 10) -> None:
    """Raises if training has stalled: step after step skipped although the loss scale is at its lowest.

    Call it on the host, outside ``jit``, every now and then; it waits for the state to be computed. Arrays with a
    leading device axis, as ``pmap`` returns, are understood.

    Args:
        opt_state: Any pytree that holds states of ``loss_scaled``.
        grads: Gradients of the last step, to name the leaves that are not finite; or what
            ``distributed.nonfinite_leaves`` returned for them, to name the replicas too.
        max_skips: Steps skipped in a row that are tolerated at the lowest scale, less one.

    Raises:
        LossScaleStalledError: If ``max_skips`` or more steps in a row were skipped and the scale cannot be lowered.
        LossScaleNotFoundError: If the state holds none.

    Example:
        >>> tx = jmp.loss_scaled(optax.sgd(0.1))
        >>> jmp.check_loss_scale(tx.init({"w": jnp.ones(2)}))
    """
    for path, state in _scaled_states(opt_state):
        skips = int(np.max(np.asarray(state.notfinite_count)))
        scale = float(np.min(np.asarray(state.loss_scale.loss_scale)))
        if skips < max_skips or scale > _lowest(state.loss_scale):
            continue
        where = f" (state at {path!r})" if path else ""
        names = _nonfinite_leaves(grads)
        culprits = (
            f"Not finite in the gradients given: {names}. "
            if names
            else "Pass the gradients of a skipped step as grads= to see which leaves are not finite. "
        )
        raise LossScaleStalledError(
            f"{skips} steps in a row were skipped and the loss scale {scale:g} cannot go lower{where}. {culprits}"
            "The gradients overflow or are NaN even without scaling: look for NaN in the data, a learning rate that "
            "is too high or a layer that overflows in the compute dtype; try the policy 'mixed_bfloat16', or a lower "
            "min_loss_scale."
        )
