"""One verdict per step: may these gradients reach the parameters?

After unscaling, every element must be smaller than the magnitude at which the sum of all squares could overflow. So the
verdict is False for NaN or infinity, for an overflow in the unscaling, and for gradients whose global norm may
overflow, because clipping by that norm would silently turn the step into zeros. With 10**8 float32 parameters the limit
is about 10**15. It is also False for a scale out of range, which only an outside edit can produce.

The test is elementwise: a sum would round, and XLA on CPU loses NaN in a max of floats. XLA fuses the test with the
read of the gradients.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import leaves_are_local, varying_axes
from jmp_lite._dtypes import FLOAT32, at_least_float32
from jmp_lite._tree import agree, cast_to_at_least_float32, cast_to_full, is_inexact, mapped_axes, select_tree
from jmp_lite.errors import MissingAxisError
from jmp_lite.scaling._loss_scale import LARGEST_SCALE, SMALLEST_SCALE, LossScale

T = TypeVar("T")

#: Leaves up to this many elements are checked together on accelerators: one kernel instead of one each.
SMALL_LEAF = 1 << 16
#: Parts into which small leaves that were concatenated are folded, so that they are not written out.
PARTS = 32
#: Leaves that a kernel checks together at most: small ones, and larger ones of one size. On TPU, more small ones would
#: be copied first, and the check of a large one alone shares a read with its update.
TOGETHER_ON_TPU, TOGETHER_ON_GPU = (16, 1), (1024, 32)


def unscale(grads: T, loss_scale: LossScale) -> T:
    """Divides scaled gradients by the scale of this step, in float32 or wider."""
    return cast_to_full(loss_scale.unscale(grads))


def _bound(scale: jax.Array, dtype: Any, elements: int) -> jax.Array:
    """Returns the scaled magnitude below which the squares of so many unscaled elements can be added up."""
    wide = jnp.finfo(at_least_float32(dtype))  # type: ignore[no-untyped-call]
    return scale.astype(wide.dtype) * (math.sqrt(float(wide.max)) / math.sqrt(2 * elements))


def _is_below(leaf: jax.Array, bound: jax.Array) -> jax.Array:
    return jnp.abs(cast_to_at_least_float32(leaf)) < bound


def _grouped(leaves: list[jax.Array], key: Callable[[jax.Array], Any], most: int) -> list[list[jax.Array]]:
    """Groups leaves of one key, at most so many in a group."""
    groups: dict[Any, list[jax.Array]] = {}
    for x in leaves:
        groups.setdefault(key(x), []).append(x)
    return [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]


def _all_as_bytes(elementwise: jax.Array) -> jax.Array:
    """``jnp.all``, in a form that XLA on CPU reduces many elements at a time."""
    return elementwise.astype(jnp.int8).min(initial=1) > 0


@functools.partial(jax.jit, static_argnames="holds")
def _are_below(leaves: list[jax.Array], bound: jax.Array, holds: Callable[..., jax.Array]) -> jax.Array:
    """Checks leaves of one size in one kernel; traced once for all groups of the same shapes."""
    return holds(all_of([_is_below(x.reshape(leaves[0].shape), bound) for x in leaves]))


@jax.jit
def _are_small_below(leaves: list[jax.Array], bound: jax.Array) -> jax.Array:
    """Checks leaves of one dtype in one kernel."""
    flat = jnp.concatenate([x.ravel() for x in leaves])
    parts = PARTS if flat.size >= PARTS else 1
    whole, rest = jnp.split(flat, [flat.size // parts * parts])
    below = all_of([_is_below(part, bound) for part in jnp.split(whole, parts)])
    return all_of([below.all(), _is_below(rest, bound).all()])


def judge(grads: Any, loss_scale: LossScale, axis_name: Any) -> jax.Array:
    """Returns ``bool[]``: whether a step may be taken, the same on every device along ``axis_name``."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(grads) if is_inexact(x)]
    scale = jnp.asarray(loss_scale.loss_scale, jnp.float32)
    replicas = 1 if axis_name is None else jax.lax.axis_size(mapped_axes(axis_name))
    elements = max(1, replicas * sum(x.size for x in leaves))
    bounds = {dtype: _bound(scale, dtype, elements) for dtype in dict.fromkeys(x.dtype for x in leaves)}
    one_by_one = [[x] for x in leaves]

    def each(groups: list[list[jax.Array]], holds: Callable[..., jax.Array] = jnp.all) -> list[jax.Array]:
        return [_are_below(group, bounds[group[0].dtype], holds=holds) for group in groups]

    def on_cpu() -> jax.Array:
        return all_of(each(one_by_one, _all_as_bytes))

    def in_few_kernels(most_small: int, most_large: int) -> jax.Array:
        small = _grouped([x for x in leaves if x.size <= SMALL_LEAF], lambda x: x.dtype, most_small)
        large = _grouped([x for x in leaves if x.size > SMALL_LEAF], lambda x: (x.size, x.dtype), most_large)
        return all_of([*each(large), *(_are_small_below(group, bounds[group[0].dtype]) for group in small)])

    on_tpu, on_gpu = (functools.partial(in_few_kernels, *most) for most in (TOGETHER_ON_TPU, TOGETHER_ON_GPU))
    # Parts of sharded leaves would have to move, and eager calls would compile the choice each time.
    choose = leaves_are_local() and any(isinstance(x, jax.core.Tracer) for x in leaves)
    below = jax.lax.platform_dependent(cpu=on_cpu, tpu=on_tpu, default=on_gpu) if choose else all_of(each(one_by_one))
    usable = (scale >= np.float32(SMALLEST_SCALE)) & (scale <= np.float32(LARGEST_SCALE))
    verdict = agree(below & usable, axis_name)
    refuse_forgotten_axes(verdict, scale, "skip a step", "loss_scaled(inner, axis_name={})")
    return verdict


