"""Scales of tiles: matmuls and arrays, beside the same in plain NumPy, and beside JAX's matmul of tiles."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support.comparisons import slow_but_for
from support.lowbit import (
    BOUNDS,
    EXACT,
    MATMUL,
    PRODUCTS,
    RECIPES,
    TILED,
    normal,
    products,
    relative,
    stablehlo,
)

import jmp_lite as jmp
from jmp_lite import export, quant
from jmp_lite.products._dimensions import dimensions
from jmp_lite.quant import _tiles
from jmp_lite.quant._product import Call

#: Recipes beside those with names: other formats, tiles and scales.
OTHERS = {
    "deepseek": "lhs=e4m3:tile128,rhs=e4m3:tile128,grad=e4m3:tile128",
    "int8 by int4": "lhs=int8:channel,rhs=int4:tile32",
    "e5m2 gradients": "lhs=e4m3:tile32:pow2,rhs=e4m3:tile32:pow2,grad=e5m2:tile32:pow2",
    "tiles of activations": "lhs=int8:tile8,rhs=none",
    "margin": "lhs=e2m1:tile16:margin-1:scale_e4m3,rhs=e4m3:tile5:margin2,grad=int8:tile7",
}
ALL = {name: RECIPES[name] for name in TILED} | {name: quant.get_recipe(text) for name, text in OTHERS.items()}
LARGEST = {"float8_e4m3fn": 448, "float8_e5m2": 57344, "int8": 127, "float4_e2m1fn": 6, "int4": 7}


# --- The reference, in plain loops ---


def in_numpy(x, spec):
    """A matrix as what its numbers stand for; tiles lie along the last axis."""
    if spec is None:
        return np.float64(x)
    rows, columns = x.shape
    tile = spec.tile or columns
    most, result = np.float32(LARGEST[spec.dtype.name]), np.zeros(x.shape)
    whole = np.float32(np.abs(x).max()) * np.float32(2.0**spec.margin / most) * np.float32(1 / 448)
    whole = max(whole, np.float32(2.0**-126))
    for i in range(rows):
        for j in range(0, columns, tile):
            part = np.float32(x[i, j : j + tile])
            scale = np.float32(np.abs(part).max()) * np.float32(2.0**spec.margin / most)
            if spec.scale_dtype is not None:
                held = np.float32((scale / whole).astype(ml_dtypes.float8_e4m3fn))
                scale = max(held, np.float32(2.0**-9)) * whole
            elif scale == 0:
                scale = np.float32(1)
            elif spec.pow2:
                scale = np.float32(2.0 ** math.ceil(math.log2(scale)))
            scaled = np.clip(part / scale, -most, most)
            numbers = np.round(scaled) if spec.dtype.kind == "i" or spec.dtype.name == "int4" else scaled
            result[i, j : j + tile] = np.float64(numbers.astype(spec.dtype)) * np.float64(scale)
    return result


def product_and_gradients(recipe, x, w, g):
    """What ``recipe`` promises for ``x @ w`` and a cotangent."""
    left, right = in_numpy(x, recipe.lhs), in_numpy(w.T, recipe.rhs).T
    if recipe.grad is None:
        return left @ right, np.float64(g) @ right.T, left.T @ np.float64(g)
    of_x = in_numpy(g, recipe.grad) @ in_numpy(w, recipe.rhs).T
    of_w = in_numpy(x.T, recipe.lhs) @ in_numpy(g.T, recipe.grad).T
    return left @ right, of_x, of_w


def spread(rng, *shape):
    """Numbers over several decades, with a row of zeros."""
    x = np.float32(rng.standard_normal(shape) * np.exp(rng.normal(size=shape)))
    x[-1] = 0
    return x


@functools.partial(jax.jit, static_argnums=0)
def product_and_pullback(product, x, w, g):
    out, pull = jax.vjp(product, x, w)
    return out, *pull(g)


@pytest.mark.parametrize(
    "shape", slow_but_for([(10, 70, 20)], [(16, 256, 128), (10, 70, 20), (130, 60, 5), (1, 1, 1)]), ids=str
)
@pytest.mark.parametrize("name", slow_but_for(("mxfp8", "nvfp4", "int8 by int4"), ALL))
def test_tiles_are_those_of_plain_loops(name, shape, rng):
    """Along what is added up, in all three matmuls; the last tile is shorter where it must be."""
    m, k, n = shape
    x, w, g = spread(rng, m, k), spread(rng, k, n), spread(rng, m, n)
    found_of_all = product_and_pullback(lambda x, w: ALL[name](x, w, MATMUL), *map(jnp.asarray, (x, w, g)))
    for found, expected in zip(found_of_all, product_and_gradients(ALL[name], x, w, g), strict=True):
        np.testing.assert_allclose(found, expected, atol=EXACT * max(np.abs(expected).max(), 1e-30))


@pytest.mark.parametrize("name", slow_but_for(["w4a16"], TILED))
@pytest.mark.parametrize("case", PRODUCTS)
def test_any_dimension_numbers(name, case, rng):
    lhs_shape, rhs_shape, numbers = PRODUCTS[case]
    lhs, rhs = normal(rng, *lhs_shape), normal(rng, *rhs_shape)
    exact = functools.partial(jax.lax.dot_general, dimension_numbers=numbers)
    g = normal(rng, *jax.eval_shape(exact, lhs, rhs).shape)
    pairs = zip(
        product_and_pullback(lambda x, w: RECIPES[name](x, w, numbers), lhs, rhs, g),
        product_and_pullback(exact, lhs, rhs, g),
        strict=True,
    )
    # One term each: no error of another one cancels any of its own.
    bound = BOUNDS[name] if case != "outer" else 2 * BOUNDS[name]
    for found, expected in pairs:
        assert found.shape == expected.shape
        assert relative(found, expected) < bound


def test_tiles_hold_outliers_apart(rng):
    """One large number spoils its own tile; a scale per tensor loses the others."""
    x = np.float32(rng.standard_normal((8, 512)))
    x[0, 0] = 1e6
    w = normal(rng, 512, 16)
    exact = np.float64(x)[1:] @ np.float64(w)
    run = jax.jit(lambda recipe, x, w: recipe(x, w, MATMUL), static_argnums=0)
    errors = {name: relative(run(RECIPES[name], jnp.asarray(x), w)[1:], exact) for name in ("mxfp8", "fp8")}
    assert errors["mxfp8"] < BOUNDS["mxfp8"] < 0.1 < errors["fp8"]


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("name", slow_but_for(TILED, ALL))
def test_what_is_not_finite_stays_visible(name, bad, rng):
    """In its row at least, forward and backward; a loss scale sees it."""
    for side in (0, 1):
        operands = [np.float32(rng.standard_normal((4, 64))), np.float32(rng.standard_normal((64, 4)))]
        operands[side][np.unravel_index(rng.integers(256), operands[side].shape)] = bad
        out = jax.jit(ALL[name], static_argnums=2)(*map(jnp.asarray, operands), MATMUL)
        assert not jnp.isfinite(out).all()


@pytest.mark.parametrize("dtype", slow_but_for(["bfloat16"], ["bfloat16", "float16", "float32"]))
@pytest.mark.parametrize("name", TILED)
def test_products_run_in_the_dtype_of_the_operands(name, dtype):
    """None of the three is a float32 matmul of 16-bit operands."""
    x, w = jnp.ones((32, 64), dtype), jnp.ones((64, 32), dtype)
    grad = jax.grad(lambda x, w: RECIPES[name](x, w, MATMUL).astype(jnp.float32).sum(), (0, 1))
    found = products(stablehlo(grad, x, w, platform="tpu"))
    short = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[dtype]
    assert {operand for product in found for operand in product[:2]} == {short}


# --- JAX's matmul of tiles -----------------------------------------------------------------------


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="JAX runs it on CPUs from 0.12 on")
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize(
    "case",
    slow_but_for(("vector", "two contracted, two batched"), [case for case in PRODUCTS if case != "outer"]),
)
def test_jax_multiplies_the_same_tiles(name, case, rng):
    lhs_shape, rhs_shape, numbers = PRODUCTS[case]
    lhs, rhs = normal(rng, *lhs_shape), normal(rng, *rhs_shape)
    recipe = RECIPES[name]
    call = Call(dimensions(numbers), recipe, jnp.float32, jnp.float32, None, None)
    kernel = functools.partial(_tiles.kernel_product, call=call, specs=recipe.operands)
    by_kernel, by_recipe = jax.jit(lambda x, w: (kernel(x, w), recipe(x, w, numbers)))(lhs, rhs)
    assert relative(by_kernel, by_recipe) < EXACT


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "deepseek"])
def test_programs_for_blackwell_multiply_tiles(name, monkeypatch):
    """Forward and backward, under autocast; tiles that no device multiplies are multiplied as what they stand for."""
    monkeypatch.setattr(_tiles, "has_units", lambda: True)
    x, w = jnp.ones((64, 128)), jnp.ones((128, 96))
    loss = jmp.autocast(lambda w, x: jnp.sum((x @ w) ** 2), "mixed_bfloat16", dot=ALL[name])
    text = stablehlo(jax.grad(loss, (0, 1)), w, x, platform="cuda")
    assert text.count("@__op$block_scaled_dot") == (0 if name == "deepseek" else 3)
    assert len(products(text)) == (3 if name == "deepseek" else 0)
    mapped = stablehlo(jax.vmap(jax.grad(loss), (None, 0)), w, x[:, None], platform="cuda")
    assert "block_scaled" not in mapped


def test_other_gpus_multiply_what_tiles_stand_for():
    """In 16 bits; JAX's matmul of tiles would become one of float32 there. Float32 arguments are not exception."""
    x, w = jnp.ones((64, 128)), jnp.ones((128, 96))
    for name in ALL:
        loss = jmp.autocast(lambda w, x: jnp.sum(x @ w), "mixed_bfloat16", dot=ALL[name])
        text = stablehlo(jax.grad(loss, (0, 1)), w, x)
        assert "block_scaled" not in text
        assert {dtype for product in products(text) for dtype in product[:2]} == {"bf16"}
    assert not _tiles.has_units()


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("gpu", "10.0", True),
        ("gpu", "12.1", True),
        ("gpu", "9.0", False),
        ("gpu", "gfx950", False),
        ("tpu", "10.0", False),
    ],
)
def test_blackwell_and_later_multiply_tiles(platform, capability, expected, monkeypatch):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert _tiles.has_units() == expected


