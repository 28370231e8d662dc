"""``diagnose``: what is wrong with the numbers of a program, decided by their consumers."""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp

from jmp_lite.analysis._audit._census import width
from jmp_lite.analysis._finding import Finding, ordered
from jmp_lite.analysis._ranges._formats import INT8
from jmp_lite.analysis._ranges._range import Range, parse_format
from jmp_lite.analysis._ranges._ranges import Ranges, Row
from jmp_lite.autocast._ops import PRODUCTS

#: Of the numbers of a gradient other than zero: more than so many may not become zero.
_LOST = 0.01
#: The same in int8, which takes 1 to 3 % from activations without outliers.
_LOST_IN_INT8 = 0.25
#: From one layer to the next the largest number may not grow more.
_GROWTH = 100.0
#: The largest exponent that ``DynamicLossScale`` grows to by default.
_HIGHEST = 24

#: What an array is called that was counted by itself, without a name.
_UNNAMED = Row("the array", "")


def diagnose(ranges: Ranges, *, format: str = "float16") -> tuple[Finding, ...]:  # noqa: A002  # what it is
    """Says what is wrong with counted numbers, and what would go wrong in a format.

    The consumer decides. A format must hold the operands of matmuls and convolutions, and their results unless the
    program asks for wider ones; an 8-bit format must hold only the operands. Leaves that ``ranges`` counted under a
    name of yours are judged as if the format held them, and count as gradients if the name contains ``grad``.
    Arguments, and values that stay in float32 between matmuls, are judged where a matmul takes them. Zeros do not count
    as underflow.

    Args:
        ranges: Ranges of one step or several, from ``collect`` or ``ranges``.
        format: ``"float16"``, ``"bfloat16"``, ``"float8_e4m3fn"`` or ``"float8_e5m2"`` (without a scale), or ``"int8"``
            (with one scale per array).

    Returns:
        Findings, worst first, of the kinds ``nan``, ``overflow``, ``gradient-underflow``, ``exploding``,
        ``lost-in-int8``, and ``dead``. NaN and infinities spread, so their finding names the first row.

    Raises:
        UnknownDtypeError: If the format is none of these.

    Example:
        >>> grads = {"w": jnp.geomspace(1e-10, 1e-6, 100), "b": jnp.zeros(2)}
        >>> ranges = jmp.analysis.ranges(grads, "gradient")
        >>> for found in jmp.analysis.diagnose(ranges):
        ...     print(found.kind, found.message)
        gradient-underflow 62% of the nonzero numbers of gradient w become zero in float16; a loss scale ...
        dead All 2 numbers of gradient b are zero.
        >>> jmp.analysis.diagnose(ranges, format="bfloat16")[0].kind
        'dead'

    References:
        Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740, section 3.2, on gradients that underflow in
        float16 and the scale that moves them.
    """
    view = _View.of(ranges, parse_format(format))
    return ordered(finding for check in CHECKS for finding in check(view))


class _View(NamedTuple):
    """Ranges as a format sees them.

    Attributes:
        format: Its name.
        pairs: All ranges that were counted at least once, in program order.
    """

    format: str
    pairs: tuple[tuple[Row, Range], ...]

    @classmethod
    def of(cls, ranges: Ranges, name: str) -> "_View":
        return cls(name, tuple((row if str(row) else _UNNAMED, found) for row, found in ranges.pairs if found.count))

    @property
    def taken(self) -> Iterator[tuple[Row, Range]]:
        """Operands and results of matmuls, results of the program, and leaves that the user named."""
        return ((row, r) for row, r in self.pairs if (_is_product(row) if row.site else row.kind != "argument"))

    @property
    def held(self) -> Iterator[tuple[Row, Range]]:
        """Numbers that the format holds: operands and results of its matmuls, and leaves that the user named."""
        return ((row, r) for row, r in self.taken if (_is_held(row, self.format) if row.site else row.kind != "result"))

    @property
    def gradients(self) -> Iterator[tuple[Row, Range]]:
        """Numbers that the format holds in the backward pass, whose matmuls make gradients and cotangents."""
        return ((row, r) for row, r in self.held if _is_gradient(row))


def _is_product(row: Row) -> bool:
    return row.site is not None and row.site.primitive in PRODUCTS


def _is_held(row: Row, name: str) -> bool:
    """Whether a format holds an operand or result of a matmul."""
    if row.site is None or row.name != "out":
        return True
    taken = max(map(width, row.site.in_dtypes[:2]), default=0)
    asks_for_wider = taken <= 2 and max(map(width, row.site.out_dtypes)) > taken
    return not asks_for_wider and jnp.dtype(name).itemsize == 2


def _is_gradient(row: Row) -> bool:
    return "grad" in row.kind.lower() if row.site is None else row.site.is_backward and row.name == "out"


def _finding(kind: str, message: str, row: Row, share: float) -> Finding:
    where = (row.site.source, row.site.scope) if row.site else ("", row.name)
    return Finding(kind, message, *where, share=share)


def _nans(view: _View) -> Iterator[Finding]:
    broken = [(row, r) for row, r in view.taken if r.nan]
    for row, r in broken[:1]:
        yield _finding("nan", f"{r.nan} of {r.count} numbers of {row} are NaN{_others(broken)}.", row, r.nan / r.count)


def _infinities(view: _View) -> Iterator[Finding]:
    broken = [(row, r) for row, r in view.taken if r.inf]
    for row, r in broken[:1]:
        said = f"{r.inf} of {r.count} numbers of {row} are infinite{_others(broken)}."
        yield _finding("overflow", said, row, r.inf / r.count)


