"""Decides, for one equation, in which dtype it runs and how precise its results are. Pure: nothing is computed here."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jmp_lite._compat import Atom, Equation, is_literal
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite.autocast._demand import Want, Wants
from jmp_lite.autocast._ops import KEEPS_BROADCAST, Op, OpClass, moves_whole_arrays, treats_operands_separately
from jmp_lite.autocast._rules import Precision
from jmp_lite.autocast._values import Tag, Value, is_as_large, is_eligible, size


class Decision(NamedTuple):
    """What becomes of an equation.

    ``dtype`` is what its float32 operands are cast to: a compute dtype; float32, which is what they were written as;
    or ``None``, which leaves them as they are held.
    """

    dtype: DType | None
    tags: tuple[Tag, ...]
    reason: str


def decide(
    eqn: Equation, operands: Sequence[Value], op: tuple[Op, str], precision: Precision, wants: Wants
) -> Decision:
    """Decides about an equation that holds no other program.

    Args:
        eqn: The equation, of the original program.
        operands: Its operands, as they are held.
        op: The class of its primitive, or a function that takes its place, and why.
        precision: What rules and regions say.
        wants: What the consumers of each result want.
    """
    op_class, why = op
    if precision.mode == "off":
        return Decision(FLOAT32, (Tag.NEUTRAL,) * len(eqn.outvars), precision.reason)
    if precision.mode == "full":
        return _in_float32(eqn, precision.reason)
    if eqn.primitive.name == "convert_element_type":
        return _decide_conversion(eqn, operands[0])
    if not isinstance(op_class, OpClass):
        return _in_half(eqn, precision.dtype, f"replaced by a function {why}")
    if op_class in (OpClass.EXACT, OpClass.NESTED):
        return _in_float32(eqn, why)
    if op_class is OpClass.ALLOW:
        return _in_half(eqn, precision.dtype, why) if _results_are_eligible(eqn) else _untouched(eqn)
    if precision.mode == "low":
        return _in_half(eqn, precision.dtype, precision.reason)
    if op_class is OpClass.DENY:
        return _in_float32(eqn, why)
    return _follow(eqn, operands, precision.dtype, wants)


def _in_float32(eqn: Equation, reason: str) -> Decision:
    tags = tuple(Tag.HIGH if is_eligible(v.aval) else Tag.NEUTRAL for v in eqn.outvars)
    return Decision(FLOAT32, tags, reason)


def _in_half(eqn: Equation, compute_dtype: DType, reason: str) -> Decision:
    tags = tuple(Tag.LOW if is_eligible(v.aval) else Tag.NEUTRAL for v in eqn.outvars)
    return Decision(compute_dtype, tags, reason)


def _results_are_eligible(eqn: Equation) -> bool:
    return all(is_eligible(v.aval) for v in eqn.outvars)


def _untouched(eqn: Equation) -> Decision:
    return Decision(FLOAT32, (Tag.NEUTRAL,) * len(eqn.outvars), "no float32 array takes part")


def _decide_conversion(eqn: Equation, operand: Value) -> Decision:
    """A cast to float32 of what was float32 is none; one of a narrower float is a wish for float32."""
    source = eqn.invars[0].aval
    if is_eligible(source) and eqn.params["new_dtype"] == FLOAT32:
        return Decision(None, (operand.tag,), "already float32 in the original program: keeps its precision")
    is_upcast = jnp.issubdtype(source.dtype, jnp.floating) and is_eligible(eqn.outvars[0].aval)
    return Decision(None, (Tag.HIGH if is_upcast else Tag.NEUTRAL,), "a cast of the original program")


def _follow(eqn: Equation, operands: Sequence[Value], compute_dtype: DType, wants: Wants) -> Decision:
    floats = [value for v, value in zip(eqn.invars, operands, strict=True) if is_eligible(v.aval)]
    if not floats:
        return _untouched(eqn)
    if treats_operands_separately(eqn.primitive.name) and len(operands) == len(eqn.outvars):
        return Decision(None, tuple(value.tag for value in operands), "every operand keeps its precision")
    agreed = {want for want in wants if want is not None}
    tag = max(value.tag for value in floats)
    if agreed == {Want.HIGH} and any(is_eligible(v.aval) for v in eqn.outvars):
        return _in_float32(eqn, "all that use it want float32")
    if agreed == {Want.LOW} and tag is not Tag.HIGH and moves_whole_arrays(eqn.primitive.name):
        return _in_half(eqn, compute_dtype, "moved after the cast: all that use it want the compute dtype")
    if tag is Tag.HIGH:
        return _in_float32(eqn, "follows an operand that needs float32")
    arrays = [value for v, value in zip(eqn.invars, operands, strict=True) if _is_float_array(v)]
    if tag is Tag.LOW:
        if any(_promotes(value, arrays) for value in arrays):
            return _in_float32(eqn, "a float32 operand as large as the others promotes")
        return _in_half(eqn, compute_dtype, "follows its operands")
    if {value.array.dtype for value in arrays} == {compute_dtype}:
        return Decision(compute_dtype, (Tag.NEUTRAL,) * len(eqn.outvars), "its operands are held in the compute dtype")
    return Decision(FLOAT32, (Tag.NEUTRAL,) * len(eqn.outvars), "no decision has touched its operands yet")


def _is_float_array(atom: Atom) -> bool:
    return not is_literal(atom) and is_eligible(atom.aval)


def _promotes(value: Value, operands: Sequence[Value]) -> bool:
    """Whether an untouched float32 operand is data of its own right beside low ones: an accumulator, a parameter."""
    array, tag, is_broadcast = value
    if tag is not Tag.NEUTRAL or is_broadcast or array.dtype != FLOAT32 or array.ndim == 0 or size(array) == 1:
        return False
    return any(other.tag is Tag.LOW and is_as_large(array, other.array) for other in operands)


def repeats_something_smaller(eqn: Equation, operands: Sequence[Value]) -> bool:
    """Whether the results of an equation hold no more information than a smaller array."""
    name = eqn.primitive.name
    if name == "iota":
        return True
    if name == "broadcast_in_dim":
        source, result = eqn.invars[0], eqn.outvars[0]
        grew = is_literal(source) or size(source.aval) != size(result.aval)
        return grew or operands[0].is_broadcast
    return (
        name in KEEPS_BROADCAST
        and bool(operands)
        and all(
            is_literal(v) or value.is_broadcast or getattr(v.aval, "ndim", 1) == 0
            for v, value in zip(eqn.invars, operands, strict=True)
        )
    )
