"""Operations whose derivatives are ours: those of JAX leave the range of float16, or the precision of 16 bits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jmp_lite._compat import INLINE, Equation, run
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite._tree import cast
from jmp_lite.products._matmul import add_terms


def stand_in(eqn: Equation) -> Callable[..., Any] | None:
    """Returns what stands for an equation of 16-bit arrays if JAX's derivative would leave their range."""
    return _IN_RANGE.get((eqn.primitive.name, eqn.params.get("y")))


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


#: By primitive and power; ``jit`` keeps a derivative in the name scope of the call.
_IN_RANGE = {
    ("div", None): jax.jit(_divided, inline=INLINE),
    ("integer_pow", 3): jax.jit(_cubed, inline=INLINE),
}


@functools.partial(jax.jit, static_argnums=2, inline=INLINE)
def rounded_mul(x: Any, y: Any, dtype: DType) -> Any:
    """Multiplies before it rounds: an operand may be beyond the dtype, such as the slope of a logarithm in float16."""
    return _rounded_mul(x, y, dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _rounded_mul(x: Any, y: Any, dtype: DType) -> Any:
    return cast(lax.mul(cast(x, FLOAT32), cast(y, FLOAT32)), dtype)


def _rounded_mul_jvp(dtype: DType, primals: Any, tangents: Any) -> tuple[Any, Any]:
    x, y = (cast(primal, dtype) for primal in primals)
    terms = add_terms(tangents, lambda t: lax.mul(cast(t, dtype), y), lambda t: lax.mul(x, cast(t, dtype)))
    return _rounded_mul(*primals, dtype), terms


_rounded_mul.defjvp(_rounded_mul_jvp, symbolic_zeros=True)


def with_slope(jaxpr: Any, x: Any) -> Any:
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
