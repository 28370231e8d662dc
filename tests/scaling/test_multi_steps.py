"""Accumulation by optax.MultiSteps, in and around loss_scaled, beside a model in NumPy, and beside one scan."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparisons import compilations, fused, slow_but_for, standard, two_calls

import jmp_lite as jmp

RATE, START, FLOOR, PERIOD = 0.5, 2.0**6, 2.0**3, 3
BAD_VALUES = [np.nan, np.inf, -np.inf]
forms = pytest.mark.parametrize("form", [fused, two_calls])


def scale():
    return jmp.DynamicLossScale(START, period=PERIOD, min_loss_scale=FLOOR)


def inside(k):
    """Every micro-step is judged by loss_scaled."""
    multi = optax.MultiSteps(optax.sgd(RATE), k).gradient_transformation()
    return jmp.loss_scaled(standard(multi), scale())


def around(k, skip=None):
    """Scaled gradients are accumulated; loss_scaled sees one mean per window."""
    multi = optax.MultiSteps(jmp.loss_scaled(optax.sgd(RATE), scale()), k, should_skip_update_fn=skip)
    return standard(multi.gradient_transformation())


@dataclasses.dataclass
class Model:
    """What the three ways do, in float64: the scaler, the accumulator with its counters, and SGD."""

    k: int
    params: np.ndarray
    scale: float = START
    since_growth: int = 0
    in_a_row: int = 0
    skipped: int = 0
    micro: int = 0
    windows: int = 0

    def __post_init__(self):
        self.sum = np.zeros_like(self.params)

    def adjust(self, finite):
        """One step of the scaler."""
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        self.since_growth = (self.since_growth + 1) % PERIOD if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, FLOOR)
        elif self.since_growth == 0:
            self.scale = self.scale * 2

    def accumulate(self, grad):
        """Adds to the running mean of the window; returns it when the window is full."""
        self.sum = self.sum + (grad - self.sum) / (self.micro + 1)
        self.micro = (self.micro + 1) % self.k
        if self.micro:
            return None
        self.windows += 1
        mean, self.sum = self.sum, self.sum * 0.0  # NaN times zero is NaN: so it stays
        return mean

    def step(self, mean):
        self.params = self.params - RATE * mean

    def inside(self, scaled):
        finite = bool(np.isfinite(scaled).all())
        if finite:
            mean = self.accumulate(scaled / self.scale)
            if mean is not None:
                self.step(mean)
        self.adjust(finite)

    def around(self, scaled):
        mean = self.accumulate(scaled)
        if mean is not None:
            finite = bool(np.isfinite(mean).all())
            if finite:
                self.step(mean / self.scale)
            self.adjust(finite)

    def around_that_skips(self, scaled):
        if np.isfinite(scaled).all():
            self.around(scaled)


WAYS = {
    "inside": (inside, Model.inside),
    "around": (around, Model.around),
    "around, skip_not_finite": (lambda k: around(k, optax.skip_not_finite), Model.around_that_skips),
}


def seen(params, state):
    """All that the model knows, read from an optimizer state."""
    metrics = jmp.metrics(state)
    counts = [metrics["notfinite_count"], metrics["total_notfinite"]]
    counts += [optax.tree.get(state, name) for name in ("mini_step", "gradient_step")]
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, jmp.DynamicLossScale))
    [dynamic] = [node for node in nodes if isinstance(node, jmp.DynamicLossScale)]
    exact = float(dynamic.loss_scale), int(dynamic.counter), *(int(x) for x in counts)
    return params, optax.tree.get(state, "acc_grads"), exact


@pytest.mark.covering(2)
@forms
@pytest.mark.parametrize(("make", "advance"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("k", slow_but_for({1, 3}, [1, 2, 3, 5]))
def test_against_the_model(k, make, advance, form, rng):
    """After each micro-step, some at random not finite, parameters, accumulator, counters and scale are the model's."""
    tx, n, largest = make(k), 3, 2**10
    params = jnp.asarray(rng.standard_normal(n), jnp.float32)
    model, state, step = Model(k, np.asarray(params, np.float64)), tx.init(params), jax.jit(form(tx))
    chance = rng.choice([0.0, 0.1, 0.5])
    with compilations() as compiled, np.errstate(invalid="ignore"):
        for _ in range(40):
            scaled = rng.integers(-largest, largest, n) * model.scale
            if rng.random() < chance:
                scaled[rng.integers(n)] = rng.choice(BAD_VALUES)
            # The running mean rounds four times per micro-step (the reciprocal too), a step twice.
            unit = 2.0**-24 * 4 * k * largest
            params, state = step(params, state, jnp.asarray(scaled, jnp.float32))
            advance(model, scaled)
            found, accumulated, exact = seen(params, state)
            expected = model.in_a_row, model.skipped, model.micro, model.windows
            assert exact == (model.scale, model.since_growth, *expected)
            np.testing.assert_allclose(accumulated, model.sum, rtol=0, atol=unit * model.scale)
            bound = (model.windows + 1) * (unit * RATE + 2.0**-23 * np.max(np.abs(model.params)))
            np.testing.assert_allclose(found, model.params, rtol=0, atol=bound)
    assert compiled.count("jit(step)") <= 1


