"""Counts and moments beside NumPy in float64; the fate of numbers beside real casts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparisons import slow_but_for

from jmp_lite.analysis._ranges._formats import FORMATS
from jmp_lite.analysis._ranges._range import range_of
from jmp_lite.analysis._ranges._tally import merged, tally

#: Sums go in rounds of 16, each number through at most 15 additions per round: 5 rounds for 2**20 of them. Errors of
#: one sign would be 75 * 2**-24; those of rounding are of both.
MOMENTS = 1e-6


def normal(rng, size):
    return rng.normal(size=size)


def wide(rng, size):
    return rng.choice([-1, 1], size) * 2.0 ** rng.uniform(-140, 127.9, size)


def ties(rng, size):
    """Numbers on the edges of the formats and right beside them."""
    values = []
    for name in FORMATS:
        info = jnp.finfo(name)
        least, small, large = (float(v) for v in (info.smallest_subnormal, info.smallest_normal, info.max))
        values += [least / 2, least, small - least / 2, small, large, large * (1 + 2.0 ** -(info.nmant + 2))]
    values = np.array(values, np.float32)
    with np.errstate(over="ignore"):
        near = np.concatenate([values, np.nextafter(values, np.float32(0)), np.nextafter(values, np.float32(np.inf))])
    return rng.choice(near, size)


def holed(rng, size):
    return rng.choice([0.0, -0.0, math.nan, math.inf, -math.inf, 1.0, 1e-30, 3e38], size)


def subnormal(rng, size):
    """Numbers that some platforms flush to zero."""
    return rng.choice([-1, 1], size) * rng.integers(1, 1 << 23, size) * 2.0**-149


def zeros(rng, size):
    return np.zeros(size)


DRAWS = {draw.__name__: draw for draw in (normal, wide, ties, holed, subnormal, zeros)}
SHAPES = [(), (1,), (3, 5), (17, 1000), (2, 3, 4, 5), (1 << 18,)]


def reference(x):
    x = x.astype(np.float64)
    finite = x[np.isfinite(x)]
    magnitudes = np.abs(finite[finite != 0])
    return {
        "count": x.size,
        "nan": int(np.isnan(x).sum()),
        "inf": int(np.isinf(x).sum()),
        "zero": int((x == 0).sum()),
        "largest": magnitudes.max(initial=0),
        "smallest": magnitudes.min(initial=math.inf),
    }, finite


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "dtype", slow_but_for(("float32", "float8_e5m2"), ["float32", "float16", "bfloat16", "float8_e5m2"])
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("draw", DRAWS)
def test_counts_and_moments_are_those_of_numpy(draw, shape, dtype, rng):
    with np.errstate(over="ignore"):
        x = DRAWS[draw](rng, shape).astype(np.float32).astype(np.dtype(getattr(jnp, dtype)))
    found = range_of(tally(jnp.asarray(x)))
    counts, finite = reference(x)
    for name, value in counts.items():
        assert getattr(found, name) == pytest.approx(value, rel=0, abs=0), name
    if finite.size:
        rms = math.sqrt(np.mean(np.square(finite)))
        assert found.rms == pytest.approx(rms, rel=MOMENTS, abs=1e-45)
        assert found.mean == pytest.approx(finite.mean(), rel=MOMENTS, abs=MOMENTS * max(rms, 1e-45))
    exponents = np.frexp(np.abs(finite[finite != 0]))[1] - 1
    expected = dict(zip(*np.unique(np.maximum(exponents, -127), return_counts=True), strict=True))
    assert dict(found.exponents) == expected


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("draw", ["normal", "wide", "ties", "subnormal"])
def test_fates_are_those_of_a_cast(draw, name, rng):
    x = DRAWS[draw](rng, 40_000).astype(np.float32)
    fate = range_of(tally(jnp.asarray(x))).fates[name]
    dtype = np.dtype(getattr(jnp, name))
    with np.errstate(over="ignore"):
        cast = x.astype(dtype).astype(np.float64)
    nonzero, fits = x != 0, np.isfinite(cast)
    assert fate.overflow == pytest.approx(np.mean(~fits), abs=0)
    assert fate.underflow == np.mean(cast[nonzero] == 0)
    is_small = (cast != 0) & (np.abs(cast) < float(jnp.finfo(name).smallest_normal))
    assert fate.subnormal == np.mean(is_small[nonzero])
    error = np.sqrt(np.sum((cast - x)[fits] ** 2) / np.sum(x.astype(np.float64) ** 2))
    assert fate.rms_error == pytest.approx(error, rel=1e-5)


def test_int8_is_rounded_by_a_scale_from_the_largest(rng):
    x = (rng.normal(size=5000) ** 3).astype(np.float32)
    fate = range_of(tally(jnp.asarray(x))).fates["int8"]
    scale = np.abs(x).max() / np.float32(127)
    rounded = np.round(x / scale) * scale
    assert fate.underflow == np.mean(rounded == 0)
    error = math.sqrt(np.sum((rounded - x).astype(np.float64) ** 2) / np.sum(x.astype(np.float64) ** 2))
    assert fate.rms_error == pytest.approx(error, rel=1e-5)


def test_tallies_of_parts_add_up_to_that_of_the_whole(rng):
    parts = [wide(rng, 1000).astype(np.float32), normal(rng, 500).astype(np.float32), np.zeros(7, np.float32)]
    whole = range_of(tally(jnp.asarray(np.concatenate(parts))))
    summed = range_of(
        jax.jit(merged)(tally(jnp.asarray(parts[0])), merged(*(tally(jnp.asarray(p)) for p in parts[1:])))
    )
    for name in ("count", "zero", "largest", "smallest", "exponents"):
        assert getattr(summed, name) == getattr(whole, name)
    assert summed.rms == pytest.approx(whole.rms, rel=MOMENTS)
    assert summed.mean == pytest.approx(whole.mean, rel=MOMENTS)


@pytest.mark.parametrize(("value", "headroom"), [(32752.0, 1.0), (65504.0, 0.0), (1.0, math.log2(65504))])
def test_headroom_counts_doublings(value, headroom):
    assert range_of(tally(jnp.float32(value))).fates["float16"].headroom == pytest.approx(headroom)
