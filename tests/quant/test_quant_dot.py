"""The quantized matmul against ``lax.dot_general``: errors, exactness where there is any, and what is not finite."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from support.comparisons import compilations, slow_but_for
from support.lowbit import BOUNDS, FORMATS, MATMUL, PRODUCTS, RECIPES, STRAIGHT, grid, normal, relative

import jmp_lite as jmp
from jmp_lite import quant

DTYPES = ["float32", "bfloat16", "float16"]
DRAWS = 20
#: Rounding error of a float32 sum, relative to a result, for the sizes here.
EXACT = 1e-6

recipes = pytest.mark.parametrize("name", RECIPES)
quick_recipes = pytest.mark.parametrize("name", slow_but_for(("fp8", "fp8_rowwise", "int8_train"), RECIPES))
dtypes = pytest.mark.parametrize("dtype", slow_but_for(("bfloat16",), DTYPES))


def product_and_gradients(dot, dims, lhs, rhs, cotangent=None):
    """The matmul, and the cotangents of its operands for a cotangent that is ones by default."""
    out, pull = jax.vjp(lambda lhs, rhs: dot(lhs, rhs, dims), lhs, rhs)
    return out, *pull(jnp.ones_like(out) if cotangent is None else cotangent)


@functools.cache
def compiled(name):
    """Product and gradients of matrices, compiled once per recipe, shapes and dtypes."""
    return jax.jit(functools.partial(product_and_gradients, RECIPES[name], MATMUL))


def operands(rng, dtype):
    """Matrices and a cotangent of their matmul."""
    return [normal(rng, *shape, dtype=dtype) for shape in ((4, 8), (8, 3), (4, 3))]


def as_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def test_outside_of_jit_each_operand_is_one_program(rng):
    """Where nothing is traced, each operation of its own would be compiled for every new shape."""
    lhs, rhs = normal(rng, 13, 17), normal(rng, 17, 19)
    with compilations() as found:
        RECIPES["fp8"](lhs, rhs, MATMUL)
        quant.quantize_array(lhs, axes=[0])
    assert len(found) <= 4  # the matmul is one, too


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but_for(("fp8",), RECIPES))
@pytest.mark.parametrize(
    ("dtype", "cases"),
    [
        ("float32", tuple(PRODUCTS)),
        pytest.param("bfloat16", ("matrices", "two contracted, two batched"), marks=pytest.mark.slow),
        pytest.param("float16", ("matrices", "batched, second axis"), marks=pytest.mark.slow),
    ],
    ids=["float32", "bfloat16", "float16"],
)
def test_errors_of_products_and_gradients(name, dtype, cases, rng):
    """Over many draws, so that the few numbers of a small matmul do not decide."""

    @jax.jit
    def squares(draws):
        """Squared errors and squared norms of one draw of every matmul."""

        def one(draw):
            found = {}
            for case, (lhs, rhs, cotangent) in draw.items():
                dims, wide = PRODUCTS[case][2], as_float32((lhs, rhs, cotangent))
                results = product_and_gradients(RECIPES[name], dims, lhs, rhs, cotangent)
                expected = product_and_gradients(lax.dot_general, dims, *wide)
                assert [x.dtype for x in results] == [dtype] * 3
                pairs = zip(as_float32(results), expected, strict=True)
                found[case] = [(jnp.sum((x - y) ** 2), jnp.sum(y**2)) for x, y in pairs]
            return found

        return lax.map(one, draws)

    arrays = {}
    for case in cases:
        lhs, rhs, dims = PRODUCTS[case]
        out = jax.eval_shape(lambda x, y, dims=dims: lax.dot_general(x, y, dims), jnp.zeros(lhs), jnp.zeros(rhs)).shape
        arrays[case] = [normal(rng, DRAWS, *shape, dtype=dtype) for shape in (lhs, rhs, out)]
    found = jax.tree.map(np.sum, squares(arrays))
    errors = {case: [np.sqrt(error / norm) for error, norm in results] for case, results in found.items()}
    assert max(max(results) for results in errors.values()) < BOUNDS[name], errors


@pytest.mark.parametrize("name", ["int8_qat", "int8_train", "w8a8_static"])
def test_int8_products_are_exact(name, rng):
    """Whole numbers whose largest is 127 have the scale 1."""
    lhs, rhs, cotangent = (rng.integers(-127, 128, shape) for shape in ((16, 16), (16, 16), (16, 16)))
    for x in (lhs, rhs, cotangent):
        np.fill_diagonal(x, 127)  # in all rows and all columns
    arrays = [jnp.asarray(x, jnp.float32) for x in (lhs, rhs, cotangent)]
    found = compiled(name)(*arrays)
    for result, expected in zip(found, (lhs @ rhs, cotangent @ rhs.T, lhs.T @ cotangent), strict=True):
        np.testing.assert_array_equal(np.int64(result), expected)


@pytest.mark.parametrize("name", ["fp8", "fp8_rowwise"])
def test_products_of_float8_numbers_are_those_of_float64(name, rng):
    recipe, arrays = RECIPES[name], []
    for spec in (recipe.lhs, recipe.rhs, recipe.grad):
        format_name = str(spec).split(":")[0]
        x = rng.choice(grid(format_name), (16, 16))
        np.fill_diagonal(x, FORMATS[format_name][1])
        arrays.append(x * 2.0**-4)
    lhs, rhs, cotangent = arrays
    found = compiled(name)(*(jnp.asarray(x, jnp.float32) for x in arrays))
    for result, expected in zip(found, (lhs @ rhs, cotangent @ rhs.T, lhs.T @ cotangent), strict=True):
        assert relative(result, expected) < EXACT


@pytest.mark.parametrize("name", STRAIGHT)
def test_gradients_of_qat_are_straight_through(name, rng):
    """They are those of the matmul of what the operands were rounded to."""
    lhs, rhs, cotangent = (normal(rng, *shape) for shape in ((8, 64), (64, 32), (8, 32)))
    recipe, rounded = RECIPES[name], []
    for x, spec, axis in ((lhs, recipe.lhs, 1), (rhs, recipe.rhs, 0)):
        if spec is not None:
            axes = None if spec.granularity == "tensor" else axis
            scale = quant.absmax_scale(jnp.max(jnp.abs(x), axis=axes, keepdims=axes is not None), spec.dtype)
            x = quant.dequantize(quant.quantize(x, spec.dtype, scale), scale)  # noqa: PLW2901
        rounded.append(x)
    found = compiled(name)(lhs, rhs, cotangent)
    plain = product_and_gradients(lax.dot_general, MATMUL, *rounded, cotangent)
    for result, expected in zip(found, plain, strict=True):
        assert relative(result, expected) < EXACT


@pytest.mark.slow
def test_powers_of_two_need_no_detour_through_float32(rng):
    @jax.jit
    def both(arrays):
        found = {case: quant.FP8(*pair, PRODUCTS[case][2]) for case, pair in arrays.items()}
        wide = {case: quant.FP8(*pair, PRODUCTS[case][2], None, jnp.float32) for case, pair in arrays.items()}
        return found, wide

    arrays = {case: [normal(rng, *shape, dtype="bfloat16") for shape in PRODUCTS[case][:2]] for case in PRODUCTS}
    found, wide = both(arrays)
    for case, result in found.items():
        assert (result.dtype, wide[case].dtype) == (jnp.bfloat16, jnp.float32)
        np.testing.assert_array_equal(result, wide[case].astype(jnp.bfloat16), err_msg=case)


# --- Dtypes and shapes ----------------------------------------------------------------------------


@pytest.mark.covering(1)
@recipes
@pytest.mark.parametrize("given", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")])
def test_dtypes_of_results_and_gradients(name, given):
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip([(4, 8), (8, 3)], given, strict=True)]
    for dtype in (None, "float32", "bfloat16", "float16"):
        dot = lambda lhs, rhs, dims, dtype=dtype: RECIPES[name](lhs, rhs, dims, None, dtype)  # noqa: E731
        out, *grads = jax.eval_shape(lambda *arrays, dot=dot: product_and_gradients(dot, MATMUL, *arrays), *arrays)
        assert out.dtype == (dtype or max(given, key=lambda name: jnp.dtype(name).itemsize))
        assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in arrays]


@pytest.mark.slow
@pytest.mark.parametrize("given", [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("name", ["fp8", "mxfp8", "int8_qat", "w8a16", "w4a16"])
def test_errors_of_mixed_operands(name, given, rng):
    arrays = [normal(rng, *shape, dtype=dtype) for shape, dtype in zip([(64, 64)] * 2, given, strict=True)]
    expected = product_and_gradients(lax.dot_general, MATMUL, *as_float32(arrays))
    found = compiled(name)(*arrays, expected[0])
    expected = product_and_gradients(lax.dot_general, MATMUL, *as_float32(arrays), expected[0])
    assert max(relative(x, y) for x, y in zip(as_float32(found), expected, strict=True)) < BOUNDS[name]


@pytest.mark.parametrize("name", ["fp8", "w8a16"])
@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "bool", "complex64", "float8_e4m3fn"])
def test_what_is_not_real_is_multiplied_as_it_is(name, dtype, rng):
    arrays = [jnp.asarray(rng.integers(0, 4, shape)).astype(dtype) for shape in ((4, 8), (8, 3))]
    params = {} if dtype != "float8_e4m3fn" else {"preferred_element_type": jnp.float32}
    found, expected = (dot(*arrays, MATMUL, **params) for dot in (RECIPES[name], lax.dot_general))
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_what_is_to_be_an_integer_is_multiplied_as_it_is():
    x = jnp.full((2, 4), 3.5, jnp.bfloat16)
    found, expected = (dot(x, x.T, MATMUL, None, jnp.int32) for dot in (quant.FP8, lax.dot_general))
    np.testing.assert_array_equal(found, expected, strict=True)


@pytest.mark.parametrize("recipe", [quant.FP8, quant.W8A8_STATIC, quant.NVFP4], ids=str)
def test_an_axis_that_is_not_mapped_is_named(recipe):
    with pytest.raises(jmp.errors.MissingAxisError, match="axis_name='data' is not an axis that"):
        recipe.replace(axis_name="data")(jnp.ones((2, 4)), jnp.ones((4, 2)), MATMUL)


def test_float64_is_multiplied_as_it_is(rng):
    with jax.enable_x64(True):
        arrays = [jnp.asarray(rng.standard_normal(shape)) for shape in ((4, 8), (8, 3))]
        assert arrays[0].dtype == jnp.float64
        np.testing.assert_array_equal(quant.FP8(*arrays, MATMUL), lax.dot_general(*arrays, MATMUL))


@pytest.mark.covering(1)
@quick_recipes
@pytest.mark.parametrize("sizes", [(0, 4, 3), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_arrays_without_elements(name, sizes):
    m, k, n = sizes
    out, of_lhs, of_rhs = compiled(name)(jnp.ones((m, k)), jnp.ones((k, n)))
    assert (out.shape, of_lhs.shape, of_rhs.shape) == ((m, n), (m, k), (k, n))
    assert not any(np.any(x) for x in (out, of_lhs, of_rhs))


@quick_recipes
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_zeros(name, dtype, rng):
    for zero, depending in (((0,), (0, 2)), ((1,), (0, 1)), ((2,), (1, 2)), ((0, 1, 2), (0, 1, 2))):
        arrays = operands(rng, dtype)
        for i in zero:
            arrays[i] = jnp.zeros_like(arrays[i])
        for i, result in enumerate(np.float32(x) for x in compiled(name)(*arrays)):
            assert np.all(np.isfinite(result))
            assert np.any(result) == (i not in depending)


# --- What is not finite ---------------------------------------------------------------------------

BAD = pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])


def is_finite(x):
    return bool(jnp.all(jnp.isfinite(x.astype(jnp.float32))))


@recipes
@dtypes
def test_what_is_not_finite_is_seen(name, dtype, rng):
    """In either operand, and in the cotangent."""
    for side, bad in itertools.product((0, 1, 2), (np.inf, -np.inf, np.nan)):
        arrays = operands(rng, dtype)
        arrays[side] = arrays[side].at[2, 1].set(bad)
        out, *grads = compiled(name)(*arrays)
        assert side == 2 or not is_finite(out)
        assert not any(is_finite(grads[other]) for other in {0, 1} - {side})


STATIC = [quant.FP8.static(lhs=4, rhs=4, grad=4), quant.W8A8_STATIC.static(lhs=4)]


@functools.cache
def compiled_static(recipe):
    return jax.jit(functools.partial(product_and_gradients, recipe, MATMUL))


@pytest.mark.parametrize("recipe", STATIC, ids=str)
@BAD
@pytest.mark.parametrize("side", [0, 1, 2])
def test_fixed_scales_hide_nothing(recipe, bad, side, rng):
    """Neither does int8, which has no number for it."""
    arrays = operands(rng, "float32")
    arrays[side] = arrays[side].at[2, 1].set(bad)
    out, *grads = compiled_static(recipe)(*arrays)
    assert side == 2 or not is_finite(out)
    assert not any(is_finite(grads[other]) for other in {0, 1} - {side})


@pytest.mark.parametrize("name", ["fp8", "int8_train", "w8a8_static", "nvfp4", "w4a16"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_large_array_hides_no_nan(name, side):
    """XLA on CPU loses NaN in a maximum of so many numbers, and integers have none."""
    operands = [jnp.ones((1, 2**15)), jnp.ones((2**15, 1))]
    operands[side] = operands[side].at[(0, 77) if side == 0 else (77, 0)].set(jnp.nan)
    assert not is_finite(jax.jit(RECIPES[name], static_argnums=2)(*operands, MATMUL))


def test_no_device_hides_nan_from_the_others():
    """The maximum over devices loses it too."""
    recipe = quant.W8A8_STATIC.replace(axis_name="data")
    x = jnp.ones((8, 4, 4)).at[3, 1, 2].set(jnp.nan)
    found = jax.pmap(lambda x: recipe(x, jnp.eye(4), MATMUL), "data")(x)
    assert not np.isfinite(found).reshape(8, -1).any(axis=1).any()


@pytest.mark.parametrize("name", ["fp8_rowwise", "int8_qat", "int8_train"])
@BAD
def test_scales_per_row_keep_it_to_the_row(name, bad, rng):
    lhs, *rest = operands(rng, "float32")
    good, found = (compiled(name)(x, *rest)[0] for x in (lhs, lhs.at[2, 1].set(bad)))
    assert not np.any(np.isfinite(found[2]))
    kept = np.array([0, 1, 3])
    np.testing.assert_array_equal(found[kept], good[kept])


def test_the_operation_of_flax_hides_what_is_not_finite(standard_promotion, rng):
    """Its numbers are clipped before anyone can see them; the same layer with ours."""
    x = normal(rng, 4, 16).at[1, 2].set(np.inf)
    theirs = nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)
    ours = nn.Dense(16, dot_general=quant.FP8)
    for model, hides in ((theirs, True), (ours, False)):
        variables = jax.jit(model.init)(jax.random.key(0), x)
        assert is_finite(jax.jit(model.apply)(variables, x)) == hides


@pytest.mark.parametrize("name", ["fp8", "int8_qat"])
def test_a_loss_scale_skips_a_step_that_is_not_finite(name, rng):
    tx = jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(2.0**10))
    params = normal(rng, 8, 8)
    state = tx.init(params)
    x = normal(rng, 4, 8)

    def loss(params, x):
        return jnp.mean(RECIPES[name](x, params, MATMUL) ** 2)

    @jax.jit
    def step(params, state, x):
        _, grads = jmp.scaled_value_and_grad(loss, loss_scale=state)(params, x)
        return jmp.apply_gradients(tx, grads, state, params)

    after, state_after = step(params, state, x.at[1, 2].set(np.inf))
    np.testing.assert_array_equal(after, params)
    assert float(state_after.loss_scale.loss_scale) == 2.0**9
    assert np.any(step(params, state, x)[0] != params)


# --- Derivatives and memory -----------------------------------------------------------------------


@recipes
@pytest.mark.parametrize("by", [0, 1])
def test_second_derivatives_are_refused(name, by):
    fun = lambda lhs, rhs: jnp.sum(RECIPES[name](lhs, rhs, MATMUL) ** 2)  # noqa: E731
    arrays = jnp.ones((2, 4)), jnp.ones((4, 3))
    if RECIPES[name].spec(by) is None:  # this operand is not rounded: its second derivative exists
        assert jax.eval_shape(jax.hessian(fun, by), *arrays).shape == (2, 4, 2, 4)
        return
    for second in (jax.hessian(fun, by), jax.grad(lambda *x: jnp.sum(jax.grad(fun, by)(*x) ** 2), by)):
        with pytest.raises(jmp.errors.SecondDerivativeError, match="differentiated twice"):
            jax.eval_shape(second, *arrays)


@quick_recipes
def test_forward_mode_agrees_with_reverse_mode(name, rng):
    arrays, tangents = ([normal(rng, *shape) for shape in ((8, 64), (64, 32))] for _ in range(2))
    dot = lambda lhs, rhs: RECIPES[name](lhs, rhs, MATMUL)  # noqa: E731
    cotangent = normal(rng, 8, 32)
    pushed = jax.jit(lambda *arrays: jax.jvp(dot, arrays, tuple(tangents))[1])(*arrays)
    pulled = compiled(name)(*arrays, cotangent)[1:]
    forward = float(jnp.vdot(cotangent, pushed))
    reverse = sum(float(jnp.vdot(x, t)) for x, t in zip(pulled, tangents, strict=True))
    # Rounding of the cotangent is all that they differ in: against the length of what is multiplied.
    length = float(jnp.linalg.norm(cotangent) * jnp.linalg.norm(pushed))
    bound = 1e-5 if name in STRAIGHT else BOUNDS[name]
    assert abs(forward - reverse) < bound * length


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", ["fp8", "fp8_rowwise", "int8_train", "int8_qat"])
@pytest.mark.parametrize("shape", [(256, 512, 128), (128, 256, 1024)])
def test_what_is_kept_for_the_backward_pass(name, shape):
    m, k, n = shape
    arrays = jnp.ones((m, k), jnp.bfloat16), jnp.ones((k, n), jnp.bfloat16)

    def kept(dot):
        pull = jax.jit(lambda lhs, rhs: jax.vjp(lambda lhs, rhs: dot(lhs, rhs, MATMUL), lhs, rhs)[1])(*arrays)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(pull))

    assert kept(lax.dot_general) == 2 * (m * k + k * n)
    assert kept(RECIPES[name]) <= 0.55 * kept(lax.dot_general)
