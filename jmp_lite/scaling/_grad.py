"""Gradients of a scaled loss."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._functions import check_function, refuse_modules, without_captured_modules
from jmp_lite._messages import quote
from jmp_lite._tree import all_finite, cast_to_at_least_float32, is_array, is_inexact
from jmp_lite.errors import InvalidFunctionError, InvalidLossScaleError, InvalidStepError
from jmp_lite.scaling._in_state import find_loss_scale, replace_loss_scale
from jmp_lite.scaling._loss_scale import DynamicLossScale, LossScale
from jmp_lite.scaling._verdict import refuse_forgotten_axes

#: Loss, auxiliary output, and the gradients of the inexact leaves.
Gradient = tuple[jax.Array, Any, list[Any]]


def positions_among(args: tuple[Any, ...], argnums: int | Sequence[int], name: str = "argnums") -> tuple[int, ...]:
    """Returns the positions, from the front, of the positional arguments that are named, or raises ``TypeError``."""
    try:
        numbers = tuple(map(operator.index, argnums if isinstance(argnums, Sequence) else (argnums,)))
    except TypeError:
        raise TypeError(f"{name} must be an integer or a sequence of integers, got {quote(argnums)}.") from None
    if not all(-len(args) <= i < len(args) for i in numbers):
        raise TypeError(f"{name}={argnums} does not fit a call with {len(args)} positional arguments.")
    positions = tuple(i % len(args) for i in numbers)
    if len(set(positions)) < len(positions):
        raise TypeError(f"{name}={argnums} names an argument twice.")
    return positions


def checked_loss(output: Any, has_aux: bool) -> tuple[jax.Array, Any]:
    """Splits what the loss function returned into a float32 loss and the auxiliary output."""
    if has_aux and not (isinstance(output, (tuple, list)) and len(output) == 2):
        raise InvalidFunctionError(
            f"With has_aux=True the function must return (loss, aux), got {quote(output)}. "
            "Return a pair, or drop has_aux."
        )
    loss, aux = output if has_aux else (output, None)
    if not is_array(loss) and not isinstance(loss, (bool, int, float, complex)):
        raise InvalidFunctionError(
            f"The loss must be a real floating-point scalar, got {quote(loss)}. Return a number, or "
            "(loss, aux) with has_aux=True."
        )
    dtype, shape = jnp.result_type(loss), np.shape(loss)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise InvalidFunctionError(
            f"The loss must be a real floating-point scalar, got {dtype}{list(shape)}. Reduce it, for example with "
            "jnp.mean, or return further values with has_aux=True."
        )
    return cast_to_at_least_float32(loss), aux


def _no_gradient(leaf: Any) -> Any:
    """JAX's gradient of integers, booleans and keys; ``None`` for other leaves, which optimizers leave alone."""
    is_number = is_array(leaf) or isinstance(leaf, (bool, int))
    return np.zeros(np.shape(leaf), jax.dtypes.float0) if is_number else None


def differentiate(
    fun: Callable[..., Any], has_aux: bool, args: tuple[Any, ...], argnums: tuple[int, ...]
) -> tuple[Callable[[LossScale], Gradient], Callable[[list[Any]], tuple[Any, ...]]]:
    """Prepares the derivative of the scaled loss with respect to the inexact leaves of some arguments.

    Returns:
        A function from a loss scale to ``(loss, aux, gradients)``, the gradients a flat list; and a function that puts
        such a list back into the structure of the arguments, with ``float0`` or ``None`` for all other leaves.
    """
    leaves, treedef = jax.tree.flatten(tuple(args[i] for i in argnums))
    inexact = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]

    def call(values: list[Any], loss_scale: LossScale) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        merged = list(leaves)
        for i, value in zip(inexact, values, strict=True):
            merged[i] = value
        new_args = list(args)
        for argnum, value in zip(argnums, jax.tree.unflatten(treedef, merged), strict=True):
            new_args[argnum] = value
        with without_captured_modules():
            loss, aux = checked_loss(fun(*new_args), has_aux)
        return loss_scale.scale(loss), (loss, aux)

    def gradient(loss_scale: LossScale) -> Gradient:
        values = [leaves[i] for i in inexact]
        grads, (loss, aux) = jax.grad(call, has_aux=True)(values, loss_scale)
        return loss, aux, grads

    def assemble(grads: list[Any]) -> tuple[Any, ...]:
        merged = [_no_gradient(leaf) for leaf in leaves]
        for i, grad in zip(inexact, grads, strict=True):
            merged[i] = grad
        trees: tuple[Any, ...] = jax.tree.unflatten(treedef, merged)
        return trees

    return gradient, assemble


def are_finite(grads: list[Any], scale: LossScale, axis_name: Any, decision: str, caller: str) -> jax.Array:
    """Returns ``bool[]``, whether unscaled gradients are finite on all devices, which decide something by it alike."""
    finite = all_finite(scale.unscale(grads), axis_name=axis_name)
    refuse_forgotten_axes(finite, scale.loss_scale, decision, f"{caller}(..., axis_name={{}})")
    return finite


