"""Low-bit weights whose rounding errors compensate for each other on given activations."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jmp_lite._dtypes import FLOAT32
from jmp_lite._functions import check_function
from jmp_lite._tree import path_string
from jmp_lite.quant._array import QuantizedArray, is_quantized, kernels_of, quantize_tree
from jmp_lite.quant._axes import contracted_axes
from jmp_lite.quant._batches import checked
from jmp_lite.quant._scale import amax_of, dequantize, quantize, repeated
from jmp_lite.quant._sites import Site, call, not_finite

T = TypeVar("T")

#: Of the mean of the diagonal, added to it, as in the paper.
_DAMPING = 0.01


def gptq(fun: Callable[..., Any], params: T, batches: Iterable[Sequence[Any]], dtype: Any = "int4:tile128") -> T:
    """Quantizes weights to minimize the change in a function's matmuls on data, rather than in the weights.

    It uses the same scales as ``quantize_tree(params, dtype, axes=contracted_axes(fun)(params, ...))``. But the
    rows after each row of a weight compensate for its rounding error, as far as their activations correlate: in
    weights that ``smooth`` supports; others are rounded to nearest. Zeros, such as pruned weights, stay zero. All
    iterations of a loop, and all experts, share one correlation of activations.

    Args:
        fun: Function of parameters and other arguments, such as ``model.apply``.
        params: Its parameters.
        batches: Its other arguments, once per batch: a hundred texts or pictures are plenty.
        dtype: The format, as ``quantize_tree`` takes it.

    Returns:
        The tree with a ``QuantizedArray`` in place of each weight.

    Raises:
        InvalidFunctionError: If ``fun`` is not a function.
        InvalidRecipeError: If there are no batches, the format is unknown, tiles do not divide a weight, or an
            activation is not finite.

    Example:
        >>> w, x = jnp.array([[0.4], [0.4], [7.0]]), jnp.ones((1, 3))
        >>> nearest = jmp.quant.quantize_tree(w, jmp.quant.QuantSpec("int4", tile=3))
        >>> compensated = jmp.quant.gptq(lambda w, x: x @ w, w, [(x,)], "int4:tile3")
        >>> print(x @ w, x @ nearest, x @ compensated)
        [[7.8]] [[7.]] [[8.]]

    References:
        Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        arXiv:2210.17323, with scales fixed before the first row.
    """
    check_function(fun, "gptq")
    moments: dict[str, Any] = {}
    sites: dict[str, Site] = {}

    def note(site: Site, moment: Any, unit: Any) -> None:
        sites[site.weight] = site
        moments[site.weight] = moments.get(site.weight, 0) + np.asarray(moment, np.float64) * np.float64(unit) ** 2

    for batch in checked(batches, "gptq", params):
        call(fun, (params, *batch), {}).watch(_moment, note)
    axes = contracted_axes(fun)(params, *batch)
    tree = quantize_tree(params, dtype, where=kernels_of(axes), axes=axes)

    def compensated(path: Any, leaf: Any, original: Any) -> Any:
        name = path_string(path)
        is_chosen = name in sites and is_quantized(leaf)
        return _compensated(leaf, original, sites[name], moments[name]) if is_chosen else leaf

    result: T = jax.tree_util.tree_map_with_path(compensated, tree, params, is_leaf=is_quantized)
    return result


def _moment(rows: Any) -> tuple[Any, Any]:
    """Sums of matmuls of channels with each other, ``float32[n, n]``, and the unit of these channels."""
    unit = amax_of(rows)
    rows = rows / jnp.where(unit > 0, unit, 1)
    return lax.dot_general(rows, rows, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST), unit


def _compensated(quantized: QuantizedArray, original: Any, site: Site, moment: Any) -> QuantizedArray:
    if not np.isfinite(moment).all():
        raise not_finite(site.shape)
    order = (*site.contracted, *(axis for axis in range(len(site.shape)) if axis not in site.order))
    moment = moment / (np.mean(np.diag(moment)) or 1.0)
    damped = moment + _DAMPING * np.eye(len(moment))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T

    def as_rows(x: Any) -> Any:
        return jnp.transpose(x, order).reshape(len(moment), -1).astype(FLOAT32)

    scale = as_rows(repeated(quantized.scale, site.shape) * jnp.ones(site.shape, FLOAT32))
    rows = _rounded(as_rows(original), scale, jnp.asarray(upper, FLOAT32), quantized.values.dtype)
    values = rows.reshape([site.shape[axis] for axis in order]).transpose(np.argsort(order))
    return QuantizedArray(values, quantized.scale, quantized.dtype)


@functools.partial(jax.jit, static_argnums=3)
def _rounded(weight: Any, scale: Any, upper: Any, dtype: Any) -> Any:
    """Rounds one row after the other, and spreads what it loses over the rows below, by the Cholesky factor."""

    def round_row(weight: Any, row: Any) -> tuple[Any, Any]:
        index, factors, scale, is_kept = row
        exact = weight[index]
        rounded = quantize(jnp.where(is_kept, exact, 0), dtype, scale)
        lost = (exact - dequantize(rounded, scale)) / factors[index]
        return weight - jnp.outer(factors, lost), rounded

    rows = (jnp.arange(len(weight)), upper, scale, weight != 0)
    _, rounded = lax.scan(round_row, weight, rows)
    return rounded
