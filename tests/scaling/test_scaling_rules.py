"""The rules of loss scaling, one setting, leaf or count at a time: what is accepted, refused, named and kept."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from support.comparisons import DEVICES, assert_identical, compiled_as_on, mesh, raw

import jmp_lite as jmp
from jmp_lite import errors
from jmp_lite.scaling import _loss_scale, _loss_scaled, _lost_updates, _monitor, _verdict

FLOAT0 = np.zeros(2, jax.dtypes.float0)


def like(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


# --- Settings -------------------------------------------------------------------------------------

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


# --- Gradients, parameters and states -------------------------------------------------------------

W, N = np.ones(2, np.float32), np.ones(2, np.int32)
#: A parameter, its gradient, and what is wrong.
GRADIENTS = {
    "floats": (W, W, None),
    "a float for an array": (W, 1.0, None),
    "float0": (W, FLOAT0, None),
    "none": (W, None, None),
    "integers of integers": (N, N, None),
    "float0 of integers": (N, FLOAT0, None),
    "integers of a float": (W, N, "is int32[2], and the parameter float32[2]: no step would reach it"),
    "booleans of a float": (W, np.ones(2, bool), "is bool[2], and the parameter float32[2]"),
    "an integer of a Python float": (1.0, np.int32(1), "is np.int32(1), and the parameter 1.0"),
    "integers of nothing known": (None, N, "is int32[2], and params are not given"),
    "floats of nothing known": (None, W, None),
    "float0 of nothing known": (None, FLOAT0, None),
    "another shape": (W, np.ones(3, np.float32), "is float32[3], but the parameter is float32[2]"),
    "a scalar for an array": (W, np.float32(1), "is np.float32(1.0), but the parameter is float32[2]"),
    "another shape of integers": (N, np.ones(3, np.int32), None),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_what_is_a_gradient_of_a_parameter(case):
    param, grad, wrong = GRADIENTS[case]
    path = (jax.tree_util.DictKey("w"),)
    if wrong is None:
        _loss_scaled.check_gradient(path, param, grad)
        return
    with pytest.raises(errors.InvalidStepError, match=re.escape(f"The gradient of 'w' {wrong}")):
        _loss_scaled.check_gradient(path, param, grad)


TREES = {
    "alike": ({"a": W}, {"a": W}, True, True),
    "hidden leaves": ({"a": W, "b": N}, {"a": W, "b": None}, True, True),
    "masked leaves": ({"a": W, "b": N}, {"a": W, "b": optax.MaskedNode()}, True, True),
    "a tree for a leaf": ({"a": W}, {"a": {"b": W}}, False, False),
    "another name": ({"a": W}, {"b": W}, False, False),
    "another class": ((W,), [W], False, True),
    "the fast weights of lookahead": (optax.LookaheadParams({"a": W}, {"a": W}), {"a": W}, True, True),
    "an integer gradient": ({"a": W}, {"a": N}, False, False),
}


@pytest.mark.parametrize("case", TREES)
@pytest.mark.parametrize("lenient", [False, True])
def test_which_trees_belong_together(case, lenient):
    params, grads, *fits = TREES[case]
    if fits[lenient]:
        _loss_scaled.check_trees(grads, params, "step(grads, params)", lenient=lenient)
        return
    message = "no step would reach it" if "integer" in case else r"different trees: .*in the order step\(grads, params"
    with pytest.raises(errors.InvalidStepError, match=message):
        _loss_scaled.check_trees(grads, params, "step(grads, params)", lenient=lenient)


class HasInit:
    def init(self, params):
        """Half an optimizer."""


class HasUpdate:
    def update(self, grads, state):
        """The other half."""

    init = "no function"


NO_OPTIMIZERS = {
    "a function": (optax.adam, r"the function adam; call it, such as optax\.adam\(1e-3\)\.$"),
    "a number": (3e-4, r"0\.0003; write for example optax\.adam\(1e-3\)\.$"),
    "half of one": (HasInit(), r"HasInit object .*; write for example"),
    "the other half": (HasUpdate(), r"HasUpdate object .*; write for example"),
    "no name": (functools.partial(optax.adam, 1e-3), r"functools\.partial.*; write for example"),
    "a module": (optax, "module 'optax' .*; write for example"),
}


@pytest.mark.parametrize("case", NO_OPTIMIZERS)
def test_what_is_no_optimizer_is_quoted(case):
    given, message = NO_OPTIMIZERS[case]
    with pytest.raises(errors.InvalidStepError, match=f"^step takes an Optax optimizer, got .*{message}"):
        _loss_scaled.check_optimizer(given, "step")
    _loss_scaled.check_optimizer(optax.sgd(0.1), "step")


LIKE_OLD = {
    "the same dtype": (jnp.ones(2), jnp.zeros(2), jnp.ones(2)),
    "another dtype": (jnp.ones(2), jnp.zeros(2, jnp.bfloat16), jnp.ones(2, jnp.bfloat16)),
    "a number": (True, jnp.zeros((), jnp.bool_), jnp.array(True)),
    "no dtype before": (3, 4, 3),
    "no dtype before but now": (jnp.ones(2), 4, jnp.ones(2)),
}


@pytest.mark.parametrize("case", LIKE_OLD)
def test_a_state_keeps_its_dtypes(case):
    new, old, expected = LIKE_OLD[case]
    kept = _loss_scaled._like_old(new, old)
    assert raw(kept) == raw(expected)
    assert kept is new or case in ("another dtype", "a number")


#: Whether the step was taken, whether updates were finite, the counts before and after.
COUNTS = [
    (True, True, (3, 5, 2, 4), (0, 5, 0, 4)),
    (True, False, (3, 5, 2, 4), (0, 5, 3, 5)),
    (True, False, (0, 0, 0, 0), (0, 0, 1, 1)),
    (False, True, (3, 5, 2, 4), (4, 6, 2, 4)),
    (False, True, (0, 0, 0, 0), (1, 1, 0, 0)),
]


@pytest.mark.parametrize(("finite", "updates_finite", "before", "after"), COUNTS)
def test_what_is_counted(finite, updates_finite, before, after):
    """Skipped steps in a row and in all, and steps with bad updates; a skipped step ends no row of these."""
    tx = jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(8.0))
    counters = ("notfinite_count", "total_notfinite", "nonfinite_updates", "total_nonfinite_updates")
    state = tx.init({})._replace(**dict(zip(counters, map(jnp.int32, before), strict=True)))
    new = tx.update.next_state(state, "inner", jnp.array(finite), jnp.array(updates_finite))
    assert tuple(int(getattr(new, name)) for name in counters) == after
    assert {getattr(new, name).dtype for name in counters} == {jnp.dtype(jnp.int32)}
    assert bool(new.last_finite) == finite
    assert new.inner_state == "inner"
    assert float(new.loss_scale.loss_scale) == (8 if finite else 4)


ONES = [jmp.NoOpLossScale(), jmp.StaticLossScale(1.0)]
OTHERS = [jmp.StaticLossScale(2.0), jmp.DynamicLossScale(1.0, factor=1)]


@pytest.mark.parametrize("inner", [*ONES, *OTHERS], ids=repr)
@pytest.mark.parametrize("outer", [*ONES, *OTHERS], ids=repr)
def test_only_one_scale_may_be_another_than_one(inner, outer):
    tx = jmp.loss_scaled(jmp.loss_scaled(optax.sgd(0.1), inner), outer)
    if inner in ONES or outer in ONES:
        tx.init({"w": W})
    else:
        with pytest.raises(errors.InvalidStepError, match="unscaled twice"):
            tx.init({"w": W})


def test_leaves_without_gradients_have_updates_that_change_nothing():
    """Those of integers are zeros; what is no number passes through."""
    params = {"w": jnp.ones(2), "n": jnp.arange(2), "float0": jnp.arange(2), "f": jnp.tanh, "none": jnp.ones(2)}
    grads = {"w": jnp.ones(2), "n": jnp.arange(2), "float0": FLOAT0, "f": jnp.tanh, "none": None}
    tx = jmp.loss_scaled(optax.sgd(1.0), jmp.NoOpLossScale())
    updates, _ = tx.update(grads, tx.init(params), params)
    assert raw(updates["w"]) == raw(-jnp.ones(2))
    assert raw(updates["n"]) == raw(jnp.zeros(2, jnp.int32))
    assert updates["float0"] is FLOAT0
    assert updates["f"] is jnp.tanh
    assert updates["none"] is None


def test_a_line_search_without_a_gradient_gets_none():
    """Only where the caller gives one is it unscaled."""
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    tx = jmp.loss_scaled(
        optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update), jmp.StaticLossScale(4.0)
    )
    params = {"w": jnp.ones(2), "n": jnp.arange(2)}
    tx.update(params, tx.init(params), params, value=4.0)
    tx.update(params, tx.init(params), params, value=4.0, grad=params)
    assert seen[0] == {"value": 4.0}
    assert seen[1]["value"] == 4.0
    assert_identical(seen[1]["grad"], {"w": jnp.full(2, 0.25), "n": None})


PARAMS = {"w": jnp.ones(2)}
SCALED = jmp.loss_scaled(optax.sgd(0.1), jmp.StaticLossScale(4.0))
#: Optimizers that have no loss scale, and some that have; whether the state of one fits, in a chain or alone.
AROUND = {
    "one without a state": (optax.sgd(0.1), SCALED, False),
    "one with a state": (optax.adam(0.1), SCALED, False),
    "a chain of none": (optax.chain(optax.sgd(0.1)), optax.chain(SCALED), False),
    "a chain": (optax.chain(SCALED), optax.chain(SCALED), True),
    "a named chain": (optax.named_chain(("a", SCALED)), optax.named_chain(("a", SCALED)), True),
}


@pytest.mark.parametrize("case", AROUND)
def test_a_state_with_a_scale_is_for_an_optimizer_with_one(case):
    """Any other would apply gradients that are still scaled."""
    tx, of_state, fits = AROUND[case]
    state = of_state.init(PARAMS)
    if fits:
        params, new = jmp.apply_gradients(tx, {"w": jnp.full(2, 4.0)}, state, PARAMS)
        np.testing.assert_allclose(params["w"], 0.9)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        return
    with pytest.raises(errors.InvalidStepError, match="which is not in tx: gradients would stay scaled"):
        jmp.apply_gradients(tx, PARAMS, state, PARAMS)


@pytest.mark.parametrize("kind", [AttributeError, KeyError, TypeError, ValueError, RuntimeError])
def test_what_an_optimizer_around_raises_is_its_own(kind):
    def fail(updates, state, params=None):
        raise kind("its own")

    tx = optax.chain(SCALED, optax.GradientTransformation(lambda _: optax.EmptyState(), fail))
    with pytest.raises(kind, match="its own"):
        jmp.apply_gradients(tx, PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("value", [0.25, np.nan, np.inf])
@pytest.mark.parametrize("params", ["nearest", "stochastic", "split8"])
def test_parameters_that_are_stored_are_updated_or_stay(params, value):
    """Element by element; and what is not finite is counted."""
    inner = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u.at[0].set(value), updates))
    tx = jmp.loss_scaled(jmp.optim.stored(inner, params=params), jmp.StaticLossScale(4.0))
    half = {"w": jnp.ones(2, jnp.bfloat16)}
    new, state = jmp.apply_gradients(tx, {"w": jnp.full(2, 2.0)}, tx.init(half), half)
    assert new["w"].tolist() == [1.25 if np.isfinite(value) else 1.0, 1.5]
    assert int(state.nonfinite_updates) == (not np.isfinite(value))


# --- Lost updates ---------------------------------------------------------------------------------

HALF = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)}
#: A step, and which of two parameters may lose updates.
STEPS = {
    "both": (lambda grads: grads, "ab"),
    "one": (lambda grads: {"a": grads["a"] * 2, "b": jnp.zeros(2)}, "a"),
    "one, by way of the other": (lambda grads: {"a": jnp.zeros(2), "b": grads["a"] + 1}, "b"),
    "one that is passed on": (lambda grads: {"a": jnp.zeros(2), "b": grads["a"]}, "b"),
    "a constant": (lambda grads: {"a": jnp.zeros(2), "b": 0.0}, ""),
    "another number of updates": (lambda grads: {"a": jnp.zeros(2)}, "ab"),
    "more updates": (lambda grads: [jnp.zeros(2)] * 3, "ab"),
    "one that fails": (lambda grads: grads["c"], "ab"),
}


@pytest.mark.parametrize("case", STEPS)
def test_which_parameters_lose_updates(case, recwarn):
    """Those that gradients reach, and all where that cannot be known."""
    step, lose = STEPS[case]
    _lost_updates.warn_of_lost_updates(step, HALF, ())
    text = " ".join(str(warning.message) for warning in recwarn.list)
    assert [name for name in HALF if f"{name!r} (bfloat16)" in text] == list(lose)


def test_parameters_that_are_stored_or_wide_lose_nothing(recwarn):
    params = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.float16), "n": None}
    _lost_updates.warn_of_lost_updates(lambda grads: grads, params, {"['b']"})
    assert not recwarn.list
    many = dict.fromkeys("abcde", params["b"])
    with pytest.warns(errors.LostUpdatesWarning, match=r"'a' \(float16\), 'b' \(float16\), 'c' \(float16\) and 2 more"):
        _lost_updates.warn_of_lost_updates(lambda grads: grads, many, ())


# --- What a loop is told --------------------------------------------------------------------------

BAD, YES, NO = np.float32([1, np.nan]), np.array(True), np.array(False)
#: Gradients or flags of replicas, and how they are named.
NAMED = {
    "gradients": ({"a": BAD, "b": W, "n": N, "c": BAD}, "a, c"),
    "finite gradients": ({"a": W}, ""),
    "leaves without gradients": ({"a": FLOAT0, "b": jax.random.key(0), "c": jnp.tanh, "d": "text", "e": BAD}, "e"),
    "Python numbers": ({"a": 1.0, "b": float("nan"), "c": 3, "d": True}, "b"),
    "none": (None, ""),
    "flags": ({"a": YES, "b": NO}, "a"),
    "one replica": ({"a": np.array([False, True, False])}, "a on replica 1"),
    "replicas": ({"a": np.array([False, True, True])}, "a on replicas 1, 2"),
    "leaves and replicas": (
        {"a": np.array([True, False]), "b": np.array([True, True])},
        "a on replica 0; b on replicas 0, 1",
    ),
    "no replica": ({"a": np.array([False, False]), "b": YES}, "b"),
    "rows of pmap": ({"a": np.array([[False, True], [False, True]])}, "a on replica 1"),
    "a row of pmap": ({"a": np.array([[False, False], [True, False]])}, "a on replica 0"),
}


@pytest.mark.parametrize("case", NAMED)
def test_how_bad_gradients_are_named(case):
    given, said = NAMED[case]
    assert _monitor._nonfinite_leaves(given) == said


def counted(**counts):
    """The state of three models, with counts."""
    tx = jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(1.0))
    state = jax.vmap(lambda _: tx.init({"w": jnp.ones(2)}))(jnp.arange(3))
    return state._replace(**{name: jnp.int32(value) for name, value in counts.items()})


def test_members_are_named_with_the_longest_row():
    with pytest.raises(errors.LossScaleStalledError, match=r"^12 steps .* in member 1, 2 of the ensemble\. "):
        jmp.check_loss_scale(counted(notfinite_count=[9, 12, 10]))
    with pytest.raises(errors.LossScaleStalledError, match=r"10 steps in a row in member 0, 2 of the ensemble\. "):
        jmp.check_loss_scale(counted(nonfinite_updates=[10, 0, 1]))
    with pytest.warns(errors.NonFiniteUpdateWarning, match=r"9 steps in a row in member 1 of the ensemble\. "):
        jmp.check_loss_scale(counted(nonfinite_updates=[0, 9, 0]))
    jmp.check_loss_scale(counted())


def test_members_on_devices_are_no_replicas():
    """Two on each; nor is a single one, or one of several axes."""
    place = jax.sharding.NamedSharding(mesh(), P("batch"))
    tx = jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(1.0))

    def state(values, shape):
        values = jax.device_put(np.asarray(values, np.int32).reshape(shape), place)
        return tx.init({"w": jnp.ones(2)})._replace(total_notfinite=values)

    jmp.check_loss_scale(state(range(2 * DEVICES), (2 * DEVICES,)))
    jmp.check_loss_scale(state(range(DEVICES), (DEVICES, 1)))
    jmp.check_loss_scale(state([5] * DEVICES, (DEVICES,)))
    with pytest.raises(
        errors.ReplicasDisagreeError, match=r"disagree: total_notfinite is \[0, 1, 2, 3, 4, 5, 6, 7\]\."
    ):
        jmp.check_loss_scale(state(range(DEVICES), (DEVICES,)))
    with pytest.raises(errors.ReplicasDisagreeError, match=r"disagree \(state at 'a/0'\): total_notfinite is "):
        jmp.check_loss_scale({"a": [state(range(DEVICES), (DEVICES,))]})


def test_copies_that_are_all_nan_agree():
    tx = jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(1.0))
    scale = jax.device_put(np.full(DEVICES, np.nan, np.float32), jax.sharding.NamedSharding(mesh(), P("batch")))
    state = tx.init({})
    jmp.check_loss_scale(state._replace(loss_scale=dataclasses.replace(jmp.DynamicLossScale()).adjust(True)))
    leaves, treedef = jax.tree.flatten(state.loss_scale)
    jmp.check_loss_scale(state._replace(loss_scale=jax.tree.unflatten(treedef, [scale, *leaves[1:]])))


@pytest.mark.parametrize("max_skips", [1, np.int64(3), np.int8(1)], ids=repr)
def test_limits_may_be_integers_of_any_kind(max_skips):
    with pytest.raises(errors.LossScaleStalledError):
        jmp.check_loss_scale(counted(notfinite_count=[max_skips, 0, 0]), max_skips=max_skips)


@pytest.mark.parametrize("max_skips", [0, -1, 1.0, "3", None], ids=repr)
def test_what_is_no_limit_is_quoted(max_skips):
    with pytest.raises(errors.InvalidStepError, match=re.escape(f"at least 1, got {max_skips!r}.")):
        jmp.check_loss_scale(counted(), max_skips=max_skips)


# --- Microbatches ---------------------------------------------------------------------------------


def accumulate(parts, *batch, **options):
    scale = options.pop("loss_scale", jmp.StaticLossScale(4.0))
    return jmp.accumulate_gradients(lambda w, x: jnp.mean(w * x), parts, loss_scale=scale, **options)(2.0, *batch)


REFUSED = {
    "a boolean": (True, 4, "num_microbatches must be a whole number, at least 1, got True."),
    "a negative number": (-2, 4, "num_microbatches must be a whole number, at least 1, got -2."),
    "more than rows": (3, 2, "2 rows do not divide into num_microbatches=3. Take num_microbatches from 1, 2."),
    "twice the rows": (8, 4, "4 rows do not divide into num_microbatches=8. Take num_microbatches from 1, 2, 4."),
    "a rest": (
        4,
        6,
        "6 rows do not divide into num_microbatches=4. Drop 2 of them, or take num_microbatches from 1, 2, 3, 6.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_how_many_microbatches_there_may_be(case):
    parts, rows, message = REFUSED[case]
    with pytest.raises(errors.InvalidMicrobatchError, match=re.escape(message)):
        accumulate(parts, np.ones(rows, np.float32))


@pytest.mark.parametrize("parts", [1, 4, np.int64(2), np.uint8(4)], ids=repr)
def test_numbers_of_microbatches_may_be_integers_of_any_kind(parts):
    loss, grad = accumulate(parts, np.float32([1, 2, 3, 6]))
    assert (float(loss), float(grad)) == (6, 12)


def test_the_scale_of_a_name_is_used_for_microbatches():
    scales = {"a": jmp.StaticLossScale(2.0), "b": jmp.StaticLossScale(8.0)}
    _, grad = accumulate(2, np.ones(4, np.float32), loss_scale=scales, name="b")
    assert float(grad) == 8
    with pytest.raises(errors.LossScaleNotFoundError, match="2 loss scales"):
        accumulate(2, np.ones(4, np.float32), loss_scale=scales)


# --- Verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 3, 5, 6])
def test_groups_are_of_one_kind_and_no_larger_than_they_may_be(most):
    kinds = "abcabaaa"
    groups = _verdict._grouped(list(kinds), str, most)
    assert sorted("".join(group) for group in groups) == sorted(
        kind * n
        for kind, count in (("a", 5), ("b", 2), ("c", 1))
        for n in [most] * (count // most) + [count % most] * (count % most > 0)
    )
    assert "".join(groups[0]) == "a" * min(most, 5)


LIMIT = _verdict.SMALL_LEAF
#: Sizes of the leaves of bfloat16 and of float32, and how many elements each kernel reads of each leaf.
KERNELS = {
    "tpu": ([1], [1] * 17 + [LIMIT, LIMIT + 1, LIMIT + 1], [[1], [1] * 16, [1, LIMIT], [LIMIT + 1], [LIMIT + 1]]),
    "cuda": ([LIMIT + 1], [1] * 1025 + [LIMIT + 1] * 33, [[LIMIT + 1], [1] * 1024, [1], [LIMIT + 1] * 32, [LIMIT + 1]]),
    "cpu": ([1], [1, LIMIT + 1, LIMIT + 1], [[1], [1], [LIMIT + 1], [LIMIT + 1]]),
}


@pytest.mark.parametrize("platform", KERNELS)
def test_which_leaves_a_kernel_checks_together(platform, monkeypatch):
    """Each leaf is read once."""
    narrow, wide, expected = KERNELS[platform]
    seen = []

    def record(leaves, bound, holds=None):
        seen.append([x.size for x in leaves])
        return jnp.array(True)

    monkeypatch.setattr(_verdict, "_are_below", record)
    monkeypatch.setattr(_verdict, "_are_small_below", record)
    grads = [like((n,), jnp.bfloat16) for n in narrow] + [like((n,)) for n in wide]
    judge = lambda grads: _verdict.judge(grads, jmp.NoOpLossScale(), None)  # noqa: E731
    with compiled_as_on(platform):
        jax.eval_shape(jax.shard_map(judge, mesh=mesh(), in_specs=P(), out_specs=P()), grads)
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 64, 65])
def test_every_element_of_small_leaves_counts(size):
    """However they are folded."""
    good = np.ones(size, np.float32)
    assert bool(_verdict._are_small_below([good], jnp.float32(2)))
    for at in range(size):
        bad = good.copy()
        bad[at] = 2
        assert not bool(_verdict._are_small_below([bad], jnp.float32(2)))


#: A dtype of gradients, and half of the largest number of what their squares are added up in.
BOUNDED = dict.fromkeys(("float32", "bfloat16", "float16", "complex64"), 2.0**127) | {"float64": 2.0**1023}


@pytest.mark.parametrize("dtype", BOUNDED)
@pytest.mark.parametrize("elements", [1, 2, 1000])
def test_gradients_are_bounded_in_the_dtype_that_they_are_judged_in(dtype, elements):
    """Scaled as they are."""
    with jax.enable_x64(True):
        bound = _verdict._bound(jnp.float32(8), jnp.dtype(dtype), elements)
    assert bound.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    np.testing.assert_allclose(float(bound), 8 * BOUNDED[dtype] ** 0.5 / elements**0.5, rtol=1e-6)


AXES = {
    "none": ((), (), None),
    "that of an ensemble": (("a",), ("a",), None),
    "one": (("data",), (), r"Devices along 'data' see .* to jump\. Write step\('data'\)\.$"),
    "two": (("b", "a"), (), r"Devices along 'a' and 'b' see .* to jump\. Write step\(\('a', 'b'\)\)\.$"),
    "another than that of an ensemble": (("a", "b"), ("a",), r"Devices along 'b' see .* Write step\('b'\)\.$"),
}


@pytest.mark.parametrize("case", AXES)
def test_axes_that_were_forgotten_are_named(case, monkeypatch):
    of_verdict, of_scale, message = AXES[case]
    verdict, scale = jnp.array(True), jnp.float32(8)
    monkeypatch.setattr(_verdict, "varying_axes", lambda x: frozenset(of_verdict if x.dtype == jnp.bool_ else of_scale))
    if message is None:
        _verdict.refuse_forgotten_axes(verdict, scale, "jump", "step({})")
        return
    with pytest.raises(errors.MissingAxisError, match=message):
        _verdict.refuse_forgotten_axes(verdict, scale, "jump", "step({})")
