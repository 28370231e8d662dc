"""Decides, for one equation, in which dtype it runs and how precise its results are. Pure: nothing is computed here."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jmp_lite._compat import Atom, Equation, is_literal
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite.autocast._demand import WANTS_FLOAT32, Want, Wants, agreed
from jmp_lite.autocast._ops import (
    GATHERS,
    KEEPS_BROADCAST,
    Op,
    OpClass,
    moves_whole_arrays,
    picks_values,
    treats_operands_separately,
)
from jmp_lite.autocast._rules import Precision
from jmp_lite.autocast._values import OF_WEIGHTS, Origin, Tag, Value, exceeds, is_as_large, is_eligible, size


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
    if op_class in (OpClass.AS_WRITTEN, OpClass.NESTED):
        return _in_float32(eqn, why)
    if op_class is OpClass.ALLOW and not (
        _is_any_eligible(eqn.invars) and all(is_eligible(v.aval) for v in eqn.outvars)
    ):
        return _in_float32(eqn, "not a product of float32 arrays")
    if op_class is OpClass.ALLOW and precision.dot is not None and eqn.primitive.name == "dot_general":
        return _in_half(eqn, precision.dtype, f"replaced by {getattr(precision.dot, '__name__', precision.dot)}")
    if op_class is OpClass.ALLOW:
        return _in_half(eqn, precision.dtype, why)
    if precision.mode == "low" and _is_made_of_exact_values(eqn, operands):
        return _in_float32(eqn, "made of random numbers or other results that are as written")
    if precision.mode == "low":
        return _in_half(eqn, precision.dtype, precision.reason)
    if op_class is OpClass.DENY:
        return _in_float32(eqn, why)
    return _follow(eqn, operands, precision, wants)


def _in_float32(eqn: Equation, reason: str) -> Decision:
    return Decision(FLOAT32, _tags(eqn, Tag.HIGH), reason)


def _in_half(eqn: Equation, compute_dtype: DType, reason: str) -> Decision:
    return Decision(compute_dtype, _tags(eqn, Tag.LOW), reason)


def _tags(eqn: Equation, tag: Tag) -> tuple[Tag, ...]:
    return tuple(tag if is_eligible(v.aval) else Tag.NEUTRAL for v in eqn.outvars)


def _is_any_eligible(atoms: Sequence[Atom]) -> bool:
    return any(is_eligible(v.aval) for v in atoms)


def _untouched(eqn: Equation) -> Decision:
    return Decision(FLOAT32, (Tag.NEUTRAL,) * len(eqn.outvars), "no float32 array takes part")


def _decide_conversion(eqn: Equation, operand: Value) -> Decision:
    """A cast to float32 of what was float32 is none; one of a narrower float is a wish for float32."""
    source = eqn.invars[0].aval
    if is_eligible(source) and eqn.params["new_dtype"] == FLOAT32:
        return Decision(None, (operand.tag,), "already float32 in the original program: keeps its precision")
    is_upcast = jnp.issubdtype(source.dtype, jnp.floating) and is_eligible(eqn.outvars[0].aval)
    return Decision(None, (Tag.HIGH if is_upcast else Tag.NEUTRAL,), "a cast of the original program")


def _follow(eqn: Equation, operands: Sequence[Value], precision: Precision, wants: Wants) -> Decision:
    compute_dtype = precision.dtype
    floats = [value for v, value in zip(eqn.invars, operands, strict=True) if is_eligible(v.aval)]
    if not floats:
        return _untouched(eqn)
    if treats_operands_separately(eqn.primitive.name) and len(operands) == len(eqn.outvars):
        return Decision(None, tuple(value.tag for value in operands), "every operand keeps its precision")
    if number_of_results(eqn, operands) is not None:
        return Decision(FLOAT32, (operands[0].tag,), "a number, which can be had in any precision")
    name, want = eqn.primitive.name, agreed(wants)
    arrays = [value for v, value in zip(eqn.invars, operands, strict=True) if _is_float_array(v)]
    whole = [value for value in arrays if not _is_repeated(value, eqn.outvars[0].aval.shape)] or floats
    tag, tag_of_whole = (max(value.tag for value in values) for values in (floats, whole))
    is_moved_low = want is Want.LOW and tag is not Tag.HIGH and moves_whole_arrays(name)
    if is_moved_low and not (
        precision.widens_gradients and name not in GATHERS and all(value.is_weight for value in floats)
    ):
        return _in_half(eqn, compute_dtype, "moved in the compute dtype, which costs least")
    is_rearranged = picks_values(name) or moves_whole_arrays(name)
    if tag is Tag.SOFT and len(floats) == 1 and is_rearranged:
        return Decision(None, _tags(eqn, Tag.SOFT), "moved or picked as it is held")
    is_scaled = name in ("mul", "div") and any(value.number is not None for value in floats)
    if all(value.tag is Tag.LOW for value in whole) and tag is Tag.LOW and (is_rearranged or is_scaled):
        return _in_half(eqn, compute_dtype, "as precise in the compute dtype as its operands")
    if want in WANTS_FLOAT32 and _is_any_eligible(eqn.outvars):
        return _in_float32(eqn, "all that use it want float32")
    if tag_of_whole is Tag.HIGH or tag > tag_of_whole is Tag.NEUTRAL:
        return _in_float32(eqn, "follows an operand that needs float32, or is of float32 as a whole")
    if tag_of_whole is Tag.NEUTRAL and any(exceeds(value.number, compute_dtype) for value in floats):
        return _in_float32(eqn, "made of a number that the compute dtype cannot hold")
    if tag_of_whole is Tag.NEUTRAL:
        is_held_low = {value.array.dtype for value in whole} == {compute_dtype}
        reason = "no decision has touched its operands yet"
        return Decision(compute_dtype if is_held_low else FLOAT32, (Tag.NEUTRAL,) * len(eqn.outvars), reason)
    if any(_promotes(value, whole) for value in whole):
        return _in_float32(eqn, "a float32 argument as large as the others promotes")
    if tag is Tag.HIGH or (tag is Tag.SOFT and len(whole) == 1 and len(arrays) > 1):
        return _in_float32(eqn, "scaled or shifted by float32 statistics")._replace(tags=_tags(eqn, Tag.SOFT))
    return _in_half(eqn, compute_dtype, "follows its operands")


def _is_float_array(atom: Atom) -> bool:
    return not is_literal(atom) and is_eligible(atom.aval)


def _is_repeated(value: Value, shape: Sequence[Any]) -> bool:
    """Whether an operand has less to say than the result, such as a bias, a mean, a scale."""
    own = value.array.shape
    return value.origin is Origin.REPEATED or not own or any(a == 1 != b for a, b in zip(own, shape, strict=False))


def _promotes(value: Value, operands: Sequence[Value]) -> bool:
    """Whether an operand is data of its own right beside low ones: a parameter being updated, an accumulator."""
    array, tag, origin, _ = value
    if tag is not Tag.NEUTRAL or origin is not Origin.INPUT or array.dtype != FLOAT32:
        return False
    return any(Tag.NEUTRAL < other.tag < Tag.HIGH and is_as_large(array, other.array) for other in operands)


def origin_of_results(eqn: Equation, operands: Sequence[Value], op: Op, precision: Precision) -> Origin:
    """Returns where the results of an equation come from."""
    if op is OpClass.AS_WRITTEN or _is_made_of_exact_values(eqn, operands):
        return Origin.EXACT
    if _repeats_something_smaller(eqn, operands):
        return Origin.REPEATED
    origins = {value.origin for v, value in zip(eqn.invars, operands, strict=True) if _is_float_array(v)}
    name = eqn.primitive.name
    moves = moves_whole_arrays(name) or name in ("dynamic_slice", "concatenate", "split") or precision.mode == "off"
    return Origin.MOVED if moves and origins and origins <= OF_WEIGHTS else Origin.COMPUTED


def _is_made_of_exact_values(eqn: Equation, operands: Sequence[Value]) -> bool:
    arrays = [value for v, value in zip(eqn.invars, operands, strict=True) if _is_float_array(v)]
    origins = {value.origin for value in arrays}
    return Origin.EXACT in origins and origins <= {Origin.EXACT, Origin.REPEATED}


def number_of_results(eqn: Equation, operands: Sequence[Value]) -> float | None:
    """Returns the number that the result of an equation repeats, if it is known."""
    moves = moves_whole_arrays(eqn.primitive.name) or eqn.primitive.name == "convert_element_type"
    is_one_array = len(eqn.outvars) == 1 and is_eligible(eqn.outvars[0].aval)
    return operands[0].number if moves and is_one_array and is_eligible(eqn.invars[0].aval) else None


def _repeats_something_smaller(eqn: Equation, operands: Sequence[Value]) -> bool:
    name = eqn.primitive.name
    if name == "iota":
        return len(eqn.params["shape"]) > 1
    if name == "broadcast_in_dim":
        source, result = eqn.invars[0], eqn.outvars[0]
        is_copy = operands[0].origin is Origin.REPEATED
        return is_copy or is_literal(source) or size(source.aval) != size(result.aval)
    return name in KEEPS_BROADCAST and all(
        is_literal(v) or value.origin is Origin.REPEATED or getattr(v.aval, "ndim", 1) == 0
        for v, value in zip(eqn.invars, operands, strict=True)
    )
