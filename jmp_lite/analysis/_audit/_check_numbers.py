"""Checks for numbers that 16 bits cannot hold: literals, epsilons, bounds, integers."""

import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import is_literal
from jmp_lite.analysis._audit._flow import Flow, Node, Number, Value, moves
from jmp_lite.analysis._audit._subject import EXACT_INTEGERS, Subject, found, is_16_bits, is_square
from jmp_lite.analysis._finding import Finding
from jmp_lite.autocast._ops import PRODUCTS

_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "add_any", "rem"})
#: Numbers of this share of the smallest normal one have five bits fewer, and are off by some percent.
_FEW_BITS = 1 / 32
_POSITIONS = frozenset({"iota", "argmax", "argmin"})
_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})


def literals(subject: Subject) -> Iterator[Finding]:
    """Finds literals that become infinite, zero or one in 16 bits, where that matters."""
    for node in subject.flow.nodes:
        dtype = subject.flow.dtype(node.results[0]) if node.results else ""
        if not is_16_bits(dtype):
            continue
        if node.name == "convert_element_type":
            yield from _overflows(subject.flow, node, dtype)
            continue
        for position, operand in enumerate(node.operands):
            number = subject.flow.number(operand)
            if number is None or all(subject.flow.number(v) for v in node.operands):
                continue
            if math.isinf(number.written):
                yield from _of_infinity(subject, node, position, dtype)
            else:
                yield from _of_number(subject.flow, node, position, number, dtype)


def _overflows(flow: Flow, node: Node, dtype: str) -> Iterator[Finding]:
    """Constants that a cast makes infinite: alone, or among the values that it casts."""
    if is_16_bits(flow.dtype(node.operands[0])):
        return
    written = [flow.constants[v] for v, made in flow.backward(node.operands[0], moves) if _is_written(flow, v, made)]
    numbers = np.concatenate([np.zeros(1), *(np.asarray(x).astype(np.float64).ravel() for x in written)])
    finite = numbers[np.isfinite(numbers)]
    worst = float(finite[np.abs(finite).argmax()])
    largest = float(jnp.finfo(dtype).max)  # type: ignore[no-untyped-call]
    beyond = largest * (1 + float(jnp.finfo(dtype).eps) / 4)  # type: ignore[no-untyped-call]
    if abs(worst) > beyond and _has_uses(flow, node):
        yield found("literal-out-of-range", node, f"{worst:g} is infinite in {dtype}, which ends at {largest:g}.")


def _is_written(flow: Flow, value: Value, made: Node | None) -> bool:
    return made is None and value in flow.constants and "float" in flow.dtype(value)


def _has_uses(flow: Flow, node: Node) -> bool:
    """Whether a number has uses other than the bound of a clamp, where infinity does no harm."""
    return any(
        (not moves(user, i) and user.name not in ("min", "max", "clamp", *_COMPARISONS)) or user.name == "select_n"
        for user, i in flow.forward(node.results[0], lambda user, i: moves(user, i) and user.name != "select_n")
    )


def _of_infinity(subject: Subject, node: Node, position: int, dtype: str) -> Iterator[Finding]:
    """An infinity in the program is a finite number that JAX rounded, if NumPy said so on this line, or a mask."""
    is_written = is_literal(node.eqn.invars[position]) and node.name in _ARITHMETIC
    is_filling = node.name in _ARITHMETIC or (node.name in ("select_n", "scatter") and position > 0)
    if is_written or (is_filling and subject.program.overflows(node.site.source)):
        yield found("literal-out-of-range", node, f"The number here, as JAX rounded it, is infinite in {dtype}.")
    elif node.name == "select_n" and dtype == "float16" and position:
        yield found("infinite-mask", node, "Minus infinity fills a float16 array: a softmax of nothing else is NaN.")


