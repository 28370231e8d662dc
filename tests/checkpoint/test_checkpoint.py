"""What is restored is what was saved, to the bit, and a resumed run is the run that was not interrupted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from support.checkpoints import sharding

import jmp_lite as jmp
from jmp_lite import checkpoint
from jmp_lite.checkpoint._state import target

SCALES = {
    "dynamic": jmp.DynamicLossScale(2.0**10, period=3),
    "megatron": jmp.DynamicLossScale.like("megatron", loss_scale=2.0**12, period=3),
    "static": jmp.StaticLossScale(2.0**10),
    "noop": jmp.NoOpLossScale(),
}


def through_bytes(state, template, tmp_path, policy="mixed_float16"):
    return checkpoint.from_bytes(template, checkpoint.to_bytes(state, policy=policy), policy=policy)


def through_orbax(state, template, tmp_path, policy="mixed_float16"):
    checkpoint.save(tmp_path / "step", state, policy=policy)
    return checkpoint.restore(tmp_path / "step", template, policy=policy)


TRIPS = {"bytes": through_bytes, "orbax": through_orbax}
trips = pytest.mark.parametrize("trip", TRIPS.values(), ids=TRIPS)


def bits(leaf):
    """The bytes of an array or key, with its dtype."""
    data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return str(leaf.dtype), np.asarray(data).tobytes()


def make_optimizer(loss_scale):
    return jmp.loss_scaled(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)), loss_scale)


def make_state(key, loss_scale):
    params = {"w": jax.random.normal(key, (4, 3)), "b": jnp.zeros(3), "frozen": None}
    return {
        "params": params,
        "opt_state": make_optimizer(loss_scale).init(params),
        "rng": jax.random.fold_in(key, 1),
        "step": jnp.int32(0),
    }


def make_step(loss_scale):
    tx = make_optimizer(loss_scale)

    def loss_fn(params, x):
        half = jmp.get_policy("mixed_float16").cast_to_compute(params)
        return jnp.mean((x.astype(jnp.float16) @ half["w"] + half["b"][None]) ** 2)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        rng, data = jax.random.split(state["rng"])
        x = jax.random.normal(data, (8, 4)) * jnp.where(state["step"] % 5 == 4, jnp.inf, 1.0)
        _, grads = jmp.scaled_value_and_grad(loss_fn, loss_scale=state["opt_state"])(state["params"], x)
        params, opt_state = jmp.apply_gradients(tx, grads, state["opt_state"], state["params"])
        return {"params": params, "opt_state": opt_state, "rng": rng, "step": state["step"] + 1}

    return step


@pytest.mark.covering(1)
@trips
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_training_resumed_midway_is_bit_identical(trip, scale, key, tmp_path):
    """Seven steps, a round trip into a fresh state, seven more: the same bits as fourteen."""
    step = make_step(scale)
    interrupted, whole = make_state(key, scale), make_state(key, scale)
    for _ in range(7):
        interrupted, whole = step(interrupted), step(whole)
    fresh = make_state(jax.random.fold_in(key, 7), scale)
    interrupted = trip(interrupted, fresh, tmp_path)
    for _ in range(7):
        interrupted, whole = step(interrupted), step(whole)
    assert jax.tree.map(bits, whole) == jax.tree.map(bits, interrupted)
    assert jax.tree.structure(whole) == jax.tree.structure(interrupted)
    assert int(jmp.metrics(whole["opt_state"])["total_notfinite"]) >= 2


@pytest.mark.covering(1)
@trips
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn", "int8", "bool", "complex64"])
def test_every_dtype_survives(trip, dtype, rng, tmp_path):
    """Sixteen-bit, eight-bit, complex and integer arrays come back as they were."""
    state = {"x": jnp.asarray(rng.integers(0, 2, (3, 2)), dtype)}
    assert jax.tree.map(bits, state) == jax.tree.map(bits, trip(state, jax.tree.map(jnp.zeros_like, state), tmp_path))


@trips
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_keys_keep_their_implementation(trip, impl, seed, tmp_path):
    """A key of any generator comes back as a key of that generator."""
    state = {"rng": jax.random.key(seed, impl=impl)}
    restored = trip(state, {"rng": jax.random.key(0, impl=impl)}, tmp_path)
    assert jax.tree.map(bits, state) == jax.tree.map(bits, restored)


@trips
def test_flax_train_state_survives(trip, key, tmp_path):
    """A Flax TrainState around loss_scaled is restored with its step and its scale."""

    def make(key):
        params = {"w": jax.random.normal(key, (4, 3))}
        return TrainState.create(apply_fn=None, params=params, tx=make_optimizer(SCALES["dynamic"]))

    state = make(key)
    state = state.apply_gradients(grads=state.params)
    state = state.apply_gradients(grads={"w": state.params["w"] * jnp.inf})
    fresh = make(jax.random.fold_in(key, 1))
    restored = trip(state, fresh.replace(step=jnp.int32(0)) if trip is through_orbax else fresh, tmp_path)
    assert int(restored.step) == 2
    assert float(restored.opt_state.loss_scale.loss_scale) == 2.0**9
    assert jax.tree.map(bits, state.opt_state) == jax.tree.map(bits, restored.opt_state)


@trips
def test_restored_arrays_take_the_sharding_of_the_template(trip, tmp_path):
    """A state saved from one device is restored onto eight."""
    template = {"w": jax.device_put(jnp.zeros(16), sharding(8, "data"))}
    restored = trip({"w": jnp.arange(16.0)}, template, tmp_path)
    assert restored["w"].sharding == sharding(8, "data")
    assert jnp.array_equal(restored["w"], jnp.arange(16.0))


def test_a_sharded_leaf_is_read_onto_its_devices():
    """No process holds all of it."""
    leaf = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding(8, "data"))
    assert target({"dtype": "bfloat16", "number": False}, leaf).sharding == leaf.sharding


@trips
@pytest.mark.parametrize("policy", ["mixed_float16", jmp.PolicyMap({"head": "full"}, default="bf16-mixed")])
def test_policy_mismatch_is_an_error_that_names_both(trip, policy, tmp_path):
    """Weights trained under one policy are not silently used under another."""
    state = {"w": jnp.ones(2)}
    assert trip(state, state, tmp_path / "same", policy)["w"].shape == (2,)
    data = checkpoint.to_bytes(state, policy=policy)
    with pytest.raises(jmp.errors.PolicyMismatchError) as error:
        checkpoint.from_bytes(state, data, policy="bf16")
    assert repr(str(jmp.get_policy(policy))) in str(error.value)
    assert "'p=bf16,c=bf16,o=bf16'" in str(error.value)
    with pytest.raises(jmp.errors.PolicyMismatchError):
        checkpoint.restore(tmp_path / "same" / "step", state, policy="bf16") if trip is through_orbax else (
            checkpoint.from_bytes(state, data, policy="bf16")
        )


def test_another_kind_of_loss_scale_is_an_error():
    """A dynamic scale is not restored into a static one."""
    saved = {"opt": make_optimizer(SCALES["dynamic"]).init({"w": jnp.ones(2)})}
    template = {"opt": make_optimizer(SCALES["static"]).init({"w": jnp.ones(2)})}
    data = checkpoint.to_bytes(saved, policy="full")
    with pytest.raises(
        jmp.errors.InvalidLossScaleError, match=r"'opt/loss_scale' is a DynamicLossScale\(.*, but a StaticLossScale\("
    ):
        checkpoint.from_bytes(template, data, policy="full")


def test_saving_twice_to_one_directory_is_refused(tmp_path):
    """A checkpoint is never overwritten by accident."""
    checkpoint.save(tmp_path / "step", {"w": jnp.ones(2)}, policy="full")
    with pytest.raises(ValueError, match="already exists"):
        checkpoint.save(tmp_path / "step", {"w": jnp.ones(2)}, policy="full")
