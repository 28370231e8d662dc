"""How a compiler treats an operation: fused into its consumers, a reduction, an in-place write, or its own launch."""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

from jmp_lite.analysis._estimation._dataflow import Array, Node
from jmp_lite.autocast._ops import PRODUCTS
from jmp_lite.autocast._record import as_count


class Family(NamedTuple):
    """Primitives that a compiler treats alike."""

    reason: str
    primitives: str


_FAMILIES: Mapping[str, Family] = {
    "pointwise": Family(
        "an element of the result takes few of each operand: computed where it is used",
        """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type
        broadcast_in_dim broadcast_to cbrt ceil clamp clz complex concatenate conj convert_element_type copy copy_p cos
        cosh digamma div dynamic_slice empty empty_like eq eq_to erf erf_inv erfc exp exp2 expand_dims expm1 floor
        gather ge gt imag integer_pow iota iota_2x32_shape is_finite le le_to lgamma log log1p log2 logistic lt lt_to
        max min mul mul_add mulhi name ne neg nextafter not one_minus_square optimization_barrier or pad
        population_count polynomial pow quantize_to_bits random_bits random_fold_in random_seed random_split
        random_unwrap random_wrap real reduce_precision relayout rem reshape rev round rsqrt select_n shift_left
        shift_right_arithmetic shift_right_logical sign sin sinh slice split sqrt square squeeze stack stop_gradient sub
        symmetric_product tan tanh threefry2x32 tile transpose unstack xor zeros_like""",
    ),
    "reduction": Family(
        "sums: its result is in memory",
        "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin",
    ),
    "update": Family(
        "writes a part of its first operand, in place",
        "scatter scatter-add scatter-mul scatter-min scatter-max dynamic_update_slice",
    ),
    "expensive": Family(
        "its arithmetic outweighs two bytes: computed once, and the result kept",
        "exp exp2 expm1 log log1p log2 tanh logistic erf erfc erf_inv pow rsqrt sqrt cbrt sin cos tan div",
    ),
}
_BY_FAMILY = {name: frozenset(family.primitives.split()) for name, family in _FAMILIES.items()}
#: The longest row that one launch holds while it adds it up and computes with the sum.
ROW = 4096
#: Columns of more rows are added up in two stages, of which the first joins other launches.
COLUMN = 8192
#: Round to 8 bits, or copy what is rounded.
QUANTIZES = frozenset({"quantize_to_bits", "relayout"})


def is_pointwise(node: Node) -> bool:
    """Whether it is fused into its consumers."""
    return node.primitive in _BY_FAMILY["pointwise"] or is_one_hot(node)


def is_reduction(node: Node) -> bool:
    """Whether it is a reduction."""
    return node.primitive in _BY_FAMILY["reduction"]


def is_update(node: Node) -> bool:
    """Whether it writes into its operand in place."""
    return node.primitive in _BY_FAMILY["update"] and not is_one_hot(node)


def is_product(node: Node) -> bool:
    """Whether it is a matmul or a convolution."""
    return node.primitive in PRODUCTS


def is_expensive(node: Node) -> bool:
    """Whether it is too expensive to recompute."""
    return node.primitive in _BY_FAMILY["expensive"]


def is_heavy(node: Node) -> bool:
    """Whether it is one launch or several: a matmul, a loop, a kernel, or an unknown primitive."""
    return not (is_pointwise(node) or is_reduction(node) or is_update(node))


def is_one_hot(node: Node) -> bool:
    """Whether it writes one element per row of zeros, which XLA computes as a comparison with the index."""
    if node.primitive not in ("scatter", "scatter-add"):
        return False
    rows = node.eqn.params["dimension_numbers"].operand_batching_dims
    shape, updates = _shape(node, 0), _shape(node, 2)
    return bool(rows) and math.prod(updates) == math.prod(shape[axis] for axis in rows) and _is_of_zeros(node)


def _is_of_zeros(node: Node) -> bool:
    from_nothing = len(node.operands) < len(node.eqn.invars)
    return from_nothing or node.fills


def is_view(node: Node) -> bool:
    """Whether it swaps two groups of neighboring axes, which matmuls read without a copy."""
    if node.primitive != "transpose":
        return False
    shape = _shape(node, 0)
    axes = [axis for axis in node.eqn.params["permutation"] if shape[axis] != 1]
    breaks = [after for before, after in itertools.pairwise(axes) if after != before + 1]
    return len(breaks) <= 1


def is_row_maximum(node: Node) -> bool:
    """Whether it is the maximum of short rows, which a softmax recomputes wherever it is used."""
    shape = _shape(node, 0)
    is_last = tuple(node.eqn.params.get("axes", ())) == (len(shape) - 1,) and len(shape) > 1
    return node.primitive == "reduce_max" and is_last and shape[-1] <= ROW


def is_whole(node: Node) -> bool:
    """Whether it reduces an array to one number."""
    return is_reduction(node) and bool(node.operands) and len(node.eqn.params["axes"]) == len(_shape(node, 0))


def is_of_rows(node: Node) -> bool:
    """Whether it reduces each row of an array to one number."""
    return is_reduction(node) and bool(node.operands) and not is_whole(node) and not rows_of_columns(node)


def rows_of_columns(node: Node) -> int:
    """Returns how many rows it sums by column; 0 if it sums rows, or everything."""
    if not (is_reduction(node) and node.operands):
        return 0
    shape, axes = _shape(node, 0), node.eqn.params["axes"]
    last = max((axis for axis, size in enumerate(shape) if size > 1), default=None)
    return 0 if last is None or last in axes else math.prod(shape[axis] for axis in axes)


def updated(node: Node) -> int:
    """Returns how many elements are written in place."""
    return math.prod(_shape(node, 1 if node.primitive == "dynamic_update_slice" else 2))


def is_vector(array: Array) -> bool:
    """Whether all its elements are along one axis."""
    return sum(size > 1 for size in array.shape) <= 1


def _shape(node: Node, index: int) -> list[int]:
    return [as_count(size) for size in node.eqn.invars[index].aval.shape]
