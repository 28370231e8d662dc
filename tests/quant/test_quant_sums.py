"""What matmuls of 8-bit operands are added up in, and what each setting of a spec does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.lowbit import EXACT, FORMATS, MATMUL, PRODUCTS, normal, relative

from jmp_lite import quant

BF16, F16, F32 = "bfloat16", "float16", "float32"


def sums(fun, *args):
    """The dtypes that the matmuls of a function are added up in."""
    return set(re.findall(r"preferred_element_type=(\w+)", str(jax.make_jaxpr(fun)(*args))))


def product(recipe):
    """The matmul of two matrices by a recipe; further arguments are the dtype of the result."""
    return lambda lhs, rhs, *dtype: quant.get_recipe(recipe)(lhs, rhs, MATMUL, None, *dtype)


# --- Sums -----------------------------------------------------------------------------------------

# Forward, then backward.
ADDED_UP_IN = {
    "integers": ("lhs=int8,rhs=int8,grad=int8", BF16, {"int32"}, {"int32"}),
    "integers, float32": ("lhs=int8,rhs=int8,grad=int8", F32, {"int32"}, {"int32"}),
    "powers of two": ("lhs=e4m3:pow2,rhs=e4m3:pow2,grad=e5m2:pow2", BF16, {BF16}, {BF16}),
    "powers of two, float16": ("lhs=e4m3:pow2,rhs=e4m3:pow2,grad=e5m2:pow2", F16, {F32}, {F32}),
    "any scales": ("lhs=e4m3,rhs=e4m3,grad=e5m2", BF16, {F32}, {F32}),
    "powers of two on the left alone": ("lhs=e4m3:pow2,rhs=e4m3,grad=e5m2:pow2", BF16, {F32}, {F32}),
    "powers of two on the right alone": ("lhs=e4m3,rhs=e4m3:pow2,grad=e5m2:pow2", BF16, {F32}, {F32}),
    "powers of two but for gradients": ("lhs=e4m3:pow2,rhs=e4m3:pow2,grad=e5m2", BF16, {BF16}, {F32}),
}


@pytest.mark.parametrize(("recipe", "dtype", "forward", "backward"), ADDED_UP_IN.values(), ids=ADDED_UP_IN)
def test_products_are_added_up_in(recipe, dtype, forward, backward):
    """A detour is left out where scaling by powers of two rounds nothing, and integers stay integers."""
    lhs, rhs = jax.ShapeDtypeStruct((4, 8), dtype), jax.ShapeDtypeStruct((8, 4), dtype)
    assert sums(product(recipe), lhs, rhs) == forward
    grad = jax.grad(lambda lhs, rhs: jnp.sum(product(recipe)(lhs, rhs).astype(F32)), (0, 1))
    assert sums(grad, lhs, rhs) == forward | backward


def test_results_in_float16_are_rounded_once(rng):
    lhs, rhs = normal(rng, 4, 256, dtype=F16), normal(rng, 256, 3, dtype=F16)
    found, wide = (product("fp8")(lhs, rhs, dtype) for dtype in (F16, F32))
    np.testing.assert_array_equal(found, wide.astype(F16))


@pytest.mark.parametrize("recipe", ["lhs=none,rhs=int8,grad=none", "lhs=none,rhs=e4m3:channel,grad=none"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_product_with_one_wide_operand_is_as_precise_in_any_dtype(recipe, dtype, rng):
    """What its values are is what counts, not what they are kept in."""
    lhs, rhs = normal(rng, 4, 64, dtype=dtype), normal(rng, 64, 3, dtype=dtype)
    found, expected = (product(recipe)(x, rhs, F32) for x in (lhs, lhs.astype(F32)))
    assert relative(found, expected) < EXACT


@pytest.mark.parametrize("recipe", ["lhs=int8,rhs=int8", "lhs=e4m3,rhs=e4m3", "lhs=e4m3:pow2,rhs=e4m3:pow2"])
@pytest.mark.parametrize(("left", "right"), [(2.0**120, 2.0**-50), (2.0**-50, 2.0**120), (2.0**-62, 2.0**-62)])
def test_scales_meet_before_they_meet_the_sum(recipe, left, right):
    """Nothing on the way leaves the range of float32 where the result is in it."""
    found = product(recipe)(jnp.full((1, 16), left), jnp.full((16, 1), right))
    np.testing.assert_allclose(found, 16 * left * right, rtol=2**-6)


@pytest.mark.parametrize("recipe", ["lhs=int8:channel,rhs=int8", "lhs=int8,rhs=int8:channel"])
@pytest.mark.parametrize("case", PRODUCTS)
def test_a_scale_per_channel_beside_one_per_array(recipe, case, rng):
    """In every layout a row of the result has the scale of its row."""
    lhs_shape, rhs_shape, numbers = PRODUCTS[case]
    lhs, rhs = normal(rng, *lhs_shape), normal(rng, *rhs_shape)
    assert relative(quant.get_recipe(recipe)(lhs, rhs, numbers), lax.dot_general(lhs, rhs, numbers)) < 0.02


# --- Settings of a spec ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_smallest_normal_number_is_a_scale(name):
    amax = np.float32(FORMATS[name][1] * 2.0**-126)
    assert float(quant.absmax_scale(jnp.asarray(amax), name)) == 2.0**-126


SETTINGS = {
    "int8": {},
    "int8:margin4": {"margin": 4},
    "int8:pow2": {"pow2": True},
    "e4m3:pow2:margin1": {"pow2": True, "margin": 1},
    "e5m2:margin-2": {"margin": -2},
}


@pytest.mark.parametrize("side", ["lhs", "rhs"])
@pytest.mark.parametrize(("spec", "settings"), SETTINGS.items(), ids=str)
def test_settings_reach_the_operands(spec, settings, side, rng):
    """A matmul with ones on the diagonal shows what an operand was rounded to."""
    x, name = normal(rng, 8, 8), spec.split(":")[0]
    scale = quant.absmax_scale(jnp.max(jnp.abs(x)), name, **settings)
    expected = quant.dequantize(quant.quantize(x, name, scale), scale)
    specs = {"lhs": "none", "rhs": "none", side: spec}
    operands = (x, jnp.eye(8)) if side == "lhs" else (jnp.eye(8), x)
    found = product(f"lhs={specs['lhs']},rhs={specs['rhs']},grad=none")(*operands)
    assert relative(found, expected) < EXACT


def test_a_stochastic_operand_is_rounded_to_either_neighbor(rng):
    x = normal(rng, 16, 16)
    found, nearest = (product(f"lhs=int8{end},rhs=none,grad=none")(x, jnp.eye(16)) for end in (":stochastic", ""))
    step = float(quant.absmax_scale(jnp.max(jnp.abs(x)), "int8"))
    assert np.max(np.abs(found - x)) < step * (1 + EXACT)
    assert 0.05 < np.mean(np.abs(found - nearest) > step / 2) < 0.5
