"""Convolutions and ragged matmuls of quantized operands."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.comparisons import slow_but_for
from support.lowbit import (
    BOUNDS,
    EXACT,
    RECIPES,
    UNTILED,
    assert_same,
    mesh,
    normal,
    relative,
    value_and_gradients,
    whole,
)

import jmp_lite as jmp
from jmp_lite import quant

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
    """What an operand stands for once it was quantized, with one scale per index of an axis."""
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
    """The largest number is in every image, so that they share a scale."""
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
    assert_same(found, expected, 2 * BOUNDS[name] if is_close else EXACT)


# --- Ragged groups --------------------------------------------------------------------------------

SIZES = (16, 10, 0, 30, 8)
#: Weights of experts that are far apart.
EXPERTS = np.array([0.01, 0.1, 1, 10, 100]).reshape(-1, 1, 1)


def ragged(x, w):
    return lax.ragged_dot(x, w, jnp.array(SIZES, jnp.int32))


@pytest.fixture
def experts(rng):
    """Rows, weights of experts and a cotangent."""
    return normal(rng, 64, 32), normal(rng, len(SIZES), 32, 16) * jnp.asarray(EXPERTS, jnp.float32), normal(rng, 64, 16)


#: Scales that are no powers of two tell which axes share them.
ROWWISE = quant.get_recipe("lhs=int8:channel,rhs=int8:channel,grad=int8:channel")


def rounded_experts(x, w, by, recipe):
    """The operands as they are quantized: experts one by one."""
    rows = rounded(x, recipe.lhs, 0)
    weights = [rounded(expert, recipe.rhs, 1) for expert in w]
    return rows, jnp.stack(weights), rounded(by, recipe.grad, 1)


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", slow_but_for(("fp8_rowwise", "int8_train"), UNTILED))
@pytest.mark.parametrize("policy", ["full", "mixed_bfloat16"])
def test_every_expert_is_quantized_for_itself(name, policy, experts):
    """Under autocast, in both gradients too; a small expert is as accurate as a large one."""
    x, w, by = experts
    fun = jmp.autocast(ragged, policy, dot=RECIPES[name])
    out, pull = jax.vjp(jax.jit(fun), x, w)
    ends = np.cumsum([0, *SIZES])
    bound = BOUNDS[name] + (2**-8 if policy == "mixed_bfloat16" else 0)
    for start, stop in itertools.pairwise(ends):
        assert stop == start or relative(out[start:stop], ragged(x, w)[start:stop]) < bound
    of_x, of_w = pull(by.astype(out.dtype))
    assert (of_x.dtype, of_w.dtype) == (x.dtype, w.dtype)
    for found, true in zip((of_x, of_w), jax.vjp(ragged, x, w)[1](by), strict=True):
        assert relative(found, true) < bound
    if policy == "full" and name != "int8_train":  # rounds at random
        rows, weights, cotangent = rounded_experts(x, w, by, RECIPES[name])
        expected, pull0 = jax.vjp(ragged, rows, weights)
        assert_same((out, of_x, of_w), (expected, *pull0(cotangent)))


def test_scales_of_experts_are_those_of_rows_and_of_output_channels(experts):
    x, w, by = experts
    (out, pull), rows = jax.vjp(jmp.autocast(ragged, "full", dot=ROWWISE), x, w), rounded_experts(x, w, by, ROWWISE)
    expected, pull0 = jax.vjp(ragged, *rows[:2])
    assert_same((out, *pull(by)), (expected, *pull0(rows[2])))


def test_recipes_stand_in_for_ragged_dot_general(experts):
    x, w, _ = experts
    numbers = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
    found = quant.FP8.ragged_dot(x, w, jnp.array(SIZES, jnp.int32), numbers)
    np.testing.assert_array_equal(found, jmp.autocast(ragged, "full", dot=quant.FP8)(x, w))
    with pytest.raises(jmp.errors.InvalidRecipeError, match="not per tile"):
        quant.MXFP8.ragged_dot(x, w, jnp.array(SIZES, jnp.int32), numbers)


@pytest.mark.parametrize("transform", ["checkpoint", "scan"])
def test_ragged_groups_under_transformations(transform, experts):
    x, w, by = experts

    def loss(x, w, by):
        return jnp.sum(jmp.autocast(ragged, "full", dot=quant.FP8)(x, w) * by)

    def scanned(x, w, by):
        return lax.scan(lambda total, xs: (total + loss(*xs), None), jnp.float32(0), (x[None], w[None], by[None]))[0]

    keeping = jax.checkpoint(loss, policy=jax.checkpoint_policies.everything_saveable)
    fun = {"checkpoint": keeping, "scan": scanned}[transform]
    assert_same(jax.jit(jax.grad(fun, (0, 1)))(x, w, by), jax.grad(loss, (0, 1))(x, w, by))


def test_explain_says_that_they_are_no_faster(experts):
    def fun(x, w):
        return jnp.sum(ragged(x, w)) + jnp.sum(convolution("grouped", lax.conv_general_dilated)(images, kernel))

    images, kernel = (jnp.ones(shape) for shape in CONVOLUTIONS["grouped"][:2])
    for policy in ("full", "mixed_bfloat16"):
        records = jmp.explain(fun, policy, dot=quant.FP8)(*experts[:2])
        reasons = [r.reason for r in records if r.primitive in ("ragged_dot_general", "conv_general_dilated")]
        assert len(reasons) == 2
        assert all("replaced by" in reason and "at the speed of the compute dtype" in reason for reason in reasons)
