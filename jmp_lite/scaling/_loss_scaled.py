"""Loss scaling as an Optax transformation around an inner one."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmp_lite._dtypes import FLOAT32
from jmp_lite._messages import quote
from jmp_lite._tree import (
    cast_leaf,
    cast_to_full,
    difference,
    is_array,
    is_finite,
    is_inexact,
    is_narrow,
    is_number,
    leaf_key,
    path_string,
)
from jmp_lite.errors import InvalidLossScaleError, InvalidStepError, JmpLiteError, LossScaleNotFoundError
from jmp_lite.scaling._in_state import is_loss_scale, is_stored, nodes, stored_params
from jmp_lite.scaling._loss_scale import DynamicLossScale, LossScale, register_serialization
from jmp_lite.scaling._lost_updates import warn_of_lost_updates
from jmp_lite.scaling._verdict import judge, step_or_skip, unscale, watched


class LossScaledState(NamedTuple):
    """State of ``loss_scaled``, with the counters of ``optax.apply_if_finite`` (``optax.tree.get`` finds them).

    Attributes:
        inner_state: State of the wrapped transformation; frozen on a skipped step.
        loss_scale: The scale for the next step.
        last_finite: ``bool[]``, whether the last step was taken.
        notfinite_count: ``int32[]``, consecutive skipped steps.
        total_notfinite: ``int32[]``, steps skipped since ``init``.
        nonfinite_updates: ``int32[]``, consecutive steps on which the inner transformation returned non-finite updates
            for finite gradients; see ``apply_gradients``.
        total_nonfinite_updates: ``int32[]``, such steps since ``init``.

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
    nonfinite_updates: jax.Array
    total_nonfinite_updates: jax.Array


def trainable(tree: Any) -> Any:
    """Hides leaves without a gradient from an optimizer: integers, booleans, keys, and leaves that are not arrays."""
    return jax.tree.map(lambda leaf: leaf if is_inexact(leaf) else None, tree)


def is_hidden(node: Any) -> bool:
    """Whether a node stands for a leaf without an update."""
    return node is None or isinstance(node, optax.MaskedNode)


def loss_scaled_states(opt_state: Any) -> list[tuple[str, LossScaledState]]:
    """Returns path and node of every ``LossScaledState``, or raises if there is none."""
    found = nodes(opt_state, lambda node: isinstance(node, LossScaledState))
    if not found:
        raise LossScaleNotFoundError(
            f"No loss scale in the state, which is of type {type(opt_state).__name__}. Pass the state of an optimizer "
            "wrapped in jmp_lite.loss_scaled."
        )
    return found


def _held_in_float32(inner_state: Any, params: Any) -> tuple[Any, Any]:
    """Casts state and parameters to float32, except those that ``optim.stored`` handles.

    With float32 gradients the optimizer must compute in float32: an eps of 1e-8 is 0 in float16.
    """
    stored = stored_params(inner_state)
    wide = jax.tree.map(
        lambda node: node if is_stored(node) else cast_leaf(node, FLOAT32), inner_state, is_leaf=is_stored
    )
    return wide, jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if leaf_key(path) in stored else cast_leaf(leaf, FLOAT32), params
    )


def _like_old(new: Any, old: Any) -> Any:
    """Keeps the dtype that a state leaf had, so that a step never changes the type of the state."""
    dtype = getattr(old, "dtype", None)
    return new if getattr(new, "dtype", None) == dtype else jnp.asarray(new, dtype)


def _shapes(tree: Any) -> list[Any]:
    return [np.shape(leaf) for leaf in jax.tree.leaves(tree)]


def nothing(like: Any) -> jax.Array:
    """An update that changes no bit, varying over the mesh axes that ``like`` varies over: 0 would make 0 of -0."""
    return -jnp.zeros_like(like)


def _finite_or_nothing(update: Any) -> tuple[Any, jax.Array]:
    finite = is_finite(update)
    return jnp.where(finite, update, nothing(update)), finite


