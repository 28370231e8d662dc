"""Formats of optimizer state: how to store gradient moments in 8 or 16 bits between steps.

A format has two pure functions. ``encode(value, bits, other)`` converts float32 to the stored form, ``decode(stored,
other)`` converts it back; ``bits`` are random, ``uint32`` of the same shape, and ``other`` is the decoded moment that
this one is stored relative to, if any. Both are elementwise, without shared scales: a scale would be the max of the new
values, and cost a second pass over memory.
"""

import dataclasses
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jmp_lite._dtypes import FLOAT32, STANDARD_FORMATS, DType, dtype_or_none
from jmp_lite._messages import quote
from jmp_lite._rounding import at_random, stochastic_floor, stochastic_round
from jmp_lite.errors import InvalidStorageError

#: Bits of a float32 below the two of the mantissa that 8-bit formats keep.
_DROPPED = 21


class StateFormat(Protocol):
    """Interface of a format of optimizer state; write one as a frozen dataclass.

    Attributes:
        dtype: Stored dtype.
        relative_to: Name of the field of the same state that holds ``other``, or ``None``.
        largest: The stored values of saturated numbers; empty if nothing saturates. See ``optim.saturated``.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Sign:
        ...     dtype = jnp.dtype(bool)
        ...     relative_to = None
        ...     largest = ()
        ...
        ...     def encode(self, value, bits, other):
        ...         return value > 0
        ...
        ...     def decode(self, stored, other):
        ...         return jnp.where(stored, 1.0, -1.0)
        >>> tx = jmp.optim.stored(optax.lion(1e-3), params="split8", state={"mu": Sign()})
        >>> tx.init({"w": jnp.zeros(3, jnp.bfloat16)}).inner_state[0].mu["w"].dtype
        dtype('bool')
    """

    @property
    def dtype(self) -> Any: ...

    @property
    def relative_to(self) -> str | None: ...

    @property
    def largest(self) -> tuple[int, ...]: ...

    def encode(self, value: jax.Array, bits: jax.Array, other: jax.Array | None, /) -> jax.Array:
        """Encodes float32, given random bits (``uint32``) and the reference moment, all of one shape."""
        ...

    def decode(self, stored: jax.Array, other: jax.Array | None, /) -> jax.Array:
        """Decodes to float32."""
        ...


@dataclasses.dataclass(frozen=True)
class Float:
    """A 16-bit floating dtype, stochastically rounded, or float32 unchanged.

    ``bfloat16`` has float32's range. Numbers above the range of ``float16`` become its largest, and numbers below its
    normal range lose bits, as second moments of small gradients do.

    Attributes:
        dtype: ``bfloat16``, ``float16`` or ``float32``, as a dtype or by name.
        stochastic: Whether to round stochastically, which is unbiased. Rounded to nearest, a number that changes by
            less than half a unit per step never changes, such as a second moment with ``b2=0.999``.

    Example:
        >>> format = jmp.optim.Float("bfloat16")
        >>> print(format.decode(format.encode(jnp.array([0.0, 1.0, 3.0]), jnp.zeros(3, jnp.uint32), None), None))
        [0. 1. 3.]
    """

    dtype: Any = np.dtype(jnp.bfloat16)  # noqa: RUF009 (a constant)
    stochastic: bool = True
    relative_to: ClassVar[None] = None
    largest: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        dtype = dtype_or_none(self.dtype)
        if dtype not in STANDARD_FORMATS:
            raise InvalidStorageError(f"dtype must be bfloat16, float16 or float32, got {quote(self.dtype)}.")
        object.__setattr__(self, "dtype", dtype)

    def encode(self, value: jax.Array, bits: jax.Array, _: jax.Array | None) -> jax.Array:
        """Rounds float32 to the stored form."""
        return stochastic_round(bits, value, self.dtype) if self.stochastic else value.astype(self.dtype)

    def decode(self, stored: jax.Array, _: jax.Array | None) -> jax.Array:
        """Returns the stored numbers in float32."""
        return stored.astype(FLOAT32)


