"""One verdict per step: may these gradients reach the parameters?

The verdict is taken on the unscaled gradients, through the sum of their squares. It is False if any value is NaN or
infinite before or after unscaling, and also if the global norm overflows float32, because a clip by that norm would
silently turn the step into zeros. A scale that is zero, infinite or NaN (which only an outside edit can produce) fails
it too.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jmp_lite._compat import leaves_are_local
from jmp_lite._loss_scale import LossScale
from jmp_lite._tree import agree, cast_to_at_least_float32, cast_to_full, is_inexact, select_tree

T = TypeVar("T")

#: Leaves up to this many elements are checked together: one kernel instead of one each.
SMALL_LEAF = 1 << 16


def unscale(grads: T, loss_scale: LossScale) -> T:
    """Divides scaled gradients by the scale of this step, in float32 or wider."""
    return cast_to_full(loss_scale.unscale(grads))


def _squares(leaf: jax.Array) -> jax.Array:
    return jnp.real(leaf * jnp.conj(leaf)) if jnp.iscomplexobj(leaf) else jnp.square(leaf)


def _bucketed(squares: list[jax.Array]) -> list[jax.Array]:
    """Concatenates the small float32 leaves, if all are local: sharded ones would have to move."""
    small = [x for x in squares if x.size <= SMALL_LEAF and x.dtype == jnp.float32]
    if len(small) < 2 or not leaves_are_local():
        return squares
    return [x for x in squares if not any(x is y for y in small)] + [jnp.concatenate([x.ravel() for x in small])]


def judge(grads: Any, loss_scale: LossScale, axis_name: Any) -> jax.Array:
    """Returns ``bool[]``: whether a step may be taken, the same on every device along ``axis_name``."""
    leaves = [cast_to_at_least_float32(x) for x in jax.tree.leaves(grads) if is_inexact(x)]
    sums = [jnp.sum(x) for x in _bucketed([_squares(x) for x in unscale(leaves, loss_scale)])]
    widest = jnp.result_type(jnp.float32, *(x.dtype for x in sums))
    total = sum((x.astype(widest) for x in sums), jnp.zeros((), widest))
    scale = jnp.asarray(loss_scale.loss_scale, jnp.float32)
    return agree(jnp.isfinite(total) & jnp.isfinite(scale) & (scale > 0), axis_name)


def step_or_skip(take: jax.Array, step: Callable[[], T], skip: Callable[[], T]) -> T:
    """Returns ``step()`` where the verdict is True, else ``skip()``.

    On CPU this is a ``lax.cond``, which saves the work of a skipped step and the copies of a select. Elsewhere both are
    computed and selected: a GPU would wait for the host to read the predicate, and XLA fuses the select into the
    update.

    Args:
        take: ``bool[]``.
        step: Computes the new values.
        skip: Returns the old values, of the same structure, shapes and dtypes.
    """
    taken: T = jax.lax.platform_dependent(
        cpu=lambda: jax.lax.cond(take, step, skip), default=lambda: select_tree(take, step(), skip())
    )
    return taken