SPEEDS = {
    "mxfp8": "at the speed of the compute dtype, but on NVIDIA Blackwell",
    "w4a16": "at the speed of the compute dtype",
    "deepseek": "at the speed of the compute dtype",
}


@pytest.mark.parametrize("name", SPEEDS)
def test_explain_says_how_fast_tiles_are(name):
    weights = {"dense": jnp.ones((64, 64)), "kernel": jnp.ones((3, 3, 64, 64))}

    def model(weights, x):
        images = jax.lax.conv_general_dilated(x, weights["kernel"], (1, 1), "SAME", dimension_numbers=LAYOUT)
        return images @ weights["dense"]

    records = jmp.explain(model, "mixed_bfloat16", dot=ALL[name])(weights, jnp.ones((2, 8, 8, 64)))
    reasons = {record.primitive: record.reason for record in records}
    assert reasons["dot_general"].endswith(SPEEDS[name])
    assert "dot= replaces only dot_general" in reasons["conv_general_dilated"]


LAYOUT = ("NHWC", "HWIO", "NHWC")


# --- Arrays that are held in 4 bits ---------------------------------------------------------------

SHAPES = {
    "a kernel": ((256, 12), (0,), (2, 12)),
    "a kernel of Equinox": ((12, 256), (1,), (12, 2)),
    "a small kernel": ((32, 12), (0,), (1, 12)),
    "attention": ((8, 64, 12), (0, 1), (4, 1, 12)),
    "experts": ((3, 256, 12), (1,), (3, 2, 12)),
    "heads of one tile": ((4, 128, 12), (0, 1), (4, 1, 12)),
    "stacked attention": ((2, 4, 256, 12), (1, 2), (2, 4, 2, 12)),
    "nothing": ((0, 12), (0,), (1, 12)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_arrays_have_a_scale_per_tile(case, rng):
    """Along the axes that are added up, from the last on; each tile as if it were alone."""
    shape, axes, of_scale = SHAPES[case]
    x = jnp.asarray(spread(rng, *shape) if 0 not in shape else np.zeros(shape, np.float32))
    q = jax.jit(lambda x: quant.quantize_array(x, quant.W4A16.rhs, axes))(x)
    assert (q.shape, q.scale.shape, q.values.dtype) == (shape, of_scale, jnp.int4)
    assert q.nbytes == -(-x.size // 2) + 4 * math.prod(of_scale)
    step = np.asarray(q.scale)
    for axis, size in enumerate(shape):
        step = np.repeat(step, size // step.shape[axis], axis) if size else step[:0]
    back = jax.jit(lambda q: q.dequantize())(q)
    assert (np.abs(back - np.asarray(x)) <= step / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("shape", [(100, 4), (6, 40, 4)])
def test_tiles_that_do_not_divide_are_refused(shape):
    axes = tuple(range(len(shape) - 1))
    n = math.prod(shape[:-1])
    with pytest.raises(jmp.errors.InvalidRecipeError, match=rf"Leaf 'a/w'.*tiles of 64 do not divide the {n} numbers"):
        quant.quantize_tree({"a": {"w": jnp.ones(shape)}}, quant.QuantSpec("int4", tile=64), axes=axes)


def test_a_parameter_that_no_matmul_takes_is_not_frozen_in_8_bits(tmp_path):
    with pytest.raises(jmp.errors.InvalidRecipeError, match="Nothing of the array"):
        export.freeze(lambda w, x: x + w, jnp.ones((4, 4)), jnp.ones((4, 4)), path=tmp_path / "m", recipe="w8a16")


def test_a_tile_longer_than_a_channel_is_the_channel(rng):
    w = spread(rng, 3, 16, 8)
    short, whole = (quant.quantize_array(w, f"int4:tile{n}", axes=[0, 1]) for n in (128, 48))
    assert short.scale.shape == (1, 1, 8)
    np.testing.assert_array_equal(short, whole)


def test_a_model_whose_layers_tiles_do_not_divide_is_not_frozen(tmp_path):
    params = {"dense": jnp.ones((100, 16))}
    with pytest.raises(jmp.errors.InvalidRecipeError, match=r"Leaf 'dense'.*tiles of 64 do not divide the 100"):
        export.freeze(
            lambda p, x: x @ p["dense"],
            params,
            jnp.ones((2, 100)),
            path=tmp_path / "m",
            recipe="lhs=none,rhs=int4:tile64",
        )
    assert not list(tmp_path.iterdir())


def test_nvfp4_holds_a_quarter_of_the_numbers_that_int8_holds(rng):
    w = normal(rng, 256, 64)
    q = quant.quantize_array(w, quant.NVFP4.rhs, axes=[0])
    np.testing.assert_allclose(q.dequantize(), in_numpy(np.asarray(w).T, quant.NVFP4.rhs).T, rtol=EXACT)
    assert set(np.unique(np.abs(np.float32(q.values)))) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}


def test_a_frozen_model_of_4_bits_is_a_seventh_of_float32(tmp_path, rng):
    """Two numbers in a byte, and a scale for 128; what comes back is what was frozen."""
    params = {name: normal(rng, 512, 512) / 32 for name in ("first", "second")} | {
        "odd": jnp.arange(5).astype(jnp.int4)
    }
    x = normal(rng, 4, 512)

    def apply(params, x):
        return jnp.tanh(x @ params["first"]) @ params["second"] + params["odd"].astype(jnp.float32).sum()

    path = tmp_path / "model"
    export.freeze(apply, params, x, path=path, recipe="w4a16", policy="mixed_bfloat16")
    assert path.stat().st_size < 0.14 * 2 * 4 * 512 * 512
    served = export.load(path, recipe="w4a16")
    held = quant.quantize_tree(params, quant.W4A16.rhs)
    np.testing.assert_array_equal(served.params["first"].values, held["first"].values)
    np.testing.assert_array_equal(served.params["odd"], params["odd"])
    expected = jmp.autocast(apply, "mixed_bfloat16")(quant.dequantize_tree(held), x)
    assert relative(served(x), expected) < 2**-7
    assert relative(served(x), apply(params, x)) < 2 * BOUNDS["w4a16"]


@pytest.mark.parametrize("dtype", ["int4", "uint4", "float4_e2m1fn"])
@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_every_number_of_4_bits_is_stored(dtype, n, tmp_path):
    values = np.arange(16, dtype=np.uint8)[: n or 16].view(dtype)
    export.freeze(lambda w, x: x, {"w": values}, jnp.ones(1), path=tmp_path / "m")
    found = export.load(tmp_path / "m").params["w"]
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    np.testing.assert_array_equal(np.asarray(found).view(np.uint8) & 15, values.view(np.uint8))
