"""Scales and rounding: what 8-bit numbers stand for, exactly."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support.lowbit import FORMATS, grid, normal, relative

from jmp_lite import errors, quant
from jmp_lite._rounding import counted_bits, stochastic_round

formats = pytest.mark.parametrize("name", FORMATS)
#: Rounding error of float32.
ULP = 2.0**-23
#: Floating dtypes that are rounded to at random, and exponents of numbers to try: normal and subnormal ones.
ROUNDED_TO = {
    "e4m3": (ml_dtypes.float8_e4m3fn, (-9, 7)),
    "e5m2": (ml_dtypes.float8_e5m2, (-16, 14)),
    "float16": (np.float16, (-24, 14)),
    "bfloat16": (ml_dtypes.bfloat16, (-110, 110)),
}


def round_trip(x, name, *, pow2=False, axis=None):
    scale = quant.absmax_scale(jnp.max(jnp.abs(x), axis=axis, keepdims=axis is not None), name, pow2=pow2)
    return quant.quantize(x, name, scale), scale


# --- Scales ---------------------------------------------------------------------------------------


@formats
def test_a_scale_is_the_largest_magnitude_over_the_largest_number_of_the_format(name, rng):
    amax = np.float32(10.0 ** rng.uniform(-20, 20, 1000))
    scale = quant.absmax_scale(jnp.asarray(amax), name)
    assert scale.dtype == jnp.float32
    np.testing.assert_allclose(np.float64(scale), np.float64(amax) / FORMATS[name][1], rtol=1.5 * ULP)


@formats
@pytest.mark.parametrize("pow2", [False, True])
def test_amax_that_makes_no_scale(name, pow2):
    tiny = 2.0**-126 * FORMATS[name][1]
    amax = jnp.array([0.0, 1e-45, 1e-40, 0.49 * tiny, np.inf, np.nan, 4 * tiny], jnp.float32)
    scale = quant.absmax_scale(amax, name, pow2=pow2)
    np.testing.assert_array_equal(scale[:4], 1.0)
    assert np.isposinf(scale[4])
    assert np.isnan(scale[5])
    assert 2.0**-126 < scale[6] <= 2.0**-124


@formats
def test_powers_of_two_are_exact_and_never_clip(name, rng):
    amax = np.float32(10.0 ** rng.uniform(-20, 20, 1000))
    scale = np.float64(quant.absmax_scale(jnp.asarray(amax), name, pow2=True))
    assert set(np.frexp(scale)[0]) == {0.5}
    used = np.float64(amax) / scale / FORMATS[name][1]
    assert np.all((used > 0.5) & (used <= 1))


@formats
def test_the_largest_number_of_a_format_has_the_scale_one(name):
    powers = 2.0 ** np.arange(-60, 60)
    scale = quant.absmax_scale(jnp.asarray(powers * FORMATS[name][1], jnp.float32), name, pow2=True)
    np.testing.assert_array_equal(scale, np.float32(powers))
    just_above = np.nextafter(np.float32(powers * FORMATS[name][1]), np.float32(np.inf))
    used = np.float64(just_above) / np.float64(quant.absmax_scale(jnp.asarray(just_above), name, pow2=True))
    assert np.all(used <= FORMATS[name][1] * (1 + ULP))  # clipping takes no more than rounding does


@formats
@pytest.mark.parametrize("pow2", [False, True])
def test_a_margin_is_a_power_of_two(name, pow2, rng):
    amax = jnp.asarray(rng.uniform(0.1, 10, 100), jnp.float32)
    for margin in (-2, 1, 3):
        scale = quant.absmax_scale(amax, name, margin=margin, pow2=pow2)
        np.testing.assert_array_equal(scale, 2.0**margin * quant.absmax_scale(amax, name, pow2=pow2))


# --- Rounding to nearest --------------------------------------------------------------------------


@formats
def test_finite_values_saturate(name):
    largest = FORMATS[name][1]
    x = jnp.array([largest * 1.5, -largest * 3, 3e38, -3e38], jnp.float32)
    found = quant.quantize(x, name, jnp.float32(1))
    np.testing.assert_array_equal(np.float64(found), [largest, -largest, largest, -largest])


@formats
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_visible(name, bad):
    x = jnp.array([1.0, bad, -2.0], jnp.float32)
    if name != "int8":  # which has no number for it
        found = np.float32(quant.quantize(x, name, jnp.float32(1)))
        np.testing.assert_array_equal(found, [1, np.nan, -2])
    q, scale = round_trip(x, name)
    assert not np.any(np.isfinite(quant.dequantize(q, scale)))


@formats
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.3])
def test_rounding_is_that_of_numpy(name, scale, rng):
    dtype, largest, smallest = FORMATS[name]
    x = np.float32(rng.choice([-1, 1], 4000) * np.exp(rng.uniform(np.log(smallest / 4), np.log(2 * largest), 4000)))
    scaled = np.clip(x / np.float32(scale), -largest, largest)
    expected = np.round(scaled).astype(dtype) if name == "int8" else scaled.astype(dtype)
    found = quant.quantize(jnp.asarray(x), name, jnp.float32(scale))
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.float32(found), np.float32(expected))


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("int8", [0.5, 1.5, 2.5, -0.5, -1.5, 126.5], [0, 2, 2, 0, -2, 126]),
        ("e4m3", [17, 19, -17, -19, 2.0**-10, 3 * 2.0**-10], [16, 20, -16, -20, 0, 2.0**-8]),
        ("e5m2", [4.5, 5.5, -4.5, -5.5, 2.0**-17, 3 * 2.0**-17], [4, 6, -4, -6, 0, 2.0**-15]),
    ],
)
def test_ties_go_to_even(name, x, expected):
    found = quant.quantize(jnp.array(x, jnp.float32), name, jnp.float32(1))
    np.testing.assert_array_equal(np.float32(found), np.float32(expected))


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.013), ("e4m3", 0.03), ("e5m2", 0.06)])
def test_round_trips_of_normal_numbers(name, bound, rng):
    x = normal(rng, 40, 1024)  # pooled: the largest of 1024 numbers varies
    q, scale = round_trip(x, name, axis=1)
    assert bound / 3 < relative(quant.dequantize(q, scale), x) < bound


def test_int8_is_off_by_half_a_step_at_most(rng):
    x = normal(rng, 40, 1024)
    q, scale = round_trip(x, "int8", axis=1)
    error = jnp.abs(quant.dequantize(q, scale) - x) / jnp.max(jnp.abs(x), axis=1, keepdims=True)
    assert float(jnp.max(error)) <= 0.004


@pytest.mark.covering(2)
@formats
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("recomputes", [False, True])
def test_a_second_round_trip_changes_nothing(name, pow2, recomputes, rng):
    x = normal(rng, 50, 256) * jnp.asarray(10.0 ** rng.uniform(-15, 15, (50, 1)), jnp.float32)
    q, scale = round_trip(x, name, pow2=pow2, axis=1)
    back = quant.dequantize(q, scale)
    again, new = round_trip(back, name, pow2=pow2, axis=1) if recomputes else (quant.quantize(back, name, scale), scale)
    if pow2 and recomputes:  # what was rounded down to half of the largest number has half the scale now
        np.testing.assert_array_equal(quant.dequantize(again, new), back)
    else:
        np.testing.assert_array_equal(np.float32(again), np.float32(q))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_stands_for_numbers_has_the_dtype_asked_for(dtype, rng):
    q, scale = round_trip(normal(rng, 64, dtype=dtype), "e4m3")
    found = quant.dequantize(q, scale, dtype)
    assert (scale.dtype, found.dtype) == (jnp.float32, dtype)
    np.testing.assert_array_equal(found, (q.astype(jnp.float32) * scale).astype(dtype))


# --- Rounding at random ---------------------------------------------------------------------------


def neighbors(x, dtype):
    """The numbers of a format below and above, in float64."""
    size = np.dtype(dtype).itemsize
    values = np.float64(np.arange(2 ** (8 * size), dtype=f"u{size}").view(dtype))
    values = np.unique(values[np.isfinite(values)])
    above = np.searchsorted(values, np.float64(x))
    return np.where(values[above] == x, x, values[above - 1]), values[above]


def bias_bound(x, below, above, draws):
    """How far the mean of many draws may be off: Bernstein's inequality, wrong once in 1e9 runs."""
    spacing = above - below
    variance = (x - below) * (above - x)
    log = np.log(2 * np.size(x) * 1e9)
    return np.sqrt(2 * variance * log / draws) + spacing * (log / (3 * draws) + 2 * ULP)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("name", ROUNDED_TO)
