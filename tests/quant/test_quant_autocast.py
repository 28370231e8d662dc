"""Recipes in whole models, through ``autocast`` and through the arguments that layers have for a matmul."""

import collections
import contextlib
import functools
import re

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.comparisons import slow_but_for
from support.lowbit import BOUNDS, MATMUL, RECIPES, normal, products, products_of_8_bits, relative, stablehlo

import jmp_lite as jmp
from jmp_lite import quant
from jmp_lite.autocast import _api

POLICIES = ["mixed_bfloat16", "mixed_float16", "full"]
E4M3, E5M2 = "f8E4M3FN", "f8E5M2"
#: Matmuls of a quantized matmul and its gradient: dtypes of the operands, and precision.
OF_FP8 = {(E4M3, E4M3, "DEFAULT"): 1, (E5M2, E4M3, "HIGHEST"): 2}

EVERYWHERE = quant.FP8.replace(products="all")

policies = pytest.mark.parametrize("policy", POLICIES)


class Body(nn.Module):
    """Two layers with names."""

    head: str = "head"

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name=self.head)(jnp.tanh(nn.Dense(32, name="body")(x)))


def linen(model, *shape):
    def make(rng):
        x = normal(rng, *shape)
        return model.apply, model.init(jax.random.key(int(rng.integers(2**31))), x), x

    return make


def of_nnx(rng):
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(int(rng.integers(2**31))))
    graph, state = nnx.split(model)
    return (lambda state, x: nnx.merge(graph, state)(x)), state, normal(rng, 8, 16)


def of_equinox(rng):
    model = eqx.nn.MLP(16, 8, 32, 1, jnp.tanh, key=jax.random.key(int(rng.integers(2**31))))
    arrays, rest = eqx.partition(model, eqx.is_array)
    return (lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x)), arrays, normal(rng, 8, 16)


def haiku_mlp(x):
    return hk.nets.MLP([32, 8], activation=jnp.tanh)(x)


def of_haiku(rng):
    model, x = hk.without_apply_rng(hk.transform(haiku_mlp)), normal(rng, 8, 16)
    return model.apply, model.init(jax.random.key(int(rng.integers(2**31))), x), x


def of_einsum(rng):
    return (lambda w, x: jnp.einsum("bthd,hdm->btm", x, w)), normal(rng, 2, 8, 16) / 4, normal(rng, 2, 4, 2, 8)


#: Models with the number of their matmuls.
MODELS = {
    "Dense": (linen(nn.Dense(8), 8, 16), 1),
    "Dense of sequences": (linen(nn.Dense(8), 2, 4, 16), 1),
    "DenseGeneral": (linen(nn.DenseGeneral((2, 8), axis=(-2, -1)), 4, 2, 16), 1),
    "Einsum": (linen(nn.Einsum((16, 8), "btd,dm->btm"), 2, 4, 16), 1),
    "attention": (linen(nn.MultiHeadDotProductAttention(2), 2, 8, 16), 6),
    "perceptron": (linen(Body(), 8, 16), 2),
    "NNX Linear": (of_nnx, 1),
    "Equinox MLP": (of_equinox, 2),
    "Haiku MLP": (of_haiku, 2),
    "einsum": (of_einsum, 1),
}


def total(fun):
    """A loss whose cotangents are of all sizes."""

    def loss(params, x):
        return jnp.mean(jnp.sin(fun(params, x).astype(jnp.float32)) ** 2)

    return loss


def gradients(loss):
    return jax.grad(loss, argnums=(0, 1))


def dtypes(tree):
    return [x.dtype for x in jax.tree.leaves(tree)]


def length(tree):
    return np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(tree)])


def counted(found):
    """How often each pair of operands, in either order, is multiplied, and how precisely."""
    return dict(collections.Counter((*pair(item), item[3]) for item in found))


def pair(item):
    return tuple(sorted(item[:2], reverse=True))


