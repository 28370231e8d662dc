"""Streams that layers add to: low from the first sum on, whatever they start as; and what is pooled from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jmp_lite as jmp

POLICY, LOW, HIGH = "mixed_bfloat16", "bfloat16", "float32"
IDS = jnp.arange(64).reshape(4, 16) % 32
TABLE, W, SCALE = jnp.ones((32, 64)), jnp.eye(64), jnp.ones(64)


def add(x, y):
    with jax.named_scope("sum"):
        return x + y


def sums(fun, *args):
    """Dtypes of the results of `add`, in the order of the program."""
    found = jmp.explain(fun, POLICY)(*args)
    return [r.out_dtypes[0] for r in found if r.primitive == "add" and r.scope.endswith("sum")]


def norm(x):
    """As libraries write it."""
    mean = jnp.mean(x, -1, keepdims=True)
    return (
        (x - mean)
        * lax.rsqrt(jnp.mean(jnp.square(x - mean), -1, keepdims=True) + 1e-6)
        * jnp.broadcast_to(SCALE, x.shape)
    )


def in_groups(x, w):
    """What normalizes groups reshapes what it has made."""
    return norm(x.reshape(4, 16, 1, 64)).reshape(x.shape)


LAYERS = {
    "norms first": lambda x, w: add(x, norm(x) @ w),
    "norms last": lambda x, w: norm(add(x, x @ w)),
    "a norm on both sides": lambda x, w: add(norm(x), norm(x) @ w),
    "in jit": jax.jit(lambda x, w: add(norm(x), norm(x) @ w)),
    "in checkpoint": jax.checkpoint(lambda x, w: add(norm(x), norm(x) @ w)),
    "norms of groups": lambda x, w: add(x, in_groups(x, w) @ w),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_stream_is_low_from_the_first_sum_on(name):
    """By hand an embedding is cast; autocast rounds it where the first layer is added to it."""
    layer = LAYERS[name]
    fun = lambda table, w: jnp.sum(jnp.tanh(layer(layer(norm(table[IDS] * 2), w), w) @ w))  # noqa: E731
    assert sums(fun, TABLE, W) == [LOW, LOW]


@pytest.mark.parametrize("name", LAYERS)
def test_a_scan_over_layers_carries_a_stream_that_is_low(name):
    def fun(table, weights):
        x, _ = lax.scan(lambda x, w: (LAYERS[name](x, w), None), table[IDS] * 2, weights)
        return jnp.sum(jnp.tanh(norm(x) @ weights[0]))

    weights = jnp.stack([W, W])
    assert set(sums(fun, TABLE, weights)) == {LOW}
    [loop] = [
        eqn for eqn in jax.make_jaxpr(jmp.autocast(fun, POLICY))(TABLE, weights).eqns if eqn.primitive.name == "scan"
    ]
    assert loop.outvars[0].aval.dtype == LOW


NOT_STREAMS = {
    "an integrator": lambda x, w: lax.scan(lambda x, _: (add(x, 0.01 * jnp.tanh(x @ w)), None), x, None, length=2)[0],
    "a computed state of a recurrence": lambda x, w: lax.scan(
        lambda h, x: (add(h * 0.9, jnp.tanh(h @ w + x @ w)), None), x[0] + 1, x
    )[0],
    "a parameter, scaled": lambda x, w: add(v := w * jnp.exp(jnp.mean(x)), -0.01 * (x[0] @ v).T @ x[0]),
    "a weight that decays": lambda x, w: add(w * 0.99, -0.01 * jnp.tanh(x[0].T @ jnp.tanh(x[0] @ w))),
    "positions around their mean": lambda x, w: add(x - jnp.mean(x, 0, keepdims=True), 0.01 * (x @ w)),
    "a sampler": lambda x, w: add(x * 0.9, 0.1 * jnp.tanh(x @ w)),
    "a state that a matmul made, of a recurrence": lambda x, w: lax.scan(
        lambda z, _: (add(z, 0.01 * jnp.tanh(z @ w)), None), x @ w, None, length=2
    )[0],
    "weights in a scan over batches": lambda x, w: lax.scan(
        lambda w, x: (add(w, -0.01 * jnp.tanh(x.T @ jnp.tanh(x @ w))), None), w * 0.5, x
    )[0],
    "a probability of either": lambda x, w: jnp.log(1 - add(jax.nn.sigmoid(x @ w), jax.nn.sigmoid(2 * (x @ w)))),
    "an argument": lambda x, w: lax.scan(lambda x, w: (add(x, norm(x) @ w), None), x, jnp.stack([w, w]))[0],
    "a moving average": lambda x, w: add(x * 0.9, 0.1 * jnp.exp(jnp.mean(x)) * x),
    "a parameter": lambda x, w: add(w, -0.01 * norm(x)[0, :1].T @ norm(x)[0, :1]),
    "what the loss takes": lambda x, w: jnp.log(add(jnp.exp(jnp.mean(x)) * x, jnp.square(x @ w))),
}


@pytest.mark.parametrize("name", NOT_STREAMS)
def test_what_is_no_stream_stays_float32(name):
    assert set(sums(NOT_STREAMS[name], jnp.ones((4, 16, 64)), W)) == {HIGH}


def test_the_last_sum_is_rounded_though_only_a_mean_takes_it():
    """As a bottleneck of a ResNet, whose two sides are a low array and one that a norm has made."""
    fun = lambda x, w: jnp.mean(jax.nn.relu(add(x @ w, norm(x @ w))))  # noqa: E731
    assert sums(fun, jnp.ones((4, 16, 64)), W) == [LOW]


def cell(gate, state, w):
    """The end of an LSTM cell, whose state is float32."""
    return jax.nn.sigmoid(gate @ w) * jnp.tanh(state * jnp.exp(jnp.mean(state, -1, keepdims=True)) + jnp.exp(state))


GATES = {
    "a matmul takes it": (lambda gate, state, w: cell(gate, state, w) @ w, LOW),
    "a loss takes it": (lambda gate, state, w: jnp.log(cell(gate, state, w)), HIGH),
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_of_a_float32_state_is_as_precise_as_what_takes_it(name):
    """A low gate has as few digits as the matmul that takes what it lets through."""
    fun, dtype = GATES[name]
    found = jmp.explain(fun, POLICY)(jnp.ones((16, 64)), jnp.ones((16, 64)), W)
    assert [r.out_dtypes[0] for r in found if r.primitive == "mul"][-1] == dtype


# --- Pooling ---


def pool(x, window=2):
    """The mean of windows, as `nn.avg_pool` takes it."""
    sizes = (1, window, window, 1)
    return lax.reduce_window(x, 0.0, lax.add, sizes, sizes, "VALID") / window**2


def test_pooling_adds_up_in_float32_and_rounds_what_it_returns():
    x, kernel = jnp.ones((1, 32, 32, 16)), jnp.ones((1, 1, 16, 16))
    conv = lambda x: lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # noqa: E731
    found = jmp.explain(lambda x: conv(pool(conv(x))), POLICY)(x)
    pooled = [(r.in_dtypes[0], r.out_dtypes[0]) for r in found if r.primitive in ("reduce_window_sum", "div")]
    assert pooled == [(HIGH, HIGH), (HIGH, LOW)]
    # 1024 ones: in bfloat16 the sum would stop at 256.
    np.testing.assert_array_equal(jmp.autocast(lambda x: conv(pool(conv(x) / 16, 32)), POLICY)(x), 16)


def test_a_pooled_sum_beyond_float16_is_divided_before_it_is_rounded():
    pooled = jmp.autocast(lambda x, w: pool((x @ w), 32) @ w, "mixed_float16")
    np.testing.assert_array_equal(pooled(jnp.full((1, 32, 32, 64), 100.0), W), 100)


def test_pooling_for_a_loss_is_float32():
    found = jmp.explain(lambda x, w: jnp.log(pool(jnp.tanh(x @ w))), POLICY)(jnp.ones((1, 32, 32, 64)), W)
    assert [r.out_dtypes[0] for r in found if r.primitive == "reduce_window_sum"] == [HIGH]


ENTERS = {
    "a sum, scaled": lambda x, w: (x + jnp.tanh(norm(x) @ w)) * 0.7,
    "a norm": lambda x, w: norm(x + jnp.tanh(norm(x) @ w)),
}


@pytest.mark.parametrize("name", ENTERS)
def test_what_enters_a_checkpoint_is_kept_in_16_bits(name):
    def fun(weights, x):
        x = x @ weights[0]
        for w in weights[1:]:
            x = jax.checkpoint(ENTERS[name])(x, w)
        return jnp.sum(x @ weights[0])

    _, pullback = jax.eval_shape(
        lambda w, x: jax.vjp(lambda w: jmp.autocast(fun, POLICY)(w, x), w), [W] * 4, jnp.ones((96, 64))
    )
    kept = [leaf.dtype for leaf in jax.tree.leaves(pullback) if leaf.shape == (96, 64)]
    assert kept.count(jnp.float32) == 0, kept