def _retry(
    gradient: Callable[[LossScale], Gradient],
    loss_scale: LossScale,
    max_retries: int,
    axis_name: Any,
) -> tuple[LossScale, Gradient]:
    """Recomputes at ever lower scales, inside one ``lax.while_loop``, until the gradients are finite."""
    if not isinstance(loss_scale, DynamicLossScale):
        raise InvalidLossScaleError(
            f"max_retries={max_retries} needs a DynamicLossScale, which can be lowered; the state holds {loss_scale!r}."
        )

    held: Any = jax.tree.structure(loss_scale)
    if held != jax.tree.structure(loss_scale.back_off()):
        raise InvalidLossScaleError(
            f"max_retries={max_retries} needs a loss scale made of arrays, and that of an nnx.Optimizer is made of "
            "variables. Leave max_retries out: loss_scaled skips the step, and the next has a lower scale."
        )

    def attempt(scale: DynamicLossScale) -> tuple[DynamicLossScale, jax.Array, Gradient]:
        result = gradient(scale)
        finite = are_finite(result[2], scale, axis_name, "try again at a lower scale", "scaled_value_and_grad")
        return scale, finite, result

    def again(carry: tuple[int, Any]) -> Any:
        tries, (_, finite, _) = carry
        return (tries < max_retries) & ~finite

    def body(carry: tuple[int, Any]) -> Any:
        tries, (scale, _, _) = carry
        return tries + 1, attempt(scale.back_off())

    _, (scale, _, result) = jax.lax.while_loop(again, body, (0, attempt(loss_scale)))
    return scale, result


def scaled_value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    loss_scale: Any = None,
    max_retries: int = 0,
    axis_name: Any = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Like ``jax.value_and_grad``, for the loss times the current loss scale.

    The value is the true loss: unscaled, float32, correct even on a step whose gradients overflow. The gradients are
    still scaled; ``loss_scaled`` and ``apply_gradients`` unscale them with the same scale. Call this inside the step,
    with the loss scale of that step, as in the example of ``loss_scaled``: it costs nothing under ``jit``.

    Leaves that cannot be differentiated need no special handling. The gradient of integers, booleans and PRNG keys is
    ``float0``, as in JAX; the gradient of leaves that are not arrays, such as activation functions in Equinox modules,
    is ``None``, as in Equinox. Optimizers wrapped in ``loss_scaled`` leave both alone. Python floats are parameters, as
    for ``jax.grad``: if a module holds some, such as the rate of Equinox's Dropout, partition it first with
    ``eqx.partition(model, eqx.is_inexact_array)``. For functions of NNX modules use ``jmp.nnx.scaled_value_and_grad``.

    Args:
        fun: Returns a real floating-point scalar, or ``(scalar, aux)`` with ``has_aux``.
        argnums: Which positional arguments to differentiate.
        has_aux: Whether ``fun`` returns auxiliary output.
        loss_scale: Required: a loss scale, or any pytree that holds one, such as an Optax state, a Flax ``TrainState``
            or an ``nnx.Optimizer``.
        max_retries: How often to recompute at a halved scale, within the step, while gradients are not finite. Needs a
            ``DynamicLossScale``, and ``aux`` made of arrays. The lowered scale is returned in a third result.
        axis_name: Mapped axes whose replicas must retry together; only used with ``max_retries``.
        name: A path segment of the loss scale to use, if the state holds several.

    Returns:
        A function with exactly the signature of ``fun``. It returns ``(loss, grads)`` or ``((loss, aux), grads)``; with
        ``max_retries`` it also returns ``loss_scale``, with the lowered scale in it. ``loss`` is ``float32[]``
        (``float64[]`` if ``fun`` returns that).

    Raises:
        InvalidFunctionError: If ``fun`` is not a function or does not return what it should, or an argument is an NNX
            module.
        LossScaleNotFoundError: If ``loss_scale`` holds none, or several and no name is given.
        InvalidLossScaleError: If ``max_retries`` is set with a scale that cannot be lowered.
        MissingAxisError: If devices of a ``shard_map`` could retry differently, and ``axis_name`` is missing.

    Example:
        >>> def loss_fn(params, x):
        ...     return jnp.sum((x * params["w"]) ** 2).astype(jnp.float16)
        >>> value_and_grad = jmp.scaled_value_and_grad(loss_fn, loss_scale=jmp.DynamicLossScale(1024.0))
        >>> loss, grads = value_and_grad({"w": jnp.ones(2)}, 3.0)
        >>> print(loss, grads["w"] / 1024)
        18.0 [18. 18.]

    References:
        Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740, section 3.2.
    """
    check_function(fun, "scaled_value_and_grad")
    if not isinstance(max_retries, (int, np.integer)) or max_retries < 0:
        raise InvalidStepError(f"max_retries must be a whole number, at least 0, got {max_retries!r}.")
    at, scale = find_loss_scale(loss_scale, name)

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        refuse_modules(fun, args, kwargs, "scaled_value_and_grad")
        positions = positions_among(args, argnums)
        gradient, assemble = differentiate(functools.partial(fun, **kwargs), has_aux, args, positions)
        if max_retries > 0:
            lowered, (loss, aux, flat) = _retry(gradient, scale, max_retries, axis_name)
        else:
            loss, aux, flat = gradient(scale)
        trees = assemble(flat)
        grads = trees if isinstance(argnums, Sequence) else trees[0]
        value = (loss, aux) if has_aux else loss
        if max_retries > 0:
            return value, grads, replace_loss_scale(loss_scale, at, lowered)
        return value, grads

    return wrapped
