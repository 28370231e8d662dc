"""Quantized operands that a backward pass keeps: under every policy the numbers are those without one."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import jaxprs
from support.comparisons import slow_but_for
from support.lowbit import RECIPES, amax, normal

import jmp_lite as jmp
from jmp_lite import quant

policies = jax.checkpoint_policies
POLICIES = {
    "nothing_saveable": policies.nothing_saveable,
    "everything_saveable": policies.everything_saveable,
    "dots_saveable": policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": policies.dots_with_no_batch_dims_saveable,
    "save_only_these_names": policies.save_only_these_names("quantized"),
    "save_any_names_but_these": policies.save_any_names_but_these("none"),
    "save_anything_except_these_names": policies.save_anything_except_these_names("none"),
    "save_from_both_policies": policies.save_from_both_policies(
        policies.dots_saveable, policies.save_only_these_names("quantized")
    ),
    "casts": lambda primitive, *_, **__: primitive.name == "convert_element_type",
    "all but products": lambda primitive, *_, **__: primitive.name != "dot_general",
}
QUICK = {"everything_saveable", "save_only_these_names", "casts"}


def loss(ws, x):
    for w in ws:
        x = jnp.tanh(x @ w)
    return jnp.sum(x**2)


@pytest.fixture
def data(rng):
    return [normal(rng, 16, 16) for _ in range(3)], normal(rng, 8, 16)


def gradients(fun, data):
    return jax.tree.leaves(jax.jit(jax.grad(fun))(*data))


@functools.cache
def plain(recipe):
    """Gradients in float32 with whatever JAX keeps, compiled once per recipe."""
    return jax.jit(jax.grad(jmp.autocast(loss, "full", dot=RECIPES[recipe])))


@pytest.mark.covering(1)
@pytest.mark.parametrize("policy", slow_but_for(QUICK, POLICIES))
@pytest.mark.parametrize("recipe", slow_but_for({"fp8", "fp8_rowwise", "int8_train"}, RECIPES))
def test_no_policy_changes_a_bit(recipe, policy, data):
    """JAX rounds the floats that it saves, which makes NaN of large e4m3 numbers."""
    fun = jmp.autocast(jax.checkpoint(loss, policy=POLICIES[policy]), "full", dot=RECIPES[recipe])
    assert_alike(recipe, gradients(fun, data), jax.tree.leaves(plain(recipe)(*data)))


def assert_alike(recipe, found, expected):
    """Every bit; where an operand is a whole float32, XLA may add up the 16 terms of nine matmuls in another order."""
    tolerance = 9 * 16 * 2.0**-24 if recipe == "w4a16" else 0
    for result, plain in zip(found, expected, strict=True):
        assert np.isfinite(result).all()
        np.testing.assert_allclose(result, plain, rtol=0, atol=tolerance * amax(plain))


@pytest.mark.parametrize("recipe", slow_but_for({"fp8", "mxfp8", "int8_train", "w4a16"}, RECIPES))
def test_low_residuals_change_nothing(recipe, data):
    """To the bit in float32; XLA on CPU leaves out roundings to 16 bits that it finds in one function."""
    for policy in ("full", "mixed_bfloat16"):
        found = gradients(jmp.autocast(loss, policy, dot=RECIPES[recipe], residuals="low"), data)
        assert all(np.isfinite(result).all() for result in found)
        if policy == "full":
            assert_alike(recipe, found, jax.tree.leaves(plain(recipe)(*data)))


def test_remat_of_linen(data, key):
    """`nn.remat` with a recipe in its layers, and around a model under autocast."""

    class Block(nn.Module):
        dot: object = None

        @nn.compact
        def __call__(self, x):
            return jnp.tanh(nn.Dense(16, dot_general=self.dot)(x))

    x = data[1]
    for remat in (nn.remat, functools.partial(nn.remat, policy=policies.everything_saveable)):
        model, plain = remat(Block)(dot=quant.FP8), Block(dot=quant.FP8)
        variables = plain.init(key, x)
        found, expected = (
            gradients(lambda variables, m=m: jnp.sum(m.apply(variables, x) ** 2), (variables,)) for m in (model, plain)
        )
        for result, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(result, other)


def quantizations(fun, *args):
    """How often an operand is quantized in the program of a gradient, and the names that a policy can ask for."""
    found = [eqn for _, eqn in jaxprs._equations(jax.make_jaxpr(jax.grad(fun))(*args).jaxpr, "")]
    names = {eqn.params["name"] for eqn in found if eqn.primitive.name == "name"}
    return sum(eqn.primitive.name == "quantize_to_bits" for eqn in found), names


def test_operands_that_are_saved_are_not_quantized_again(data):
    autocast = functools.partial(jmp.autocast, policy="mixed_bfloat16", dot=quant.FP8)
    plain, names = quantizations(autocast(loss), *data)
    assert names == {"quantized"}
    kept = jax.checkpoint(loss, policy=policies.save_only_these_names("quantized"))
    assert quantizations(autocast(kept), *data)[0] == plain
    assert quantizations(autocast(jax.checkpoint(loss)), *data)[0] > plain
