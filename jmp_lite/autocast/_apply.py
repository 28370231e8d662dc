"""Runs one equation, or its replacement, as decided."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jmp_lite._compat import INLINE, Equation, bind, run
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite._tree import cast
from jmp_lite.autocast._decision import Decision, How
from jmp_lite.autocast._ops import GATHERS, Op
from jmp_lite.autocast._rules import Precision
from jmp_lite.autocast._values import is_eligible
from jmp_lite.distributed._gather import travel
from jmp_lite.errors import InvalidOpError
from jmp_lite.products._matmul import Matmul, add_terms, float32_result, matmul, product_of, repeat, rounded_scale


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
            return [_rounded_mul(*arrays, precision.dtype)]
        case How.SLOPE:
            return [_with_slope(eqn.params["jaxpr"], arrays[0])]
        case How.PRODUCT:
            return [_product(eqn, arrays, precision, decision)]
        case _:
            return _lowered(eqn, arrays, precision, decision)


def _lowered(eqn: Equation, arrays: Sequence[Any], precision: Precision, decision: Decision) -> list[Any]:
    if decision.dtype == FLOAT32:
        return bind(eqn, arrays, eqn.params)
    params = _params_at(eqn.params, precision.dtype)
    if eqn.primitive.name == "div":
        return [_with_its_scope(_divided, *arrays)]
    if eqn.primitive.name == "integer_pow" and params["y"] == 3:
        return [_with_its_scope(_cubed, *arrays)]
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _rounded_mul(x: Any, y: Any, dtype: DType) -> Any:
    """Multiplies before it rounds: an operand may be beyond the dtype, such as the slope of a logarithm in float16."""
    return cast(lax.mul(cast(x, FLOAT32), cast(y, FLOAT32)), dtype)


def _rounded_mul_jvp(dtype: DType, primals: Any, tangents: Any) -> tuple[Any, Any]:
    x, y = (cast(primal, dtype) for primal in primals)
    terms = add_terms(tangents, lambda t: lax.mul(cast(t, dtype), y), lambda t: lax.mul(x, cast(t, dtype)))
    return _rounded_mul(*primals, dtype), terms


_rounded_mul.defjvp(_rounded_mul_jvp, symbolic_zeros=True)


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
    result = dot(*arrays, *numbers, **params)
    if is_eligible(eqn.outvars[0].aval):
        dtype = FLOAT32 if result.dtype == FLOAT32 else precision.dtype
    return cast(result, dtype)


def _with_slope(jaxpr: Any, x: Any) -> Any:
    """Computes an element-wise function in float32, and rounds its value and its derivative to the dtype of ``x``."""

    def wide(x: Any) -> Any:
        return run(jaxpr, cast(x, FLOAT32))[0]

    @jax.custom_jvp
    def function(x: Any) -> Any:
        return cast(wide(x), x.dtype)

    @function.defjvp
    def rule(primals: Any, tangents: Any) -> tuple[Any, Any]:
        x = cast(primals[0], FLOAT32)
        value, slope = jax.jvp(wide, (x,), (jnp.ones_like(x),))
        return cast(value, primals[0].dtype), tangents[0] * cast(slope, primals[0].dtype)

    return function(x)


def _with_its_scope(function: Any, *arrays: Any) -> Any:
    """Calls a function with a derivative of our own, whose equations ``jit`` leaves in the scope of the call."""
    return jax.jit(function, inline=INLINE)(*arrays)


@jax.custom_jvp
def _divided(x: Any, y: Any) -> Any:
    """Divides 16-bit arrays. JAX's derivative squares the divisor, which soon leaves the range of float16."""
    return lax.div(x, y)


def _divided_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    _, y = primals
    quotient = _divided(*primals)
    return quotient, _divided(add_terms(tangents, lambda t: t, lambda t: lax.neg(lax.mul(quotient, t))), y)


_divided.defjvp(_divided_jvp, symbolic_zeros=True)


@jax.custom_jvp
def _cubed(x: Any) -> Any:
    """A 16-bit array to the third power, as in ``gelu``. JAX's derivative squares it, even where the slope is zero."""
    return lax.integer_pow(x, 3)


def _cubed_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    [x], [tangent] = primals, tangents
    return _cubed(x), 3 * lax.mul(lax.mul(tangent, x), x)


_cubed.defjvp(_cubed_jvp)


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
