"""Pruning as an Optax transformation: pruned weights are exactly zero, and stay zero.

Nothing is sorted. A bisection over the bits of the magnitudes finds the weights to prune, and needs only counts: a
sharded leaf stays in place and devices exchange one number per bit.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmp_lite._dtypes import at_least_float32
from jmp_lite._messages import first_few, quote, warn
from jmp_lite._tree import NOT_WEIGHTS, Opaque, is_array, path_string
from jmp_lite.errors import InvalidPruningError, LeftDenseWarning
from jmp_lite.scaling._loss_scaled import check_step

#: Leaves with fewer elements stay dense unless the caller's own ``where`` chooses them.
SMALLEST_LEAF = 1024


class PruneState(NamedTuple):
    """State of ``prune``; ``optax.tree.get`` finds its fields.

    Attributes:
        step: ``int32[]``, steps taken.
        masks: A tree like the parameters: ``bool`` arrays, True where a weight is kept, and ``optax.MaskedNode`` for
            parameters that are never pruned. (Pass ``optax.tree.map_params`` an ``is_leaf`` that recognizes it.)

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
    """Returns a mask without the ``count`` smallest keys; among equal keys the first in the array go first."""
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
    """Returns a mask of the ``n`` largest of every ``m`` consecutive keys along an axis; the last of equal keys."""
    axis %= keys.ndim
    groups = keys.reshape(*keys.shape[:axis], keys.shape[axis] // m, m, *keys.shape[axis + 1 :])
    ranks = jnp.argsort(jnp.argsort(groups, axis=axis + 1), axis=axis + 1)
    mask: jax.Array = (ranks >= m - n).reshape(keys.shape)
    return mask


def _zeros_of(sparsity: Any, size: int) -> jax.Array:
    """Returns how many of ``size`` weights are zero; exact if the sparsity is a Python number."""
    if _is_number(sparsity):
        return jnp.asarray(round(float(sparsity) * size), jnp.uint32)
    zeros: jax.Array = jnp.clip(jnp.round(jnp.asarray(sparsity).astype(jnp.float32) * size), 0, size)
    return zeros.astype(jnp.uint32)


# --- Choices ---


def _is_weight(path: str, leaf: Any, nm: tuple[int, int] | None) -> bool:
    """The default ``where``."""
    names = [name for name in path.split("/") if name not in ("value", "raw_value")]  # boxes of Flax
    name = names[-1] if names else ""
    is_weight = leaf.ndim >= 2 and leaf.size >= SMALLEST_LEAF and name not in NOT_WEIGHTS
    return is_weight and (nm is None or "embedding" not in name)


def _fitting(leaf: Any, m: int, axes: Sequence[int] | None) -> list[int]:
    """Returns those of some axes that can be cut into groups of ``m``."""
    return [axis for axis in axes or () if -leaf.ndim <= axis < leaf.ndim and leaf.shape[axis] % m == 0]


def _axes_by_path(axes: Any) -> Callable[[str, Any], Sequence[int] | None]:
    """Returns a function of path and leaf: the contracted axes, ``None`` if unknown."""
    if axes is None:
        return lambda _, leaf: (0,) if leaf.ndim == 2 else None
    if _is_integer(axes):
        return lambda *_: (axes,)
    found = {path_string(path): own for path, own in jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_axes)}

    def look_up(path: str, leaf: Any) -> Sequence[int]:
        if path not in found:
            raise InvalidPruningError(
                f"axes has nothing for {path!r}, which is {quote(leaf)}. Give a number, or what "
                "quant.contracted_axes(fun)(params, *args) returns for these parameters."
            )
        own = found[path]
        return (own,) if _is_integer(own) else own or ()

    return look_up


_UNKNOWN = "which of their axes matmuls contract is not known"


def _problem(name: str, leaf: Any, m: int, axes: Sequence[int] | None) -> str:
    problem = _UNKNOWN if axes is None else f"none of its axes {tuple(axes)} can be cut into groups of {m}"
    return (
        f"{name!r} is {quote(leaf)}: {problem}. Leave it out by where, or pass "
        "axes=quant.contracted_axes(fun)(params, *args)."
    )


def _is_axes(node: Any) -> bool:
    return node is None or (isinstance(node, tuple) and all(map(_is_integer, node)))