# --- Autocast -------------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("model", slow_but_for(("DenseGeneral", "attention", "perceptron", "NNX Linear"), MODELS))
@policies
def test_every_product_of_a_model_is_one_of_float8(model, policy, rng):
    """Forward with e4m3, backward with e5m2 by e4m3 and more precision; never e5m2 by e5m2."""
    make, count = MODELS[model]
    fun, params, x = make(rng)
    text = stablehlo(gradients(jmp.autocast(total(fun), policy, dot=EVERYWHERE)), params, x)
    assert counted(products(text)) == {key: n * count for key, n in OF_FP8.items()}
    assert len(products_of_8_bits(text)) == 3 * count


@pytest.mark.parametrize("model", slow_but_for(("Dense",), MODELS))
@pytest.mark.parametrize(("name", "bound"), [("fp8", 0.25), pytest.param("int8_qat", 0.08, marks=pytest.mark.slow)])
def test_models_are_as_accurate_as_their_products(model, name, bound, rng):
    """With up to three matmuls in a row, forward and backward; int8 is bounded by bfloat16 beside it."""
    fun, params, x = MODELS[model][0](rng)
    loss = total(fun)
    autocast = jmp.autocast(loss, "mixed_bfloat16", dot=RECIPES[name])
    found, expected = (jax.jit(gradients(f))(params, x) for f in (autocast, loss))
    assert dtypes(found) == dtypes(expected)
    bound = 2 * bound if model == "attention" else bound
    assert relative(length(found), length(expected)) < bound
    assert abs(autocast(params, x) - loss(params, x)) < bound * max(1e-2, float(loss(params, x)))


@policies
def test_products_are_scaled_by_one_number(policy, rng):
    """XLA then makes one call of each, with the factor inside (its gemm_rewriter.cc)."""
    fun, params, x = MODELS["Dense of sequences"][0](rng)
    text = stablehlo(gradients(jmp.autocast(total(fun), policy, dot=quant.FP8)), params, x)
    for name, factor, user in uses_of_products(text):
        assert re.search(rf"stablehlo\.multiply ({name}, |%\S+, {name} )", user), user
        assert re.search(r"broadcast_in_dim .*\(tensor<\w+>\)", factor), factor


def uses_of_products(text):
    """Of each matmul: its name, the definition of what it is multiplied by, and its only user."""
    found = []
    for function in text.split("func.func")[1:]:
        lines = function.splitlines()
        for line in lines:
            if match := re.search(r"(%\w+) = stablehlo\.dot_general", line):
                name = match.group(1)
                [user] = [other for other in lines if re.search(rf"{name}\b", other.split(" = ", 1)[-1])]
                [other] = {*re.findall(r"%\w+", user.split(" = ", 1)[1])} - {name}
                [factor] = [line for line in lines if line.strip().startswith(f"{other} =")]
                found.append((name, factor, user))
    assert len(found) == 3
    return found


def test_gradients_of_weights_are_float32(rng):
    """Not bfloat16 numbers that were cast: a batch over devices is added up in float32."""
    fun, params, x = MODELS["Dense"][0](rng)
    grads = jax.jit(jax.grad(jmp.autocast(total(fun), "mixed_bfloat16", dot=quant.FP8)))(params, x)
    kernel = grads["params"]["kernel"]
    assert kernel.dtype == jnp.float32
    assert np.any(kernel != kernel.astype(jnp.bfloat16).astype(jnp.float32))
    text = stablehlo(jax.grad(jmp.autocast(total(fun), "mixed_bfloat16", dot=quant.FP8)), params, x)
    assert [result for *_, result, _ in products(text)] == ["f32", "f32"]  # what is returned is wanted in float32


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "policy", ["mixed_float16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixed_bfloat16", "full"))]
)
def test_all_recipes_under_all_policies(name, policy, rng):
    fun, params, x = MODELS["perceptron"][0](rng)
    loss = total(fun)
    autocast = jmp.autocast(loss, policy, dot=RECIPES[name])
    found, expected = (jax.jit(gradients(f))(params, x) for f in (autocast, loss))
    assert relative(length(found), length(expected)) < max(0.25, 3 * BOUNDS[name])  # of three matmuls
    assert np.any(length(found) != length(jax.jit(gradients(jmp.autocast(loss, policy)))(params, x)))


