"""Which axes of a weight are contracted is read in the program, and used by what holds or prunes weights."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from support.comparisons import slow_but_for
from support.lowbit import normal, relative
from support.pruning import groups_of

import jmp_lite as jmp
from jmp_lite import quant

X = jnp.ones((2, 6, 16))
IMAGE = jnp.ones((1, 8, 8, 4))
HWIO = ("NHWC", "HWIO", "NHWC")


def conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=HWIO)


def standardized(w):
    return (w - w.mean(0, keepdims=True)) / jnp.sqrt(w.var(0, keepdims=True) + 1e-6)


def ragged(w, x):
    return lax.ragged_dot(x[0], w, jnp.array([1, 2, 3]))


@jax.custom_vjp
def with_rule(w, x):
    return x @ w


with_rule.defvjp(lambda w, x: (x @ w, None), lambda *_: None)

#: A function of a weight and an input, the shape of the weight, the axes that are contracted.
FUNCTIONS = {
    "inputs first": (lambda w, x: x @ w, (16, 8), (0,)),
    "outputs first": (lambda w, x: x @ w.T, (8, 16), (1,)),
    "weight on the left": (lambda w, x: w @ x[0].T, (8, 16), (1,)),
    "cast": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), (16, 8), (0,)),
    "several outputs": (lambda w, x: jnp.einsum("bte,ehd->bthd", x, w), (16, 2, 4), (0,)),
    "several inputs": (lambda w, x: jnp.einsum("bthd,hde->bte", x.reshape(2, 6, 4, 4), w), (4, 4, 8), (0, 1)),
    "axes merged": (lambda w, x: x @ w.reshape(16, 8), (16, 2, 4), (0,)),
    "contracted axes merged": (lambda w, x: x @ w.reshape(16, 8), (2, 8, 8), (0, 1)),
    "axis split": (lambda w, x: jnp.einsum("bte,ehd->bthd", x, w.reshape(16, 2, 4)), (16, 8), (0,)),
    "pieces of axes mixed": (lambda w, x: x @ w.reshape(16, 3), (6, 8), (0, 1)),
    "cut": (lambda w, x: x @ w[:16, 2:], (20, 8), (0,)),
    "first of a stack": (lambda w, x: x @ w[0], (3, 16, 8), (1,)),
    "scaled and shifted": (lambda w, x: x @ (2 * w + 1), (16, 8), (0,)),
    "masked": (lambda w, x: x @ jnp.where(jnp.eye(16) > 0, w, 0), (16, 16), (0,)),
    "less its mean": (lambda w, x: x @ standardized(w), (16, 8), (0,)),
    "with its transpose": (lambda w, x: x @ (w + w.T), (16, 16), (0, 1)),
    "with more of its transpose": (lambda w, x: x @ (w + (w + w.T)), (16, 16), (0, 1)),
    "doubled while flat": (lambda w, x: x @ (w.reshape(-1) + w.reshape(-1)).reshape(16, 8), (16, 8), (0,)),
    "twice, otherwise": (lambda w, x: jnp.tanh(x @ w) @ w.T, (16, 8), (0, 1)),
    "convolution": (lambda w, x: conv(IMAGE * x[0, 0, 0], w), (3, 3, 4, 8), (0, 1, 2)),
    "standardized convolution": (
        lambda w, x: conv(IMAGE * x[0, 0, 0], w - w.mean((0, 1), keepdims=True)),
        (3, 3, 4, 8),
        (0, 1, 2),
    ),
    "experts": (lambda w, x: jnp.einsum("ecd,edf->ecf", x, w), (2, 16, 8), (1,)),
    "experts of ragged groups": (ragged, (3, 16, 8), (1,)),
    "scan over a stack": (lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], (3, 16, 16), (1,)),
    "scan with a constant": (lambda w, x: lax.scan(lambda x, _: (x @ w, None), x, None, 2)[0], (16, 16), (0,)),
    "loop over a stack": (lambda w, x: lax.fori_loop(0, 3, lambda i, x: x @ w[i], x), (3, 16, 16), (1,)),
    "branch": (lambda w, x: lax.cond(x[0, 0, 0] > 0, lambda: x @ w.T, lambda: x), (16, 16), (1,)),
    "jit": (jax.jit(lambda w, x: x @ w), (16, 8), (0,)),
    "checkpoint": (jax.checkpoint(lambda w, x: x @ w), (16, 8), (0,)),
    "its own rule": (with_rule, (16, 8), (0,)),
    "vmap": (lambda w, x: jax.vmap(lambda x: x @ w)(x), (16, 8), (0,)),
    "gradient": (lambda w, x: jax.grad(lambda x: jnp.sum(jnp.sin(x @ w)))(x), (16, 8), (0, 1)),
    "looked up": (lambda w, x: w[jnp.int32(x[..., 0])] @ jnp.ones((16, 2)), (9, 16), None),
    "looked up and multiplied": (lambda w, x: x @ (w[:1] + w).T, (9, 16), (1,)),
    "added to activations": (lambda w, x: (x + w) @ jnp.ones((16, 2)), (1, 6, 16), None),
    "in no product": (lambda w, x: x * w, (1, 1, 16), None),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_axes_of_a_weight(case):
    fun, shape, expected = FUNCTIONS[case]
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    assert quant.contracted_axes(lambda params, x: fun(params["w"], x))(params, X) == {"w": expected}


def test_adapters_of_low_rank():
    params = {"w": jnp.ones((16, 8)), "a": jnp.ones((16, 2)), "b": jnp.ones((2, 8))}
    found = quant.contracted_axes(lambda p, x: x @ (p["w"] + p["a"] @ p["b"]))(params, X)
    assert found == {"w": (0,), "a": (1,), "b": (0,)}


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return layer(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(16)(nn.relu(x)), None


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        table = nn.Embed(32, 16, name="table")
        return table.attend(table(jnp.int32(x[..., 0])))


def of_linen(model):
    return lambda x: (model.apply, model.init(jax.random.key(0), x))


def of_nnx(x):
    graphdef, state = nnx.split(nnx.Linear(16, 8, rngs=nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graphdef, state)(x), state


def of_equinox(x):
    return lambda model, x: jax.vmap(jax.vmap(model))(x), eqx.nn.MLP(16, 8, 32, 1, key=jax.random.key(0))


def haiku_mlp(x):
    return hk.nets.MLP([8, 4])(x)


def of_haiku(x):
    model = hk.without_apply_rng(hk.transform(haiku_mlp))
    return model.apply, model.init(jax.random.key(0), x)


#: Models, and the axes of the leaves whose paths end so.
MODELS = {
    "attention": (of_linen(nn.MultiHeadAttention(4)), {"query/kernel": (0,), "out/kernel": (0, 1), "query/bias": None}),
    "DenseGeneral": (of_linen(nn.DenseGeneral((2, 8), axis=(-2, -1))), {"kernel": (0, 1)}),
    "stacked layers": (of_linen(Scanned()), {"Dense_0/kernel": (1,), "Dense_0/bias": None}),
    "tied embeddings": (of_linen(Tied()), {"embedding": (1,)}),
    "NNX": (of_nnx, {"kernel": (0,), "bias": None}),
    "Equinox": (of_equinox, {"layers/0/weight": (1,), "layers/1/weight": (1,), "layers/0/bias": None}),
    "Haiku": (of_haiku, {"linear_0/w": (0,), "linear_1/w": (0,), "linear_1/b": None}),
}


def by_path(tree, **settings):
    paths = jax.tree_util.tree_leaves_with_path(tree, **settings)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def is_axes(node):
    return node is None or (isinstance(node, tuple) and all(isinstance(axis, int) for axis in node))


@pytest.mark.parametrize("model", MODELS)
def test_axes_of_models(model):
    make, expected = MODELS[model]
    fun, params = make(X)
    axes = by_path(quant.contracted_axes(fun)(params, X), is_leaf=is_axes)
    for end, own in expected.items():
        [found] = [axes for path, axes in axes.items() if path.removesuffix("/value").endswith(end)]
        assert found == own, end


# --- What uses them -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", slow_but_for(("attention", "tied embeddings", "NNX", "Equinox"), MODELS))
def test_frozen_models_are_small_and_near(model, rng, tmp_path):
    """Every framework, with scales per output channel, and without a word about axes."""
    make, _ = MODELS[model]
    x = normal(rng, *X.shape)
    fun, params = make(x)
    arrays, rest = eqx.partition(params, eqx.is_array) if model == "Equinox" else (params, None)
    apply = (lambda arrays, x: fun(eqx.combine(arrays, rest), x)) if model == "Equinox" else fun
    freeze = functools.partial(jmp.export.freeze, apply, arrays, x, path=tmp_path / "m", recipe="w8a16")
    if model == "tied embeddings":  # tables are left alone, and then nothing is left
        with pytest.raises(jmp.errors.InvalidRecipeError, match="embedding is quantized"):
            freeze()
        return
    freeze()
    served = jmp.export.load(tmp_path / "m")
    assert relative(served(x), apply(arrays, x)) < 0.02


def test_scales_follow_the_axes(rng):
    """An output channel of any layout has its own scale: a large one takes nothing from the others."""
    for case in ("outputs first", "several outputs", "several inputs", "experts", "scan over a stack"):
        fun, shape, axes = FUNCTIONS[case]
        size = [1 if axis in axes else n for axis, n in enumerate(shape)]
        w = np.float32(rng.standard_normal(shape) * 10.0 ** rng.integers(-2, 3, size))
        params = {"w": jnp.asarray(w)}
        contracted = quant.contracted_axes(lambda p, x, f=fun: f(p["w"], x))(params, X)
        held = jax.jit(functools.partial(quant.quantize_tree, axes=contracted))(params)
        assert held["w"].scale.shape == tuple(size)
        error = np.abs(held["w"].dequantize() - w) / np.max(np.abs(w), axes, keepdims=True)
        assert np.max(error) <= 0.5 / 127 * (1 + 1e-5)


def test_without_axes_experts_and_stacked_layers_have_their_own_scales(rng):
    w = normal(rng, 4, 16, 8) * jnp.array([0.01, 0.1, 1, 10]).reshape(4, 1, 1)
    held = quant.quantize_tree({"experts": w})["experts"]
    assert held.scale.shape == (4, 1, 8)
    for found, expected in zip(held.dequantize(), w, strict=True):
        assert relative(found, expected) < 0.011


def test_axes_of_another_tree_are_refused():
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    with pytest.raises(jmp.errors.InvalidRecipeError, match="axes is a tree of another structure"):
        quant.quantize_tree(params, axes={"a": (0,)})
    held = quant.quantize_tree(params, axes={"a": (0,), "b": None})
    assert held["b"] is params["b"]


@pytest.mark.parametrize("model", slow_but_for(["attention"], ["attention", "NNX", "Equinox"]))
def test_weights_are_pruned_along_what_is_contracted(model, rng):
    make, expected = MODELS[model]
    fun, params = make(normal(rng, *X.shape))
    axes = quant.contracted_axes(fun)(params, X)
    arrays = eqx.filter(params, eqx.is_array)
    kernels = lambda path, leaf: "kernel" in path or "weight" in path  # noqa: E731
    tx = jmp.optim.prune(nm=(2, 4), axes=axes, where=kernels)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, arrays), tx.init(arrays), arrays)
    pruned = by_path(jmp.optim.sparsity(optax.apply_updates(arrays, updates)))
    found = by_path(optax.apply_updates(arrays, updates))
    for end, own in expected.items():
        [path] = [path for path in found if path.removesuffix("/value").endswith(end)]
        if own is not None:
            assert (groups_of(np.asarray(found[path] != 0), own[-1], 4).sum(1) == 2).all()
            assert pruned[path] == 0.5