def _of_number(flow: Flow, node: Node, position: int, number: Number, dtype: str) -> Iterator[Finding]:
    tiny = float(jnp.finfo(dtype).tiny)  # type: ignore[no-untyped-call]
    if (
        node.name in ("add", "max")
        and 0 <= number.held < tiny * _FEW_BITS
        and (number.written or _was_rounded(node, position))
    ):
        is_zero = number.held == 0
        user = _divides(flow, node, is_strict=node.name == "max" and is_zero)
        if user is not None:
            kind = "literal-out-of-range" if is_zero else "epsilon-subnormal"
            said = f"{number.written:g} is" if number.written else "The number added is"
            what = "0" if is_zero else "subnormal, with few digits and none on devices that flush it to 0,"
            yield found(kind, node, f"{said} {what} in {dtype}, so it does not protect {user.name}.")
    is_bound = node.name == "min" or (node.name == "clamp" and position == 2)
    is_bound = is_bound or (node.name == "select_n" and position > 0 and number.written != 1)
    if is_bound and number.held == 1:
        suffers = _singular_at_one(flow, node)
        if suffers:
            said = f"The bound {number.written:g} is exactly 1 in {dtype}" if number.written != 1 else "The bound is 1"
            yield found("literal-out-of-range", node, f"{said}, so {suffers}.")


def _was_rounded(node: Node, position: int) -> bool:
    """Whether a zero in the program may be a rounded number: nobody adds a literal zero."""
    return node.name in ("add", "max") and is_literal(node.eqn.invars[position])


def _is_singular(flow: Flow, node: Node, position: int, *, is_strict: bool = False) -> bool:
    """Whether an equation or its slope is infinite where the operand is 0."""
    if node.name == "div":
        return position == 1
    if node.name == "integer_pow":
        return bool(node.eqn.params["y"] < 0)
    if node.name == "pow":
        power = flow.number(node.operands[1]) if position == 0 else None
        return power is not None and power.held < (0 if is_strict else 1)
    return node.name in ("log", "log2", "rsqrt") or (node.name == "sqrt" and not is_strict)


def _divides(flow: Flow, node: Node, *, is_strict: bool) -> Node | None:
    """Returns the consumers of a value, of its roots, or below a bound, that are singular at 0."""

    def keeps_zero(user: Node, i: int) -> bool:
        is_bounded = user.name == "min" and flow.number(user.operands[1 - i]) is not None
        return moves(user, i) or user.name == "sqrt" or is_bounded

    uses = flow.forward(node.results[0], keeps_zero)
    return next((user for user, i in uses if _is_singular(flow, user, i, is_strict=is_strict)), None)


#: Functions that are singular at 1, or whose slope is.
_SINGULAR_AT_ONE = frozenset({"atanh", "erf_inv", "acos", "asin", "acosh"})


def _singular_at_one(flow: Flow, node: Node) -> str:
    """Says what is singular where a bounded value is 1: a function of its distance from 1, or of its logarithm."""

    def stays_one(user: Node, i: int) -> bool:
        return moves(user, i) or user.name in ("neg", "sqrt") or is_square(flow, user)

    def becomes_zero(user: Node, position: int) -> str:
        one = flow.number(user.operands[1 - position]) if user.name == "sub" else None
        return "log(x)" if user.name == "log" else "1 - x" if one is not None and one.held == 1 else ""

    for user, position in flow.forward(node.results[0], stays_one):
        if user.name in _SINGULAR_AT_ONE:
            return f"{user.name} gets 1, where it or its slope is infinite"
        if user.name == "log1p":
            return "log1p gets -1"
        if zero := becomes_zero(user, position):
            uses = flow.forward(user.results[0], lambda user, i: moves(user, i) or user.name in ("neg", "sqrt"))
            singular = next((use for use, i in uses if _is_singular(flow, use, i)), None)
            if singular is not None:
                return f"{singular.name} of {zero} gets 0"
    return ""