def test_stochastic_rounding_gives_one_of_two_neighbors_and_is_right_on_average(name, rng, key):
    dtype, exponents = ROUNDED_TO[name]
    x = np.float32(rng.choice([-1, 1], 48) * 2.0 ** rng.uniform(*exponents, 48))
    draws = 4000
    found = np.float64(
        stochastic_round(jax.random.bits(key, (draws, 48)), jnp.broadcast_to(x, (draws, 48)), np.dtype(dtype))
    )
    below, above = neighbors(x, dtype)
    assert np.all((found == below) | (found == above))
    error = np.abs(found.mean(0) - x)
    bound = bias_bound(np.float64(x), below, above, draws)
    assert np.all(error <= bound), (x[error > bound], error[error > bound])


@pytest.mark.parametrize("name", ROUNDED_TO)
def test_stochastic_rounding_of_what_needs_none(name, key):
    dtype = np.dtype(ROUNDED_TO[name][0])
    largest = float(ml_dtypes.finfo(dtype).max)
    x = np.float32([0.0, -0.0, 1.0, -1.5, largest, -largest, np.inf, -np.inf, np.nan])
    rounded = jax.jit(stochastic_round, static_argnums=2)
    found = rounded(jax.random.bits(key, (200_000, 9)), np.broadcast_to(x, (200_000, 9)), dtype)
    assert found.dtype == dtype
    expected = np.broadcast_to(np.float32(np.asarray(x).astype(dtype)), found.shape)
    np.testing.assert_array_equal(np.float32(found), expected)
    if name != "bfloat16":
        assert float(rounded(jax.random.bits(key), -3e38, dtype)) == -largest


