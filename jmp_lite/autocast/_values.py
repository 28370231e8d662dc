"""What the interpreter knows of a value besides its array."""

import enum
import math
from typing import Any, NamedTuple

import jax

from jmp_lite._dtypes import FLOAT32


class Tag(enum.IntEnum):
    """How precise a value of float32 origin has become; where two meet, the larger wins."""

    NEUTRAL = 0
    """An input, a parameter, a constant: no decision has touched it yet."""
    LOW = 1
    """Made by a matrix product, or from one: held in the compute dtype."""
    SOFT = 2
    """LOW, scaled or shifted by float32 statistics as norms do: held in float32, but rounding it loses nothing more."""
    HIGH = 3
    """Made by an operation that needs float32, or from one: held in float32."""


class Origin(enum.Enum):
    """Where a value comes from."""

    INPUT = "input"
    """An argument or a carry: a parameter, an accumulator, a state."""
    REPEATED = "repeated"
    """Something smaller, repeated: a bias, a mask, a scale, a statistic."""
    COMPUTED = "computed"
    """Anything else."""


class Value(NamedTuple):
    """An array as it is held, how precise it is, and where it comes from."""

    array: Any
    tag: Tag = Tag.NEUTRAL
    origin: Origin = Origin.COMPUTED


def is_eligible(aval: Any) -> bool:
    """Whether autocast may hold a variable of the original program in another dtype: it is a float32 array."""
    return isinstance(aval, jax.core.ShapedArray) and aval.dtype == FLOAT32


def size(array: Any) -> Any:
    """Returns the number of elements, which may be symbolic."""
    return math.prod(array.shape)


def is_as_large(a: Any, b: Any) -> bool:
    """Whether ``a`` has as many elements as ``b``; sizes that cannot be compared are taken for smaller."""
    try:
        return bool(size(a) >= size(b))
    except jax.core.InconclusiveDimensionOperation:
        return False


def cast(array: Any, dtype: Any) -> Any:
    """Casts an array that may be in that dtype already."""
    return array if array.dtype == dtype else jax.lax.convert_element_type(array, dtype)
