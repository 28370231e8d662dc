"""Calibration: scales that are fixed by data, from wherever a product stands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.comparisons import slow_but_for
from support.lowbit import BOUNDS, MATMUL, amax, normal, relative

import jmp_lite as jmp
from jmp_lite import quant


def test_calibration_fixes_scales(rng):
    """Scales are those of all data; later inputs saturate, and each row is quantized like any other."""
    w = normal(rng, 16, 8)
    batches = [(w, normal(rng, 4, 16) * scale) for scale in (1, 3, 2)]
    static = functools.partial(quant.W8A8_STATIC, dimension_numbers=MATMUL)
    model = quant.delayed(lambda w, x: static(x, w))
    histories = quant.calibrate(model, batches)
    assert histories["dot"].shape == (3, 1)
    largest = max(amax(x) for _, x in batches)
    assert float(histories["dot"][0, 0]) == largest
    run = jax.jit(functools.partial(model, histories))
    for _, x in batches:
        assert relative(run(w, x), x @ w) < 0.015 * largest / amax(x) * 2
        np.testing.assert_array_equal(run(w, x)[:1], run(w, x[:1]))
    clipped = jnp.clip(100 * batches[0][1], -largest, largest)
    assert relative(run(w, 100 * batches[0][1]), clipped @ w) < 0.015
    bad = run(w, batches[0][1].at[1, 2].set(np.inf))
    assert not np.any(np.isfinite(bad[1]))


def test_calibration_needs_data():
    with pytest.raises(jmp.errors.InvalidRecipeError, match="no batches"):
        quant.calibrate(quant.delayed(lambda x: x), [])


def in_while(w, x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x))[1]


def in_scan(w, x):
    return lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=3)[0]


def in_cond(w, x):
    return in_scan(w, lax.cond(x[0, 0] > x[0, 0] + 1, lambda: x @ w, lambda: x))


CALIBRATED = {
    "while": in_while,
    "scan": in_scan,
    "checkpoint": jax.checkpoint(in_scan),
    "cond": in_cond,
    "vmap": lambda w, x: jax.vmap(lambda row: in_scan(w, row))(x),
}


@pytest.mark.parametrize("case", slow_but_for(("scan", "cond"), CALIBRATED))
def test_calibration_finds_the_largest_of_all_iterations(case, rng):
    """Not their sum, which would leave an int8 product a fraction of its numbers."""
    w, x = normal(rng, 16, 16) / 4, normal(rng, 4, 16)
    seen = [x]
    for _ in range(2):
        seen.append(jnp.tanh(seen[-1] @ w))
    model = quant.delayed(jmp.autocast(CALIBRATED[case], "full", dot=quant.W8A8_STATIC))
    histories = quant.calibrate(model, [(w, x / 2), (w, x)])
    [(found, of_weight)] = {tuple(map(float, h[:2, 0])) for h in histories.values() if float(h[0, 0]) > 0}
    np.testing.assert_allclose([found, of_weight], [max(map(amax, seen)), amax(w)], rtol=0.1)
    assert relative(model(histories, w, x), CALIBRATED[case](w, x)) < 0.1


def test_calibration_takes_what_is_no_array():
    """Flags and keyword arguments are part of the program."""
    model = quant.delayed(lambda x, flag, *, scale: quant.W8A8_STATIC(x, x, MATMUL) if flag else x * scale)
    x = jnp.eye(4)
    assert list(quant.calibrate(model, [(x, True)], scale=2.0)) == ["dot"]
    assert quant.calibrate(model, [(x, False)], scale=2.0) == {}


def test_what_calibration_has_not_seen_has_scales_of_its_own(rng):
    """A branch that no batch took is no branch of int8 numbers with a scale of one."""
    w, x = 1e-3 * normal(rng, 16, 8), 1e-3 * normal(rng, 4, 16)

    def branches(w, x, flag):
        return lax.cond(flag, lambda: x @ w, lambda: x[:, :8])

    model = quant.delayed(jmp.autocast(branches, "full", dot=quant.W8A8_STATIC))
    histories = quant.calibrate(model, [(w, x, jnp.array(False))])
    assert relative(model(histories, w, x, jnp.array(True)), x @ w) < BOUNDS["int8_qat"] * 2