@pytest.mark.parametrize("name", slow_but_for({"int8_qat", "w8a16", "mxfp8"}, RECIPES))
def test_no_product_of_a_recipe_is_one_of_float32(name):
    """Forward and backward, also of float32 arguments and where the result is wanted in float32."""
    x, w = jnp.ones((64, 128)), jnp.ones((128, 96))
    loss = jmp.autocast(lambda w, x: jnp.sum((x @ w) ** 2), "mixed_bfloat16", dot=RECIPES[name])
    found = products(stablehlo(jax.grad(loss, (0, 1)), w, x))
    assert len(found) == 3
    assert "f32" not in {dtype for product in found for dtype in product[:2]}


def test_names_will_do_where_functions_are_wanted(rng):
    """In ``get_recipe``; ``dot`` takes what it returns."""
    fun, params, x = MODELS["Dense"][0](rng)
    by_name = jmp.autocast(total(fun), "mixed_bfloat16", dot=quant.get_recipe("fp8"))
    assert by_name(params, x) == jmp.autocast(total(fun), "mixed_bfloat16", dot=quant.FP8)(params, x)
    with pytest.raises(jmp.errors.InvalidRuleError, match="'fp8'"):
        jmp.autocast(total(fun), "mixed_bfloat16", dot="fp8")


# --- Weights --------------------------------------------------------------------------------------


#: Matmuls of a weight and an activation, by the axes of the weight that are contracted.
ROLES = {
    "kernel on the right": (lambda w, h: h @ w, [0]),
    "kernel on the left": (lambda w, h: (w @ h.T).T, [1]),
    "einsum that swaps": (lambda w, h: jnp.einsum("bd,dh->hb", h, w).T, [0]),
    "mapped": (lambda w, h: jax.vmap(lambda h: w @ h)(h), [1]),
    "in a loop": (lambda w, h: lax.scan(lambda _, h: (None, w @ h), None, h)[1], [1]),
}


@pytest.mark.parametrize(
    "recipe", [quant.W8A16, quant.DotRecipe("int8:channel", None), quant.DotRecipe("int8", "int8:channel")], ids=str
)
@pytest.mark.parametrize("place", ROLES)
def test_the_spec_of_the_weight_goes_to_the_weight(place, recipe, rng):
    """On either side: the right spec of a recipe, or its only one."""
    multiply, axes = ROLES[place]
    w, x = normal(rng, 16, 16), normal(rng, 8, 16)
    found = jmp.autocast(lambda w, x: multiply(w, jnp.tanh(x)), "full", dot=recipe)(w, x)
    h, of_activation = jnp.tanh(x), recipe.lhs if recipe.rhs else None
    if of_activation and place != "in a loop":
        h = quant.quantize_array(h, of_activation).dequantize()
    elif of_activation:
        h = jnp.stack([quant.quantize_array(row, of_activation).dequantize() for row in h])
    expected = multiply(quant.quantize_array(w, axes=axes).dequantize(), h)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def of_a_stack(w, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack([w, w]))[0]


def in_a_loop(w, x):
    return lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ w), x)


def of_tied_embeddings(w, x):
    return jnp.tanh(w[jnp.arange(8)] + x) @ w.T


def scores(w, x):
    return jnp.tanh(x @ w) @ jnp.tanh(2 * x @ w).T


