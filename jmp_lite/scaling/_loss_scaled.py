"""Loss scaling as an Optax transformation around an inner one."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmp_lite.errors import InvalidLossScaleError, LossScaleNotFoundError
from jmp_lite.scaling._in_state import is_loss_scale
from jmp_lite.scaling._loss_scale import DynamicLossScale, LossScale, register_serialization
from jmp_lite.scaling._verdict import judge, step_or_skip, unscale


class LossScaledState(NamedTuple):
    """State of ``loss_scaled``, with the counters of ``optax.apply_if_finite`` (``optax.tree.get`` finds them).

    Attributes:
        inner_state: State of the wrapped transformation; frozen on a skipped step.
        loss_scale: The scale for the next step.
        last_finite: ``bool[]``, whether the last step was taken.
        notfinite_count: ``int32[]``, steps skipped in a row up to now.
        total_notfinite: ``int32[]``, steps skipped since ``init``.

    Example:
        >>> state = jmp.loss_scaled(optax.sgd(0.1)).init({"w": jnp.ones(2)})
        >>> print(optax.tree.get(state, "notfinite_count"))
        0
    """

    inner_state: Any
    loss_scale: LossScale
    last_finite: jax.Array
    notfinite_count: jax.Array
    total_notfinite: jax.Array


def _like_old(new: Any, old: Any) -> Any:
    """Keeps the dtype that a state leaf had, so that a step never changes the type of the state."""
    dtype = getattr(old, "dtype", None)
    return new if dtype is None or new.dtype == dtype else new.astype(dtype)


def _zeros(shape: jax.ShapeDtypeStruct) -> Any:
    """Zeros of a shape, varying over the mesh axes that it varies over; ``float0`` exists in NumPy only."""
    return np.zeros(shape.shape, shape.dtype) if shape.dtype == jax.dtypes.float0 else jnp.zeros_like(shape)


@dataclasses.dataclass(frozen=True)
class LossScaledUpdate:
    """The ``update`` of ``loss_scaled``: a function, whose parts ``apply_gradients`` uses to fuse the step."""

    inner: optax.GradientTransformationExtraArgs
    axis_name: Any

    def verdict(self, grads: Any, state: LossScaledState) -> jax.Array:
        """Returns ``bool[]``: whether these scaled gradients may be applied."""
        if not isinstance(state, LossScaledState):
            raise LossScaleNotFoundError(
                f"The state must be a LossScaledState, got {type(state).__name__}. Pass what init or the last update "
                "of this loss_scaled optimizer returned; gradients come before the state."
            )
        return judge(grads, state.loss_scale, self.axis_name)

    def inner_update(self, grads: Any, state: LossScaledState, params: Any, extra_args: Any) -> tuple[Any, Any]:
        """Returns the inner transformation's updates and state for scaled gradients, whatever the verdict."""
        unscaled = unscale(grads, state.loss_scale)
        updates, inner_state = self.inner.update(unscaled, state.inner_state, params, **extra_args)
        return updates, jax.tree.map(_like_old, inner_state, state.inner_state)

    def next_state(self, state: LossScaledState, inner_state: Any, finite: jax.Array) -> LossScaledState:
        """Returns the state after a step with this verdict."""
        skipped = (~finite).astype(jnp.int32)
        return LossScaledState(
            inner_state=inner_state,
            loss_scale=state.loss_scale.adjust(finite),
            last_finite=finite,
            notfinite_count=(state.notfinite_count + skipped) * skipped,
            total_notfinite=state.total_notfinite + skipped,
        )

    def __call__(
        self, updates: Any, state: LossScaledState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, LossScaledState]:
        """Unscales, checks, updates or skips, adjusts; the signature is Optax's."""

        def step() -> tuple[Any, Any]:
            return self.inner_update(updates, state, params, extra_args)

        def skip() -> tuple[Any, Any]:
            shapes, _ = jax.eval_shape(step)
            return jax.tree.map(_zeros, shapes), state.inner_state

        finite = self.verdict(updates, state)
        new_updates, inner_state = step_or_skip(finite, step, skip)
        return new_updates, self.next_state(state, inner_state, finite)


def loss_scaled(
    inner: optax.GradientTransformation,
    loss_scale: LossScale = DynamicLossScale(),  # noqa: B008 (an immutable pytree of NumPy scalars)
    *,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it takes the gradients of a scaled loss, and skips steps that are not finite.

    One ``update`` unscales the gradients to float32 with the scale that produced them, decides once whether they are
    finite, then runs ``inner`` or freezes all of its state (step counts and schedules too) and returns zero updates,
    and adjusts the scale. Clipping belongs inside, where gradients are unscaled. Gradients so large
    that their global norm may overflow float32 count as not finite.

    Gradient accumulation belongs inside too: ``loss_scaled(optax.MultiSteps(inner, n).gradient_transformation())``
    skips one bad micro-step. ``MultiSteps`` around ``loss_scaled`` works while gradients are finite, but its
    accumulator never loses a NaN again, and with ``should_skip_update_fn`` the scale never hears of one.
    ``accumulate_gradients`` needs neither.

    Args:
        inner: Any Optax transformation; extra arguments of ``update`` reach it.
        loss_scale: Initial scale: ``DynamicLossScale``, ``StaticLossScale`` or ``NoOpLossScale``.
        axis_name: Name, or tuple of names, of the mapped axes (``pmap``, ``shard_map``) over which replicas must agree.
            Needed when replicas see different gradients, such as shards; harmless after ``lax.pmean``. Under ``jit``
            with sharded arrays the verdict is global without it. (Inside ``shard_map`` with its default ``check_vma``,
            gradients of replicated parameters arrive already summed over the axis.)

    Returns:
        A transformation whose state is a ``LossScaledState``. Every gradient must pass through it, so it goes around
        ``optax.chain``, ``masked``, ``multi_transform``, ``inject_hyperparams`` and ``MultiSteps``.

    Raises:
        InvalidLossScaleError: If ``loss_scale`` is not a loss scale.

    Example:
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> tx = jmp.loss_scaled(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5)), jmp.DynamicLossScale(8.0))
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.array([8.0, jnp.inf])}, state, params)
        >>> print(updates["w"], state.loss_scale.loss_scale, state.total_notfinite)
        [0. 0.] 4.0 1

    References:
        Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740; ``optax.apply_if_finite``;
        torch.amp.GradScaler.
    """
    if not is_loss_scale(loss_scale):
        raise InvalidLossScaleError(
            f"loss_scale must be a NoOpLossScale, StaticLossScale or DynamicLossScale, got {loss_scale!r}. "
            "Write for example loss_scaled(inner, DynamicLossScale(2.0**15))."
        )
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> LossScaledState:
        register_serialization()
        return LossScaledState(
            inner_state=inner.init(params),
            loss_scale=jax.tree.map(jnp.array, loss_scale),  # a copy: a step may donate its state
            last_finite=jnp.array(True),
            notfinite_count=jnp.zeros((), np.int32),
            total_notfinite=jnp.zeros((), np.int32),
        )

    return optax.GradientTransformationExtraArgs(init, LossScaledUpdate(inner, axis_name))
