"""Counts of an array on the device: a few sums that can be added over iterations, steps and devices."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jmp_lite._dtypes import FLOAT32
from jmp_lite.analysis._ranges._formats import CLASSES, EXPONENTS, FORMATS, INFINITY, INT8, class_table, edges

#: The formats that the error of rounding is added up for.
ROUNDED = (*FORMATS, INT8)
#: What float32 arithmetic keeps on every platform: some flush smaller numbers to zero.
_LEAST_EXPONENT = -126


class Tally(NamedTuple):
    """Sums over the numbers of arrays.

    Attributes:
        classes: ``uint32[1024]``, how many magnitudes are in each class of ``_formats``.
        largest: Bits of the largest finite magnitude, in float32: they are ordered as magnitudes are.
        smallest: Bits of the smallest nonzero magnitude; of infinity if there is none.
        power: Exponent of two that the sums are divided by, so that none overflows.
        total: Sum of the finite numbers, divided by ``2**power``.
        square: Sum of their squares, divided by ``4**power``.
        errors: ``float32[5]``, for each of ``ROUNDED`` the sum of squared rounding errors, divided by ``4**power``,
            without numbers that overflow.
        lost_in_int8: How many nonzero numbers become zero in ``int8`` with a scale from the largest.
    """

    classes: jax.Array
    largest: jax.Array
    smallest: jax.Array
    power: jax.Array
    total: jax.Array
    square: jax.Array
    errors: jax.Array
    lost_in_int8: jax.Array


def empty() -> Tally:
    """Returns the tally of no numbers."""
    zero = jnp.float32(0)
    return Tally(
        jnp.zeros(EXPONENTS * CLASSES, jnp.uint32),
        jnp.uint32(0),
        jnp.uint32(INFINITY),
        jnp.float32(_LEAST_EXPONENT),
        zero,
        zero,
        jnp.zeros(len(ROUNDED), jnp.float32),
        jnp.uint32(0),
    )


@jax.jit
def tally(x: jax.Array) -> Tally:
    """Counts a floating array of any shape; float64 as float32."""
    x = lax.convert_element_type(x, FLOAT32)
    if x.size == 0:
        return empty()
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7FFFFFFF)
    is_finite, is_zero = bits < jnp.uint32(INFINITY), bits == jnp.uint32(0)
    largest = jnp.max(jnp.where(is_finite, bits, 0))
    power = jnp.clip(_exponent(largest), _LEAST_EXPONENT, 126)
    scaled = jnp.where(is_finite, _scaled(x, bits, power), 0)
    rounding = [_error(scaled, bits, name, power) for name in ROUNDED]
    return Tally(
        _classes(bits),
        largest,
        jnp.min(jnp.where(is_finite & ~is_zero, bits, INFINITY)),
        power.astype(jnp.float32),
        _sum(scaled),
        _sum(scaled * scaled),
        jnp.stack([_sum(error * error) for error in rounding]),
        jnp.sum(is_finite & ~is_zero & (scaled == rounding[-1]), dtype=jnp.uint32),
    )


def merged(first: Tally, second: Tally) -> Tally:
    """Adds two tallies."""
    power = jnp.maximum(first.power, second.power)

    def added(field: str, base: float) -> jax.Array:
        def scaled(one: Tally) -> Any:
            unit = jnp.exp2(np.log2(base) * (one.power - power))
            return getattr(one, field) * (unit[..., None] if field == "errors" else unit)

        summed: jax.Array = scaled(first) + scaled(second)
        return summed

    return Tally(
        first.classes + second.classes,
        jnp.maximum(first.largest, second.largest),
        jnp.minimum(first.smallest, second.smallest),
        power,
        added("total", 2),
        added("square", 4),
        added("errors", 4),
        first.lost_in_int8 + second.lost_in_int8,
    )


def stacked(tallies: Sequence[Tally]) -> Tally:
    """Returns several tallies as one, along an axis that comes first in a tally of one array.

    A program that returns a thousand small arrays takes milliseconds longer to call.
    """
    if not tallies:
        none: Tally = jax.tree.map(lambda field: jnp.zeros((0, *field.shape), field.dtype), empty())
        return none
    all_of_them: Tally = jax.tree.map(lambda *fields: jnp.stack(fields), *tallies)
    return all_of_them


def across(local: Tally, axes: Any) -> Tally:
    """Sums the tallies of the devices along mesh axes."""
    power = lax.pmax(local.power, axes)
    unit = jnp.exp2(local.power - power)
    return Tally(
        lax.psum(local.classes, axes),
        lax.pmax(local.largest, axes),
        lax.pmin(local.smallest, axes),
        power,
        lax.psum(local.total * unit, axes),
        lax.psum(local.square * unit**2, axes),
        lax.psum(local.errors * unit**2, axes),
        lax.psum(local.lost_in_int8, axes),
    )


def only_if(condition: Any, found: Tally) -> Tally:
    """Returns a tally, or the empty one."""
    chosen: Tally = jax.tree.map(lambda one, nothing: jnp.where(condition, one, nothing), found, empty())
    return chosen


def _exponent(bits: jax.Array) -> jax.Array:
    exponent: jax.Array = (bits >> jnp.uint32(23)).astype(jnp.int32) - 127
    return exponent


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _scaled(x: jax.Array, bits: jax.Array, power: jax.Array) -> jax.Array:
    """Divides by ``2**power``; reads subnormal numbers from their bits, as some platforms take them for zero."""
    digits = jnp.where(lax.bitcast_convert_type(x, jnp.uint32) == bits, 1, -1) * bits.astype(jnp.int32)
    subnormal = digits.astype(jnp.float32) * _power_of_two(jnp.maximum(_LEAST_EXPONENT - 23 - power, _LEAST_EXPONENT))
    return jnp.where(bits >> jnp.uint32(23) == 0, subnormal, x * _power_of_two(-power))


def _classes(bits: jax.Array) -> jax.Array:
    exponent = (bits >> jnp.uint32(23)).astype(jnp.int32)
    table = jnp.asarray(class_table())
    index = exponent * CLASSES
    for starts in table:
        index += (bits >= starts[exponent]).astype(jnp.int32)
    return jnp.zeros(EXPONENTS * CLASSES, jnp.uint32).at[index].add(jnp.uint32(1))


def _error(scaled: jax.Array, bits: jax.Array, name: str, power: jax.Array) -> jax.Array:
    """Returns the rounding errors of a format, scaled like the numbers; zero where the format overflows."""
    if name == INT8:
        largest = jnp.max(jnp.abs(scaled))
        spacing = jnp.where(largest == 0, 1, largest / 127)
        return scaled - jnp.round(scaled / spacing) * spacing
    info: Any = jnp.finfo(name)  # type: ignore[no-untyped-call]
    least = round(float(np.log2(float(info.smallest_subnormal))))
    exponent = jnp.maximum(_exponent(bits) - info.nmant, least) - power
    spacing = _power_of_two(jnp.clip(exponent, _LEAST_EXPONENT, 127))
    return jnp.where(bits < jnp.uint32(edges(name).overflow), scaled - jnp.round(scaled / spacing) * spacing, 0)


def _sum(x: jax.Array) -> jax.Array:
    """Sums in rounds of 16, so that errors grow with the logarithm of the size."""
    for axis in reversed(range(x.ndim)):
        while (size := x.shape[axis]) > 1:
            rows = min(16, size)
            padding = [(0, 0, 0)] * x.ndim
            padding[axis] = (0, -size % rows, 0)
            x = lax.pad(x, np.float32(0), padding)
            x = jnp.sum(x.reshape(*x.shape[:axis], rows, -1, *x.shape[axis + 1 :]), axis=axis)
        x = jnp.squeeze(x, axis)
    return x
