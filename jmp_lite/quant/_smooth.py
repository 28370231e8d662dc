"""Smoothing: shifts outlier channels of activations into the weights."""

import collections
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._dtypes import FLOAT32
from jmp_lite._functions import check_function
from jmp_lite._messages import quote
from jmp_lite._tree import path_string
from jmp_lite.errors import InvalidRecipeError
from jmp_lite.quant._array import dequantize_tree
from jmp_lite.quant._batches import checked
from jmp_lite.quant._scale import amax_of
from jmp_lite.quant._sites import Call, Site, call, not_finite

T = TypeVar("T")

#: By path of a weight and the axes that it is added up over: powers of two that broadcast with it.
Factors = Mapping[tuple[str, tuple[int, ...]], Any]


def smooth(
    fun: Callable[..., Any], params: T, batches: Iterable[Sequence[Any]], *, alpha: float = 0.5
) -> tuple[Callable[..., Any], T]:
    """Makes the activations of a function easier to quantize by shifting their largest channels into the weights.

    A few channels can be a hundred times larger than the rest, and a shared scale rounds the rest to zero. ``smooth``
    turns each matmul ``x @ w`` into ``(x / s) @ (s * w)``, with one factor per contracted channel. Factors are powers
    of two: without quantization the result is the same. All matmuls of a weight, and all iterations of a loop, share
    its factors.

    It smooths a weight if the function uses it only in matmuls or ``ragged_dot``, over the same axes. It leaves other
    weights alone: convolution kernels, lookup tables, weights that are summed or normalized first, and weights inside
    custom derivative rules and under ``shard_map``.

    Args:
        fun: Function of parameters and other arguments, such as ``model.apply``.
        params: Its parameters, before quantization.
        batches: Its other arguments, once per batch; their activations set the factors.
        alpha: How much to shift: 0 equalizes the channels of the weights, 1 those of the activations.

    Returns:
        A function with the signature of ``fun``, and its new parameters. Use both in place of the originals: in
        ``jax.jit``, ``autocast(dot=)``, ``calibrate``, ``quantize_tree`` and ``export.freeze``. A call that uses a
        smoothed weight differently than the batches did raises an error.

    Raises:
        InvalidFunctionError: If ``fun`` is not a function.
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
    if not (isinstance(alpha, (int, float, np.number)) and 0 <= alpha <= 1):
        raise InvalidRecipeError(f"alpha must be a number from 0 to 1, got {alpha!r}.")
    largest: dict[tuple[str, tuple[int, ...]], Any] = {}
    refused: set[str] = set()

    def note(site: Site, amax: Any) -> None:
        key = site.weight, site.contracted
        largest[key] = np.maximum(largest.get(key, 0), site.in_weight(np.asarray(amax)))

    for batch in checked(batches, "smooth", params):
        found = call(fun, (params, *batch), {})
        refused |= found.refused
        found.watch(lambda rows: (amax_of(rows, 0),), note)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    arrays = {path_string(path): leaf for path, leaf in leaves}
    seen = collections.Counter(weight for weight, _ in largest)
    refused |= {weight for weight, times in seen.items() if times > 1}
    factors = {k: _factors(arrays[k[0]], amax, float(alpha)) for k, amax in largest.items() if k[0] not in refused}
    if not factors:
        raise InvalidRecipeError(
            "No weight can be smoothed: no matmul of the function takes a parameter that has no other use. Smooth the "
            "function itself, and wrap it in autocast afterwards."
        )
    scaled = {weight: _times(arrays[weight], factor) for (weight, _), factor in factors.items()}

    def smoothed(params: T, *args: Any, **kwargs: Any) -> Any:
        wide = dequantize_tree(params)
        _check_paths(wide, factors)
        found = call(fun, (wide, *args), kwargs)
        _check_uses(found, factors)
        return found.run(functools.partial(_divided, factors=factors))

    return smoothed, jax.tree.unflatten(treedef, [scaled.get(path_string(path), leaf) for path, leaf in leaves])


def _check_paths(params: Any, factors: Factors) -> None:
    there = {path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    for weight, _ in factors:
        if weight not in there:
            raise InvalidRecipeError(
                f"The parameters lack {quote(weight)}, which smooth scaled. Pass the tree that it returned, or what "
                "quantize_tree makes of it."
            )


def _check_uses(found: Call, factors: Factors) -> None:
    """Raises for a call in which a factor would not cancel."""
    for weight, axes in factors:
        if weight in found.refused or found.contracted.get(weight, axes) != axes:
            raise InvalidRecipeError(
                f"Weight {quote(weight)} was smoothed for matmuls over its axes {list(axes)}, and this call uses it "
                "in another way. Give smooth a batch of such calls too."
            )


def _times(leaf: Any, factor: Any) -> Any:
    return (jnp.asarray(leaf).astype(FLOAT32) * factor).astype(leaf.dtype)


def _factors(weight: Any, amax: Any, alpha: float) -> Any:
    """A power of two for each channel, of the rank of the weight; 1 for channels with nothing to balance."""
    if not np.all(np.isfinite(amax)):
        raise not_finite(np.shape(weight))
    alone = tuple(axis for axis, size in enumerate(amax.shape) if size == 1)
    of_weight = np.max(np.abs(np.asarray(weight, np.float64)), axis=alone, keepdims=True)
    has_both = (amax > 0) & (of_weight > 0)
    exponent = alpha * np.log2(np.where(has_both, amax, 1)) - (1 - alpha) * np.log2(np.where(has_both, of_weight, 1))
    return np.where(has_both, np.exp2(np.clip(np.round(exponent), -40, 40)), 1).astype(np.float32)


def _divided(site: Site, x: Any, factors: Factors) -> Any:
    """Divides an activation by the factors of its channels, if there are any."""
    factor = factors.get((site.weight, site.contracted))
    return x if factor is None else _times(x, 1 / site.in_activation(factor, x.shape))
