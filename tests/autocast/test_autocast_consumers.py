"""What consumers want decides: linear algebra, logarithms of what levels off, sums of gradients, tests of loops.

Compiled without excess precision: XLA on the CPU otherwise removes the very roundings that a GPU makes.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from support import jaxprs
from support.comparisons import jit_as_written, slow_but_for

import jmp_lite as jmp

POLICIES = {"mixed_bfloat16": 2.0**-8, "mixed_float16": 2.0**-11}
every_policy = pytest.mark.parametrize("policy", POLICIES)
either_policy = pytest.mark.parametrize("policy", slow_but_for({"mixed_bfloat16"}, POLICIES))


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def relative(found, expected):
    found, expected = (
        np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])
        for tree in (found, expected)
    )
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def errors(fun, policy, *args):
    """Relative errors of value and gradient with autocast inside of grad and around it."""
    expected = jax.value_and_grad(fun)
    inside = jax.value_and_grad(jmp.autocast(fun, policy))
    around = jmp.autocast(expected, policy)
    expected, inside, around = jit_as_written(lambda *args: [run(*args) for run in (expected, inside, around)])(*args)
    pairs = [(found[part], expected[part]) for found in (inside, around) for part in (0, 1)]
    return [relative(*pair) for pair in pairs]


# --- Linear algebra: what reaches it is computed as written, however it gets there ---

#: Columns of scales from 1 to 0.01: their Gram matrix is ill conditioned.
X = draw(0, 48, 12) @ jnp.diag(10.0 ** -jnp.linspace(0, 2, 12)) @ draw(1, 12, 12)
Y, RIDGE = draw(2, 48), 1e-3 * jnp.eye(16)


def gram(w, within=lambda f: f):
    h = within(lambda x, w: jnp.tanh(x @ w))(X, w)
    return h, h.T @ h + RIDGE


def log_likelihood(w):
    factor = jnp.linalg.cholesky(gram(w)[1])
    whitened = jax.scipy.linalg.solve_triangular(factor, gram(w)[0].T @ Y, lower=True)
    return jnp.sum(whitened**2) + jnp.sum(jnp.log(jnp.diag(factor)))


def regression(w):
    h, matrix = gram(w)
    return jnp.mean((h @ jnp.linalg.solve(matrix, h.T @ Y) - Y) ** 2)


def mahalanobis(w):
    h, matrix = gram(w)
    return jnp.mean((h @ jnp.linalg.inv(matrix)) * h)


def filtered(w):
    def step(p, a):
        p = w.T @ (w @ p @ w.T) @ w * 0.01 + jnp.outer(a, a) + 10 * RIDGE
        return p, jnp.sum(jnp.log(jnp.diag(jnp.linalg.cholesky(p + p.T))))

    return jnp.mean(lax.scan(step, jnp.eye(16), draw(3, 10, 16))[1])


SOLVERS = {
    "cholesky": log_likelihood,
    "solve": regression,
    "inv": mahalanobis,
    "eigh": lambda w: jnp.sum(jnp.linalg.eigvalsh(gram(w)[1] + jnp.diag(jnp.arange(16.0))) * jnp.arange(16.0)),
    "svd": lambda w: jnp.sum(jnp.log(jnp.linalg.svd(gram(w)[1] + jnp.diag(jnp.arange(16.0)), compute_uv=False))),
    "qr": lambda w: jnp.sum(jnp.log(jnp.abs(jnp.diag(jnp.linalg.qr(gram(w)[0])[1])))),
    "pinv": lambda w: jnp.sum(jnp.linalg.pinv(gram(w)[0]) @ Y),
    "in scan": filtered,
    "in jit and checkpoint": lambda w: jnp.linalg.slogdet(gram(w, lambda f: jax.jit(jax.checkpoint(f)))[1])[1],
    "in cond": lambda w: lax.cond(w[0, 0] < 99, lambda w: jnp.linalg.slogdet(gram(w)[1])[1], jnp.sum, w),
    "in shard_map": lambda w: jnp.linalg.slogdet(jax.vmap(lambda w: gram(w)[1])(w[None])[0])[1],
}


@pytest.mark.parametrize("name", slow_but_for(("cholesky", "solve", "svd", "in scan", "in shard_map"), SOLVERS))
@either_policy
def test_linear_algebra_gets_what_was_written(name, policy):
    """Inside of grad nothing that reaches it is rounded; around grad, cotangents of further matmuls are."""
    value, grad, value_around, grad_around = errors(SOLVERS[name], policy, 0.3 * draw(4, 12, 16))
    rounding = POLICIES[policy]
    assert max(value, value_around) < rounding
    assert grad < 2 * rounding
    assert grad_around < 16 * rounding


def gains(w):
    """A filter that multiplies by the inverse: its gain makes the next covariance, and moves the mean."""

    def step(carry, y):
        m, p = carry
        p = w @ p @ w.T * 0.2 + jnp.eye(12)
        gain = p @ jnp.linalg.inv(p + jnp.eye(12))
        return (m + gain @ (y - m), p - gain @ p), None

    return lax.scan(step, (jnp.zeros(12), jnp.eye(12)), X)[0][0]


def test_gains_are_linear_algebra_too():
    found = jmp.explain(gains, "mixed_bfloat16")(jnp.eye(12))
    assert {r.in_dtypes for r in found if r.primitive == "dot_general"} == {("float32", "float32")}


# --- Functions that level off, between a logarithm and a matmul ---

LEVELS_OFF = {
    "logistic": lambda z: jnp.clip(jax.nn.sigmoid(z + 4), 1e-7, 1 - 1e-7),
    "logistic in jit": jax.jit(lambda z: jnp.clip(jax.nn.sigmoid(z + 5), 1e-7, 1 - 1e-7)),
    "tanh": lambda z: jnp.minimum(jnp.tanh(z + 3), 1 - 1e-6),
    "erf": lambda z: jnp.clip(lax.erf(z + 1.5), -1 + 1e-6, 1 - 1e-6),
    "erfc": lambda z: 1 - 0.5 * jnp.maximum(lax.erfc(z + 1.5), 1e-6),
    "minimum": lambda z: jnp.minimum(jax.nn.sigmoid(z + 6), 1 - 1e-6),
}


@pytest.mark.parametrize("name", LEVELS_OFF)
@either_policy
def test_what_levels_off_keeps_its_distance_from_one(name, policy):
    """log(1 - p) beside p @ w is finite and near: p runs in float32 and is rounded for the matmul alone."""
    x, w = draw(5, 64, 16), draw(6, 16, 16) / 4

    def fun(w):
        p = LEVELS_OFF[name](x @ w)
        return jnp.mean(jnp.tanh(p @ w.T) ** 2) - jnp.mean(jnp.log(1 - p))

    assert max(errors(fun, policy, w)) < 16 * POLICIES[policy]


# --- Gradients of what is taken many times ---

IDS, WEIGHTS = jnp.arange(4096) // 512, jnp.linspace(0.5, 1, 4096)[:, None]


def repeated(parts, *times):
    """Joins arrays, and what that gives again and again."""
    whole = jnp.concatenate(parts)
    return repeated([whole] * times[0], *times[1:]) if times else whole


TAKES = {
    "index": lambda h: h[IDS],
    "take": lambda h: jnp.take(h, IDS, axis=0),
    "repeat": lambda h: jnp.repeat(h, 512, axis=0),
    "take_along_axis": lambda h: jnp.take_along_axis(h, jnp.broadcast_to(IDS[:, None], (4096, 32)), axis=0),
    "vmap": lambda h: jax.vmap(lambda i: h[i])(IDS),
    "of a sum of segments": lambda h: (jax.ops.segment_sum(h[IDS] * WEIGHTS, IDS, 8) / 512)[IDS],
    "dynamic_slice": lambda h: repeated([lax.dynamic_slice_in_dim(h, i, 1) for i in [*range(8)] * 8], 8, 8),
    "scan": lambda h: lax.scan(lambda c, i: (c, lax.dynamic_index_in_dim(h, i, keepdims=False)), 0, IDS)[1],
}


@pytest.mark.parametrize("name", TAKES)
@either_policy
def test_gradients_of_what_is_taken_add_up_in_float32(name, policy):
    """In 16 bits a sum of 512 terms of one sign stops growing halfway."""
    x, w = draw(7, 8, 16), draw(8, 16, 32) / 4
    _, grad, _, grad_around = errors(lambda w: jnp.mean(jnp.tanh(TAKES[name](x @ w) * WEIGHTS)), policy, w)
    assert grad < 2 * POLICIES[policy]
    # Around grad, jax 0.10 adds up what 8 slices of an unrolled loop give in 16 bits, half an ulp each (docs, Limits).
    assert grad_around < (4 if name == "dynamic_slice" else 2) * POLICIES[policy]


@pytest.mark.parametrize(
    "name", slow_but_for({"index", "repeat", "scan"}, [name for name in TAKES if name != "dynamic_slice"])
)
@either_policy
def test_gradients_of_what_is_taken_for_a_product_add_up_in_float32(name, policy):
    """What is taken is held in 16 bits then, and so are the terms of the sum, but not the sum."""
    x, w, v = draw(7, 8, 16), draw(8, 16, 32) / 4, draw(16, 32, 16) / 6
    _, grad, _, grad_around = errors(lambda w: jnp.mean(jnp.tanh((TAKES[name](x @ w) * WEIGHTS) @ v)), policy, w)
    assert grad < (4 if name == "repeat" else 2) * POLICIES[policy]  # a reshape and a broadcast, and no taking
    assert grad_around < 2 * POLICIES[policy]


H, R = draw(13, 512, 256), draw(14, 256, 96)

# --- Matmuls of a few terms ---


def reprojection(camera):
    points = jnp.concatenate([draw(9, 200, 3), jnp.ones((200, 1))], 1) @ camera.T
    return jnp.mean((points[:, :2] / (points[:, 2:] + 5) - 1) ** 2)


def waves_of_a_pose(rotation):
    points = (draw(10, 256, 3) @ rotation.T)[:, None] * jnp.linspace(1, 4, 4)[None, :, None]
    return jnp.mean(jnp.sin(points * 64.0) * draw(11, 256, 4, 3))


GEOMETRY = {
    "camera": (reprojection, jnp.array([[800.0, 0, 320, 0], [0, 800, 240, 0], [0, 0, 1, 5]]) / 100),
    "rotation": (waves_of_a_pose, jnp.eye(3)),
    "rotations in scan": (
        lambda r: jnp.sum(lax.scan(lambda p, _: (p @ r, p[0]), jnp.eye(4), None, length=50)[1] ** 3),
        jnp.eye(4) + 0.01 * draw(12, 4, 4),
    ),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", GEOMETRY)
@every_policy
def test_products_of_a_few_terms_are_not_rounded(name, policy):
    fun, matrix = GEOMETRY[name]
    value, grad, value_around, grad_around = errors(fun, policy, matrix)
    assert max(value, value_around, grad) < 1e-5
    assert grad_around < 16 * POLICIES[policy]


def test_adapters_of_low_rank_are_products():
    """A matmul of four terms follows a low operand, and what it is added to stays low."""

    def layer(x, w, a, b):
        return jnp.tanh(x @ w + (x @ a) @ b) @ w

    found = jmp.explain(layer, "mixed_bfloat16")(H[:, :16], H[:16, :16], H[:16, :4], H[:4, :16])
    assert {r.in_dtypes for r in found if r.primitive in ("dot_general", "add")} == {("bfloat16", "bfloat16")}


def test_five_terms_are_a_product_and_four_are_not():
    for terms, dtype in ((4, "float32"), (5, "bfloat16")):
        found = jmp.explain(jnp.matmul, "mixed_bfloat16")(jnp.ones((8, terms)), jnp.ones((terms, 8)))
        assert found[0].in_dtypes == (dtype, dtype)


# --- Matmuls whose results are wanted in float32 ---

low_operands = functools.partial(lax.dot, preferred_element_type=jnp.float32)


@every_policy
def test_scores_of_a_router_are_those_of_16_bit_operands(policy):
    """Tokens go where float32 scores of 16-bit operands send them: not one goes elsewhere."""
    dtype = jmp.get_policy(policy).compute_dtype
    route = lambda x, r: lax.top_k(jax.nn.softmax(x @ r), 4)[1]  # noqa: E731
    expected = lax.top_k(jax.nn.softmax(low_operands(H.astype(dtype), R.astype(dtype))), 4)[1]
    np.testing.assert_array_equal(jit_as_written(jmp.autocast(route, policy))(H, R), expected)


def two_consumers(h, w):
    z = h @ w
    return jnp.exp(z), jnp.tanh(z) @ w.T


WANTED = {
    "logarithm": (lambda h, w: jnp.log(h @ w), "float32"),
    "returned": (lambda h, w: h @ w, "float32"),
    "behind arithmetic": (lambda h, w: jnp.exp((h @ w) * 0.5 + 1), "float32"),
    "in jit": (lambda h, w: jnp.exp(jax.jit(jnp.matmul)(h, w)), "float32"),
    "two consumers": (two_consumers, "bfloat16"),
    "a product": (lambda h, w: (h @ w) @ w.T, "bfloat16"),
    "a convolution": (
        lambda h, w: jnp.exp(lax.conv(h.reshape(1, 16, 8, 16), w.reshape(16, 16, 4, 6)[:4, :, :3, :3], (1, 1), "SAME")),
        "bfloat16",
    ),
    "groups": (lambda h, w: jnp.exp(lax.ragged_dot(h, jnp.stack([w, w]), jnp.array([8, 24], jnp.int32))), "float32"),
    "larger than its operands": (lambda h, w: jnp.exp(h[:, :8] @ w[:8]), "bfloat16"),
}


@pytest.mark.parametrize("name", WANTED)
def test_results_leave_in_what_their_consumers_want(name):
    """Operands are 16 bits in any case, forward and backward; the first matmul is looked at."""
    fun, dtype = WANTED[name]
    h, w = jnp.ones((32, 64)), jnp.ones((64, 96))[:, :36] if name != "a convolution" else jnp.ones((16, 384))
    products = ("dot_general", "conv_general_dilated", "ragged_dot_general")
    [first, *_] = [r for r in jmp.explain(fun, "mixed_bfloat16")(h, w) if r.primitive in products]
    assert (first.in_dtypes[:2], first.out_dtypes) == (("bfloat16",) * 2, (dtype,))
    loss = lambda h, w: sum(jnp.sum(x) for x in jax.tree.leaves(jmp.autocast(fun, "mixed_bfloat16")(h, w)))  # noqa: E731
    for primitive in products:
        for eqn in jaxprs.equations(primitive, jax.grad(loss, (0, 1)), h, w):
            assert {str(v.aval.dtype) for v in eqn.invars[:2]} <= {"bfloat16"} or eqn.params.get("compute_dtype")


def test_large_results_are_float32_by_a_rule():
    """Attention scores leave in the compute dtype, unless a rule asks for float32."""
    scores = lambda q, k: jnp.exp(jnp.einsum("btd,bsd->bts", q, k))  # noqa: E731
    q = jnp.ones((2, 64, 8))
    for rules, dtype in (((), "bfloat16"), (jmp.Rule(primitive="dot_general", result=jnp.float32), "float32")):
        [product] = [
            r for r in jmp.explain(scores, "mixed_bfloat16", rules=rules)(q, q) if r.primitive == "dot_general"
        ]
        assert (product.in_dtypes, product.out_dtypes) == (("bfloat16",) * 2, (dtype,))


# --- Precisions that the author asked for ---

ASKED = {
    "highest": {"precision": "highest"},
    "high": {"precision": "high"},
    "one of two": {"precision": ("default", "highest")},
    "six products": {"precision": lax.DotAlgorithmPreset.BF16_BF16_F32_X6},
    "three products": {"precision": lax.DotAlgorithmPreset.BF16_BF16_F32_X3},
    "float32": {"precision": lax.DotAlgorithmPreset.F32_F32_F32},
}
NOT_ASKED = {
    "default": {"precision": "default"},
    "nothing": {},
    "bfloat16": {"precision": lax.DotAlgorithmPreset.BF16_BF16_F32},
}
DIMS = (((1,), (0,)), ((), ()))


@pytest.mark.parametrize("how", ASKED.values(), ids=ASKED)
def test_precision_that_is_asked_for_is_kept_and_named(how):
    [record] = jmp.explain(functools.partial(lax.dot_general, dimension_numbers=DIMS, **how), "mixed_bfloat16")(H, R)
    assert record.in_dtypes == ("float32", "float32")
    assert "precision=" in record.reason


@pytest.mark.parametrize("how", NOT_ASKED.values(), ids=NOT_ASKED)
def test_precision_that_promises_no_more_is_lowered(how):
    [record] = jmp.explain(functools.partial(lax.dot_general, dimension_numbers=DIMS, **how), "mixed_bfloat16")(H, R)
    assert record.in_dtypes == ("bfloat16", "bfloat16")


@pytest.mark.parametrize(
    "moved", [lambda y: y, lambda y: y.T.reshape(y.shape), lambda y: 2 * y], ids=["", "moved", "scaled"]
)
@pytest.mark.parametrize("how", ASKED.values(), ids=ASKED)
def test_precision_that_is_asked_for_of_one_matmul_is_not_that_of_the_next(how, moved):
    def two(x, w, v):
        return jnp.exp(moved(lax.dot_general(x, w, DIMS, **how)) @ v)

    first, last = (r for r in jmp.explain(two, "mixed_bfloat16")(H, R, R.T) if r.primitive == "dot_general")
    assert first.in_dtypes == ("float32", "float32")
    assert last.in_dtypes == ("bfloat16", "bfloat16")


def test_default_matmul_precision_is_asked_for_too():
    with jax.default_matmul_precision("float32"):
        [record] = jmp.explain(jnp.matmul, "mixed_bfloat16")(H, R)
    assert record.in_dtypes == ("float32", "float32")


# --- Matmuls that run in full precision want float32, and sums of gradients are float32 ---

FULL_PRODUCT = jmp.full_precision(jnp.matmul)
IN_FULL = {
    "region": (lambda x, w: FULL_PRODUCT((x + 1).T, x), ()),
    "rule": (lambda x, w: (x + 1).T @ x, jmp.Rule(primitive="dot_general", precision="full")),
    "stacked by a scan": (lambda x, w: FULL_PRODUCT(lax.scan(lambda c, a: (c, jnp.exp(a)), 0, x)[1], w), ()),
    "in jit": (lambda x, w: FULL_PRODUCT(jax.jit(lambda x: (x + 1).T)(x), x), ()),
}


@pytest.mark.parametrize("name", IN_FULL)
def test_operands_of_products_in_full_precision_are_not_rounded(name):
    fun, rules = IN_FULL[name]
    x, w = draw(15, 64, 16), draw(16, 16, 16)
    np.testing.assert_allclose(
        jit_as_written(jmp.autocast(fun, "mixed_bfloat16", rules=rules))(x, w), fun(x, w), rtol=1e-4, atol=1e-4
    )


def test_a_norm_before_a_router_in_full_precision_stays_float32():
    norm = lambda h: h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True))  # noqa: E731
    found = jmp.explain(lambda x, w: FULL_PRODUCT(norm(x @ w), w), "mixed_bfloat16")(jnp.ones((64, 16)), jnp.eye(16))
    assert [r.out_dtypes for r in found if r.primitive == "mul"][-1] == ("float32",)


USES = 20
USED_OFTEN = {
    "weight": (lambda w, x: x @ w, (16, 16), 257),
    "bias": (lambda b, x: (x @ jnp.eye(16) + b[None]) @ jnp.eye(16), (16,), 257),
    "bias, reshaped": (lambda b, x: (x @ jnp.eye(16) + b.reshape(1, -1)) @ jnp.eye(16), (16,), 257),
    "adapter of low rank": (lambda w, x: ((x @ jnp.ones((16, 4))) @ w) @ jnp.eye(16), (4, 16), 257 * 16),
}


@pytest.mark.parametrize("name", USED_OFTEN)
@pytest.mark.parametrize("order", slow_but_for({"grad(autocast)"}, ["grad(autocast)", "autocast(grad)"]))
def test_gradients_of_a_weight_used_often_add_up_in_float32(order, name):
    """In bfloat16 257 would be 256, and the sum of 20 of them, 5140, would be 5120 or 5152."""
    layer, shape, each = USED_OFTEN[name]
    loss = lambda w, x: sum(jnp.sum(layer(w, x)) for _ in range(USES))  # noqa: E731
    cast = functools.partial(jmp.autocast, policy="mixed_bfloat16")
    gradient = jax.grad(cast(loss)) if order == "grad(autocast)" else cast(jax.grad(loss))
    np.testing.assert_array_equal(gradient(jnp.ones(shape), jnp.ones((257, 16))), USES * each)


def test_what_a_rule_takes_in_16_bits_is_rounded():
    table, order = draw(17, 4, 16), jnp.array([3, 1, 1])
    low = jmp.autocast(lambda x: x[order], "mixed_bfloat16", rules=jmp.Rule(primitive="gather", precision="low"))
    np.testing.assert_array_equal(low(table), table.astype(jnp.bfloat16).astype(jnp.float32)[order])


HEADS = {
    "log_softmax": lambda logits, y: -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean(),
    "logsumexp": lambda logits, y: jax.nn.logsumexp(logits, axis=-1).mean(),
    "logsumexp, keepdims": lambda logits, y: jax.nn.logsumexp(logits, axis=-1, keepdims=True).mean(),
    "z loss": lambda logits, y: jnp.square(jax.nn.logsumexp(logits, axis=-1)).mean(),
    "integer labels": lambda logits, y: optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(),
    "one-hot labels": lambda logits, y: optax.softmax_cross_entropy(logits, jax.nn.one_hot(y, 16)).mean(),
    "sigmoid": lambda logits, y: optax.sigmoid_binary_cross_entropy(logits, jax.nn.one_hot(y, 16)).mean(),
    "focal": lambda logits, y: optax.sigmoid_focal_loss(logits, jax.nn.one_hot(y, 16)).mean(),
    "temperature": lambda logits, y: jax.nn.logsumexp(logits / 0.7, axis=-1).mean(),
    "two cross entropies": lambda logits, y: (
        optax.softmax_cross_entropy_with_integer_labels(logits, y)
        + optax.softmax_cross_entropy_with_integer_labels(jnp.flip(logits), y)
    ).mean(),
    "CTC": lambda logits, y: optax.ctc_loss(
        logits.reshape(2, 16, 16), jnp.zeros((2, 16)), 1 + y.reshape(2, 16)[:, :5] % 15, jnp.zeros((2, 5))
    ).mean(),
    "Huber": lambda logits, y: optax.huber_loss(logits, jax.nn.one_hot(y, 16)).mean(),
    "log cosh": lambda logits, y: optax.log_cosh(logits, jax.nn.one_hot(y, 16)).mean(),
    "Gaussian likelihood": lambda logits, y: jnp.mean(
        logits[:, :8] + jnp.square(jax.nn.one_hot(y, 8) - logits[:, 8:]) / jnp.exp(logits[:, :8])
    ),
    "noise": lambda logits, y: jnp.square(logits + jax.random.normal(jax.random.key(0), logits.shape)).mean(),
    "temporal difference": lambda logits, y: jnp.square(y / 16 + 0.99 * logits.max(-1)).mean(),
}


@pytest.mark.parametrize("head", HEADS)
def test_logits_leave_in_float32_for_any_loss_of_them(head):
    def loss(w, x, y):
        return HEADS[head](x @ w, y)

    shapes = [jax.ShapeDtypeStruct((64, 16), jnp.float32), jax.ShapeDtypeStruct((32, 64), jnp.float32)]
    found = jmp.explain(loss, "mixed_bfloat16")(*shapes, jax.ShapeDtypeStruct((32,), jnp.int32))
    logits = next(decision for decision in found if decision.primitive == "dot_general")
    assert logits.in_dtypes == ("bfloat16", "bfloat16")
    assert logits.out_dtypes == ("float32",)


CHOICES = {
    "top_k": lambda y: lax.top_k(y, 2)[1],
    "top_k of sigmoid and bias": lambda y: lax.top_k(jax.nn.sigmoid(y) + jnp.arange(16.0)[None] / 16, 2)[1],
    "argmax": lambda y: y.argmax(-1),
    "argsort": lambda y: y.argsort(-1),
    "nearest code": lambda y: jnp.argmin(2.0 - 2 * y, -1),
}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
def test_scores_by_which_something_is_chosen_leave_in_float32(choose):
    """Scores that differ by less than 16 bits hold are ties, and all of them would choose the first."""

    def model(w, x, experts):
        x = x @ w
        return (experts[choose(x)] * 2.0).sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(64, 16), (32, 64), (16, 8)]]
    decisions = jmp.explain(model, "mixed_bfloat16")(*shapes)
    assert [d.out_dtypes for d in decisions if d.primitive == "dot_general"] == [("float32",)]


def test_rounded_scores_are_chosen_by_as_they_are_held():
    """A float32 bias makes differences among rounded scores, which another rounding would lose."""

    def model(w, x, bias):
        return lax.top_k(jax.nn.sigmoid(x @ w) + bias[None], 2)[1]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(8, 512), (512, 8), (512,)]]
    [chosen] = [d for d in jmp.explain(model, "mixed_bfloat16")(*shapes) if d.primitive == "top_k"]
    assert chosen.in_dtypes == ("float32",)


@pytest.mark.parametrize("outer", [lambda loss: loss, jax.jit, jax.checkpoint], ids=["bare", "jit", "checkpoint"])
def test_a_sum_with_a_float32_argument_is_no_sum_of_layers(outer):
    """A reward plus a discounted value is float32, because the argument is."""

    def loss(w, x, reward):
        return jnp.square(reward + 0.99 * (x @ w).max(-1)).mean()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(64, 16), (32, 64), (32,)]]
    decisions = jmp.explain(outer(loss), "mixed_bfloat16")(*shapes)
    assert [d.out_dtypes for d in decisions if d.primitive == "dot_general"] == [("float32",)]


@pytest.mark.parametrize(
    "pool", [jnp.mean, jnp.var, lambda y: jnp.sqrt(jnp.sum(jnp.square(y)))], ids=["mean", "var", "norm"]
)
def test_layers_that_are_added_stay_in_the_compute_dtype(pool):
    """What goes around a layer is as large as it: float32 would double what is kept."""

    def loss(w, x):
        x = x @ w
        return pool(x + jax.nn.relu(x) @ w)

    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    decisions = jmp.explain(loss, "mixed_bfloat16")(shape, shape)
    assert [d.out_dtypes for d in decisions if d.primitive == "dot_general"] == [("bfloat16",)] * 2


def test_logits_of_a_dense_layer_with_a_bias_leave_in_float32():
    layer, x = nn.Dense(16), jnp.ones((64, 128))
    variables = layer.init(jax.random.key(0), x)
    found = jmp.explain(lambda v, x: jax.nn.log_softmax(layer.apply(v, x)), "mixed_bfloat16")(variables, x)
    assert [r.out_dtypes for r in found if r.primitive == "dot_general"] == [("float32",)]


@pytest.mark.parametrize("rows", [1, 2, 64, "symbolic"])
@pytest.mark.parametrize("bias", ["repeated", "row", "reshaped"])
def test_the_number_of_rows_decides_nothing(bias, rows):
    """A bias is not its own layer, not even beside a single row."""
    ways = {
        "repeated": lambda b: jnp.broadcast_to(b, (rows, b.size)),
        "row": lambda b: b[None],
        "reshaped": lambda b: b.reshape(1, -1),
    }

    def model(x, w, b, head):
        as_row = ways[bias]
        h = jax.nn.relu(x @ w + as_row(b))
        h = h - jnp.mean(h, -1, keepdims=True)
        h = h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)
        return jax.nn.log_softmax(h @ head + as_row(b[:16]))

    rows = jax.export.symbolic_shape("rows")[0] if rows == "symbolic" else rows
    x, w, b, head = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, 128), (128, 128), (128,), (128, 16)))
    found = jmp.explain(model, "mixed_bfloat16")(x, w, b, head)
    results = [
        (r.primitive, *r.out_dtypes) for r in found if r.primitive in ("dot_general", "add", "mul", "exp", "log")
    ]
    low, high = "bfloat16", "float32"
    assert [result[1] for result in results] == [low, low, high, high, low, high, high, high, high], results
