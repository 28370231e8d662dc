"""What a loop logs and checks about its loss scale: metrics and check_loss_scale."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmp_lite as jmp

OF_UPDATES = ["nonfinite_updates", "total_nonfinite_updates"]
NAMES = ["loss_scale", "last_finite", "notfinite_count", "total_notfinite", *OF_UPDATES]
PARAMS = {"decoder": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
BAD = {"decoder": {"kernel": jnp.array([1.0, np.nan]), "bias": jnp.full(2, np.inf)}}


def after_skips(tx, skips):
    """The state after so many bad steps."""
    return jax.lax.fori_loop(0, skips, lambda _, state: tx.update(BAD, state, PARAMS)[1], tx.init(PARAMS))


# --- metrics ---


@pytest.mark.parametrize(
    ("scale", "value"),
    [(jmp.NoOpLossScale(), 1), (jmp.StaticLossScale(8.0), 8), (jmp.DynamicLossScale(8.0), 8)],
    ids=["none", "static", "dynamic"],
)
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_metrics_are_scalars_of_fixed_types(scale, value, run):
    """Every kind of scale gives the same scalars of the same dtypes, inside and outside jit."""
    found = run(jmp.metrics)(jmp.loss_scaled(optax.sgd(0.1), scale).init(PARAMS))
    assert sorted(found) == sorted(NAMES)
    assert {name: (v.shape, v.dtype.name) for name, v in found.items()} == {
        "loss_scale": ((), "float32"),
        "last_finite": ((), "bool"),
        "notfinite_count": ((), "int32"),
        "total_notfinite": ((), "int32"),
        **dict.fromkeys(OF_UPDATES, ((), "int32")),
    }
    if run is not jax.jit:
        assert json.loads(json.dumps(jax.tree.map(lambda x: x.tolist(), found)))["loss_scale"] == value
    assert float(found["loss_scale"]) == value


def test_metrics_follow_the_steps():
    """After two skips and a step the numbers say so."""
    tx = jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(8.0))
    state = after_skips(tx, 2)
    assert [float(jmp.metrics(state)[name]) for name in NAMES] == [2, 0, 2, 2, 0, 0]
    _, state = tx.update(PARAMS, state, PARAMS)
    assert [float(jmp.metrics(state)[name]) for name in NAMES] == [2, 1, 0, 2, 0, 0]


def test_metrics_outlive_a_state_that_is_donated():
    tx = jmp.loss_scaled(optax.sgd(0.1), jmp.StaticLossScale(8.0))
    state = tx.init({"w": jnp.ones(2)})
    logged = jmp.metrics(state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    assert jax.tree.map(lambda x: x.tolist(), logged)["loss_scale"] == 8.0


def test_metrics_of_several_scales_carry_their_paths():
    """With two scales each name has the path of its state in front."""
    pair = {"a": jmp.loss_scaled(optax.sgd(0.1), jmp.StaticLossScale(2.0)), "b": jmp.loss_scaled(optax.sgd(0.1))}
    state = optax.multi_transform(pair, {"w": "a", "v": "b"}).init({"w": 1.0, "v": 1.0})
    found = jmp.metrics(state)
    assert sorted(found) == sorted(f"inner_states/{label}/inner_state/{name}" for label in "ab" for name in NAMES)
    assert float(found["inner_states/a/inner_state/loss_scale"]) == 2


@pytest.mark.parametrize("call", [jmp.metrics, jmp.check_loss_scale])
@pytest.mark.parametrize("state", [optax.adam(0.1).init(PARAMS), jmp.DynamicLossScale(), None, {}], ids=str)
def test_state_without_loss_scaling(call, state):
    """A state that loss_scaled did not make is named, with the remedy."""
    with pytest.raises(jmp.errors.LossScaleNotFoundError) as error:
        call(state)
    assert str(error.value) == (
        f"No loss scale in the state, which is of type {type(state).__name__}. Pass the state of an optimizer "
        "wrapped in jmp_lite.loss_scaled."
    )


# --- check_loss_scale ---

REMEDY = (
    "The gradients overflow or are NaN even without scaling: look for NaN in the data, a learning rate that is too "
    "high or a layer that overflows in the compute dtype; try the policy 'mixed_bfloat16', or a lower min_loss_scale."
)


def test_stalled_training_is_reported():
    """Ten skips in a row at the floor raise, with the count, the scale, the leaves and what to do; nine do not."""
    tx = jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(4.0))
    jmp.check_loss_scale(after_skips(tx, 9), BAD)
    with pytest.raises(jmp.errors.LossScaleStalledError) as error:
        jmp.check_loss_scale(after_skips(tx, 10), BAD)
    assert str(error.value) == (
        "10 steps in a row were skipped and the loss scale 1 cannot go lower. Not finite in the gradients given: "
        f"decoder/bias, decoder/kernel. {REMEDY}"
    )


def test_stalled_training_without_gradients():
    """Without gradients the message asks for them; the path of the state is given where there is one."""
    tx = optax.named_chain(("scaled", jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(1.0))))
    with pytest.raises(jmp.errors.LossScaleStalledError) as error:
        jmp.check_loss_scale(after_skips(tx, 3), max_skips=3)
    assert str(error.value) == (
        "3 steps in a row were skipped and the loss scale 1 cannot go lower (state at 'scaled'). Pass the gradients of "
        f"a skipped step as grads= to see which leaves are not finite. {REMEDY}"
    )


# Scale, skips in a row, whether that is a stall (of 10).
STALLS = {
    "still falling": (jmp.DynamicLossScale(2.0**30, max_loss_scale=2.0**30), 20, False),
    "at the floor": (jmp.DynamicLossScale(2.0**4), 14, True),
    "floor below one": (jmp.DynamicLossScale(2.0**4, min_loss_scale=2.0**-20), 14, False),
    "floor of zero": (jmp.DynamicLossScale(2.0**-110, min_loss_scale=0), 20, True),
    "static": (jmp.StaticLossScale(2.0**15), 10, True),
    "none": (jmp.NoOpLossScale(), 10, True),
    "constant": (jmp.DynamicLossScale(2.0**15, factor=1), 10, True),
    "constant by back-off": (jmp.DynamicLossScale(2.0**15, backoff_factor=1), 10, True),
    "few skips": (jmp.StaticLossScale(2.0**15), 9, False),
}


@pytest.mark.parametrize(("scale", "skips", "stalled"), STALLS.values(), ids=STALLS)
def test_a_stall_is_skips_at_the_lowest_scale(scale, skips, stalled):
    """Skips count as a stall only where the scale can go no lower; one that never moves is always there."""
    state = after_skips(jmp.loss_scaled(optax.sgd(0.1), scale), skips)
    if not stalled:
        jmp.check_loss_scale(state)
        return
    with pytest.raises(jmp.errors.LossScaleStalledError, match=rf"^{skips} steps in a row were skipped"):
        jmp.check_loss_scale(state)


def test_check_understands_replicas():
    """A state with a leading device axis, as pmap returns it, is checked as well."""
    tx = jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(1.0))
    for replicas in (1, 8):
        state = jax.tree.map(lambda x, n=replicas: jnp.stack([x] * n), after_skips(tx, 12))
        with pytest.raises(jmp.errors.LossScaleStalledError, match=r"^12 steps"):
            jmp.check_loss_scale(state)
        assert jmp.metrics(state)["loss_scale"].shape == (replicas,)


def test_one_skip_may_be_too_many():
    """The least limit is one step."""
    tx = jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(1.0))
    jmp.check_loss_scale(after_skips(tx, 0), max_skips=1)
    with pytest.raises(jmp.errors.LossScaleStalledError, match="1 step"):
        jmp.check_loss_scale(after_skips(tx, 1), max_skips=1)


@pytest.mark.parametrize("gradient", [1.0, np.nan])
def test_eager_steps_count_what_compiled_ones_do(gradient):
    """A skipped step has no update that is not finite."""
    tx = jmp.loss_scaled(optax.sgd(0.1))
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.full(3, gradient)}
    eager, compiled = (update(grads, tx.init(params), params)[1] for update in (tx.update, jax.jit(tx.update)))
    assert jax.tree.map(float, jmp.metrics(eager)) == jax.tree.map(float, jmp.metrics(compiled))
    assert int(jmp.metrics(eager)["nonfinite_updates"]) == 0
