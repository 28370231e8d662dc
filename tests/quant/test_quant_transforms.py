"""The same numbers under every transformation of JAX, on one device and on eight."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import equations
from lowbit import BOUNDS, MATMUL, RECIPES, normal, products, relative, slow_but_for, stablehlo

from jmp_lite import quant

ROWS, IN, OUT = 16, 64, 32
VECTOR = (((0,), (0,)), ((), ()))
#: Where the order of a float32 sum may differ.
EXACT = 1e-6
#: The same for a sum of thousands of squares.
SUMMED = 1e-5
#: Gradients of a batch whose parts have cotangents with scales of their own: another rounding of the same numbers.
OWN_SCALES = ("fp8_rowwise", "int8_train", "fp8_block128")

recipes = pytest.mark.parametrize("name", slow_but_for(("fp8", "w8a8_static"), RECIPES))


def loss(dot, w, x, target):
    return jnp.mean((dot(x, w, MATMUL) - target) ** 2)


def whole(rng, name, *shape):
    """Whole numbers with more bits than any float8 has, and a first index whose scales are powers of two.

    So sums are exact, in any order, and nothing is rounded the other way.
    """
    largest = 112 if "fp8" in name else 127
    return rng.integers(-largest, largest + 1, shape).astype(np.float32), largest


@pytest.fixture
def data(rng, name):
    """Weights, inputs and targets."""
    (w, largest), (x, _), (target, _) = (whole(rng, name, *shape) for shape in ((IN, OUT), (ROWS, IN), (ROWS, OUT)))
    w[0], x[:, 0] = largest, largest
    return jnp.asarray(w), jnp.asarray(x), jnp.asarray(target)


def value_and_gradients(fun):
    return jax.value_and_grad(fun, argnums=(0, 1))


@functools.cache
def compiled(name):
    return jax.jit(value_and_gradients(functools.partial(loss, RECIPES[name])))


def assert_close(found, expected, tolerance=EXACT):
    """Compares trees; errors are relative to the length of the arrays."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.shape == y.shape
        assert relative(x, y) <= (tolerance if x.ndim else max(tolerance, SUMMED))


def assert_own_scales(name, found, expected):
    """Compares gradients of a batch in parts: equal, or as far apart as two roundings are."""
    (value, (of_w, of_x)), (value0, (of_w0, of_x0)) = found, expected
    assert_close((value, of_x), (value0, of_x0), BOUNDS[name] if name == "int8_train" else EXACT)
    assert_close(of_w, of_w0, 1.5 * BOUNDS[name] if name in OWN_SCALES else EXACT)


# --- Transformations on one device ----------------------------------------------------------------


def of_vectors(dot):
    """The loss, written for one example and mapped."""

    def total(w, x, target):
        return jnp.mean(jax.vmap(lambda x, t: (dot(x, w, VECTOR) - t) ** 2)(x, target))

    return total


def in_a_loop(dot):
    def total(w, x, target):
        def body(total, part):
            return total + loss(dot, w, *part), None

        parts = x.reshape(4, -1, IN), target.reshape(4, -1, OUT)
        return lax.scan(body, jnp.float32(0), parts)[0] / 4

    return total


def in_a_branch(dot):
    def total(w, x, target):
        return lax.cond(x[0, 0] < 1e9, functools.partial(loss, dot), lambda *_: jnp.float32(0), w, x, target)

    return total


def on_transposed(dot):
    """The same product with its operands mapped along other axes."""

    def total(w, x, target):
        columns = jax.vmap(lambda column: dot(x, column, (((1,), (0,)), ((), ()))), in_axes=1, out_axes=1)
        return jnp.mean((columns(w) - target) ** 2)

    return total


TRANSFORMS = {
    "not compiled": lambda dot: functools.partial(loss, dot),
    "vmap": of_vectors,
    "checkpoint": lambda dot: jax.checkpoint(functools.partial(loss, dot)),
    "checkpoint of vmap": lambda dot: jax.checkpoint(of_vectors(dot)),
    "cond": in_a_branch,
}


