"""What a traced program computes in which dtype, and what its forward pass keeps for the backward pass."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})


class Products(NamedTuple):
    """Matmuls and convolutions: how many take both operands in the wanted dtype, of how many."""

    wanted: int
    total: int

    def __sub__(self, other: Products) -> Products:
        return Products(self.wanted - other.wanted, self.total - other.total)

    def __str__(self) -> str:
        return f"{self.wanted}/{self.total}"


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr and of those inside its parameters, a body that is called twice twice."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)  # noqa: PLW2901
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def products(jaxpr: Any, dtype: Any) -> Products:
    """Counts the matmuls among the equations of a jaxpr."""
    counted: Counter[bool] = Counter()
    for equation in equations(jaxpr):
        if equation.primitive.name in PRODUCTS:
            counted[all(operand.aval.dtype == dtype for operand in equation.invars[:2])] += 1
    return Products(counted[True], counted.total())


def converts(jaxpr: Any) -> int:
    """Number of conversions from one floating dtype to another."""

    def is_float(variable: Any) -> bool:
        return jax.dtypes.issubdtype(variable.aval.dtype, np.floating)

    return sum(
        equation.primitive.name == "convert_element_type"
        and is_float(equation.invars[0])
        and is_float(equation.outvars[0])
        and equation.invars[0].aval.dtype != equation.outvars[0].aval.dtype
        for equation in equations(jaxpr)
    )


def residual_bytes(loss: Callable[..., Any], params: Any, *others: Any) -> int:
    """Bytes of the arrays in the closure of `jax.vjp`, which live until the backward pass.

    Each array counts once. The arguments do not count, as they live anyway; casts of them do.
    """

    def closure(params: Any, *others: Any) -> Any:
        _, pullback, _ = jax.vjp(lambda params: loss(params, *others), params, has_aux=True)
        return pullback

    jaxpr = jax.make_jaxpr(closure)(params, *others).jaxpr
    arguments = set(jaxpr.invars)
    kept = {variable for variable in jaxpr.outvars if not hasattr(variable, "val") and variable not in arguments}
    return sum(math.prod(variable.aval.shape) * variable.aval.dtype.itemsize for variable in kept)
