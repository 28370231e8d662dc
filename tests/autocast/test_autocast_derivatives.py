"""Operations whose derivatives are ours: what these are made of, and that they stay in the range of 16 bits."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import jaxprs

from jmp_lite.autocast._derivatives import rounded_mul, stand_in, with_slope
from jmp_lite.products._matmul import Matmul, float32_result, matmul, product, repeat, rounded_scale

BF16, F16, F32 = (jnp.dtype(name) for name in ("bfloat16", "float16", "float32"))
DIMS = (("dimension_numbers", (((1,), (0,)), ((), ()))),)


def of(fun, n=1):
    """What stands for the only equation of a function of so many arrays."""
    [eqn] = jax.make_jaxpr(fun)(*[jax.ShapeDtypeStruct((4, 4), F16)] * n).eqns
    return stand_in(eqn)


divided, cubed = of(lax.div, 2), of(lambda x: x**3)


def convolved(lhs, rhs, dtype):
    return lax.conv_general_dilated(lhs, rhs, (1, 1), "VALID", preferred_element_type=dtype)


KIND, WIDE = Matmul(F16, DIMS, F16), Matmul(F16, DIMS, F32)
SUMS = Matmul(F16, DIMS, F16, accumulates=True)
#: A function of two arrays, their shapes and dtypes, what it is made of, and its derivative with respect to each.
FUNCTIONS = {
    "a quotient": (divided, [F16, F16], "div", "div div", "div div mul neg"),
    "a rounded product": (
        lambda x, y: rounded_mul(x, y, F16),
        [F16, F32],
        "mul",
        "mul mul",
        "mul mul",
    ),
    "a matmul": (lambda x, w: matmul(x, w, KIND), [F16, F16], "dot_general", "dot_general dot_general", None),
    "a matmul of a weight": (
        lambda x, w: matmul(x, w, KIND),
        [F16, F32],
        "dot_general",
        "dot_general dot_general",
        None,
    ),
    "a matmul into float32": (
        lambda x, w: matmul(x, w, WIDE),
        [F16, F16],
        "dot_general",
        "dot_general dot_general",
        None,
    ),
    "a sum in float32": (lambda x, w: matmul(x, w, SUMS), [F16, F16], "dot_general", "dot_general dot_general", None),
    "a scale": (rounded_scale, [F16, F32], "mul", "mul mul", "broadcast_in_dim mul mul"),
    "a bilinear function": (
        lambda x, w: float32_result(convolved, x, w),
        [F16, F16],
        "conv_general_dilated",
        "conv_general_dilated conv_general_dilated",
        None,
    ),
}


def made_of(fun, *args):
    """The primitives of a function, casts apart."""
    names = jaxprs.primitives(fun, *args)
    return collections.Counter(name for name in names if name not in ("convert_element_type", "custom_jvp_call"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_derivatives_are_made_of(name):
    """One term for each operand that is differentiated, and no call."""
    fun, dtypes, itself, of_first, of_second = FUNCTIONS[name]
    shape = (1, 1, 4, 4) if name == "a bilinear function" else (4, 4)
    x, y = (jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes)
    y = jax.ShapeDtypeStruct((1, 4), F32) if name == "a scale" else y
    count = lambda text: collections.Counter(text.split())  # noqa: E731
    assert made_of(fun, x, y) == count(itself)
    first = made_of(lambda x, y, t: jax.jvp(lambda x: fun(x, y), (x,), (t,)), x, y, x)
    second = made_of(lambda x, y, t: jax.jvp(lambda y: fun(x, y), (y,), (t,)), x, y, y)
    both = made_of(lambda x, y, s, t: jax.jvp(fun, (x, y), (s, t)), x, y, x, y)
    assert first == count(of_first)
    assert second == count(of_second or of_first)
    shared = count("div") if name == "a quotient" else count("")
    assert both == first + second - count(itself) - shared + count("add")


def test_powers_of_three_are_their_own_and_of_one_operand():
    x = jax.ShapeDtypeStruct((4, 4), F16)
    assert made_of(cubed, x) == {"integer_pow": 1}
    assert made_of(lambda x, t: jax.jvp(cubed, (x,), (t,)), x, x) == {"integer_pow": 1, "mul": 3}
    for fun in (lambda x: x**2, lambda x: x**4, lax.tanh):
        assert of(fun) is None
    assert of(lax.mul, 2) is None


#: In float16, where JAX's own derivative is infinite or not a number.
IN_RANGE = {
    "a quotient of a large divisor": (lambda x: divided(jnp.float16(1000), x), 1000.0, -1e-3),
    "a large quotient": (lambda x: divided(x, jnp.float16(1000)), 60000.0, 1e-3),
    "a power": (cubed, 2.0, 12.0),
}


@pytest.mark.parametrize(("fun", "x", "slope"), IN_RANGE.values(), ids=IN_RANGE)
def test_slopes_in_float16(fun, x, slope):
    found = jax.jvp(fun, (jnp.float16(x),), (jnp.float16(1),))[1]
    np.testing.assert_allclose(found, slope, rtol=2**-9, atol=1e-7)
    assert found.dtype == F16


def test_a_cotangent_of_zero_stays_zero_where_a_square_is_infinite():
    _, pullback = jax.vjp(cubed, jnp.float16(300))
    assert float(pullback(jnp.float16(0))[0]) == 0


def test_products_are_rounded_once_and_their_terms_are_in_16_bits():
    """A factor beyond float16 is multiplied in float32."""
    x, y = jnp.float16(2.0**-10), jnp.float32(2.0**20)
    value, slope = jax.jvp(lambda x: rounded_mul(x, y * 2.0**-8, F16), (x,), (jnp.float16(1),))
    assert (float(value), value.dtype, float(slope), slope.dtype) == (4.0, F16, 4096.0, F16)
    assert float(rounded_mul(x, y, F16)) == 1024.0
    value, slope = jax.jvp(lambda y: rounded_mul(x, y, F16), (y,), (jnp.float32(3),))
    assert (float(value), float(slope), slope.dtype) == (1024.0, 3 * 2.0**-10, F16)


def test_an_activation_has_the_value_and_the_slope_of_float32_rounded():
    jaxpr = jax.make_jaxpr(lambda x: jnp.log1p(jnp.exp(x)))(jnp.float32(1))
    x = jnp.linspace(-9, 9, 64).astype(BF16)
    value, tangent = jax.jvp(lambda x: with_slope(jaxpr, x), (x,), (2 * jnp.ones_like(x),))
    wide = x.astype(F32)
    assert jnp.array_equal(value, jnp.log1p(jnp.exp(wide)).astype(BF16))
    np.testing.assert_allclose(
        tangent.astype(F32), 2 * (1 / (1 + jnp.exp(-wide))).astype(BF16).astype(F32), rtol=2**-8, atol=2**-8
    )
    assert (value.dtype, tangent.dtype) == (BF16, BF16)


def test_a_matmul_of_ours_is_one_of_jax_to_a_policy_and_keeps_its_parameters():
    [eqn] = jax.make_jaxpr(lambda x, w: product(x, w, BF16, DIMS, F32))(jnp.ones((4, 4)), jnp.ones((4, 4))).eqns
    assert eqn.primitive.name == "dot_general"
    assert eqn.params["compute_dtype"] == BF16
    assert eqn.params["preferred_element_type"] == eqn.outvars[0].aval.dtype == F32
    assert (eqn.params["precision"], eqn.params["out_sharding"]) == (None, None)
    asked = (*DIMS, ("precision", lax.Precision.HIGHEST))
    [eqn] = jax.make_jaxpr(lambda x, w: product(x, w, BF16, asked, F32))(jnp.ones((4, 4)), jnp.ones((4, 4))).eqns
    assert eqn.params["precision"] == lax.Precision.HIGHEST


def test_what_is_repeated_has_the_shape_of_another():
    assert repeat(jnp.ones((1, 4)), jax.typeof(jnp.ones((3, 4)))).shape == (3, 4)
    assert repeat(jnp.ones((3, 1)), jax.typeof(jnp.ones((3, 4)))).shape == (3, 4)
