"""Pruning as an Optax transformation: chosen weights are zero, exactly, and stay so.

Nothing is sorted. The weights below a sparsity are found by bisecting the bits of their magnitudes, which needs only
counts: a sharded leaf stays where it is and devices exchange one number per bit.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmp_lite._dtypes import at_least_float32
from jmp_lite._tree import NOT_WEIGHTS, describe, is_array, path_string
from jmp_lite.errors import InvalidPruningError

#: Leaves with fewer elements stay dense unless the caller's own ``where`` chooses them.
SMALLEST_LEAF = 1024


class PruneState(NamedTuple):
    """State of ``prune``; ``optax.tree.get`` finds its fields.

    Attributes:
        step: ``int32[]``, steps taken.
        masks: A tree like the parameters: ``bool`` arrays, True where a weight is alive, and ``optax.MaskedNode`` for
            parameters that are never pruned. (Give ``optax.tree.map_params`` an ``is_leaf`` that knows it.)

    Example:
        >>> state = jmp.optim.prune(0.5, where=lambda path, leaf: True).init({"w": jnp.ones(2)})
        >>> print(optax.tree.get(state, "masks")["w"])
        [ True  True]
    """

    step: jax.Array
    masks: Any


def _is_none(node: Any) -> bool:
    return node is None


def _is_no_mask(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def _is_floating(leaf: Any) -> bool:
    return is_array(leaf) and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _wide(param: Any, update: Any) -> Any:
    """The dtype that holds parameter, update and their sum without loss of the parameter's digits."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(at_least_float32(param.dtype), at_least_float32(update.dtype))


# --- Masks ---


def _keys(mask: Any, param: Any, update: Any) -> jax.Array:
    """Unsigned integers in the order of the new magnitudes of a leaf; 0 where a weight is pruned already."""
    wide = _wide(param, update)
    score = jnp.abs(jnp.asarray(param).astype(wide) + jnp.asarray(update).astype(wide))
    bits = jax.lax.bitcast_convert_type(score, jnp.uint64 if wide.itemsize == 8 else jnp.uint32)
    return jnp.where(mask, bits + 1, 0)


def _threshold(keys: jax.Array, count: jax.Array, bits: int) -> jax.Array:
    """Returns the largest number of so many bits that at most ``count`` keys are below."""

    def decide(i: jax.Array, below: jax.Array) -> jax.Array:
        raised = below | (jnp.ones((), keys.dtype) << (bits - 1 - i).astype(keys.dtype))
        return jnp.where(jnp.sum(keys < raised, dtype=jnp.uint32) <= count, raised, below)

    start = jnp.sum(keys < 0, dtype=keys.dtype)  # zero that varies over the mesh axes that the keys vary over
    threshold: jax.Array = jax.lax.fori_loop(0, bits, decide, start)
    return threshold


def _all_but_smallest(keys: jax.Array, count: jax.Array) -> jax.Array:
    """Returns a mask without the ``count`` smallest keys; of equal ones the first in the array go first."""
    threshold = _threshold(keys, count, 8 * keys.dtype.itemsize)
    bits = keys.size.bit_length()
    strides = [math.prod(keys.shape[axis + 1 :]) for axis in range(keys.ndim)]
    index = sum(
        (jax.lax.broadcasted_iota(jnp.uint32, keys.shape, axis) * stride for axis, stride in enumerate(strides)),
        jnp.zeros(keys.shape, jnp.uint32),
    )
    ties = jnp.where(keys == threshold, index, (1 << bits) - 1)
    left = count - jnp.sum(keys < threshold, dtype=jnp.uint32)
    return (keys >= threshold) & (ties >= _threshold(ties, left, bits))


