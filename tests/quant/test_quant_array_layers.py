"""Layers of every framework take arrays held in 8 bits for the arrays that they stand for."""

import equinox as eqx
import flax.serialization
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from support.comparisons import assert_close, assert_identical, slow_but_for
from support.lowbit import normal, relative

from jmp_lite.quant._array import dequantize_tree, is_quantized, quantize_tree


def output_first(path, leaf):
    """The kernels of Equinox and torch."""
    return range(1, leaf.ndim)


def stacked(path, leaf):
    """A scale per layer and output channel."""
    return range(1, leaf.ndim - 1)


def matrices(path, leaf):
    """All floating arrays of two or more axes, embedding tables too."""
    return hasattr(leaf, "ndim") and leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


# --- In layers ------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A table that is looked up, and multiplied by."""

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(9, 4)
        return table.attend(table(ids))


class Block(nn.Module):
    """A step of a scan."""

    @nn.compact
    def __call__(self, carry, _):
        return jnp.tanh(nn.Dense(16)(carry)), None


class Scanned(nn.Module):
    """Three layers with stacked kernels."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers()(x, None)[0]


LINEN = {
    "Dense": nn.Dense(5),
    "Dense in bf16": nn.Dense(5, dtype=jnp.bfloat16),
    "DenseGeneral": nn.DenseGeneral((4, 3), axis=(-2, -1)),
    "Einsum": nn.Einsum((16, 4), "btd,dk->btk"),
    "Conv": nn.Conv(4, (3,)),
    "ConvTranspose": nn.ConvTranspose(4, (3,)),
    "attention": nn.MultiHeadDotProductAttention(4),
    "LSTM": nn.RNN(nn.OptimizedLSTMCell(8)),
    "Embed": nn.Embed(9, 4),
    "tied": Tied(),
    "scan": Scanned(),
    "remat": nn.remat(nn.Dense)(4),
}


@pytest.mark.parametrize("name", slow_but_for(("Dense", "attention"), LINEN))
def test_linen_layers_take_it(rng, key, name):
    """A layer computes with quantized kernels what it computes with the arrays that they stand for."""
    module = LINEN[name]
    x = jnp.arange(6) if name in ("Embed", "tied") else normal(rng, 2, 8, 16)
    params = quantize_tree(module.init(key, x), where=matrices, axes=stacked if name == "scan" else (lambda *a: [0]))
    assert any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))
    expected = module.apply(dequantize_tree(params), x)
    assert_identical(module.apply(params, x), expected)
    assert_close(jax.jit(module.apply)(params, x), expected, ulps=64)


NNX = {
    "Linear": lambda rngs: nnx.Linear(16, 5, rngs=rngs),
    "LinearGeneral": lambda rngs: nnx.LinearGeneral((8, 16), (4, 3), axis=(-2, -1), rngs=rngs),
    "Einsum": lambda rngs: nnx.Einsum("btd,dk->btk", (16, 4), rngs=rngs),
    "Conv": lambda rngs: nnx.Conv(16, 4, (3,), rngs=rngs),
    "ConvTranspose": lambda rngs: nnx.ConvTranspose(16, 4, (3,), rngs=rngs),
    "attention": lambda rngs: nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs),
    "LSTM": lambda rngs: nnx.RNN(nnx.OptimizedLSTMCell(16, 8, rngs=rngs)),
    "Embed": lambda rngs: nnx.Embed(9, 4, rngs=rngs),
}


@pytest.mark.parametrize("name", slow_but_for(list(NNX)[:1], NNX))
def test_nnx_layers_take_it(rng, seed, name):
    """The same for variables, through split and merge, update and nnx.jit."""
    model = NNX[name](nnx.Rngs(seed % 2**31))
    x = jnp.arange(6) if name == "Embed" else normal(rng, 2, 8, 16)
    graph, state = nnx.split(model)
    quantized = quantize_tree(state, where=matrices)
    assert any(map(is_quantized, jax.tree.leaves(quantized, is_leaf=is_quantized)))
    expected = nnx.merge(graph, dequantize_tree(quantized))(x)
    assert_identical(nnx.merge(graph, quantized)(x), expected)
    assert_close(jax.jit(lambda state, x: nnx.merge(graph, state)(x))(quantized, x), expected, ulps=64)
    nnx.update(model, quantized)
    assert_identical(model(x), expected)
    assert_close(nnx.jit(lambda model, x: model(x))(model, x), expected, ulps=64)


@pytest.mark.slow
def test_equinox_and_haiku_layers_take_it(rng, key):
    """Products go through; a convolution that hands its kernel to lax says so, and dequantize_tree is the way."""
    x, image = normal(rng, 16), normal(rng, 3, 8, 8)
    mlp = quantize_tree(eqx.nn.MLP(16, 5, 8, 2, key=key), axes=output_first)
    assert mlp.layers[0].weight.scale.shape == (8, 1)
    assert_identical(mlp(x), dequantize_tree(mlp)(x))
    conv = quantize_tree(eqx.nn.Conv2d(3, 4, 3, key=key), where=lambda path, leaf: path == "weight", axes=output_first)
    with pytest.raises(ValueError, match="__jax_array__"):
        conv(image)
    assert dequantize_tree(conv)(image).shape == (4, 6, 6)
    net = hk.without_apply_rng(hk.transform(lambda x: jnp.tanh(hk.nets.MLP([5])(x))))
    params = quantize_tree(net.init(key, x))
    assert is_quantized(params["mlp/~/linear_0"]["w"])
    assert_identical(net.apply(params, x), net.apply(dequantize_tree(params), x))


@pytest.mark.usefixtures("standard_promotion")
def test_weight_norm_needs_arrays(rng, key):
    """It looks for its own parameters by the paths of a kernel's arrays."""
    x = normal(rng, 2, 16)
    module = nn.WeightNorm(nn.Dense(4))
    params = quantize_tree(module.init(key, x))
    with pytest.raises(flax.errors.ScopeParamNotFoundError):
        module.apply(params, x)
    module.apply(dequantize_tree(params), x)


class MLP(nn.Module):
    """The model of the figures below."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.relu(nn.Dense(64)(x)))


@pytest.mark.slow
def test_figures_of_post_training_quantization(rng, key):
    """Outputs within 1 %, and 3.78 times fewer bytes of arrays; as msgpack, 3.6 times."""
    x = normal(rng, 32, 128)
    params = MLP().init(key, x)
    quantized = quantize_tree(params)
    assert relative(MLP().apply(quantized, x), MLP().apply(params, x)) < 0.01
    before, after = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (params, quantized))
    assert (before, after) == (35104, 9280)
    assert before / after > 3.78
    assert len(flax.serialization.to_bytes(params)) / len(flax.serialization.to_bytes(quantized)) > 3.6
