"""Formats of moments and of parameters: right on average, exact where they can be, and never silent about NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparisons import slow_but_for

from jmp_lite._rounding import counted_bits, key_at, step_key
from jmp_lite.optim import Float, Log, Ratio, SignedLog
from jmp_lite.optim._moments import FORMATS
from jmp_lite.optim._weights import WEIGHT_FORMATS

DRAWS = 1_000_000
ROOT = np.float32(1e-3)  # of the second moment that ratios are relative to


def codes(one):
    """Every number that a format of 8 bits has, as it is stored."""
    return np.arange(256).astype(np.uint8).astype(one.dtype)


def beside(one, shape):
    """The second moment that a ratio is relative to."""
    return None if one.relative_to is None else np.full(shape, ROOT**2)


@functools.cache
def compiled(one):
    """The two functions of a format, of moments or of parameters."""
    return jax.jit(one.encode, static_argnums=2 if one in WEIGHT_FORMATS.values() else ()), jax.jit(one.decode)


def round_trip(one, value, bits):
    """Numbers after they were stored, in float64."""
    (encode, decode), other = compiled(one), beside(one, value.shape)
    return np.float64(decode(encode(value, bits, other), other))


def numbers(name):
    """All finite numbers of a format, in order, in float64."""
    one = FORMATS[name]
    if isinstance(one, Float):
        with np.errstate(invalid="ignore"):  # of NaN that signal
            found = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(one.dtype).astype(np.float64)
    else:
        found = np.float64(compiled(one)[1](codes(one), beside(one, (256,))))
    return np.unique(found[np.isfinite(found)])


bits_of = jax.jit(counted_bits, static_argnums=1)


def random_bits(seed, shape=(DRAWS,)):
    return bits_of(step_key(seed % 2**32, jnp.uint32(0)), shape)


STOCHASTIC = ["bfloat16", "float16", "log", "slog", "ratio"]
#: From far below the smallest number of a format to beyond the largest; subnormal numbers of 16 bits among them.
MAGNITUDES = [1e-12, 3.3e-9, 1e-7, 2.1e-5, 1e-3, 7.7e-3, 0.6, 13.0]


@pytest.mark.parametrize("generator", slow_but_for(("counted",), ("counted", "threefry")))
@pytest.mark.parametrize("name", slow_but_for(("float16", "log", "ratio"), STOCHASTIC))
def test_rounding_is_right_on_average(name, generator, seed):
    """The mean is off by less than four standard errors, and each neighbor is as frequent as it should be.

    Of the frequency chi-squared with one degree of freedom is the square of the same z.
    """
    one, grid = FORMATS[name], numbers(name)
    for i, magnitude in enumerate([*MAGNITUDES, *(-m for m in MAGNITUDES)]):
        value = np.float32(magnitude)
        if not grid[0] < value < grid[-1]:
            continue
        key = jax.random.key(seed % 2**31 + i)
        bits = random_bits(seed + i) if generator == "counted" else jax.random.bits(key, (DRAWS,))
        found = round_trip(one, np.full(DRAWS, value), bits)
        above = grid[np.searchsorted(grid, np.float64(value))]
        below = grid[np.searchsorted(grid, np.float64(value), side="right") - 1]
        near = 2.0**-22 if name == "ratio" else 0  # numbers of a ratio are products, each rounded once
        assert np.all((np.abs(found - below) <= near * abs(below)) | (np.abs(found - above) <= near * abs(above)))
        probability = (np.float64(value) - below) / (above - below) if above > below else 0.0
        ups = np.count_nonzero(found > (below + above) / 2)
        sigma = np.sqrt(DRAWS * max(probability * (1 - probability), 1 / DRAWS))
        resolution = DRAWS * 2.0**-20  # of 24 random bits, and of a ratio that is computed in float32
        assert abs(ups - DRAWS * probability) < 4 * sigma + resolution, (name, magnitude)


@pytest.mark.parametrize("extra", [8, 16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_split_parameters_are_right_on_average(extra, dtype, seed):
    """Also where an update is far below what is kept: 1 + 2**-22 under 24 bits."""
    encode, decode = compiled(WEIGHT_FORMATS[f"split{extra}"])
    for i, value in enumerate(np.float32([1 + 2.0**-22, -0.3, 7e-5, 3.1e-6, 1.9999999, -255.99])):
        seen, low = encode(np.full(DRAWS, value), random_bits(seed + i), jnp.dtype(dtype))
        found = np.float64(decode(seen, low))
        spread = max(found.std(), np.float64(np.abs(value)) * 2.0**-24)
        assert abs(found.mean() - np.float64(value)) < 4 * spread / np.sqrt(DRAWS) + 2.0**-42
        nearest = np.float32(np.asarray(value).astype(jnp.dtype(dtype)))
        unit = 2.0 ** np.floor(np.log2(abs(value))) * float(jnp.finfo(dtype).eps)
        assert np.all(np.abs(np.float32(seen) - nearest) <= max(unit, 2.0**-24))


@pytest.mark.parametrize("name", slow_but_for(("float16", "slog", "ratio"), STOCHASTIC))
def test_numbers_of_a_format_stay_what_they_are(name, rng):
    """Whatever the random bits; a ratio is computed, and moves with the probability of a rounding error."""
    grid = np.float32(numbers(name))
    for _ in range(20):
        found = round_trip(FORMATS[name], grid, rng.integers(0, 2**32, grid.shape, np.uint32))
        if name == "ratio":
            step = np.diff(grid, append=np.inf) + np.diff(grid, prepend=-np.inf)
            assert np.mean(np.float32(found) != grid) < 0.05
            assert np.all(np.abs(found - grid) <= step)
        else:
            np.testing.assert_array_equal(np.float32(found), grid)


def special(x):
    return np.float32([np.inf, -np.inf, np.nan, 0.0, x])


@pytest.mark.parametrize("name", STOCHASTIC)
def test_what_is_not_finite_stays_visible(name, rng):
    """A NaN in a moment must not become a number; zero is zero."""
    found = round_trip(FORMATS[name], special(1e-3), rng.integers(0, 2**32, 5, np.uint32))
    assert not np.isfinite(found[:3]).any()
    assert found[3] == 0
    assert np.isfinite(found[4])


@pytest.mark.parametrize("params", ["nearest", "stochastic", "split8", "split16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_that_are_not_finite_stay_so(params, dtype, rng):
    """Infinity and NaN of all bits, as GPUs make it, and the signs of zeros."""
    values = np.append(special(-0.0), np.uint32([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00001]).view(np.float32))
    bits = rng.integers(0, 2**32, values.shape, np.uint32)
    encode, decode = compiled(WEIGHT_FORMATS[params])
    seen, low = encode(values, bits, jnp.dtype(dtype))
    for found in (np.float32(seen), np.float32(decode(seen, low))):
        np.testing.assert_array_equal(np.isnan(found), np.isnan(values))
        np.testing.assert_array_equal(found[:2], values[:2])
        np.testing.assert_array_equal(found[3:5], 0)
        np.testing.assert_array_equal(np.signbit(found[3:5]), [False, True])


def test_float32_is_kept_to_the_last_bit(rng):
    """In 16 + 16 bits of bfloat16, for all words; in those of float16, for all numbers from 2**-17 to 65504."""
    words = rng.integers(0, 2**32, 1_000_000, np.uint32)
    full = words.view(np.float32)
    finite = np.isfinite(full) & (np.abs(full) < 3.3e38) & (words % 2**31 >= 2**15)
    encode, decode = compiled(WEIGHT_FORMATS["split16"])

    def kept(full, dtype):
        seen, low = encode(full, np.zeros(full.shape, np.uint32), jnp.dtype(dtype))
        return np.asarray(seen), np.asarray(decode(seen, low))

    seen, back = kept(full, "bfloat16")
    np.testing.assert_array_equal(back[finite].view(np.uint32), words[finite])
    with np.errstate(invalid="ignore"):  # of NaN that signal
        nearest = full.astype(jnp.bfloat16).astype(np.float32)
    ties = words & 0xFFFF == 0x8000
    np.testing.assert_array_equal(np.float32(seen)[finite & ~ties], nearest[finite & ~ties])
    inside = np.float32(
        rng.uniform(1, 2, 100_000) * 2.0 ** rng.integers(-17, 15, 100_000) * rng.choice([-1, 1], 100_000)
    )
    seen, back = kept(inside, "float16")
    np.testing.assert_array_equal(back, inside)
    np.testing.assert_array_equal(
        np.abs(np.float32(seen) - inside), np.abs(inside.astype(np.float16) - inside)
    )  # ties go up
    below = np.float32(rng.uniform(-1, 1, 100_000) * 2.0**-15)
    assert np.max(np.abs(kept(below, "float16")[1] - below)) < 2.0**-40
    np.testing.assert_array_equal(kept(np.float32([1e5, -1e5]), "float16")[0], np.float16([65504, -65504]))


@pytest.mark.parametrize("name", ["split8", "split16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_pair_of_halves_is_kept(name, dtype, rng):
    """What was decoded is encoded to the same two numbers."""
    encode, decode = compiled(WEIGHT_FORMATS[name])
    full = np.float32(rng.standard_normal(10_000) * 10.0 ** rng.integers(-3, 4, 10_000))
    once = encode(full, rng.integers(0, 2**32, 10_000, np.uint32), jnp.dtype(dtype))
    again = encode(decode(*once), rng.integers(0, 2**32, 10_000, np.uint32), jnp.dtype(dtype))
    np.testing.assert_array_equal(once[0], again[0])
    np.testing.assert_array_equal(once[1], again[1])


@pytest.mark.parametrize(
    ("one", "largest", "smallest"),
    [
        (Log(), 160.0, 2.0**-56),
        (Log(highest=20), 1.25 * 2.0**20, 2.0**-43),
        (SignedLog(), 24.0, 2.0**-27),
        (SignedLog(highest=0), 1.5, 2.0**-31),
        (Ratio(), 8 * ROOT, 8 * ROOT / 253),
        (Ratio(bound=32.0), 32 * ROOT, 32 * ROOT / 253),
    ],
    ids=repr,
)
def test_range(one, largest, smallest, seed):
    """Beyond the largest number is the largest; below the smallest is that or zero, right on average."""
    beyond = round_trip(one, jnp.float32([1e30, 2 * largest]), jnp.uint32([0, 2**32 - 1]))
    np.testing.assert_allclose(beyond, largest, rtol=2.0**-22)
    below = round_trip(one, np.full(DRAWS, np.float32(smallest / 3)), random_bits(seed))
    np.testing.assert_allclose(np.unique(below), [0, smallest], rtol=2.0**-20)
    assert abs(np.mean(below > 0) - 1 / 3) < 4 * np.sqrt(2 / 9 / DRAWS)


# --- Random bits --------------------------------------------------------------------------------


def test_leaves_steps_and_seeds_have_nothing_in_common(rng):
    """Correlations of the halves of words, and of one leaf with another, are those of chance."""
    n = 1 << 16
    seed = int(rng.integers(2**31))

    def draw(step, path, seed=seed):
        return np.asarray(bits_of(key_at(step_key(seed, jnp.uint32(step)), path), (n,)))

    base = draw(0, "a/kernel")
    others = [draw(0, f"b{i}/kernel") for i in range(20)] + [draw(i, "a/kernel") for i in range(1, 21)]
    others += [draw(0, "a/kernel", seed + i) for i in range(1, 11)] + [base >> 16, np.roll(base, 1), np.roll(base, 64)]

    def centered(words, shift=16):
        return ((words >> shift) & 0xFFFF) / 2**16 - 0.5

    for other in others:
        shift = 0 if other.max() < 2**16 else 16
        z = np.mean(centered(base, 0 if shift == 0 else 16) * centered(other, shift)) * 12 * np.sqrt(n)
        if shift == 0:
            z = np.mean(centered(base, 0) * centered(base, 16)) * 12 * np.sqrt(n)
        assert abs(z) < 5
    # Of 2 * 65536 words of 32 bits about one is in both by chance.
    assert np.isin(base, others[0]).sum() < 12
    assert np.isin(base, others[20]).sum() < 12
    assert len(np.unique(base)) > n - 12
