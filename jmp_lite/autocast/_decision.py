"""The decision about one equation."""

import enum
from typing import NamedTuple

from jmp_lite._dtypes import DType
from jmp_lite.autocast._values import Known


class How(enum.Enum):
    """How an equation is applied to its operands, which are cast first."""

    BOUND = "the primitive, as written"
    LOWERED = "the primitive, its parameters rewritten for the compute dtype"
    WEIGHTS = "the primitive, weights rounded inside so that their gradients are not"
    PRODUCT = "a matmul of ours: weights rounded inside, its own result dtype"
    WIDE = "the primitive in float32, its result rounded"
    ROUNDED = "multiplied in float32 and rounded; its derivative multiplies in the compute dtype"
    SLOPE = "an activation in float32, its value and its slope rounded"
    DOT = "the matmul that the user gave"
    OP = "the function that the user gave"


class Decision(NamedTuple):
    """The whole decision about an equation, so that nothing is decided twice."""

    dtype: DType | None
    """What its float32 operands are cast to: a compute dtype, float32, or ``None``, which leaves them as held."""
    how: How
    results: tuple[Known, ...]
    reason: str
    result_dtype: DType | None = None
    """Of a matmul: the dtype that its result leaves in."""
    takes_weights: bool = False
    """Whether weights go in as they are, to be rounded inside, so that their gradients are not."""
    tangent: int | None = None
    """Of a user's matmul: the operand in which it must be linear."""
