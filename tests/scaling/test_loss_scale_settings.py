"""Settings of loss scales: presets, limits, and what is said of values beyond them."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

import jmp_lite as jmp
from jmp_lite import errors
from jmp_lite.scaling import _loss_scale

DEFAULTS = {
    "loss_scale": 2.0**15,
    "counter": 0,
    "period": 2000,
    "factor": 2,
    "min_loss_scale": 1.0,
    "backoff_factor": None,
    "max_loss_scale": 2.0**24,
    "hysteresis": 1,
    "consecutive_hysteresis": False,
    "grace_steps": 0,
    "hysteresis_left": None,
}
UNBOUNDED = {"min_loss_scale": 0.0, "max_loss_scale": 2.0**126}
TOLERANT = {"period": 1000, "max_loss_scale": 2.0**126, "hysteresis": 2, "hysteresis_left": 2}
SYSTEMS = {
    "torch": {"loss_scale": 2.0**16, **UNBOUNDED},
    "flax": {"loss_scale": 2.0**16, "period": 2001, **UNBOUNDED},
    "keras": UNBOUNDED,
    "jmp": {"max_loss_scale": 2.0**126},
    "megatron": TOLERANT | {"loss_scale": 2.0**32},
    "deepspeed": TOLERANT | {"loss_scale": 2.0**16, "counter": -1, "grace_steps": 1},
}


def settings(scale):
    return {field.name: getattr(scale, field.name) for field in dataclasses.fields(scale)}


@pytest.mark.parametrize("system", [None, *SYSTEMS])
def test_settings_of_systems(system):
    scale = jmp.DynamicLossScale() if system is None else jmp.DynamicLossScale.like(system)
    assert settings(scale) == DEFAULTS | SYSTEMS.get(system, {})
    assert jmp.DynamicLossScale.like("torch", period=7).period == 7


LIMITS = {
    "the lowest scale": {"loss_scale": 2.0**-126},
    "the highest scale": {"loss_scale": 2.0**126},
    "scales of an ensemble": {"loss_scale": np.float32([2.0**-126, 2.0**126])},
    "growth at each step": {"period": 1},
    "no growth": {"factor": 1},
    "no back-off": {"backoff_factor": 1},
    "a small back-off": {"backoff_factor": 2.0**-20},
    "no minimum": {"min_loss_scale": 0},
    "the highest maximum": {"max_loss_scale": 2.0**126},
    "one scale only": {"min_loss_scale": 4.0, "max_loss_scale": 4.0},
    "whole numbers as floats": {"period": 2.0, "hysteresis": 2.0, "grace_steps": 3.0},
    "arrays of one number": {"period": np.ones(1), "factor": np.full((1, 1), 2.0)},
}


@pytest.mark.parametrize("case", LIMITS)
def test_settings_at_the_limits_are_taken(case):
    scale = jmp.DynamicLossScale(**LIMITS[case])
    for name, value in LIMITS[case].items():
        np.testing.assert_array_equal(getattr(scale, name), np.squeeze(value))


BEYOND = {
    "below the lowest scale": ({"loss_scale": 2.0**-127}, "loss_scale must be at least 2**-126, got "),
    "one of an ensemble too low": ({"loss_scale": np.float32([1.0, 2.0**-127])}, "loss_scale must be at least 2**-126"),
    "one too high": ({"loss_scale": np.float32([2.0**127, 1.0])}, "loss_scale must be at most 2**126"),
    "one that is NaN": ({"loss_scale": np.float32([1.0, np.nan])}, "loss_scale must be positive and finite"),
    "one that is zero": ({"loss_scale": np.float32([1.0, 0.0])}, "loss_scale must be positive and finite"),
    "half a period": ({"period": 1.5}, "period must be a whole number, at least 1, got 1.5"),
    "factor just below 1": ({"factor": 1 - 2.0**-20}, "factor must be at least 1 and finite"),
    "back-off just above 1": ({"backoff_factor": 1 + 2.0**-20}, "backoff_factor must be in (0, 1]"),
    "infinite minimum": ({"min_loss_scale": np.inf}, "min_loss_scale must be at least 0 and finite"),
    "maximum just too high": ({"max_loss_scale": 2.0**127}, "max_loss_scale must be in [min_loss_scale=1.0, 2**126]"),
    "a counter of a kind": ({"counter": None}, "counter must be a whole number, got None"),
    "two numbers": ({"period": np.ones(2)}, "period must be a number, got float64[2]"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_settings_beyond_the_limits_are_refused(case):
    given, message = BEYOND[case]
    with pytest.raises(errors.InvalidLossScaleError, match=f"^{re.escape(message)}"):
        jmp.DynamicLossScale(**given)


@pytest.mark.parametrize("value", [2.0**-126, 2.0**126, 8, np.float16(8), np.ones(1), jnp.ones((1, 1))], ids=repr)
def test_static_scales_up_to_the_limits_are_taken(value):
    scale = jmp.StaticLossScale(value)
    assert type(scale.loss_scale) is float
    expected = np.float32(np.asarray(value).item())
    assert scale.scale(jnp.float32(1)) == expected
    assert scale.unscale(jnp.float32(1)) == 1 / expected


def test_a_retry_restarts_the_count_and_uses_no_tolerance():
    scale = jmp.DynamicLossScale(8.0, 5, grace_steps=3, hysteresis=2)
    lowered = scale.back_off()
    assert (float(lowered.loss_scale), int(lowered.counter), int(lowered.hysteresis_left)) == (4, -3, 2)
    assert lowered.counter.dtype == jnp.int32
    assert settings(lowered) | {"loss_scale": 8.0, "counter": 5} == settings(scale)


SAVED = {
    "none": (jmp.NoOpLossScale(), {}),
    "static": (jmp.StaticLossScale(8.0), {}),
    "dynamic": (jmp.DynamicLossScale(8.0), {"loss_scale": 8.0, "counter": 0}),
    "tolerant": (jmp.DynamicLossScale(8.0, hysteresis=2), {"loss_scale": 8.0, "counter": 0, "hysteresis_left": 2}),
}


@pytest.mark.parametrize("there", SAVED)
@pytest.mark.parametrize("here", SAVED)
def test_flax_saves_the_numbers_and_restores_them_into_a_scale_that_has_them(here, there):
    (scale, fields), saved = SAVED[here], SAVED[there][1]
    assert _loss_scale._state_dict(scale) == fields
    if fields.keys() == saved.keys():
        restored = _loss_scale._from_state_dict(scale, {name: value + 1 for name, value in saved.items()})
        assert settings(restored) == settings(scale) | {name: value + 1 for name, value in saved.items()}
    else:
        message = f"has the fields {sorted(saved)}, but {type(scale).__name__} here has {sorted(fields)}."
        with pytest.raises(errors.InvalidLossScaleError, match=re.escape(message)):
            _loss_scale._from_state_dict(scale, saved)