@recipes
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformations_change_nothing(name, transform, data):
    fun = value_and_gradients(TRANSFORMS[transform](RECIPES[name]))
    found = fun(*data) if transform == "not compiled" else jax.jit(fun)(*data)
    if name == "fp8_block128" and "vmap" in transform:  # each example is a product of its own
        assert_own_scales(name, found, compiled(name)(*data))
    else:
        assert_close(found, compiled(name)(*data))


@recipes
def test_a_loop_over_parts_is_off_by_rounding_alone(name, data):
    w, x, target = data
    found = jax.jit(value_and_gradients(in_a_loop(RECIPES[name])))(w, x, target)
    assert_close(found, compiled(name)(w, x, target), 2 * BOUNDS[name])


@pytest.mark.parametrize(
    "name", slow_but_for(("fp8", "w8a8_static"), [name for name in RECIPES if name != "fp8_block128"])
)
def test_a_mapped_product_is_one_product(name, data):
    """Forward and for the gradient of the weight: no batched product, whose result would be summed afterwards."""
    text = stablehlo(jax.grad(of_vectors(RECIPES[name])), *data, platform="cpu")
    shapes = [line.split("-> ")[-1] for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert [sorted(map(int, re.findall(r"\d+(?=x)", shape))) for shape in shapes] == [[ROWS, OUT], [OUT, IN]]
    assert "batching_dims" not in text
    columns = stablehlo(value_and_gradients(on_transposed(RECIPES[name])), *data, platform="cpu")
    assert len(products(columns)) == 3
    assert "batching_dims" not in columns


@recipes
def test_gradients_per_example_add_up(name, data):
    w, x, target = data

    def one(w, x, t):
        return jnp.mean((RECIPES[name](x, w, VECTOR) - t) ** 2)

    found = jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0, 0)))(w, x, target)
    assert found.shape == (ROWS, IN, OUT)
    of_w = compiled(name)(*data)[1][0]
    assert_close(jnp.mean(found, 0), of_w, 1.5 * BOUNDS[name] if name in OWN_SCALES else EXACT)


@pytest.mark.slow
@recipes
@pytest.mark.parametrize("axes", [(0, 0), (1, 1), (None, 0)], ids=str)
def test_an_ensemble_is_many_products(name, axes, rng):
    """With scales per tensor they share one."""
    x = normal(rng, 3, 8, 64) if axes[0] is not None else normal(rng, 8, 64)
    w = normal(rng, 3, 64, 32)

    def total(x, w):
        dot = functools.partial(RECIPES[name], dimension_numbers=MATMUL)
        return jnp.sum(jax.vmap(dot, axes)(jnp.moveaxis(x, 0, axes[0] or 0), jnp.moveaxis(w, 0, axes[1])) ** 2)

    def plain(x, w):
        return jnp.sum(jax.vmap(jnp.matmul, (None if axes[0] is None else 0, 0))(x, w) ** 2)

    found, expected = (jax.jit(jax.value_and_grad(fun, (0, 1)))(x, w) for fun in (total, plain))
    assert_close(found, expected, 2 * BOUNDS[name])


@pytest.mark.parametrize(
    "name", slow_but_for(("fp8",), ["fp8", "fp8_rowwise", "int8_qat", "int8_train", "fp8_delayed"])
)
def test_policies_of_checkpoint_find_the_product(name, data):
    """With ``dots_saveable`` the forward product is not computed again; with ``nothing_saveable`` it is."""

    def two(w, x, target):
        y = jnp.tanh(RECIPES[name](x, w, MATMUL))
        return jnp.mean((jnp.sin(y) - target) ** 2)

    policies = jax.checkpoint_policies
    counts = []
    for policy in (policies.dots_saveable, policies.nothing_saveable):
        text = stablehlo(value_and_gradients(jax.checkpoint(two, policy=policy)), *data, platform="cpu")
        counts.append(len(products(text)))
    assert counts == [3, 4]


# --- Eight devices --------------------------------------------------------------------------------


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


@recipes
@pytest.mark.parametrize(
    "weights",
    [P(), P("data"), pytest.param(P(None, "data"), marks=pytest.mark.slow)],
    ids=["replicated", "FSDP", "columns"],
)
def test_devices_agree_with_one(name, weights, data):
    w, x, target = data
    place = lambda array, spec: jax.device_put(array, NamedSharding(mesh(), spec))  # noqa: E731
    found = compiled(name)(place(w, weights), place(x, P("data")), place(target, P("data")))
    expected = compiled(name)(*data)
    assert_close(found, expected)


