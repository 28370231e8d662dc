"""The precision that each JAX primitive wants: one table, with the reason for every family.

Primitives are keyed by name, so the table holds for every supported version of JAX. A primitive that is not in it keeps
the dtypes it was written for.

References:
    PyTorch, ``aten/src/ATen/autocast_mode.h``; TensorFlow, ``auto_mixed_precision_lists.h``. Both see whole layers; a
    jaxpr holds their parts: norms, softmax and losses follow from the classes of logarithms, exponentials, roots and
    sums, and from the search for what these depend on (``_demand.py``).
"""

import enum
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import Equation, Primitive, program
from jmp_lite.autocast._library import library_of
from jmp_lite.autocast._programs import PROGRAMS
from jmp_lite.errors import InvalidOpError


class OpClass(enum.Enum):
    """What autocast does with a primitive.

    Example:
        >>> jmp.OpClass.ALLOW.name, jmp.OpClass("as_written") is jmp.OpClass.AS_WRITTEN
        ('ALLOW', True)
    """

    ALLOW = "allow"
    """Runs in the compute dtype."""
    DENY = "deny"
    """Runs in float32."""
    FOLLOW = "follow"
    """Runs in the precision of its operands, or of its consumers where they agree."""
    AS_WRITTEN = "as_written"
    """Runs on the dtypes it was written for, whatever those are."""
    NESTED = "nested"
    """Holds other programs: they are autocast in their turn."""


class Family(NamedTuple):
    """Primitives that are alike."""

    op_class: OpClass
    reason: str
    primitives: str


_MOVEMENT = "moves whole arrays: cheaper after a cast to 16 bits"
_PICKING = "picks values: exact in the precision of its operands"
_PER_OPERAND = "treats each operand separately: each keeps its precision"
_SOLVERS = "linear algebra: solvers need the digits they were written for"
_SUMS = "sums and products of many terms: rounding errors accumulate"
_POOLING = "window sums: accumulate in float32, and are as precise as their input"
_CALLS_OUT = "calls out of the program: the other side expects the dtypes it was written for"
_KERNELS = "kernels: they were traced for their dtypes; cast around them"

