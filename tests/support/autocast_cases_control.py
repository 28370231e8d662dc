"""Autocast cases of control flow and of calls: loops, branches, remat, jit, vmap, shard_map, callbacks, references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

from support.autocast_cases_common import (
    EVERY,
    JIT,
    NOWHERE,
    OF_GRAD,
    VALUES,
    Case,
    apart,
    mesh,
    normal,
    well_conditioned,
)

# --- Loops ---

sequence = normal((6, 4, 16), (16, 16))


def recurrent(xs, w, **how):
    def step(h, x):
        h = jnp.tanh(x + h @ w)
        return h, h @ w

    return lax.scan(step, jnp.zeros((4, 16)), xs, **how)


def accumulated(xs, w):
    def step(carry, x):
        total, largest, count = carry
        y = x @ w
        return (total + (y * y).sum(), jnp.maximum(largest, y), count + 1), None

    return lax.scan(step, (jnp.float32(0), jnp.full((4, 16), -jnp.inf), 0), xs)[0]


def scanned_weights(x, ws):
    """Layers stacked and scanned over; the carry is the residual stream."""
    return lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, ws)[0]


def nested(xs, w):
    def step(h, x):
        h = lax.cond(x.sum() > 0, lambda h: h @ w, lambda h: h * 0.5, h)
        return lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h + x), h), jnp.sum(h, -1)

    return lax.scan(step, jnp.ones((4, 16)), xs)


def counted_loop(x, w):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x))


def measured_loop(x, w):
    """How often this runs depends on a float: it has to run in float32 as a whole."""
    done = lambda c: jnp.sum(c[0] ** 2) > 1e-3  # noqa: E731
    return lax.while_loop(done, lambda c: (0.4 * jnp.tanh(c[0] @ w), c[1] + 1), (x, 0))


def loop_bounded_by_argument(n, x, w):
    return lax.fori_loop(0, n, lambda i, h: jnp.tanh(h @ w) + i.astype(jnp.float32), x)


def signs(rng):
    """A sequence whose steps have sums far from zero: rounding does not change a branch."""
    xs, w = sequence(rng)
    return xs + np.float32(1) * np.asarray([1, -1, 1, 1, -1, 1], np.float32)[:, None, None], w


def sequence_apart(rng):
    steps = [apart(rng) for _ in range(6)]
    return jnp.stack([x[:4] for x, _ in steps]), steps[0][1]


LOOPS = {
    "scan": Case(recurrent, sequence, depth=8),
    "scan, reversed and unrolled": Case(functools.partial(recurrent, reverse=True, unroll=2), sequence, depth=8),
    "scan with accumulators": Case(accumulated, sequence_apart),
    "scan over layers": Case(scanned_weights, normal((8, 16), (4, 16, 16)), depth=8),
    "scan with branch and loop": Case(nested, signs, depth=8),
    "fori_loop": Case(lambda x, w: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w), x)),
    "fori_loop over slices": Case(
        lambda x, w: lax.fori_loop(0, 8, lambda i, s: s + jnp.tanh(x[i] @ w), jnp.zeros(16)), modes=VALUES
    ),
    "fori_loop to a traced end": Case(
        loop_bounded_by_argument, lambda rng: (jnp.int32(3), *normal((8, 16), (16, 16))(rng)), modes=VALUES
    ),
    "while, counting": Case(counted_loop, modes=VALUES),
    "while, measuring": Case(measured_loop, modes=VALUES, exact=EVERY, low=NOWHERE),
    "map": Case(lambda x, w: lax.map(lambda row: jnp.tanh(row @ w), x, batch_size=4)),
}


# --- Branches ---


def branch(index):
    def fun(x, w):
        branches = [lambda v: v @ w, lambda v: jnp.exp(v @ w), lambda v: v]
        return lax.switch(index, branches, x) @ w

    return fun


def conditional(on, x, w):
    return lax.cond(on, lambda v: (jnp.tanh(v @ w), 1), lambda v: (v, 2), x)


def product(x, w):
    return x @ w


def platforms(x, w):
    return lax.platform_dependent(x, w, cpu=product, default=product)


BRANCHES = {
    "cond": Case(conditional, lambda rng: (jnp.bool_(rng.integers(2)), *normal((8, 16), (16, 16))(rng))),
    "cond without operands": Case(lambda x, w: lax.cond(x.sum() > 1e4, lambda: x, lambda: x @ w)),
    "switch, product": Case(branch(0)),
    "switch, exponential": Case(branch(1), depth=8),
    "switch, identity": Case(branch(2)),
    "switch on an argument": Case(
        lambda i, x, w: branch(i)(x, w),
        lambda rng: (jnp.int32(rng.integers(3)), *normal((8, 16), (16, 16))(rng)),
        depth=8,
    ),
    "platform_dependent": Case(platforms),
}


# --- Rematerialization ---


def block(x, w):
    return jax.nn.gelu(x @ w) @ w


def named(x, w):
    return checkpoint_name(jax.nn.gelu(checkpoint_name(x @ w, "h")), "a") @ w


POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots without batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("h"),
    "all but names": jax.checkpoint_policies.save_anything_except_these_names("a"),
}

REMAT = {
    "remat": Case(lambda x, w: jax.checkpoint(block)(x, w) + x),
    "remat, CSE allowed": Case(jax.checkpoint(block, prevent_cse=False)),
    "remat in scan": Case(
        lambda x, ws: lax.scan(lambda h, w: (h + jax.checkpoint(block)(h, w), None), x, ws)[0],
        normal((8, 16), (3, 16, 16)),
        depth=8,
    ),
    "checkpoint_name": Case(named),
    **{f"remat saving {name}": Case(jax.checkpoint(named, policy=p)) for name, p in POLICIES.items()},
}


# --- Calls ---


@functools.partial(jax.jit, static_argnames="power", donate_argnums=0)
def inner(x, w, power=1):
    return jnp.tanh(x @ w) ** power


@functools.partial(jax.jit, inline=True)
def inlined(x, w):
    return jax.nn.silu(x @ w)


def called_twice(x, w):
    with jax.named_scope("first"):
        h = inner(x * 1, w, power=2)
    return inner(h, w) + inner(x * 1, w) + inlined(x, w)


def exported(x, w):
    shapes = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
    return jax.export.export(jax.jit(lambda x, w: jnp.tanh(x @ w)), platforms=["cpu"])(*shapes).call(x, w) @ w


CONSTANT = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32) / 4

CALLS = {
    "jit in jit": Case(jax.jit(lambda x, w: jax.jit(block)(x, w) + jax.jit(block)(x * 2, w)), depth=6),
    "jit with static and donated arguments": Case(called_twice, depth=6),
    "exported function": Case(exported, modes=VALUES),  # its code is fixed: there are no matmuls to look at
    "closed-over array": Case(lambda x, w: jnp.tanh(x @ jnp.asarray(CONSTANT)) @ w),
    "optimization_barrier": Case(lambda x, w: lax.optimization_barrier((x @ w, w))[0] @ w),
    "stop_gradient": Case(lambda x, w: lax.stop_gradient(x @ w) * (x @ w)),
    "reduce_precision": Case(lambda x, w: lax.reduce_precision(x, 8, 10) @ w),
}


# --- Batches and devices ---


def fsdp(x, w):
    """Weights sharded and gathered where they are used, gradients scattered back."""

    def shard(x, w):
        whole = lax.all_gather(w, "d", axis=0, tiled=True)
        return jnp.tanh(x @ whole) @ whole, lax.psum(jnp.sum((x @ whole) ** 2), "d")

    return jax.shard_map(shard, mesh=mesh(), in_specs=(P("d"), P("d")), out_specs=(P("d"), P()))(x, w)


def tensor_parallel(x, w):
    def shard(x, w):
        largest = lax.pmax(lax.stop_gradient(x @ w), "d").max()
        return lax.psum_scatter(x @ w, "d", scatter_dimension=0, tiled=True), largest[None]

    specs = {"in_specs": (P(None, "d"), P("d", None)), "out_specs": (P("d"), P("d")), "check_vma": False}
    return jax.shard_map(shard, mesh=mesh(), **specs)(x, w)


def replicas(x, w):
    out, total = jax.pmap(lambda x, w: (jnp.tanh(x @ w), lax.psum(x @ w, "d")), "d", in_axes=(0, None))(x[:, None], w)
    return out[:, 0], total[0]


def sharded(x, w):
    sharding = jax.sharding.NamedSharding(mesh(), P("d"))
    return lax.with_sharding_constraint(jnp.tanh(x @ w), sharding) @ w


def on_explicit_mesh(rng):
    x, w = normal((8, 16), (16, 16))(rng)
    return jax.device_put(x, P("d", None)), jax.device_put(w, P(None, None))


BATCHES = {
    "vmap": Case(lambda x, w: jax.vmap(lambda row: jnp.tanh(row @ w))(x)),
    "vmap over weights": Case(
        lambda x, w: jax.vmap(lambda m: jax.nn.gelu(x @ m), out_axes=1)(w), normal((8, 16), (3, 16, 16))
    ),
    "gradients of examples": Case(
        lambda x, w: jax.vmap(jax.grad(lambda m, row: jnp.tanh(row @ m).sum()), in_axes=(None, 0))(w, x),
        low=(JIT, OF_GRAD),  # outer products, of which the derivative outside of autocast is a matmul in float32
    ),
    "vmap with axis name": Case(
        lambda x, w: jax.vmap(lambda row: (row @ w) - lax.pmean(row @ w, "batch"), axis_name="batch")(x)
    ),
    "shard_map, weights gathered": Case(fsdp),
    "shard_map, sums scattered": Case(tensor_parallel, normal((64, 64), (64, 64))),
    "pmap": Case(replicas),
    "sharding constraint": Case(sharded),
    "explicit sharding": Case(
        lambda x, w: jnp.tanh(x @ w) @ w, on_explicit_mesh, context=lambda: jax.set_mesh(mesh(explicit=True))
    ),
}


# --- Effects and references ---


def must_be_float32(v):
    assert v.dtype == np.float32


def called_back(x, w):
    h = x @ w
    jax.debug.callback(must_be_float32, h)
    jax.debug.print("h: {h}", h=h[0, 0])
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct((8, 16), np.float32), h)


def observed(x, w):
    h = jnp.tanh(x @ w)
    jax.debug.callback(must_be_float32, h)
    jax.debug.print("h: {h}", h=h[0, 0], ordered=True)
    return h @ w


def checked(x, w):
    def fun(x, w):
        h = x @ w
        checkify.check(jnp.all(jnp.isfinite(h)), "not finite: {h}", h=h[0, 0])
        return jnp.tanh(h) @ w

    error, out = checkify.checkify(fun, errors=checkify.user_checks | checkify.float_checks)(x, w)
    return out, error.get() is None if not isinstance(x, jax.core.Tracer) else True


def with_reference(x, w):
    ref = jax.new_ref(jnp.zeros((8, 16)))

    def step(i, _):
        ref[...] += jnp.tanh(x @ w) * 0.5
        return _

    lax.fori_loop(0, 2, step, None)
    ref[0] = ref[0] * 2.0
    return jax.freeze(ref) @ w


EFFECTS = {
    "callbacks": Case(called_back, modes=VALUES),
    "debug callbacks": Case(observed),
    "checkify": Case(checked),
    "references": Case(with_reference),
}


# --- Derivatives ---


def scalar(x, w):
    return jnp.sum(jax.nn.gelu(x @ w) ** 2) / 8


# Gradients of derivatives go through two layers and a sum four times.
second = functools.partial(Case, depth=6, grad_depth=24)

DERIVATIVES = {
    "grad": second(jax.grad(scalar, argnums=(0, 1))),
    # Third derivatives of gelu change sign where its values are largest: there is no bound on what cancels in them.
    "grad of grad": Case(
        jax.grad(lambda x, w: jnp.sum(jax.grad(scalar)(x, w) ** 2), argnums=1), modes=VALUES, depth=12
    ),
    "hessian": Case(lambda x, w: jax.hessian(lambda v: jnp.tanh(v @ w).sum())(x[0]), depth=8),
    "jacobians": second(
        lambda x, w: (jax.jacfwd(lambda v: jnp.tanh(v @ w))(x[0]), jax.jacrev(lambda v: jnp.sin(v @ w))(x[1]))
    ),
    "jvp": second(lambda x, w: jax.jvp(block, (x, w), (w[:8], w))),
    "linearize": second(lambda x, w: jax.linearize(block, x, w)[1](w[:8], w)),
    "vjp": second(lambda x, w: jax.vjp(block, x, w)[1](x)),
    "linear_transpose": Case(lambda x, w: jax.linear_transpose(lambda v: v @ w, x)(x + 1)),
    "custom_linear_solve": Case(
        lambda b, a: lax.custom_linear_solve(
            lambda v: a @ v, b[0], lambda mv, v: jnp.linalg.solve(a, v), symmetric=True
        ),
        well_conditioned,
        low=NOWHERE,
    ),
    "newton": Case(
        lambda x, w: lax.custom_root(
            lambda y: y**3 - jnp.abs(x[0] @ w) - 1.0,
            jnp.ones(16),
            lambda f, y: lax.fori_loop(0, 20, lambda i, y: y - f(y) / (3 * y**2), y),
            lambda g, y: y / g(jnp.ones_like(y)),
        ),
        apart,
        low=NOWHERE,
    ),
}

CASES = LOOPS | BRANCHES | REMAT | CALLS | BATCHES | EFFECTS | DERIVATIVES
