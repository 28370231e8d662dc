"""The gradients of all devices, made one."""

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
    """Averages gradients over devices, added up in ``reduce_dtype``, inside ``pmap`` and ``shard_map``.

    Each device must have differentiated its own loss, the mean over its own part of the batch. Gradients may still be
    scaled: a NaN or infinity on one device then reaches all of them. They are divided before they are rounded and
    added up, so that a narrow ``reduce_dtype`` does not overflow by the number of devices.

    Gradients that were added up before are only divided: those of parameters sharded over an axis, which
    ``gather_params`` or an ``all_to_all`` of activations has summed; and, under the ``check_vma`` of ``shard_map``,
    those of parameters that do not vary over it, which JAX sums by itself. Under ``jit`` with sharded arrays there is
    nothing to call: the loss is the mean over all devices.

    Args:
        grads: Any pytree; leaves that are not floating or complex stay as they are.
        axis_name: Name, or tuple of names, of the mapped axes over which the batch is split.
        policy: Names the ``reduce_dtype`` (default float32); a ``PolicyMap`` is asked by path.
        shardings: How parameters are stored, as for ``gather_params``; by default replicated.

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