def _check(sparsity: Any, nm: Any, axes: Any, begin: Any, every: Any) -> None:
    """Raises for invalid settings."""
    if (sparsity is None) == (nm is None):
        raise InvalidPruningError(
            f"prune takes either a sparsity or nm, got sparsity={sparsity!r} and nm={nm!r}. Write for example "
            "prune(0.8) or prune(nm=(2, 4))."
        )
    is_array_of_one = isinstance(sparsity, jax.Array) and sparsity.ndim == 0  # as inject_hyperparams has
    known = sparsity is None or callable(sparsity) or is_array_of_one
    if not known and not (_is_number(sparsity) and 0 <= sparsity < 1):
        raise InvalidPruningError(
            f"sparsity must be in [0, 1) or a schedule, got {sparsity!r}. It is the fraction of weights that are zero."
        )
    if nm is not None and not (
        isinstance(nm, (tuple, list)) and len(nm) == 2 and all(map(_is_integer, nm)) and 0 < nm[0] < nm[1]
    ):
        raise InvalidPruningError(f"nm must be two integers with 0 < n < m such as (2, 4), got {nm!r}.")
    if axes is not None and nm is None:
        raise InvalidPruningError(f"axes are those of nm, and a sparsity has no use for any, got axes={axes!r}.")
    for name, value, least in (("begin", begin, 0), ("every", every, 1)):
        if not _is_integer(value) or value < least:
            raise InvalidPruningError(f"{name} must be an integer of at least {least}, got {value!r}.")


def _check_where(where: Any) -> None:
    if where is not None and not callable(where):
        raise InvalidPruningError(
            f"where must be a function of path and leaf, got {quote(where)}. Write for example "
            "where=lambda path, leaf: 'kernel' in path."
        )


