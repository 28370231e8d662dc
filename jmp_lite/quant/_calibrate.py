"""Calibration: fixes the scales of each matmul from data."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jmp_lite._dtypes import FLOAT32
from jmp_lite._functions import check_function
from jmp_lite._messages import quote
from jmp_lite.errors import InvalidRecipeError
from jmp_lite.quant._batches import checked
from jmp_lite.quant._recipes import DotRecipe, get_recipe
from jmp_lite.quant._scale import absmax_scale, amax_of, is_integer, largest
from jmp_lite.quant._spec import SIDES, QuantSpec


def calibrate(
    make: Callable[[DotRecipe], Callable[..., Any]],
    recipe: str | DotRecipe,
    batches: Iterable[Sequence[Any]],
    *,
    method: str = "absmax",
    percentile: float = 99.99,
) -> DotRecipe:
    """Measures the operand magnitudes of every matmul on data, and fixes its scales.

    An operand with one scale per array gets a fixed scale that covers all batches; one with per-channel scales still
    computes them at run time. Matmuls in one name scope, and all iterations of a loop, share a scale. Outside
    ``autocast`` all matmuls share one, because nothing tells them apart.

    Args:
        make: Builds the function to calibrate from the recipe to use in it. To calibrate cotangents, build one that
            computes gradients.
        recipe: The recipe to calibrate, or its name.
        batches: Positional arguments of the function, once per batch.
        method: Which magnitude sets the scale. ``"absmax"``: the largest. ``"percentile"``: the percentile, which clips
            outliers. ``"mse"``: the one with the least mean squared error of rounding and clipping together. The last
            two are for int8: in float8 clipped values become NaN.
        percentile: For ``"percentile"``, in percent of all nonzero numbers.

    Returns:
        The recipe with fixed scales, for the same function. Matmuls that no batch reached compute their scales at run
        time, as without calibration.

    Raises:
        InvalidRecipeError: If there are no batches, no matmul used the recipe, it has only per-channel scales, the data
            gives a non-finite operand, or the method is unknown or does not suit the format.

    Example:
        >>> def make(dot):
        ...     return jax.jit(jmp.autocast(lambda w, x: x @ w, "mixed_bfloat16", dot=dot))
        >>> w, batches = jnp.ones((8, 3)), [jnp.full((1, 8), 0.5), jnp.full((1, 8), 2.0)]
        >>> recipe = jmp.quant.calibrate(make, "w8a8_static", [(w, x) for x in batches])
        >>> print(recipe.at("").lhs)
        int8:amax2.0
        >>> print(make(recipe)(w, jnp.full((1, 8), 9.0)))  # more than was ever seen
        [[16. 16. 16.]]

    References:
        Wu et al., "Integer Quantization for Deep Learning Inference", arXiv:2004.09602, for the three methods; its
        least-error methods use entropy and mean squared error.
    """
    if not isinstance(recipe, (str, DotRecipe)):
        raise InvalidRecipeError(
            f"recipe is {quote(recipe)}, and must be a recipe or its name. Write calibrate(lambda dot: "
            "jmp.autocast(apply, policy, dot=dot), 'w8a8_static', batches)."
        )
    chosen = get_recipe(recipe)
    _check(chosen, method, percentile)
    journal = _Journal(method, float(percentile) / 100)
    check_function(make, "calibrate")
    function = make(_Watching(**_fields(chosen, DotRecipe), journal=journal))
    if not callable(function):
        raise InvalidRecipeError(
            f"make must return the function to calibrate, such as lambda dot: jmp.autocast(apply, policy, dot=dot), "
            f"and returned {quote(function)}."
        )
    for batch in checked(batches, "calibrate"):
        jax.block_until_ready(function(*batch))
    jax.effects_barrier()
    if not journal.seen:
        raise InvalidRecipeError(
            f"No matmul used recipe {chosen}. Let make(dot) return a function with matmuls of its argument, such as "
            "lambda dot: jmp.autocast(apply, policy, dot=dot)."
        )
    return dataclasses.replace(chosen, sites=tuple((s, _fixed(chosen, s, journal)) for s in sorted(journal.seen)))


def _check(recipe: DotRecipe, method: str, percentile: float) -> None:
    specs = {side: getattr(recipe, side) for side in SIDES if _is_fixed(getattr(recipe, side))}
    floats = [side for side, spec in specs.items() if not is_integer(spec.dtype)]
    if not specs:
        raise InvalidRecipeError(
            f"Recipe {recipe} has nothing to calibrate: no operand has one scale for the whole array. Use it as it is."
        )
    if not isinstance(method, str) or method not in _METHODS:
        raise InvalidRecipeError(f"method must be one of {', '.join(map(repr, _METHODS))}, got {method!r}.")
    if method != "absmax" and floats:
        raise InvalidRecipeError(
            f"method={method!r} cuts off the largest numbers, which become NaN in {floats[0]}={specs[floats[0]]}. Use "
            "method='absmax', or int8."
        )
    if not (isinstance(percentile, (int, float, np.number)) and 0 < percentile <= 100):
        raise InvalidRecipeError(f"percentile must be a number of percent such as 99.9, got {percentile!r}.")


def _fields(value: Any, of: type[Any]) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(of)}


def _is_fixed(spec: Any) -> bool:
    """Whether calibration fixes the scale."""
    return isinstance(spec, QuantSpec) and spec.granularity == "tensor"


def _fixed(recipe: DotRecipe, scope: str, journal: "_Journal") -> DotRecipe:
    """The recipe with the scales measured in one scope."""
    found = {side: journal.amax(scope, side, getattr(recipe, side)) for side in journal.seen[scope]}
    strange = [f"{side} has {amax}" for side, amax in found.items() if not math.isfinite(amax)]
    if strange:
        raise InvalidRecipeError(
            f"In scope {quote(scope)} {strange[0]}. Calibrate with data that the model computes finite numbers of."
        )
    return recipe.static(**{side: amax for side, amax in found.items() if amax > 0})


# --- Methods --------------------------------------------------------------------------------------


#: Magnitudes fall into a bucket by the first half of their bits as float32: 128 buckets between powers of two.
_BUCKETS, _NOT_FINITE = 2**15, 0x7F80


def _histogram(x: Any) -> Any:
    bits = lax.bitcast_convert_type(jnp.abs(x).astype(FLOAT32), jnp.uint32)
    return jnp.bincount((bits >> 16).astype(jnp.int32).ravel(), length=_BUCKETS)


def _upper_ends() -> Any:
    return (np.arange(_NOT_FINITE, dtype=np.uint32) << 16 | 0xFFFF).view(np.float32).astype(np.float64)


def _percentile(counts: Any, ends: Any, spec: QuantSpec, share: float) -> float:
    del spec
    return float(ends[np.searchsorted(np.cumsum(counts), share * counts.sum())])


def _least_error(counts: Any, ends: Any, spec: QuantSpec, share: float) -> float:
    """The magnitude with the least squared error of rounding and clipping."""
    del share
    counts, ends = counts[counts > 0], ends[counts > 0]
    candidates = ends[ends > ends[-1] * 2.0**-8]
    steps = np.asarray(absmax_scale(candidates, spec.dtype, margin=spec.margin, pow2=spec.pow2), np.float64)
    limits = steps * largest(spec.dtype)
    sums = [np.concatenate([[0.0], np.cumsum(counts * ends**power)]) for power in range(3)]
    zeroed, kept = np.searchsorted(ends, steps / 2), np.searchsorted(ends, limits, side="right")
    beyond = [total[-1] - total[kept] for total in sums]
    errors = sums[2][zeroed] + (sums[0][kept] - sums[0][zeroed]) * steps**2 / 12
    errors += beyond[2] - 2 * limits * beyond[1] + limits**2 * beyond[0]
    return float(candidates[np.argmin(errors)])


#: How to choose a magnitude from a histogram; ``None``: the largest.
_METHODS: Mapping[str, Callable[[Any, Any, QuantSpec, float], float] | None] = {
    "absmax": None,
    "percentile": _percentile,
    "mse": _least_error,
}


# --- Watching -------------------------------------------------------------------------------------


class _Journal:
    """Measurements by scope and side. Equal only to itself, so JAX reuses no program compiled for another journal."""

    def __init__(self, method: str, share: float) -> None:
        self.choose, self.share = _METHODS[method], share
        self.seen: dict[str, dict[str, Any]] = {}

    def measured(self, x: Any) -> Any:
        amax = jnp.where(jnp.isnan(x).any(), jnp.nan, amax_of(x))
        return amax, _histogram(x) if self.choose else 0

    def add(self, scope: str, side: str, measured: Any) -> None:
        new, counts = (np.asarray(part, np.float64) for part in measured)
        amax, before = self.seen.setdefault(scope, {}).get(side, (0.0, 0))
        self.seen[scope][side] = np.maximum(amax, new), before + counts

    def amax(self, scope: str, side: str, spec: QuantSpec) -> float:
        amax, counts = self.seen[scope][side]
        if self.choose is None or not math.isfinite(amax) or not counts[1:].any():
            return float(amax)
        return self.choose(counts[1:_NOT_FINITE], np.minimum(_upper_ends()[1:], amax), spec, self.share)


@dataclasses.dataclass(frozen=True)
class _Watching(DotRecipe):
    """A recipe that keeps a journal."""

    journal: Any = dataclasses.field(default=None, kw_only=True, repr=False)

    @property
    def depends_on_scope(self) -> bool:
        return True

    def at(self, scope: str) -> DotRecipe:
        fields = _fields(self, DotRecipe) | {"sites": ()}
        for side in SIDES:
            spec = fields[side]
            if _is_fixed(spec):
                plain = _fields(spec, QuantSpec) | {"amax": None}
                fields[side] = _Watched(**plain, journal=self.journal, place=(scope, side))
        return DotRecipe(**fields)


@dataclasses.dataclass(frozen=True)
class _Watched(QuantSpec):
    """A spec that records its operands."""

    journal: Any = dataclasses.field(default=None, kw_only=True, repr=False)
    place: tuple[str, str] = dataclasses.field(default=("", ""), kw_only=True, repr=False)

    def observe(self, x: Any) -> None:
        jax.debug.callback(functools.partial(self.journal.add, *self.place), self.journal.measured(x))