@dataclasses.dataclass(frozen=True)
class Log:
    """A nonnegative number, such as a second moment, in 8 bits: six of exponent, two of mantissa.

    Numbers from ``2**(highest - 63)`` to ``1.25 * 2**highest`` in steps of 25 %, stochastically rounded. Larger numbers
    become the largest; see ``optim.saturated``. Smaller numbers become the smallest or zero, without bias. NaN and
    infinity become NaN, and negative numbers become zero.

    Attributes:
        highest: Exponent of the largest number. 7 fits second moments of gradients between 1e-7 and 12 in magnitude: in
            the first steps a moment is a thousandth of the square. Smaller gradients need a lower exponent.

    Example:
        >>> format = jmp.optim.Log()
        >>> print(format.decode(jnp.array([0, 1, 224, 225, 254, 255], jnp.uint8), None))
        [0.00000e+00 1.38778e-17 8.75000e-01 1.00000e+00 1.60000e+02 nan]
    """

    highest: int = 7
    largest: ClassVar[tuple[int, ...]] = (254,)
    dtype: ClassVar[DType] = np.dtype(np.uint8)
    relative_to: ClassVar[None] = None

    def __post_init__(self) -> None:
        _check_highest(self.highest)

    def encode(self, value: jax.Array, bits: jax.Array, _: jax.Array | None) -> jax.Array:
        """Rounds float32 to the stored form."""
        code = _to_code(jnp.maximum(value, 0), bits, self.highest - 63, 254)
        return jnp.where(jnp.isfinite(value), code, 255).astype(jnp.uint8)

    def decode(self, stored: jax.Array, _: jax.Array | None) -> jax.Array:
        """Returns the stored numbers in float32."""
        return jnp.where(stored == 255, jnp.nan, _from_code(stored.astype(jnp.uint32), self.highest - 63))


