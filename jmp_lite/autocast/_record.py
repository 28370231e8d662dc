"""Records of decisions, for ``explain``."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jmp_lite._compat import Equation, is_literal, program, scope_names, source_line
from jmp_lite.autocast._decision import Decision, How
from jmp_lite.autocast._ops import PRODUCTS, Op, OpClass, classify, is_kernel
from jmp_lite.autocast._programs import programs_of
from jmp_lite.autocast._values import Value


class Record(NamedTuple):
    """The decision about an equation; the fields of ``jmp.explain``."""

    scope: str
    source: str
    primitive: str
    op_class: str
    tag: str
    in_dtypes: tuple[str, ...]
    out_dtypes: tuple[str, ...]
    reason: str
    group: str = ""
    """Of a matmul or convolution: ``low``, ``float32``, ``outer``, ``replaced`` or ``other``; ``kernel``."""
    flops: int = 0
    """Of a matmul, once. A symbolic size counts as 1."""
    trips: int = 1
    """How often it runs: the length of the scans that it is in."""
    casts: int = 0
    """How many operands are cast for it."""
    skips_dot: bool = False
    """Whether it is a matmul that ``dot=`` was given for, but not applied to."""


def records_of(
    eqn: Equation,
    scope: str,
    op: Op,
    *,
    operands: Sequence[Value],
    arrays: Sequence[Any],
    values: Sequence[Value],
    decision: Decision | None,
    reason: str,
    has_dot: bool,
    inside: Sequence[Record],
) -> list[Record]:
    """Records the decisions about an equation and about the equations in its programs.

    Args:
        eqn: The equation.
        scope: Its name scope.
        op: Its class, or its replacement.
        operands: Its operands as they were held.
        arrays: The operands as it received them.
        values: Its results.
        decision: The decision; ``None`` if its programs were interpreted instead.
        reason: Why.
        has_dot: Whether a function replaces matmuls here.
        inside: Records of the equations inside. Equations that JAX wrote get the line of the call.
    """
    tag = "/".join(dict.fromkeys(value.tag.name for value in values))
    held, in_dtypes, out_dtypes = (_dtypes(x) for x in ([v.array for v in operands], arrays, [v.array for v in values]))
    if decision is not None and decision.takes_weights:
        in_dtypes = tuple(str(decision.dtype) if dtype == "float32" else dtype for dtype in in_dtypes)
    record = Record(scope, _source(eqn), eqn.primitive.name, _name(op), tag, in_dtypes, out_dtypes, reason)
    if decision is None:
        return [record, *(r if r.source else r._replace(source=record.source) for r in inside)]
    pairs = zip(eqn.invars, held, in_dtypes, strict=True)
    casts = sum(not is_literal(v) and before != after for v, before, after in pairs)
    is_replaced = decision.how in (How.DOT, How.OP)
    record = _measured(record._replace(casts=casts), eqn, is_replaced=is_replaced, has_dot=has_dot)
    return [record] if is_replaced else [record, *_inside(eqn, record, has_dot=has_dot)]


def as_count(size: Any) -> int:
    """Returns a size as a number; a symbolic one counts as 1."""
    return size if isinstance(size, int) else 1


def _inside(eqn: Equation, outer: Record, *, has_dot: bool) -> Iterator[Record]:
    """Yields the matmuls and kernels in programs that run as written."""
    trips = outer.trips * as_count(eqn.params.get("length", 1))
    for body in programs_of(eqn).bodies:
        for inner in program(body.jaxpr)[0].eqns:
            scope = "/".join(filter(None, (outer.scope, scope_names(inner.source_info.name_stack))))
            source, op = _source(inner) or outer.source, classify(inner, {})[0]
            in_dtypes, out_dtypes = (_dtypes([v.aval for v in atoms]) for atoms in (inner.invars, inner.outvars))
            about = (scope, source, inner.primitive.name, _name(op), outer.tag)
            record = Record(*about, in_dtypes, out_dtypes, outer.reason, trips=trips)
            record = _measured(record, inner, is_replaced=False, has_dot=has_dot)
            if record.group:
                yield record
            yield from _inside(inner, record, has_dot=has_dot)


def _source(eqn: Equation) -> str:
    """Returns the user's line, or nothing if the only one is the call of ``explain``."""
    line = source_line(eqn)
    return "" if "/jmp_lite/autocast/" in line.replace("\\", "/") else line


def _name(op: Op) -> str:
    return op.value if isinstance(op, OpClass) else "replaced"


def _dtypes(arrays: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(getattr(array, "dtype", type(array).__name__)) for array in arrays)


def _measured(record: Record, eqn: Equation, *, is_replaced: bool, has_dot: bool) -> Record:
    """Adds the figures of a matmul."""
    if record.primitive not in PRODUCTS:
        return record._replace(group="kernel" if is_kernel(record.primitive) else "")
    group = "replaced" if is_replaced else _group(record)
    return record._replace(group=group, flops=_flops(eqn), skips_dot=has_dot and group not in ("replaced", "other"))


def _group(record: Record) -> str:
    if record.op_class in (OpClass.FOLLOW.value, OpClass.DENY.value) and record.primitive == "dot_general":
        return "outer"
    dtypes = [jnp.dtype(name) for name in record.in_dtypes[:2]]
    if any(dtype.itemsize > 4 or not jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return "other"
    return "float32" if any(dtype.itemsize == 4 for dtype in dtypes) else "low"


def _flops(eqn: Equation) -> int:
    """Counts two FLOPs per multiplication of a matmul, except multiplications by the zeros that dilation inserts."""
    lhs, rhs, result = ([as_count(n) for n in v.aval.shape] for v in (*eqn.invars[:2], eqn.outvars[0]))
    params = eqn.params
    if eqn.primitive.name == "conv_general_dilated":
        _, *rest = params["dimension_numbers"].rhs_spec
        work = math.prod(result) * math.prod(rhs[axis] for axis in rest)
        return int(2 * work // math.prod(params["lhs_dilation"]))
    ragged = params.get("ragged_dot_dimension_numbers")
    (_, contracted), (_, batch) = ragged.dot_dimension_numbers if ragged else params["dimension_numbers"]
    shared = {*contracted, *batch, *(ragged.rhs_group_dimensions if ragged else ())}
    return 2 * math.prod(lhs) * math.prod(size for axis, size in enumerate(rhs) if axis not in shared)
