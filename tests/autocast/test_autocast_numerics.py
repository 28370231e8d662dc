"""How precise autocast is where 16 bits are known to fail: long sums, offsets, wide logits, angles, stopping rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.comparisons import assert_identical, jit_as_written

import jmp_lite as jmp
from jmp_lite.autocast._ops import ACTIVATIONS

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
    "grad(autocast)": lambda loss, policy="mixed_bfloat16": jax.grad(jmp.autocast(loss, policy)),
    "autocast(grad)": lambda loss, policy="mixed_bfloat16": jmp.autocast(jax.grad(loss), policy),
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
    """Sums and means of matmuls are as precise as the matmuls."""

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
        centered = h - h.mean(-1, keepdims=True)
        return square(centered).mean(-1), jnp.var(h, axis=-1)

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
    """Of logits with a deviation of 6 that come out of a matmul without loss, softmax is computed in float32."""
    logits = normal(rng, 8, 256, scale=6.0).astype(jnp.bfloat16).astype(jnp.float32)
    fun = lambda x, w: of(x @ w)  # noqa: E731
    actual, expected = jax.jit(lambda logits, w: (low(fun)(logits, w), of(logits)))(
        logits, np.eye(256, dtype=np.float32)
    )
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert np.max(np.abs(actual - expected) / np.abs(expected)) < LIMIT


# --- Angles ---


def test_rotary_angles_are_exact():
    """A matmul without contraction of positions up to 4096 with frequencies is not rounded."""

    def angles(positions):
        frequencies = 1.0 / 10000.0 ** (jnp.arange(0, 64, 2, dtype=jnp.float32) / 64)
        phase = jnp.einsum("i,j->ij", positions, frequencies)
        return phase, jnp.sin(phase), jnp.cos(phase)

    positions = jnp.arange(4096, dtype=jnp.float32)
    assert_identical(jax.jit(low(angles))(positions), jax.jit(angles)(positions))


# --- Stopping rules ---


def test_loop_with_a_float_predicate_is_exact(rng):
    """A loop that runs until a norm is small takes the same steps to the same bits, from the same matmul."""

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
    autocast = jmp.autocast(fun, policy)
    of_first = jax.grad(lambda x, w: jnp.sum(autocast(x, w)[:, 0]))
    weights, expected, grads = jit_as_written(lambda x, w: (autocast(x, w), fun(x, w), of_first(x, w)))(x, w)
    assert np.all(np.asarray(weights)[:, 8:] == 0)
    assert relative(weights, expected) < 4 * ULP
    assert np.all(np.isfinite(grads))


# --- Quotients, whose derivative must not square the divisor: float16 ends at 65504, and loses digits below 6e-5 ---

QUOTIENTS = {
    "by the largest": lambda h: h / jnp.max(jnp.abs(h), axis=-1, keepdims=True),
    "between the smallest and the largest": lambda h: (h - jnp.min(h)) / (jnp.max(h) - jnp.min(h)),
    "of two arrays": lambda h: h / (jnp.max(jnp.abs(h)) + jnp.abs(h)),
}


@pytest.mark.parametrize("scale", [1e3, 1.0, 1e-3])
@every_order
@pytest.mark.parametrize("quotient", QUOTIENTS.values(), ids=QUOTIENTS)
def test_gradients_of_quotients_stay_in_range(quotient, order, scale, rng):
    def loss(w, x):  # with a loss scale that makes up for the slope
        return 64 * scale * jnp.mean(jnp.square(quotient(x @ (scale * w)) @ w))

    x, w = normal(rng, 32, 16), normal(rng, 16, 16, scale=0.25)
    found, expected = jit_as_written(lambda w, x: (order(loss, "mixed_float16")(w, x), jax.grad(loss)(w, x)))(w, x)
    assert relative(found, expected) < 5e-3


def test_a_fixed_divisor_adds_nothing_to_the_derivative_of_an_infinite_quotient():
    """Forward, zero times what is beyond float16 would be NaN; the function behind it is flat there."""
    fun = lambda h, divisor: jnp.tanh((h @ jnp.eye(16)) / (divisor @ jnp.eye(16))) @ jnp.eye(16)  # noqa: E731
    h, divisor = jnp.full((16, 16), 100.0), jnp.full((16, 16), 1e-3)
    _, slope = jax.jvp(lambda h: jmp.autocast(fun, "mixed_float16")(h, divisor), (h,), (jnp.ones_like(h),))
    np.testing.assert_array_equal(slope, 0)


# --- Cubes, beyond float16 above 40 ---

GELUS = {"of jax.nn": jax.nn.gelu, "by hand": lambda h: h * (1 + jnp.tanh(0.8 * h + 0.036 * h**3))}


@pytest.mark.parametrize("gelu", GELUS.values(), ids=GELUS)
def test_a_gelu_of_large_activations_has_a_gradient(gelu):
    """Its slope is zero or one there; the slope of the cube inside is infinite from 148."""
    loss = lambda x: jnp.sum(gelu(x @ jnp.eye(16)) @ jnp.eye(16))  # noqa: E731
    x = jnp.linspace(-300, 300, 256).reshape(16, 16)
    found = jax.jit(jax.grad(jmp.autocast(loss, "mixed_float16")))(x)
    np.testing.assert_allclose(found, jax.grad(loss)(x), atol=2e-2)


# --- Activations of a bounded slope ---


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_the_slope_of_an_activation_is_that_of_float32_rounded(name, rng):
    h, w = normal(rng, 16, 16).astype(jnp.bfloat16).astype(jnp.float32), jnp.eye(16)
    loss = lambda h: jnp.sum(getattr(jax.nn, name)(h @ w) @ w)  # noqa: E731
    assert {record.in_dtypes for record in jmp.explain(loss, "mixed_bfloat16")(h) if "slope" in record.reason}
    np.testing.assert_allclose(jax.grad(low(loss))(h), jax.grad(loss)(h), rtol=ULP)


# --- Logarithms whose results nobody uses: only their derivatives are left ---

LOGARITHMS = {
    "of 1 - p": lambda h: jnp.log(1 - jax.nn.sigmoid(h) + 1e-7),
    "of 1 - p * p": lambda h: jnp.log(1 - jax.nn.sigmoid(h) ** 2 + 1e-6),
    "of a clamped p": lambda h: jnp.log(1 - jnp.clip(jax.nn.sigmoid(h), 1e-6, 1 - 1e-6)),
}


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("logarithm", LOGARITHMS.values(), ids=LOGARITHMS)
def test_a_gradient_has_the_digits_that_its_unused_value_needs(logarithm, policy, rng):
    x, w = normal(rng, 64, 16), normal(rng, 16, 8)
    loss = lambda w: -jnp.mean(logarithm(x @ w))  # noqa: E731
    alone = jmp.autocast(jax.grad(loss), policy)(w)
    assert_identical(alone, jmp.autocast(jax.value_and_grad(loss), policy)(w)[1])
    assert relative(alone, jax.grad(loss)(w)) < 2e-2


@every_order
def test_the_slope_of_a_logarithm_meets_that_of_a_sigmoid(order, rng):
    """The first, times the loss scale, is beyond float16 where the second is tiny."""
    x, w = normal(rng, 64, 16), normal(rng, 16, 8, scale=1.5)
    loss = lambda w: -(2.0**14) * jnp.mean(jnp.log(jax.nn.sigmoid(x @ w) + 1e-7))  # noqa: E731
    assert relative(order(loss, "mixed_float16")(w), jax.grad(loss)(w)) < 2e-2


# --- Programs whose meaning hangs on a few digits ---


def memory_reused_at_every_step(x, q):
    memory = x @ jnp.eye(8)
    return lax.scan(lambda c, qt: (c + jnp.mean(memory * qt), None), jnp.float32(0), q)[0] / len(q)


@pytest.mark.parametrize("order", ["grad(autocast)", "autocast(grad)"])
def test_gradients_of_what_a_scan_reuses_are_added_up_in_float32(order):
    """In bfloat16 the sum of 4096 equal numbers would stop at the 256th."""
    args = jnp.ones((8, 8)), jnp.ones((4096, 8, 8))
    inside = jax.grad(low(memory_reused_at_every_step))
    gradient = inside if order == "grad(autocast)" else low(jax.grad(memory_reused_at_every_step))
    np.testing.assert_array_equal(gradient(*args), jax.grad(memory_reused_at_every_step)(*args))


def decay_of_a_product(h, w):
    return lax.scan(lambda e, _: (0.999 * e, None), h @ w, None, length=1000)[0]


def coordinates_and_offsets(x, w):
    places = jnp.arange(1024.0) + (x @ w)[:, 0]
    return jax.scipy.ndimage.map_coordinates(jnp.arange(1024.0), [places], order=1)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(
    ("fun", "args"),
    [
        (decay_of_a_product, (np.ones((2, 8), np.float32), np.ones((8, 2), np.float32))),
        (coordinates_and_offsets, (np.zeros((1024, 2), np.float32), np.zeros((2, 2), np.float32))),
    ],
    ids=["decay", "coordinates"],
)
def test_states_and_places_keep_their_digits(fun, args, policy):
    """A moving average that starts from a matmul; places in an array that come from one."""
    np.testing.assert_allclose(jmp.autocast(fun, policy)(*args), fun(*args), rtol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_scores_of_a_beam_are_added_up_in_float32(policy, rng):
    """Scores of -45 have a spacing of 0.25 in bfloat16, more than lies between the beams."""
    w, h0 = (jnp.asarray(rng.normal(size=shape) / 3, jnp.float32) for shape in ((8, 8), (4, 8)))

    def beam(w, h0):
        def step(carry, _):
            score, h = carry
            total = jnp.reshape(score[:, None] + jax.nn.log_softmax(h @ w), -1)
            score, place = lax.top_k(total, 4)
            return (score, jnp.tanh(h[place // 8])), None

        return lax.scan(step, (jnp.array([0, -1e9, -1e9, -1e9]), h0), None, length=30)[0][0]

    np.testing.assert_allclose(jmp.autocast(beam, policy)(w, h0), beam(w, h0), rtol=2**-9)


def masked_by_an_array(q, mask):
    smallest = float(jnp.finfo(jnp.float32).min)
    scores = q @ q.T + jnp.where(mask > 0, jnp.zeros((4, 4)), jnp.full((4, 4), smallest))
    return jax.nn.softmax(lax.cond(q[0, 0] > 0, lambda s: s, lambda s: s * 2, scores))


def masked_in_a_map(q, mask):
    smallest = float(jnp.finfo(jnp.float32).min)
    return lax.map(jax.nn.softmax, q @ q.T + (1 - mask) * smallest)


@pytest.mark.parametrize("fun", [masked_by_an_array, masked_in_a_map])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_row_masked_with_the_smallest_number_is_no_nan(fun, policy):
    """That number is beyond bfloat16, and would become minus infinity."""
    np.testing.assert_array_equal(jmp.autocast(fun, policy)(jnp.ones((4, 4)), jnp.zeros((4, 4)))[0], 0.25)


def test_a_mutable_array_that_is_closed_over_is_left_alone():
    ref = jax.new_ref(jnp.zeros((4, 8)))

    def add(x):
        ref[...] += x
        return x.sum()

    for call in (jmp.autocast(add, "mixed_bfloat16"), jax.jit(jmp.autocast(add, "mixed_bfloat16"))):
        assert call(jnp.ones((4, 8))) == 32
    assert ref[...].sum() == 64


def test_random_numbers_are_the_same_bits_in_a_low_region(key):
    draw = jmp.low_precision(lambda key: (jax.random.normal(key, (1000,)), jax.random.bernoulli(key, 0.3, (1000,))))
    for found, expected in zip(jmp.autocast(draw, "mixed_bfloat16")(key), draw(key), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_parameter_scaled_by_a_low_number_keeps_its_digits(rng):
    """Weight decay by a factor that comes from a matmul: the parameter is data of its own."""
    p, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((64, 64), (1, 16)))

    def decayed(p, x):
        return p * (1 - 1e-4 * jnp.tanh(x @ x.T)[0, 0])

    np.testing.assert_allclose(low(decayed)(p, x), decayed(p, x), rtol=2**-20)


# --- What is scaled, shifted or subtracted is rounded once, after ---


def divergence(z, other):
    """Of two distributions that are nearly the same."""
    p, q = jax.nn.log_softmax(z), jax.nn.log_softmax(lax.stop_gradient(other))
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))


def normed(h):
    h = h - jnp.mean(h, -1, keepdims=True)
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)


#: Functions of a matmul, its weight and its operand; the errors that value and gradient may have.
ROUNDED_ONCE = {
    "two discounts": (
        lambda z, w, x: jnp.mean(jnp.square((z * 0.99 - jnp.roll(z, 1, 0) * 0.97) @ w)),
        ULP / 2,
        4 * ULP,
    ),
    "divergence": (lambda z, w, x: divergence(z, z + 0.3 * jnp.tanh(x @ w)), ULP, 4 * ULP),
    "far from zero": (lambda z, w, x: jnp.mean(jnp.square(jnp.tanh(normed(z + 30.0) @ w) - x)), ULP / 2, 4 * ULP),
}


@pytest.mark.parametrize("name", ROUNDED_ONCE)
@pytest.mark.parametrize("is_inside", [True, False], ids=ORDERS)
def test_what_is_scaled_or_shifted_is_rounded_once(name, is_inside, rng):
    fun, of_value, of_grad = ROUNDED_ONCE[name]
    jit = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    w, x = normal(rng, 32, 32, scale=32**-0.5), jnp.tanh(normal(rng, 64, 32))
    loss = lambda w: fun(x @ w, w, x)  # noqa: E731
    value, grad = jit(jax.value_and_grad(low(loss)) if is_inside else low(jax.value_and_grad(loss)))(w)
    expected_value, expected_grad = jit(jax.value_and_grad(loss))(w)
    assert relative(value, expected_value) < of_value
    assert relative(grad, expected_grad) < of_grad


#: Losses of the result of a matmul, in which a number scales it.
TEMPERED = {
    "contrast": lambda z, number: -jnp.mean(jnp.diag(jax.nn.log_softmax(z / number))),
    "distillation": lambda z, number: divergence(z / number, jnp.roll(z, 1, 0) / number) * number**2,
    "cap": lambda z, number: jnp.mean(jax.nn.logsumexp(jnp.tanh(z * number) / number, -1)),
    "likelihood": lambda z, number: jnp.mean(jnp.exp(z * number)),
}


#: In the gradient of the second, seen from outside, the value is dead code, and both forms round the logits.
TEMPERED_IN = [(name, True) for name in TEMPERED] + [(name, False) for name in TEMPERED if name != "distillation"]


@pytest.mark.parametrize(("name", "is_inside"), TEMPERED_IN)
def test_a_number_scales_logits_as_precisely_as_an_array(name, is_inside, rng):
    """An array is not rounded to 16 bits, and neither is what it scales: the consumers want float32."""
    fun, w, x = TEMPERED[name], normal(rng, 32, 64), normal(rng, 64, 32)
    jit = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    loss = lambda w, number: fun(x @ w, number)  # noqa: E731
    exact = jit(jax.grad(loss))(w, 0.07)
    of_array = jit(jax.grad(low(loss)) if is_inside else low(jax.grad(loss)))(w, jnp.float32(0.07))
    loss = lambda w: fun(x @ w, 0.07)  # noqa: E731
    of_number = jit(jax.grad(low(loss)) if is_inside else low(jax.grad(loss)))(w)
    assert relative(of_number, exact) < 1.1 * relative(of_array, exact)
