"""Who is warned at `init` that an optimizer loses updates of parameters of 16 bits, and who is not."""

import jax
import jax.numpy as jnp
import optax
import pytest
from support.storage import WEIGHTS, adam, dtypes, weights

import jmp_lite as jmp
from jmp_lite import errors
from jmp_lite.optim import stored
from jmp_lite.scaling import _lost_updates


@dtypes
def test_lost_updates_are_said(dtype, rng):
    """Once, at `init`, with the wrapper that helps; not under that wrapper."""
    leaves = weights(rng, dtype)
    with pytest.warns(jmp.errors.LostUpdatesWarning, match=rf"'bias' \({dtype}\).*optim.master_weights"):
        jmp.loss_scaled(adam()).init(leaves)
    for params in WEIGHTS:
        jmp.loss_scaled(stored(adam(), params=params)).init(leaves)
    jmp.loss_scaled(adam()).init(weights(rng, jnp.float32))


LABELS = {"kernel": "trained", "bias": "frozen", "gain": "frozen"}
TRAINED = {"kernel": True, "bias": False, "gain": False}
NOT_TRAINED = {name: not is_trained for name, is_trained in TRAINED.items()}
FROZEN = {
    "multi_transform": lambda tx: optax.multi_transform({"trained": tx, "frozen": optax.set_to_zero()}, LABELS),
    "masked, then set to zero": lambda tx: optax.chain(
        optax.masked(tx, TRAINED), optax.masked(optax.set_to_zero(), NOT_TRAINED)
    ),
    "set to zero, scaled": lambda tx: optax.chain(
        optax.multi_transform({"trained": tx, "frozen": optax.set_to_zero()}, LABELS), optax.scale(-1.0)
    ),
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("tx", [optax.sgd(0.1), adam(), stored(adam(), params="split8")], ids=["sgd", "adam", "stored"])
def test_parameters_that_never_change_lose_no_updates(tx, frozen, rng):
    """As under low-rank adapters: the frozen ones may well have 16 bits."""
    leaves = weights(rng, "bfloat16")
    is_stored = hasattr(tx.init(leaves), "low")
    if is_stored:
        jmp.loss_scaled(frozen(tx)).init(leaves)  # warnings are errors
    else:
        jmp.loss_scaled(frozen(tx)).init({**leaves, "kernel": leaves["kernel"].astype(jnp.float32)})
        with pytest.warns(jmp.errors.LostUpdatesWarning, match="'kernel'") as caught:
            jmp.loss_scaled(frozen(tx)).init(leaves)
        assert "'bias'" not in str(caught[0].message)


MAY_CHANGE = {
    "left alone": optax.masked(optax.sgd(0.1), TRAINED),
    "value": optax.polyak_sgd(),
    "a mean over devices": optax.stateless(lambda grads, _: jax.lax.pmean(grads, "batch")),
    "an argument of its own": optax.GradientTransformationExtraArgs(
        lambda _: optax.EmptyState(), lambda grads, state, _=None, **extra_args: (extra_args["own"], state)
    ),
}


@pytest.mark.parametrize("tx", MAY_CHANGE.values(), ids=MAY_CHANGE)
def test_parameters_that_may_change_are_said(tx, rng):
    """Gradients pass `masked` as they are; an optimizer that takes more than gradients is not looked into."""
    with pytest.warns(jmp.errors.LostUpdatesWarning, match="'bias'"):
        jmp.loss_scaled(tx).init(weights(rng, "bfloat16"))


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
