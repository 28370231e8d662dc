"""Gathers sharded parameters, and reduces their gradients."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jmp_lite._compat import NO_AUTOCAST, varying_axes
from jmp_lite._dtypes import FLOAT32, DType, at_least_float32
from jmp_lite._policy import PolicyLike, get_policy
from jmp_lite._tree import is_array, path_string
from jmp_lite.distributed._shardings import as_tuple, axes_of, check_axes, manual, per_leaf, spec_of, tracked, without
from jmp_lite.errors import InvalidShardingError

T = TypeVar("T")
Move = Callable[[Any], Any]


def gather_params(params: T, shardings: Any, policy: PolicyLike, *, axis_name: Any = None) -> T:
    """Gathers sharded parameters: they travel in the compute dtype, their gradients in ``reduce_dtype``.

    Call it inside the differentiated function, on the sharded parameters. It rounds each shard to the compute dtype
    before sending. The full parameter has its original dtype again, so models, ``autocast`` and ``with_policy`` work
    unchanged; XLA drops the casts in between. Parameters that are not sharded neither travel nor lose digits.

    The gradient of a sharded parameter is summed over devices, and each device keeps its shard (reduce-scatter). Under
    ``jit`` XLA sums right after the operation that computes the gradient, in its dtype. With ``autocast`` that is
    ``reduce_dtype`` for matmul weights, biases, scales and embeddings, even if they are transposed, reshaped or sliced
    first; it is the compute dtype for convolutions, for weights computed from others, and in models that cast by hand.

    Args:
        params: Any pytree. Under ``jit`` global arrays; inside ``shard_map`` and ``pmap`` the shards of this device.
        shardings: The shardings of ``params``: a pytree, or a prefix of one, of ``NamedSharding`` or ``PartitionSpec``
            (``None``: replicated). Under ``jit`` a ``PartitionSpec`` needs ``jax.set_mesh``.
        policy: Sets the dtypes; a ``PolicyMap`` is looked up by path.
        axis_name: Name, or tuple of names, of the mesh axes to gather over; over other axes, parameters stay sharded.
            By default all axes in ``shardings``. Inside ``shard_map`` with ``check_vma``, parameters that are
            replicated along these axes are marked as varying, so their gradients are summed in ``reduce_dtype`` too.

    Returns:
        Parameters of the same structure and dtypes, gathered along these axes.

    Raises:
        InvalidShardingError: If something is not a sharding, or cannot be gathered.

    Example:
        >>> mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> sharding = jax.NamedSharding(mesh, jax.P("data"))
        >>> params = jax.device_put({"w": jnp.linspace(0.0, 1.0, 16)}, sharding)
        >>> @jax.jit
        ... def predict(params, x):
        ...     params = jmp.distributed.gather_params(params, sharding, "mixed_bfloat16")
        ...     return x * params["w"]
        >>> print(predict(params, 1.0)[1])
        0.066894531

    References:
        Rajbhandari et al., "ZeRO", arXiv:1910.02054; Zhao et al., "PyTorch FSDP", arXiv:2304.11277, section 4.4
        (``MixedPrecision(param_dtype, reduce_dtype)``).
    """
    policies, stored = get_policy(policy), per_leaf(shardings, params)
    named = [axis for sharding in jax.tree.leaves(stored) for axis in axes_of(spec_of(sharding))]
    axes = tuple(dict.fromkeys(named)) if axis_name is None else as_tuple(axis_name)
    check_axes(axes, stored)
    known = tracked(axes)

    def gather(path: Any, leaf: Any, sharding: Any) -> Any:
        place = path_string(path)
        policy = policies.policy_for(place)
        gathered = [axis for axis in axes if axis in axes_of(spec_of(sharding))]
        if gathered:
            return travel(leaf, policy.compute_dtype, policy.reduce_dtype, *_moves(place, sharding, gathered))
        same = known - varying_axes(leaf) if known else known
        vary = functools.partial(lax.pcast, axis_name=tuple(same), to="varying")
        return travel(leaf, None, policy.reduce_dtype, vary, vary) if same else leaf

    with jax.named_scope(NO_AUTOCAST):
        full: T = jax.tree_util.tree_map_with_path(gather, params, stored)
    return full


def travel(leaf: Any, dtype: DType | None, reduce_dtype: DType | None, there: Move, back: Move) -> Any:
    """Moves an array in one dtype, and its gradient the opposite way in another; both keep the dtype of the array.

    Args:
        leaf: An array.
        dtype: The dtype in which a float32 array travels, if narrower. Other arrays travel unchanged.
        reduce_dtype: The dtype of gradient sums; ``None`` means float32, or the gradient's dtype if wider.
        there: Moves it.
        back: Moves a tangent of it; the transpose of this moves the gradient.
    """
    if not is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return there(leaf)
    is_rounded = dtype is not None and leaf.dtype == FLOAT32 and dtype.itemsize < FLOAT32.itemsize
    narrow, sum_dtype = dtype if is_rounded else leaf.dtype, reduce_dtype or at_least_float32(leaf.dtype)

    @jax.custom_jvp
    def move(leaf: Any) -> Any:
        return there(leaf.astype(narrow)).astype(leaf.dtype)

    @move.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        [tangent] = tangents
        return move(*primals), back(tangent.astype(sum_dtype)).astype(tangent.dtype)

    return move(leaf)


def _moves(place: str, sharding: Any, gathered: Sequence[Any]) -> tuple[Move, Move]:
    """Returns how the shards of a parameter are gathered, and how those of a tangent are."""
    mesh, local = jax.sharding.get_abstract_mesh(), manual(gathered)
    if local:
        _check_all_are("manual", local, gathered, place, sharding)
        move = functools.partial(_all_gather, place=place, spec=spec_of(sharding), gathered=gathered)
        return move, move
    full = without(sharding, gathered)
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = [axis for axis in gathered if types.get(axis) is AxisType.Explicit]
    if explicit:
        _check_all_are("explicit", explicit, gathered, place, sharding)
        reshard = functools.partial(jax.sharding.reshard, out_shardings=full)
        return reshard, reshard
    constrain: Callable[..., Any] = lax.with_sharding_constraint
    # Told both, XLA can neither gather before the cast nor gather once more for the backward pass.
    return lambda x: constrain(constrain(x, sharding), full), lambda x: constrain(x, sharding)


def _check_all_are(kind: str, found: Sequence[Any], gathered: Sequence[Any], place: str, sharding: Any) -> None:
    if len(found) < len(gathered):
        raise InvalidShardingError(
            f"{place!r} is sharded as {sharding}, and of its axes only {found} are {kind} here. Gather over those "
            f"first: axis_name={tuple(found)!r}."
        )


def _all_gather(array: Any, *, place: str, spec: PartitionSpec, gathered: Sequence[Any]) -> Any:
    for dimension, entry in enumerate(spec):
        names = axes_of((entry,))
        chosen = [axis for axis in names if axis in gathered]
        if chosen and len(chosen) < len(names):
            raise InvalidShardingError(
                f"Dimension {dimension} of {place!r} is sharded over {names}; gathered over {chosen} alone, its rows "
                "would be out of order. Gather over all of them."
            )
        if chosen:
            array = lax.all_gather(array, tuple(names), axis=dimension, tiled=True)
    return array
