"""What a traced function computes, and in which dtypes."""

import math

import jax
import jax.numpy as jnp

from jmp_lite.autocast._ops import HANDFUL

CONTRACTIONS = ("dot_general", "conv_general_dilated")

#: What is float32 under autocast, written down apart from its table: a rounded argument or result costs many digits,
STEEP = frozenset(
    {
        *("exp", "exp2", "expm1", "log", "log1p", "log2", "pow", "rsqrt", "sqrt", "cbrt", "sin", "cos", "tan"),
        *("asin", "acos", "atan", "atan2", "sinh", "cosh", "asinh", "acosh", "atanh", "erf_inv"),
        *("lgamma", "digamma", "igamma", "igammac", "floor", "ceil", "round"),
    }
)
#: or rounding adds up.
SUMS = frozenset(
    {
        *("reduce_sum", "reduce_prod", "cumsum", "cumprod", "cumlogsumexp", "reduce_window_sum"),
        *("scatter-add", "scatter-sub", "scatter-mul"),
    }
)


def _is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _equations(jaxpr, scope):
    """Pairs of name scope and equation, those of loops and calls included."""
    for eqn in jaxpr.eqns:
        here = "/".join(filter(None, [scope, str(eqn.source_info.name_stack)]))
        yield here, eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _equations(getattr(value, "jaxpr", value), here)


def is_worth_16_bits(eqn):
    """Whether a matmul is one that autocast lowers: a matrix unit gains from it, and nobody asked for more."""
    if eqn.primitive.name not in (*CONTRACTIONS, "ragged_dot_general") or "HIGH" in str(eqn.params["precision"]):
        return False
    if eqn.primitive.name != "dot_general":
        return True
    (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
    if all(operand.aval.ndim == len(contracted) + len(batch) for operand in eqn.invars):
        return False
    return math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted) > HANDFUL


def float_dtypes(eqn):
    """The names of the floating dtypes among operands and results."""
    return {str(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars) if jnp.issubdtype(v.aval.dtype, jnp.floating)}


def contractions(fun, *args):
    """The matmuls of a function that are worth 16 bits: a list of (name scope, dtypes of the operands)."""
    return [
        (scope, {str(operand.aval.dtype) for operand in eqn.invars})
        for scope, eqn in _equations(jax.make_jaxpr(fun)(*args).jaxpr, "")
        if eqn.primitive.name in CONTRACTIONS and is_worth_16_bits(eqn)
    ]


def equations(name, fun, *args):
    """The equations of one primitive in a function, those inside loops and calls included."""
    return [eqn for _, eqn in _equations(jax.make_jaxpr(fun)(*args).jaxpr, "") if eqn.primitive.name == name]


def primitives(fun, *args):
    """The names of the primitives of a function, those inside loops and calls included."""
    return [eqn.primitive.name for _, eqn in _equations(jax.make_jaxpr(fun)(*args).jaxpr, "")]


def dtypes(tree):
    """The set of the names of the floating dtypes in a tree."""
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)}


def shape_of(call, *args):
    """The structure of a result, and the dtypes in it."""
    return jax.tree.map(jnp.result_type, jax.eval_shape(call, *args))
