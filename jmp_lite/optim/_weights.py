"""Formats of parameters: the 16 bits that the model sees, and the low bits that the optimizer stores.

A format has two pure functions. ``encode(full, bits, dtype)`` splits float32 into the number that the model sees and
its low bits, an integer, or ``None`` if the format stores none; ``decode(seen, low)`` joins both to float32.
"""

import dataclasses
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite._rounding import nearest_round, stochastic_floor, stochastic_round


class WeightFormat(Protocol):
    """Interface of a format of parameters.

    Attributes:
        low_dtype: Of the low bits.
    """

    @property
    def low_dtype(self) -> Any: ...

    def encode(self, full: jax.Array, bits: jax.Array, dtype: DType, /) -> tuple[jax.Array, Any]: ...

    def decode(self, seen: jax.Array, low: Any, /) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Whole:
    """Stores only the number that the model sees, rounded to nearest or stochastically.

    Attributes:
        stochastic: Whether to round stochastically, which is unbiased.
    """

    stochastic: bool
    low_dtype: ClassVar[None] = None

    def encode(self, full: jax.Array, bits: jax.Array, dtype: DType) -> tuple[jax.Array, None]:
        return (stochastic_round(bits, full, dtype) if self.stochastic else nearest_round(full, dtype)), None

    def decode(self, seen: jax.Array, _: Any) -> jax.Array:
        return seen.astype(FLOAT32)


#: What of a float32 is a bfloat16.
_HIGH = np.uint32(0xFFFF0000)


@dataclasses.dataclass(frozen=True)
class Split:
    """The model sees float32 rounded to 16 bits; the state stores 8 or 16 more bits.

    ``bfloat16`` is the first half of a float32, so 16 more bits hold every float32 from 2**-133 on to the last bit.
    With 8 bits the last one is rounded stochastically. ``float16`` with 16 more bits holds float32 from 2**-17 to
    65504, and below that multiples of 2**-40; larger numbers become 65504.

    Attributes:
        extra: How many bits the state stores.
    """

    extra: int

    def encode(self, full: jax.Array, bits: jax.Array, dtype: DType) -> tuple[jax.Array, jax.Array]:
        return self._halves(full, bits) if dtype == jnp.bfloat16 else self._fractions(full, bits, dtype)

    def decode(self, seen: jax.Array, low: Any) -> jax.Array:
        wide: jax.Array = seen.astype(FLOAT32)
        if seen.dtype == jnp.bfloat16:
            full = _float(_word(wide) + _shifted(low, 16 - self.extra))
            return jnp.where(_word(wide) << 1 == 0, wide, full)  # who set it to zero did not know of the rest
        # What is missing is in units of the number next to it. Of zero, whose sign is lost, it has the sign.
        size, is_zero = jnp.abs(wide), wide == 0
        unit = self._unit(_float(_word(size) - ((low < 0) & ~is_zero).astype(jnp.uint32)))
        size = size + low.astype(FLOAT32) * unit
        kept = jnp.where(is_zero, size, jnp.copysign(size, wide))
        return jnp.where(jnp.isfinite(wide) & (low != 0), kept, wide)

    def _halves(self, full: jax.Array, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Halves of a word. A sum of integers continues where a float has its next exponent, so nothing is lost."""
        unused = 16 - self.extra
        # Infinity and NaN as they are, of one kind: on GPUs all bits of a NaN are ones, and sums would overflow.
        exact = jnp.where(jnp.isfinite(full), _word(full), _word(full) & np.uint32(0xFFC00000))
        noise = jnp.where(jnp.isfinite(full), bits >> (32 - unused), 0) if unused else np.uint32(0)
        word = exact + noise
        low = lax.bitcast_convert_type(word - ((word + np.uint32(0x8000)) & _HIGH), jnp.int32) >> unused
        low = low.astype(self.low_dtype)
        # Of what is written beside it, and the noise last: so XLA on TPU makes both in one kernel.
        return _float((exact - _shifted(low, unused) + noise) & _HIGH).astype(jnp.bfloat16), low

    def _fractions(self, full: jax.Array, bits: jax.Array, dtype: DType) -> tuple[jax.Array, jax.Array]:
        """A number, and what is missing in fractions of its last place; both of the magnitude."""
        size = jnp.minimum(jnp.abs(full), float(jnp.finfo(dtype).max))  # type: ignore[no-untyped-call]
        unit, parts = self._unit(size), np.float32(2**self.extra)
        whole = stochastic_floor(bits, size / unit)
        near = jnp.floor(whole / parts + 0.5)
        seen = jnp.where(jnp.isfinite(full), jnp.copysign(near * (parts * unit), full), full)
        low = jnp.where(jnp.isfinite(full), whole - near * parts, 0)
        low = jnp.where(near == 0, jnp.copysign(low, full), low)
        return seen.astype(dtype), low.astype(self.low_dtype)

    @property
    def low_dtype(self) -> DType:
        return np.dtype(f"int{self.extra}")

    def _unit(self, size: jax.Array) -> jax.Array:
        """Of a magnitude in float16, the last place of what is kept."""
        power = _float(_word(size) & np.uint32(0x7F800000))
        return jnp.clip(power, 2.0**-14, 2.0**15) * np.float32(2.0 ** (-10 - self.extra))


def _word(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _float(word: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(word, FLOAT32)


def _shifted(low: jax.Array, by: int) -> jax.Array:
    return lax.bitcast_convert_type(low.astype(jnp.int32) << by, jnp.uint32)


#: Names for formats of parameters, which ``stored`` takes. Parameters of float32 are float32 in all of them.
WEIGHT_FORMATS: dict[str, WeightFormat] = {
    "nearest": Whole(stochastic=False),
    "stochastic": Whole(stochastic=True),
    "split8": Split(8),
    "split16": Split(16),
}


def format_of(low: Any) -> WeightFormat:
    """Returns the format with low bits of this dtype, or one without low bits."""
    return Whole(stochastic=False) if low is None else Split(8 * low.dtype.itemsize)