def test_what_each_way_does_with_one_fault():
    """Inside, the window takes one more; around, it is lost with all later ones, unless the scale never hears of it."""
    grads = [1.0, np.nan, 3.0, 1.0, 3.0]
    ends = {}
    for name, (make, _) in WAYS.items():
        tx = make(2)
        params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
        for grad in grads:
            at = jmp.metrics(state)["loss_scale"]
            params, state = fused(tx)(params, state, jnp.full(1, grad) * at)
        ends[name] = float(params[0]), float(jmp.metrics(state)["loss_scale"])
    assert ends == {
        "inside": (-2 * RATE * 2, START),  # halved, and after PERIOD good ones doubled
        "around": (0.0, START / 4),
        "around, skip_not_finite": (-2 * RATE * 2, START),
    }


@pytest.mark.parametrize("make", [inside, around], ids=["inside", "around"])
@pytest.mark.parametrize("k", slow_but_for({3}, [2, 3, 8]))
def test_scan_and_multi_steps_agree(k, make, rng):
    """One scan over the microbatches gives the step that MultiSteps gives over as many calls."""

    def loss_fn(params, x, y):
        return jnp.mean((x @ params - y) ** 2)

    x, y = rng.standard_normal((8 * k, 4)).astype(np.float32), rng.standard_normal(8 * k).astype(np.float32)
    params = jnp.asarray(rng.standard_normal(4), jnp.float32)
    multi, whole = make(k), jmp.loss_scaled(optax.sgd(RATE), scale())
    state, stepped = multi.init(params), params
    one = jax.jit(lambda state, *args: jmp.scaled_value_and_grad(loss_fn, loss_scale=state)(*args))
    all_at_once = jax.jit(lambda state, *args: jmp.accumulate_gradients(loss_fn, k, loss_scale=state)(*args))
    sizes = []
    for i in range(k):
        _, grads = one(state, params, x[i::k], y[i::k])
        sizes.append(np.abs(np.asarray(grads)) / START)
        stepped, state = fused(multi)(stepped, state, grads)
    loss, grads = all_at_once(whole.init(params), params, x, y)
    scanned, _ = fused(whole)(params, whole.init(params), grads)
    # Each microbatch may round its dot products differently (8 terms of up to 5 roundings); the sum rounds k times, the
    # running mean three times per microbatch; the last subtraction once.
    magnitude = np.abs(np.asarray(x)) @ np.abs(np.asarray(params)) + np.abs(y)
    terms = np.mean(2 * np.abs(x) * magnitude[:, None], axis=0)
    bound = 2.0**-24 * (RATE * (2 * (8 + 10) + 4 * k) * np.maximum(terms, np.max(sizes, axis=0)) + 2 * np.abs(scanned))
    assert np.all(np.abs(np.asarray(scanned) - np.asarray(stepped)) <= bound)
    assert np.any(np.asarray(scanned) != np.asarray(params))
    assert np.isfinite(loss)