def check_gradient(path: Any, param: Any, grad: Any) -> None:
    """Raises for an integer gradient of a trained parameter, which nothing would unscale, and for another shape.

    If the parameter is ``None``, it is unknown and may be trained.
    """
    if (param is None or is_inexact(param)) and is_array(grad) and is_number(grad) and not is_inexact(grad):
        parameter = "and params are not given" if param is None else f"and the parameter {quote(param)}"
        raise InvalidStepError(
            f"The gradient of {path_string(path)!r} is {quote(grad)}, {parameter}: no step would reach it. Pass "
            "gradients, as scaled_value_and_grad returns them."
        )
    if is_inexact(param) and is_array(grad) and grad.shape != np.shape(param):
        raise InvalidStepError(
            f"The gradient of {path_string(path)!r} is {quote(grad)}, but the parameter is {quote(param)}. Pass "
            "gradients of these parameters, and before the state."
        )


def check_step(state: Any, params: Any, kind: type, caller: str, error: type[Exception]) -> None:
    """Raises for a state of another transformation, or for no parameters, in ``update``.

    Args:
        state: The state that it was given.
        params: The parameters.
        kind: The class of its states.
        caller: Public name of the transformation.
        error: What to raise.
    """
    if not isinstance(state, kind):
        raise error(
            f"The state must be a {kind.__name__}, got {type(state).__name__}. Pass what init or the last update of "
            f"{caller} returned, in the order update(updates, state, params)."
        )
    if params is None:
        raise error(f"{caller} needs the parameters: call update(updates, state, params).")


def check_trees(grads: Any, params: Any, call: str, *, lenient: bool = False) -> None:
    """Raises for gradients that do not belong to these parameters.

    Args:
        grads: A tree like the parameters, or like the fast ones of ``optax.lookahead``.
        params: The parameters.
        call: How to write the call.
        lenient: Whether the trees may be made of other classes, such as ``FrozenDict`` and ``dict``.
    """
    params = params.fast if isinstance(params, optax.LookaheadParams) else params

    def check(path: Any, param: Any, grad: Any) -> None:
        if not jax.tree_util.all_leaves([grad], is_leaf=is_hidden):
            raise ValueError
        check_gradient(path, param, grad)

    try:
        jax.tree_util.tree_map_with_path(check, params, grads)
    except (ValueError, TypeError) as error:
        if isinstance(error, InvalidStepError):
            raise
        where = difference({"gradients": grads, "parameters": params})
        if where or not lenient:
            raise InvalidStepError(
                f"Gradients and parameters are different trees: {where or 'they are made of other classes'}. Pass "
                f"gradients of these parameters, in the order {call}."
            ) from None


def _of_hidden(grad: Any) -> Any:
    """Returns the update of a leaf without a gradient: a no-op for integer arrays; otherwise the given gradient."""
    return jnp.zeros_like(grad) if is_array(grad) and is_number(grad) else grad


