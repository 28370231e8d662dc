"""Faults that only the numbers show, planted in models of Linen, NNX, Equinox and bare JAX, found by kind and place.

Those that the program shows are in ``test_audit``.
"""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.comparisons import standard

import jmp_lite as jmp
from jmp_lite.analysis import collect, compare, diagnose, first_nonfinite, lost_updates, ranges

WIDTH = 16


class Net(nn.Module):
    """Three layers, the second of which is scaled."""

    @nn.compact
    def __call__(self, x, scale=1.0):
        x = nn.relu(nn.Dense(WIDTH, name="first")(x))
        x = nn.relu(nn.Dense(WIDTH, name="second")(x * scale))
        return nn.Dense(4, name="third")(x)


@functools.cache
def parameters():
    return jax.jit(Net().init)(jax.random.key(0), jnp.zeros((32, WIDTH)))


def linen(rng):
    """A loss of Linen, parameters and data."""
    x = jnp.asarray(rng.normal(size=(32, WIDTH)).astype(np.float32))

    def loss(params, x, scale=1.0, loss_scale=1.0):
        return jnp.mean(Net().apply(params, x, scale) ** 2) * loss_scale

    return loss, parameters(), x


@functools.cache
def counting(policy):
    """One program for all scales."""
    loss = linen(np.random.default_rng(0))[0]
    return jax.jit(collect(jax.value_and_grad(jmp.autocast(loss, policy))))


def counted(policy, rng, scale=1.0, loss_scale=1.0):
    """The ranges of a step of Linen."""
    return counting(policy)(*linen(rng)[1:], np.float32(scale), np.float32(loss_scale))[1]


def places(findings, kind):
    return [finding.scope + finding.message for finding in findings if finding.kind == kind]


@pytest.mark.slow
def test_linen_gradients_that_need_a_loss_scale(rng):
    found = diagnose(counted("mixed_float16", rng, loss_scale=1e-8))
    assert any("a loss scale" in place for place in places(found, "gradient-underflow"))
    assert not places(diagnose(counted("mixed_float16", rng)), "gradient-underflow")


def test_linen_layer_that_overflows(rng):
    found = diagnose(counted("mixed_bfloat16", rng, scale=1e6), format="float16")
    assert any("second" in place for place in places(found, "overflow"))


def test_zeros_of_relu_are_no_fault(rng):
    assert diagnose(counted("mixed_bfloat16", rng), format="bfloat16") == ()


def test_equinox_layer_that_explodes(rng):
    mlp = eqx.nn.MLP(WIDTH, 4, WIDTH, 3, key=jax.random.key(0))
    mlp = eqx.tree_at(lambda m: m.layers[2].weight, mlp, mlp.layers[2].weight * 1e5)
    params, static = eqx.partition(mlp, eqx.is_array)
    x = jnp.asarray(rng.normal(size=(8, WIDTH)).astype(np.float32))

    def loss(params, x):
        return jnp.mean(jax.vmap(eqx.combine(params, static))(x) ** 2)

    assert places(diagnose(collect(loss)(params, x)[1], format="bfloat16"), "exploding")


def test_nnx_parameters_that_lose_their_updates(rng):
    model = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    params = jax.tree.map(lambda p: (p + 1).astype(jnp.bfloat16), nnx.state(model, nnx.Param))
    tx = standard(optax.sgd(1e-6))
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.bfloat16), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    lost = lost_updates(params, updates)
    assert {finding.scope.split("/")[0] for finding in lost.findings} == {"kernel", "bias"}


def test_a_masked_row_of_attention(rng):
    attention = nn.MultiHeadDotProductAttention(num_heads=2)
    x = jnp.asarray(rng.normal(size=(1, 4, WIDTH)).astype(np.float32))
    params = jax.jit(attention.init)(jax.random.key(0), x)

    def apply(params, x, bias):
        with jax.named_scope("masked"):
            scores = jnp.einsum("bqd,bkd->bqk", x, x) + bias
            return attention.apply(params, jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), x))

    bias = jnp.zeros((1, 4, 4)).at[0, 2].set(-jnp.inf)
    assert first_nonfinite(apply)(params, x, bias * 0) is not None  # of -inf * 0
    found = first_nonfinite(apply)(params, x, bias)
    assert found.site.scope.startswith("masked")
    assert "test_planted_numbers.py" in found.site.source
    assert found.made.nan == 4


def test_variance_of_data_with_a_large_mean(rng):
    x = jnp.asarray((rng.normal(size=(8, 256)) + 500).astype(np.float32))

    def by_hand(x):
        with jax.named_scope("norm"):
            x = x.astype(jnp.bfloat16)
            return jnp.mean(x * x, axis=-1) - jnp.mean(x, axis=-1) ** 2

    found = compare(lambda x: jnp.var(x, axis=-1), {"by hand": by_hand})(x)
    assert any(finding.scope == "norm" for finding in found.findings if finding.kind == "error-amplified")


@pytest.mark.slow
def test_a_gradient_that_is_lost_turns(rng):
    loss, params, x = linen(rng)

    def in_float16(params, x):
        low = jax.tree.map(lambda p: p.astype(jnp.float16), (params, x))
        return (jnp.mean(Net().apply(*low) ** 2) * jnp.float16(1e-5)).astype(jnp.float32) * 1e-5

    found = compare(functools.partial(loss, loss_scale=1e-10), {"by hand": in_float16})(params, x)
    assert {finding.kind for finding in found.findings} >= {"gradient-turned"}


def test_a_layer_of_which_nothing_comes_is_dead(rng):
    loss, params, x = linen(rng)
    layers = params["params"]
    params = {"params": {**layers, "first": {**layers["first"], "bias": jnp.full(WIDTH, -1e3)}}}
    found = diagnose(ranges(jax.jit(jax.grad(loss))(params, x), "gradient"))
    assert any("first/kernel" in place for place in places(found, "dead"))


def test_outliers_that_int8_pays_for(rng):
    w, x = (rng.normal(size=(64, 64)).astype(np.float32) for _ in range(2))
    x[:, 3] *= 1000

    def apply(w, x):
        with jax.named_scope("outliers"):
            return x @ w

    found = diagnose(collect(apply)(jnp.asarray(w), jnp.asarray(x))[1], format="int8")
    assert any("outliers" in place for place in places(found, "lost-in-int8"))
