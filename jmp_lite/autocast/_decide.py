"""Decides, for one equation, in which dtype it runs, how, and what is known of its results. Computes nothing."""

import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jmp_lite._compat import Atom, Equation, is_literal
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite.autocast import _demand, _ops
from jmp_lite.autocast._demand import Want, Wants, is_float32, joined
from jmp_lite.autocast._ops import Op, OpClass
from jmp_lite.autocast._rules import Precision
from jmp_lite.autocast._values import (
    OF_WEIGHTS,
    Known,
    Origin,
    Tag,
    Value,
    exceeds,
    is_as_large,
    is_eligible,
    size,
)
from jmp_lite.products._matmul import RoundsOperands


class How(enum.Enum):
    """How an equation is applied to its operands, which are cast before."""

    BOUND = "the primitive, as written"
    LOWERED = "the primitive, its parameters rewritten for the compute dtype"
    WEIGHTS = "the primitive, weights rounded inside so that their gradients are not"
    PRODUCT = "a product of ours: weights rounded inside, a result of its own dtype"
    WIDE = "the primitive in float32, its result rounded"
    SLOPE = "an activation in float32, its value and its slope rounded"
    DOT = "the product that the user gave"
    OP = "the function that the user gave"


class Decision(NamedTuple):
    """What becomes of an equation: all of it, so that nobody decides again."""

    dtype: DType | None
    """What its float32 operands are cast to: a compute dtype, float32, or ``None``, which leaves them as held."""
    how: How
    results: tuple[Known, ...]
    reason: str
    result_dtype: DType | None = None
    """Of a product: the dtype that its result leaves in."""
    takes_weights: bool = False
    """Whether weights go in as they are, to be rounded inside, so that their gradients are not."""


class Facts:
    """What the rules look at."""

    def __init__(self, eqn: Equation, operands: Sequence[Value], op: Op, precision: Precision, want: Want) -> None:
        self.eqn, self.operands, self.op, self.precision, self.want = eqn, operands, op, precision, want
        self.name: str = eqn.primitive.name

    @functools.cached_property
    def floats(self) -> list[Value]:
        """The operands that were float32, literals too."""
        return [value for v, value in zip(self.eqn.invars, self.operands, strict=True) if is_eligible(v.aval)]

    @functools.cached_property
    def arrays(self) -> list[Value]:
        """The same without literals."""
        return [value for v, value in zip(self.eqn.invars, self.operands, strict=True) if _is_float_array(v)]

    @functools.cached_property
    def whole(self) -> list[Value]:
        """Those of the arrays that have as much to say as the result; all floats if none has."""
        shape = self.eqn.outvars[0].aval.shape
        return [value for value in self.arrays if not _is_repeated(value, shape)] or self.floats

    @functools.cached_property
    def tag(self) -> Tag:
        """The largest of all tags."""
        return max(value.tag for value in self.floats)

    @functools.cached_property
    def tag_of_whole(self) -> Tag:
        """The largest tag of the whole operands."""
        return max(value.tag for value in self.whole)

    @functools.cached_property
    def has_float_results(self) -> bool:
        """Whether a result was float32; those of comparisons are not."""
        return any(is_eligible(v.aval) for v in self.eqn.outvars)