@dataclasses.dataclass(frozen=True)
class LossScaledUpdate:
    """The ``update`` function of ``loss_scaled``; ``apply_gradients`` uses its parts to fuse the step."""

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
        """Returns the inner transformation's updates and state for scaled gradients, whatever the verdict.

        It computes in float32, even for 16-bit parameters; its state keeps the dtypes from ``init``.
        """
        unscaled = unscale(trainable(grads), state.loss_scale)
        if "grad" in extra_args:  # what line searches ask for, beside the value of the loss
            extra_args = {**extra_args, "grad": unscale(trainable(extra_args["grad"]), state.loss_scale)}
        held = state.inner_state, trainable(params)
        if any(map(is_narrow, jax.tree.leaves(params))):
            held = _held_in_float32(*held)
        try:
            updates, inner_state = self.inner.update(unscaled, *held, **extra_args)
            if params is not None and _shapes(inner_state) != _shapes(state.inner_state):
                self._check_state(state.inner_state, params)
            return updates, jax.tree.map(_like_old, inner_state, state.inner_state)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if params is not None and not isinstance(error, JmpLiteError):
                self._check_state(state.inner_state, params, error)
            raise

    def _check_state(self, inner_state: Any, params: Any, cause: Exception | None = None) -> None:
        """Raises for a state of other parameters, or of another optimizer."""
        fresh = jax.eval_shape(self.inner.init, trainable(params))
        where = difference({"given state": inner_state, "state that init makes": fresh})
        if where:
            raise InvalidStepError(
                f"The state is that of another optimizer or of other parameters: {where}. Make a new one, opt_state = "
                "tx.init(params), or pass what the last step returned."
            ) from cause

    def next_state(
        self, state: LossScaledState, inner_state: Any, finite: jax.Array, updates_finite: jax.Array
    ) -> LossScaledState:
        """Returns the state after a step with this verdict, and the updates if the step was taken."""
        skipped = (~finite).astype(jnp.int32)
        bad = (finite & ~updates_finite).astype(jnp.int32)
        return LossScaledState(
            inner_state=inner_state,
            loss_scale=state.loss_scale.adjust(finite),
            last_finite=finite,
            notfinite_count=(state.notfinite_count + skipped) * skipped,
            total_notfinite=state.total_notfinite + skipped,
            nonfinite_updates=jnp.where(finite, (state.nonfinite_updates + bad) * bad, state.nonfinite_updates),
            total_nonfinite_updates=state.total_nonfinite_updates + bad,
        )

    def __call__(
        self, updates: Any, state: LossScaledState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, LossScaledState]:
        """Unscales, checks, updates or skips, adjusts; the signature is Optax's."""
        if params is None:
            jax.tree_util.tree_map_with_path(lambda path, grad: check_gradient(path, None, grad), updates)
        else:
            check_trees(updates, params, "update(grads, opt_state, params)", lenient=True)

        def step() -> tuple[tuple[Any, Any], jax.Array]:
            new, inner_state = self.inner_update(updates, state, params, extra_args)
            leaves, treedef = jax.tree.flatten(new)
            kept = [_finite_or_nothing(leaf) for leaf in leaves]
            are_finite = watched([(leaf.dtype, finite) for leaf, finite in kept])
            return (jax.tree.unflatten(treedef, [leaf for leaf, _ in kept]), inner_state), are_finite

        def skip() -> tuple[Any, Any]:
            (shapes, _), _ = jax.eval_shape(step)
            return jax.tree.map(nothing, shapes), state.inner_state

        finite = self.verdict(updates, state)
        (new_updates, inner_state), updates_finite = step_or_skip(
            finite, step, skip, self.axis_name, is_stored=bool(stored_params(state.inner_state))
        )
        given: Any = jax.tree.structure(trainable(updates))
        if given == jax.tree.structure(new_updates):  # not so for optax.lookahead
            new_updates = jax.tree.map(lambda grad, new: _of_hidden(grad) if new is None else new, updates, new_updates)
        return new_updates, self.next_state(state, inner_state, finite, updates_finite)


def _changes(loss_scale: LossScale) -> bool:
    """Whether a loss scale can be another than 1."""
    return isinstance(loss_scale, DynamicLossScale) or loss_scale.loss_scale != 1


def check_optimizer(tx: Any, caller: str) -> None:
    """Raises for an object without ``init`` or ``update``."""
    if callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None)):
        return
    name = getattr(tx, "__name__", "")
    what = (
        f"the function {name}; call it, such as optax.{name}(1e-3)"
        if name and callable(tx)
        else f"{quote(tx)}; write for example optax.adam(1e-3)"
    )
    raise InvalidStepError(f"{caller} takes an Optax optimizer, got {what}.")


