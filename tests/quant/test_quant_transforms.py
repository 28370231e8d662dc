"""The same numbers under every transformation of JAX, on one device and on eight."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.comparisons import slow_but_for
from support.jaxprs import equations
from support.lowbit import (
    BOUNDS,
    EXACT,
    MATMUL,
    RECIPES,
    TILED,
    UNTILED,
    assert_same,
    mesh,
    normal,
    products,
    relative,
    stablehlo,
    value_and_gradients,
    whole,
)

import jmp_lite as jmp
from jmp_lite import quant

ROWS, IN, OUT = 16, 64, 32
VECTOR = (((0,), (0,)), ((), ()))
#: Gradients of a batch whose parts have cotangents with their own scales: another rounding of the same numbers.
OWN_SCALES = ("fp8_rowwise", "int8_train", "mxfp8", "nvfp4")

recipes = pytest.mark.parametrize("name", slow_but_for(("fp8", "w8a8_static"), RECIPES))


def loss(dot, w, x, target):
    return jnp.mean((dot(x, w, MATMUL) - target) ** 2)


@pytest.fixture
def data(rng, name):
    """Weights, inputs and targets."""
    (w, largest), (x, _), (target, _) = (whole(rng, name, *shape) for shape in ((IN, OUT), (ROWS, IN), (ROWS, OUT)))
    w[0], x[:, 0] = largest, largest
    return jnp.asarray(w), jnp.asarray(x), jnp.asarray(target)


@functools.cache
def compiled(name):
    return jax.jit(value_and_gradients(functools.partial(loss, RECIPES[name])))


def assert_own_scales(name, found, expected):
    """Compares gradients of a batch in parts: equal, or as far apart as two roundings are."""
    (value, (of_w, of_x)), (value0, (of_w0, of_x0)) = found, expected
    assert_same((value, of_x), (value0, of_x0), BOUNDS[name] if name == "int8_train" else EXACT)
    assert_same(of_w, of_w0, 1.5 * BOUNDS[name] if name in OWN_SCALES else EXACT)


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
    """The same matmul with its operands mapped along other axes."""

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


@pytest.mark.covering(1)
@recipes
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformations_change_nothing(name, transform, data):
    fun = value_and_gradients(TRANSFORMS[transform](RECIPES[name]))
    found = fun(*data) if transform == "not compiled" else jax.jit(fun)(*data)
    if name in TILED and "vmap" in transform:  # each example is its own matmul
        assert_own_scales(name, found, compiled(name)(*data))
    else:
        assert_same(found, compiled(name)(*data))


@recipes
def test_a_loop_over_parts_is_off_by_rounding_alone(name, data):
    w, x, target = data
    found = jax.jit(value_and_gradients(in_a_loop(RECIPES[name])))(w, x, target)
    assert_same(found, compiled(name)(w, x, target), 2 * BOUNDS[name])


@pytest.mark.parametrize("name", slow_but_for(("fp8", "w8a8_static"), UNTILED))
def test_a_mapped_product_is_one_product(name, data):
    """Forward and for the gradient of the weight: no batched matmul, whose result would be summed afterwards."""
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
    assert_same(jnp.mean(found, 0), of_w, 1.5 * BOUNDS[name] if name in OWN_SCALES else EXACT)


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
    assert_same(found, expected, 2 * BOUNDS[name])


@pytest.mark.parametrize("name", slow_but_for(("fp8",), ["fp8", "fp8_rowwise", "int8_qat", "int8_train"]))
def test_policies_of_checkpoint_find_the_product(name, data):
    """With ``dots_saveable`` the forward matmul is not computed again; with ``nothing_saveable`` it is."""

    def two(w, x, target):
        y = jnp.tanh(RECIPES[name](x, w, MATMUL))
        return jnp.mean((jnp.sin(y) - target) ** 2)

    policies = jax.checkpoint_policies
    counts = []
    for policy in (policies.dots_saveable, policies.nothing_saveable):
        text = stablehlo(value_and_gradients(jax.checkpoint(two, policy=policy)), *data, platform="cpu")
        counts.append(len(products(text)))
    assert counts == [3, 4]


@pytest.mark.parametrize("name", ["fp8"])
def test_one_equation_stands_for_a_product(name, data):
    """What a jaxpr shows of the forward pass."""
    assert len(equations("dot_general", functools.partial(loss, RECIPES[name]), *data)) == 1


# --- Eight devices --------------------------------------------------------------------------------


@pytest.mark.covering(1)
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
    assert_same(found, expected)


def local_step(name, checks):
    """Gradients of a mean over devices, as they are written inside of a ``shard_map``."""
    recipe = dataclasses.replace(RECIPES[name], axis_name="data")

    def step(w, x, target):
        value, (of_w, of_x) = value_and_gradients(functools.partial(loss, recipe))(w, x, target)
        of_w = of_w if checks else lax.psum(of_w, "data")
        return lax.pmean(value, "data"), (of_w / 8, of_x / 8)

    return step


@pytest.mark.covering(1)
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


@pytest.mark.parametrize("name", ["fp8"])
def test_without_an_axis_name_every_device_has_its_own_scale(name, data):
    def step(w, x, target):
        value, (of_w, of_x) = value_and_gradients(functools.partial(loss, RECIPES[name]))(w, x, target)
        return lax.pmean(value, "data"), (of_w / 8, of_x / 8)

    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P(), (P(), P("data")))}
    found = jax.jit(jax.shard_map(step, mesh=mesh(), **specs))(*data)
    assert_same(found, compiled(name)(*data), 1.5 * BOUNDS[name])


@recipes
def test_explicit_sharding(name, data):
    with jax.set_mesh(mesh(AxisType.Explicit)):
        w, x, target = (jax.device_put(x, spec) for x, spec in zip(data, (P(), P("data"), P("data")), strict=True))
        found = jax.jit(value_and_gradients(functools.partial(loss, RECIPES[name])))(w, x, target)
        assert jax.typeof(found[1][1]).sharding.spec[0] == "data"
    assert_same(found, compiled(name)(*data))


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
    assert_same(found, jax.grad(total, argnums=(0, 1))(w, x))


@pytest.mark.parametrize("name", ["fp8", "int8_qat"])
def test_scales_of_sharded_arrays_take_one_maximum_each(name, data):
    """Channels of activations need no communication; a tensor needs that of one number."""
    sharding = NamedSharding(mesh(), P("data"))
    args = data[0], *(jax.device_put(x, sharding) for x in data[1:])
    text = jax.jit(jax.grad(functools.partial(loss, RECIPES[name]))).lower(*args).compile().as_text()
    maxima = [line for line in text.splitlines() if "all-reduce(" in line and "f32[]" in line.split("all-reduce(")[0]]
    assert len(maxima) <= (3 if name == "fp8" else 1)


#: Bilinear functions, in each of which a rule of the user's multiplies tangents.
MULTIPLIES = {
    "matmul": lambda x, w: x @ w,
    "jit": jax.jit(lambda x, w: x @ w),
    "checkpoint": jax.checkpoint(lambda x, w: x @ w),
    "cond": lambda x, w: lax.cond(jnp.float32(1) > 0, lambda x, w: x @ w, lambda x, w: w[: len(x)], x, w),
    "map": lambda x, w: lax.map(lambda row: row @ w, x),
    "convolution": lambda x, w: lax.conv(x[..., None], w.T[..., None], (1,), "SAME")[..., 0],
}


def with_rule(multiply):
    function = jax.custom_jvp(multiply)
    function.defjvp(lambda p, t: (function(*p), multiply(t[0], p[1]) + multiply(p[0], t[1])))
    return function


@pytest.mark.parametrize("name", MULTIPLIES)
def test_a_rule_of_the_user_multiplies_tangents_as_ours_does(name, rng):
    """What rounds its operands is not linear: a tangent gets the derivative of the recipe."""
    x, w = normal(rng, 16, 32), normal(rng, 32, 32)
    recipe = quant.FP8.replace(products="all")

    def gradients(multiply):
        fun = jmp.autocast(lambda *a: jnp.sum(jnp.sin(multiply(*a))), "full", dot=recipe)
        return jax.grad(fun, (0, 1))(x, w)

    assert_same(gradients(with_rule(MULTIPLIES[name])), gradients(MULTIPLIES[name]))


def test_a_rule_of_the_user_carries_tangents_through_a_loop(rng):
    x, w = normal(rng, 16, 32), normal(rng, 32, 32) / 6
    power = jax.custom_jvp(lambda x, w: x @ w @ w)

    @power.defjvp
    def rule(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        step = lambda c, _: ((c[0] @ w, c[1] @ w + c[0] @ dw), None)  # noqa: E731
        return lax.scan(step, (x, dx), None, length=2)[0]

    fun = lambda x, w: jnp.sum(jnp.sin(power(x, w)))  # noqa: E731
    found = jax.grad(jmp.autocast(fun, "mixed_bfloat16", dot=quant.FP8), (0, 1))(x, w)
    for gradient, exact in zip(found, jax.grad(fun, (0, 1))(x, w), strict=True):
        assert relative(gradient, exact) < 2 * BOUNDS["fp8"]


@pytest.mark.parametrize("settings", [{"dot": quant.FP8}, {"accumulation_dtype": jnp.float32}], ids=["recipe", "sum"])
def test_primitives_run_where_jit_is_disabled(settings, rng):
    x, w = normal(rng, 16, 32), normal(rng, 32, 32)
    fun = jmp.autocast(lambda x, w: jnp.tanh(x @ w) @ w, "mixed_bfloat16", **settings)
    with jax.disable_jit():
        found = fun(x, w)
    assert relative(found, jax.jit(fun)(x, w)) < 2**-6


def test_random_bits_change_where_the_scale_does_not(rng):
    """A clipped gradient has the same scale in every step: with the same bits, roundings would never average out."""
    x = jnp.abs(normal(rng, 64, 64)).clip(0, 0.5).at[0, 0].set(1.0)
    dot = quant.DotRecipe(lhs="int8:tensor:stochastic", rhs=None)
    first, second = (dot(x.at[0, 1].set(value), jnp.eye(64), MATMUL)[1:] for value in (0.25, 0.375))
    assert (first != second).any()
