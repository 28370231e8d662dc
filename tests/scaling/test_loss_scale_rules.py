"""Loss scales: when they grow and shrink, what they do to trees, and which settings are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparisons import assert_identical, with_scale_forced
from support.loss_scales import every_scale, on_device

import jmp_lite as jmp


def path_of(scale, verdicts):
    """The values of the scale after each verdict, as exponents of two."""
    exponents = []
    for verdict in verdicts:
        scale = scale.adjust(verdict == "+")
        exponents.append(int(np.log2(scale.loss_scale)))
    return exponents


# --- The automaton ---


@pytest.mark.parametrize("period", [1, 2, 7, 2000])
def test_growth_on_exactly_the_last_step_of_the_period(period):
    """The scale doubles after the period-th finite step in a row, not before and not after, each time."""
    scale = on_device(jmp.DynamicLossScale(2.0**4, period=period))

    def step(scale, _):
        scale = scale.adjust(True)
        return scale, scale.loss_scale

    _, values = jax.lax.scan(step, scale, length=2 * period + 1)
    growths = 1 + np.flatnonzero(np.diff(np.log2(np.concatenate([[2.0**4], values]))))
    np.testing.assert_array_equal(growths, np.arange(period, 2 * period + 2, period))


# Settings, verdicts, exponent of the scale after each.
AUTOMATON = {
    "overflow restarts the count": ({"period": 2}, "+-++", [4, 3, 3, 4]),
    "tolerance of two": ({"period": 2, "hysteresis": 2}, "-+-+-", [4, 4, 3, 3, 2]),
    "growth restores the tolerance": ({"period": 2, "hysteresis": 2}, "-++--", [4, 4, 5, 5, 4]),
    "one good step restores it": (
        {"period": 9, "hysteresis": 2, "consecutive_hysteresis": True},
        "-+-+--",
        [4, 4, 4, 4, 4, 3],
    ),
    "once used up, each overflow counts": ({"period": 9, "hysteresis": 3}, "-----", [4, 4, 3, 2, 1]),
    "grace after an overflow": ({"period": 2, "grace_steps": 1}, "++-++++++", [4, 5, 4, 4, 4, 5, 5, 6, 6]),
    "grace at the start": ({"period": 1, "grace_steps": 2, "counter": -2}, "++++", [4, 4, 5, 6]),
    "factor and back-off": ({"period": 1, "factor": 8, "backoff_factor": 0.25}, "+-+", [7, 5, 8]),
    "1 / factor by default": ({"period": 1, "factor": 4}, "+--", [6, 4, 2]),
    "growth beyond the maximum is refused": (
        {"period": 1, "factor": 4, "max_loss_scale": 2.0**7},
        "++-+",
        [6, 6, 4, 6],
    ),
    "at the maximum the count continues": ({"period": 2, "max_loss_scale": 2.0**4}, "+++-++", [4, 4, 4, 3, 3, 4]),
    "floor below one": ({"min_loss_scale": 2.0**-2}, "-------", [3, 2, 1, 0, -1, -2, -2]),
    "maximum equal to minimum": ({"period": 1, "min_loss_scale": 16.0, "max_loss_scale": 16.0}, "+-+-", [4, 4, 4, 4]),
    "start above the maximum": ({"period": 1, "max_loss_scale": 2.0**2}, "++-+-", [4, 4, 2, 2, 1]),
    "start below the minimum": ({"period": 1, "min_loss_scale": 2.0**6}, "+-+", [5, 6, 7]),
    "factor 1 never moves": ({"period": 1, "factor": 1}, "++--", [4, 4, 4, 4]),
    "not even outside the bounds": ({"factor": 1, "min_loss_scale": 2.0**6}, "+-", [4, 4]),
    "growth without back-off": ({"period": 1, "backoff_factor": 1.0}, "+-+", [5, 5, 6]),
}


@pytest.mark.parametrize(("settings", "verdicts", "expected"), AUTOMATON.values(), ids=AUTOMATON)
def test_automaton(settings, verdicts, expected):
    """Each rule of the automaton, on a short string of verdicts from a scale of 2**4."""
    assert path_of(jmp.DynamicLossScale(2.0**4, **settings), verdicts) == expected


@pytest.mark.parametrize("system", [None, "torch", "flax", "keras", "megatron", "deepspeed", "jmp"])
def test_scale_never_leaves_the_normal_numbers(system):
    """300 growths or back-offs leave a scale that still multiplies and divides exactly (Keras: inf, torch: 0)."""
    settings = {"period": 1, "counter": 0}
    if system is None:
        scale = jmp.DynamicLossScale(**settings, min_loss_scale=0, max_loss_scale=2.0**126)
    else:
        scale = jmp.DynamicLossScale.like(system, **settings)

    @jax.jit
    def run(scale, good):
        return jax.lax.scan(lambda s, _: ((n := s.adjust(good)), n.loss_scale), scale, length=300)

    lowest = max(scale.min_loss_scale, 2.0**-126)
    for start in (2.0**126, 2.0**24, 1.0, 2.0**-126):
        for good in (True, False):
            end, values = run(with_scale_forced(on_device(scale), start), jnp.array(good))
            assert np.all((values >= 2.0**-126) & (values <= 2.0**126))
            assert float(end.loss_scale) == (2.0**126 if good else lowest)
            assert float(end.unscale(end.scale(jnp.float32(1)))) == 1


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan, 2.0**-130, 2.0**127])
def test_scale_recovers_from_an_outside_edit(value):
    """A scale overwritten with a value that no method gives is back within the bounds after one bad step."""
    scale = with_scale_forced(jmp.DynamicLossScale(), value)
    for adjusted in (scale.adjust(False), jax.jit(lambda s: s.adjust(False))(scale)):
        assert 1 <= adjusted.loss_scale <= 2.0**24


# --- Scaling trees ---


@every_scale
def test_unscale_undoes_scale(make, rng):
    """Unscaling by a power of two restores values of every dtype exactly, by another scale within 1.5 ulp."""
    scale = make()
    tree = {
        "f32": jnp.asarray(rng.standard_normal(50), jnp.float32),
        "f16": jnp.asarray(rng.standard_normal(50), jnp.float16),
        "bf16": jnp.asarray(rng.standard_normal(50), jnp.bfloat16),
        "c64": jnp.asarray(rng.standard_normal(50) + 1j * rng.standard_normal(50), jnp.complex64),
        "f8": jnp.asarray(rng.standard_normal(5), jnp.float8_e4m3fn),
    }
    back = scale.unscale(scale.scale(tree))
    assert {k: v.dtype for k, v in back.items()} == dict.fromkeys(tree, jnp.float32) | {"c64": jnp.complex64}
    exact = np.log2(scale.loss_scale) % 1 == 0
    for name, value in tree.items():
        # Product, reciprocal and matmul again round once each: 3 * eps/2 relative, complex parts separately.
        error = 0 if exact else 1.5 * float(jnp.finfo(jnp.float32).eps)
        wide = np.asarray(value).astype(np.complex128)
        assert np.all(np.abs(np.asarray(back[name]).astype(np.complex128) - wide) <= error * np.abs(wide))


@pytest.mark.parametrize("scale", [jmp.StaticLossScale(2.0), jmp.DynamicLossScale(2.0)], ids=["static", "dynamic"])
def test_other_leaves_pass_through(scale, key):
    """Integers, booleans, keys, float0, None, strings and NumPy integers are the same objects afterwards."""
    tree = [jnp.int32(3), True, 7, key, np.zeros(3, jax.dtypes.float0), "name", np.int64(4), np.array([True]), None]
    for new in (scale.scale(tree), scale.unscale(tree)):
        assert all(a is b for a, b in zip(new, tree, strict=True))


def test_python_and_numpy_numbers_are_scaled():
    """Python floats and complex numbers, and NumPy arrays, are scaled like arrays."""
    scale = jmp.DynamicLossScale(4.0)
    scaled = scale.scale({"float": 1.5, "complex": 1j, "array": np.ones(2, np.float32), "scalar": np.float16(1)})
    assert_identical(
        scaled,
        {
            "float": jnp.float32(6),
            "complex": jnp.complex64(4j),
            "array": jnp.full(2, 4, "float32"),
            "scalar": jnp.float32(4),
        },
    )


# --- Static and none ---


def test_static_scale_is_structure():
    """A static scale has no leaves, crosses jit and scan unchanged, and a new value is a new trace."""
    scale = jmp.StaticLossScale(jnp.float32(8))
    assert jax.tree.leaves(scale) == []
    assert isinstance(scale.loss_scale, float)
    traces = []

    @jax.jit
    def step(scale, x):
        traces.append(scale)
        return scale.adjust(x > 0), scale.scale(x)

    for value in (8.0, 8.0, 16.0):
        out, scaled = step(jmp.StaticLossScale(value), jnp.float32(3))
        assert out == jmp.StaticLossScale(value)
        assert float(scaled) == 3 * value
    assert len(traces) == 2
    end, _ = jax.lax.scan(lambda s, x: (s.adjust(x), s.unscale(1.0)), scale, jnp.array([True, False]))
    assert end == scale


@pytest.mark.parametrize("make", [jmp.StaticLossScale, lambda s: jmp.DynamicLossScale(min_loss_scale=s)])
def test_traced_static_value_is_refused(make):
    """A traced value where structure is needed raises at once instead of leaking a tracer out of jit."""
    with pytest.raises(
        jmp.errors.InvalidLossScaleError, match=r"needs a Python number, got a traced value .*DynamicLossScale"
    ):
        jax.jit(make)(8.0)


def test_half_loss_does_not_overflow_under_a_static_scale():
    """A float16 loss is scaled in float32: 3 * 2**15 is not infinite (it is with jmp)."""
    for scale in (
        jmp.StaticLossScale(2**15),
        jmp.DynamicLossScale(2.0**15),
        jmp.DynamicLossScale(jnp.asarray(2.0**15)),
    ):
        assert float(scale.scale(jnp.float16(3))) == 98304


def test_noop_scale_returns_the_tree_itself():
    """The scale of 1 copies nothing and casts nothing."""
    tree = {"w": jnp.ones(2, jnp.float16)}
    scale = jmp.NoOpLossScale()
    assert scale.scale(tree) is tree
    assert scale.unscale(tree) is tree
    assert scale.adjust(False) is scale
    assert scale.loss_scale == 1
    assert jax.jit(lambda s: s)(scale) == scale


# --- Messages ---

INVALID = {
    "loss_scale must be positive and finite, got 0.0.": {"loss_scale": 0.0},
    "loss_scale must be positive and finite, got -2.0.": {"loss_scale": -2.0},
    "loss_scale must be positive and finite, got inf.": {"loss_scale": jnp.float32(np.inf)},
    "loss_scale must be positive and finite, got nan.": {"loss_scale": np.nan},
    "loss_scale must be at most 2**126, got 1.7014118346046923e+38.": {"loss_scale": 2.0**127},
    "period must be a whole number, at least 1, got 0.": {"period": 0},
    "factor must be at least 1 and finite, got 0.5.": {"factor": 0.5},
    "factor must be at least 1 and finite, got inf.": {"factor": np.inf},
    "backoff_factor must be in (0, 1], got 0.": {"backoff_factor": 0},
    "backoff_factor must be in (0, 1], got 2.": {"backoff_factor": 2},
    "min_loss_scale must be at least 0 and finite, got -1.0.": {"min_loss_scale": -1.0},
    "min_loss_scale must be at least 0 and finite, got nan.": {"min_loss_scale": np.nan},
    "max_loss_scale must be in [min_loss_scale=4.0, 2**126], got 2.0.": {"min_loss_scale": 4.0, "max_loss_scale": 2.0},
    "max_loss_scale must be in [min_loss_scale=1.0, 2**126], got inf.": {"max_loss_scale": np.inf},
    "hysteresis must be a whole number, at least 1, got 0.": {"hysteresis": 0},
    "hysteresis must be a whole number, at least 1, got 2.5.": {"hysteresis": 2.5},
    "grace_steps must be a whole number, at least 0, got -1.": {"grace_steps": -1},
    "grace_steps must be a whole number, at least 0, got 0.5.": {"grace_steps": 0.5},
    "loss_scale must be a number, got '1024'.": {"loss_scale": "1024"},
    "loss_scale must be a number, got None.": {"loss_scale": None},
    "loss_scale must be a number, got [8.0].": {"loss_scale": [8.0]},
    "counter must be a whole number, got '3'.": {"counter": "3"},
    "period must be a number, got 'often'.": {"period": "often"},
    "factor must be a number, got None.": {"factor": None},
    "min_loss_scale must be a number, got '1'.": {"min_loss_scale": "1"},
    "backoff_factor must be a number, got float64[2].": {"backoff_factor": np.full(2, 0.5)},
    "hysteresis must be a number, got [1].": {"hysteresis": [1]},
}


@pytest.mark.parametrize(("message", "settings"), INVALID.items(), ids=INVALID)
def test_setting_out_of_range(message, settings):
    """Each setting out of range is named, with what was given and what is accepted."""
    with pytest.raises(jmp.errors.InvalidLossScaleError) as error:
        jmp.DynamicLossScale(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan, 2.0**127, 2.0**-127])
def test_static_value_out_of_range(value):
    """A static scale out of range is refused where it is used."""
    for use in (jmp.StaticLossScale(value).scale, jmp.StaticLossScale(value).unscale):
        with pytest.raises(jmp.errors.InvalidLossScaleError) as error:
            use(1.0)
        assert (
            str(error.value) == f"loss_scale must be in [2**-126, 2**126], got {value}. Try StaticLossScale(2.0**15)."
        )


@pytest.mark.parametrize("value", ["1024", None, [8.0], np.ones(2), jnp.ones(3)], ids=str)
def test_static_value_that_is_no_number(value):
    with pytest.raises(jmp.errors.InvalidLossScaleError, match=r"^StaticLossScale must be a number, got "):
        jmp.StaticLossScale(value)


def test_unknown_system():
    """An unknown preset names the known ones."""
    with pytest.raises(jmp.errors.InvalidLossScaleError) as error:
        jmp.DynamicLossScale.like("apex")
    assert str(error.value) == "Unknown system 'apex'. Accepted: torch, flax, keras, jmp, megatron, deepspeed."


@pytest.mark.parametrize("verdict", [jnp.array([True, False]), jnp.float32(1), 1.0, None], ids=str)
def test_verdict_must_be_one_boolean(verdict):
    """A verdict per leaf or a number is refused rather than broadcast."""
    with pytest.raises(jmp.errors.InvalidSelectionError, match=r"^expected boolean scalar, got "):
        jmp.DynamicLossScale().adjust(verdict)
