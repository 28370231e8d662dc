"""Averages gradients over devices."""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jmp_lite._compat import varying_axes
from jmp_lite._policy import PolicyLike, get_policy
from jmp_lite._tree import cast_to_at_least_float32, is_array, is_inexact, path_string
from jmp_lite.distributed._shardings import as_tuple, axes_of, per_leaf, spec_of, tracked

T = TypeVar("T")


def reduce_gradients(grads: T, axis_name: Any, policy: PolicyLike = "float32", *, shardings: Any = None) -> T:
    """Averages gradients over devices, summed in ``reduce_dtype``, inside ``pmap`` and ``shard_map``.

    Each device must differentiate a local loss, the mean over its shard of the batch. Gradients may still be scaled: a
    NaN or infinity on one device then reaches all of them. They are divided before they are rounded and summed, so a
    narrow ``reduce_dtype`` does not overflow with many devices.

    Gradients that are already summed are only divided: gradients of parameters sharded over an axis, summed by
    ``gather_params`` or an ``all_to_all`` of activations; and, under the ``check_vma`` of ``shard_map``, gradients of
    parameters that do not vary over it, summed by JAX. Under ``jit`` with sharded arrays do not call it: the loss is
    already the mean over all devices.

    Args:
        grads: Any pytree; leaves that are not floating or complex stay as they are.
        axis_name: Name, or tuple of names, of the mapped axes over which the batch is split.
        policy: Sets the ``reduce_dtype`` (default float32); a ``PolicyMap`` is looked up by path.
        shardings: The shardings of the parameters, as for ``gather_params``; by default replicated.

    Returns:
        The averages, float32 or wider.

    Raises:
        InvalidShardingError: If something is not a sharding.

    Example:
        >>> def step(x):
        ...     return jmp.distributed.reduce_gradients({"w": x}, "batch")
        >>> print(jax.pmap(step, "batch")(jnp.arange(8.0))["w"][:3])
        [3.5 3.5 3.5]

    References:
        ``reduce_dtype`` of PyTorch FSDP, arXiv:2304.11277; github.com/jax-ml/jax/issues/27496.
    """
    axes, policies, stored = as_tuple(axis_name), get_policy(policy), per_leaf(shardings, grads)
    devices, known = math.prod(lax.axis_size(axis) for axis in axes), tracked(axes)

    def reduce(path: Any, leaf: Any, sharding: Any) -> Any:
        if not is_array(leaf) or not is_inexact(leaf):
            return leaf
        share = cast_to_at_least_float32(leaf) / devices
        summed = {*axes_of(spec_of(sharding)), *(known - varying_axes(leaf))}
        apart = tuple(axis for axis in axes if axis not in summed)
        if not apart:
            return share
        dtype = policies.policy_for(path_string(path)).reduce_dtype or share.dtype
        narrow = share.astype(dtype) if jnp.issubdtype(share.dtype, jnp.floating) else share
        return lax.psum(narrow, apart).astype(share.dtype)

    reduced: T = jax.tree_util.tree_map_with_path(reduce, grads, stored)
    return reduced