#: Functions of a weight and an input, the number of their matmuls, and how many of these have a weight.
OF_WEIGHTS = {
    "as it is": (lambda w, x: jnp.tanh(x) @ w, 1, 1),
    "on the left": (lambda w, x: w @ jnp.tanh(x).T, 1, 1),
    "transposed": (lambda w, x: jnp.tanh(x) @ w.T, 1, 1),
    "cast by the model": (lambda w, x: jnp.tanh(x).astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), 1, 1),
    "reshaped": (lambda w, x: jnp.einsum("bd,hdk->bhk", jnp.tanh(x), w.reshape(4, 16, 4)), 1, 1),
    "cut": (lambda w, x: jnp.tanh(x) @ w[:, 4:12], 1, 1),
    "slice of a stack": (of_a_stack, 1, 1),
    "closed over by a loop": (in_a_loop, 1, 1),
    "in a branch": (lambda w, x: lax.cond(x[0, 0] < 9, lambda: jnp.tanh(x) @ w, lambda: x), 1, 1),
    "in a checkpoint": (jax.checkpoint(lambda w, x: jnp.tanh(x) @ w), 1, 1),
    "tied embeddings": (of_tied_embeddings, 1, 1),
    "two layers and their scores": (scores, 3, 2),
    "named for a checkpoint": (lambda w, x: jnp.tanh(x) @ checkpoint_name(w, "w"), 1, 1),
    "behind a barrier": (lambda w, x: jnp.tanh(x) @ lax.optimization_barrier(w), 1, 1),
    "activations alone": (lambda w, x: jnp.tanh(x) @ jnp.tanh(w), 1, 0),
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", OF_WEIGHTS)
@policies
@pytest.mark.filterwarnings("ignore::jmp_lite.errors.UnmatchedRuleWarning")
def test_a_recipe_is_for_products_with_a_weight(case, policy, stored, rng):
    """Unless it says otherwise; ``explain`` tells which, and why not."""
    fun, count, with_weight = OF_WEIGHTS[case]
    w, x = normal(rng, 16, 16, dtype=stored), normal(rng, 8, 16, dtype=stored)
    for recipe, expected in ((quant.FP8, with_weight), (EVERYWHERE, count)):
        records = jmp.explain(total(fun), policy, dot=recipe)(w, x)
        reasons = [record.reason for record in records if record.primitive == "dot_general"]
        assert ["replaced" in reason for reason in reasons].count(True) == expected, reasons
        assert all("replaced by" in reason or 'products="weights"' in reason for reason in reasons)
        text = stablehlo(jmp.autocast(total(fun), policy, dot=recipe), w, x)
        assert len(products_of_8_bits(text)) == expected


@pytest.mark.parametrize("products", ["weight", "", None])
def test_products_are_all_or_those_of_weights(products):
    with pytest.raises(jmp.errors.InvalidRecipeError, match="products must be 'weights' or 'all', got"):
        quant.FP8.replace(products=products)


# --- Scopes ---------------------------------------------------------------------------------------