def local_step(name, checks):
    """Gradients of a mean over devices, as they are written inside of a ``shard_map``."""
    recipe = dataclasses.replace(RECIPES[name], axis_name="data")

    def step(w, x, target):
        value, (of_w, of_x) = value_and_gradients(functools.partial(loss, recipe))(w, x, target)
        of_w = of_w if checks else lax.psum(of_w, "data")
        return lax.pmean(value, "data"), (of_w / 8, of_x / 8)

    return step


@recipes
@pytest.mark.parametrize("checks", [True, False])
def test_shard_map_agrees_on_scales(name, checks, data):
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P(), (P(), P("data"))), "check_vma": checks}
    found = jax.jit(jax.shard_map(local_step(name, checks), mesh=mesh(), **specs))(*data)
    assert_own_scales(name, found, compiled(name)(*data))


@recipes
def test_pmap_agrees_on_scales(name, data):
    w, x, target = data
    step = jax.pmap(local_step(name, checks=False), "data", in_axes=(None, 0, 0))
    value, (of_w, of_x) = step(w, x.reshape(8, -1, IN), target.reshape(8, -1, OUT))
    np.testing.assert_array_equal(of_w[0], of_w[-1])
    assert_own_scales(name, (value[0], (of_w[0], of_x.reshape(ROWS, IN))), compiled(name)(*data))


@pytest.mark.parametrize("name", ["fp8", "fp8_delayed"])
def test_without_an_axis_name_every_device_has_its_own_scale(name, data):
    def step(w, x, target):
        value, (of_w, of_x) = value_and_gradients(functools.partial(loss, RECIPES[name]))(w, x, target)
        return lax.pmean(value, "data"), (of_w / 8, of_x / 8)

    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P(), (P(), P("data")))}
    found = jax.jit(jax.shard_map(step, mesh=mesh(), **specs))(*data)
    assert_close(found, compiled(name)(*data), 1.5 * BOUNDS[name])


@recipes
def test_explicit_sharding(name, data):
    with jax.set_mesh(mesh(AxisType.Explicit)):
        w, x, target = (jax.device_put(x, spec) for x, spec in zip(data, (P(), P("data"), P("data")), strict=True))
        found = jax.jit(value_and_gradients(functools.partial(loss, RECIPES[name])))(w, x, target)
        assert jax.typeof(found[1][1]).sharding.spec[0] == "data"
    assert_close(found, compiled(name)(*data))


@recipes
def test_explicitly_sharded_sums(name, data):
    """What is added up is sharded, and so is not the result: gradients are sharded like their operands."""
    w, x, _ = data

    def total(w, x, **params):
        return RECIPES[name](x, w, MATMUL, **params).sum()

    with jax.set_mesh(mesh(AxisType.Explicit)):
        args = jax.device_put(w, P("data")), jax.device_put(x, P(None, "data"))
        found = jax.jit(jax.grad(functools.partial(total, out_sharding=P(None, None)), argnums=(0, 1)))(*args)
        assert [g.sharding.spec for g in found] == [P("data", None), P(None, "data")]
    assert_close(found, jax.grad(total, argnums=(0, 1))(w, x))


@pytest.mark.parametrize("name", ["fp8", "int8_qat"])
def test_scales_of_sharded_arrays_take_one_maximum_each(name, data):
    """Channels of activations need no communication; a tensor needs that of one number."""
    sharding = NamedSharding(mesh(), P("data"))
    args = data[0], *(jax.device_put(x, sharding) for x in data[1:])
    text = jax.jit(jax.grad(functools.partial(loss, RECIPES[name]))).lower(*args).compile().as_text()
    maxima = [line for line in text.splitlines() if "all-reduce(" in line and "f32[]" in line.split("all-reduce(")[0]]
    assert len(maxima) <= (3 if name == "fp8" else 1)


# --- Convolutions ---------------------------------------------------------------------------------

