"""Gradients accumulated over microbatches, under one loss scale."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._functions import check_function, refuse_modules
from jmp_lite._messages import quote
from jmp_lite._tree import (
    cast_to_at_least_float32,
    is_array,
    is_inexact,
    path_string,
    select_tree,
)
from jmp_lite.distributed._shardings import axes_of
from jmp_lite.errors import InvalidMicrobatchError
from jmp_lite.scaling._grad import are_finite, differentiate, positions_among
from jmp_lite.scaling._in_state import find_loss_scale
from jmp_lite.scaling._loss_scale import LossScale

SKIP_WINDOW, SKIP_MICROBATCH = "skip_window", "skip_microbatch"


def checked_number(parts: Any, on_nonfinite: Any) -> int:
    """Returns how many microbatches there are, once both settings are checked."""
    if not isinstance(parts, (int, np.integer)) or isinstance(parts, bool) or parts < 1:
        raise InvalidMicrobatchError(
            f"num_microbatches must be a whole number, at least 1, got {parts!r}. It is part of the program and not "
            "data."
        )
    if on_nonfinite not in (SKIP_WINDOW, SKIP_MICROBATCH):
        raise InvalidMicrobatchError(
            f"on_nonfinite must be 'skip_window' or 'skip_microbatch', got {on_nonfinite!r}. The first skips a whole "
            "window for one bad microbatch, the second leaves the bad one out of the mean."
        )
    return int(parts)


def batch_positions(args: tuple[Any, ...], differentiated: tuple[int, ...], batch_argnums: Any) -> tuple[int, ...]:
    """Returns which positional arguments are split: those named, or all that are not differentiated."""
    if batch_argnums is None:
        return tuple(i for i in range(len(args)) if i not in differentiated)
    positions = positions_among(args, batch_argnums, "batch_argnums")
    shared = sorted(set(positions) & set(differentiated))
    if shared:
        raise InvalidMicrobatchError(
            f"batch_argnums={batch_argnums} names argument {shared[0]}, which argnums differentiates. An argument is "
            "either split or differentiated: leave it out of one of the two."
        )
    return positions


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _shards(array: Any) -> int:
    """Returns into how many parts the type of an array splits its leading axis: one, but for explicit mesh axes."""
    sharding = jax.typeof(array).sharding
    return math.prod(sharding.mesh.shape[name] for name in axes_of(sharding.spec[:1]))


def _check_leaves(named: list[tuple[str, Any]], parts: int) -> None:
    """Raises for the first leaf that cannot be split like the others."""
    if not named:
        raise InvalidMicrobatchError(
            f"No array to split into num_microbatches={parts}: keyword arguments, and positional ones outside of "
            "batch_argnums, are the same for each. Pass the batch as a positional argument."
        )
    for where, leaf in named:
        if not is_array(leaf) or leaf.ndim == 0:
            raise InvalidMicrobatchError(
                f"{where} is {quote(leaf)}, which has no leading axis to split. Leave its argument out of "
                "batch_argnums, so that every microbatch gets the same; or pass a value per row; or, for a PRNG key, "
                f"jax.random.split(key, {parts}), of which each microbatch gets one as key[0]."
            )
        rows = leaf.shape[0] // _shards(leaf)
        if not rows:
            raise InvalidMicrobatchError(
                f"{where} is {quote(leaf)}, which has no rows to split into num_microbatches={parts}. Leave empty "
                "batches out."
            )
        if rows % parts:
            possible = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
            whose = "rows" if rows == leaf.shape[0] else "rows on each device"
            remedy = f"Drop {rows % parts} of them, or take" if rows > parts else "Take"
            raise InvalidMicrobatchError(
                f"{where} is {quote(leaf)}: {rows} {whose} do not divide into num_microbatches={parts}. {remedy} "
                f"num_microbatches from {possible}."
            )
    # Only keys may be one per microbatch: a label that is shared by several rows would broadcast in silence.
    bound = [(where, x) for where, x in named if not (_is_key(x) and x.shape[0] == parts)]
    for where, leaf in bound[1:]:
        first, rows = bound[0][0], bound[0][1].shape[0]
        if leaf.shape[0] != rows:
            raise InvalidMicrobatchError(
                f"{where} is {quote(leaf)}, but {first} has {rows} rows. All arrays of the batch need the same "
                "leading axis; leave arguments that are not part of the batch out of batch_argnums."
            )


def splitter(args: tuple[Any, ...], positions: tuple[int, ...], parts: int) -> Callable[[Any], tuple[Any, ...]]:
    """Returns the function from the number of a microbatch to the arguments with only its rows.

    The rows stand in a second axis, so that those of one device, which are contiguous, stay on it; it is indexed in
    the loop, because moving it to the front would copy the batch.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path([args[i] for i in positions])
    named = []
    for (index, *rest), leaf in paths:
        inside = f", leaf {path_string(tuple(rest))!r}" if rest else ""
        named.append((f"Argument {positions[index.idx]}{inside}", leaf))
    _check_leaves(named, parts)
    arrays = [jnp.asarray(leaf) for _, leaf in named]
    folded = [x.reshape(x.shape[0] // parts, parts, *x.shape[1:]) for x in arrays]

    def microbatch(number: Any) -> tuple[Any, ...]:
        rows = [jax.lax.dynamic_index_in_dim(x, number, axis=1, keepdims=False) for x in folded]
        chosen = list(args)
        for position, value in zip(positions, jax.tree.unflatten(treedef, rows), strict=True):
            chosen[position] = value
        return tuple(chosen)

    return microbatch


def _zeros(leaf: Any) -> jax.Array:
    """Returns the sum of no gradients of a leaf, in float32 or wider."""
    return jnp.zeros_like(leaf, dtype=jax.eval_shape(cast_to_at_least_float32, leaf).dtype)


def _mean(total: jax.Array, count: Any) -> jax.Array:
    """Divides a sum by how many terms it has; the mean of none is NaN.

    A product, because XLA turns division by a constant into one, and a traced count must give the same bits.
    """
    number = jnp.asarray(count, total.real.dtype)
    weight = jnp.where(number > 0, 1 / jnp.maximum(number, jnp.ones_like(number)), jnp.full_like(number, jnp.nan))
    is_complex = jnp.issubdtype(total.dtype, jnp.complexfloating)
    return jax.lax.complex(total.real * weight, total.imag * weight) if is_complex else total * weight


def verdict(grads: list[jax.Array], scale: LossScale, axis_name: Any) -> jax.Array:
    """Returns ``bool[]``: whether a microbatch counts."""
    return are_finite(grads, scale, axis_name, "leave a microbatch out", "accumulate_gradients")


def over_microbatches(
    one: Callable[[Any, Any], tuple[Any, list[jax.Array], Any]],
    carry: Any,
    like: list[Any],
    parts: int,
    leave_out: bool,
) -> tuple[Any, list[jax.Array], jax.Array, Any, jax.Array]:
    """Runs over microbatches, and takes the mean of their gradients and losses.

    Args:
        one: From a carry and the number of a microbatch to the next carry, gradients, and loss, auxiliary output and
            whether the gradients are finite.
        carry: What the first microbatch is given.
        like: Arrays of the shapes and dtypes of the gradients.
        parts: How many microbatches there are.
        leave_out: Whether those that are not finite are left out, their carries too.

    Returns:
        The last carry, gradients, loss, all auxiliary outputs, and how many microbatches were left out.
    """

    def add(carried: tuple[Any, list[jax.Array]], number: Any) -> tuple[tuple[Any, list[jax.Array]], Any]:
        carry, total = carried
        new_carry, grads, outputs = one(carry, number)
        summed = [old + cast_to_at_least_float32(new) for old, new in zip(total, grads, strict=True)]
        after = new_carry, summed
        return select_tree(outputs[2], after, carried) if leave_out else after, outputs

    start = carry, [_zeros(leaf) for leaf in like]
    if parts == 1:
        (carry, total), outputs = add(start, 0)
        losses, aux, finite = jax.tree.map(lambda x: jnp.asarray(x)[None], outputs)
    else:
        (carry, total), (losses, aux, finite) = jax.lax.scan(add, start, jnp.arange(parts, dtype=jnp.int32))
    count = finite.sum(dtype=jnp.int32) if leave_out else parts
    counted = jnp.where(finite, losses, jnp.zeros_like(losses)) if leave_out else losses
    skipped = jnp.int32(parts) - count
    return carry, [_mean(leaf, count) for leaf in total], _mean(counted.sum(), count), aux, skipped


def accumulate_gradients(
    fun: Callable[..., Any],
    num_microbatches: int,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    loss_scale: Any = None,
    batch_argnums: int | Sequence[int] | None = None,
    on_nonfinite: str = SKIP_WINDOW,
    axis_name: Any = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Like ``scaled_value_and_grad``, over microbatches: the memory of one microbatch, the mean over all.

    One ``lax.scan`` runs over the microbatches, all with the same loss scale, and sums their gradients in float32. Only
    that sum, as large as the float32 parameters, stays in memory between them. ``fun`` is traced once; call the result
    under ``jit``, because each eager call compiles the scan again. If ``fun`` returns a mean over its rows, the result
    is the gradient of the mean over the whole batch.

    Microbatch ``i`` holds the rows ``i, i + n, i + 2 * n, ...`` for ``n`` microbatches. If ``jit`` shards the batch
    over devices, each device uses only its rows in every microbatch and none travel, as long as ``n`` divides the
    number of rows per device; contiguous microbatches would need a gather first. In ``pmap`` and ``shard_map`` a device
    splits its own rows: reduce the gradients once, after the window. (With the ``check_vma`` of ``shard_map``, mark
    parameters as varying first, or JAX sums their gradients in every microbatch.)

    Args:
        fun: Returns the mean loss of its rows: a real floating-point scalar, or ``(scalar, aux)``.
        num_microbatches: How many microbatches to split the batch into.
        argnums: Which positional arguments to differentiate.
        has_aux: Whether ``fun`` returns auxiliary output, a tree of arrays.
        batch_argnums: Which positional arguments to split, along the leading axis of all their arrays; the default is
            all that are not differentiated. The others, and keyword arguments, are the same for each microbatch. To
            give each a PRNG key, pass ``jax.random.split(key, num_microbatches)``; ``fun`` finds its key at ``key[0]``.
        on_nonfinite: ``"skip_window"``: NaN or infinity in the gradients of one microbatch makes the result non-finite,
            so ``loss_scaled`` skips the step and lowers the scale. ``"skip_microbatch"``: loss and gradients are the
            mean over the other microbatches, NaN if none are left; the number of skipped microbatches is a third
            result.
        loss_scale: As for ``scaled_value_and_grad``.
        axis_name: Mapped axes whose replicas must leave out the same microbatches; only used with
            ``"skip_microbatch"``, and needed there unless gradients are the same on all.
        name: A path segment of the loss scale to use, if the state holds several.

    Returns:
        A function with exactly the signature of ``fun``, as ``scaled_value_and_grad`` returns it. Its results are
        ``(loss, grads)`` or ``((loss, aux), grads)``, with ``"skip_microbatch"`` followed by ``skipped: int32[]``.
        ``loss`` is the mean of the true losses, ``float32[]`` (``float64[]`` if ``fun`` returns that); ``grads`` are
        still scaled, in float32 or wider; ``aux`` has a leading axis of ``num_microbatches``.

    Raises:
        InvalidMicrobatchError: If a setting is invalid, or the batch cannot be split this way.
        InvalidFunctionError: If ``fun`` is not a function or does not return what it should, or an argument is an NNX
            module.
        LossScaleNotFoundError: If ``loss_scale`` holds none, or several and no name is given.
        MissingAxisError: If devices of a ``shard_map`` could leave out different microbatches, and ``axis_name`` is
            missing.

    Example:
        >>> def loss_fn(params, x):
        ...     return jnp.mean((params["w"] * x) ** 2)
        >>> params, x = {"w": jnp.float16(2.0)}, jnp.arange(8, dtype=jnp.float16)
        >>> loss, grads = jmp.accumulate_gradients(loss_fn, 4, loss_scale=jmp.StaticLossScale(128.0))(params, x)
        >>> print(loss, grads["w"] / 128, grads["w"].dtype)
        70.0 70.0 float32

    References:
        Gradient accumulation in torch.amp's examples and ``optax.MultiSteps``; Megatron-LM and DeepSpeed also skip
        whole windows.
    """
    num_microbatches = checked_number(num_microbatches, on_nonfinite)
    check_function(fun, "accumulate_gradients")
    _, scale = find_loss_scale(loss_scale, name)
    leave_out = on_nonfinite == SKIP_MICROBATCH

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        refuse_modules(fun, args, kwargs, "accumulate_gradients")
        positions = positions_among(args, argnums)
        microbatch = splitter(args, batch_positions(args, positions, batch_argnums), num_microbatches)
        bound = functools.partial(fun, **kwargs)

        def one(carry: None, number: Any) -> tuple[None, list[jax.Array], Any]:
            gradient, _ = differentiate(bound, has_aux, microbatch(number), positions)
            loss, aux, grads = gradient(scale)
            return carry, grads, (loss, aux, verdict(grads, scale, axis_name) if leave_out else None)

        _, assemble = differentiate(bound, has_aux, args, positions)
        inexact = [leaf for leaf in jax.tree.leaves([args[i] for i in positions]) if is_inexact(leaf)]
        _, total, loss, aux, skipped = over_microbatches(one, None, inexact, num_microbatches, leave_out)
        trees = assemble(total)
        grads = trees if isinstance(argnums, Sequence) else trees[0]
        value = (loss, aux) if has_aux else loss
        return (value, grads, skipped) if leave_out else (value, grads)

    return wrapped