def integers(subject: Subject) -> Iterator[Finding]:
    """Finds integers that are rounded when cast to 16 bits."""
    flow = subject.flow
    for node in flow.nodes:
        dtype = flow.dtype(node.results[0]) if node.results else ""
        is_made = node.name in ("iota", "convert_element_type") and dtype in EXACT_INTEGERS
        if not is_made or (node.operands and is_16_bits(flow.dtype(node.operands[0]))):
            continue
        largest = _largest_integer(flow, node.results[0]) if _counts(flow, node.results[0]) else None
        if largest is None or largest <= EXACT_INTEGERS[dtype]:
            continue
        if any(use.name in _ARITHMETIC | PRODUCTS for use, _ in flow.forward(node.results[0], moves)):
            limit = EXACT_INTEGERS[dtype]
            message = f"Integers up to {largest} become {dtype}, which holds integers exactly only up to {limit}."
            yield found("integer-rounded", node, message)


def _counts(flow: Flow, value: Value) -> bool:
    """Whether a value is made of positions or other integers that vary, not only of numbers in the program."""
    made_of = flow.backward(value, lambda node, i: moves(node, i) or node.name in _ARITHMETIC)
    return any((node.name in _POSITIONS if node else "int" in flow.dtype(v)) for v, node in made_of)


def _largest_integer(flow: Flow, value: Value, depth: int = 0) -> int | None:
    """Returns the largest magnitude that an integer value can have, if the program tells."""
    if flow.dtype(value) == "bool":
        return 1
    roots = flow.roots(value)
    if len(roots) != 1 or depth > 50:
        return None
    number, made = flow.number(value), flow.producers(value)
    if number is not None:
        return abs(int(number.written)) if float(number.written).is_integer() else None
    if not made:
        return {"uint8": 255, "int8": 128}.get(flow.dtype(value))
    return _largest_of(flow, made[0], depth)


def _largest_of(flow: Flow, node: Node, depth: int) -> int | None:
    def of(position: int) -> int | None:
        return _largest_integer(flow, node.operands[position], depth + 1)

    if node.name == "iota":
        return int(node.eqn.params["shape"][node.eqn.params["dimension"]]) - 1
    if node.name in ("argmax", "argmin"):
        return max(int(flow.avals[node.operands[0]].shape[axis]) for axis in node.eqn.params["axes"]) - 1
    if node.name in ("add", "sub", "mul"):
        first, second = of(0), of(1)
        if first is None or second is None:
            return None
        return first * second if node.name == "mul" else first + second
    if node.name in ("min", "rem"):
        return of(1) if of(0) is None else of(0)
    if node.name in ("select_n", "concatenate", "stack"):
        parts = [of(i) for i in range(len(node.operands)) if moves(node, i)]
        return None if None in parts else max(part for part in parts if part is not None)
    return of(0) if node.operands and moves(node, 0) else None


def one_hot_products(subject: Subject) -> Iterator[Finding]:
    """Finds matmuls that are lookups: one operand is a comparison with positions."""
    flow = subject.flow
    for node, share in subject.products:
        for operand, dtype in zip(node.operands[:2], node.site.in_dtypes, strict=False):
            if not is_16_bits(dtype) or node.site.is_backward:
                continue
            makers = [made for _, made in flow.backward(operand, moves) if made is not None]
            if any(_has_positions(flow, made) if made.name == "eq" else _sets_ones(flow, made) for made in makers):
                message = f"A one-hot matmul looks up rows of an array and returns them in {dtype}."
                yield found("one-hot-product", node, message, share)


def _sets_ones(flow: Flow, node: Node) -> bool:
    """Whether an equation writes ones into zeros, at positions that it is given."""
    if node.name not in ("scatter", "scatter-add"):
        return False
    zero, one = flow.number(node.operands[0]), flow.number(node.operands[2])
    return zero is not None and one is not None and (zero.held, one.held) == (0, 1)


def _has_positions(flow: Flow, comparison: Node) -> bool:
    return any(
        made is not None and made.name == "iota"
        for operand in comparison.operands
        for _, made in flow.backward(operand, moves)
    )


CHECKS = (literals, integers, one_hot_products)
