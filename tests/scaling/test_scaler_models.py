"""DynamicLossScale follows the scalers of other systems: recorded ones step by step, and models of them for long."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparisons import patterns, read_json
from support.scaler_models import SYSTEMS, UNBOUNDED

import jmp_lite as jmp

BOUNDS = (2.0**-126, 2.0**126)
RUNS = [(name, run) for name in SYSTEMS for run in range(3)]

# Beyond its defaults, what each system's scaler is run with: growth and back-off that reach the bounds, factors that
# are not powers of two (float32 matmuls of 1.5 and 0.75 are correctly rounded on both sides), all of hysteresis.
CONFIGURATIONS = [
    *((name, {}) for name in SYSTEMS),
    ("torch", {"growth_interval": 1}),
    ("torch", {"growth_interval": 7, "growth_factor": 1.5, "backoff_factor": 0.75}),
    ("torch", {"growth_interval": 50, "growth_factor": 4.0, "backoff_factor": 0.5}),
    ("flax", {"growth_interval": 0}),
    ("flax", {"growth_interval": 7, "minimum_scale": 0.25}),
    ("keras", {"dynamic_growth_steps": 1}),
    ("keras", {"dynamic_growth_steps": 7}),
    ("jmp", {"period": 7, "factor": 4, "min_loss_scale": 0.125}),
    ("jmp", {"period": 1}),
    ("megatron", {"growth_interval": 7, "hysteresis": 3, "min_scale": 0.25}),
    ("megatron", {"growth_interval": 5, "hysteresis": 1}),
    ("deepspeed", {"scale_window": 7, "delayed_shift": 3}),
    ("deepspeed", {"scale_window": 7, "delayed_shift": 3, "consecutive_hysteresis": True}),
    ("deepspeed", {"scale_window": 3, "delayed_shift": 1}),
]


@jax.jit
def trajectory(scale, finite):
    """Scales, counters and tolerances (or ``None``) at the start and after each verdict of ``bool[n]``."""

    def observed(state):
        return state.loss_scale, state.counter, state.hysteresis_left

    def step(state, good):
        state = state.adjust(good)
        return state, observed(state)

    scale = jax.tree.map(jnp.asarray, scale)
    _, later = jax.lax.scan(step, scale, finite)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), observed(scale), later)


def assert_follows(observed, expected):
    """Asserts that what was observed of our scale is what the other system has, exactly."""
    for ours, theirs in zip(observed, expected, strict=True):
        if ours is None:  # without hysteresis nothing is kept: the tolerance is always 1
            assert theirs is None or set(theirs) == {1}
        else:
            np.testing.assert_array_equal(np.asarray(ours), theirs)


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_recorded_trajectory_is_reproduced(name, run):
    """`like` reproduces every scale and counter that was recorded from the real package."""
    system = SYSTEMS[name]
    recorded = read_json(system.recorded)[run]
    scale = jmp.DynamicLossScale.like(name, **system.overrides(recorded["config"]))
    observed = trajectory(scale, np.array(recorded["finite"], bool))
    assert_follows(observed, system.observe(recorded["states"], recorded["config"]))


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_model_reproduces_recorded_trajectory(name, run):
    """The models used below are themselves faithful to the recordings."""
    recorded = read_json(SYSTEMS[name].recorded)[run]
    states = list(SYSTEMS[name].model(recorded["finite"], UNBOUNDED, **recorded["config"]))
    assert states == recorded["states"]


QUICK = len(SYSTEMS)  # the first are the systems with their own settings


@pytest.mark.parametrize(
    ("name", "changes"),
    [pytest.param(*one, marks=() if i < QUICK else pytest.mark.slow) for i, one in enumerate(CONFIGURATIONS)],
    ids=str,
)
def test_model_is_followed_for_ten_thousand_steps(name, changes):
    """Over 8 patterns of 10,000 verdicts, scale and counters equal the system's own rules with our bounds applied."""
    system, verdicts = SYSTEMS[name], patterns()
    config = {**system.defaults, **changes}
    scale = jmp.DynamicLossScale.like(name, **system.overrides(changes))
    observed = jax.vmap(trajectory, in_axes=(None, 0))(scale, np.stack(list(verdicts.values())))
    for i, finite in enumerate(verdicts.values()):
        states = list(system.model(finite.tolist(), BOUNDS, **config))
        assert_follows(jax.tree.map(lambda x, i=i: x[i], observed), system.observe(states, config))


def test_patterns_reach_both_bounds():
    """The long runs above do exercise the bounds, or they would prove little about them."""
    scales = [
        list(SYSTEMS[name].model(finite.tolist(), BOUNDS, **{**SYSTEMS[name].defaults, **changes}))
        for name, changes in [("torch", {"growth_interval": 1})]
        for finite in patterns().values()
    ]
    reached = {state["scale"] for states in scales for state in states}
    assert {2.0**-126, 2.0**126} <= reached
