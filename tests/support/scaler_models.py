"""The loss scalers of six systems in plain Python, as generators of their own states.

``model(finite, bounds, **config)`` yields the initial state and then one state per verdict, with the keys of the
recorded files. ``bounds = (lowest, highest)`` is where a scale may go at most; the systems themselves know fewer
bounds.
"""

import ctypes
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

UNBOUNDED = (0.0, math.inf)


def f32(value):
    """The nearest float32, infinite where it overflows."""
    return ctypes.c_float(value).value


def grown(scale, factor, highest):
    """Growth is refused where it would pass the bound."""
    larger = f32(scale * factor)
    return larger if larger <= highest else scale


def torch(finite, bounds, *, init_scale, growth_factor, backoff_factor, growth_interval):
    scale, tracker = init_scale, 0
    yield {"scale": scale, "growth_tracker": tracker}
    for good in finite:
        tracker = tracker + 1 if good else 0
        if not good:
            scale = max(f32(scale * backoff_factor), bounds[0])
        elif tracker == growth_interval:
            scale, tracker = grown(scale, growth_factor, bounds[1]), 0
        yield {"scale": scale, "growth_tracker": tracker}


def flax(finite, bounds, *, scale, growth_factor, backoff_factor, growth_interval, minimum_scale):
    steps = 0
    yield {"scale": scale, "fin_steps": steps}
    for good in finite:
        if not good:
            scale, steps = max(f32(scale * f32(backoff_factor)), minimum_scale, bounds[0]), 0
        elif steps == growth_interval:
            scale, steps = grown(scale, f32(growth_factor), bounds[1]), 0
        else:
            steps += 1
        yield {"scale": scale, "fin_steps": steps}


def keras(finite, bounds, *, initial_scale, dynamic_growth_steps, ftz):
    smallest = 2.0**-126 if ftz else 2.0**-149
    scale, counter = initial_scale, 0
    yield {"scale": scale, "step_counter": counter}
    for good in finite:
        if good and counter == dynamic_growth_steps - 1:
            scale, counter = grown(scale, 2.0, bounds[1]), 0
        elif good:
            counter += 1
        else:
            halved = scale / 2
            scale, counter = max(halved if halved >= smallest else 0.0, bounds[0]), 0
        yield {"scale": scale, "step_counter": counter}


def jmp(finite, bounds, *, loss_scale, period, factor, min_loss_scale):
    counter = 0
    yield {"scale": loss_scale, "counter": counter}
    for good in finite:
        if good and counter == period - 1:
            loss_scale = grown(loss_scale, factor, bounds[1])
        elif not good:
            loss_scale = max(f32(loss_scale / factor), min_loss_scale, bounds[0])
        counter = (counter + 1) % period if good else 0
        yield {"scale": loss_scale, "counter": counter}


def megatron(finite, bounds, *, initial_scale, min_scale, growth_factor, backoff_factor, growth_interval, hysteresis):
    scale, tracker, left = initial_scale, 0, hysteresis
    yield {"scale": scale, "growth_tracker": tracker, "hysteresis_tracker": left}
    for good in finite:
        if good:
            tracker += 1
            if tracker == growth_interval:
                scale, tracker, left = grown(scale, f32(growth_factor), bounds[1]), 0, hysteresis
        else:
            tracker, left = 0, left - 1
            if left <= 0:
                scale = max(f32(scale * f32(backoff_factor)), min_scale, bounds[0])
        yield {"scale": scale, "growth_tracker": tracker, "hysteresis_tracker": left}


def deepspeed(
    finite,
    bounds,
    *,
    init_scale,
    scale_window,
    min_scale,
    delayed_shift,
    consecutive_hysteresis,
    raise_error_at_min_scale,
    scale_factor,
):
    assert not raise_error_at_min_scale  # an error is what check_loss_scale is for
    scale, last_overflow, left = init_scale, -1, delayed_shift
    iteration = 0
    while True:
        yield {"scale": scale, "cur_iter": iteration, "last_overflow_iter": last_overflow, "cur_hysteresis": left}
        if iteration == len(finite):
            return
        if finite[iteration]:
            left = delayed_shift if consecutive_hysteresis else left
            since = iteration - last_overflow - 1
            if since > 0 and since % scale_window == 0:
                scale, left = grown(scale, scale_factor, bounds[1]), delayed_shift
        else:
            last_overflow = iteration
            if left == 1:
                scale = max(scale / scale_factor, min_scale, bounds[0])
            else:
                left -= 1
        iteration += 1


