"""Functions with rules of their own: each rule is the user's, in the dtypes it was written for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero, linear_call
from support import jaxprs

import jmp_lite as jmp

LOW = "mixed_bfloat16"
BF16, F32 = "bfloat16", "float32"
X, W = jnp.full((4, 16), 0.5), jnp.eye(16)


def low(fun):
    return jmp.autocast(fun, LOW)


# --- Batching ---


def batched(seen):
    """A matmul whose rule for many examples, three times the matmul, tells itself apart."""

    @custom_vmap
    def product(x, w):
        return x @ w

    @product.def_vmap
    def rule(size, are_batched, x, w):
        seen.append((size, tuple(are_batched), x.shape, w.shape, str(x.dtype), str(w.dtype)))
        return 3 * (x @ w), True

    return product


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_a_batching_rule_is_that_of_the_user(axes):
    """It finds the dtypes it was written for, and what is batched, and returns what a matmul returned."""
    seen = []
    product = batched(seen)
    x, w = (a if axis is None else jnp.stack([a, a]) for a, axis in zip((X, W), axes, strict=True))
    run = jax.vmap(low(lambda x, w: product(jnp.tanh(x @ w), w) @ w), axes)
    found = run(x, w)
    assert seen == [(2, (True, axes[1] == 0), (2, 4, 16), w.shape, F32, F32)]
    np.testing.assert_allclose(found[0], 3 * jnp.tanh(X), rtol=2**-7)
    assert found.dtype == jnp.float32
    dtypes = [{v.aval.dtype.name for v in eqn.invars} for eqn in jaxprs.equations("dot_general", run, x, w)]
    assert dtypes == [{BF16}] * 3


# --- Forward mode ---


def differentiated(seen):
    """A function of two arrays and an integer, whose rule is three times its derivative."""

    @jax.custom_jvp
    def product(x, w, n):
        return x @ w * n, w

    @product.defjvp
    def rule(primals, tangents):
        seen.append([str(jnp.result_type(x)) for x in primals])
        x, w, n = primals
        return product(*primals), (3 * (tangents[0] @ w + x @ tangents[1]) * n, tangents[1])

    return product


ARGUMENTS = {"x": 0, "w": 1, "both": (0, 1)}


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_a_derivative_is_that_of_the_user(arguments):
    """What is not differentiated stays a constant, so that there is no more to multiply than without autocast."""
    seen = []
    product, places = differentiated(seen), ARGUMENTS[arguments]
    fun = lambda x, w: jnp.sum(product(x @ w, w, 2)[0])  # noqa: E731
    grad, plain = jax.grad(low(fun), places), jax.grad(fun, places)
    found, expected = grad(X, W), plain(X, W)
    assert set(map(tuple, seen)) == {(F32, F32, "int32")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-6), found, expected)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, expected)
    count = [len(jaxprs.equations("dot_general", fun, X, W)) for fun in (grad, plain)]
    assert count[0] == count[1]


def test_results_and_tangents_of_a_derivative_are_held_alike():
    """In the dtypes that the function returns under autocast: in 16 bits what feeds a matmul."""
    product = differentiated([])
    fun = low(lambda x, w: product(x, w, 2)[0] @ w)
    text = str(jax.make_jaxpr(lambda x, w: jax.jvp(fun, (x, w), (x, w)))(X, W))
    assert "bf16[4,16]" in text
    assert {v.aval.dtype.name for eqn in jaxprs.equations("dot_general", fun, X, W) for v in eqn.invars} == {BF16}


# --- Reverse mode ---


def pulled_back(seen):
    """A function whose rule writes down what is differentiated, and which cotangents there are."""

    @jax.custom_vjp
    def product(x, w):
        return x @ w, w + 1

    def forward(x, w):
        seen.append((x.perturbed, w.perturbed))
        return product(x.value, w.value), (x.value, w.value)

    def backward(kept, cotangents):
        x, w = kept
        seen.append(tuple(not isinstance(g, SymbolicZero) for g in cotangents))
        seen.append(tuple(str(a.dtype) for a in (x, w, *cotangents)))
        zeros = [jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g for g in cotangents]
        return 3 * (zeros[0] @ w.T), 3 * (x.T @ zeros[0]) + zeros[1]

    product.defvjp(forward, backward, symbolic_zeros=True)
    return product


TAKEN = {
    "the first result": (lambda y, v: jnp.sum(y), (True, False)),
    "the second result": (lambda y, v: jnp.sum(v), (False, True)),
    "both": (lambda y, v: jnp.sum(y) + jnp.sum(v), (True, True)),
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("taken", TAKEN)
def test_a_backward_rule_is_that_of_the_user(taken, arguments):
    """It sees which arguments are differentiated, and which results are taken."""
    seen, plainly = [], []
    of, there = TAKEN[taken]
    places = ARGUMENTS[arguments]

    def loss(seen):
        product = pulled_back(seen)
        return lambda x, w: of(*product(x, w))

    found = jax.grad(low(loss(seen)), places)(X, W)
    expected = jax.grad(loss(plainly), places)(X, W)
    perturbed = (arguments != "w", arguments != "x")
    assert (perturbed, there, (F32,) * 4) == tuple(plainly)
    assert plainly == seen
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-6), found, expected)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, expected)


def test_what_no_result_depends_on_has_no_gradient():
    seen = []
    product = pulled_back(seen)
    grad = jax.grad(low(lambda x, w: jnp.sum(x) + jax.lax.stop_gradient(jnp.sum(product(x, w)[0]))), (0, 1))
    found = grad(X, W)
    assert jnp.array_equal(found[0], jnp.ones_like(X))
    assert jnp.array_equal(found[1], jnp.zeros_like(W))


def test_residuals_of_a_rule_are_held_in_16_bits():
    """They pass from the forward to the backward pass as the forward pass held them."""
    square = jax.custom_vjp(lambda y: y * y)
    square.defvjp(lambda y: (y * y, jnp.tanh(y)), lambda kept, g: (g * kept,))
    fun = low(lambda x, w: jnp.sum(square(x @ w) @ w))
    kept = [leaf for leaf in jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(fun, x, W)[1], X)) if leaf.ndim]
    assert (4, 16) in {leaf.shape for leaf in kept if leaf.dtype == jnp.bfloat16}
    assert (4, 16) not in {leaf.shape for leaf in kept if leaf.dtype == jnp.float32}


# --- Linear functions ---


@pytest.mark.parametrize("closes_over", [False, True])
def test_a_transpose_is_that_of_the_user(closes_over):
    """Three times the transpose, with respect to what the function is linear in, behind what it is not."""
    shift = jnp.full((4, 16), 2.0)

    def fun(x, w):
        factor = shift if closes_over else 1
        result = linear_call(
            lambda fixed, x: (x[0] @ fixed[0] * factor, x[1]),
            lambda fixed, g: [3 * ((g[0] * factor) @ fixed[0].T), g[1]],
            (w, w),
            [x, 2 * x],
        )
        return jnp.sum(result[0] @ w) + jnp.sum(result[1])

    found, expected = jax.grad(low(fun))(X, W), jax.grad(fun)(X, W)
    np.testing.assert_allclose(found, expected, rtol=2**-6)
    assert jax.typeof(found) == jax.typeof(expected)
    assert float(expected[0, 0]) == (8 if closes_over else 5)


# --- Tracers ---


def test_rules_keep_no_tracers():
    """They outlive the call: JAX may apply them later, or never."""
    jvp, vjp = differentiated([]), pulled_back([])

    def loss(x, w):
        return jnp.sum(jvp(x @ w, w, 2)[0] @ vjp(x @ w, w)[1])

    with jax.checking_leaks():
        jax.make_jaxpr(jax.grad(low(loss)))(X, W)