RULES = {
    "one scope": ({"rules": jmp.Rule("body", dot=quant.FP8)}, 1),
    "all but one scope": ({"dot": quant.FP8, "rules": jmp.Rule("head", dot=lax.dot_general)}, 1),
    "one scope in full": ({"dot": quant.FP8, "rules": jmp.Rule("head", precision="full")}, 1),
    "every scope": ({"rules": jmp.Rule(dot=quant.FP8)}, 2),
    "by primitive": ({"rules": jmp.Rule(primitive="dot_general", dot=quant.FP8)}, 2),
    "none": ({"rules": jmp.Rule("tail", dot=quant.FP8)}, 0),
    "another recipe": ({"dot": quant.FP8, "rules": jmp.Rule("head", dot=quant.FP8_ROWWISE)}, 2),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("case", RULES)
@policies
def test_rules(case, policy, rng):
    settings, count = RULES[case]
    fun, params, x = MODELS["perceptron"][0](rng)
    warns = pytest.warns(jmp.errors.UnmatchedRuleWarning) if case == "none" else contextlib.nullcontext()
    _api._interpreter.cache_clear()
    with warns:
        text = stablehlo(gradients(jmp.autocast(total(fun), policy, **settings)), params, x)
    found = products(text)
    assert len(products_of_8_bits(text)) == 3 * count
    assert len(found) == 6
    if count == 1:
        wide = {pair(item) for item in found} - {pair(item) for item in products_of_8_bits(text)}
        dtype = {"mixed_bfloat16": "bf16", "mixed_float16": "f16", "full": "f32"}[policy]
        assert wide == {("f32", "f32") if "full" in case else (dtype, dtype)}


@policies
def test_regions_in_full_precision_are_left_alone(policy, rng):
    w, v, x = normal(rng, 16, 16), normal(rng, 16, 16), normal(rng, 4, 16)

    def fun(params, x):
        w, v = params
        y = x @ w
        with jmp.full_precision():
            return y @ v

    text = stablehlo(gradients(jmp.autocast(total(fun), policy, dot=quant.FP8)), (w, v), x)
    assert len(products_of_8_bits(text)) == 3
    assert {pair(item) for item in products(text)} == {(E4M3, E4M3), (E5M2, E4M3), ("f32", "f32")}


@pytest.mark.parametrize("structure", ["jit", "scan", "checkpoint", "cond"])
def test_products_inside_of_programs(structure, rng):
    w, x = normal(rng, 16, 16) / 4, normal(rng, 4, 16)

    def layer(w, x):
        return jnp.tanh(x @ w)

    funs = {
        "jit": jax.jit(layer),
        "scan": lambda w, x: lax.scan(lambda y, _: (layer(w, y), None), x, None, length=2)[0],
        "checkpoint": jax.checkpoint(layer),
        "cond": lambda w, x: lax.cond(x[0, 0] < 1e9, layer, lambda w, x: x, w, x),
    }
    loss = total(funs[structure])
    autocast = jmp.autocast(loss, "mixed_bfloat16", dot=quant.FP8)
    kinds = {pair(item) for item in products(stablehlo(gradients(autocast), w, x))}
    assert kinds == {(E4M3, E4M3), (E5M2, E4M3)}
    found, expected = (jax.jit(gradients(f))(w, x) for f in (autocast, loss))
    assert relative(length(found), length(expected)) < 0.2


def test_integers_and_float64_are_left_alone(rng):
    _api._interpreter.cache_clear()
    counts = jnp.asarray(rng.integers(-5, 6, (4, 4)), jnp.int32)
    fun = jmp.autocast(lambda x: x @ x, "mixed_bfloat16", dot=quant.FP8)
    with pytest.warns(jmp.errors.UnmatchedRuleWarning, match="no float32 array takes part"):
        found = fun(counts)
    np.testing.assert_array_equal(found, np.asarray(counts) @ np.asarray(counts))


def test_explain_shows_the_product(rng):
    fun, params, x = MODELS["perceptron"][0](rng)
    rules = [jmp.Rule("head", dot=lax.dot_general)]
    for policy, dtype in (("mixed_bfloat16", "bfloat16"), ("full", "float32")):
        records = jmp.explain(total(fun), policy, dot=quant.FP8, rules=rules)(params, x)
        found = [record for record in records if record.primitive == "dot_general"]
        assert ["head" in record.scope for record in found] == [False, True]
        assert found[1].in_dtypes == (dtype, dtype)
        assert found[1].reason == "replaced by dot_general"
        assert found[0].reason not in ("", found[1].reason)


# --- Devices --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("weights", [P(), P("data")], ids=["replicated", "FSDP"])
def test_eight_devices_agree_with_one(weights, rng):
    """Whole numbers: sums are exact, and nothing is rounded the other way."""
    w, x = (jnp.asarray(rng.integers(-60, 61, shape), jnp.float32) for shape in ((64, 32), (16, 64)))
    target = jnp.asarray(rng.integers(-60, 61, (16, 32)), jnp.float32)

    def loss(w, x, target):
        return jnp.mean((x @ w - target) ** 2)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    place = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))  # noqa: E731
    for policy in ("mixed_bfloat16", "full"):
        step = jax.jit(jax.value_and_grad(jmp.autocast(loss, policy, dot=quant.FP8), argnums=(0, 1)))
        found = step(place(w, weights), place(x, P("data")), place(target, P("data")))
        for result, expected in zip(jax.tree.leaves(found), jax.tree.leaves(step(w, x, target)), strict=True):
            assert relative(result, expected) <= 1e-6


# --- Arguments of layers --------------------------------------------------------------------------


def nnx_layer(dot):
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0), **({} if dot is None else {"dot_general": dot}))
    graph, state = nnx.split(model)
    return (lambda state, x: nnx.merge(graph, state)(x)), state


def linen_layer(cls, *args, name="dot_general", **settings):
    def make(dot):
        model = cls(*args, **settings, **({} if dot is None else {name: dot}))
        return model.apply, model.init(jax.random.key(0), jnp.zeros((2, 4, 16)))

    return make