@pytest.mark.parametrize("shape", [(), (7,), (64, 48), (3, 1, 5)], ids=str)
def test_counted_bits_are_those_of_each_member(shape, rng):
    """Members with their own seeds have the bits that each would have alone, sharded or not."""
    seeds = rng.integers(0, 2**32, 4, np.uint32)
    bits_of = jax.jit(counted_bits, static_argnums=1)
    together = np.asarray(bits_of(seeds.reshape(4, *[1] * len(shape)), (4, *shape)))
    for seed, bits in zip(seeds, together, strict=True):
        np.testing.assert_array_equal(bits, bits_of(seed, shape))
    assert together.dtype == np.uint32


def test_counted_bits_are_random(rng):
    """Each bit is set half the time; neighbors, and arrays whose seeds are neighbors, have nothing in common."""
    n = 1 << 16
    first = np.asarray(counted_bits(jnp.uint32(rng.integers(2**31)), (n,)))
    bits = np.unpackbits(first.view(np.uint8)).reshape(n, 32)
    six_sigma = 3 / np.sqrt(n)
    assert np.all(np.abs(bits.mean(0) - 0.5) < six_sigma)
    assert np.all(np.abs((bits[1:] == bits[:-1]).mean(0) - 0.5) < six_sigma)
    for seed in range(8):
        one, other = (np.asarray(counted_bits(jnp.uint32(seed + i), (n,))) for i in (0, 1))
        differ = np.unpackbits((one ^ other).view(np.uint8)).reshape(n, 32).mean(0)
        assert np.all(np.abs(differ - 0.5) < six_sigma)


@formats
def test_quantize_with_a_key(name, rng, key):
    _, largest, smallest = FORMATS[name]
    values, scale, draws = grid(name), np.float32(0.5), 4000
    x = np.float32(rng.uniform(-1, 1, 32) * 2.0 ** rng.uniform(np.log2(smallest), np.log2(largest), 32) * scale)
    found = np.float64(quant.quantize(jnp.broadcast_to(x, (draws, 32)), name, scale, key=key))
    scaled = np.float64(x / scale)
    above = np.searchsorted(values, scaled)
    below, above = np.where(values[above] == scaled, scaled, values[above - 1]), values[above]
    assert np.all((found == below) | (found == above))
    assert np.all(np.abs(found.mean(0) - scaled) <= bias_bound(scaled, below, above, draws))
    assert float(quant.quantize(jnp.float32(1e30), name, scale, key=key)) == largest


