"""Matrix products that are told to add up in float32, without float32 products in the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

from jmp_lite._dtypes import FLOAT32, DType, dtype_or_none
from jmp_lite._errors import InvalidRuleError
from jmp_lite.products._matmul import rounded_dot


class Product:
    """Base of what takes the place of ``lax.dot_general`` and rounds its operands itself.

    Weights reach it as they are, so that they are rounded once and their gradients are not.
    """


def accumulate_in(dtype: Any) -> Callable[..., Any]:
    """Returns a matrix product with the signature of ``lax.dot_general`` that adds up in float32.

    Operands stay in 16 bits and the result is rounded once, to ``preferred_element_type``. The backward products have
    16-bit operands as well: asking ``lax.dot_general`` for a float32 result alone would make them products of float32
    cotangents (github.com/jax-ml/jax/issues/34330).

    Raises:
        InvalidRuleError: If the dtype is not float32, which is what matrix units add up in.
    """
    if dtype_or_none(dtype) != FLOAT32:
        raise InvalidRuleError(f"accumulation_dtype must be float32 or None, got {dtype!r}.")
    return accumulating_dot


def accumulating_dot(lhs: Any, rhs: Any, dimension_numbers: Any, **params: Any) -> Any:
    """``lax.dot_general`` of 16-bit arrays or wider, rounded to ``preferred_element_type`` after it was added up."""
    dtype = params.pop("preferred_element_type")
    return product_of([lhs, rhs], {"dimension_numbers": dimension_numbers, **params}, dtype, accumulates=True)


def product_of(arrays: Sequence[Any], params: dict[str, Any], dtype: DType, *, accumulates: bool) -> Any:
    """Multiplies two arrays under the parameters of a ``dot_general`` equation; weights may be float32."""
    kept = {name: value for name, value in params.items() if name != "preferred_element_type"}
    lhs, rhs = arrays
    return rounded_dot(lhs, rhs, dtype, tuple(kept.items()), accumulates)