LAYERS = {
    "Dense": linen_layer(nn.Dense, 8),
    "DenseGeneral": linen_layer(nn.DenseGeneral, (2, 4)),
    "attention, queries": linen_layer(nn.MultiHeadDotProductAttention, 2, name="qkv_dot_general"),
    "attention, output": linen_layer(nn.MultiHeadDotProductAttention, 2, name="out_dot_general"),
    "NNX Linear": nnx_layer,
    "jnp.einsum": lambda dot: (
        (lambda w, x: jnp.einsum("btd,dm->btm", x, w, **({} if dot is None else {"_dot_general": dot}))),
        normal(np.random.default_rng(0), 16, 8) / 4,
    ),
}


@pytest.mark.parametrize("name", slow_but_for(("fp8",), ["fp8", "int8_qat", "w8a16"]))
@pytest.mark.parametrize("layer", slow_but_for(("Dense",), LAYERS))
def test_layers_that_take_a_product(layer, name, rng):
    x = normal(rng, 2, 4, 16)
    ours, params = LAYERS[layer](RECIPES[name])
    plain, params_plain = LAYERS[layer](None)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, params_plain)
    found, expected = (gradients(total(fun))(params, x) for fun in (ours, plain))
    assert relative(length(found), length(expected)) < (0.2 if name == "fp8" else 0.05)
    if name != "w8a16":
        assert len(products_of_8_bits(stablehlo(ours, params, x))) == (3 if "queries" in layer else 1)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", pytest.param("full", marks=pytest.mark.slow)])
def test_convolutions_of_models(policy, rng):
    """By the recipe, and by its ``conv`` in a layer."""
    model = nn.Sequential([nn.Conv(8, (3, 3)), jnp.tanh, lambda x: x.mean((1, 2)), nn.Dense(5)])
    x = normal(rng, 4, 8, 8, 3)
    variables = model.init(jax.random.key(0), x)
    loss = total(model.apply)
    for name, bound in (("fp8", 0.25), ("int8_qat", 0.06)):
        recipe = RECIPES[name]
        autocast = jmp.autocast(loss, policy, dot=recipe)
        assert "i8" in (text := stablehlo(gradients(autocast), variables, x)) or "f8E4M3FN" in text
        found, expected = (jax.jit(gradients(fun))(variables, x) for fun in (autocast, loss))
        assert relative(length(found), length(expected)) < bound
        assert dtypes(found) == dtypes(expected)
    layer = nn.Conv(8, (3, 3), conv_general_dilated=quant.FP8.conv)
    out = layer.apply(layer.init(jax.random.key(0), x), x)
    assert relative(out, nn.Conv(8, (3, 3)).apply(layer.init(jax.random.key(0), x), x)) < 0.08


@pytest.mark.parametrize("name", ["fp8", "fp8_rowwise", "int8_train"])
def test_products_for_cuda(name, rng):
    """What a compiler for NVIDIA GPUs is given: 8 bits by 8 bits, three times."""
    recipe = RECIPES[name]
    w, x = normal(rng, 32, 16, dtype="bfloat16"), normal(rng, 8, 32, dtype="bfloat16")
    found = products(stablehlo(gradients(total(lambda w, x: recipe(x, w, MATMUL))), w, x))
    assert len(found) == 3
    kinds = {"fp8": [(E4M3, E4M3), (E5M2, E4M3)], "fp8_rowwise": [(E4M3, E4M3)] * 2, "int8_train": [("i8", "i8")] * 2}
    assert [pair(item) for item in found] == [kinds[name][0], kinds[name][1], kinds[name][1]]
    assert [item[3] for item in found] == ["DEFAULT", "HIGHEST", "HIGHEST"]
    assert functools.reduce(set.union, [{item[2]} for item in found]) <= {"f32", "bf16", "i32"}


@pytest.mark.parametrize("settings", [{}, {"accumulation_dtype": jnp.float32}], ids=["", "float32 sums"])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_function_that_is_autocast_already_takes_no_recipe(policy, settings):
    """As of a user who pastes a second ``autocast`` below the first one."""

    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w))

    twice = jmp.autocast(jmp.autocast(loss, policy, **settings), policy, dot=quant.FP8)
    with pytest.raises(jmp.errors.InvalidRuleError, match=r"autocast already\. Give dot= to the autocast of that"):
        jax.grad(twice)(jnp.full((16, 16), 0.1), jnp.ones((8, 16)))
