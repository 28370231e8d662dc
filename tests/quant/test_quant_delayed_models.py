"""Delayed scaling of models: histories named after modules, and modules that keep what a call does to them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.comparisons import assert_identical, slow_but_for
from support.lowbit import amax, normal, relative

import jmp_lite as jmp
from jmp_lite import quant

RECIPE = dataclasses.replace(quant.FP8, history=4)


# --- Linen ----------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    """Two layers, whose names are those of scopes."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(16, name="body")(x)))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "full"])
def test_linen_under_autocast(policy, rng):
    model, x = Perceptron(), normal(rng, 8, 16)
    variables = model.init(jax.random.key(0), x)
    plain = lambda variables, x: jnp.mean(model.apply(variables, x) ** 2)  # noqa: E731
    delayed = quant.delayed(jmp.autocast(plain, policy, dot=RECIPE))
    histories = delayed.init(variables, x)
    assert sorted(name.split("/")[-1] for name in histories) == ["body", "head"]
    assert {name.split("/")[0] for name in histories} == {"Perceptron"}
    observed, grads = jax.jit(jax.grad(delayed, argnums=(0, 1)))(histories, variables, x)
    for name in histories:
        kernel = variables["params"][name.split("/")[-1]]["kernel"]
        assert float(observed[name][1, 0]) == pytest.approx(amax(kernel), rel=2.0**-8)
    for found, true in zip(jax.tree.leaves(grads), jax.tree.leaves(jax.grad(plain)(variables, x)), strict=True):
        assert relative(found, true) < 0.4  # two layers, and a ReLU whose sign may change


def test_linen_with_the_recipe_in_its_layers(rng):
    model, x = nn.Dense(4, dot_general=RECIPE), normal(rng, 8, 16)
    variables = model.init(jax.random.key(0), x)
    histories = quant.delayed(model.apply).init(variables, x)
    assert list(histories) == ["Dense"]
    np.testing.assert_array_equal(
        quant.delayed(model.apply)(histories, variables, x), nn.Dense(4, dot_general=quant.FP8).apply(variables, x)
    )


# --- NNX ------------------------------------------------------------------------------------------


class Model(nnx.Module):
    """Running statistics, random numbers and a counter: what a call changes."""

    def __init__(self, rngs):
        self.body, self.head = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 3, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(32, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.int32(0))

    def __call__(self, x):
        self.calls[...] += 1
        return self.head(self.dropout(nnx.relu(self.norm(self.body(x)))))

    def loss(self, x):
        return jnp.mean(self(x) ** 2)


def loss_of(model, x):
    return model.loss(x)


PRECISIONS = {
    "mixed_bfloat16": lambda fn, dot: jmp.nnx.autocast(fn, "mixed_bfloat16", dot=dot),
    "full": lambda fn, dot: jmp.nnx.autocast(fn, "full", dot=dot),
}
precisions = pytest.mark.parametrize("precision", slow_but_for(("mixed_bfloat16",), PRECISIONS))


@precisions
@pytest.mark.parametrize(
    "wrap", slow_but_for((nnx.jit,), (lambda fn: fn, nnx.jit, nnx.remat)), ids=["eager", "jit", "remat"]
)
def test_nnx_is_as_with_current_scaling(precision, wrap, rng):
    """Histories of the same arrays give the same bits: values, gradients, and what is left in the modules."""
    x, (model, plain) = normal(rng, 8, 16), (Model(nnx.Rngs(0)) for _ in range(2))
    delayed = jmp.nnx.delayed(PRECISIONS[precision](loss_of, RECIPE))
    histories = delayed.init(model, x)
    assert_identical(nnx.state(model), nnx.state(plain))
    of_delayed = wrap(nnx.value_and_grad(delayed, argnums=(0, 1)))
    current = PRECISIONS[precision](loss_of, quant.FP8)
    of_current = wrap(nnx.value_and_grad(current))
    value, (observed, grads) = of_delayed(histories, model, x)
    assert_identical((value, grads), of_current(plain, x))
    of_delayed(quant.update_histories(histories, observed), model, x), of_current(plain, x)
    assert_identical(nnx.state(model), nnx.state(plain))
    assert int(model.calls[...]) == 2
    assert bool(jnp.any(model.norm.mean[...] != 0))


def test_nnx_sees_the_largest_magnitudes(rng):
    """Histories have the paths of modules; two products that are one module have two."""
    x, model = normal(rng, 8, 16), Model(nnx.Rngs(0))
    delayed = jmp.nnx.delayed(jmp.nnx.autocast(loss_of, "full", dot=RECIPE))
    histories = delayed.init(model, x)
    assert sorted(histories) == ["body", "head"]
    observed, _ = nnx.jit(nnx.grad(delayed, argnums=(0, 1)))(histories, model, x)
    np.testing.assert_allclose(observed["body"][:2, 0], [amax(x), amax(model.body.kernel[...])], rtol=1e-6)
    np.testing.assert_allclose(observed["head"][1, 0], amax(model.head.kernel[...]), rtol=1e-6)
    np.testing.assert_array_equal(observed["body"][:2, 0], histories["body"][:2, 0])


def test_nnx_takes_methods(rng):
    """A bound method is a function of its module, whose state it changes."""
    x, (model, other) = normal(rng, 8, 16), (Model(nnx.Rngs(0)) for _ in range(2))
    method = jmp.nnx.delayed(jmp.nnx.autocast(model.loss, "full", dot=RECIPE))
    function = jmp.nnx.delayed(jmp.nnx.autocast(Model.loss, "full", dot=RECIPE))
    histories = method.init(x)
    assert_identical(histories, function.init(other, x))
    assert_identical(method(histories, x), function(histories, other, x))
    assert_identical(nnx.state(model), nnx.state(other))
    assert int(model.calls[...]) == 1


def test_nnx_trains(rng):
    """An optimizer with a loss scale takes such gradients: one trace, and the loss that current scaling comes to."""
    x, target, traces = normal(rng, 32, 16), normal(rng, 32, 3), []

    def loss(model, x):
        traces.append(x)
        return jnp.mean((model(x) - target) ** 2)

    def optimized():
        model = nnx.Linear(16, 3, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, jmp.loss_scaled(optax.sgd(0.1), jmp.NoOpLossScale()), wrt=nnx.Param)

    (model, optimizer), (other, reference) = optimized(), optimized()
    delayed = jmp.nnx.delayed(jmp.nnx.autocast(loss, "full", dot=RECIPE))
    current = jmp.nnx.autocast(loss, "full", dot=quant.FP8)
    histories = delayed.init(model, x)

    @nnx.jit
    def step(histories, model, optimizer):
        observed, grads = nnx.grad(delayed, argnums=(0, 1))(histories, model, x)
        optimizer.update(model, grads)
        return quant.update_histories(histories, observed)

    @nnx.jit
    def reference_step(model, optimizer):
        optimizer.update(model, nnx.grad(current)(model, x))

    before = len(traces)
    for _ in range(20):
        histories = step(histories, model, optimizer)
    assert len(traces) == before + 1
    for _ in range(20):
        reference_step(other, reference)
    assert loss(model, x) < 0.8 * loss(nnx.Linear(16, 3, rngs=nnx.Rngs(0)), x)
    assert relative(loss(model, x), loss(other, x)) < 0.01