#: The last family of this table is what stands for primitives that are not in it.
FAMILIES = (
    Family(
        OpClass.ALLOW,
        "matmuls and convolutions: their units take 16-bit operands and accumulate in float32",
        "dot_general conv_general_dilated ragged_dot_general scaled_dot",
    ),
    Family(
        OpClass.DENY,
        "steep or singular functions: a rounded argument or result costs many digits",
        """exp exp2 expm1 log log1p log2 pow rsqrt sqrt cbrt sin cos tan asin acos atan atan2 sinh cosh asinh acosh
        atanh erf_inv lgamma digamma polygamma igamma igammac igamma_grad_a random_gamma_grad
        regularized_incomplete_beta zeta bessel_i0e bessel_i1e polynomial nextafter""",
    ),
    Family(
        OpClass.DENY,
        "steps: a rounded argument lands on another step",
        "floor ceil round",
    ),
    Family(
        OpClass.DENY,
        _SUMS,
        """reduce_sum reduce_prod reduce cumsum cumprod cumlogsumexp reduce_window scatter-add scatter-sub
        scatter-mul""",
    ),
    Family(
        OpClass.FOLLOW,
        "mild arithmetic: as precise as its operands",
        """add sub mul div rem square one_minus_square integer_pow tanh logistic erf erfc add_any mul_add
        select_and_scatter_add select_and_gather_add symmetric_product""",
    ),
    Family(OpClass.FOLLOW, _POOLING, "reduce_window_sum"),
    Family(
        OpClass.FOLLOW,
        _MOVEMENT,
        """broadcast_in_dim broadcast_to reshape transpose squeeze expand_dims rev slice copy copy_p stop_gradient
        all_gather all_gather_invariant all_gather_reduced all_to_all ppermute pbroadcast sharding_constraint
        layout_constraint reshard mesh_cast unreduced_reshard relayout with_memory_space_constraint""",
    ),
    Family(
        OpClass.FOLLOW,
        _PICKING,
        """dynamic_slice dynamic_update_slice gather concatenate pad select_n tile stack unstack split neg abs sign max
        min clamp reduce_max reduce_min cummax cummin reduce_window_max reduce_window_min top_k approx_top_k argmax
        argmin eq ne lt le gt ge eq_to lt_to le_to is_finite name""",
    ),
    Family(
        OpClass.FOLLOW,
        "changes form: as precise as its operands",
        """iota convert_element_type real imag custom_lin reduce_precision zeros_like empty_like reduce_scatter
        unreduced_psum unreduced_pmax unreduced_pmin unreduced_reduce_scatter""",
    ),
    Family(
        OpClass.FOLLOW,
        _PER_OPERAND,
        """optimization_barrier psum psum_invariant pmax pmin sort device_put pvary pcast preduced reduced_vary_cast
        reduced_vary_cast_p vary_unreduced_cast vary_unreduced_cast_p to_vma""",
    ),
    Family(OpClass.NESTED, "holds programs, which autocast enters", " ".join(PROGRAMS)),
    Family(
        OpClass.AS_WRITTEN,
        _SOLVERS,
        """cholesky cholesky_update lu lu_pivots_to_permutation qr geqrf geqp3 ormqr householder_product eig eigh svd
        schur hessenberg triangular_solve tridiagonal tridiagonal_solve custom_linear_solve""",
    ),
    Family(OpClass.AS_WRITTEN, "transforms: only float32 and complex numbers", "fft"),
    Family(
        OpClass.AS_WRITTEN,
        "random numbers: the same bits with and without autocast",
        """random_bits random_clone random_fold_in random_gamma random_seed random_split random_unwrap random_wrap
        rng_bit_generator rng_uniform threefry2x32 threefry4x32 philox2x32 philox4x32 iota_2x32_shape""",
    ),
    Family(
        OpClass.AS_WRITTEN,
        "bits, integers and complex numbers",
        """bitcast_convert_type and or xor not shift_left shift_right_arithmetic shift_right_logical clz
        population_count mulhi reduce_and reduce_or reduce_xor complex conj to_edtype from_edtype""",
    ),
    Family(
        OpClass.AS_WRITTEN,
        "writes into arrays: results have the dtype of the array written to",
        "scatter scatter-min scatter-max select_and_scatter",
    ),
    Family(
        OpClass.AS_WRITTEN,
        "mutable arrays: they keep their dtype",
        """get swap addupdate accum_grad_in_ref new_ref empty_ref free_ref freeze empty empty2 pin unpin box_get box_set
        new_box new_log log_read log_extend get_global masked_load masked_swap""",
    ),
    Family(
        OpClass.AS_WRITTEN,
        _CALLS_OUT,
        """pure_callback io_callback debug_callback debug_print inspect_sharding check call_exported call_hi_primitive
        call_hi_primitive_linearized jaxpr_call""",
    ),
    Family(
        OpClass.AS_WRITTEN,
        _KERNELS,
        """pallas_call ffi_call custom_partitioning cudnn_fusion core_map mpmd_map dot_product_attention_fwd
        dot_product_attention_fwd_wrapper dot_product_attention_bwd
        dot_product_attention_bwd_wrapper dot_product_attention_fp8_fwd dot_product_attention_fp8_fwd_wrapper
        dot_product_attention_fp8_bwd dot_product_attention_fp8_bwd_wrapper scaled_matmul scaled_matmul_wrapper""",
    ),
    Family(OpClass.AS_WRITTEN, "not in the table: the dtypes it was written for are safe", ""),
)

_BY_NAME: dict[str, Family] = {name: family for family in FAMILIES for name in family.primitives.split()}

#: Matmuls of so few terms gain nothing from a matrix unit, which takes at least eight at a time, and are geometry:
#: rotations, cameras, grids (benchmarks/RESULTS.md, "Small contractions").
HANDFUL = 4
_HANDFUL = Family(OpClass.FOLLOW, f"a matmul of at most {HANDFUL} terms gains nothing from a matrix unit", "")
_INNER = Family(
    OpClass.DENY, "an inner product is a sum: it gains nothing from a matrix unit, and rounding errors accumulate", ""
)
_ASKED = Family(OpClass.AS_WRITTEN, "precision={} asks for more than the compute dtype", "")
_SMALL_POWER = Family(OpClass.FOLLOW, "a small positive power: as precise as its operand", "")
_OTHER_POWER = Family(OpClass.DENY, "a large or negative power: a rounded argument costs many digits", "")
_LIBRARY = Family(OpClass.AS_WRITTEN, "a matmul that a library function wrote, not the user: as written", "")

#: Activations of ``jax.nn`` that hold exponentials or logarithms, by the name of their ``jit`` equation. Their slopes
#: are bounded, so that value and slope may be rounded once they are computed.
ACTIVATIONS = frozenset(["softplus", "mish", "log_sigmoid", "elu", "selu", "celu", "squareplus"])

#: Functions that saturate: near 1 the compute dtype has no numbers left, and ``log(1 - p)`` needs some.
SATURATES = frozenset({"logistic", "tanh", "erf", "erfc", "clamp", "max", "min"})