@formats
def test_a_key_decides(name, rng):
    x = normal(rng, 200)
    scale = quant.absmax_scale(jnp.max(jnp.abs(x)), name)
    first, again, other = (np.float32(quant.quantize(x, name, scale, key=jax.random.key(i))) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


# --- Fake quantization ----------------------------------------------------------------------------


def lsq(x, scale, cotangent, name):
    """The formulas of LSQ in float64; what is rounded is the float32 quotient, as ties decide by its last bit."""
    dtype, largest, _ = FORMATS[name]
    scaled = x / scale
    inside = np.abs(scaled) <= largest
    clipped = np.clip(scaled, -largest, largest)
    rounded = np.float64(np.round(clipped) if name == "int8" else clipped.astype(dtype))
    of_scale = np.where(inside, rounded - scaled, np.sign(scaled) * largest) * cotangent
    shared = tuple(i for i in range(x.ndim) if np.ndim(scale) == 0 or scale.shape[i] == 1)
    n = np.prod([x.shape[i] for i in shared])
    norm = np.sum(np.abs(of_scale), axis=shared, keepdims=np.ndim(scale) > 0) / np.sqrt(n * largest)
    summed = np.sum(of_scale, axis=shared, keepdims=np.ndim(scale) > 0) / np.sqrt(n * largest)
    return rounded * scale, np.where(inside, cotangent, 0), summed, norm


@pytest.mark.covering(1)
@formats
@pytest.mark.parametrize("shape", [(), (1, 16), (64, 1), (64, 16)], ids=["scalar", "per column", "per row", "each"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_fake_quant_follow_lsq(name, shape, dtype, rng):
    x = np.asarray(normal(rng, 64, 16, dtype=dtype))
    scale = np.float32(rng.uniform(0.8, 0.9, shape) / FORMATS[name][1])  # clips 40 % of normal numbers
    below, above = (lsq(np.float32(x) * np.float32(1 + sign * 4 * ULP), scale, 1.0, name) for sign in (-1, 1))
    is_far_from_ties = (below[0] == above[0]) & (below[1] == above[1])
    cotangent = np.asarray(normal(rng, 64, 16, dtype=dtype)) * is_far_from_ties
    value, pull = jax.vjp(lambda x, s: quant.fake_quant(x, s, name), jnp.asarray(x), jnp.asarray(scale))
    of_x, of_scale = pull(jnp.asarray(cotangent))
    expected = lsq(np.float32(x), scale, np.float64(cotangent), name)
    assert 0.3 < np.mean(expected[1] == 0) < 0.5
    assert (value.dtype, of_x.dtype, of_scale.dtype) == (dtype, dtype, jnp.float32)
    assert of_scale.shape == shape
    np.testing.assert_allclose(np.float64(value), expected[0], rtol=2 * float(jnp.finfo(dtype).eps))
    np.testing.assert_array_equal(np.float64(of_x), expected[1])
    assert np.all(np.abs(of_scale - expected[2]) <= 1024 * ULP * expected[3])


@formats
def test_fake_quant_has_one_derivative_forward_and_backward(name, rng):
    """Tangents are what the gradients say, also of a function that squares; the gradient has none."""
    x, dx, scale, dscale = (
        normal(rng, 8, 4),
        normal(rng, 8, 4),
        jnp.full((1, 4), 1 / FORMATS[name][1]),
        jnp.ones((1, 4)),
    )
    loss = lambda x, s: jnp.sum(quant.fake_quant(x, s, name) ** 2)  # noqa: E731
    _, tangent = jax.jvp(loss, (x, scale), (dx, dscale))
    of_x, of_scale = jax.grad(loss, (0, 1))(x, scale)
    np.testing.assert_allclose(tangent, jnp.sum(of_x * dx) + jnp.sum(of_scale * dscale), rtol=1e-5, atol=1e-5)
    slope = jax.grad(lambda x: jnp.sum(quant.fake_quant(x, scale, name)))
    assert not jnp.any(jax.jvp(slope, (x,), (dx,))[1])


@pytest.mark.parametrize(("learns_scale", "most"), [(False, 1), (True, 3)])
def test_bytes_per_number_that_fake_quant_keeps_for_the_backward_pass(learns_scale, most, rng):
    x, scale = normal(rng, 8, 16, dtype="bfloat16"), jnp.float32(0.5)
    of = (x, scale) if learns_scale else (x,)
    _, pull = jax.vjp(lambda x, s=scale: quant.fake_quant(x, s), *of)
    kept = {(leaf.dtype, leaf.shape): leaf.nbytes for leaf in jax.tree.leaves(pull) if leaf.ndim}
    assert sum(kept.values()) <= most * x.size, kept


@pytest.mark.parametrize(
    ("x", "scale", "said"),
    [
        (np.ones(3, np.float32), "int8", r"scale is 'int8'.*Write fake_quant\(x, scale, 'int8'\)"),
        (np.ones(3, np.int32), 0.3, r"floating array, got int32\[3\]"),
        (np.ones(3, np.complex64), 0.3, r"floating array, got complex64\[3\]"),
    ],
    ids=["a format as the scale", "integers", "complex"],
)
def test_what_fake_quant_refuses(x, scale, said):
    with pytest.raises(errors.InvalidRecipeError, match=said):
        quant.fake_quant(x, scale)


@formats
def test_fake_quant_hides_nothing_that_is_not_finite(name):
    """Integers hold neither; a loss scale must see it."""
    x = jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf])
    assert not jnp.isfinite(quant.fake_quant(x, jnp.float32(0.5), name))[1:].any()


@formats
def test_scales_of_the_largest_magnitude_clip_nothing(name, rng):
    x = normal(rng, 500)
    scale = quant.absmax_scale(jnp.max(jnp.abs(x)) * (1 + ULP), name)
    np.testing.assert_array_equal(jax.grad(lambda x: quant.fake_quant(x, scale, name).sum())(x), 1)