def _deepspeed_counter(state, config):
    """Finite steps since the last growth; the first one after an overflow (or at the start) does not count."""
    counted = state["cur_iter"] - state["last_overflow_iter"] - 2
    return counted if counted < 0 else counted % config["scale_window"]


@dataclasses.dataclass(frozen=True)
class System:
    """How one system's words translate into ours.

    Attributes:
        model: The generator of its states.
        recorded: The file of golden trajectories.
        defaults: Its configuration where nothing else is said.
        settings: Our field -> its setting, for ``DynamicLossScale.like``.
        counter: Its state and configuration -> our counter.
        hysteresis: The key in its state of what is left of the tolerance, if it has one.
    """

    model: Callable[..., Any]
    recorded: str
    defaults: Mapping[str, Any]
    settings: Mapping[str, str]
    counter: Callable[[Mapping[str, Any], Mapping[str, Any]], int]
    hysteresis: str | None = None

    def overrides(self, config):
        """Our keyword arguments for a configuration of theirs."""
        ours = {field: config[setting] for field, setting in self.settings.items() if setting in config}
        if self.model is flax and "period" in ours:
            ours["period"] += 1  # it grows one step late
        return ours

    def observe(self, states, config):
        """Their states as ours: scales, counters and tolerances (at least 1, as ours)."""
        scales = [state["scale"] for state in states]
        counters = [self.counter(state, config) for state in states]
        left = [max(state[self.hysteresis], 1) for state in states] if self.hysteresis else None
        return scales, counters, left


SYSTEMS = {
    "torch": System(
        torch,
        "golden_torch.json",
        {"init_scale": 2.0**16, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000},
        {
            "loss_scale": "init_scale",
            "factor": "growth_factor",
            "backoff_factor": "backoff_factor",
            "period": "growth_interval",
        },
        lambda state, _: state["growth_tracker"],
    ),
    "flax": System(
        flax,
        "golden_flax.json",
        {
            "scale": 2.0**16,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "minimum_scale": 2.0**-126,
        },
        {
            "loss_scale": "scale",
            "factor": "growth_factor",
            "backoff_factor": "backoff_factor",
            "period": "growth_interval",
            "min_loss_scale": "minimum_scale",
        },
        lambda state, _: state["fin_steps"],
    ),
    "keras": System(
        keras,
        "golden_keras3.json",
        {"initial_scale": 2.0**15, "dynamic_growth_steps": 2000, "ftz": True},
        {"loss_scale": "initial_scale", "period": "dynamic_growth_steps"},
        lambda state, _: state["step_counter"],
    ),
    "jmp": System(
        jmp,
        "golden_jmp.json",
        {"loss_scale": 2.0**15, "period": 2000, "factor": 2, "min_loss_scale": 1.0},
        {"loss_scale": "loss_scale", "period": "period", "factor": "factor", "min_loss_scale": "min_loss_scale"},
        lambda state, _: state["counter"],
    ),
    "megatron": System(
        megatron,
        "golden_megatron.json",
        {
            "initial_scale": 2.0**32,
            "min_scale": 1.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 1000,
            "hysteresis": 2,
        },
        {
            "loss_scale": "initial_scale",
            "min_loss_scale": "min_scale",
            "factor": "growth_factor",
            "backoff_factor": "backoff_factor",
            "period": "growth_interval",
            "hysteresis": "hysteresis",
        },
        lambda state, _: state["growth_tracker"],
        "hysteresis_tracker",
    ),
    "deepspeed": System(
        deepspeed,
        "golden_deepspeed.json",
        {
            "init_scale": 2.0**16,
            "scale_window": 1000,
            "min_scale": 1.0,
            "delayed_shift": 2,
            "consecutive_hysteresis": False,
            "raise_error_at_min_scale": False,
            "scale_factor": 2.0,
        },
        {
            "loss_scale": "init_scale",
            "period": "scale_window",
            "min_loss_scale": "min_scale",
            "hysteresis": "delayed_shift",
            "consecutive_hysteresis": "consecutive_hysteresis",
            "factor": "scale_factor",
        },
        _deepspeed_counter,
        "cur_hysteresis",
    ),
}
