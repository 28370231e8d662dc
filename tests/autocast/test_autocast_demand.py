"""What consumers want of a value, and which sums are of layers: the two searches, each by itself."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jmp_lite as jmp
from jmp_lite.autocast import _demand
from jmp_lite.autocast._demand import Demands
from jmp_lite.autocast._layers import Layers

H, W = jax.ShapeDtypeStruct((16, 16), jnp.float32), jnp.eye(16)
KINDS = ("LOW", "EITHER", "HIGH", "KEPT", "PLACE", "SOLVED", "TESTED", "SUMMED")
ROW = jnp.ones((1, 16))


def wants(fun, wanted="EITHER", *, ops=None, is_low=lambda scope, primitive: True):
    """The kinds of consumers that a function has for its argument, whose results are all wanted alike."""
    jaxpr = jax.make_jaxpr(fun)(H)
    found = Demands(ops or {}, is_low).of(jaxpr, (getattr(_demand, wanted),) * len(jaxpr.out_avals), "")
    want = found.get(jaxpr.jaxpr.invars[0], 0)
    return {kind for kind in KINDS if want & getattr(_demand, kind)}


def random_like(h):
    return jax.random.normal(jax.random.key(0), h.shape)


#: A function, and who wants its argument.
CONSUMERS = {
    "returned": (lambda h: h, {"EITHER"}),
    "nobody": (lambda h: 1.0, set()),
    "a matmul": (lambda h: h @ W, {"LOW"}),
    "a matmul that asks for more": (lambda h: jnp.matmul(h, W, precision="highest"), {"SUMMED"}),
    "an exponential": (jnp.exp, {"HIGH"}),
    "a sum": (lambda h: h.sum(), {"SUMMED"}),
    "a product of many": (lambda h: h.prod(), {"SUMMED"}),
    "a step": (jnp.floor, {"PLACE"}),
    "an index": (lambda h: h.astype(jnp.int32), {"PLACE"}),
    "a solver": (lambda h: jnp.linalg.cholesky(h, symmetrize_input=False), {"SOLVED"}),
    "a transform": (jnp.fft.rfft, {"EITHER"}),
    "a comparison": (lambda h: h > 0, set()),
    "a comparison of two": (lambda h: h > h.T, set()),
    "a choice": (lambda h: jnp.where(h > 0, h, 0), {"EITHER"}),
    "an order": (lax.sort, {"EITHER"}),
    "an order of others": (lambda h: lax.sort((h, jnp.ones(h.shape)), num_keys=1), {"EITHER", "SUMMED"}),
    "an order by others": (lambda h: lax.sort((jnp.ones(h.shape), h), num_keys=1), {"EITHER"}),
    "the largest": (lambda h: lax.top_k(h, 2), {"EITHER", "SUMMED"}),
    "where the largest is": (lambda h: jnp.argmax(h, 1), {"SUMMED"}),
    "moved for a matmul": (lambda h: h.T @ W, {"LOW"}),
    "picked for a matmul": (lambda h: jnp.abs(h) @ W, {"EITHER"}),
    "a function for a matmul": (lambda h: jnp.tanh(h) @ W, {"EITHER"}),
    "shifted for a matmul": (lambda h: (h + 1) @ W, {"EITHER"}),
    "a bias for a matmul": (lambda h: (h + ROW) @ W, {"EITHER"}),
    "moved for an exponential": (lambda h: jnp.exp(h.T), {"HIGH"}),
    "picked for an exponential": (lambda h: jnp.exp(jnp.abs(h)), {"HIGH"}),
    "shifted for an exponential": (lambda h: jnp.exp(h + 1), {"HIGH"}),
    "a bias for an exponential": (lambda h: jnp.exp(h + ROW), {"HIGH"}),
    "a bias for a sum": (lambda h: (h + ROW).sum(), {"SUMMED"}),
    "a bias for both": (lambda h: (jnp.exp(g := h + ROW), g @ W), {"EITHER"}),
    "a bias for a step and a matmul": (lambda h: (jnp.floor(g := h + ROW), g @ W), {"LOW", "PLACE"}),
    "an exponential and a matmul": (lambda h: (jnp.exp(h), h @ W), {"HIGH", "LOW"}),
    "a solver behind a sum": (lambda h: jnp.linalg.qr(h * h.sum()), {"EITHER", "SOLVED", "SUMMED"}),
    "a solver behind an exponential": (lambda h: jnp.linalg.qr(jnp.exp(h)), {"SOLVED", "HIGH"}),
    "a solver behind a matmul": (lambda h: jnp.linalg.qr(h @ W), {"SOLVED", "LOW"}),
    "a solver behind an index": (lambda h: jnp.linalg.qr(h[jnp.argmax(h[0])][None]), {"SOLVED", "SUMMED"}),
    "a solver behind the largest": (lambda h: jnp.linalg.qr(lax.top_k(h, 2)[0]), {"SOLVED", "SUMMED"}),
    "a solver behind places": (
        lambda h: jnp.linalg.qr(lax.top_k(h, 2)[1].astype(jnp.float32)),
        {"SUMMED"},
    ),
    "a solver behind a barrier": (
        lambda h: jnp.linalg.qr(lax.optimization_barrier((h, h + 1))[0]),
        {"SOLVED"},
    ),
    "a matmul that reaches nothing": (lambda h: (h @ W, 1.0)[1], set()),
    "an exponential that reaches nothing": (lambda h: (jnp.exp(h), 1.0)[1], {"HIGH"}),
    "a sum that reaches nothing": (lambda h: (h.sum(), 1.0)[1], {"SUMMED"}),
    "a callback that returns nothing": (lambda h: (jax.debug.callback(lambda h: None, h @ W), 1.0)[1], {"LOW"}),
    "sums of layers": (lambda h: (h @ W + jnp.tanh(h @ W) @ W).sum(), {"LOW"}),
}
THROUGH = {
    "a call": (jax.jit(lambda h: h @ W), {"LOW"}),
    "a branch of two": (lambda h: lax.cond(True, jnp.exp, lambda h: h @ W, h), {"HIGH", "LOW"}),
    "branches that leave it": (lambda h: lax.cond(True, lambda h: 1.0, lambda h: 2.0, h), set()),
    "a call that leaves it": (lambda h: jax.jit(lambda h, x: x)(h, ROW), set()),
    "what chooses a branch": (lambda h: lax.cond(h[0, 0] > 0, lambda: 1.0, lambda: 2.0), set()),
    "a branch for a solver": (
        lambda h: jnp.linalg.qr(lax.cond(True, lambda h: h @ W, lambda h: -h, h)),
        {"SOLVED", "LOW"},
    ),
    "a scan of it": (lambda h: lax.scan(lambda c, a: (c, jnp.exp(a)), 0.0, h), {"HIGH"}),
    "a constant of a scan": (lambda h: lax.scan(lambda c, a: (c, a @ h), 0.0, ROW), {"LOW"}),
    "a carry for a matmul": (lambda h: lax.scan(lambda c, _: (c, c @ W), h, None, length=2)[1], {"LOW"}),
    "a carry that is returned": (lambda h: lax.scan(lambda c, _: (c, c @ W), h, None, length=2), {"LOW", "EITHER"}),
    "a carry for what the next carry is for": (
        lambda h: lax.scan(lambda c, _: ((jnp.abs(c[1]), c[0]), jnp.exp(c[1])), (h, h), None, length=2)[1],
        {"HIGH"},
    ),
}


def counted(step, test=lambda c: c[0] < 3):
    """A loop over a number and what a step makes of the argument."""
    return lambda h: lax.while_loop(test, lambda c: (c[0] + 1, step(c[1])), (0, h))[1]


THROUGH |= {
    "a loop that counts": (counted(lambda h: h @ W), {"LOW"}),
    "a loop that looks at it": (counted(lambda h: h @ W, lambda c: c[1][0, 0] < 3), {"LOW", "HIGH"}),
    "a loop that looks at its index": (
        counted(lambda h: h @ W, lambda c: jnp.argmax(c[1]) < 3),
        {"LOW", "SUMMED"},
    ),
}


@pytest.mark.parametrize(("fun", "expected"), (CONSUMERS | THROUGH).values(), ids=CONSUMERS | THROUGH)
def test_who_wants_a_value(fun, expected):
    assert wants(fun) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_wants_reach_through_what_is_only_moved_or_computed(kind):
    """A matmul rounds what is computed for it, and not what that is computed from."""
    computed = "EITHER" if kind == "LOW" else kind
    for fun in (lambda h: h, lambda h: h.T, jax.jit(lambda h: h.T)):
        assert wants(fun, kind) == {kind}
    for fun in (lax.tanh, lax.optimization_barrier, lambda h: h + 1):
        assert wants(fun, kind) == {computed}
    of_two = {kind, "EITHER"} if kind in {"SOLVED", "TESTED"} else {computed}
    assert wants(lambda h: h + ROW, kind) == of_two


def test_matmuls_that_run_in_float32_want_it():
    full = lambda scope, primitive: primitive != "dot_general"  # noqa: E731
    assert wants(lambda h: h @ W, is_low=full) == {"SUMMED"}
    assert wants(lambda h: h @ W, "SOLVED", is_low=full) == {"SUMMED", "SOLVED"}
    inside = lambda scope, primitive: scope != "a/b"  # noqa: E731
    with_scope = jax.named_scope("a")(jax.jit(jax.named_scope("b")(lambda h: h @ W)))
    assert wants(with_scope, is_low=inside) == {"SUMMED"}
    assert wants(with_scope) == {"LOW"}


def test_ops_of_the_user_decide():
    sine = lambda ops: wants(jnp.sin, ops={"sin": ops})  # noqa: E731
    assert sine(jmp.OpClass.ALLOW) == sine(jnp.cos) == {"LOW"}
    assert sine(jmp.OpClass.DENY) == {"HIGH"}
    assert sine(jmp.OpClass.FOLLOW) == sine(jmp.OpClass.AS_WRITTEN) == {"EITHER"}


# --- Searches ---


def looped(step, test=lambda c: c[1][0, 0] < 3):
    """A loop that looks at what its steps make."""
    return counted(step, test)


SEARCHES = {
    "a matmul that a test looks at": (looped(lambda h: h @ W), True),
    "in a call": (jax.jit(looped(lambda h: h @ W)), True),
    "a call in it": (looped(jax.jit(lambda h: h @ W)), True),
    "in a scan": (lambda h: lax.scan(lambda c, _: (looped(lambda h: h @ W)(c), None), h, None, length=2), True),
    "a matmul that no test looks at": (counted(lambda h: h @ W), False),
    "a function that a test looks at": (looped(jnp.tanh), False),
    "a matmul outside": (lambda h: looped(jnp.tanh)(h @ W) @ W, False),
    "a matmul that asks for more": (looped(lambda h: jnp.matmul(h, W, precision="highest")), False),
}


@pytest.mark.parametrize(("fun", "expected"), SEARCHES.values(), ids=SEARCHES)
def test_loops_that_search_for_what_matmuls_make(fun, expected):
    demands = Demands({}, lambda scope, primitive: True)
    assert demands.has_search(jax.make_jaxpr(fun)(H), "") is expected


def test_a_program_that_a_test_looks_at_is_a_search():
    """What is wanted of its results reaches its matmuls."""
    demands, jaxpr = Demands({}, lambda scope, primitive: True), jax.make_jaxpr(lambda h: (h @ W, jnp.exp(h)))(H)
    assert demands.has_search(jaxpr, "", (_demand.TESTED, _demand.EITHER))
    assert not demands.has_search(jaxpr, "", (_demand.EITHER, _demand.TESTED))
    assert not demands.has_search(jaxpr, "")


# --- Sums of layers ---


def norm(h):
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True))


def other(h):
    """A layer beside h @ W."""
    return jnp.tanh(h) @ W


SUMS = {
    "two layers": (lambda h: h @ W + other(h), True),
    "two functions of layers": (lambda h: jnp.tanh(h @ W) + jnp.abs(other(h)), True),
    "a layer and what follows it": (lambda h: (g := h @ W) + other(g), True),
    "a layer and a function of it": (lambda h: (g := h @ W) + jnp.tanh(g), False),
    "a layer and a sum of it": (lambda h: (g := h @ W) + g * other(h), False),
    "a layer and an argument": (lambda h: h + h @ W, False),
    "a layer and a function of an argument": (lambda h: jnp.tanh(h) + h @ W, False),
    "a layer and a number": (lambda h: h @ W + 1, False),
    "a layer and a bias": (lambda h: h @ W + ROW, False),
    "a layer and a bias, broadcast": (lambda h: h @ W + jnp.broadcast_to(ROW[0], (16, 16)), False),
    "a layer and noise": (lambda h: h @ W + random_like(h), False),
    "a layer and an exponential": (lambda h: h @ W + jnp.exp(other(h)), False),
    "a layer and a solution": (lambda h: h @ W + jnp.linalg.qr(other(h))[0], False),
    "a layer and a norm": (lambda h: h @ W + norm(other(h)), True),
    "a layer and what an exponential scales": (lambda h: h @ W + other(h) * jnp.exp(other(h)), False),
    "a layer and what one number scales": (lambda h: h @ W + other(h) * jnp.exp(other(h)).sum(), True),
    "a difference of layers": (lambda h: h @ W - other(h), None),
    "two layers behind a barrier": (lambda h: jnp.add(*lax.optimization_barrier((h @ W, other(h)))), True),
    "a layer behind a barrier, and a function of it": (
        lambda h: jnp.add(*lax.optimization_barrier((g := h @ W, jnp.tanh(g)))),
        False,
    ),
    "layers of calls": (lambda h: jax.jit(lambda h: h @ W)(h) + jax.jit(other)(h), True),
    "a layer and a call of it": (lambda h: (g := h @ W) + jax.jit(jnp.tanh)(g), False),
    "a layer and an exponential in a call": (lambda h: h @ W + jax.jit(lambda h: jnp.exp(other(h)))(h), False),
    "a layer and a branch": (lambda h: h @ W + lax.cond(True, other, jnp.tanh, h), True),
    "a layer and a branch with an exponential": (lambda h: h @ W + lax.cond(True, other, jnp.exp, h), True),
    "a layer and branches of exponentials": (lambda h: h @ W + lax.cond(True, jnp.exp, jnp.log, h), False),
    "a layer and a loop over layers": (
        lambda h: h @ W + lax.scan(lambda c, _: (c @ W, None), h, None, length=2)[0],
        True,
    ),
    "a layer and a loop that starts with an exponential": (
        lambda h: h @ W + lax.scan(lambda c, _: (c @ W, None), jnp.exp(h), None, length=2)[0],
        True,
    ),
    "a layer and a loop over exponentials": (
        lambda h: h @ W + lax.scan(lambda c, _: (jnp.exp(c), None), h, None, length=2)[0],
        False,
    ),
}


def is_sum_of_layers(fun, ops=None):
    """Whether the last equation of a function is one."""
    jaxpr = jax.make_jaxpr(fun)(H).jaxpr
    return jaxpr.eqns[-1].outvars[0] in Layers(ops or {}).sums(jaxpr)


@pytest.mark.parametrize(("fun", "expected"), SUMS.values(), ids=SUMS)
def test_which_sums_are_of_layers(fun, expected):
    assert is_sum_of_layers(fun) is bool(expected)


def test_ops_of_the_user_make_layers_or_precise_values():
    fun = lambda h: jnp.sin(h) + jnp.cos(h)  # noqa: E731
    assert not is_sum_of_layers(fun)
    assert is_sum_of_layers(fun, {"sin": jmp.OpClass.ALLOW, "cos": jnp.tanh})
    assert not is_sum_of_layers(fun, {"sin": jmp.OpClass.ALLOW, "cos": jmp.OpClass.DENY})
    assert not is_sum_of_layers(fun, {"sin": jmp.OpClass.ALLOW, "cos": jmp.OpClass.FOLLOW})
