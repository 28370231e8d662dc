"""Calibration: scales that are fixed by data, product by product."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jmp_lite._dtypes import FLOAT32
from jmp_lite._messages import quote
from jmp_lite.errors import InvalidRecipeError
from jmp_lite.quant._recipes import DotRecipe, get_recipe
from jmp_lite.quant._spec import SIDES, QuantSpec

#: The largest magnitudes that one operand had.
Seen = list[float]


def calibrate(
    make: Callable[[DotRecipe], Callable[..., Any]], recipe: str | DotRecipe, batches: Iterable[Sequence[Any]]
) -> DotRecipe:
    """Finds, for every product, the largest magnitudes that its operands have on some data, and fixes its scales.

    Operands with one scale for the whole array get the one that the largest of all batches asks for; those with one per
    channel keep looking at themselves. Products of one name scope, and all iterations of a loop, share a scale. Outside
    of ``autocast`` nothing tells products apart, and all share one.

    Args:
        make: Makes the function to be watched, of the recipe to use in it. For scales of cotangents it makes a function
            that takes gradients.
        recipe: The recipe to calibrate, or its name.
        batches: Positional arguments of the function, once per batch.

    Returns:
        The recipe with fixed scales, for the same function. Products that no batch reached look at their operands, as
        without calibration.

    Raises:
        InvalidRecipeError: If there are no batches, no product used the recipe, it has one scale per channel
            throughout, or something that was seen is not finite.

    Example:
        >>> def make(dot):
        ...     return jax.jit(jmp.autocast(lambda w, x: x @ w, "mixed_bfloat16", dot=dot))
        >>> w, batches = jnp.ones((8, 3)), [jnp.full((1, 8), 0.5), jnp.full((1, 8), 2.0)]
        >>> recipe = jmp.quant.calibrate(make, "w8a8_static", [(w, x) for x in batches])
        >>> print(recipe.at("").lhs)
        int8:amax2.0
        >>> print(make(recipe)(w, jnp.full((1, 8), 9.0)))  # more than was ever seen
        [[16. 16. 16.]]
    """
    chosen = get_recipe(recipe)
    if not any(_is_fixed(getattr(chosen, side)) for side in SIDES):
        raise InvalidRecipeError(
            f"Recipe {chosen} has nothing to calibrate: no operand has one scale for the whole array. Use it as it is."
        )
    journal = _Journal()
    function, batch = make(_Watching(**_fields(chosen, DotRecipe), journal=journal)), None
    for batch in batches:
        jax.block_until_ready(function(*batch))
    jax.effects_barrier()
    if batch is None:
        raise InvalidRecipeError("calibrate was given no batches. Pass at least one tuple of arguments.")
    if not journal.seen:
        raise InvalidRecipeError(
            f"No product used recipe {chosen}. Let make(dot) return a function with products of its argument, such as "
            "lambda dot: jmp.autocast(apply, policy, dot=dot)."
        )
    return dataclasses.replace(
        chosen, sites=tuple((s, _fixed(chosen, s, journal.seen[s])) for s in sorted(journal.seen))
    )


def _fields(value: Any, of: type[Any]) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(of)}


def _is_fixed(spec: Any) -> bool:
    """Whether calibration fixes the scale."""
    return isinstance(spec, QuantSpec) and spec.granularity == "tensor"


def _fixed(recipe: DotRecipe, scope: str, found: dict[str, Seen]) -> DotRecipe:
    """The recipe with the scales that were found in one scope."""
    strange = [f"{side} has {amax}" for side, seen in found.items() for amax in seen if not math.isfinite(amax)]
    if strange:
        raise InvalidRecipeError(
            f"In scope {quote(scope)} {strange[0]}. Calibrate with data that the model computes finite numbers of."
        )
    return recipe.static(**{side: max(seen) for side, seen in found.items() if max(seen) > 0})


# --- Watching -------------------------------------------------------------------------------------


class _Journal:
    """What was seen, by scope and side. Equal to itself alone, so that nothing compiled for another one is used."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, Seen]] = {}

    def add(self, scope: str, side: str, amax: Any) -> None:
        self.seen.setdefault(scope, {}).setdefault(side, []).append(float(amax))


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
    """A spec that tells what it is given."""

    journal: Any = dataclasses.field(default=None, kw_only=True, repr=False)
    place: tuple[str, str] = dataclasses.field(default=("", ""), kw_only=True, repr=False)

    def observe(self, x: Any) -> None:
        note = functools.partial(self.journal.add, *self.place)
        jax.debug.callback(note, jnp.max(jnp.abs(x), initial=0).astype(FLOAT32))
