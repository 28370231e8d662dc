"""Smoothing: what activations have too much of in single channels moves into the weights that they meet."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._functions import check_function
from jmp_lite.errors import InvalidRecipeError
from jmp_lite.quant._batches import checked
from jmp_lite.quant._sites import Site, call_with

T = TypeVar("T")


def smooth(
    fun: Callable[..., Any], params: T, batches: Iterable[Sequence[Any]], *, alpha: float = 0.5
) -> tuple[Callable[..., Any], T]:
    """Makes the activations of a function easier to quantize: their largest channels move into the weights.

    Some channels of real activations are a hundred times as large as the others, and with one scale for all of them
    the others are rounded to nothing. Here each product ``x @ w`` becomes ``(x / s) @ (s * w)``, with a factor per
    channel that is added up over. Factors are powers of two, which round nothing: without quantization the result is
    the same. All products of a weight, and all iterations of a loop, share its factors.

    A weight is smoothed if all that the function does with it is to move it into matrix products or ``ragged_dot``,
    over the same axes. Others are left alone: kernels of convolutions, tables that are looked up, weights that are
    summed or normalized first, and those in functions with derivative rules of their own and under ``shard_map``.

    Args:
        fun: Function of parameters and other arguments, such as ``model.apply``.
        params: Its parameters, before they are quantized.
        batches: Its other arguments, once per batch; the activations on them are looked at.
        alpha: How much moves: 0 makes all channels of the weights alike, 1 all those of the activations.

    Returns:
        A function with the signature of ``fun``, and the parameters that it takes in the place of these. Both go
        wherever the others went: into ``autocast(dot=)``, ``calibrate``, ``quantize_tree`` and ``export.freeze``.

    Raises:
        InvalidFunctionError: If ``fun`` is no function.
        InvalidRecipeError: If there are no batches, ``alpha`` is not between 0 and 1, no weight can be smoothed, or an
            activation is not finite.

    Example:
        >>> w, x = jnp.ones((2, 3)), jnp.array([[1.0, 64.0]])
        >>> run, smoothed = jmp.quant.smooth(lambda w, x: x @ w, w, [(x,)])
        >>> print(smoothed)
        [[1. 1. 1.]
         [8. 8. 8.]]
        >>> print(run(smoothed, x))
        [[65. 65. 65.]]

    References:
        Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        arXiv:2211.10438, whose scales are not rounded. For weights of 4 bits: Lin et al., "AWQ", arXiv:2306.00978.
    """
    check_function(fun, "smooth")
    if not (isinstance(alpha, (int, float)) and 0 <= alpha <= 1):
        raise InvalidRecipeError(f"alpha must be a number from 0 to 1, got {alpha!r}.")
    leaves, treedef = jax.tree.flatten(params)
    largest: dict[int, Any] = {}

    def note(site: Site, amax: Any) -> None:
        largest[site.number] = np.maximum(largest.get(site.number, 0), site.in_weight(np.asarray(amax)))

    def watch(site: Site, x: Any) -> Any:
        jax.debug.callback(functools.partial(note, site), jnp.max(jnp.abs(site.rows(x)), axis=0))
        return x

    for batch in checked(batches, "smooth", params):
        call_with(fun, (params, *batch), {}, watch)
    jax.effects_barrier()
    if not largest:
        raise InvalidRecipeError("No weight can be smoothed: no product of the function takes a parameter as it is.")
    factors = {number: _factors(leaves[number], amax, alpha) for number, amax in largest.items()}

    def smoothed(params: T, *args: Any, **kwargs: Any) -> Any:
        return call_with(fun, (params, *args), kwargs, lambda site, x: _divided(site, x, factors))

    scaled = [leaf * factors[n].astype(leaf.dtype) if n in factors else leaf for n, leaf in enumerate(leaves)]
    return smoothed, jax.tree.unflatten(treedef, scaled)


def _factors(weight: Any, amax: Any, alpha: float) -> Any:
    """A power of two for each channel, of the rank of the weight; 1 where nothing is to be balanced."""
    if not np.all(np.isfinite(amax)):
        raise InvalidRecipeError(
            f"An activation on a weight of shape {np.shape(weight)} is not finite. Use data that the function computes "
            "finite numbers of."
        )
    alone = tuple(axis for axis, size in enumerate(amax.shape) if size == 1)
    of_weight = np.max(np.abs(np.asarray(weight, np.float64)), axis=alone, keepdims=True)
    has_both = (amax > 0) & (of_weight > 0)
    exponent = alpha * np.log2(np.where(has_both, amax, 1)) - (1 - alpha) * np.log2(np.where(has_both, of_weight, 1))
    return np.where(has_both, np.exp2(np.clip(np.round(exponent), -40, 40)), 1).astype(np.float32)


def _divided(site: Site, x: Any, factors: Mapping[int, Any]) -> Any:
    """Divides an activation by the factors of its channels."""
    if site.number not in factors:
        return x
    return x * jnp.asarray(1 / site.in_activation(factors[site.number], x.shape), x.dtype)
