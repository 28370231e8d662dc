"""Decides in which dtype an equation runs, how, and what is known of its results. Computes nothing."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jmp_lite._compat import Equation
from jmp_lite._dtypes import FLOAT32
from jmp_lite.autocast import _demand, _ops
from jmp_lite.autocast._decision import Decision, How
from jmp_lite.autocast._demand import Want, Wants, is_float32, joined
from jmp_lite.autocast._facts import Facts
from jmp_lite.autocast._follow import FOLLOWS
from jmp_lite.autocast._ops import Op, OpClass
from jmp_lite.autocast._rules import Precision
from jmp_lite.autocast._values import Known, Tag, Value, is_as_large, is_eligible, size
from jmp_lite.errors import InvalidRuleError
from jmp_lite.products._matmul import RoundsOperands, product_of


def decide(
    eqn: Equation, operands: Sequence[Value], op: tuple[Op, str], precision: Precision, wants: Wants
) -> Decision:
    """Decides about an equation that runs as a whole.

    Args:
        eqn: The equation, from the original program.
        operands: Its operands, as they are held.
        op: The class of its primitive, or a function that replaces it, and why.
        precision: What rules and regions say.
        wants: What the consumers of each result want.
    """
    op_class, why = op
    facts = Facts(eqn, operands, op_class, precision, joined(wants))
    if precision.mode == "off":
        return _float32(facts, Tag.NEUTRAL, precision.reason)
    if precision.mode == "full":
        return _float32(facts, Tag.HIGH, precision.reason)
    if eqn.primitive.name == "convert_element_type":
        return _conversion(facts)
    if not isinstance(op_class, OpClass):
        return _low(facts, How.OP, f"replaced by a function {why}")
    if op_class in (OpClass.AS_WRITTEN, OpClass.NESTED):
        return _float32(facts, Tag.HIGH, why)
    if facts.want & _demand.AS_WRITTEN and precision.mode != "low":
        user = "linear algebra" if facts.want & _demand.SOLVED else "the condition of a loop"
        return _float32(facts, Tag.HIGH, f"{user} depends on it: as written")
    if op_class is OpClass.ALLOW and precision.mode != "low" and facts.takes_solution:
        return _float32(facts, Tag.HIGH, "uses a result of linear algebra: as written")
    if op_class is OpClass.ALLOW or _follows_low_operand(facts):
        return _product(facts, why)
    if precision.mode == "low":
        if facts.is_made_as_written:
            return _float32(facts, Tag.HIGH, "computed from random numbers or other results that run as written")
        return _low(facts, _how_low(facts), precision.reason)
    if op_class is OpClass.DENY:
        return _float32(facts, Tag.HIGH, why)
    return _follow(facts)


# --- What is decided for a class ---


def _float32(facts: Facts, tag: Tag, reason: str) -> Decision:
    return Decision(FLOAT32, How.BOUND, facts.known(tag), reason)


def _low(facts: Facts, how: How, reason: str) -> Decision:
    known = facts.known(Tag.LOW)
    return Decision(facts.precision.dtype, how, known, reason, takes_weights=how is How.WEIGHTS)


def _how_low(facts: Facts) -> How:
    """Operations that broadcast or gather weights round them inside, because the gradients of weights are sums."""
    is_sum = facts.precision.widens_gradients and facts.name in _REPEATS
    is_gathered = facts.name in _ops.GATHERS and facts.precision.dtype != facts.precision.reduce_dtype
    return How.WEIGHTS if is_sum or is_gathered else How.LOWERED


def _conversion(facts: Facts) -> Decision:
    """A float32-to-float32 cast is a no-op; an upcast of a narrower float asks for float32."""
    source, result = facts.eqn.invars[0].aval, facts.eqn.outvars[0].aval
    if is_eligible(source) and is_eligible(result):
        tag, reason = facts.operands[0].tag, "already float32 in the original program: keeps its precision"
    else:
        is_upcast = jnp.issubdtype(source.dtype, jnp.floating) and is_eligible(result)
        tag, reason = Tag.HIGH if is_upcast else Tag.NEUTRAL, "a cast of the original program"
    known = facts.known(tag)[0]._replace(tag=tag)
    return Decision(None, How.BOUND, (known,), reason)


def _product(facts: Facts, why: str) -> Decision:
    """A matmul returns float32 if all its consumers want that and it is free, or if a rule asks for it."""
    precision = facts.precision
    if not facts.floats or not all(is_eligible(v.aval) for v in facts.eqn.outvars):
        return _product_as_written(facts)
    is_wide, reason = _leaves_in_float32(facts, why)
    how = _how_multiplied(facts, is_wide=is_wide)
    if how is How.DOT:
        reason = _replaced(facts)
    elif precision.dot is not None:
        reason += f"; {_why_not_replaced(facts)}"
    takes_weights = isinstance(precision.dot, RoundsOperands) if how is How.DOT else precision.widens_gradients
    known = facts.known(Tag.HIGH if is_wide else Tag.LOW)
    result_dtype = FLOAT32 if is_wide else precision.dtype
    takes_weights = takes_weights and how in (How.DOT, How.PRODUCT)
    return Decision(precision.dtype, how, known, reason, result_dtype, takes_weights, facts.tangent)


def _product_as_written(facts: Facts) -> Decision:
    """A 16-bit matmul keeps the dtypes that the model wrote, even if the user replaces it."""
    precision, reason = facts.precision, "not a matmul of float32 arrays"
    dtypes = [v.aval.dtype for v in (*facts.eqn.invars[:2], *facts.eqn.outvars)]
    if precision.dot is None or not all(jnp.issubdtype(x, jnp.floating) and 2 <= x.itemsize <= 4 for x in dtypes):
        return _float32(facts, Tag.HIGH, reason)
    why_not = _why_not_replaced(facts)
    if why_not:
        return _float32(facts, Tag.HIGH, f"{reason}; {why_not}")
    return Decision(None, How.DOT, facts.known(Tag.HIGH), _replaced(facts), dtypes[-1], tangent=facts.tangent)


def _replaced(facts: Facts) -> str:
    dot = facts.precision.dot
    speed = dot.speed(facts.name) if isinstance(dot, RoundsOperands) else ""
    return f"replaced by {getattr(dot, '__name__', dot)}{speed}"


def _leaves_in_float32(facts: Facts, why: str) -> tuple[bool, str]:
    precision = facts.precision
    if precision.result == FLOAT32:
        return True, f"float32 result asked for by {precision.reason}"
    is_ours = precision.dot is None or (facts.name == "dot_general" and isinstance(precision.dot, RoundsOperands))
    is_wanted = is_float32(facts.want) and bool(facts.want & (_demand.FLOAT32 | _demand.PLACE))
    if is_wanted and is_ours and facts.name != "conv_general_dilated" and _is_free(facts.eqn):
        return True, "all consumers want float32, which is free here"
    return False, why


def _how_multiplied(facts: Facts, *, is_wide: bool) -> How:
    precision, is_dot = facts.precision, facts.name == "dot_general"
    if precision.dot is not None and _why_not_replaced(facts) is None:
        return How.DOT
    if precision.dtype == FLOAT32:
        return How.BOUND
    is_ours = is_dot and (precision.widens_gradients or precision.accumulates)
    return How.PRODUCT if is_wide or is_ours else How.LOWERED


def _why_not_replaced(facts: Facts) -> str | None:
    """Why the user's matmul does not replace this one, if it does not."""
    dot: Any = facts.precision.dot
    if "compute_dtype" in facts.eqn.params:  # of a matmul of ours
        raise InvalidRuleError(
            "dot= cannot replace a matmul of a function that is autocast already. Give dot= to the autocast of that "
            "function, and leave this one out."
        )
    if product_of(dot, facts.name) is None:
        return "dot= replaces only dot_general"
    if isinstance(dot, RoundsOperands) and not dot.takes(has_weight=any(x.is_parameter for x in facts.operands)):
        return 'dot= replaces only matmuls with a weight: its products="weights"'
    return None


