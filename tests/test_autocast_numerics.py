"""How precise autocast is where 16 bits are known to fail: long sums, offsets, wide logits, angles, stopping rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import assert_identical

import jmp_lite as jmp

LIMIT = 5e-3  # about the rounding of a single number to bfloat16, 2**-8: long sums and steep functions add nothing
ULP = 2.0**-8


def low(fun):
    return jmp.autocast(fun, "mixed_bfloat16")


def relative(actual, expected):
    """The length of the error relative to the length of what is expected, over all arrays."""
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)  # noqa: E731
    return np.linalg.norm(flat(actual) - flat(expected)) / np.linalg.norm(flat(expected))


def normal(rng, *shape, scale=1.0, mean=0.0):
    return jnp.asarray(mean + scale * rng.standard_normal(shape), jnp.float32)


ORDERS = {
    "grad(autocast)": lambda loss: jax.grad(low(loss)),
    "autocast(grad)": lambda loss: low(jax.grad(loss)),
}
every_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


# --- Long sums ---


def scanned(w, xs):
    def step(carry, x):
        y = jnp.tanh(carry * 0.5 + x @ w)
        return y, y + 0.5

    return jnp.mean(lax.scan(step, jnp.zeros((4, 32)), xs)[1] ** 2)


@every_order
def test_weight_gradient_of_a_long_scan(order, rng):
    """The gradient with respect to a weight used at 1024 steps is added up in float32."""
    w, xs = normal(rng, 32, 32, scale=0.1), normal(rng, 1024, 4, 32)
    assert relative(jax.jit(order(scanned))(w, xs), jax.jit(jax.grad(scanned))(w, xs)) < LIMIT


def test_gradients_accumulated_over_micro_batches(rng):
    """A scan that adds up the gradients of 256 batches keeps the sum in float32."""

    def total(w, xs):
        loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)  # noqa: E731
        return lax.scan(lambda g, x: (g + jax.grad(loss)(w, x), None), jnp.zeros_like(w), xs)[0]

    w, xs = normal(rng, 16, 16, scale=0.25), normal(rng, 256, 4, 16)
    assert relative(jax.jit(low(total))(w, xs), jax.jit(total)(w, xs)) < 6e-3


def test_sum_of_many(rng):
    """Sums and means of products are as precise as the products."""

    def fun(x, w):
        h = x @ w
        return h.sum(), h.mean(), jnp.cumsum(h.reshape(-1))[-1]

    x, w = normal(rng, 256, 64, mean=1.0), normal(rng, 64, 64, mean=1.0)
    for actual, expected in zip(low(fun)(x, w), fun(x, w), strict=True):
        assert relative(actual, expected) < LIMIT


# --- Offsets ---


@pytest.mark.parametrize("inner", [lambda f: f, jax.jit], ids=["open", "in jit"])
def test_variance_of_data_with_a_mean(inner, rng):
    """The variance of what has a mean of 30 and a deviation of 1, written out and as jnp.var."""
    square = inner(jnp.square)

    def fun(x, w):
        h = x @ w + 30.0
        centred = h - h.mean(-1, keepdims=True)
        return square(centred).mean(-1), jnp.var(h, axis=-1)

    x, w = normal(rng, 64, 128), normal(rng, 128, 128, scale=128**-0.5)
    for actual, expected in zip(jax.jit(low(fun))(x, w), fun(x, w), strict=True):
        assert relative(actual, expected) < LIMIT


def test_variance_of_an_argument_with_a_mean(rng):
    """Data of mean 30 that comes as an argument is not rounded before its mean is taken off."""
    x = normal(rng, 64, 128, mean=30.0)
    for fun in (jnp.var, jax.nn.standardize):
        assert relative(low(fun)(x), fun(x)) < 1e-6


# --- Wide logits ---


@pytest.mark.parametrize("of", [jax.nn.softmax, jax.nn.log_softmax, jax.nn.logsumexp])
def test_softmax_of_wide_logits(of, rng):
    """Of logits with a deviation of 6 that come out of a product without loss, softmax is computed in float32."""
    logits = normal(rng, 8, 256, scale=6.0).astype(jnp.bfloat16).astype(jnp.float32)
    fun = lambda x, w: of(x @ w)  # noqa: E731
    actual, expected = jax.jit(low(fun))(logits, jnp.eye(256)), of(logits)
    assert np.max(np.abs(actual - expected) / np.abs(expected)) < LIMIT


# --- Angles ---


def test_rotary_angles_are_exact():
    """A product without contraction of positions up to 4096 with frequencies is not rounded."""

    def angles(positions):
        frequencies = 1.0 / 10000.0 ** (jnp.arange(0, 64, 2, dtype=jnp.float32) / 64)
        phase = jnp.einsum("i,j->ij", positions, frequencies)
        return phase, jnp.sin(phase), jnp.cos(phase)

    positions = jnp.arange(4096, dtype=jnp.float32)
    assert_identical(jax.jit(low(angles))(positions), jax.jit(angles)(positions))


# --- Stopping rules ---


def test_loop_with_a_float_predicate_is_exact(rng):
    """A loop that runs until a norm is small takes the same steps to the same bits, from the same product."""

    def fun(x, w):
        body = lambda c: (jnp.tanh(c[0] @ w), c[1] + 1)  # noqa: E731
        return lax.while_loop(lambda c: jnp.sum(c[0] ** 2) > 1e-3, body, (x, 0))

    x, w = normal(rng, 8, 16), normal(rng, 16, 16, scale=0.125)
    found, expected = jax.jit(low(fun))(x, w), jax.jit(fun)(x, w)
    assert int(expected[1]) > 3
    assert_identical(found, expected)


# --- Masks ---


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("least", [-1e9, -1e30, -jnp.inf])
def test_masks_survive(policy, least, rng):
    """What is masked gets no weight and no NaN, in the value and in the gradient, though float16 ends at 65504."""

    def fun(x, w):
        logits = x @ w + jnp.where(jnp.arange(16) < 8, 0.0, least)[None]
        return jax.nn.softmax(jnp.where(jnp.arange(16) < 12, logits, least))

    x, w = normal(rng, 8, 16), normal(rng, 16, 16, scale=0.25)
    weights = jmp.autocast(fun, policy)(x, w)
    assert np.all(np.asarray(weights)[:, 8:] == 0)
    assert relative(weights, fun(x, w)) < 4 * ULP
    grads = jax.grad(lambda x, w: jnp.sum(jmp.autocast(fun, policy)(x, w)[:, 0]))(x, w)
    assert np.all(np.isfinite(grads))
