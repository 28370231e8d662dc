"""The verified defects of jmp, mpx, jaxamp, Flax, Optax and Keras in loss scaling, and that jmp_lite has none of them.

The docstrings say what the other library does.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from support.comparisons import DEVICES, apply_updates, mesh, standard

import jmp_lite as jmp

#: What happens to parameters of 16 bits is asked here of plain optimizers.
pytestmark = pytest.mark.filterwarnings("ignore:Parameters of 16 bits")

Dynamic = jmp.DynamicLossScale


def train(tx, params, grads):
    """One step of apply_gradients under jit."""
    return jax.jit(lambda p, s, g: jmp.apply_gradients(tx, g, s, p))(params, tx.init(params), grads)


def after(scale, good, steps):
    """The scale after so many equal verdicts, compiled."""
    start = jax.tree.map(jnp.asarray, scale)
    return jax.lax.scan(lambda s, _: (s.adjust(good), None), start, length=steps)[0]


# --- jmp 0.0.4 ---


def test_jmp_loses_the_minimum_in_tree_flatten():
    """One jitted step turns jmp's floor of 0.25 into 1."""
    scale = Dynamic(jnp.float32(1), min_loss_scale=jnp.float32(0.25))
    assert float(jax.jit(lambda s, g: s.adjust(g))(scale, jnp.array(False)).loss_scale) == 0.5
    assert float(after(scale, False, 20).loss_scale) == 0.25


def test_jmp_validates_placeholders():
    """Mapping jmp's scale to PartitionSpec, None or a string raises, and so does lowering."""
    scale = Dynamic(jnp.float32(8))
    for placeholder in (P(), None, "x"):
        assert jax.tree.map(lambda _, p=placeholder: p, scale).loss_scale is placeholder
    jax.jit(lambda s: s.adjust(True)).lower(scale)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_jmp_cannot_adjust_a_scale_of_another_dtype(dtype, x64):
    """A float16 scale, or the README's scale under x64, raises in jmp's adjust."""
    with jax.enable_x64(x64):
        value = np.asarray(2.0**14).astype(dtype) if dtype != "float64" else jnp.asarray(2.0**14)
        assert float(Dynamic(jnp.asarray(value), period=1).adjust(jnp.array(True)).loss_scale) == 2.0**15


def test_jmp_weak_scale_overflows_a_half_loss():
    """The README's weakly typed scale multiplies a float16 loss in float16: infinite on step one."""
    for scale in (Dynamic(jnp.asarray(2.0**15)), Dynamic(2.0**15), jmp.StaticLossScale(2**15)):
        assert float(scale.scale(jnp.float16(3))) == 98304


def test_jmp_has_no_maximum():
    """jmp's scale passes 2**16, where the cotangent of a float16 loss is infinite; ours comes back by itself."""
    assert float(after(Dynamic(2.0**20, period=1), True, 300).loss_scale) == 2.0**24
    tx = jmp.loss_scaled(optax.sgd(1.0), Dynamic(2.0**17))
    params, state = {"w": jnp.ones(1)}, tx.init({"w": jnp.ones(1)})
    for _ in range(3):
        loss_fn = lambda p: jnp.sum(p["w"].astype(jnp.float16))  # noqa: E731
        _, grads = jmp.scaled_value_and_grad(loss_fn, loss_scale=state)(params)
        params, state = jmp.apply_gradients(tx, grads, state, params)
    assert int(state.total_notfinite) == 2  # 2**17 and 2**16
    assert float(params["w"][0]) == 0


def test_jmp_static_scale_leaks_a_tracer():
    """Built from a traced value and returned from jit, jmp's static scale fails later, far from the cause."""
    with pytest.raises(jmp.errors.InvalidLossScaleError):
        jax.jit(jmp.StaticLossScale)(jnp.float32(8))
    moving = jax.jit(lambda x: Dynamic(x, factor=1))(jnp.float32(8))
    assert float(moving.scale(1.0)) == 8


def test_jmp_scales_integers_and_crashes_on_float0_and_keys(key):
    """jmp turns int32 3 into float 1.5, and raises for float0 and typed keys."""
    tree = {"n": jnp.int32(3), "f": np.zeros(2, jax.dtypes.float0), "k": key}
    unscaled = Dynamic(2.0).unscale(tree)
    assert all(unscaled[name] is tree[name] for name in tree)