def _warn_of_dense(unknown: list[str], params: Any, masks: Any, where: Any, nm: tuple[int, int] | None) -> None:
    """Warns of leaves whose contracted axes are unknown, or if no leaf at all is chosen."""
    names = [
        repr(path_string(path)) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if _is_floating(leaf)
    ]
    if unknown:
        message = (
            f"prune leaves {first_few(unknown)} dense: {_UNKNOWN}. Pass axes=quant.contracted_axes(fun)(params, "
            "*args), or choose leaves by where."
        )
    elif names and not jax.tree.leaves(masks):
        divided = f" with a contracted axis that {nm[1]} divides" if nm else ""
        by = "where" if where else f"the default of where, which takes large weights{divided},"
        message = f"prune leaves all parameters dense: {by} chooses none of {first_few(names)}. Choose leaves by where."
    else:
        return
    warn(message, LeftDenseWarning)


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
    axes: Any = None,
    begin: int = 0,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Zeroes the weights of smallest magnitude during training; pass ``sparsity`` or ``nm``.

    Put it last in ``optax.chain``: the update of a pruned weight is minus the weight, so ``optax.apply_updates`` and
    ``jmp.apply_gradients`` leave exactly zero, in any floating dtype. Anything that changes parameters afterwards
    (another transformation, an average over earlier steps) makes them nonzero again. Pruned weights stay pruned.

    A number prunes once, at step ``begin``, and so does ``nm``: the remaining steps fine-tune. A schedule prunes step
    by step; Zhu & Gupta's is ``optax.polynomial_schedule(0.0, 0.8, power=3, transition_steps=n, transition_begin=t)``,
    with ``every`` for their pruning frequency.

    Inside ``loss_scaled``, ``optax.apply_if_finite`` and ``optax.MultiSteps`` a step that is skipped, or that only
    accumulates, changes neither masks nor ``step``. For ``optax.inject_hyperparams`` write it as a function of the
    sparsity only: ``lambda sparsity: chain(..., prune(sparsity))``. Masks cost one byte per weight. Under ``jit`` a
    sharded leaf counts as a whole; inside ``shard_map`` each device prunes its own shard to the sparsity.

    Args:
        sparsity: Fraction in [0, 1) of zeros in each leaf: a number, or an Optax schedule of the steps taken so far.
            Exactly ``round(sparsity * size)`` weights are zero (computed in float32 for a schedule), and the count
            never falls; among equal magnitudes the first in the array go first.
        nm: ``(n, m)`` keeps the ``n`` largest of every ``m`` consecutive weights along a contracted axis, such as ``(2,
            4)`` for NVIDIA's sparse tensor cores.
        where: ``where(path, leaf) -> bool`` chooses floating parameters by paths such as ``"dense/kernel"``. The
            default takes leaves of at least two axes and 1024 elements that are not called ``bias``, ``scale``, ``b``
            or ``offset``. So the first convolution of a small network stays dense (3 x 3 x 3 x 32 is 864 elements): it
            holds almost none of the bytes, and zeroing 80 % of one with 144 elements cost 3 points of accuracy on
            scikit-learn's digits. For ``nm`` the default also skips embeddings and leaves that ``m`` does not divide,
            as NVIDIA's ASP does.
        axes: The axes for ``nm``: the result of ``quant.contracted_axes(fun)(params, *args)``, a tree like the
            parameters; among several contracted axes of a leaf, ``prune`` uses the last that ``m`` divides, and leaves
            that no matmul uses (``None``) stay dense. Or one number for all leaves. The default is the first of two
            axes, as in Flax and Haiku kernels; leaves with more axes then stay dense, with a warning.
        begin: First step that prunes, counted from 0.
        every: Steps between changes of the masks; for schedules.

    Returns:
        A transformation whose state is a ``PruneState``. Its ``update`` needs ``params``.

    Raises:
        InvalidPruningError: For invalid settings; in ``init`` for a leaf chosen by ``where`` whose axes are unknown or
            that ``m`` does not divide; in ``update`` without ``params``, or with another state.

    Warns:
        LeftDenseWarning: In ``init``, if no leaf is chosen, or if leaves with more axes stay dense because their
            contracted axes are unknown.

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
    _check(sparsity, nm, axes, begin, every)
    _check_where(where)
    axes_of = _axes_by_path(axes)

    def initial_mask(path: Any, param: Any, dense: list[str]) -> Any:
        name = path_string(path)
        if not _is_floating(param) or not (where(name, param) if where else _is_weight(name, param, nm)):
            return optax.MaskedNode()
        if nm is not None:
            own = axes_of(name, param)
            if not _fitting(param, nm[1], own):
                if where:
                    raise InvalidPruningError(_problem(name, param, nm[1], own))
                dense += [name] if own is None else []
                return optax.MaskedNode()
        return jnp.ones_like(param, dtype=bool)

    def init(params: Any) -> PruneState:
        dense: list[str] = []
        masks = jax.tree_util.tree_map_with_path(functools.partial(initial_mask, dense=dense), params)
        _warn_of_dense(dense, params, masks, where, nm)
        return PruneState(jnp.zeros((), jnp.int32), masks)

    def renewed(state: PruneState, updates: Any, params: Any) -> Any:
        target = sparsity(state.step) if callable(sparsity) else sparsity

        def renew(path: Any, mask: Any, param: Any, update: Any) -> Any:
            if _is_no_mask(mask) or not _is_floating(update):
                return mask
            keys = _keys(mask, param, update)
            if nm is not None:
                axis = _fitting(param, nm[1], axes_of(path_string(path), param))[-1]
                return mask & _largest_of_groups(keys, *nm, axis)
            return mask & _all_but_smallest(keys, _zeros_of(target, keys.size))

        return jax.tree_util.tree_map_with_path(renew, state.masks, params, updates, is_leaf=_is_no_mask)

    def due(step: jax.Array) -> jax.Array:
        if nm is not None or _is_number(sparsity):
            return step == begin  # the same weights would be the smallest again
        return (step >= begin) & ((step - begin) % every == 0)

    def update(updates: Any, state: PruneState, params: Any = None, **_: Any) -> tuple[Any, PruneState]:
        check_step(state, params, PruneState, "prune", InvalidPruningError)
        now = due(state.step)
        if isinstance(now, jax.core.Tracer):
            masks = jax.lax.cond(now, renewed, lambda state, *_: state.masks, state, updates, params)
        else:
            masks = renewed(state, updates, params) if now else state.masks
        pruned = jax.tree.map(_pruned, updates, params, masks, is_leaf=_is_none)
        return pruned, PruneState(optax.safe_increment(state.step), masks)

    return optax.GradientTransformationExtraArgs(init, update)


def _pruned(update: Any, param: Any, mask: Any) -> Any:
    """The update, or the one that makes a pruned parameter zero."""
    if _is_no_mask(mask) or not _is_floating(update):
        return update
    dtype = update.dtype if update.dtype == param.dtype else _wide(param, update)
    return jnp.where(mask, jnp.asarray(update).astype(dtype), -jnp.asarray(param).astype(dtype))


def sparsity(params: Any) -> Any:
    """Returns the share of zeros in each parameter.

    Args:
        params: Parameters of any framework.

    Returns:
        A tree like ``params``: ``float32[]`` for floating and quantized arrays, ``None`` for other leaves.

    Example:
        >>> print(jmp.optim.sparsity({"w": jnp.array([0.0, 1.0, 0.0, 2.0]), "step": 3})["w"])
        0.5
    """

    def share(leaf: Any) -> Any:
        return jnp.mean(jnp.asarray(leaf) == 0) if _is_floating(leaf) or _is_held(leaf) else None

    return jax.tree.map(share, params, is_leaf=_is_held)


def _is_held(node: Any) -> bool:
    """Whether a node stands for an array, as a ``QuantizedArray`` does."""
    return isinstance(node, Opaque) and hasattr(node, "__jax_array__")
