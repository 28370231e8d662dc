"""Laws of autocast that hold for every function: a table of functions, multiplied with the ways to run them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P
from support import autocast_models, jaxprs
from support.autocast_cases import CASES
from support.autocast_cases_common import EVERY, GRAD_OF, JIT, LAYER, OF_GRAD, mesh, x_and_w
from support.autocast_modes import (
    equations,
    in_modes,
    is_array,
    jitted,
    of_arrays,
    replayed,
    to,
    together,
    traces,
    unchanged,
    written,
)
from support.comparisons import assert_identical, compilations, raw, slow_but_for

import jmp_lite as jmp

LOW, FULL = "mixed_bfloat16", "float32"
PLAIN, AS_TRACED = "plain", "traced"
#: Whole models, and cases that are long and much like others; continuous integration runs them too.
SLOW = {
    *autocast_models.CASES,
    *("attention, causal", "attention, window", "attention, mask of -1e9", "attention, mask added"),
    *("conv, dilated", "group norm"),
    *("remat saving everything", "remat saving nothing", "remat saving dots", "remat saving all but names"),
    *("scan, reversed and unrolled", "scan with branch and loop", "scan with accumulators", "cumulative sums"),
    *("associative_scan, recurrent", "max and min", "cholesky and svd", "jacobians", "jvp", "log_softmax"),
    *("custom_jvp in scan", "custom_vjp in remat", "elu, softplus and sigmoid", "gelu, exact", "old-style key"),
    *("random numbers", "noise after a product", "shard_map, sums scattered", "shard_map, weights gathered"),
}
assert set(CASES) >= SLOW
#: Cases that are much like others in what is compiled; by default they are only traced.
TRACED = {
    *("bias", "silu", "logsumexp", "RMS norm", "conv, depthwise", "conv, transposed", "einsum, batched"),
    *("matrix and vector", "triangular solve", "sparse cg", "noise", "sort by key", "scatter, set", "scatter, max"),
    *("segment_sum", "windows", "integers only", "float32 beside float64", "float16 beside float32", "pass-through"),
    *("weakly typed argument", "Python scalars", "trees", "fori_loop over slices", "while, counting", "map"),
    *("cond without operands", "switch, product", "switch, identity", "remat, CSE allowed", "remat", "vmap"),
    *("remat saving dots without batch", "remat saving names", "jit in jit", "vmap with axis name"),
    *("sharding constraint", "callbacks", "grad of grad", "vjp", "custom_jvp", "custom_jvp, nondiff_argnums"),
    *("custom_jvp in vmap", "custom_vjp", "custom_vjp, nondiff_argnums", "custom_vjp of trees", "custom_vjp in vmap"),
    *("attention, mask of -inf", "variance and norm", "rotary embedding", "tied embedding", "scan", "fori_loop"),
    *("switch, exponential", "vmap over weights", "checkpoint_name", "complex product", "constants", "selection"),
    *("custom_gradient of a closure", "linear_call with constants", "dot in the highest precision"),
    *("custom_gradient", "custom_vmap", "linear_call", "static keywords", "closed-over array", "stop_gradient"),
}
assert set(CASES) >= TRACED
compiled_case = pytest.mark.parametrize("name", slow_but_for(CASES.keys() - SLOW - TRACED, CASES))
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)


@pytest.fixture
def case(name):
    """A case of the table, in what it runs in."""
    with CASES[name].context():
        yield CASES[name]


@pytest.fixture
def args(case, rng):
    return case.args(rng)


@pytest.fixture(scope="module")
def program():
    """The traced program of a case in a mode, shared by the tests of this module: tracing takes most of their time."""

    @functools.cache
    def traced_once(name, cast, mode):
        case, args = CASES[name], CASES[name].args(np.random.default_rng(0))
        return traces(in_modes(case, CASTS[cast])[mode])(*args, **case.kwargs)

    return traced_once


# --- Comparing ---


def kind(leaf):
    return (jax.typeof(leaf), getattr(leaf, "weak_type", False)) if hasattr(leaf, "dtype") else leaf


def assert_same_kind(actual, expected):
    """Asserts that structure, shapes, dtypes and weak types are those of the original program."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert kind(a) == kind(b), f"{jax.tree_util.keystr(path)}: {kind(a)} is not {kind(b)}"


def wide(leaf):
    return np.asarray(leaf).astype(np.complex128)


