"""The range of an array, read from a tally, and its rounding in each format."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jmp_lite._dtypes import dtype_or_none
from jmp_lite._messages import quote
from jmp_lite.analysis._ranges._formats import (
    CLASSES,
    EXPONENTS,
    FORMATS,
    INFINITY,
    INT8,
    class_starts,
    edges,
    number_of,
)
from jmp_lite.analysis._ranges._tally import ROUNDED, Tally
from jmp_lite.errors import UnknownDtypeError


class Fate(NamedTuple):
    """How a format would round the numbers.

    Attributes:
        overflow: Share of the finite numbers that become infinite or NaN.
        underflow: Share of the nonzero numbers that become zero.
        subnormal: Share of the nonzero numbers that lose digits because they are so small.
        rms_error: Root mean square of the rounding errors over the root mean square of the numbers, without overflows.
        headroom: How many times the largest can double before it overflows; infinite for zeros.

    Example:
        >>> fate = jmp.analysis.ranges(jnp.array([1.0, 1e6, 1e-9, 1e-5]))[""].fates["float16"]
        >>> fate.overflow, fate.underflow, fate.subnormal
        (0.25, 0.25, 0.25)
    """

    overflow: float
    underflow: float
    subnormal: float
    rms_error: float
    headroom: float


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of the numbers in an array, or in all arrays that an equation made.

    Attributes:
        count: How many numbers.
        nan: How many are NaN.
        inf: How many are infinite.
        zero: How many are zero.
        largest: Largest finite magnitude.
        smallest: Smallest magnitude that is not zero; ``inf`` if there is none.
        mean: Mean of the finite numbers.
        rms: Root of the mean of their squares.
        exponents: Number of finite nonzero numbers by binary exponent; -127 stands for float32's subnormal numbers.
        fates: How ``float16``, ``bfloat16``, ``float8_e4m3fn``, ``float8_e5m2`` and ``int8`` (with a scale from the
            largest) would round them.

    Example:
        >>> found = jmp.analysis.ranges(jnp.array([0.0, 0.5, 3.0, jnp.nan]))[""]
        >>> found.count, found.nan, found.zero, found.largest, dict(found.exponents)
        (4, 1, 1, 3.0, {-1: 1, 1: 1})
    """

    count: int
    nan: int
    inf: int
    zero: int
    largest: float
    smallest: float
    mean: float
    rms: float
    exponents: Mapping[int, int]
    fates: Mapping[str, Fate]

    @property
    def is_finite(self) -> bool:
        """Whether there is no NaN and no infinity."""
        return self.nan == self.inf == 0

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers, names and dictionaries."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found["exponents"] = {str(key): value for key, value in self.exponents.items()}
        found["fates"] = {name: fate._asdict() for name, fate in self.fates.items()}
        return found


def range_of(counted: Tally) -> Range:
    """Reads a tally on the host or a device."""
    counts = np.asarray(counted.classes, np.int64)
    starts = class_starts()
    nonzero, finite = counts[(starts > 0) & (starts < INFINITY)], counts[(starts >= 0) & (starts < INFINITY)]
    n_finite, n_nonzero = int(finite.sum()), int(nonzero.sum())
    unit = 2.0 ** float(counted.power)
    rms = math.sqrt(float(counted.square) / n_finite) * unit if n_finite else 0.0
    by_exponent = np.where(starts > 0, counts, 0).reshape(EXPONENTS, CLASSES).sum(1)
    largest = number_of(counted.largest)

    def share(low: int, high: int, of: int) -> float:
        return float(counts[(starts >= low) & (starts < high)].sum()) / of if of else 0.0

    errors = dict(zip(ROUNDED, np.asarray(counted.errors, np.float64), strict=True))
    relative = {name: math.sqrt(e / float(counted.square)) if counted.square else 0.0 for name, e in errors.items()}
    fates = {INT8: Fate(0.0, int(counted.lost_in_int8) / max(n_nonzero, 1), 0.0, relative[INT8], 0.0)}
    for name in FORMATS:
        edge = edges(name)
        limit = float(jnp.finfo(name).max)  # type: ignore[no-untyped-call]
        fates[name] = Fate(
            share(edge.overflow, INFINITY, n_finite),
            share(1, edge.nonzero, n_nonzero),
            share(edge.nonzero, edge.normal, n_nonzero),
            relative[name],
            math.log2(limit / largest) if largest else math.inf,
        )
    return Range(
        count=int(counts.sum()),
        nan=int(counts[starts > INFINITY].sum()),
        inf=int(counts[starts == INFINITY].sum()),
        zero=n_finite - n_nonzero,
        largest=largest,
        smallest=number_of(counted.smallest),
        mean=float(counted.total) * unit / n_finite if n_finite else 0.0,
        rms=rms,
        exponents={int(e) - 127: int(n) for e, n in enumerate(by_exponent[:-1]) if n},
        fates={name: fates[name] for name in ROUNDED},
    )


def parse_format(name: str) -> str:
    """Returns the full name of a format that ranges know.

    Raises:
        UnknownDtypeError: If it is none of these.
    """
    dtype = dtype_or_none(name)
    known = name if name == INT8 else dtype.name if dtype is not None else ""
    if known not in ROUNDED:
        raise UnknownDtypeError(f"Unknown format {quote(name)}. Accepted: {', '.join(ROUNDED)}.")
    return known
