"""What a traced function computes, and in which dtypes."""

import jax
import jax.numpy as jnp

CONTRACTIONS = ("dot_general", "conv_general_dilated")


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


def contractions(fun, *args):
    """The matrix products and convolutions of a function: a list of (name scope, dtypes of the operands)."""
    return [
        (scope, {str(operand.aval.dtype) for operand in eqn.invars})
        for scope, eqn in _equations(jax.make_jaxpr(fun)(*args).jaxpr, "")
        if eqn.primitive.name in CONTRACTIONS
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