def refuse_forgotten_axes(verdict: jax.Array, scale: Any, decision: str, remedy: str) -> None:
    """Raises if devices with one loss scale could come to different verdicts.

    Args:
        verdict: ``bool[]``, which varies over the mesh axes along which devices have different ones.
        scale: Of the loss; members of an ensemble that have their own decide for themselves.
        decision: What is decided.
        remedy: What to write, with a place for the axes.
    """
    forgotten = varying_axes(verdict) - varying_axes(jnp.asarray(scale))
    if forgotten:
        names = tuple(sorted(forgotten))
        raise MissingAxisError(
            f"Devices along {' and '.join(map(repr, names))} see different gradients, and could decide differently "
            f"whether to {decision}. Write {remedy.format(repr(names[0] if len(names) == 1 else names))}."
        )


def watched(updates: list[tuple[Any, jax.Array]]) -> jax.Array:
    """Returns ``bool[]``: whether updates are finite, as far as it can tell without another pass over memory.

    With 16-bit leaves an optimizer may turn finite gradients into infinities in single leaves, so all elements are
    checked. Float32 leaves become non-finite together, when a hyperparameter does, so one element of the smallest leaf
    represents them, if that leaf has at most ``SMALL_LEAF``.

    Args:
        updates: The dtype of each leaf, and whether each element is finite.
    """
    narrow = [is_finite for dtype, is_finite in updates if dtype.itemsize < FLOAT32.itemsize]
    wide = [is_finite for dtype, is_finite in updates if dtype.itemsize >= FLOAT32.itemsize]
    small = sorted((leaf for leaf in wide if 0 < leaf.size <= SMALL_LEAF), key=lambda leaf: leaf.size)
    return all_of([*map(jnp.all, narrow), *map(_one_element, small[:1])])


def _one_element(leaf: jax.Array) -> jax.Array:
    """One element, or all where that one may be on another device."""
    return leaf[(0,) * leaf.ndim] if leaves_are_local() else leaf.all()


def all_of(verdicts: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.and_, verdicts, jnp.array(True))


def step_or_skip(
    take: jax.Array,
    step: Callable[[], tuple[T, jax.Array]],
    skip: Callable[[], T],
    axis_name: Any,
    *,
    is_stored: bool = False,
) -> tuple[T, jax.Array]:
    """Returns ``step()`` where the verdict is True, else ``skip()`` and True.

    On CPU this is a ``lax.cond``, which saves the work of a skipped step and the copies of a select. Elsewhere both are
    computed and selected: a GPU would wait for the host to read the predicate, and XLA fuses the select into the
    update. On TPU it does not where state is decoded and encoded.

    Args:
        take: ``bool[]``.
        step: Computes the new values, and whether they are good.
        skip: Returns the old values, of the same structure, shapes and dtypes.
        axis_name: Mapped axes over which devices agree whether values are good.
        is_stored: Whether ``step`` decodes and encodes its state; see ``optim.stored``.
    """
    if not isinstance(take, jax.core.Tracer):
        return step() if take else (skip(), jnp.array(True))
    once = jax.jit(step)  # so that the second platform finds its trace

    def skipped() -> tuple[T, jax.Array]:
        _, good = jax.eval_shape(once)
        return skip(), jnp.ones_like(good)  # varies over the mesh axes that ``good`` varies over

    def branch() -> Any:
        return jax.lax.cond(take, once, skipped)

    on_tpu = {"tpu": branch} if is_stored else {}
    both = jax.lax.platform_dependent(cpu=branch, **on_tpu, default=lambda: select_tree(take, once(), skipped()))
    taken: T = both[0]
    return taken, agree(both[1], axis_name)
