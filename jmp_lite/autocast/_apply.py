"""Runs one equation, or what takes its place, on operands whose dtypes have been decided."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jmp_lite._compat import Equation, bind
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite._errors import InvalidOpError
from jmp_lite._tree import cast
from jmp_lite.autocast._dot import Product, accumulating_dot, product_of
from jmp_lite.autocast._ops import GATHERS, Op, OpClass
from jmp_lite.autocast._rules import Precision
from jmp_lite.autocast._values import is_eligible
from jmp_lite.distributed._gather import travel
from jmp_lite.products._matmul import repeat, rounded_scale

#: Primitives that repeat an operand with fewer elements, so that its gradient is a sum.
_REPEATS = frozenset({"add", "sub", "mul"})


def takes_weights(eqn: Equation, op: Op, precision: Precision, dtype: DType | None) -> bool:
    """Whether weights go into an equation as they are, to be rounded inside, so that their gradients are not."""
    if not isinstance(op, OpClass) or dtype in (None, FLOAT32):
        return False
    if eqn.primitive.name in GATHERS:
        return dtype != precision.reduce_dtype
    is_product = eqn.primitive is jax.lax.dot_general_p and op is OpClass.ALLOW
    dot: Any = precision.dot
    if is_product and isinstance(dot, Product):
        return True
    is_ours = dot is None or dot is accumulating_dot
    return precision.widens_gradients and ((is_product and is_ours) or eqn.primitive.name in _REPEATS)


def apply(eqn: Equation, arrays: Sequence[Any], op: Op, precision: Precision, dtype: DType | None) -> list[Any]:
    """Runs the primitive of an equation, or what takes its place, on operands that have been cast."""
    if dtype is None or dtype != precision.dtype or precision.mode in ("full", "off"):
        return bind(eqn, arrays, eqn.params)
    if not isinstance(op, OpClass):
        results = op(*arrays, **eqn.params)
        return _checked(eqn, list(results) if eqn.primitive.multiple_results else [results])
    params = _params_at(eqn.params, dtype)
    is_product = eqn.primitive.name == "dot_general" and op is OpClass.ALLOW
    if is_product and precision.dot is not None and is_eligible(eqn.outvars[0].aval):
        if params.get("out_sharding") is None:
            params.pop("out_sharding", None)
        return [cast(precision.dot(*arrays, params.pop("dimension_numbers"), **params), dtype)]
    if dtype == FLOAT32 or not any(getattr(array, "dtype", None) == FLOAT32 for array in arrays):
        return bind(eqn, arrays, params)
    return [_of_weights(eqn, arrays, params, dtype, precision.reduce_dtype)]


def _of_weights(eqn: Equation, arrays: Sequence[Any], params: dict[str, Any], dtype: DType, reduce_dtype: DType) -> Any:
    """Runs an equation on weights, which are rounded inside."""
    name, result = eqn.primitive.name, eqn.outvars[0].aval
    if name == "dot_general":
        return product_of(arrays, params, dtype, accumulates=False)
    if name in GATHERS:

        def gather(array: Any) -> Any:
            return bind(eqn, [array], params)[0]

        return cast(travel(arrays[0], dtype, reduce_dtype, gather, gather), dtype)
    repeated = [array.ndim == result.ndim and array.shape != result.shape for array in arrays]
    if name == "mul" and repeated[0] != repeated[1]:
        weight, other = arrays if repeated[0] else arrays[::-1]
        return rounded_scale(cast(other, dtype), weight)
    # The sum that the gradient of a bias is comes before the cast back.
    whole = [repeat(array, result) if is_small else array for array, is_small in zip(arrays, repeated, strict=True)]
    return bind(eqn, [cast(array, dtype) for array in whole], params)[0]


def _checked(eqn: Equation, results: list[Any]) -> list[Any]:
    """Checks what a user's function returned in the place of a primitive."""
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
            f"The function in the place of {eqn.primitive.name!r} returned {found}. It must return "
            f"{', '.join(map(str, expected))}; any floating dtype will do for float32."
        )
    return results


def _params_at(params: dict[str, Any], dtype: DType) -> dict[str, Any]:
    """Returns the parameters of an equation that was written for float32, for a compute dtype."""
    changed = dict(params)
    if "preferred_element_type" in params:
        changed["preferred_element_type"] = dtype
    if params.get("out_dtype") is not None:
        changed["out_dtype"] = dtype
    if isinstance(params.get("precision"), (jax.lax.DotAlgorithm, jax.lax.DotAlgorithmPreset)):
        changed["precision"] = None  # an algorithm names the dtypes of its operands
    return changed
