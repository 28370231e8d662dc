"""The table that decides how operations follow their operands."""

from collections.abc import Callable
from typing import NamedTuple

from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite.autocast import _demand, _ops
from jmp_lite.autocast._decision import How
from jmp_lite.autocast._demand import is_float32
from jmp_lite.autocast._facts import Facts
from jmp_lite.autocast._values import Origin, Tag, Value, is_as_large, is_exact, is_in_range, size


class FollowRule(NamedTuple):
    """One row of the FOLLOW table; the first row whose condition holds decides."""

    reason: str
    when: Callable[[Facts], bool]
    how: How
    tag: Tag | Callable[[Facts], Tag]
    is_low: bool | Callable[[Facts], bool] = False
    """Whether float32 operands are cast to the compute dtype, or stay float32."""


def _is_number(facts: Facts) -> bool:
    return facts.number is not None


def _is_moved_low(facts: Facts) -> bool:
    """Whether only matmuls want it; except in gathers, weights are moved in float32 and rounded in the matmul."""
    is_low = facts.want == _demand.LOW and facts.tag is not Tag.HIGH and _ops.moves_whole_arrays(facts.name)
    is_kept = facts.precision.widens_gradients and facts.name not in _ops.GATHERS
    return is_low and not (is_kept and all(value.is_weight for value in facts.floats))


def _is_taken(facts: Facts) -> bool:
    return facts.tag is Tag.LOW and _ops.takes_repeatedly(facts.eqn)


def _is_as_precise_in_16_bits(facts: Facts) -> bool:
    is_rearranged = _ops.picks_values(facts.name) or _ops.moves_whole_arrays(facts.name)
    return _are_low(facts) and (is_rearranged or (_is_scaled(facts) and _are_numbers(facts, is_exact)))


def _is_scaled_low(facts: Facts) -> bool:
    return _are_low(facts) and _is_scaled(facts) and not _is_out_of_range(facts)


def _are_low(facts: Facts) -> bool:
    return facts.tag is Tag.LOW and all(value.tag is Tag.LOW for value in facts.whole)


def _is_scaled(facts: Facts) -> bool:
    factors = {"mul": facts.floats, "div": facts.floats[1:]}.get(facts.name, [])
    return any(value.known.number is not None for value in factors)


def _are_numbers(facts: Facts, are_held: Callable[[float, DType], bool]) -> bool:
    """Whether the compute dtype holds all numbers among the operands, exactly or nearly."""
    numbers = (value.known.number for value in facts.floats)
    return all(number is None or are_held(number, facts.precision.dtype) for number in numbers)


def _is_pooled(facts: Facts) -> bool:
    return facts.floats[0].tag.is_rounded and _ops.sums_windows(facts.name)


def _is_wanted(facts: Facts) -> bool:
    are_low = len(facts.whole) == len(facts.floats) > 1 and all(value.tag.is_rounded for value in facts.floats)
    is_sum_of_low = facts.name == "add" and are_low
    is_wanted = is_float32(facts.want) and not (is_sum_of_low and facts.want == _demand.SUMMED)
    return is_wanted and facts.has_float_results


def _levels_off(facts: Facts) -> bool:
    """Whether a function saturates, or continues from one that did: ``1 - p`` has the digits that ``p`` lacks."""
    is_wanted = bool(facts.want & _demand.FLOAT32)
    if facts.tag is Tag.SOFT and (not facts.has_float_results or facts.name in _ops.CHOOSES):
        return True  # compared as it is held
    if facts.tag is Tag.SOFT and len(facts.arrays) == 1:
        return is_wanted or facts.name in ("add", "sub", "one_minus_square")
    return is_wanted and facts.tag is not Tag.NEUTRAL and facts.name in _ops.SATURATES


def _is_multiplied_for_product(facts: Facts) -> bool:
    """Whether a matmul consumes a value multiplied by a low array or a dropout mask."""
    is_product = facts.name in ("mul", "dot_general") and facts.tag is not Tag.NEUTRAL
    is_whole = is_product and len(facts.whole) == len(facts.operands)
    is_other = any(value.tag is Tag.LOW or value.is_activation for value in facts.whole)
    return is_whole and is_other and facts.want == _demand.LOW


def _is_precise(facts: Facts) -> bool:
    return facts.tag_of_whole is Tag.HIGH


