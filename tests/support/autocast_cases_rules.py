"""Autocast cases of functions that bring their own rules: for derivatives, for batches, for lowering."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from support.autocast_cases_common import OF_GRAD, VALUES, Case, normal

# --- custom_jvp ---


@jax.custom_jvp
def tanh_of_product(x, w):
    return jnp.tanh(x @ w)


@tanh_of_product.defjvp
def _(primals, tangents):
    x, w = primals
    out = jnp.tanh(x @ w)
    return out, (1 - out**2) * (tangents[0] @ w + x @ tangents[1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 2))
def applied(function, x, power):
    return function(x) ** power


@applied.defjvp
def _(function, power, primals, tangents):
    return function(primals[0]) ** power, power * function(primals[0]) ** (power - 1) * tangents[0]


@jax.custom_jvp
def product_of_floats(x, w, n):
    return x @ w * n.astype(x.dtype)


def _product_jvp(primals, tangents):
    x, w, n = primals
    dx, dw = (None if type(t) is jax.custom_derivatives.SymbolicZero else t for t in tangents[:2])
    terms = [dx @ w] * (dx is not None) + [x @ dw] * (dw is not None)
    return product_of_floats(x, w, n), sum(terms, jnp.zeros_like(x)) * n.astype(x.dtype)


product_of_floats.defjvp(_product_jvp, symbolic_zeros=True)

# --- custom_vjp ---


@jax.custom_vjp
def sine_of_product(x, w):
    return jnp.sin(x @ w)


def _sine_fwd(x, w):
    return jnp.sin(x @ w), (x, w, x @ w)


def _sine_bwd(saved, g):
    x, w, h = saved
    g = g * jnp.cos(h)
    return g @ w.T, x.T @ g


sine_of_product.defvjp(_sine_fwd, _sine_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def clipped(x, limit, kind):
    return x


clipped.defvjp(lambda x, limit, kind: (x, None), lambda limit, kind, _, g: (jnp.clip(g, -limit, limit),))


@jax.custom_vjp
def repeated(x, n):
    return x * n.astype(x.dtype)


repeated.defvjp(lambda x, n: (repeated(x, n), n), lambda n, g: (g * n.astype(g.dtype), None))


@jax.custom_vjp
def strict(x, w):
    assert (x.dtype, w.dtype) == (jnp.float32, jnp.float32)
    return x @ w


def _strict_fwd(x, w):
    assert (x.value.dtype, w.value.dtype) == (jnp.float32, jnp.float32)
    return x.value @ w.value, (x.value, w.value, x.perturbed, w.perturbed)


def _strict_bwd(saved, g):
    x, w, *_ = saved
    if type(g) is jax.custom_derivatives.SymbolicZero:
        return jnp.zeros_like(x), jnp.zeros_like(w)
    assert (x.dtype, w.dtype, g.dtype) == (jnp.float32,) * 3
    return g @ w.T, x.T @ g


strict.defvjp(_strict_fwd, _strict_bwd, symbolic_zeros=True)


@jax.custom_gradient
def doubled(x):
    out = jnp.tanh(x)
    return out, lambda g: 2 * g * (1 - out**2)


@jax.custom_vjp
def tree_rule(tree):
    return {"h": jnp.tanh(tree["x"] @ tree["w"]), "n": tree["n"] + 1}


def _tree_fwd(tree):
    out = tree_rule(tree)
    return out, (tree, out["h"])


def _tree_bwd(saved, g):
    tree, h = saved
    g = g["h"] * (1 - h**2)
    return ({"x": g @ tree["w"].T, "w": tree["x"].T @ g, "n": None},)


tree_rule.defvjp(_tree_fwd, _tree_bwd)


def closed_over(x, w):
    """A rule that refers to a traced value which is not among its arguments: JAX traces it once, and not under jit."""
    scale = lax.stop_gradient(jnp.mean(jnp.abs(x @ w)))

    @jax.custom_vjp
    def scaled(v):
        return v * scale

    scaled.defvjp(lambda v: (scaled(v), None), lambda _, g: (g * scale,))
    return scaled(x @ w) @ w


def with_gradient_of_closure(x, w):
    weights = lax.stop_gradient(w)

    @jax.custom_gradient
    def fun(v):
        return jnp.sin(v @ weights), lambda g: (g * jnp.cos(v @ weights)) @ weights.T

    return fun(x) @ w


DERIVATIVES = {
    "custom_jvp": Case(lambda x, w: tanh_of_product(x, w) @ w),
    "custom_jvp, nondiff_argnums": Case(lambda x, w: applied(jnp.sin, x @ w, 3) @ w, depth=6),
    "custom_jvp, symbolic zeros and integers": Case(lambda x, w: product_of_floats(x, w, jnp.int32(2)) @ w),
    "custom_jvp in scan": Case(
        lambda x, w: lax.scan(lambda h, _: (tanh_of_product(h, w), jnp.sum(h * h)), x, length=3), depth=6
    ),
    "custom_jvp in vmap": Case(lambda x, w: jax.vmap(lambda row: tanh_of_product(row[None], w)[0])(x)),
    "custom_vjp": Case(lambda x, w: sine_of_product(x, w) @ w),
    "custom_vjp, nondiff_argnums": Case(lambda x, w: jnp.tanh(clipped(x @ w, 0.1, "clip")) @ w),
    "custom_vjp, integer argument": Case(lambda x, w: repeated(x @ w, jnp.int32(3)) @ w),
    "custom_vjp that insists on float32": Case(lambda x, w: jnp.tanh(strict(strict(x, w), w))),
    "custom_vjp of trees": Case(lambda x, w: tree_rule({"x": x @ w, "w": w, "n": jnp.int32(1)}), exact=(1,)),
    "custom_vjp, closed-over tracer": Case(closed_over, modes=(*VALUES, OF_GRAD)),
    "custom_vjp in scan": Case(
        lambda x, ws: lax.scan(lambda h, w: (sine_of_product(h, w), None), x, ws)[0],
        normal((8, 16), (3, 16, 16)),
        depth=6,
    ),
    "custom_vjp in remat": Case(lambda x, w: jax.checkpoint(sine_of_product)(x, w) @ w),
    "custom_vjp in vmap": Case(lambda x, w: jax.vmap(lambda row: sine_of_product(row[None], w)[0])(x)),
    "custom_gradient": Case(lambda x, w: doubled(x @ w) @ w),
    "custom_gradient of a closure": Case(with_gradient_of_closure, modes=(*VALUES, OF_GRAD)),
}

# --- Batching, composition, linearity ---


@jax.custom_batching.custom_vmap
def per_row(row, w):
    return jnp.tanh(row @ w)


@per_row.def_vmap
def _(size, batched, rows, w):
    return (jnp.tanh(rows @ w) if not batched[1] else jnp.tanh(jnp.einsum("bi,bij->bj", rows, w))), True


@functools.partial(lax.composite, name="tests.silu_of_product", version=1)
def composite(x, w, scale=1.0):
    h = x @ w
    return h * jax.nn.sigmoid(h) * scale


def linear(x, w):
    forward = lambda w, v: v @ w  # noqa: E731
    return jnp.tanh(jax.custom_derivatives.linear_call(forward, lambda w, g: g @ w.T, lax.stop_gradient(w), x @ w))


CONSTANTS = jnp.linspace(0.5, 2, 16)


def linear_with_constants(x, w):
    """What both functions close over becomes operands too, ahead of those that were given."""
    scale = lambda r, h: h * r * CONSTANTS[None]  # noqa: E731
    return jnp.tanh(jax.custom_derivatives.linear_call(scale, scale, lax.stop_gradient(w[:1] ** 2), x @ w)) @ w


def doubling(x_ref, out_ref):
    out_ref[...] = x_ref[...] * 2.0


def kernel(x, w):
    from jax.experimental import pallas

    shape = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    return pallas.pallas_call(doubling, out_shape=shape, interpret=True)(x @ w) @ w


BATCHING = {
    # JAX has no reverse mode for these.
    "custom_vmap": Case(lambda x, w: per_row(x[0] @ w, w), modes=VALUES),
    "custom_vmap in vmap": Case(lambda x, w: jax.vmap(per_row, in_axes=(0, None))(x @ w, w), modes=VALUES),
    "composite": Case(lambda x, w: composite(x, w, scale=2.0) @ w, modes=VALUES),
    "pallas_call": Case(kernel, modes=VALUES),
    "linear_call": Case(linear),
    "linear_call with constants": Case(linear_with_constants),
}

CASES = DERIVATIVES | BATCHING
