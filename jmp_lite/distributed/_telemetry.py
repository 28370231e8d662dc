"""Which gradient on which replica is not finite, known on all of them."""

from typing import Any

import jax
import jax.numpy as jnp

from jmp_lite._tree import is_finite, is_inexact, path_string, vary_over
from jmp_lite.distributed._shardings import as_tuple


def nonfinite_leaves(grads: Any, *, axis_name: Any = None) -> dict[str, jax.Array]:
    """Returns, for each floating or complex leaf, whether it holds a NaN or an infinity, and on which replicas.

    Call it inside the step and return the dict: it holds one boolean per leaf and replica, gathered in one collective
    for all leaves, and is the same on every device. ``check_loss_scale`` accepts it in place of gradients.

    Args:
        grads: Gradients, scaled or not, or any other tree.
        axis_name: Name, or tuple of names, of mapped axes (``pmap``, ``shard_map``) to tell apart. Under ``jit`` with
            sharded arrays leave it out: there are no replicas to name.

    Returns:
        A dict from paths such as ``"decoder/w"`` to ``bool[]``, or with an axis ``bool[replicas]``, the replicas in the
        order of ``jax.lax.axis_index(axis_name)``.

    Example:
        >>> grads = {"decoder": {"w": jnp.array([1.0, jnp.inf]), "b": jnp.ones(2)}}
        >>> {path: bool(bad) for path, bad in jmp.distributed.nonfinite_leaves(grads).items()}
        {'decoder/b': False, 'decoder/w': True}
        >>> def replica(grads):
        ...     return jmp.distributed.nonfinite_leaves(grads, axis_name="batch")
        >>> print(jax.pmap(replica, "batch")({"w": jnp.array([1.0, jnp.nan, 1.0])})["w"][0])
        [False  True False]

    References:
        The per-tensor ``found_inf`` of torch.amp.GradScaler, which stays on its device.
    """
    leaves = [(path_string(path), x) for path, x in jax.tree_util.tree_leaves_with_path(grads) if is_inexact(x)]
    if not leaves:
        return {}
    bad = jnp.stack([~is_finite(x).all() for _, x in leaves])
    if axis_name is None:
        return _by_path(leaves, bad)
    axes = as_tuple(axis_name)
    return _by_path(leaves, jax.lax.all_gather(vary_over(bad, axes), axes, axis=1, to="invarying"))


def _by_path(leaves: list[tuple[str, Any]], flags: jax.Array) -> dict[str, jax.Array]:
    """Names the rows of an array; leaves whose paths read alike share one."""
    named: dict[str, jax.Array] = {}
    for (path, _), row in zip(leaves, flags, strict=True):
        named[path] = named[path] | row if path in named else row
    return named
