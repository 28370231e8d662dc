"""What becomes of ``dimension_numbers`` when a matmul is transposed or mapped.

The axes of the result of ``lax.dot_general`` are those over which both operands are batched, then the other axes of the
left operand that are not contracted, then those of the right one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

Axes = tuple[int, ...]


class Dimensions(NamedTuple):
    """``dimension_numbers`` of ``lax.dot_general``: axes of the left and of the right operand."""

    contracted: tuple[Axes, Axes]
    batched: tuple[Axes, Axes]

    def kept(self, side: int, ndim: int) -> Axes:
        """Returns the axes of an operand (0: left, 1: right) that are neither contracted nor batched."""
        used = {*self.contracted[side], *self.batched[side]}
        return tuple(axis for axis in range(ndim) if axis not in used)


def dimensions(dimension_numbers: Any) -> Dimensions:
    """Converts the nested sequences that ``lax.dot_general`` takes."""
    (contracted, batched) = ([tuple(int(axis) for axis in axes) for axes in pair] for pair in dimension_numbers)
    return Dimensions((contracted[0], contracted[1]), (batched[0], batched[1]))


class Transposed(NamedTuple):
    """The matmul of a cotangent and one operand that is the cotangent of the other operand, the wanted one."""

    dims: Dimensions
    axes: Axes
    """Which axis of the wanted operand each axis of that matmul is."""
    position: int
    """Which operand of that matmul the cotangent is: the one that the wanted operand was."""

    def ordered(self, cotangent: Any, other: Any) -> tuple[Any, Any]:
        """Returns the cotangent and the other operand, left one first."""
        return (cotangent, other) if self.position == 0 else (other, cotangent)

    @property
    def permutation(self) -> list[int]:
        """What ``lax.transpose`` needs to give the matmul the layout of the operand."""
        return [self.axes.index(axis) for axis in range(len(self.axes))]


def transposed(dims: Dimensions, ndims: Sequence[int], side: int) -> Transposed:
    """Transposes a matmul of arrays of these ranks with respect to one side.

    The cotangent takes the place of the wanted operand, so that the matmul mostly has the layout of the latter.

    Args:
        dims: Of the matmul.
        ndims: Ranks of the left and the right operand.
        side: Which operand a cotangent is wanted of: 0 or 1.
    """
    other = 1 - side
    kept, others_kept = dims.kept(side, ndims[side]), dims.kept(other, ndims[other])
    n_batched = len(dims.batched[side])
    first = n_batched + (0 if side else len(kept))
    in_cotangent = tuple(range(first, first + len(others_kept)))
    pairs = sorted(zip(dims.contracted[other], dims.contracted[side], strict=True))
    summed = tuple(axis for _, axis in pairs)
    contracted, batched = (in_cotangent, others_kept), (tuple(range(n_batched)), dims.batched[other])
    if side == 0:
        return Transposed(Dimensions(contracted, batched), (*dims.batched[side], *kept, *summed), side)
    swapped = Dimensions((contracted[1], contracted[0]), (batched[1], batched[0]))
    return Transposed(swapped, (*dims.batched[side], *summed, *kept), side)


def mapped(dims: Dimensions, lhs_ndim: int, is_mapped: Sequence[bool]) -> tuple[Dimensions, int]:
    """Returns the dimension numbers of a matmul whose mapped operands have one more axis, the first.

    Two mapped operands are batched over it; one alone has one more axis that is kept.

    Args:
        dims: Of the matmul for one index of the mapped axis.
        lhs_ndim: Rank of the left operand; it counts only if that one is not mapped.
        is_mapped: Which operands are mapped.

    Returns:
        Dimension numbers, and the axis of the result that is the mapped one.
    """

    def moved(axes: Axes, side: int) -> Axes:
        return tuple(axis + is_mapped[side] for axis in axes)

    contracted = moved(dims.contracted[0], 0), moved(dims.contracted[1], 1)
    batched = moved(dims.batched[0], 0), moved(dims.batched[1], 1)
    if all(is_mapped):
        return Dimensions(contracted, ((0, *batched[0]), (0, *batched[1]))), 0
    lhs_kept = 0 if is_mapped[0] else len(dims.kept(0, lhs_ndim))
    return Dimensions(contracted, batched), len(dims.batched[0]) + lhs_kept