def test_jmp_unscales_half_gradients_in_half():
    """jmp's static scale leaves unscaled gradients in float16, where they underflow to zero."""
    small = jmp.StaticLossScale(2.0**15).unscale(jnp.float16(2.0**-14))
    assert small.dtype == jnp.float32
    assert float(small) == 2.0**-29


def test_jmp_select_tree_refuses_mixed_dtypes_and_python_booleans():
    """float32 against float16, a Python predicate and equal strings all raise in jmp."""
    chosen = jmp.select_tree(True, {"a": jnp.float32(1), "s": "x"}, {"a": jnp.float16(2), "s": "x"})
    assert (chosen["a"].dtype, float(chosen["a"]), chosen["s"]) == (jnp.float32, 1, "x")


def test_jmp_policy_casts_the_loss_scale():
    """Casting a train state to float16 makes jmp's scale of 2**17 infinite."""
    state = jmp.get_policy("mixed_float16").cast_to_compute({"scale": Dynamic(2.0**17)})
    assert float(state["scale"].loss_scale) == 2.0**17


def test_jmp_all_finite_is_per_shard():
    """Inside shard_map each shard of jmp's check has its own answer; axis_name gives one."""
    check = functools.partial(jmp.all_finite, axis_name="batch")
    run = jax.shard_map(lambda x: check(x)[None], mesh=mesh(), in_specs=P("batch"), out_specs=P("batch"))
    assert not jax.jit(run)(jnp.ones(DEVICES).at[2].set(np.nan)).any()


# --- mpx 0.1.8 ---


@pytest.mark.parametrize("period", [1, 2])
def test_mpx_gradients_are_wrong_on_each_growth_step(period):
    """mpx adjusts first and unscales with the new scale: value 2.5 and gradients [1, 2] instead of 5 and [2, 4]."""
    tx = jmp.loss_scaled(optax.identity(), Dynamic(1024.0, period=period))
    params = jnp.array([1.0, 2.0])
    state = tx.init(params)
    for _ in range(4):
        value, grads = jmp.scaled_value_and_grad(lambda p: (p**2).sum(), loss_scale=state)(params)
        updates, state = tx.update(grads, state, params)
        assert float(value) == 5
        np.testing.assert_array_equal(updates, [2, 4])


def test_mpx_clips_the_scale_to_65504():
    """mpx's scale stops at 65504, no power of two, and rounds every gradient from then on."""
    scale = after(Dynamic(2.0**15, period=1), True, 5)
    assert float(scale.loss_scale) == 2.0**20
    assert float(scale.scale(jnp.bfloat16(3))) == 3 * 2.0**20


def test_mpx_update_with_half_parameters_raises():
    """bfloat16 parameters and float32 updates are a TypeError in mpx's optimizer_update."""
    params, _ = train(
        jmp.loss_scaled(optax.sgd(0.5), Dynamic(1.0)), {"w": jnp.ones(2, jnp.bfloat16)}, {"w": jnp.ones(2)}
    )
    assert (params["w"].dtype, float(params["w"][0])) == (jnp.bfloat16, 0.5)


def test_mpx_needs_an_array_and_scales_integers(key):
    """A Python-float scale is an AttributeError in mpx, integers are scaled into float16, keys crash."""
    tree = {"n": jnp.int32(3), "k": key}
    assert Dynamic(8.0).adjust(True).scale(tree)["n"] is tree["n"]
    assert Dynamic(8.0).unscale(tree)["k"] is key


def test_mpx_without_scaling_never_reports_an_overflow():
    """With mixed precision off, mpx reports every gradient as finite."""
    tx = jmp.loss_scaled(optax.sgd(0.5), jmp.NoOpLossScale())
    params, state = train(tx, {"w": jnp.ones(2)}, {"w": jnp.array([1.0, np.nan])})
    assert not bool(state.last_finite)
    np.testing.assert_array_equal(params["w"], [1, 1])


# --- jaxamp ---


@pytest.mark.parametrize("good", [True, False])
def test_jaxamp_scale_reaches_infinity_and_zero(good):
    """jaxamp's scale is infinite after 125 growths, for ever, and zero after 200 bad steps."""
    scale = after(Dynamic(2.0**15, period=1, min_loss_scale=0, max_loss_scale=2.0**126), good, 300)
    assert 0 < float(scale.loss_scale) < np.inf