#: Results of these have no more information than their operands: what is a copy of something smaller stays one.
KEEPS_BROADCAST = frozenset(
    {
        *("reshape", "squeeze", "expand_dims", "transpose", "convert_element_type", "copy", "stop_gradient"),
        *("select_n", "neg", "add", "sub", "mul", "div", "max", "min", "exp"),
    }
)

#: Arithmetic that makes of a state its next value, or a part of it.
UPDATES = frozenset({"add", "sub", "mul", "div", "neg", "select_n"})

#: Primitives that add.
ADDS = frozenset({"add", "sub", "add_any"})

#: Primitives that gather over devices: their gradient is a sum over devices.
GATHERS = frozenset({"all_gather", "all_gather_reduced"})

#: Primitives that move parts of arrays, or leave them where they are.
MOVES_PARTS = frozenset({"dynamic_slice", "concatenate", "split", "stack", "unstack", "name", "optimization_barrier"})

#: Results that say where something is or what it is like, which does not hang on digits.
PLACES = frozenset({"argmax", "argmin", "is_finite"})
#: The same but for their first result.
CHOOSES = frozenset({"top_k", "approx_top_k"})

PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general", "scaled_dot"})

Op = OpClass | Callable[..., Any]

#: What users added; filled when modules are imported.
_REGISTERED: dict[str, Op] = {}


def register_op(primitive: "str | Primitive", op: Op) -> None:
    """Registers what autocast does with a primitive, for all functions.

    Args:
        primitive: A primitive, or its name as it appears in a jaxpr.
        op: A class, or a function ``op(*operands, **params)`` that replaces the primitive. It receives the operands,
            float32 ones cast to the compute dtype, and the parameters of the equation, and returns what the primitive
            would, in any floating dtype.

    Raises:
        InvalidOpError: If ``op`` is neither, or ``OpClass.NESTED``, which only this library can serve.

    Example:
        >>> jmp.register_op("my_fused_attention", jmp.OpClass.ALLOW)

    References:
        ``torch.library.register_autocast``.
    """
    name = primitive if isinstance(primitive, str) else primitive.name
    _REGISTERED.update(checked_ops({name: op}))


def checked_ops(ops: Any) -> dict[str, Op]:
    """Checks the user's ops and returns them by primitive name."""
    if not (ops is None or isinstance(ops, Mapping)):
        raise InvalidOpError(f"ops must map names of primitives to classes or functions, got {ops!r}.")
    items = [] if ops is None else ops.items()
    named = {str(getattr(primitive, "name", primitive)): op for primitive, op in items}
    return {name: _checked(name, op) for name, op in named.items()}


def _checked(name: str, op: Any) -> Op:
    is_function = callable(op) and getattr(op, "__hash__", None) is not None
    if op is OpClass.NESTED or not (isinstance(op, OpClass) or is_function):
        raise InvalidOpError(
            f"{op!r} cannot stand for primitive {name!r}. Give OpClass.ALLOW, DENY, FOLLOW or AS_WRITTEN, or a "
            "hashable function of the operands and parameters."
        )
    if isinstance(op, OpClass) and op is not OpClass.AS_WRITTEN and family(name).reason in (_KERNELS, _CALLS_OUT):
        raise InvalidOpError(
            f"OpClass.{op.name} cannot stand for primitive {name!r}, which was traced for the dtypes it has. Cast "
            "around it with jmp.with_policy(function, policy), or give a function that takes its place."
        )
    checked_op: Op = op
    return checked_op


def family(name: str) -> Family:
    """Returns the family that a primitive belongs to."""
    return _BY_NAME.get(name, FAMILIES[-1])


def is_known(name: str) -> bool:
    """Whether the table holds a primitive."""
    return name in _BY_NAME


def moves_whole_arrays(name: str) -> bool:
    """Whether a primitive only moves arrays, so that a cast may come first."""
    return family(name).reason is _MOVEMENT


def adds_axes(eqn: Equation) -> bool:
    """Whether an equation broadcasts its operand along new axes, perhaps of size one, as for a bias."""
    name: str = eqn.primitive.name
    if name != "reshape":
        return name == "broadcast_in_dim"
    source, result = (v.aval.shape for v in (*eqn.invars[:1], *eqn.outvars))
    return len(source) < len(result) and [n for n in source if n != 1] == [n for n in result if n != 1]


def sums(name: str) -> bool:
    """Whether a primitive sums many terms, so that rounding errors average out."""
    return family(name).reason is _SUMS


def sums_windows(name: str) -> bool:
    """Whether a primitive sums windows of an array, as average pooling does."""
    return family(name).reason is _POOLING


