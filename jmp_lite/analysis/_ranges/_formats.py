"""The formats that ranges are judged by, and the magnitudes at which each changes how it rounds."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

#: Formats that statistics tell the fate of numbers in. Numbers in ``int8`` have one scale per array.
FORMATS = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
INT8 = "int8"
#: Classes of magnitudes that share a binary exponent.
CLASSES = 4
EXPONENTS = 256

#: Bits of infinity in float32; those of NaN are beyond.
INFINITY = 0x7F800000


class Edges(NamedTuple):
    """The magnitudes where rounding to a format changes, as bits of the smallest float32 beyond.

    Attributes:
        nonzero: From here on, numbers do not round to zero.
        normal: From here on, numbers keep all their digits.
        overflow: From here on, numbers become infinite or NaN.
    """

    nonzero: int
    normal: int
    overflow: int


def number_of(bits: Any) -> float:
    """Returns the magnitude that has these bits in float32."""
    return float(np.asarray(bits, np.uint32).view(np.float32))


def bits_of(value: float) -> int:
    """Returns the bits of a magnitude in float32; they are ordered as magnitudes are."""
    return int(np.float32(value).view(np.uint32))


@functools.cache
def edges(name: str) -> Edges:
    """Returns the edges of a format: rounding is to nearest, ties to even."""
    dtype = np.dtype(getattr(jnp, name))
    info: Any = jnp.finfo(dtype)  # type: ignore[no-untyped-call]
    least, normal, largest = (float(x) for x in (info.smallest_subnormal, info.smallest_normal, info.max))
    spacing = largest - float(np.nextafter(np.array(largest, dtype), np.array(0, dtype)))
    return Edges(
        _first_beyond(dtype, least / 2, lambda x: x > 0),
        _first_beyond(dtype, normal - least / 2, lambda x: x >= normal),
        _first_beyond(dtype, largest + spacing / 2, lambda x: not np.isfinite(x)),
    )


def _first_beyond(dtype: np.dtype[Any], tie: float, is_beyond: Any) -> int:
    """Returns the bits of the smallest float32 that rounds beyond a tie: the tie itself, or the number after it."""
    bits = min(bits_of(tie), INFINITY)
    if bits == INFINITY:
        return bits
    with np.errstate(over="ignore"):
        return bits if is_beyond(float(np.float32(tie).astype(dtype))) else bits + 1


@functools.cache
def class_table() -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Returns ``uint32[CLASSES - 1, EXPONENTS]``: for each exponent of float32, the bits at which each class begins.

    Zero, infinity and NaN have separate classes.
    """
    starts: dict[int, list[int]] = {0: [1], EXPONENTS - 1: [INFINITY + 1]}
    for name in FORMATS:
        for edge in edges(name):
            if edge & 0x7FFFFF and edge < INFINITY:
                starts.setdefault(edge >> 23, []).append(edge)
    table = np.full((CLASSES - 1, EXPONENTS), 0xFFFFFFFF, np.uint32)
    for exponent, found in starts.items():
        distinct = sorted(set(found))
        table[: len(distinct), exponent] = distinct
    return table


@functools.cache
def class_starts() -> np.ndarray[Any, np.dtype[np.int64]]:
    """Returns ``int64[EXPONENTS * CLASSES]``: the bits of the smallest magnitude of each class, -1 for an empty one."""
    first = (np.arange(EXPONENTS, dtype=np.int64) << 23)[:, None]
    rest = class_table().T.astype(np.int64)
    return np.concatenate([first, np.where(rest == 0xFFFFFFFF, -1, rest)], axis=1).reshape(-1)