def _is_free(eqn: Equation) -> bool:
    """Whether the result of a matmul is no larger in float32 than its operands in 16 bits."""
    return is_as_large(sum(size(v.aval) for v in eqn.invars[:2]) * 2, size(eqn.outvars[0].aval) * 4)


# --- What follows its operands ---

#: Primitives that repeat an operand with fewer elements, so that its gradient is a sum.
_REPEATS = frozenset({"add", "sub", "mul"})


def _follow(facts: Facts) -> Decision:
    eqn, precision = facts.eqn, facts.precision
    if not facts.floats:
        return _float32(facts, Tag.NEUTRAL, "no float32 array takes part")
    if _ops.treats_operands_separately(facts.name) and len(facts.operands) == len(eqn.outvars):
        known = tuple(Known(value.tag, facts.origin) for value in facts.operands)
        return Decision(None, How.BOUND, known, "every operand keeps its precision")
    rule = next(rule for rule in FOLLOWS if rule.when(facts))
    is_low = rule.is_low(facts) if callable(rule.is_low) else rule.is_low
    known = facts.known(rule.tag(facts) if callable(rule.tag) else rule.tag)
    how = _how_low(facts) if is_low else rule.how
    dtype = precision.dtype if is_low else None if how is How.ROUNDED else FLOAT32
    return Decision(dtype, how, known, rule.reason, takes_weights=how is How.WEIGHTS)


def decide_activation(eqn: Equation, operand: Value, precision: Precision, want: Want) -> Decision | None:
    """Decides about an activation of ``jax.nn``; ``None`` to interpret its body like any program."""
    is_low = precision.mode == "auto" and precision.dtype != FLOAT32 and operand.tag.is_rounded
    if not is_low or is_float32(want) or not is_eligible(eqn.invars[0].aval):
        return None
    reason = "an activation with a bounded slope: computed in float32, kept in the compute dtype"
    return Decision(precision.dtype, How.SLOPE, (Known(Tag.LOW),), reason)


def _follows_low_operand(facts: Facts) -> bool:
    """Whether a matmul of a few terms takes the output of a layer, as low-rank adapters do."""
    return facts.op is OpClass.FOLLOW and facts.name in _ops.PRODUCTS and bool(facts.floats) and facts.tag is Tag.LOW