def picks_values(name: str) -> bool:
    """Whether every element of the results is an element of the operands, or the sign or index of one."""
    return family(name).reason is _PICKING


def treats_operands_separately(name: str) -> bool:
    """Whether each result of a primitive depends on one operand alone."""
    return family(name).reason is _PER_OPERAND


def keys_of(eqn: Equation) -> int:
    """Returns the number of operands, the first ones, by which an equation chooses places."""
    name = eqn.primitive.name
    if name == "sort":
        return int(eqn.params["num_keys"]) if len(eqn.invars) > 1 else 0
    return int(name in CHOOSES or name in ("argmax", "argmin"))


def is_kernel(name: str) -> bool:
    """Whether a primitive is a kernel or a foreign call."""
    return family(name).reason is _KERNELS


def solves(name: str) -> bool:
    """Whether a primitive is linear algebra."""
    return family(name).reason is _SOLVERS


def is_activation(eqn: Equation) -> bool:
    """Whether an equation is an activation of ``jax.nn`` with a bounded slope, of one array."""
    is_of_one = len(eqn.invars) == len(eqn.outvars) == 1
    if eqn.primitive.name != "jit" or eqn.params["name"] not in ACTIVATIONS or not is_of_one:
        return False
    source = getattr(program(eqn.params["jaxpr"])[0].debug_info, "func_src_info", "")
    return "/jax/_src/nn/" in str(source).replace("\\", "/")


def classify(eqn: Equation, ops: Mapping[str, Op]) -> tuple[Op, str]:
    """Returns the class of an equation, or the function that replaces it, and the reason.

    Args:
        eqn: An equation of a jaxpr.
        ops: The user's ops for this function; they override registered ops and the table.
    """
    name = eqn.primitive.name
    for source, table in (("given in ops", ops), ("registered", _REGISTERED)):
        if name in table:
            return table[name], source
    op_class, reason, _ = family(name)
    if name == "integer_pow":
        op_class, reason, _ = _SMALL_POWER if 1 <= eqn.params["y"] <= 3 else _OTHER_POWER
    elif name in PRODUCTS and (asked := asked_precision(eqn)):
        op_class, reason = _ASKED.op_class, _ASKED.reason.format(asked)
    elif name == "dot_general" and is_handful(eqn):
        op_class, reason, _ = _HANDFUL
    elif name == "dot_general" and is_inner(eqn):
        op_class, reason, _ = _INNER
    elif name in PRODUCTS and library_of(eqn):
        op_class, reason, _ = _LIBRARY
    return op_class, reason


def asked_precision(eqn: Equation) -> str:
    """Returns the name of the precision if a matmul asks for more than 16-bit operands give."""
    precision = eqn.params.get("precision")
    is_pair = isinstance(precision, tuple) and not isinstance(precision, jax.lax.DotAlgorithm)
    for asked in precision if is_pair else (precision,):
        if asked in (jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST):
            return str(asked.name)
        if isinstance(asked, jax.lax.DotAlgorithmPreset):
            if re.search(r"_X\d|TF32|\AF32|\AF64", asked.name):
                return str(asked.name)
        elif isinstance(asked, jax.lax.DotAlgorithm):
            is_wide = np.dtype(asked.lhs_precision_type).itemsize > 2
            if is_wide or asked.num_primitive_operations > 1:
                return "DotAlgorithm"
    return ""


def takes_repeatedly(eqn: Equation) -> bool:
    """Whether an equation may read an element more than a handful of times, so that its gradient is a sum."""
    if eqn.primitive.name != "gather":
        return bool(eqn.primitive.name == "dynamic_slice")
    *shape, _ = eqn.invars[1].aval.shape
    batched = eqn.params["dimension_numbers"].start_indices_batching_dims
    times = math.prod(size for axis, size in enumerate(shape) if axis not in batched)
    return not isinstance(times, int) or times > HANDFUL


def rounds_to_integers(eqn: Equation) -> bool:
    """Whether an equation turns floats into integers, such as coordinates into array indices."""
    name = eqn.primitive.name
    is_cast = name == "convert_element_type" and jnp.issubdtype(eqn.params["new_dtype"], jnp.integer)
    return is_cast or name in ("floor", "ceil", "round")


def is_inner(eqn: Equation) -> bool:
    """Whether a matmul computes one number per pair of vectors."""
    (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
    return all(v.aval.ndim == len(contracted) + len(batch) for v in eqn.invars)


def is_handful(eqn: Equation) -> bool:
    """Whether a matmul sums too few terms for a matrix unit to pay."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    terms = math.prod(shape[dimension] for dimension in contracted)
    return isinstance(terms, int) and terms <= HANDFUL