def test_jaxamp_retries_ten_times_by_default():
    """A NaN model costs jaxamp eleven passes and 2**11 of scale in one step; here retries are off unless asked for."""
    result = jmp.scaled_value_and_grad(lambda p: p * np.nan, loss_scale=Dynamic(2.0**15))(1.0)
    assert len(result) == 2


# --- Flax DynamicScale ---


def test_flax_first_half_step_is_nan():
    """With an fp16 loss Flax's default scale overflows on step one, and the loss it returns is nan."""
    loss, _ = jmp.scaled_value_and_grad(lambda p: p * jnp.float16(3), loss_scale=Dynamic.like("flax"))(jnp.float16(1))
    assert float(loss) == 3
    assert loss.dtype == jnp.float32


def test_flax_grows_one_step_late():
    """With an interval of 2 Flax grows on steps 3 and 6; the period here is what it says."""
    scale, seen = Dynamic(8.0, period=2), []
    for _ in range(6):
        scale = scale.adjust(True)
        seen.append(float(scale.loss_scale))
    assert seen == [8, 16, 16, 32, 32, 64]


def test_flax_gradients_lose_precision_and_imaginary_parts():
    """Flax casts all gradients to float32: complex ones lose a part, float64 ones half their digits."""
    _, grad = jmp.scaled_value_and_grad(lambda p: jnp.real(p * jnp.conj(p)), loss_scale=Dynamic(8.0))(
        jnp.complex64(1 + 1j)
    )
    assert complex(Dynamic(8.0).unscale(grad)) == 2 - 2j
    with jax.enable_x64(True):
        _, grad = jmp.scaled_value_and_grad(lambda p: p / 3, loss_scale=Dynamic(8.0))(jnp.float64(1))
        assert float(Dynamic(8.0).unscale(grad)) == 1 / 3


def test_flax_takes_neither_integers_nor_keywords():
    """An integer leaf is a TypeError in Flax and keyword arguments are not accepted."""
    fun = lambda p, *, by: p["w"] * by * p["n"].astype(jnp.float32)  # noqa: E731
    loss, grads = jmp.scaled_value_and_grad(fun, loss_scale=Dynamic(8.0))(
        {"w": 2.0, "n": jnp.int32(3)}, by=jnp.float32(5)
    )
    assert (float(loss), float(grads["w"])) == (30, 120)


def test_flax_scale_falls_silently():
    """Flax's scale falls to 1e-38 without floor or alarm; ours stops, and check_loss_scale raises."""
    tx = jmp.loss_scaled(optax.sgd(1.0), Dynamic(8.0))
    state = tx.init({"w": jnp.ones(1)})
    for _ in range(13):
        _, state = tx.update({"w": jnp.full(1, np.nan)}, state)
    assert float(state.loss_scale.loss_scale) == 1
    with pytest.raises(jmp.errors.LossScaleStalledError):
        jmp.check_loss_scale(state)


def test_flax_replicas_diverge():
    """Without axis_name Flax's replicas disagree on the verdict under pmap; after pmean ours cannot."""
    tx = jmp.loss_scaled(optax.sgd(1.0), Dynamic(8.0))

    def step(x):
        params = {"w": jnp.ones(1)}
        _, grads = jmp.scaled_value_and_grad(lambda p: jnp.sum(p["w"] * x), loss_scale=Dynamic(8.0))(params)
        return jmp.apply_gradients(tx, jax.lax.pmean(grads, "batch"), tx.init(params), params)[1].last_finite

    assert not jax.pmap(step, "batch")(jnp.ones(DEVICES).at[5].set(np.inf)).any()


# --- Optax 0.2.8 ---


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "inner", [optax.adam(0.1), optax.adamw(0.1), optax.add_decayed_weights(0.1)], ids=["adam", "adamw", "decay"]
)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_optax_apply_if_finite_raises_for_half_gradients(inner, dtype):
    """With half gradients and float32 parameters the branches of apply_if_finite differ in dtype."""
    tx = jmp.loss_scaled(standard(inner), Dynamic(1.0))
    for value in (1.0, np.nan):
        params, state = train(tx, {"w": jnp.ones(2)}, {"w": jnp.full(2, value, dtype)})
        assert bool(state.last_finite) == (value == 1)
        assert params["w"].dtype == jnp.float32


