"""Matrix products that are told to add up in float32, without float32 products in the backward pass."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jmp_lite._dtypes import FLOAT32, dtype_or_none
from jmp_lite._errors import InvalidRuleError


def accumulate_in(dtype: Any) -> Callable[..., Any]:
    """Returns a matrix product with the signature of ``lax.dot_general`` that adds up in float32.

    Operands stay in 16 bits and the result is rounded once, to ``preferred_element_type``. The backward products have
    16-bit operands as well: asking ``lax.dot_general`` for a float32 result alone would make them products of float32
    cotangents (github.com/jax-ml/jax/issues/34330).

    Raises:
        InvalidRuleError: If the dtype is not float32, which is what matrix units add up in.
    """
    if dtype_or_none(dtype) != FLOAT32:
        raise InvalidRuleError(f"accumulate must be float32 or None, got {dtype!r}.")
    return _accumulating_dot


def _accumulating_dot(lhs: Any, rhs: Any, dimension_numbers: Any, **params: Any) -> Any:
    result_dtype = params.pop("preferred_element_type")
    return _dot(lhs, rhs, dimension_numbers, tuple(sorted(params.items())), result_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _dot(lhs: Any, rhs: Any, dimension_numbers: Any, params: Any, dtype: Any) -> Any:
    return _product(lhs, rhs, dimension_numbers, params).astype(dtype)


def _product(lhs: Any, rhs: Any, dimension_numbers: Any, params: Any) -> Any:
    """A product of 16-bit arrays, in float32."""
    upcast, native = _products(dimension_numbers, params)
    if isinstance(lhs, jax.core.Tracer) or isinstance(rhs, jax.core.Tracer):
        return lax.platform_dependent(lhs, rhs, cpu=upcast, default=native)
    on_cpu = {device.platform for device in lhs.devices()} == {"cpu"}
    return (upcast if on_cpu else native)(lhs, rhs)


@functools.lru_cache(maxsize=4096)
def _products(dimension_numbers: Any, params: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the product for CPUs and for other platforms; the same functions each time, so that JAX knows them.

    XLA:CPU (jaxlib 0.10 to 0.12) stops at run time on some batched products of bfloat16 that return float32. There the
    operands are cast up first, which changes no digit: products of 16-bit numbers are exact in float32.
    """

    def native(lhs: Any, rhs: Any) -> Any:
        return lax.dot_general(lhs, rhs, dimension_numbers, preferred_element_type=jnp.float32, **dict(params))

    def upcast(lhs: Any, rhs: Any) -> Any:
        return native(lhs.astype(jnp.float32), rhs.astype(jnp.float32))

    return upcast, native


def _dot_forward(lhs: Any, rhs: Any, *static: Any) -> tuple[Any, Any]:
    return _dot(lhs, rhs, *static), (lhs, rhs)


def _dot_backward(dimension_numbers: Any, params: Any, dtype: Any, operands: Any, cotangent: Any) -> tuple[Any, Any]:
    def dot(lhs: Any, rhs: Any) -> Any:
        return lax.dot_general(lhs, rhs, dimension_numbers, preferred_element_type=dtype, **dict(params))

    lhs, rhs = operands
    [of_lhs] = jax.linear_transpose(lambda lhs: dot(lhs, rhs), lhs)(cotangent)
    [of_rhs] = jax.linear_transpose(lambda rhs: dot(lhs, rhs), rhs)(cotangent)
    return of_lhs, of_rhs


_dot.defvjp(_dot_forward, _dot_backward)
