"""One verdict per step: may these gradients reach the parameters?

Every element must, after unscaling, be smaller than the magnitude at which the sum of the squares of all of them could
overflow. So the verdict is False for a NaN or an infinity, for an overflow in the unscaling, and for gradients whose
global norm may overflow, because a clip by that norm would silently turn the step into zeros. With 10**8 float32
parameters the limit is about 10**15. It is also False for a scale out of range, which only an outside edit can produce.

The test is element by element, never a sum or a maximum: it rounds nothing, XLA fuses it with the read of the gradients
on every backend, and ``max`` cannot be used, because XLA on CPU loses NaN in the maximum of a large array.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import leaves_are_local
from jmp_lite._tree import agree, cast_to_at_least_float32, cast_to_full, is_inexact, select_tree
from jmp_lite.scaling._loss_scale import LARGEST_SCALE, SMALLEST_SCALE, LossScale

T = TypeVar("T")

#: Leaves up to this many elements are checked together on a GPU: one kernel instead of one each.
SMALL_LEAF = 1 << 16
#: Parts into which a leaf is folded before it is reduced, where that saves writing out a boolean for each element.
CPU_PARTS, GPU_PARTS = 8, 32


def unscale(grads: T, loss_scale: LossScale) -> T:
    """Divides scaled gradients by the scale of this step, in float32 or wider."""
    return cast_to_full(loss_scale.unscale(grads))


def _below_limit(leaf: jax.Array, scale: jax.Array, elements: int) -> jax.Array:
    """Returns, for each element of a leaf, whether its unscaled magnitude leaves room for ``elements`` squares."""
    wide = cast_to_at_least_float32(leaf)
    largest = float(jnp.finfo(wide.dtype).max)  # type: ignore[no-untyped-call]
    limit = math.sqrt(largest) / math.sqrt(2 * elements)
    return jnp.abs(wide * (1 / scale).astype(wide.dtype)) < limit


def _folded_all(leaf: jax.Array, test: Callable[[jax.Array], jax.Array], parts: int) -> jax.Array:
    """Returns ``test(leaf).all()``, and-ing the parts of the leaf element by element first."""
    flat, length = leaf.ravel(), leaf.size // parts
    if length == 0:
        return test(flat).all()
    folded = functools.reduce(operator.and_, [test(flat[i * length : (i + 1) * length]) for i in range(parts)])
    return folded.all() & test(flat[parts * length :]).all()


def _bucketed(leaves: list[jax.Array]) -> list[jax.Array]:
    """Concatenates the small leaves of each dtype."""
    small = [x for x in leaves if x.size <= SMALL_LEAF]
    dtypes = dict.fromkeys(x.dtype for x in small)
    buckets = [jnp.concatenate([x.ravel() for x in small if x.dtype == dtype]) for dtype in dtypes]
    return [x for x in leaves if x.size > SMALL_LEAF] + buckets


def judge(grads: Any, loss_scale: LossScale, axis_name: Any) -> jax.Array:
    """Returns ``bool[]``: whether a step may be taken, the same on every device along ``axis_name``."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(grads) if is_inexact(x)]
    scale = jnp.asarray(loss_scale.loss_scale, jnp.float32)
    replicas = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    test = functools.partial(_below_limit, scale=scale, elements=max(1, replicas * sum(x.size for x in leaves)))

    def folded(leaves: list[jax.Array], parts: int) -> jax.Array:
        return functools.reduce(operator.and_, [_folded_all(x, test, parts) for x in leaves], jnp.array(True))

    def plain() -> jax.Array:
        return functools.reduce(operator.and_, [test(x).all() for x in leaves], jnp.array(True))

    def on_gpu() -> jax.Array:
        return folded(_bucketed(leaves), GPU_PARTS)

    # Parts of sharded leaves would have to move, and eager calls would compile the choice each time.
    choose = leaves_are_local() and any(isinstance(x, jax.core.Tracer) for x in leaves)
    below = (
        jax.lax.platform_dependent(cpu=lambda: folded(leaves, CPU_PARTS), cuda=on_gpu, rocm=on_gpu, default=plain)
        if choose
        else plain()
    )
    usable = (scale >= np.float32(SMALLEST_SCALE)) & (scale <= np.float32(LARGEST_SCALE))
    return agree(below & usable, axis_name)


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
    if not isinstance(take, jax.core.Tracer):
        return step() if take else skip()
    taken: T = jax.lax.platform_dependent(
        cpu=lambda: jax.lax.cond(take, step, skip), default=lambda: select_tree(take, step(), skip())
    )
    return taken
