"""Runs one equation, or what takes its place, on operands whose dtypes have been decided."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jmp_lite._compat import Equation, bind, leaves_are_local, sharding_in_type
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite._errors import InvalidOpError
from jmp_lite.autocast._ops import Op, OpClass
from jmp_lite.autocast._rules import Precision
from jmp_lite.autocast._values import cast, is_eligible
from jmp_lite.distributed._gather import travel
from jmp_lite.distributed._products import rounded_dot

#: Primitives whose gradient is a sum over devices.
_GATHERS = frozenset({"all_gather", "all_gather_reduced"})
#: Primitives that repeat what is smaller, so that its gradient is a sum over a batch.
_REPEATS = frozenset({"broadcast_in_dim", "add", "sub", "mul", "div", "max", "min"})


def has_wide_gradients(eqn: Equation, op: Op, precision: Precision, dtype: DType | None) -> bool:
    """Whether gradients of weights leave an equation in ``reduce_dtype``: devices may add them up right there."""
    if not isinstance(op, OpClass) or dtype in (None, FLOAT32, precision.reduce_dtype):
        return False
    is_product = eqn.primitive is jax.lax.dot_general_p and op is OpClass.ALLOW and precision.dot is None
    name = eqn.primitive.name
    return name in _GATHERS or ((is_product or name in _REPEATS) and not leaves_are_local())


def apply(eqn: Equation, arrays: Sequence[Any], op: Op, precision: Precision, dtype: DType | None) -> list[Any]:
    """Runs the primitive of an equation, or what takes its place, on operands that have been cast."""
    if dtype is None or dtype == FLOAT32:
        return bind(eqn, arrays, eqn.params)
    if not isinstance(op, OpClass):
        results = op(*arrays, **eqn.params)
        return _checked(eqn, list(results) if eqn.primitive.multiple_results else [results])
    params = _params_at(eqn.params, dtype)
    if eqn.primitive.name == "dot_general" and op is OpClass.ALLOW and precision.dot is not None:
        if params.get("out_sharding") is None:
            params.pop("out_sharding", None)
        return [cast(precision.dot(*arrays, params.pop("dimension_numbers"), **params), dtype)]
    if not any(getattr(array, "dtype", None) == FLOAT32 for array in arrays):
        return bind(eqn, arrays, params)
    if eqn.primitive is jax.lax.dot_general_p:
        del params["preferred_element_type"]
        return [rounded_dot(*arrays, dtype, tuple(params.items()))]
    if eqn.primitive.name in _GATHERS:

        def gather(array: Any) -> Any:
            return bind(eqn, [array], params)[0]

        return [cast(travel(arrays[0], dtype, precision.reduce_dtype, gather, gather), dtype)]
    if eqn.primitive.name == "broadcast_in_dim":
        return [cast(bind(eqn, arrays, params)[0], dtype)]
    return bind(eqn, [cast(_repeated(array, eqn.outvars[0].aval), dtype) for array in arrays], params)


def _repeated(array: Any, result: Any) -> Any:
    """Repeats an array before it is cast: then the sum that its gradient is comes before the cast back."""
    if array.dtype != FLOAT32 or array.ndim != result.ndim or array.shape == result.shape:
        return array
    axes = tuple(range(result.ndim))
    return jax.lax.broadcast_in_dim(array, result.shape, axes, out_sharding=sharding_in_type(result))


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
