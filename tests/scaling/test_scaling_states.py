"""Which gradients, parameters and states belong together, and what a loop is told of them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from support.comparisons import DEVICES, assert_identical, mesh, raw

import jmp_lite as jmp
from jmp_lite import errors
from jmp_lite.scaling import _loss_scaled, _monitor

FLOAT0 = np.zeros(2, jax.dtypes.float0)


def like(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


# --- Gradients, parameters and states ---

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


# --- What a loop is told ---

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
