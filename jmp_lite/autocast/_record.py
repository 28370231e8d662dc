"""What was decided about an equation, for ``explain``."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jmp_lite._compat import Equation, is_literal, source_line
from jmp_lite.autocast._decide import Decision, How
from jmp_lite.autocast._ops import PRODUCTS, Op, OpClass, is_kernel
from jmp_lite.autocast._values import Value


class Record(NamedTuple):
    """What was decided about an equation; the fields of ``jmp.explain``."""

    scope: str
    source: str
    primitive: str
    op_class: str
    tag: str
    in_dtypes: tuple[str, ...]
    out_dtypes: tuple[str, ...]
    reason: str
    group: str = ""
    """Of a matrix product or convolution: ``low``, ``float32``, ``outer`` or ``replaced``; ``kernel``."""
    flops: int = 0
    """Of a product, once."""
    trips: int = 1
    """How often it runs: the length of the scans that it is in."""
    casts: int = 0
    """How many operands are cast for it."""


def record_of(
    eqn: Equation,
    scope: str,
    op: Op,
    *,
    operands: Sequence[Value],
    arrays: Sequence[Any],
    values: Sequence[Value],
    decision: Decision | None,
    reason: str,
) -> Record:
    """Writes down what became of an equation.

    Args:
        eqn: The equation.
        scope: Its name scope.
        op: Its class, or what takes its place.
        operands: Its operands as they were held.
        arrays: The same as it was given them.
        values: Its results.
        decision: What was decided; ``None`` for one that was gone into.
        reason: Why.
    """
    op_class = op.value if isinstance(op, OpClass) else "replaced"
    tag = "/".join(dict.fromkeys(value.tag.name for value in values))
    held, in_dtypes, out_dtypes = (_dtypes(x) for x in ([v.array for v in operands], arrays, [v.array for v in values]))
    if decision is not None and decision.takes_weights:
        in_dtypes = tuple(str(decision.dtype) if dtype == "float32" else dtype for dtype in in_dtypes)
    record = Record(scope, source_line(eqn), eqn.primitive.name, op_class, tag, in_dtypes, out_dtypes, reason)
    if decision is None:
        return record
    pairs = zip(eqn.invars, held, in_dtypes, strict=True)
    casts = sum(not is_literal(v) and before != after for v, before, after in pairs)
    group = _group(record, decision.how)
    return record._replace(group=group, flops=_flops(eqn) if record.primitive in PRODUCTS else 0, casts=casts)


def _dtypes(arrays: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(getattr(array, "dtype", type(array).__name__)) for array in arrays)


def _group(record: Record, how: How) -> str:
    if record.primitive not in PRODUCTS:
        return "kernel" if is_kernel(record.primitive) else ""
    if how in (How.DOT, How.OP):
        return "replaced"
    if record.op_class == OpClass.FOLLOW.value:
        return "outer"
    return "float32" if "float32" in record.in_dtypes[:2] else "low"


def _flops(eqn: Equation) -> int:
    """Returns two for each multiplication of a product; 0 where sizes are symbolic."""
    lhs, rhs, result = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    if eqn.primitive.name == "dot_general":
        terms = math.prod(lhs[axis] for axis in eqn.params["dimension_numbers"][0][0])
    elif eqn.primitive.name == "conv_general_dilated":
        terms = math.prod(rhs) // rhs[eqn.params["dimension_numbers"].rhs_spec[0]]
    else:
        terms = lhs[-1]
    work = 2 * math.prod(result) * terms
    return work if isinstance(work, int) else 0
