"""Runs one equation, or its replacement, as decided."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jmp_lite._compat import Equation, bind
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite._tree import cast
from jmp_lite.autocast._decision import Decision, How
from jmp_lite.autocast._derivatives import rounded_mul, stand_in, with_slope
from jmp_lite.autocast._ops import GATHERS, Op
from jmp_lite.autocast._rules import Precision
from jmp_lite.autocast._values import is_eligible
from jmp_lite.distributed._gather import travel
from jmp_lite.errors import InvalidOpError
from jmp_lite.products._matmul import Matmul, float32_result, matmul, product_of, repeat, rounded_scale


def apply(eqn: Equation, arrays: Sequence[Any], op: Op, precision: Precision, decision: Decision) -> list[Any]:
    """Runs the primitive of an equation, or its replacement, on operands that have been cast."""
    match decision.how:
        case How.BOUND:
            return bind(eqn, arrays, eqn.params)
        case How.OP:
            function: Any = op
            results = function(*arrays, **eqn.params)
            return _checked(eqn, list(results) if eqn.primitive.multiple_results else [results])
        case How.DOT:
            return [_users_dot(eqn, arrays, precision, decision)]
        case How.WIDE:
            return [cast(result, precision.dtype) for result in bind(eqn, arrays, eqn.params)]
        case How.ROUNDED:
            return [rounded_mul(*arrays, precision.dtype)]
        case How.SLOPE:
            return [with_slope(eqn.params["jaxpr"], arrays[0])]
        case How.PRODUCT:
            return [_product(eqn, arrays, precision, decision)]
        case _:
            return _lowered(eqn, arrays, precision, decision)


def _lowered(eqn: Equation, arrays: Sequence[Any], precision: Precision, decision: Decision) -> list[Any]:
    if decision.dtype == FLOAT32:
        return bind(eqn, arrays, eqn.params)
    params = _params_at(eqn.params, precision.dtype)
    if (function := stand_in(eqn)) is not None:
        return [function(*arrays)]
    if not any(getattr(array, "dtype", None) == FLOAT32 for array in arrays):
        return bind(eqn, arrays, params)
    return [_of_weights(eqn, arrays, params, precision)]


def _product(eqn: Equation, arrays: Sequence[Any], precision: Precision, decision: Decision) -> Any:
    params = _params_at(eqn.params, precision.dtype)
    del params["preferred_element_type"]
    if eqn.primitive.name == "dot_general":
        result_dtype = decision.result_dtype or precision.dtype
        return matmul(*arrays, Matmul(precision.dtype, tuple(params.items()), result_dtype, precision.accumulates))
    arrays = [cast(array, precision.dtype) if array.dtype == FLOAT32 else array for array in arrays]
    return float32_result(_Multiply(eqn), *arrays)


class _Multiply:
    """A matmul other than ``dot_general`` as a hashable function of its operands and result dtype."""

    def __init__(self, eqn: Equation) -> None:
        self.eqn = eqn

    def __call__(self, *operands_and_dtype: Any) -> Any:
        *operands, dtype = operands_and_dtype
        params = {**_params_at(self.eqn.params, dtype), "preferred_element_type": dtype}
        return bind(self.eqn, operands, params)[0]


def _users_dot(eqn: Equation, arrays: Sequence[Any], precision: Precision, decision: Decision) -> Any:
    dtype = decision.result_dtype or precision.dtype
    params = _params_at(eqn.params, dtype)
    if params.get("out_sharding") is None:
        params.pop("out_sharding", None)
    dot: Any = product_of(precision.dot, eqn.primitive.name)
    numbers = [params.pop("dimension_numbers")] if eqn.primitive.name == "dot_general" else []
    if dtype != precision.dtype and all(array.dtype == FLOAT32 for array in arrays[:2]):
        # Two arguments, and a result that is wanted in float32: nothing else would tell of the compute dtype.
        arrays = [cast(arrays[0], precision.dtype), *arrays[1:]]
    multiply, operands = functools.partial(dot, **params), [*arrays, *numbers]
    result = multiply(*operands) if decision.tangent is None else _derivative(multiply, operands, decision.tangent)
    if is_eligible(eqn.outvars[0].aval):
        dtype = FLOAT32 if result.dtype == FLOAT32 else precision.dtype
    return cast(result, dtype)


def _derivative(multiply: Callable[..., Any], operands: Sequence[Any], side: int) -> Any:
    """Applies the derivative of a matmul to a tangent: it is linear, where one that rounds its operands is not."""
    before, tangent, after = operands[:side], operands[side], operands[side + 1 :]

    def of_tangent(x: Any) -> Any:
        return multiply(*before, x, *after)

    return jax.jvp(of_tangent, (jnp.zeros_like(tangent),), (tangent,))[1]


def _of_weights(eqn: Equation, arrays: Sequence[Any], params: dict[str, Any], precision: Precision) -> Any:
    """Runs an equation on weights and rounds them inside."""
    result, dtype = eqn.outvars[0].aval, precision.dtype
    if eqn.primitive.name in GATHERS:

        def gather(array: Any) -> Any:
            return bind(eqn, [array], params)[0]

        return cast(travel(arrays[0], dtype, precision.reduce_dtype, gather, gather), dtype)
    repeated = [array.ndim == result.ndim and array.shape != result.shape for array in arrays]
    if eqn.primitive.name == "mul" and repeated[0] != repeated[1]:
        weight, other = arrays if repeated[0] else arrays[::-1]
        return rounded_scale(cast(other, dtype), weight)
    # The sum that the gradient of a bias is comes before the cast back.
    whole = [repeat(array, result) if is_small else array for array, is_small in zip(arrays, repeated, strict=True)]
    return bind(eqn, [cast(array, dtype) for array in whole], params)[0]


def _checked(eqn: Equation, results: list[Any]) -> list[Any]:
    """Checks what a user's function returned in place of a primitive."""
    expected = [v.aval for v in eqn.outvars]
    is_alike = len(results) == len(expected) and all(
        isinstance(result, jax.Array)
        and result.shape == aval.shape
        and (result.dtype == aval.dtype or (is_eligible(aval) and jnp.issubdtype(result.dtype, jnp.floating)))
        for result, aval in zip(results, expected, strict=False)
    )
    if not is_alike:
        found = ", ".join(str(jax.typeof(r)) if isinstance(r, jax.Array) else repr(r) for r in results)
        raise InvalidOpError(
            f"The function in place of {eqn.primitive.name!r} returned {found}. It must return "
            f"{', '.join(map(str, expected))}; any floating dtype will do for float32."
        )
    return results


def _params_at(params: dict[str, Any], dtype: DType) -> dict[str, Any]:
    """Adapts the parameters of an equation that was written for float32 to a compute dtype."""
    changed = dict(params)
    if "preferred_element_type" in params:
        changed["preferred_element_type"] = dtype
    if params.get("out_dtype") is not None:
        changed["out_dtype"] = dtype
    if isinstance(params.get("precision"), (jax.lax.DotAlgorithm, jax.lax.DotAlgorithmPreset)):
        changed["precision"] = None  # an algorithm names the dtypes of its operands
    return changed