def test_optax_gives_up_and_applies_nan():
    """After its limit apply_if_finite applies the NaN update; here no number of bad steps does."""
    tx = jmp.loss_scaled(optax.sgd(1.0), Dynamic(8.0))
    bad = {"w": jnp.full(1, np.nan)}
    step = lambda _, carry: jmp.apply_gradients(tx, bad, carry[1], carry[0])  # noqa: E731
    params, state = jax.lax.fori_loop(0, 1000, step, ({"w": jnp.ones(1)}, tx.init(bad)))
    assert (float(params["w"][0]), int(state.notfinite_count)) == (1, 1000)


def test_optax_clip_of_half_gradients_returns_zeros():
    """Ten float16 gradients of 3e4 have an infinite norm: Optax clips them to zero and steps all the same."""
    tx = jmp.loss_scaled(standard(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.125))), Dynamic(1.0))
    params, state = train(tx, {"w": jnp.ones(10)}, {"w": jnp.full(10, 3e4, jnp.float16)})
    np.testing.assert_allclose(params["w"], 0.875, rtol=1e-5)
    assert int(optax.tree.get(state.inner_state, "count")) == 1


def test_optax_adam_on_half_parameters_is_infinite():
    """Adam on float16 parameters with gradients of 1e-5 gives -inf: its second moment and eps are zero in float16."""
    tx = jmp.loss_scaled(standard(optax.adam(0.125)), Dynamic(1.0))
    params, _ = train(tx, {"w": jnp.ones(2, jnp.float16)}, {"w": jnp.full(2, 1e-5, jnp.float16)})
    np.testing.assert_allclose(params["w"].astype(jnp.float32), 0.875, rtol=2.0**-10)


def test_optax_none_update_for_an_integer_raises():
    """optax.apply_updates raises for a None update of an integer; apply_gradients leaves it alone."""
    tx = jmp.loss_scaled(optax.sgd(1.0), Dynamic(1.0))
    params = {"w": jnp.ones(1), "n": jnp.int32(3)}
    new, _ = jmp.apply_gradients(tx, {"w": jnp.ones(1), "n": None}, tx.init(params), params)
    assert new["n"] is params["n"]


def test_optax_multi_steps_accumulates_infinity():
    """MultiSteps alone keeps an infinity for ever; inside loss_scaled the bad micro-step is left out."""
    tx = jmp.loss_scaled(standard(optax.MultiSteps(optax.sgd(1.0), 2)), jmp.NoOpLossScale())
    params = {"w": jnp.zeros(1)}
    state = tx.init(params)
    for value in (1.0, np.inf, 3.0):
        params, state = jmp.apply_gradients(tx, {"w": jnp.full(1, value)}, state, params)
    assert float(params["w"][0]) == -2


def test_optax_schedule_advances_on_a_skipped_step():
    """A schedule outside apply_if_finite advances on a skipped step; everything inside loss_scaled is frozen."""
    tx = jmp.loss_scaled(standard(optax.sgd(optax.piecewise_constant_schedule(1.0, {1: 0.5}))), Dynamic(1.0))
    _, state = train(tx, {"w": jnp.ones(1)}, {"w": jnp.full(1, np.inf)})
    assert int(optax.tree.get(state, "count")) == 0


def test_optax_replicas_diverge():
    """Under pmap one replica of apply_if_finite steps and another does not; axis_name keeps them together."""
    tx = jmp.loss_scaled(optax.sgd(1.0), Dynamic(1.0), axis_name="batch")

    def step(grad):
        params = {"w": jnp.zeros(())}
        return apply_updates(params, tx.update({"w": grad}, tx.init(params), params)[0])["w"]

    assert not jax.pmap(step, "batch")(jnp.ones(DEVICES).at[1].set(np.nan)).any()


# --- Keras 3.15 on JAX ---


def test_keras_scale_is_unbounded():
    """Keras' scale is infinite after 113 growths, for ever, and 0 after 142 bad steps."""
    with warnings.catch_warnings(action="error"):
        keras = Dynamic.like("keras", period=1)
        for good, bound in ((True, 2.0**126), (False, 2.0**-126)):
            end = after(keras, good, 300)
            assert float(end.loss_scale) == bound
            assert float(end.unscale(end.scale(1.0))) == 1
        assert float(after(after(keras, False, 300), True, 10).loss_scale) == 2.0**-116