CONVOLUTIONS = {
    "images": ((2, 8, 8, 4), (3, 3, 4, 8), {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}),
    "strided, dilated": (
        (2, 4, 9, 9),
        (8, 4, 3, 3),
        {"window_strides": (2, 2), "rhs_dilation": (2, 2), "padding": "VALID"},
    ),
    "grouped": ((2, 8, 6, 6), (8, 2, 3, 3), {"feature_group_count": 4}),
    "sequence": ((2, 16, 4), (3, 4, 8), {"window_strides": (1,), "dimension_numbers": ("NWC", "WIO", "NWC")}),
}
conv_recipes = pytest.mark.parametrize("name", slow_but_for(("fp8",), ["fp8", "fp8_rowwise", "int8_qat", "w8a16"]))


def convolution(case, conv):
    """Product-like function of two arrays."""
    params = {"window_strides": (1, 1), "padding": "SAME", **CONVOLUTIONS[case][2]}
    return lambda x, w: conv(x, w, **params)


def rounded(x, spec, kept):
    """What an operand stands for once it was quantised, with one scale per index of an axis."""
    if spec is None:
        return x
    axes = tuple(i for i in range(x.ndim) if i != kept) if spec.granularity == "channel" else None
    amax = jnp.max(jnp.abs(x), axis=axes, keepdims=axes is not None)
    scale = quant.absmax_scale(amax, spec.dtype, pow2=spec.pow2)
    return quant.dequantize(quant.quantize(x, spec.dtype, scale), scale)


@conv_recipes
@pytest.mark.parametrize("case", slow_but_for(("grouped",), CONVOLUTIONS))
def test_a_convolution_is_one_of_rounded_operands(name, case, rng):
    x, w = (normal(rng, *shape) for shape in CONVOLUTIONS[case][:2])
    ours, plain = (convolution(case, conv) for conv in (RECIPES[name].conv, lax.conv_general_dilated))
    layout = CONVOLUTIONS[case][2].get("dimension_numbers", ("NC", "OI", "NC"))
    recipe = RECIPES[name]
    operands = rounded(x, recipe.lhs, 0), rounded(w, recipe.rhs, layout[1].index("O"))
    out, pull = jax.vjp(jax.jit(ours), x, w)
    expected, pull0 = jax.vjp(jax.jit(plain), *operands)
    assert relative(out, expected) < EXACT
    cotangent = normal(rng, *out.shape)
    if name != "int8_train":  # rounds at random
        known = rounded(cotangent, recipe.grad, layout[2].index("C"))
        for found, of_rounded in zip(pull(cotangent), pull0(known), strict=True):
            assert relative(found, of_rounded) < EXACT
    for found, true in zip(pull(cotangent), jax.vjp(plain, x, w)[1](cotangent), strict=True):
        assert relative(found, true) < BOUNDS[name]


@conv_recipes
def test_a_convolution_keeps_8_bits(name, rng):
    x, w = normal(rng, 2, 16, 16, 8, dtype="bfloat16"), normal(rng, 3, 3, 8, 8, dtype="bfloat16")
    pull = jax.jit(lambda x, w: jax.vjp(convolution("images", RECIPES[name].conv), x, w)[1])(x, w)
    large = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= w.size]
    bits = {leaf.dtype.itemsize for leaf in large if leaf.size >= x.size}
    assert bits == ({2} if RECIPES[name].lhs is None else {1})
    assert any(leaf.dtype.itemsize == 1 for leaf in large)


