"""Gradients of a scaled loss for functions of NNX modules, whose state updates survive."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jmp_lite._functions import check_function, without_captured_modules
from jmp_lite._tree import combine, partition
from jmp_lite.errors import InvalidFunctionError
from jmp_lite.nnx._modules import is_leaf, is_node, wraps
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
    loss_scale: Any = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Like ``nnx.value_and_grad``, for the loss times the current loss scale.

    Every change that the function makes to its modules survives: running statistics, random counts, caches. The value
    is the true loss, unscaled and in float32; the gradients are still scaled, in the form that
    ``optimizer.update(model, grads)`` takes. Call it inside the jitted step, with the step's optimizer: the scale of an
    optimizer from outside would become a constant.

    Args:
        fn: A function of modules and any other arguments. Returns a real floating-point scalar, or ``(scalar, aux)``
            with ``has_aux``.
        argnums: Which positional arguments to differentiate: in modules the ``nnx.Param`` variables, or those that an
            ``nnx.DiffState`` selects.
        has_aux: Whether ``fn`` returns auxiliary output.
        loss_scale: A loss scale or anything that holds one, such as an ``nnx.Optimizer`` around ``loss_scaled``.
        name: A path segment of the loss scale to use, if there are several.

    Returns:
        A function with the signature of ``fn``. It returns ``(loss, grads)`` or ``((loss, aux), grads)``.

    Raises:
        InvalidFunctionError: If ``fn`` is not a function, or does not return what it should.
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
    _check(fn, "nnx.scaled_value_and_grad")
    _, scale = find_loss_scale(loss_scale, name)

    def scaled(*args_and_kwargs: Any) -> tuple[jax.Array, Any]:
        *args, kwargs = args_and_kwargs
        with without_captured_modules():
            loss, aux = checked_loss(fn(*args, **kwargs), has_aux)
        return scale.scale(loss), (loss, aux)

    @wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value_and_grad = nnx.value_and_grad(scaled, argnums=_from_the_front(args, argnums), has_aux=True)
        (_, (loss, aux)), grads = value_and_grad(*args, kwargs)
        return (loss, aux) if has_aux else loss, grads

    return wrapped


def _check(fn: Callable[..., Any], caller: str) -> None:
    """Raises an error that names the caller if ``fn`` is not a function of modules."""
    check_function(fn, caller)
    whole = fn
    while isinstance(whole, functools.partial):
        whole = whole.func
    owner = whole if isinstance(whole, nnx.Module) else getattr(whole, "__self__", None)
    if isinstance(owner, nnx.Module):
        method = f"{type(owner).__name__}.{getattr(whole, '__name__', '__call__')}"
        raise InvalidFunctionError(
            f"{caller} takes a function of modules, got a method of one, {method}, whose parameters would have no "
            f"gradient. Give {method} and the module as its first argument."
        )


def _from_the_front(args: tuple[Any, ...], argnums: Argnums) -> Argnums:
    """Counts ``argnums`` from the front, and leaves filters unchanged."""
    chosen = argnums if isinstance(argnums, Sequence) else (argnums,)
    positions = positions_among(args, [_position(argnum) for argnum in chosen])
    counted = tuple(
        dataclasses.replace(argnum, argnum=i) if isinstance(argnum, nnx.DiffState) else i
        for argnum, i in zip(chosen, positions, strict=True)
    )
    return counted if isinstance(argnums, Sequence) else counted[0]


def accumulate_gradients(
    fn: Callable[..., Any],
    num_microbatches: int,
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    loss_scale: Any = None,
    batch_argnums: int | Sequence[int] | None = None,
    on_nonfinite: str = _accumulate.SKIP_WINDOW,
    axis_name: Any = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Like ``jmp_lite.accumulate_gradients``, for functions of NNX modules.

    Module state carries over from microbatch to microbatch: each one updates statistics and advances random counts.
    ``"skip_microbatch"`` undoes the changes of a skipped microbatch.

    Args:
        fn: As for ``nnx.scaled_value_and_grad``; returns the mean loss of its rows.
        num_microbatches: How many microbatches to split the batch into.
        argnums: As for ``nnx.scaled_value_and_grad``.
        has_aux: Whether ``fn`` returns auxiliary output, a tree of arrays.
        loss_scale: As for ``nnx.scaled_value_and_grad``.
        batch_argnums: Which positional arguments to split; the default is every non-differentiated argument without
            modules.
        on_nonfinite: As for ``jmp_lite.accumulate_gradients``.
        axis_name: As for ``jmp_lite.accumulate_gradients``.
        name: A path segment of the loss scale to use, if there are several.

    Returns:
        A function with the signature of ``fn`` that returns what ``jmp_lite.accumulate_gradients`` does; the gradients
        are in the form that ``optimizer.update(model, grads)`` takes.

    Raises:
        InvalidMicrobatchError: If a setting is invalid, or the batch cannot be split this way.
        InvalidFunctionError: If ``fn`` does not return what it should, or adds or removes variables of a module, which
            a loop cannot carry.

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
    _check(fn, "nnx.accumulate_gradients")
    num_microbatches = _accumulate.checked_number(num_microbatches, on_nonfinite)
    value_and_grad = scaled_value_and_grad(fn, argnums, has_aux, loss_scale=loss_scale, name=name)
    _, scale = find_loss_scale(loss_scale, name)
    leave_out = on_nonfinite == _accumulate.SKIP_MICROBATCH

    @wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        chosen = _from_the_front(args, argnums)
        differentiated = map(_position, chosen if isinstance(chosen, Sequence) else (chosen,))
        with_modules = [i for i, arg in enumerate(args) if any(map(is_node, jax.tree.leaves(arg, is_leaf=is_leaf)))]
        apart = (*differentiated, *with_modules)
        split = _accumulate.batch_positions(args, apart, batch_argnums)
        microbatch = _accumulate.splitter(args, split, num_microbatches)
        nodes, _, _ = partition((args, kwargs), is_node, is_leaf)
        split_nodes: Any = nnx.split(nodes)
        graphdef, state = split_nodes
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
            _check_unchanged((graphdef, jax.tree.structure(state)), (new_graphdef, jax.tree.structure(new_state)), fn)
            counts = _accumulate.verdict(leaves, scale, axis_name) if leave_out else None
            return new_state, leaves, (loss, aux, counts)

        def gradients_of_nothing(state: Any) -> list[jax.Array]:
            _, others, layout = partition((args, kwargs), is_node, is_leaf)
            own_args, _ = combine(nnx.merge(graphdef, state, copy=True), others, layout)
            return jax.tree.leaves(nnx.grad(lambda *_: jnp.zeros(()), argnums=chosen)(*own_args))

        like = jax.eval_shape(gradients_of_nothing, state)
        state, total, loss, aux, skipped = _accumulate.over_microbatches(one, state, like, num_microbatches, leave_out)
        nnx.update(nodes, state)
        value = (loss, aux) if has_aux else loss
        grads = jax.tree.unflatten(treedefs[-1], total)
        return (value, grads, skipped) if leave_out else (value, grads)

    return wrapped


def _position(argnum: int | nnx.DiffState) -> int:
    return argnum.argnum if isinstance(argnum, nnx.DiffState) else argnum


def _check_unchanged(before: Any, after: Any, fn: Callable[..., Any]) -> None:
    if before != after:
        name = getattr(fn, "__name__", repr(fn))
        raise InvalidFunctionError(
            f"{name} changed the structure of a module, which a loop over microbatches cannot carry. "
            "Call the model once before, so that all its variables exist; what `sow` collects grows with every call: "
            "return it as auxiliary output instead."
        )
