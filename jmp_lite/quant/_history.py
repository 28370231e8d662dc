"""The place that a product leaves for the largest magnitudes of earlier steps; ``_delayed`` fills it."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from jmp_lite._compat import composed_primitive
from jmp_lite._dtypes import FLOAT32

#: Name of the primitive that stands where a product gets its histories from.
PLACEHOLDER = "amax_histories"


class Histories(NamedTuple):
    """Largest magnitudes of the left operand, the right operand and the cotangent of one product."""

    values: Any
    """``float32[3, steps]``, the latest step first."""
    are_known: Any
    """``bool[]``, a constant: False where nobody keeps histories, and every step looks at its own numbers."""


def placeholder(steps: int) -> Histories:
    """Returns histories that are not known, in a way that can be found in a program and replaced."""
    return Histories(*_primitive().bind(steps=steps))


@functools.cache
def _primitive() -> Any:
    def unknown(*, steps: int) -> list[Any]:
        return [jnp.zeros((3, steps), FLOAT32), jnp.array(False)]

    return composed_primitive(PLACEHOLDER, unknown, multiple_results=True)
