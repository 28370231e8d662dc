"""In which dtype an equation runs, rule by rule: each row looks at one primitive between matmuls."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support import jaxprs

import jmp_lite as jmp

BF16, F16, F32 = "bfloat16", "float16", "float32"
LOW, WIDE, HIGH, WIDENED = (BF16, BF16), (F32, BF16), (F32, F32), (BF16, F32)
OFTEN, SOME = jnp.arange(4096) // 64, jnp.int32(3)
X, W = jax.ShapeDtypeStruct((64, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)


def decisions(fun, primitive, policy="mixed_bfloat16"):
    """The dtypes that each equation of a primitive takes its floating operands in, and holds its results in."""
    records = [r for r in jmp.explain(fun, policy)(X, W) if r.primitive == primitive]
    floats = [[{d for d in dtypes if "float" in d} for dtypes in (r.in_dtypes, r.out_dtypes)] for r in records]
    return [tuple("/".join(sorted(kinds)) for kinds in pair) for pair in floats]


def beside_a_product(fun):
    """A function of a matmul that another matmul takes too, so that it leaves in 16 bits."""
    return lambda x, w: (fun(h := x @ w, w), h @ w)


def rms_norm(h):
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)


def outer_products(choices, scores):
    """Adds up two outer products per row, as mixtures of experts do to combine what they return."""
    return jnp.einsum("tka,tkb->tab", choices, scores.reshape(64, 2, 8)).reshape(64, 128)


# --- What runs in float32 whatever takes its result ---

DENIED = {
    "exponential": (lambda x, w: jnp.exp(x @ w) @ w, "exp", [HIGH]),
    "sum": (lambda x, w: (x @ w).sum(1, keepdims=True) * w[:1] @ w, "reduce_sum", [HIGH]),
    "logarithm of what levels off": (lambda x, w: jnp.log(jax.nn.sigmoid(x @ w)) @ w, "log", [HIGH]),
    "large power": (lambda x, w: (x @ w) ** 5 @ w, "integer_pow", [HIGH]),
    "step": (lambda x, w: jnp.floor(x @ w) @ w, "floor", [HIGH]),
}

# --- What follows its operands, or those who take its result ---

FOLLOWING = {
    "function of a product": (lambda x, w: jnp.tanh(x @ w) @ w, "tanh", [LOW]),
    "function of an argument": (lambda x, w: jnp.tanh(x) @ w, "tanh", [HIGH]),
    "weight, scaled": (lambda x, w: x @ (w * 0.5), "mul", [HIGH]),
    "transposed for a matmul alone": (lambda x, w: (x + 1).T @ x, "transpose", [LOW]),
    "transposed for a matmul and more": (lambda x, w: ((h := (x + 1).T) @ x, jnp.exp(h)), "transpose", [HIGH]),
    "weight, transposed for a product": (lambda x, w: x @ w.T, "transpose", [HIGH]),
    "sign for an exponential": (beside_a_product(lambda h, w: jnp.exp(-h)), "neg", [LOW]),
    "scale for an exponential": (beside_a_product(lambda h, w: jnp.exp(h * 0.5)), "mul", [LOW]),
    "bias for an exponential": (beside_a_product(lambda h, w: jnp.exp(h + w[:1])), "add", [HIGH]),
    "scale that 16 bits round, for an exponential": (beside_a_product(lambda h, w: jnp.exp(h * 0.1)), "mul", [HIGH]),
    "scale that 16 bits round, for a function": (lambda x, w: jnp.tanh(x @ w * 0.1) @ w, "mul", [WIDE]),
    "scale that 16 bits round, for a matmul": (lambda x, w: (x @ w * 0.1) @ w, "mul", [WIDE]),
    "scale that 16 bits hold, for a function": (lambda x, w: jnp.tanh(x @ w * 0.5) @ w, "mul", [LOW]),
    "number over a product": (lambda x, w: jnp.tanh(0.1 / (x @ w)) @ w, "div", [LOW]),
    "bias for a norm": (lambda x, w: rms_norm(x @ w + w[:1]) @ w, "add", [LOW, HIGH]),
    "shift for a norm": (lambda x, w: rms_norm(x @ w + 3.0) @ w, "add", [HIGH, HIGH]),
    "slope of a function": (lambda x, w: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w) @ w))(x), "tanh", [LOW]),
    "difference of norms, for a loss too": (
        lambda x, w: (jnp.exp(d := rms_norm(x @ w) - rms_norm(w @ w)[:1]), jnp.tanh(d) @ w),
        "sub",
        [HIGH],
    ),
    "difference of norms, for a function": (
        lambda x, w: jnp.tanh(rms_norm(x @ w) - rms_norm(jnp.tanh(x @ w) @ w)) @ w,
        "sub",
        [WIDE],
    ),
    "outer products of choices, for a matmul": (
        lambda x, w: outer_products(jax.nn.one_hot(lax.top_k(x, 2)[1], 16), jnp.exp(x @ w)) @ jnp.tile(w, (8, 1)),
        "dot_general",
        [LOW, LOW, WIDENED],
    ),
    "square for a root": (beside_a_product(lambda h, w: jnp.sqrt(h * h)), "mul", [HIGH]),
    "bias for a function": (beside_a_product(lambda h, w: jnp.tanh(h + w[:1]) @ w), "add", [LOW]),
    "layers added for an exponential": (lambda x, w: jnp.exp(x @ w + jnp.tanh(x @ w) @ w), "add", [HIGH]),
    "layers added for a sum": (lambda x, w: jnp.mean(x @ w + jnp.tanh(x @ w) @ w), "add", [LOW]),
    "layers behind one barrier, added for a sum": (
        lambda x, w: jnp.mean(jnp.add(*lax.optimization_barrier((h := x.T @ x, jnp.tanh(h) @ w)))),
        "dot_general",
        [LOW, LOW],
    ),
    "layers added for linear algebra and a sum": (
        lambda x, w: (jnp.mean(h := x @ w + jnp.tanh(x @ w) @ w), jnp.linalg.qr(h)),
        "dot_general",
        [HIGH, HIGH, HIGH],
    ),
    "exponential, scaled": (lambda x, w: (jnp.exp(x @ w) * 2) @ w, "mul", [HIGH]),
    "exponential times a product": (lambda x, w: jnp.tanh(jnp.exp(h := x @ w) * h) @ w, "mul", [HIGH]),
    "exponential times a matmul, for a matmul": (
        lambda x, w: (jnp.exp(h := x @ w) * h) @ w,
        "mul",
        [(f"{BF16}/{F32}", BF16)],
    ),
    "dropout of an exponential, for a product": (
        lambda x, w: (jnp.exp(x @ w) * ((x > 0).astype(F32) / 0.9)) @ w,
        "mul",
        [WIDE],
    ),
    "dropout of an exponential, for a sum": (
        lambda x, w: jnp.sum(jnp.exp(x @ w) * ((x > 0).astype(F32) / 0.9)),
        "mul",
        [HIGH],
    ),
    "weight times an exponential, for a product": (lambda x, w: x @ (w * jnp.exp(x.T @ x @ w)), "mul", [HIGH]),
    "argument plus a product": (lambda x, w: jnp.tanh(jax.nn.relu(x) + x @ w) @ w, "add", [LOW]),
    "argument itself plus a product": (lambda x, w: jnp.tanh(x + x @ w) @ w, "add", [HIGH]),
    "argument joined to a smaller product": (
        lambda x, w: jnp.tanh(jnp.concatenate([x, x.T @ x])) @ w,
        "concatenate",
        [HIGH],
    ),
    "argument joined to a larger product": (
        lambda x, w: jnp.tanh(jnp.concatenate([w, x @ w])) @ w,
        "concatenate",
        [LOW],
    ),
    "norm for a product": (lambda x, w: rms_norm(x @ w) @ w, "mul", [HIGH, WIDE]),
    "norm for a matmul and more": (lambda x, w: ((h := rms_norm(x @ w)) @ w, jnp.exp(h)), "mul", [HIGH, HIGH]),
    "norm for a function": (lambda x, w: jnp.tanh(rms_norm(x @ w)) @ w, "mul", [HIGH, HIGH]),
    "function of a norm": (lambda x, w: jnp.tanh(rms_norm(x @ w)) @ w, "tanh", [LOW]),
    "taken often, for a product": (lambda x, w: (x @ w)[OFTEN] @ w, "gather", [WIDE]),
    "taken a few times, for a product": (lambda x, w: (x @ w)[OFTEN[:3]] @ w, "gather", [LOW]),
    "cut out at a place": (lambda x, w: lax.dynamic_slice_in_dim(x @ w, SOME, 8) @ w, "dynamic_slice", [WIDE]),
    "zeros that an exponential takes too": (
        lambda x, w: (jnp.exp(z := jnp.zeros((64, 16))), jnp.where(x > 0, x @ w, z) @ w),
        "select_n",
        [LOW],
    ),
    "what levels off, for a logarithm too": (
        lambda x, w: (jnp.log(1.5 - (p := jax.nn.sigmoid(x @ w))), p @ w),
        "logistic",
        [HIGH],
    ),
    "what levels off, for a matmul alone": (lambda x, w: jax.nn.sigmoid(x @ w) @ w, "logistic", [LOW]),
    "coordinates, for a matmul too": (lambda x, w: (jnp.floor(p := x @ w + w[:1]), p @ w), "add", [HIGH]),
    "low rank": (lambda x, w: jnp.tanh((x @ w[:, :4]) @ w[:4]) @ w, "dot_general", [LOW, LOW, LOW]),
    "inner product": (lambda x, w: jnp.vdot(h := x @ w, h) * h @ w, "dot_general", [LOW, HIGH, LOW]),
    "inner products of a batch": (
        lambda x, w: jnp.einsum("bi,bi->b", h := x @ w, h)[:, None] * h @ w,
        "dot_general",
        [LOW, HIGH, LOW],
    ),
    "few terms": (lambda x, w: (x[:, :4] @ w[:4]) @ w, "dot_general", [HIGH, LOW]),
    "positions, a row of them, added to a matmul": (
        lambda x, w: jnp.tanh(x.T @ x + jnp.arange(16.0)[None]) @ w,
        "add",
        [LOW],
    ),
    "positions times an exponential, for a matmul": (
        lambda x, w: (jnp.exp((x @ w).sum(0)) * lax.iota("float32", 16)).reshape(1, 16) @ w,
        "mul",
        [WIDE],
    ),
    "a copied position times an exponential, for a matmul": (
        lambda x, w: (jnp.exp(x @ w) * lax.broadcasted_iota("float32", (64, 16), 1)) @ w,
        "mul",
        [HIGH],
    ),
    "comparison of what feeds it alone": (lambda x, w: jnp.tanh(x @ w + w[:1]) > 0.5, "add", [LOW]),
    "in front of a barrier and an exponential": (
        beside_a_product(lambda h, w: jnp.exp(lax.optimization_barrier(h + w[:1]))),
        "add",
        [HIGH],
    ),
    "in front of a barrier and a function": (
        beside_a_product(lambda h, w: jnp.tanh(lax.optimization_barrier(h + w[:1])) @ w),
        "add",
        [LOW],
    ),
}


@pytest.mark.parametrize(("fun", "primitive", "expected"), (DENIED | FOLLOWING).values(), ids=DENIED | FOLLOWING)
def test_each_equation_runs_where_its_row_says(fun, primitive, expected):
    assert decisions(fun, primitive) == expected


# --- Activations that are computed in float32 ---


def softplus(of, then=lambda x: x):
    """A layer behind the softplus of something."""
    return lambda x, w: then(jax.nn.softplus(of(x, w))) @ w


#: Where the logarithm in it runs; nowhere if value and slope are computed as one.
ACTIVATIONS = {
    "of a matmul": (softplus(jnp.matmul), []),
    "of a norm": (softplus(lambda x, w: rms_norm(x @ w)), []),
    "of an exponential": (softplus(lambda x, w: jnp.exp(x @ w)), [HIGH]),
    "of an argument": (softplus(lambda x, w: x), [HIGH]),
    "of 16 bits that the program wrote": (
        softplus(lambda x, w: (x @ w).astype(F16), lambda y: y.astype(F32)),
        [(F16, F16)],
    ),
    "for an exponential": (softplus(jnp.matmul, jnp.exp), [HIGH]),
    "in full precision": (softplus(jnp.matmul, jmp.full_precision(jnp.tanh)), []),
    "all in full precision": (jmp.full_precision(softplus(jnp.matmul)), [HIGH]),
    "in low precision": (jmp.low_precision(softplus(jnp.matmul)), [LOW]),
}


@pytest.mark.parametrize(("fun", "expected"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_of_low_arrays_are_entered_only_for_float32(fun, expected):
    assert decisions(fun, "log1p") == expected
    assert decisions(fun, "log1p", "full") == [(F16, F16) if (F16, F16) in expected else HIGH]


# --- Numbers that the compute dtype cannot hold ---

FLOAT16 = {
    "a mask beside a product": (lambda x, w: jnp.where(x > 0, x @ w, -1e9) @ w, "select_n", [(F16, F16)]),
    "a mask of numbers alone": (lambda x, w: (x @ w + jnp.where(x > 0, 0, -1e9)) @ w, "select_n", [HIGH]),
    "what a mask is added to": (lambda x, w: (x @ w + jnp.where(x > 0, 0, -1e9)) @ w, "add", [HIGH]),
    "a matmul, scaled by an array": (lambda x, w: ((x @ w) * jnp.full((x.shape[0], 16), 1e6)) @ w, "mul", [HIGH]),
    "a matmul, scaled by a tiny array": (lambda x, w: ((x @ w) * jnp.full((x.shape[0], 16), 1e-7)) @ w, "mul", [HIGH]),
    "a weight, scaled": (lambda x, w: x @ (w * jnp.full((16, 16), 1e6)), "mul", [HIGH]),
}


@pytest.mark.parametrize(("fun", "primitive", "expected"), FLOAT16.values(), ids=FLOAT16)
def test_numbers_beyond_float16_keep_what_they_meet_in_float32(fun, primitive, expected):
    assert decisions(fun, primitive, "mixed_float16") == expected


# --- What goes through programs: branches agree, loops hold what their test and their sums need ---


def until(test_of, step):
    """A loop of two carries: a row that its test looks at, and a matrix."""
    return lambda x, w: lax.while_loop(test_of, lambda c: step(*c, w), (jnp.ones((1, 16)), x))


def scanned_beside(h, x, w):
    """A function of what a scan takes as a constant, beside a carry."""
    return lax.scan(lambda c, _: (jnp.tanh(c @ w), jnp.tanh(h)), x, None, length=2)[1][0]


def is_large(c):
    return jnp.max(c[0]) > 1e-3


def in_every_iteration(h, x, w):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.exp(c[1]) + jnp.tanh(h) @ w), (0, x))[1]


THROUGH = {
    "a branch that needs float32": (
        lambda x, w: lax.cond(x[0, 0] > 0, jnp.exp, lambda h: h * 2, x @ w) @ w,
        "cond",
        [WIDENED],
    ),
    "branches that follow": (lambda x, w: lax.cond(w[0, 0] > 0, jnp.tanh, jnp.negative, x @ w) @ w, "cond", [LOW]),
    "a branch that returns an argument": (
        lambda x, w: lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x, x) @ w,
        "cond",
        [(F32, BF16)],
    ),
    "a carry that starts low and ends float32": (
        lambda x, w: lax.scan(lambda c, _: (jnp.exp(c), None), x @ w, None, length=2)[0] @ w,
        "scan",
        [WIDENED],
    ),
    "a carry that stays low": (
        lambda x, w: lax.scan(lambda c, _: (jnp.tanh(c), None), x @ w, None, length=2)[0] @ w,
        "scan",
        [LOW],
    ),
    "a carry beside what a matmul made": (
        lambda x, w: lax.scan(lambda c, _, h=x.T @ x: (jnp.tanh(c) + c @ h, None), x @ w, None, length=2)[0] @ w,
        "scan",
        [LOW],
    ),
    "a carry beside a weight": (
        lambda x, w: lax.scan(lambda c, _: (jnp.tanh(c) + c @ w, None), x @ w, None, length=2)[0] @ w,
        "scan",
        [(f"{BF16}/{F32}", F32)],
    ),
    "a carry beside a weight that more than a matmul takes": (
        lambda x, w: lax.scan(lambda c, _: (jnp.tanh(c) + c @ w + w[:1], None), x @ w, None, length=2)[0] @ w,
        "scan",
        [(f"{BF16}/{F32}", BF16)],
    ),
    "what takes a carry that stays low": (
        lambda x, w: jnp.tanh(lax.scan(lambda c, _: (jnp.sign(c), None), x @ w, None, length=2)[0]) @ w,
        "tanh",
        [LOW],
    ),
    "what takes a carry that ends float32": (
        lambda x, w: jnp.tanh(lax.scan(lambda c, _: (jnp.exp(c), None), x @ w, None, length=2)[0]) @ w,
        "tanh",
        [HIGH],
    ),
    "what takes what a scan stacks for a matmul": (
        lambda x, w: jnp.matmul(lax.scan(lambda c, _: (c, jnp.exp(c)), x, None, length=2)[1], w),
        "scan",
        [WIDE],
    ),
    "a carry that adds up": (
        lambda x, w: lax.scan(lambda c, a: (c + a, None), x @ w, jnp.ones((2, 64, 16)))[0] @ w,
        "scan",
        [(f"{BF16}/{F32}", F32)],
    ),
    "a carry that adds up what matmuls make": (
        lambda x, w: lax.scan(lambda c, a: (c + a @ w, None), x @ w, jnp.ones((2, 64, 16)))[0],
        "scan",
        [(f"{BF16}/{F32}", F32)],
    ),
    "a carry that adds up, beside one that does not": (
        lambda x, w: lax.scan(lambda c, _: ((c[0] + c[1], jnp.tanh(c[1] @ w)), None), (x @ w, x @ w), None, length=2)[
            0
        ],
        "scan",
        [(f"{BF16}/{F32}", F32)],
    ),
    "what takes the steps of a search again": (
        lambda x, w: lax.while_loop(
            lambda c: c[0] < 3,
            lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)),
            (0, until(is_large, lambda r, h, w: (0.5 * jnp.tanh(r @ w), h))(x, w)[0].T.reshape(1, 16)),
        ),
        "dot_general",
        [HIGH, HIGH],
    ),
    "what takes what a search among others found": (
        lambda x, w: jnp.tanh(until(is_large, lambda r, h, w: (0.5 * jnp.tanh(r @ w), h))(x, w)[0] @ w) @ w,
        "dot_general",
        [HIGH, LOW, WIDENED],
    ),
    "beside a carry that a test looks at": (
        until(is_large, lambda r, h, w: (r * 0.5, jnp.tanh(h @ w))),
        "dot_general",
        [LOW],
    ),
    "what a test looks at": (until(is_large, lambda r, h, w: (0.5 * jnp.tanh(r @ w), h)), "dot_general", [HIGH]),
    "what a test looks at, beside what it does not": (
        until(is_large, lambda r, h, w: (0.01 * jnp.tanh(r @ w), jnp.tanh(h @ w))),
        "dot_general",
        [HIGH, LOW],
    ),
    "what a test looks at one iteration later": (
        until(is_large, lambda r, h, w: (r * 0.5 * jnp.max(h), jnp.tanh(h @ w))),
        "dot_general",
        [HIGH],
    ),
    "what a test counts with": (
        until(lambda c: jnp.argmax(c[0]) > 3, lambda r, h, w: (r @ w, h)),
        "dot_general",
        [LOW],
    ),
    "what chooses between steps toward a test": (
        until(is_large, lambda r, h, w: (lax.cond((r @ w)[0, 0] > 0, lambda r: r / 2, lambda r: r / 3, r), h)),
        "dot_general",
        [HIGH],
    ),
    "a matmul that a loop carries": (
        lambda x, w: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ w), (0, w)),
        "dot_general",
        [LOW],
    ),
    "a matmul that a loop carries to an exponential": (
        lambda x, w: lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, w @ w, c[2] + jnp.exp(c[1])), (0, 0 * w, w)
        ),
        "dot_general",
        [LOW],
    ),
    "a function that a loop carries": (
        lambda x, w: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x)),
        "tanh",
        [HIGH],
    ),
    "a matmul that a scan takes": (
        lambda x, w: scanned_beside(x @ w, x, w) @ w,
        "tanh",
        [LOW, LOW],
    ),
    "a carry beside a product": (
        lambda x, w: jnp.tanh(lax.scan(lambda c, _: (jnp.exp(c), jnp.tanh(c)), x, None, length=2)[1][0] + x @ w) @ w,
        "add",
        [LOW],
    ),
    "a matmul that a loop takes in every iteration": (lambda x, w: in_every_iteration(x @ w, x, w), "tanh", [LOW]),
    "an exponential that a loop takes in every iteration": (
        lambda x, w: in_every_iteration(jnp.exp(x @ w), x, w),
        "tanh",
        [HIGH],
    ),
    "before the loop of a test": (
        lambda x, w: lax.while_loop(is_large, lambda c: (c[0] * 0.5,), (x @ w,)),
        "dot_general",
        [LOW],
    ),
    "a shift before the loop of a test alone": (
        lambda x, w: lax.while_loop(is_large, lambda c: (c[0] * 0.5, c[1] + 1), (x @ w - w[:1], 0))[1],
        "sub",
        [HIGH],
    ),
    "what levels off, before the loop of a test": (
        lambda x, w: lax.while_loop(is_large, lambda c: (c[0] * 0.5,), (jax.nn.sigmoid(x @ w),))[0] @ w,
        "logistic",
        [HIGH],
    ),
    "a norm that a scan takes": (lambda x, w: scanned_beside(rms_norm(x @ w), x, w) @ w, "tanh", [LOW, LOW]),
}


@pytest.mark.parametrize(("fun", "primitive", "expected"), THROUGH.values(), ids=THROUGH)
def test_what_goes_through_programs_runs_where_its_row_says(fun, primitive, expected):
    assert decisions(fun, primitive) == expected


# --- A rule in full precision covers the programs that a primitive holds ---

HOLDING = {
    "scan": lambda x, w: lax.scan(lambda c, _: (c @ w @ w.T, None), x, None, length=2)[0],
    "while": lambda x, w: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] @ w), (0, x)),
    "cond": lambda x, w: lax.cond(x[0, 0] > 0, jnp.matmul, lambda x, w: x @ w.T, x, w),
    "remat2|checkpoint": jax.checkpoint(jnp.matmul),
    "jit": jax.jit(lambda x, w: jnp.einsum("ij,jk->ik", x, w)),
}


@pytest.mark.parametrize("primitive", HOLDING)
def test_a_rule_in_full_precision_covers_the_programs_of_a_primitive(primitive):
    dtypes = {}
    for precision in ("auto", "full"):
        fun = jmp.autocast(HOLDING[primitive], "mixed_bfloat16", rules=jmp.Rule(None, primitive, precision))
        found = jaxprs.equations("dot_general", fun, jnp.ones((64, 16)), jnp.ones((16, 16)))
        dtypes[precision] = {str(v.aval.dtype) for eqn in found for v in eqn.invars}
    assert dtypes == {"auto": {BF16}, "full": {F32}}