def assert_near(actual, expected, *, error, exact=(), whole=False, where="value"):
    """Asserts that floats are off by so much at most, relative to the largest of their array, and all else identical.

    Args:
        actual: The tree.
        expected: What it should be.
        error: The largest error.
        exact: Leaves that must be identical.
        whole: Whether the error is that of all arrays together, as a vector, relative to its length.
        where: What is compared, for the message.
    """
    assert_same_kind(actual, expected)
    differences, lengths = [], []
    for i, (a, b) in enumerate(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)):
        if i in exact or not (is_array(b) and jnp.issubdtype(b.dtype, jnp.inexact)):
            assert raw(a) == raw(b), f"{where}: leaf {i}: {a!r} is not {b!r}"
            continue
        np.testing.assert_array_equal(np.isfinite(wide(a)), np.isfinite(wide(b)))
        lengths.append(np.where(np.isfinite(b), wide(b), 0))
        differences.append(np.where(np.isfinite(b), wide(a), 0) - lengths[-1])
        if not whole:
            off = np.max(np.abs(differences[-1]), initial=0) / np.max(np.abs(lengths[-1]), initial=1e-30)
            assert off <= error, f"{where}: leaf {i} is off by {off:.4f}, {error:.4f} allowed"
    if whole and lengths:
        norm = lambda xs: np.linalg.norm(np.concatenate([np.ravel(x) for x in xs]))  # noqa: E731
        off = norm(differences) / norm(lengths)
        assert off <= error, f"{where}: off by {off:.4f}, {error:.4f} allowed"


# --- Laws ---

# A derivative of a program that was traced before adds up in another order than that of a Python function which holds
# derivatives itself; autocast traces, and so does this.
CASTS = {PLAIN: unchanged, AS_TRACED: of_arrays(functools.partial(jax.jit, inline=True)), LOW: to(LOW), FULL: to(FULL)}


def traced_modes(case):
    """The modes in which a case is a program."""
    return [mode for mode in (JIT, GRAD_OF, OF_GRAD) if mode in case.modes]


NEAR = [
    pytest.param(name, modes, marks=pytest.mark.slow if name in SLOW | TRACED or modes == [OF_GRAD] else ())
    for name, case in CASES.items()
    for modes in ([JIT, GRAD_OF], [OF_GRAD])
    if set(modes) & set(case.modes)
]


@pytest.mark.parametrize(
    ("name", "modes"), NEAR, ids=lambda value: value if isinstance(value, str) else ", ".join(value)
)
def test_values_and_gradients_are_near(name, modes, case, args, program):
    """Under jit, values and gradients are those of float32 but for roundings, with autocast in grad or around it."""
    modes = [mode for mode in modes if mode in case.modes]
    both = {cast: together({mode: replayed(program(name, cast, mode)) for mode in modes}) for cast in (LOW, PLAIN)}
    low, plain = jitted(together(both))(*args, **case.kwargs).values()
    if JIT in modes:
        assert_near(low.pop(JIT), plain[JIT], error=case.depth * LAYER, exact=case.exact)
    exact = EVERY if case.exact is EVERY else ()
    for mode, found in low.items():
        assert_near(found, plain[mode], error=case.grad_depth * LAYER, exact=exact, whole=case.whole, where=mode)


@pytest.mark.soak
@every_case
def test_eager_calls_are_near(name, case, args, rng):
    """Without jit values are near and of the same kind, and a second call compiles nothing that need not be."""
    low, more = jmp.autocast(case.fun, LOW), case.args(rng)
    found, expected = low(*args, **case.kwargs), case.fun(*args, **case.kwargs)
    assert_near(found, expected, error=case.depth * LAYER)
    with compilations() as without:
        case.fun(*more, **case.kwargs)
    with compilations() as compiled:
        low(*more, **case.kwargs)
    assert without or not compiled


@every_case
def test_shapes_are_those_of_the_function(name, case, program):
    """Under eval_shape, shapes, dtypes and weak types are those of the function, and of its gradient in both orders."""
    for mode in traced_modes(case):
        low, plain = (program(name, cast, mode).out_info for cast in (LOW, PLAIN))
        assert_same_kind(low, plain)


def without_names(text):
    """A lowered program with its functions numbered in the order in which they are met."""
    numbers = {}
    return re.sub(r"@[\w.]+", lambda found: f"@{numbers.setdefault(found[0], len(numbers))}", text)


@compiled_case
def test_float32_is_the_plain_function(name, case, args, program):
    """Autocast to float32 gives the bits of the function and of its gradient, in both orders."""
    for mode in traced_modes(case):
        full, plain = (program(name, cast, mode) for cast in (FULL, PLAIN))
        if written(full) == written(plain):  # the same program gives the same bits
            continue
        plain = program(name, AS_TRACED, mode)
        if without_names(full.lower().as_text()) != without_names(plain.lower().as_text()):
            assert_identical(*(jitted(replayed(one))(*args, **case.kwargs) for one in (full, plain)))


def products(trace):
    """The dtypes of the two operands of every matmul, also of those in loops and calls."""
    return [
        tuple(str(x.aval.dtype) for x in eqn.invars[:2]) for eqn in equations(trace) if jaxprs.is_worth_16_bits(eqn)
    ]


@every_case
def test_what_should_be_low_is_low(name, case, program):
    """No matmul of a case stays in float32, forward or backward, in either order, but for exempt modes."""
    for mode in set(traced_modes(case)) & set(case.low):
        before, after = (products(program(name, cast, mode)) for cast in (PLAIN, LOW))
        assert [pair for pair in after if "float32" in pair] == [], mode
        assert ("float32",) * 2 not in before or ("bfloat16",) * 2 in after, mode