def _largest_of_groups(keys: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """Returns a mask of the ``n`` largest of every ``m`` consecutive keys along an axis; of equal ones the last."""
    axis %= keys.ndim
    groups = keys.reshape(*keys.shape[:axis], keys.shape[axis] // m, m, *keys.shape[axis + 1 :])
    ranks = jnp.argsort(jnp.argsort(groups, axis=axis + 1), axis=axis + 1)
    mask: jax.Array = (ranks >= m - n).reshape(keys.shape)
    return mask


def _zeros_of(sparsity: Any, size: int) -> jax.Array:
    """Returns how many of ``size`` weights are zero: exactly where the sparsity is a number of Python."""
    if _is_number(sparsity):
        return jnp.asarray(round(float(sparsity) * size), jnp.uint32)
    zeros: jax.Array = jnp.clip(jnp.round(jnp.asarray(sparsity).astype(jnp.float32) * size), 0, size)
    return zeros.astype(jnp.uint32)


# --- Choices ---


def _is_weight(path: str, leaf: Any, nm: tuple[int, int] | None, axis: int) -> bool:
    """The default ``where``."""
    names = [name for name in path.split("/") if name not in ("value", "raw_value")]  # boxes of Flax
    name = names[-1] if names else ""
    if leaf.ndim < 2 or leaf.size < SMALLEST_LEAF or name in NOT_WEIGHTS:
        return False
    return nm is None or ("embedding" not in name and _divides(leaf, nm, axis))


def _divides(leaf: Any, nm: tuple[int, int], axis: int) -> bool:
    return bool(-leaf.ndim <= axis < leaf.ndim and leaf.shape[axis] % nm[1] == 0)


def _check(sparsity: Any, nm: Any, axis: Any, begin: Any, every: Any) -> None:
    """Refuses settings that mean nothing."""
    if (sparsity is None) == (nm is None):
        raise InvalidPruningError(
            f"prune takes either a sparsity or nm, got sparsity={sparsity!r} and nm={nm!r}. Write for example "
            "prune(0.8) or prune(nm=(2, 4))."
        )
    known = sparsity is None or callable(sparsity) or isinstance(sparsity, jax.Array)  # inject_hyperparams has arrays
    if not known and not (_is_number(sparsity) and 0 <= sparsity < 1):
        raise InvalidPruningError(
            f"sparsity must be in [0, 1) or a schedule, got {sparsity!r}. It is the fraction of weights that are zero."
        )
    if nm is not None and not (
        isinstance(nm, (tuple, list)) and len(nm) == 2 and all(map(_is_integer, nm)) and 0 < nm[0] < nm[1]
    ):
        raise InvalidPruningError(f"nm must be two integers with 0 < n < m such as (2, 4), got {nm!r}.")
    for name, value, least in (("axis", axis, None), ("begin", begin, 0), ("every", every, 1)):
        if not _is_integer(value) or (least is not None and value < least):
            bound = "" if least is None else f" of at least {least}"
            raise InvalidPruningError(f"{name} must be an integer{bound}, got {value!r}.")


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (float, np.floating)) or _is_integer(value)


# --- The transformation ---


def prune(
    sparsity: Any = None,
    *,
    nm: tuple[int, int] | None = None,
    where: Callable[[str, Any], bool] | None = None,
    axis: int = -2,
    begin: int = 0,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Zeroes the weights of smallest magnitude while training goes on; give it ``sparsity`` or ``nm``.

    It goes last in ``optax.chain``: where a weight is pruned its update is minus the weight, so that
    ``optax.apply_updates`` and ``jmp.apply_gradients`` leave exactly zero, in any floating dtype. Anything that changes
    parameters afterwards (another transformation, weights averaged over steps that began earlier) revives zeros. What
    is pruned stays pruned.

    A number prunes once, at step ``begin``, and so does ``nm``: the further steps are the fine-tuning. A schedule
    prunes step by step; that of Zhu & Gupta is ``optax.polynomial_schedule(0.0, 0.8, power=3, transition_steps=n,
    transition_begin=t)``, with ``every`` for their pruning frequency.

    Inside ``loss_scaled``, ``optax.apply_if_finite`` and ``optax.MultiSteps`` a step that is skipped, or that only
    accumulates, changes neither masks nor ``step``. For ``optax.inject_hyperparams`` write it as a function of the
    sparsity alone: ``lambda sparsity: chain(..., prune(sparsity))``. Masks cost one byte per weight. Under ``jit`` a
    sharded leaf counts as a whole; inside ``shard_map`` each device prunes its own shard to the sparsity.

    Args:
        sparsity: Fraction in [0, 1) of the weights of each leaf that are zero: a number, or an Optax schedule of the
            steps taken so far. Exactly ``round(sparsity * size)`` weights are zero (computed in float32 for a
            schedule), fewer never again; of equal magnitudes the first in the array go first.
        nm: ``(n, m)``: of every ``m`` consecutive weights along ``axis`` the ``n`` largest are kept, as ``(2, 4)`` for
            the sparse tensor cores of NVIDIA.
        where: ``where(path, leaf) -> bool`` chooses floating parameters by paths such as ``"dense/kernel"``. The
            default takes leaves of at least two axes and 1024 elements that are not called ``bias``, ``scale``, ``b``
            or ``offset``. So the first convolution of a small network stays dense (3 x 3 x 3 x 32 is 864 elements): it
            holds next to nothing of the bytes, and zeroing 80 % of one with 144 elements cost 3 points of accuracy on
            the digits of scikit-learn. For ``nm`` it also leaves out, as NVIDIA's ASP does, embeddings and leaves that
            ``m`` does not divide.
        axis: The axis of ``nm``. -2 is what products contract in the kernels of Flax's ``Dense`` and ``Conv``; a
            second ``prune`` in the chain takes kernels with another, such as -3 for those of attention's query.
        begin: First step that prunes, counted from 0.
        every: Steps from one change of the masks to the next; for schedules.

    Returns:
        A transformation whose state is a ``PruneState``. Its ``update`` needs ``params``.

    Raises:
        InvalidPruningError: For settings that mean nothing; in ``init`` for a leaf chosen by ``where`` whose ``axis``
            cannot be divided by ``m``; in ``update`` without ``params``.

    Example:
        >>> tx = optax.chain(optax.sgd(0.1), jmp.optim.prune(0.5, where=lambda path, leaf: leaf.ndim == 2))
        >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]]), "bias": jnp.ones(2)}
        >>> state = tx.init(params)
        >>> updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        >>> print(optax.apply_updates(params, updates)["kernel"])
        [[ 0. -4.]
         [ 3.  0.]]
        >>> print(1 - optax.tree.get(state, "masks")["kernel"].mean())
        0.5

    References:
        Zhu & Gupta, "To prune, or not to prune", arXiv:1710.01878; Mishra et al., "Accelerating Sparse Deep Neural
        Networks", arXiv:2104.08378; jaxpruner.
    """
    _check(sparsity, nm, axis, begin, every)

    def initial_mask(path: Any, param: Any) -> Any:
        name = path_string(path)
        if not _is_floating(param) or not (where(name, param) if where else _is_weight(name, param, nm, axis)):
            return optax.MaskedNode()
        if nm is not None and not _divides(param, nm, axis):
            raise InvalidPruningError(
                f"{name!r} is {describe(param)}: axis {axis} cannot be divided into groups of {nm[1]}. Leave it out by "
                "where, or choose another axis."
            )
        return jnp.ones_like(param, dtype=bool)

    def init(params: Any) -> PruneState:
        return PruneState(jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(initial_mask, params))

    def renewed(state: PruneState, updates: Any, params: Any) -> Any:
        target = sparsity(state.step) if callable(sparsity) else sparsity

        def renew(mask: Any, param: Any, update: Any) -> Any:
            if _is_no_mask(mask) or not _is_floating(update):
                return mask
            keys = _keys(mask, param, update)
            if nm is not None:
                return mask & _largest_of_groups(keys, *nm, axis)
            return mask & _all_but_smallest(keys, _zeros_of(target, keys.size))

        return jax.tree.map(renew, state.masks, params, updates, is_leaf=_is_no_mask)

    def due(step: jax.Array) -> jax.Array:
        if nm is not None or _is_number(sparsity):
            return step == begin  # the same weights would be the smallest again
        return (step >= begin) & ((step - begin) % every == 0)

    def update(updates: Any, state: PruneState, params: Any = None, **_: Any) -> tuple[Any, PruneState]:
        if params is None:
            raise InvalidPruningError("prune needs the parameters: call update(updates, state, params).")
        now = due(state.step)
        if isinstance(now, jax.core.Tracer):
            masks = jax.lax.cond(now, renewed, lambda state, *_: state.masks, state, updates, params)
        else:
            masks = renewed(state, updates, params) if now else state.masks
        pruned = jax.tree.map(_pruned, updates, params, masks, is_leaf=_is_none)
        return pruned, PruneState(optax.safe_increment(state.step), masks)

    return optax.GradientTransformationExtraArgs(init, update)


def _pruned(update: Any, param: Any, mask: Any) -> Any:
    """The update, or what leaves zero of the parameter where it is pruned."""
    if _is_no_mask(mask) or not _is_floating(update):
        return update
    dtype = update.dtype if update.dtype == param.dtype else _wide(param, update)
    return jnp.where(mask, jnp.asarray(update).astype(dtype), -jnp.asarray(param).astype(dtype))