@conv_recipes
@pytest.mark.parametrize(
    "spread", slow_but_for(("vmap", "shard_map"), ["vmap", "scan", "checkpoint", "GSPMD", "shard_map", "pmap"])
)
def test_convolutions_under_transformations(name, spread, rng):
    """``vmap`` over images, too, shares the scale of a tensor."""
    if spread == "pmap" and name not in ("fp8", "int8_qat"):
        pytest.skip("takes long to compile; shard_map has the same rules")
    (x, largest), (w, _) = whole(rng, name, 8, 6, 6, 4), whole(rng, name, 3, 3, 4, 8)
    x[:, 0, 0], w[0, 0, 0] = largest, largest
    recipe = RECIPES[name]
    if spread in ("shard_map", "pmap"):
        recipe = dataclasses.replace(recipe, axis_name="data")
    conv = convolution("images", recipe.conv)
    plain = lambda w, x: jnp.sum(convolution("images", RECIPES[name].conv)(x, w) ** 2)  # noqa: E731
    expected = jax.jit(value_and_gradients(plain))(w, x)

    def one(w, x):
        return jnp.sum(conv(x, w) ** 2)

    def scanned(w, x):
        return lax.scan(lambda total, x: (total + one(w, x[None]), None), jnp.float32(0), x)[0]

    def step(w, x):
        value, (of_w, of_x) = value_and_gradients(one)(w, x)
        return lax.psum(value, "data"), (lax.psum(of_w, "data") if spread == "pmap" else of_w, of_x)

    funs = {
        "vmap": lambda: value_and_gradients(lambda w, x: jnp.sum(jax.vmap(lambda x: conv(x[None], w)[0])(x) ** 2)),
        "scan": lambda: value_and_gradients(scanned),
        "checkpoint": lambda: value_and_gradients(jax.checkpoint(one)),
        "GSPMD": lambda: value_and_gradients(one),
        "shard_map": lambda: jax.shard_map(
            step, mesh=mesh(), in_specs=(P(), P("data")), out_specs=(P(), (P(), P("data")))
        ),
    }
    if spread == "pmap":
        value, (of_w, of_x) = jax.pmap(step, "data", in_axes=(None, 0))(w, x[:, None])
        found = value[0], (of_w[0], of_x[:, 0])
    else:
        placed = jax.device_put(x, NamedSharding(mesh(), P("data"))) if spread == "GSPMD" else x
        found = jax.jit(funs[spread]())(w, placed)
    splits_cotangents = name in ("fp8_rowwise", "int8_train") and spread in ("vmap", "scan", "shard_map", "pmap")
    is_close = splits_cotangents or spread == "scan"
    assert_close(found, expected, 2 * BOUNDS[name] if is_close else EXACT)


# --- Blocks ---------------------------------------------------------------------------------------


def tiled(x, rows, columns):
    """DeepSeek's tiles in plain loops: one e4m3 scale per tile."""
    result = np.zeros(x.shape)
    for i in range(math.ceil(x.shape[0] / rows)):
        for j in range(math.ceil(x.shape[1] / columns)):
            at = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale = np.float32(np.max(np.abs(x[at]))) * np.float32(1 / 448)
            result[at] = np.float64((np.float32(x[at]) / scale).astype(jnp.float8_e4m3fn)) * scale
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", slow_but_for([(10, 300, 200)], [(16, 256, 128), (10, 300, 200), (130, 60, 5)]), ids=str
)
def test_blocks_are_those_of_deepseek(shape, rng):
    """Activations and cotangents in tiles of 1 x 128 along what is added up, weights in blocks of 128 x 128."""
    m, k, n = shape
    x, w, g = (np.float32(rng.standard_normal(s) * np.exp(rng.normal(size=s))) for s in ((m, k), (k, n), (m, n)))
    out, pull = jax.vjp(lambda x, w: quant.FP8_BLOCK128(x, w, MATMUL), jnp.asarray(x), jnp.asarray(w))
    of_x, of_w = pull(jnp.asarray(g))
    assert relative(out, tiled(x, 1, 128) @ tiled(w, 128, 128)) < EXACT
    assert relative(of_x, tiled(g, 1, 128) @ tiled(w, 128, 128).T) < EXACT
    assert relative(of_w, tiled(x, 128, 1).T @ tiled(g, 128, 1)) < EXACT


@pytest.mark.slow
def test_blocks_hold_outliers_apart(rng):
    """One large number spoils its own tile; a scale per tensor loses the others, in int8 all of them."""
    x = np.float32(rng.standard_normal((8, 512)))
    x[0, 0] = 1e6
    w = normal(rng, 512, 16)
    exact = np.float64(x)[1:] @ np.float64(w)
    errors = {name: relative(RECIPES[name](jnp.asarray(x), w, MATMUL)[1:], exact) for name in ("fp8_block128", "fp8")}
    assert errors["fp8_block128"] < BOUNDS["fp8_block128"] < 0.1 < errors["fp8"]


@pytest.mark.parametrize("name", ["fp8"])
def test_one_equation_stands_for_a_product(name, data):
    """What a jaxpr shows of the forward pass."""
    assert len(equations("dot_general", functools.partial(loss, RECIPES[name]), *data)) == 1