@every_case
def test_what_should_be_float32_is_float32(name, case, program):
    """No steep function and no sum takes or returns 16 bits that it did not take or return as written."""
    for mode in set(traced_modes(case)) - {GRAD_OF}:  # there JAX takes the derivative of what autocast made
        before, after = (
            {
                (eqn.primitive.name, *sorted(jaxprs.float_dtypes(eqn)))
                for eqn in equations(program(name, cast, mode))
                if eqn.primitive.name in jaxprs.STEEP | jaxprs.SUMS
            }
            for cast in (PLAIN, LOW)
        )
        assert {kinds for kinds in after - before if "bfloat16" in kinds} == set(), mode


# --- Transformations around autocast: each makes another function of two arrays out of a function of two ---


def layers(x, w):
    return jax.nn.gelu(x @ w) @ w


def donated(fun):
    run = jax.jit(fun, donate_argnums=0)

    def call(x, w):
        mine = jnp.array(x, copy=True)
        out = run(mine, w)
        assert mine.is_deleted()
        return out

    return call


def symbolic(fun):
    """Exported once for every batch size."""

    def call(x, w):
        (batch,) = jax.export.symbolic_shape("b")
        shapes = jax.ShapeDtypeStruct((batch, 16), x.dtype), jax.ShapeDtypeStruct(w.shape, w.dtype)
        run = jax.export.export(jax.jit(fun))(*shapes)
        return run.call(x, w), run.call(x[:3], w)

    return call


def placed(fun):
    sharding = jax.sharding.NamedSharding(mesh(), P("d"))
    run = jax.jit(fun, in_shardings=(sharding, None), out_shardings=sharding)

    def call(x, w):
        out = run(x, w)
        assert out.sharding.is_equivalent_to(sharding, 2)
        return out

    return call


def on_explicit_mesh(fun):
    def call(x, w):
        with jax.set_mesh(mesh(explicit=True)):
            out = jax.jit(fun)(jax.device_put(x, P("d", None)), jax.device_put(w, P(None, None)))
            assert jax.typeof(out).sharding.spec == P("d", None)
            return np.asarray(out)

    return call


def checkified(fun):
    def call(x, w):
        error, out = jax.jit(checkify.checkify(fun, errors=checkify.float_checks))(x, w)
        assert error.get() is None
        failure, _ = jax.jit(checkify.checkify(fun, errors=checkify.float_checks))(x * np.float32(np.nan), w)
        assert failure.get() is not None
        return out

    return call


def in_shard_map(fun):
    return jax.shard_map(fun, mesh=mesh(), in_specs=(P("d"), P()), out_specs=P("d"))


def total(fun):
    return lambda x, w: jnp.sum(fun(x, w) ** 2)


CALLED_AS_THEY_ARE = {
    "donation": donated,
    "symbolic batch": symbolic,
    "placement": placed,
    "explicit mesh": on_explicit_mesh,
    "checkify": checkified,
}
AROUND = {
    "shard_map": in_shard_map,
    "pmap": lambda fun: lambda x, w: jax.pmap(fun, in_axes=(0, None))(x[:, None], w),
    "vmap": lambda fun: jax.vmap(fun, in_axes=(0, None)),
    "vmap of grad": lambda fun: jax.vmap(jax.grad(total(fun), 1), in_axes=(0, None)),
    "remat": lambda fun: jax.grad(jax.checkpoint(total(fun)), (0, 1)),
    "scan": lambda fun: lambda x, w: jax.lax.scan(lambda h, _: (jnp.tanh(fun(h, w)),) * 2, x, length=2),
    "scan, grad": lambda fun: jax.grad(
        total(lambda x, w: jax.lax.scan(lambda h, _: (fun(h, w), None), x, length=2)[0])
    ),
    "cond": lambda fun: lambda x, w: jax.lax.cond(w[0, 0] < 1e9, fun, lambda x, w: x, x, w),
    "jvp": lambda fun: lambda x, w: jax.jvp(fun, (x, w), (w[:8], w)),
    "linearize": lambda fun: lambda x, w: jax.linearize(fun, x, w)[1](w[:8], w),
    "vjp": lambda fun: lambda x, w: jax.vjp(fun, x, w)[1](x),
    "jacobian": lambda fun: lambda x, w: jax.jacfwd(lambda v: fun(v, w))(x[0]),
    "hessian": lambda fun: lambda x, w: jax.hessian(lambda v: total(fun)(v, w))(x[0]),
    "grad of grad": lambda fun: jax.grad(lambda x, w: jnp.sum(jax.grad(total(fun))(x, w) ** 2), 1),
    "autocast": to(LOW),
    "autocast to float32": to(FULL),
}


ALL_AROUND = CALLED_AS_THEY_ARE | {name: lambda fun, t=t: jax.jit(t(fun)) for name, t in AROUND.items()}


@pytest.mark.parametrize("transform", ALL_AROUND.values(), ids=ALL_AROUND)
def test_transformations_around_autocast(transform, rng):
    """What is made of autocast of a function is near what is made of the function."""
    x, w = x_and_w(rng)
    # Second derivatives take the two layers four times, first ones twice.
    assert_near(transform(jmp.autocast(layers, LOW))(x, w), transform(layers)(x, w), error=8 * LAYER)