def loss_scaled(
    inner: optax.GradientTransformation,
    loss_scale: LossScale = DynamicLossScale(),  # noqa: B008 (an immutable pytree of NumPy scalars)
    *,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer to take the gradients of a scaled loss and skip non-finite steps.

    One ``update`` unscales the gradients to float32 with the scale that produced them, decides once whether they are
    finite, then runs ``inner`` or freezes all of its state (step counts and schedules too) and returns zero updates,
    and adjusts the scale. Clipping belongs inside, where gradients are unscaled. Gradients so large that their global
    norm may overflow float32 count as non-finite. Non-finite updates from finite gradients, which Adafactor returns for
    float16 parameters, change nothing and are counted: see ``apply_gradients``.

    Gradient accumulation belongs inside too: ``loss_scaled(optax.MultiSteps(inner, n).gradient_transformation())``
    skips one bad micro-step. ``MultiSteps`` around ``loss_scaled`` works while gradients are finite, but a NaN stays in
    its accumulator forever, and with ``should_skip_update_fn`` the scale never sees one. ``accumulate_gradients``
    avoids both problems.

    Args:
        inner: Any Optax transformation; it receives the extra arguments of ``update``.
        loss_scale: Initial scale: ``DynamicLossScale``, ``StaticLossScale`` or ``NoOpLossScale``.
        axis_name: Name, or tuple of names, of the mapped axes (``pmap``, ``shard_map``) over which replicas must agree.
            Required when replicas see different gradients, such as shards; harmless after ``lax.pmean``. Under ``jit``
            with sharded arrays the verdict is global anyway. (Inside ``shard_map`` with its default ``check_vma``,
            gradients of replicated parameters arrive already summed over the axis.)

    Returns:
        A transformation whose state is a ``LossScaledState``. Every gradient must pass through it, so it goes around
        ``optax.chain``, ``masked``, ``multi_transform``, ``inject_hyperparams`` and ``MultiSteps``.

    Raises:
        InvalidStepError: If ``inner`` is not an optimizer, for example ``optax.adam`` without a call; in ``init``, if
            it contains another ``loss_scaled``.
        InvalidLossScaleError: If ``loss_scale`` is not a loss scale.
        MissingAxisError: In ``update``, if ``axis_name`` is not mapped, or, under the ``check_vma`` of ``shard_map``,
            if devices see different gradients and it does not say so.

    Warns:
        LostUpdatesWarning: In ``init``, for 16-bit parameters under an optimizer that only rounds them to nearest;
            ``optim.stored`` keeps more bits.

    Example:
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> tx = jmp.loss_scaled(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5)), jmp.DynamicLossScale(8.0))
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.array([8.0, jnp.inf])}, state, params)
        >>> print(updates["w"], state.loss_scale.loss_scale, state.total_notfinite)
        [-0. -0.] 4.0 1

    References:
        Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740; ``optax.apply_if_finite``;
        torch.amp.GradScaler.
    """
    if not is_loss_scale(loss_scale):
        raise InvalidLossScaleError(
            f"loss_scale must be a NoOpLossScale, StaticLossScale or DynamicLossScale, got {loss_scale!r}. "
            "Write for example loss_scaled(inner, DynamicLossScale(2.0**15))."
        )
    check_optimizer(inner, "loss_scaled")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> LossScaledState:
        register_serialization()
        inner_state = inner.init(trainable(params))
        if _changes(loss_scale) and any(_changes(scale) for _, scale in nodes(inner_state, is_loss_scale)):
            raise InvalidStepError(
                "loss_scaled is inside loss_scaled, so gradients would be unscaled twice. Leave one out: the outer one "
                "unscales for all that is in it."
            )
        known = trainable(params)

        def step(grads: Any) -> Any:
            held = _held_in_float32(inner_state, known)
            return inner.update(cast_to_full(grads), *held)[0]

        warn_of_lost_updates(step, known, stored_params(inner_state))
        return LossScaledState(
            inner_state=inner_state,
            loss_scale=jax.tree.map(jnp.array, loss_scale),  # a copy: a step may donate its state
            last_finite=jnp.array(True),
            notfinite_count=jnp.zeros((), np.int32),
            total_notfinite=jnp.zeros((), np.int32),
            nonfinite_updates=jnp.zeros((), np.int32),
            total_nonfinite_updates=jnp.zeros((), np.int32),
        )

    return optax.GradientTransformationExtraArgs(init, LossScaledUpdate(inner, axis_name))