def decide(
    eqn: Equation, operands: Sequence[Value], op: tuple[Op, str], precision: Precision, wants: Wants
) -> Decision:
    """Decides about an equation that is to be applied as a whole.

    Args:
        eqn: The equation, of the original program.
        operands: Its operands, as they are held.
        op: The class of its primitive, or a function that takes its place, and why.
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
        user = "linear algebra" if facts.want & _demand.SOLVED else "the test of a loop"
        return _float32(facts, Tag.HIGH, f"{user} depends on it: as written")
    if op_class is OpClass.ALLOW and precision.mode != "low" and _takes_solution(facts):
        return _float32(facts, Tag.HIGH, "takes what linear algebra made: as written")
    if op_class is OpClass.ALLOW or _follows_low_operand(facts):
        return _product(facts, why)
    if precision.mode == "low":
        if _is_made_as_written(facts):
            return _float32(facts, Tag.HIGH, "made of random numbers or other results that are as written")
        return _low(facts, _how_low(facts), precision.reason)
    if op_class is OpClass.DENY:
        return _float32(facts, Tag.HIGH, why)
    return _follow(facts)


# --- What is decided for a class ---


def _float32(facts: Facts, tag: Tag, reason: str) -> Decision:
    return Decision(FLOAT32, How.BOUND, _known(facts, tag), reason)


def _low(facts: Facts, how: How, reason: str) -> Decision:
    known = _known(facts, Tag.LOW)
    return Decision(facts.precision.dtype, how, known, reason, takes_weights=how is How.WEIGHTS)


def _how_low(facts: Facts) -> How:
    """Weights are rounded inside of what repeats or gathers them, because their gradients are sums."""
    is_sum = facts.precision.widens_gradients and facts.name in _REPEATS
    is_gathered = facts.name in _ops.GATHERS and facts.precision.dtype != facts.precision.reduce_dtype
    return How.WEIGHTS if is_sum or is_gathered else How.LOWERED


def _known(facts: Facts, tag: Tag) -> tuple[Known, ...]:
    origin, number = _origin_of_results(facts), number_of_results(facts.eqn, facts.operands)
    return tuple(Known(tag if is_eligible(v.aval) else Tag.NEUTRAL, origin, number) for v in facts.eqn.outvars)


def _conversion(facts: Facts) -> Decision:
    """A float32-to-float32 cast is a no-op; an upcast of a narrower float asks for float32."""
    source, result = facts.eqn.invars[0].aval, facts.eqn.outvars[0].aval
    if is_eligible(source) and is_eligible(result):
        tag, reason = facts.operands[0].tag, "already float32 in the original program: keeps its precision"
    else:
        is_upcast = jnp.issubdtype(source.dtype, jnp.floating) and is_eligible(result)
        tag, reason = Tag.HIGH if is_upcast else Tag.NEUTRAL, "a cast of the original program"
    known = _known(facts, tag)[0]._replace(tag=tag)
    return Decision(None, How.BOUND, (known,), reason)


def _product(facts: Facts, why: str) -> Decision:
    """A product leaves in float32 if all that use it want that and it is free, or if a rule asks for it."""
    precision = facts.precision
    if not facts.floats or not all(is_eligible(v.aval) for v in facts.eqn.outvars):
        return _float32(facts, Tag.HIGH, "not a product of float32 arrays")
    is_wide, reason = _leaves_in_float32(facts, why)
    how = _how_multiplied(facts, is_wide=is_wide)
    if how is How.DOT:
        reason = f"replaced by {getattr(precision.dot, '__name__', precision.dot)}"
    elif precision.dot is not None:
        reason += "; dot= replaces dot_general alone"
    takes_weights = isinstance(precision.dot, RoundsOperands) if how is How.DOT else precision.widens_gradients
    known = _known(facts, Tag.HIGH if is_wide else Tag.LOW)
    result_dtype = FLOAT32 if is_wide else precision.dtype
    return Decision(precision.dtype, how, known, reason, result_dtype, takes_weights and how in (How.DOT, How.PRODUCT))


def _leaves_in_float32(facts: Facts, why: str) -> tuple[bool, str]:
    precision = facts.precision
    if precision.result == FLOAT32:
        return True, f"result of float32 asked for by {precision.reason}"
    is_ours = precision.dot is None or isinstance(precision.dot, RoundsOperands)
    is_wanted = is_float32(facts.want) and bool(facts.want & (_demand.HIGH | _demand.PLACE))
    if is_wanted and is_ours and facts.name != "conv_general_dilated" and _is_free(facts.eqn):
        return True, "all that use it want float32, which costs nothing more here"
    return False, why


def _how_multiplied(facts: Facts, *, is_wide: bool) -> How:
    precision, is_dot = facts.precision, facts.name == "dot_general"
    if is_dot and precision.dot is not None:
        return How.DOT
    if precision.dtype == FLOAT32:
        return How.BOUND
    is_ours = is_dot and (precision.widens_gradients or precision.accumulates)
    return How.PRODUCT if is_wide or is_ours else How.LOWERED


def _is_free(eqn: Equation) -> bool:
    """Whether the result of a product is no larger in float32 than its operands in 16 bits."""
    return is_as_large(sum(size(v.aval) for v in eqn.invars[:2]) * 2, size(eqn.outvars[0].aval) * 4)


# --- What follows its operands ---


class FollowRule(NamedTuple):
    """One row of the table of what follows its operands; the first whose condition holds decides."""

    reason: str
    when: Callable[[Facts], bool]
    how: How
    tag: Tag | Callable[[Facts], Tag]
    is_low: bool | Callable[[Facts], bool] = False
    """Whether float32 operands are cast to the compute dtype, or stay float32."""


def _is_number(facts: Facts) -> bool:
    return number_of_results(facts.eqn, facts.operands) is not None


def _is_moved_low(facts: Facts) -> bool:
    """Whether products alone want it; weights are moved in float32 and rounded in the product, but for gathers."""
    is_low = facts.want == _demand.LOW and facts.tag is not Tag.HIGH and _ops.moves_whole_arrays(facts.name)
    is_kept = facts.precision.widens_gradients and facts.name not in _ops.GATHERS
    return is_low and not (is_kept and all(value.is_weight for value in facts.floats))


def _is_taken(facts: Facts) -> bool:
    return facts.tag is Tag.LOW and _ops.takes_repeatedly(facts.eqn)


def _is_as_precise_in_16_bits(facts: Facts) -> bool:
    is_rearranged = _ops.picks_values(facts.name) or _ops.moves_whole_arrays(facts.name)
    is_scaled = facts.name in ("mul", "div") and any(value.known.number is not None for value in facts.floats)
    is_low = facts.tag is Tag.LOW and all(value.tag is Tag.LOW for value in facts.whole)
    return is_low and (is_rearranged or is_scaled)


def _is_rounded(value: Value) -> bool:
    return value.tag in (Tag.LOW, Tag.SOFT)


def _is_pooled(facts: Facts) -> bool:
    return _is_rounded(facts.floats[0]) and _ops.sums_windows(facts.name)


def _is_wanted(facts: Facts) -> bool:
    are_low = len(facts.whole) == len(facts.floats) > 1 and all(map(_is_rounded, facts.floats))
    is_sum_of_low = facts.name == "add" and are_low
    is_wanted = is_float32(facts.want) and not (is_sum_of_low and facts.want == _demand.HIGH)
    return is_wanted and facts.has_float_results


def _levels_off(facts: Facts) -> bool:
    """Whether a function levels off, or goes on from one that did: ``1 - p`` has the digits that ``p`` lacks."""
    is_wanted = bool(facts.want & _demand.HIGH)
    if facts.tag is Tag.SOFT and not facts.has_float_results:
        return True  # compared as it is held
    if facts.tag is Tag.SOFT and len(facts.arrays) == 1:
        return is_wanted or facts.name in ("add", "sub")
    return is_wanted and facts.tag is not Tag.NEUTRAL and facts.name in _ops.SATURATES


def _is_multiplied_for_product(facts: Facts) -> bool:
    return facts.name == "mul" and facts.want == _demand.LOW and any(value.tag is Tag.LOW for value in facts.whole)


def _is_precise(facts: Facts) -> bool:
    return facts.tag_of_whole is Tag.HIGH


def _is_neutral(facts: Facts) -> bool:
    return facts.tag_of_whole is Tag.NEUTRAL


def _is_out_of_range(facts: Facts) -> bool:
    return _is_neutral(facts) and any(exceeds(value.known.number, facts.precision.dtype) for value in facts.floats)


def _is_held_low(facts: Facts) -> bool:
    return facts.tag is Tag.NEUTRAL and {value.array.dtype for value in facts.whole} == {facts.precision.dtype}


def _promotes(facts: Facts) -> bool:
    """Whether an operand is data of its own right beside low ones: a parameter being updated, an accumulator."""

    def is_data(value: Value) -> bool:
        held = value.tag is Tag.NEUTRAL and value.known.origin is Origin.INPUT and value.array.dtype == FLOAT32
        others = [other for other in facts.whole if Tag.NEUTRAL < other.tag < Tag.HIGH]
        return held and any(is_as_large(size(value.array), size(other.array)) for other in others)

    return any(map(is_data, facts.whole))


def _is_shifted(facts: Facts) -> bool:
    is_alone = len(facts.whole) == 1 and (len(facts.arrays) > 1 or _ops.moves_whole_arrays(facts.name))
    return facts.tag is Tag.HIGH or (facts.tag is Tag.SOFT and is_alone)


def _is_shifted_for_product(facts: Facts) -> bool:
    return _is_shifted(facts) and bool(facts.want & _demand.LOW) and not facts.want & _demand.HIGH


FOLLOWS = (
    FollowRule("a number, which can be had in any precision", _is_number, How.BOUND, lambda f: f.operands[0].tag),
    FollowRule("moved in the compute dtype, which costs least", _is_moved_low, How.LOWERED, Tag.LOW, True),
    FollowRule("taken as precise as it is; its gradient adds up in float32", _is_taken, How.WIDE, Tag.LOW),
    FollowRule("as precise in 16 bits as its operands", _is_as_precise_in_16_bits, How.LOWERED, Tag.LOW, True),
    FollowRule("all that use it want float32", _is_wanted, How.BOUND, Tag.HIGH),
    FollowRule("summed in float32, and as precise as what was pooled", _is_pooled, How.WIDE, Tag.LOW),
    FollowRule(
        "levels off, and something that uses it wants float32",
        _levels_off,
        How.BOUND,
        lambda facts: max(Tag.SOFT, facts.tag_of_whole),
    ),
    FollowRule("multiplied with a low array for a product", _is_multiplied_for_product, How.LOWERED, Tag.LOW, True),
    FollowRule("follows an operand that needs float32", _is_precise, How.BOUND, Tag.HIGH),
    FollowRule("scaled or shifted by float32 statistics for a product", _is_shifted_for_product, How.WIDE, Tag.LOW),
    FollowRule("made of a number that the compute dtype cannot hold", _is_out_of_range, How.BOUND, Tag.HIGH),
    FollowRule("no decision has touched its operands yet", _is_neutral, How.LOWERED, Tag.NEUTRAL, _is_held_low),
    FollowRule("a float32 argument as large as the others promotes", _promotes, How.BOUND, Tag.HIGH),
    FollowRule("scaled or shifted by float32 statistics", _is_shifted, How.BOUND, Tag.SOFT),
    FollowRule("follows its operands", lambda _: True, How.LOWERED, Tag.LOW, True),
)

#: Primitives that repeat an operand with fewer elements, so that its gradient is a sum.
_REPEATS = frozenset({"add", "sub", "mul"})


def _follow(facts: Facts) -> Decision:
    eqn, precision = facts.eqn, facts.precision
    if not facts.floats:
        return _float32(facts, Tag.NEUTRAL, "no float32 array takes part")
    if _ops.treats_operands_separately(facts.name) and len(facts.operands) == len(eqn.outvars):
        origin = _origin_of_results(facts)
        known = tuple(Known(value.tag, origin) for value in facts.operands)
        return Decision(None, How.BOUND, known, "every operand keeps its precision")
    rule = next(rule for rule in FOLLOWS if rule.when(facts))
    is_low = rule.is_low(facts) if callable(rule.is_low) else rule.is_low
    known = _known(facts, rule.tag(facts) if callable(rule.tag) else rule.tag)
    how = _how_low(facts) if is_low else rule.how
    return Decision(precision.dtype if is_low else FLOAT32, how, known, rule.reason, takes_weights=how is How.WEIGHTS)


def decide_activation(eqn: Equation, operand: Value, precision: Precision, want: Want) -> Decision | None:
    """Decides about an activation of ``jax.nn``; ``None`` where it is to be gone into like any program."""
    is_low = precision.mode == "auto" and precision.dtype != FLOAT32 and operand.tag in (Tag.LOW, Tag.SOFT)
    if not is_low or is_float32(want) or not is_eligible(eqn.invars[0].aval):
        return None
    reason = "an activation of bounded slope: computed in float32, kept in the compute dtype"
    return Decision(precision.dtype, How.SLOPE, (Known(Tag.LOW),), reason)


# --- What is known of operands and results ---


def _is_float_array(atom: Atom) -> bool:
    return not is_literal(atom) and is_eligible(atom.aval)


def _is_repeated(value: Value, shape: Sequence[Any]) -> bool:
    """Whether an operand has less to say than the result, such as a mean, or a bias moved to where it is added."""
    own = value.array.shape
    is_small = not own or any(a == 1 != b for a, b in zip(own, shape, strict=False))
    return is_small or value.known.origin in (Origin.REPEATED, Origin.MOVED)


def _origin_of_results(facts: Facts) -> Origin:
    origins, name = {value.known.origin for value in facts.arrays}, facts.name
    if facts.op is OpClass.AS_WRITTEN:
        return Origin.SOLVED if _ops.solves(name) or name in _ops.PRODUCTS else Origin.AS_WRITTEN
    if _is_made_as_written(facts):
        return Origin.AS_WRITTEN
    if _repeats_something_smaller(facts.eqn, facts.operands):
        return Origin.REPEATED
    if facts.op is OpClass.FOLLOW and origins and {value.known.origin for value in facts.whole} == {Origin.SOLVED}:
        return Origin.SOLVED
    moves = name in _ops.MOVES_PARTS or _ops.moves_whole_arrays(name) or facts.precision.mode == "off"
    return Origin.MOVED if moves and origins and origins <= OF_WEIGHTS else Origin.COMPUTED


def _follows_low_operand(facts: Facts) -> bool:
    """Whether a product of a few terms takes what a layer made, as adapters of low rank do."""
    return facts.name in _ops.PRODUCTS and bool(facts.floats) and facts.tag is Tag.LOW


def _takes_solution(facts: Facts) -> bool:
    return any(value.known.origin is Origin.SOLVED for value in facts.arrays)


def _is_made_as_written(facts: Facts) -> bool:
    origins = {value.known.origin for value in facts.arrays}
    return Origin.AS_WRITTEN in origins and origins <= {Origin.AS_WRITTEN, Origin.REPEATED}


def number_of_results(eqn: Equation, operands: Sequence[Value]) -> float | None:
    """Returns the number that the result of an equation repeats, if it is known."""
    moves = _ops.moves_whole_arrays(eqn.primitive.name) or eqn.primitive.name == "convert_element_type"
    is_one_array = len(eqn.outvars) == 1 and is_eligible(eqn.outvars[0].aval)
    return operands[0].known.number if moves and is_one_array and is_eligible(eqn.invars[0].aval) else None


def _repeats_something_smaller(eqn: Equation, operands: Sequence[Value]) -> bool:
    name = eqn.primitive.name
    if name == "iota":
        return len(eqn.params["shape"]) > 1
    if _ops.adds_axes(eqn):
        source, result = eqn.invars[0], eqn.outvars[0]
        is_copy = operands[0].known.origin is Origin.REPEATED
        return is_copy or is_literal(source) or size(source.aval) != size(result.aval)
    return name in _ops.KEEPS_BROADCAST and all(
        is_literal(v) or value.known.origin is Origin.REPEATED or getattr(v.aval, "ndim", 1) == 0
        for v, value in zip(eqn.invars, operands, strict=True)
    )