@dataclasses.dataclass(frozen=True)
class SignedLog:
    """A signed number, such as a momentum, in 8 bits: sign, five bits of exponent, two of mantissa.

    Magnitudes from ``2**(highest - 31)`` to ``1.5 * 2**highest``, rounded as in ``Log``. NaN and infinity become NaN.

    Attributes:
        highest: Exponent of the largest magnitude.

    Example:
        >>> format = jmp.optim.SignedLog()
        >>> print(format.decode(jnp.array([0, 109, 127, 128, 237], jnp.uint8), None))
        [ 0.  1. 24. nan -1.]
    """

    highest: int = 4
    largest: ClassVar[tuple[int, ...]] = (127, 255)
    dtype: ClassVar[DType] = np.dtype(np.uint8)
    relative_to: ClassVar[None] = None

    def __post_init__(self) -> None:
        _check_highest(self.highest)

    def encode(self, value: jax.Array, bits: jax.Array, _: jax.Array | None) -> jax.Array:
        """Rounds float32 to the stored form."""
        code = _to_code(jnp.abs(value), bits, self.highest - 31, 127)
        signed = jnp.where((value < 0) & (code > 0), code + 128, code)
        return jnp.where(jnp.isfinite(value), signed, 128).astype(jnp.uint8)

    def decode(self, stored: jax.Array, _: jax.Array | None) -> jax.Array:
        """Returns the stored numbers in float32."""
        code = stored.astype(jnp.uint32)
        magnitude = _from_code(code & np.uint32(127), self.highest - 31)
        return jnp.where(code == 128, jnp.nan, jnp.where(code > 128, -magnitude, magnitude))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A first moment in 8 bits, relative to the root of the second moment: ``m / (bound * sqrt(v))``.

    So the stored ``v`` bounds Adam's step, however small ``v`` is. The 255 values from -1 to 1 are denser near zero
    (softsign); rounding is stochastic. With ``b1=0.9`` and ``b2=0.999`` the first moment is at most 7.3 times the root;
    larger ratios become ``bound``. NaN and infinity become NaN.

    Attributes:
        bound: Largest ratio to the root.
        relative_to: Name of the second moment.

    Example:
        >>> format = jmp.optim.Ratio()
        >>> print(format.decode(jnp.array([-127, 0, 64], jnp.int8), jnp.full(3, 4.0)))
        [-16.       0.       5.38947]
    """

    bound: float = 8.0
    relative_to: str = "nu"
    largest: ClassVar[tuple[int, ...]] = (-127, 127)
    dtype: ClassVar[DType] = np.dtype(np.int8)

    def __post_init__(self) -> None:
        if not isinstance(self.bound, (int, float)) or not 0 < self.bound < _MOST:
            raise InvalidStorageError(f"bound must be a number between 0 and 2**40, got {quote(self.bound)}.")
        if not isinstance(self.relative_to, str):
            raise InvalidStorageError(f"relative_to must name a moment, such as 'nu', got {quote(self.relative_to)}.")

    def encode(self, value: jax.Array, bits: jax.Array, other: jax.Array | None) -> jax.Array:
        """Rounds float32 to the stored form."""
        largest = self.bound * jnp.sqrt(_known(other))
        relative = jnp.minimum(jnp.abs(value) / jnp.maximum(largest, _TINY), 1)
        below = jnp.minimum(jnp.floor(_LEVELS * 2 * relative / (1 + relative)), _LEVELS - 1)
        start, end = _softsign(below), _softsign(below + 1)
        code = below + stochastic_floor(bits, jnp.clip((relative - start) / (end - start), 0, 1))
        code = jnp.where(largest > 0, code, 0)
        signed = jnp.where(value < 0, -code, code)
        return jnp.where(jnp.isfinite(value) & jnp.isfinite(largest), signed, -128).astype(jnp.int8)

    def decode(self, stored: jax.Array, other: jax.Array | None) -> jax.Array:
        """Returns the stored numbers in float32."""
        code = stored.astype(FLOAT32)
        relative = jnp.sign(code) * _softsign(jnp.abs(code))
        return jnp.where(stored == -128, jnp.nan, relative * (self.bound * jnp.sqrt(_known(other))))


_LEVELS = 127
_TINY = 2.0**-100
_MOST = 2.0**40


def _check_highest(highest: Any) -> None:
    """So that all numbers of the format are normal ones of float32."""
    if not isinstance(highest, int) or not -60 <= highest <= 120:
        raise InvalidStorageError(f"highest must be a whole number from -60 to 120, got {quote(highest)}.")


def _softsign(level: jax.Array) -> jax.Array:
    """From 0, 1 ... 127 to numbers from 0 to 1."""
    return level / (2 * _LEVELS - level)


def _known(other: jax.Array | None) -> jax.Array:
    if other is None:
        raise InvalidStorageError("A Ratio is stored relative to another moment, and was given none.")
    return other


def _to_code(magnitude: jax.Array, bits: jax.Array, lowest: int, largest: int) -> jax.Array:
    """Codes of numbers that are at least 0: 1 for ``2**lowest``, one more for each quarter of a power of two."""
    one = ((lowest + 127) << 2) - 1
    word = lax.bitcast_convert_type(magnitude, jnp.uint32)
    code = ((word + (bits >> (32 - _DROPPED))) >> _DROPPED).astype(jnp.int32) - one
    is_up = at_random(bits) < magnitude * np.float32(2.0**-lowest)
    return jnp.where(magnitude < np.float32(2.0**lowest), is_up.astype(jnp.int32), jnp.minimum(code, largest))


def _from_code(code: jax.Array, lowest: int) -> jax.Array:
    one = np.uint32(((lowest + 127) << 2) - 1)
    return jnp.where(code == 0, 0, lax.bitcast_convert_type((code + one) << _DROPPED, FLOAT32))


#: Names for formats, which ``stored`` takes.
FORMATS: dict[str, StateFormat] = {
    "float32": Float(FLOAT32, stochastic=False),
    "bfloat16": Float(np.dtype(jnp.bfloat16)),
    "bfloat16-nearest": Float(np.dtype(jnp.bfloat16), stochastic=False),
    "float16": Float(np.dtype(jnp.float16)),
    "float16-nearest": Float(np.dtype(jnp.float16), stochastic=False),
    "log": Log(),
    "slog": SignedLog(),
    "ratio": Ratio(),
}
