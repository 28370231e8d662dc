"""What the interpreter knows of a value besides its array."""

import enum
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._dtypes import FLOAT32, DType


class Tag(enum.IntEnum):
    """How precise a value of float32 origin has become; where two meet, the larger wins."""

    NEUTRAL = 0
    """An input, a parameter, a constant: no decision has touched it yet."""
    LOW = 1
    """Made by a matmul, or from one: held in the compute dtype."""
    SOFT = 2
    """LOW, scaled or shifted in float32, as norms and biases do: held in float32, but rounding it loses little more."""
    HIGH = 3
    """Made by an operation that needs float32, or from one: held in float32."""

    @property
    def is_rounded(self) -> bool:
        """Whether it has the precision of the compute dtype, whichever dtype it is held in."""
        return self in (Tag.LOW, Tag.SOFT)


class Origin(enum.Enum):
    """Where a value comes from."""

    INPUT = "input"
    """An argument or a carry: a parameter, an accumulator, a state."""
    SCALED = "scaled"
    """An input that was scaled or shifted: still a state, such as a parameter under weight decay."""
    MOVED = "moved"
    """An input that was transposed, reshaped, cut or left alone: still a parameter."""
    REPEATED = "repeated"
    """Something smaller, repeated: a bias, a mask, a scale, a statistic."""
    SOLVED = "solved"
    """Linear algebra, moved or scaled perhaps: a matmul that takes it belongs to it."""
    FOUND = "found"
    """A loop that iterates until what matmuls make is good enough: whoever takes its steps again must take the same."""
    TANGENT = "tangent"
    """A tangent in a derivative that the user wrote, or what is linear in one."""
    AS_WRITTEN = "as written"
    """An operation that runs as written, such as a random number, or arithmetic on nothing else."""
    COMPUTED = "computed"
    """Anything else."""


#: Origins of what parameters are held as.
OF_WEIGHTS = frozenset({Origin.INPUT, Origin.MOVED})


class Known(NamedTuple):
    """How precise a value is, where it comes from, and the constant it is filled with, if known."""

    tag: Tag = Tag.NEUTRAL
    origin: Origin = Origin.COMPUTED
    number: float | None = None


class Value(NamedTuple):
    """An array as it is held, and what is known of it."""

    array: Any
    known: Known = Known()

    @property
    def tag(self) -> Tag:
        """How precise it is."""
        return self.known.tag

    @property
    def is_weight(self) -> bool:
        """Whether it is an untouched parameter, possibly transposed or sliced."""
        return self.tag is Tag.NEUTRAL and self.known.number is None and self.known.origin in OF_WEIGHTS

    @property
    def is_parameter(self) -> bool:
        """The same, or a parameter held in 16 bits."""
        known = self.known
        is_argument = known.origin is Origin.INPUT and known.tag is Tag.NEUTRAL
        return known.number is None and (is_argument or known.origin is Origin.MOVED)

    @property
    def is_activation(self) -> bool:
        """Whether it was computed from arguments, like an embedding, and is not itself an argument, number or mean."""
        known = self.known
        return known.tag is Tag.NEUTRAL and known.origin is Origin.COMPUTED and known.number is None


INPUT = Known(origin=Origin.INPUT)


def is_eligible(aval: Any) -> bool:
    """Whether autocast may hold a variable of the original program in another dtype: only float32 arrays."""
    return isinstance(aval, jax.core.ShapedArray) and aval.dtype == FLOAT32


def size(array: Any) -> Any:
    """Returns the number of elements, which may be symbolic."""
    return math.prod(array.shape)


def is_as_large(a: Any, b: Any) -> bool:
    """Whether one number of elements is at least another; sizes that cannot be compared count as smaller."""
    try:
        return bool(a >= b)
    except jax.errors.InconclusiveDimensionOperation:
        return False


def as_dtype(number: Any, dtype: Any) -> Any:
    """Casts a number of the program; float32's maximum becomes the maximum of a dtype with the same exponents."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.asarray(number, FLOAT32).astype(dtype)
    if np.isinf(rounded) and np.isfinite(number):
        largest = jnp.finfo(dtype).max  # type: ignore[no-untyped-call]
        return np.copysign(np.asarray(largest, dtype), np.asarray(np.sign(number), dtype))
    return rounded


@functools.lru_cache(maxsize=4096)
def is_in_range(number: float, dtype: DType) -> bool:
    """Whether a dtype holds a number to within its rounding error, neither as infinity nor as zero."""
    if not math.isfinite(number):
        return True
    held = float(as_dtype(number, dtype))
    return abs(held - number) <= abs(number) * float(jnp.finfo(dtype).eps)  # type: ignore[no-untyped-call]


def is_exact(number: float, dtype: DType) -> bool:
    """Whether a dtype holds a number exactly."""
    return float(as_dtype(number, dtype)) == number