def _others(broken: list[tuple[Row, Range]]) -> str:
    return f", the first of {len(broken)} rows that have some" if len(broken) > 1 else ""


def _overflow(view: _View) -> Iterator[Finding]:
    """One finding per equation, for its worst operand or result."""
    beyond: dict[object, tuple[float, Row, Range]] = {}
    for row, r in view.held:
        share, key = r.fates[view.format].overflow, row.site or row
        if share > beyond.get(key, (0.0,))[0]:
            beyond[key] = (share, row, r)
    for share, row, r in beyond.values():
        said = f"{_percent(share)} of the finite numbers of {row} are beyond {view.format}, the largest {r.largest:.3g}"
        yield _finding("overflow", f"{said}.", row, share)


def _underflow(view: _View) -> Iterator[Finding]:
    if jnp.dtype(view.format).itemsize != 2:
        return  # recipes of 8 bits have a scale for each array
    gradients = list(view.gradients)
    lost = [(share, row) for row, r in gradients if (share := _lost(row, r, view.format)) > _LOST]
    if not lost:
        return
    share, row = max(lost, key=lambda pair: pair[0])
    more = f" (and more than {_LOST:.0%} of {len(lost) - 1} more of {len(gradients)} gradients)" if lost[1:] else ""
    said = f"{_percent(share)} of the nonzero numbers of {row} become zero in {view.format}{more}"
    yield _finding("gradient-underflow", f"{said}; {_scale(view.format, gradients)}.", row, share)


def _all_lost(view: _View) -> Iterator[Finding]:
    """Cotangents that are all zero where a matmul in the format takes them, although gradients elsewhere are not."""
    if jnp.dtype(view.format).itemsize != 2:
        return
    zeros = [
        (row, r)
        for row, r in view.held
        if row.site and row.site.is_backward and row.name != "out" and r.zero == r.count
        if view.format in row.site.in_dtypes
    ]
    small = [
        (row, r)
        for row, r in view.pairs
        if (row.kind == "result" or _is_gradient(row)) and r.fates[view.format].underflow > _LOST
    ]
    if zeros and small:
        row, r = zeros[0]
        said = f"All {r.count} numbers of {row} are zero in {view.format}, where {small[0][0]} has magnitudes of "
        said += f"{small[0][1].largest:.3g}; {_scale(view.format, small)}."
        yield _finding("gradient-underflow", said, row, 1.0)


def _lost(row: Row, r: Range, name: str) -> float:
    """The share of nonzero numbers that become zero.

    Numbers already in the format have lost them: as many, or fewer, are left in the last binade above zero.
    """
    nonzero = sum(r.exponents.values())
    if row.site is None or name not in row.site.out_dtypes or not nonzero:
        return r.fates[name].underflow
    least = round(math.log2(float(jnp.finfo(name).smallest_subnormal)))  # type: ignore[no-untyped-call]
    return r.exponents.get(least, 0) / nonzero


def _scale(name: str, gradients: Iterable[tuple[Row, Range]]) -> str:
    """Names the largest power of two that leaves the largest gradient another doubling."""
    headroom = min(r.fates[name].headroom for _, r in gradients)
    power = min(math.floor(headroom - 1), _HIGHEST)
    if power < 1:
        return "no loss scale helps, because the largest gradient leaves no room"
    return f"a loss scale 2**{power} = {2**power} times the present one leaves the largest gradient room to double"


def _exploding(view: _View) -> Iterator[Finding]:
    """Compares layers in program order: scopes that are the same or differ only in their numbers."""
    families: dict[tuple[str, str, bool], dict[object, tuple[float, Row]]] = {}
    for row, r in view.pairs:
        if row.site is None or row.name != "out":
            continue
        family = (re.sub(r"\d+", "*", row.site.scope), row.site.primitive, row.site.is_backward)
        layers = families.setdefault(family, {})
        layer = row.site.scope if re.search(r"\d", row.site.scope) else row.site.number
        layers[layer] = max(layers.get(layer, (0.0, row)), (r.largest, row), key=lambda one: one[0])
    for layers in families.values():
        in_order = list(layers.values())
        for (before, first), (after, row) in itertools.pairwise(in_order):
            if before and after > max(_GROWTH * before, 1.0):
                said = f"The largest number grows {after / before:.3g} times, from {before:.3g} in {first} to "
                yield _finding("exploding", f"{said}{after:.3g} in {row}.", row, 1 - before / after)


def _int8(view: _View) -> Iterator[Finding]:
    if view.format != INT8:
        return
    for row, r in view.held:
        lost = r.fates[INT8].underflow
        if lost > _LOST_IN_INT8:
            said = f"In int8 with one scale, {_percent(lost)} of the nonzero numbers of {row} become zero, because "
            yield _finding("lost-in-int8", f"{said}the largest is {r.largest / r.rms:.3g} times the rms.", row, lost)


def _dead(view: _View) -> Iterator[Finding]:
    """Finds arrays that are all zero, except arguments, such as weights that start at zero."""
    given = {r.count for row, r in view.pairs if row.kind == "argument" and r.zero == r.count}
    for row, r in view.pairs:
        is_operand = row.site is not None and _is_product(row) and not row.site.is_backward and row.name != "out"
        is_looked_at = is_operand and r.count not in given if row.site else _is_gradient(row)
        if is_looked_at and r.zero == r.count:
            yield _finding("dead", f"All {r.count} numbers of {row} are zero.", row, 0.0)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


CHECKS: tuple[Callable[[_View], Iterable[Finding]], ...] = (
    _nans,
    _infinities,
    _overflow,
    _underflow,
    _all_lost,
    _exploding,
    _int8,
    _dead,
)
