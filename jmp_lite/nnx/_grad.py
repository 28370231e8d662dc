"""Gradients of a scaled loss for functions of NNX modules, whose state updates survive."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from jmp_lite._functions import check_function
from jmp_lite._tree import all_finite, combine, is_inexact, partition
from jmp_lite.errors import InvalidFunctionError
from jmp_lite.nnx._modules import is_leaf, is_node
from jmp_lite.scaling import _accumulate
from jmp_lite.scaling._grad import checked_loss, positions_among
from jmp_lite.scaling._in_state import find_loss_scale

#: Which positional arguments to differentiate, as ``nnx.value_and_grad`` takes them.
Argnums = int | nnx.DiffState | Sequence[int | nnx.DiffState]


def scaled_value_and_grad(
    fn: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    loss_scale: Any,
    name: str | None = None,
) -> Callable[..., Any]:
    """Like ``nnx.value_and_grad``, for the loss times the current loss scale.

    Whatever the function does to its modules stays: running statistics, random counts, caches. The value is the true
    loss, unscaled and in float32; the gradients are still scaled, in the form that ``optimizer.update(model, grads)``
    takes.

    Args:
        fn: A function of modules and any other arguments. Returns a real floating-point scalar, or ``(scalar, aux)``
            with ``has_aux``.
        argnums: Which positional arguments to differentiate: of modules the ``nnx.Param`` variables, or those that an
            ``nnx.DiffState`` chooses.
        has_aux: Whether ``fn`` returns auxiliary output.
        loss_scale: A loss scale or anything that holds one, such as an ``nnx.Optimizer`` around ``loss_scaled``.
        name: Segment of the path of the loss scale wanted, if there are several.

    Returns:
        A function with the signature of ``fn``. It returns ``(loss, grads)`` or ``((loss, aux), grads)``.

    Raises:
        InvalidFunctionError: If ``fn`` is no function, or does not return what it should.
        LossScaleNotFoundError: If ``loss_scale`` holds none, or several and no name is given.

    Example:
        >>> from flax import nnx
        >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, jmp.loss_scaled(optax.sgd(0.1)), wrt=nnx.Param)
        >>> def loss_fn(model, x):
        ...     return jnp.mean(model(x) ** 2)
        >>> loss, grads = jmp.nnx.scaled_value_and_grad(loss_fn, loss_scale=optimizer)(model, jnp.eye(2))
        >>> _ = optimizer.update(model, grads)
        >>> print(loss, model.mean[...])
        0.99996 [0.005 0.005]

    References:
        ``nnx.value_and_grad`` (flax.readthedocs.io); ``jmp_lite.scaled_value_and_grad``.
    """
    check_function(fn, "nnx.scaled_value_and_grad")
    _, scale = find_loss_scale(loss_scale, name)

    @functools.wraps(fn)
    def scaled(*args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        loss, aux = checked_loss(fn(*args, **kwargs), has_aux)
        return scale.scale(loss), (loss, aux)

    value_and_grad = nnx.value_and_grad(scaled, argnums=argnums, has_aux=True)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        (_, (loss, aux)), grads = value_and_grad(*args, **kwargs)
        return (loss, aux) if has_aux else loss, grads

    return wrapped


def accumulate_gradients(
    fn: Callable[..., Any],
    num_microbatches: int,
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    loss_scale: Any,
    batch_argnums: int | Sequence[int] | None = None,
    on_nonfinite: str = _accumulate.SKIP_WINDOW,
    axis_name: Any = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Like ``jmp_lite.accumulate_gradients``, for functions of NNX modules.

    The state of the modules goes from microbatch to microbatch: statistics move and random counts advance once for
    each. With ``"skip_microbatch"`` what a microbatch that is left out did to them is undone.

    Args:
        fn: As for ``nnx.scaled_value_and_grad``; returns the mean loss of the rows that it is given.
        num_microbatches: How many microbatches to split the batch into.
        argnums: As for ``nnx.scaled_value_and_grad``.
        has_aux: Whether ``fn`` returns auxiliary output, a tree of arrays.
        loss_scale: As for ``nnx.scaled_value_and_grad``.
        batch_argnums: Which positional arguments to split; the default is all that hold no modules and are not
            differentiated.
        on_nonfinite: As for ``jmp_lite.accumulate_gradients``.
        axis_name: As for ``jmp_lite.accumulate_gradients``.
        name: Segment of the path of the loss scale wanted, if there are several.

    Returns:
        A function with the signature of ``fn`` that returns what ``jmp_lite.accumulate_gradients`` does; the gradients
        are in the form that ``optimizer.update(model, grads)`` takes.

    Raises:
        InvalidMicrobatchError: If a setting means nothing, or the batch cannot be split so.
        InvalidFunctionError: If ``fn`` does not return what it should, adds variables to a module, or takes some away,
            which a loop cannot carry.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        >>> def loss_fn(w, model, x):
        ...     return jnp.mean(model(w * x))
        >>> w, x, scale = jnp.float32(1), jnp.ones((8, 4)), jmp.StaticLossScale(2.0)
        >>> loss, grads = jmp.nnx.accumulate_gradients(loss_fn, 4, loss_scale=scale)(w, model, x)
        >>> bool(loss == grads / 2), model.rngs.count[...].item()
        (True, 4)

    References:
        ``jmp_lite.accumulate_gradients``.
    """
    _accumulate.check_settings(num_microbatches, on_nonfinite)
    value_and_grad = scaled_value_and_grad(fn, argnums, has_aux, loss_scale=loss_scale, name=name)
    _, scale = find_loss_scale(loss_scale, name)
    leave_out = on_nonfinite == _accumulate.SKIP_MICROBATCH

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        chosen = argnums if isinstance(argnums, Sequence) else (argnums,)
        differentiated = positions_among(args, [_position(argnum) for argnum in chosen])
        with_modules = {i for i, arg in enumerate(args) if any(map(is_node, jax.tree.leaves(arg, is_leaf=is_leaf)))}
        apart = tuple({*differentiated, *with_modules})
        split = _accumulate.batch_positions(args, apart, batch_argnums)
        microbatch = _accumulate.splitter(args, split, num_microbatches)
        nodes, _, _ = partition((args, kwargs), is_node, is_leaf)
        graphdef, state = nnx.split(nodes)
        treedefs: list[Any] = []

        def one(state: Any, number: Any) -> tuple[Any, list[jax.Array], Any]:
            copies = nnx.merge(graphdef, state, copy=True)
            _, others, layout = partition((microbatch(number), kwargs), is_node, is_leaf)
            own_args, own_kwargs = combine(copies, others, layout)
            value, grads = value_and_grad(*own_args, **own_kwargs)
            loss, aux = value if has_aux else (value, None)
            leaves, treedef = jax.tree.flatten(grads)
            treedefs.append(treedef)
            new_graphdef, new_state = nnx.split(copies)
            _check_unchanged(graphdef, new_graphdef, fn)
            finite = all_finite(scale.unscale(leaves), axis_name=axis_name) if leave_out else None
            return new_state, leaves, (loss, aux, finite)

        wrt = [_differentiated(args[i], argnum) for i, argnum in zip(differentiated, chosen, strict=True)]
        like = [leaf for leaf in jax.tree.leaves(wrt) if is_inexact(leaf)]
        state, total, loss, aux, skipped = _accumulate.over_microbatches(one, state, like, num_microbatches, leave_out)
        nnx.update(nodes, state)
        value = (loss, aux) if has_aux else loss
        grads = jax.tree.unflatten(treedefs[-1], total)
        return (value, grads, skipped) if leave_out else (value, grads)

    return wrapped


def _position(argnum: int | nnx.DiffState) -> int:
    return argnum.argnum if isinstance(argnum, nnx.DiffState) else argnum


def _differentiated(argument: Any, argnum: int | nnx.DiffState) -> Any:
    """Returns the part of an argument that is differentiated."""
    if not isinstance(argument, nnx.Pytree):
        return argument
    return nnx.state(argument, argnum.filter if isinstance(argnum, nnx.DiffState) else nnx.Param)


def _check_unchanged(before: Any, after: Any, fn: Callable[..., Any]) -> None:
    if before != after:
        name = getattr(fn, "__name__", repr(fn))
        raise InvalidFunctionError(
            f"{name} changed the structure of a module, which a loop over microbatches cannot carry. "
            "Call the model once before, so that all its variables exist."
        )