def _is_neutral(facts: Facts) -> bool:
    return facts.tag_of_whole is Tag.NEUTRAL


def _is_out_of_range(facts: Facts) -> bool:
    return not _are_numbers(facts, is_in_range)


def _is_held_low(facts: Facts) -> bool:
    return facts.tag is Tag.NEUTRAL and {value.array.dtype for value in facts.whole} == {facts.precision.dtype}


def _promotes(facts: Facts) -> bool:
    """Whether an operand is full-size data next to low ones: a parameter being updated, an accumulator."""

    def is_data(value: Value) -> bool:
        is_state = value.known.origin in (Origin.INPUT, Origin.SCALED)
        held = value.tag is Tag.NEUTRAL and is_state and value.array.dtype == FLOAT32
        others = [other for other in facts.whole if other.tag.is_rounded]
        return held and any(is_as_large(size(value.array), size(other.array)) for other in others)

    return any(map(is_data, facts.whole))


def _is_shifted(facts: Facts) -> bool:
    is_alone = len(facts.whole) == 1 and (len(facts.arrays) > 1 or _ops.moves_whole_arrays(facts.name))
    return facts.tag is Tag.HIGH or (facts.tag is Tag.SOFT and is_alone) or _is_linear(facts)


def _is_linear(facts: Facts) -> bool:
    """Whether it is scaled, or shifted for a consumer that wants float32: linear, so it keeps no residuals.

    A bias counts as small: in float32, what a convolution leaves for a norm would be moved in twice the bytes.
    """
    is_number = any(value.known.number is not None for value in facts.floats)
    are_alike = {value.tag for value in facts.whole} == {Tag.SOFT}
    is_wanted = bool(facts.want & _demand.FLOAT32)
    return _is_scaled(facts) or (facts.name in _ops.ADDS and (is_number or are_alike) and is_wanted)


def _is_sum_of_soft(facts: Facts) -> bool:
    return facts.name in _ops.ADDS and facts.tag is Tag.SOFT


def _is_shifted_for_product(facts: Facts) -> bool:
    return _is_shifted(facts) and bool(facts.want & _demand.LOW) and not facts.want & _demand.FLOAT32


FOLLOWS = (
    FollowRule("a constant, for which any precision will do", _is_number, How.BOUND, lambda f: f.operands[0].tag),
    FollowRule("moved in the compute dtype, which costs least", _is_moved_low, How.LOWERED, Tag.LOW, True),
    FollowRule("read in its own precision; its gradient accumulates in float32", _is_taken, How.WIDE, Tag.LOW),
    FollowRule("as precise in 16 bits as its operands", _is_as_precise_in_16_bits, How.LOWERED, Tag.LOW, True),
    FollowRule("all consumers want float32", _is_wanted, How.BOUND, Tag.HIGH),
    FollowRule("scaled by a number before it is rounded", _is_scaled_low, How.WIDE, Tag.LOW),
    FollowRule("summed in float32, and as precise as its input", _is_pooled, How.BOUND, Tag.SOFT),
    FollowRule(
        "saturates, and a consumer wants float32",
        _levels_off,
        How.BOUND,
        lambda facts: max(Tag.SOFT, facts.tag_of_whole),
    ),
    FollowRule("uses a number that the compute dtype cannot hold", _is_out_of_range, How.BOUND, Tag.HIGH),
    FollowRule(
        "multiplied by a low array or a mask for a matmul",
        _is_multiplied_for_product,
        How.ROUNDED,
        Tag.LOW,
        lambda facts: facts.tag is not Tag.HIGH or facts.name != "mul",
    ),
    FollowRule("follows an operand that needs float32", _is_precise, How.BOUND, Tag.HIGH),
    FollowRule("no decision has touched its operands yet", _is_neutral, How.LOWERED, Tag.NEUTRAL, _is_held_low),
    FollowRule("a float32 argument as large as the others promotes", _promotes, How.BOUND, Tag.HIGH),
    FollowRule("scaled or shifted in float32 for a matmul", _is_shifted_for_product, How.WIDE, Tag.LOW),
    FollowRule("scaled or shifted in float32", _is_shifted, How.BOUND, Tag.SOFT),
    FollowRule("added before it is rounded", _is_sum_of_soft, How.WIDE, Tag.LOW),
    FollowRule("follows its operands", lambda _: True, How.LOWERED, Tag.LOW, True),
)
