"""DynamicScale: the trajectory and the interface of Flax's class, without its defects."""

import flax.serialization
import flax.training.dynamic_scale
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from support.comparisons import DEVICES, assert_identical, mesh, read_json

import jmp_lite as jmp
from jmp_lite.linen import DynamicScale

# Every way in which users build a scale.
IDIOMS = {
    "default": DynamicScale,
    "python float": lambda: DynamicScale(scale=2.0**15),
    "python int": lambda: DynamicScale(scale=2**15, fin_steps=0),
    "weak array": lambda: DynamicScale(scale=jnp.asarray(2.0**15), fin_steps=jnp.asarray(0)),
    "strong array": lambda: DynamicScale(scale=jnp.float32(2**15), fin_steps=jnp.int32(0)),
    "numpy": lambda: DynamicScale(scale=np.float64(2**15), fin_steps=np.int64(0)),
    "float16": lambda: DynamicScale(scale=jnp.float16(2**15)),
    "replace": lambda: DynamicScale().replace(scale=2.0**15),
}


def loss_of(w, factor):
    """A loss whose gradient is ``factor``: finite, or not."""
    return jnp.sum(w * factor)


def step(dynamic_scale, finite):
    """One step with gradients that are finite or not."""
    factor = jnp.where(finite, jnp.float32(1), jnp.float32(jnp.inf))
    return dynamic_scale.value_and_grad(loss_of)(jnp.ones(2), factor)


# --- The trajectory of Flax ---


@pytest.mark.parametrize("run", read_json("golden_flax.json"), ids=lambda run: run["pattern"])
def test_trajectory_is_that_of_flax(run):
    """Scale and counter follow the recorded states of Flax exactly."""

    def scanned(dynamic_scale, finite):
        new, is_finite, _, _ = step(dynamic_scale, finite)
        return new, (new.scale, new.fin_steps, is_finite)

    finite = jnp.array(run["finite"], bool)
    _, (scales, counters, verdicts) = jax.lax.scan(scanned, DynamicScale(**run["config"]), finite)
    expected = run["states"][1:]
    np.testing.assert_array_equal(scales, np.array([state["scale"] for state in expected], np.float32))
    np.testing.assert_array_equal(counters, [state["fin_steps"] for state in expected])
    np.testing.assert_array_equal(verdicts, finite)


def test_fields_and_defaults_are_those_of_flax():
    """Code that builds, replaces or reads a scale by field need not change."""
    ours, theirs = DynamicScale(), flax.training.dynamic_scale.DynamicScale()
    fields = list(vars(theirs))
    assert list(vars(ours)) == fields
    assert [getattr(ours, field) == getattr(theirs, field) for field in fields] == [True] * len(fields)


def test_agrees_with_flax_where_flax_is_right(rng):
    """Gradients, loss, auxiliary output and state of an ordinary step are Flax's, bit for bit."""
    params = {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}
    x = jnp.asarray(rng.normal(size=3), jnp.float32)

    def loss_fn(params, x):
        return jnp.mean((params["w"] * x) ** 2), {"x": x}

    results = []
    for scale in (DynamicScale(), flax.training.dynamic_scale.DynamicScale()):
        with jax.numpy_dtype_promotion("standard"):
            new, *rest = scale.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)(params, x)
        results.append((rest, {"scale": jnp.float32(new.scale), "fin_steps": jnp.int32(new.fin_steps)}))
    ours, theirs = results
    assert_identical(ours, (theirs[0], theirs[1]))


def test_results_have_names():
    """The result is a named tuple with Flax's names."""
    result = DynamicScale().value_and_grad(lambda w: w**2)(3.0)
    assert result._fields == flax.training.dynamic_scale.DynamicScaleResult._fields
    assert (result.aux, result.grad, bool(result.finite)) == (9, 6, True)


# --- The defects of Flax ---


def test_the_loss_of_an_overflowing_step_is_the_true_one():
    """The default scale overflows a float16 loss on the first step: Flax returns nan, the truth is 9."""
    _, finite, loss, _ = DynamicScale().value_and_grad(lambda w: (w * jnp.float16(3)) ** 2)(jnp.float16(1))
    assert (bool(finite), float(loss), loss.dtype) == (False, 9.0, jnp.float32)


@pytest.mark.parametrize("make", IDIOMS.values(), ids=IDIOMS)
def test_ten_steps_are_traced_once(make):
    """The default is a Python float, and still no weak type causes a second trace."""
    traces = []

    @jax.jit
    def train_step(dynamic_scale, finite):
        traces.append(dynamic_scale)
        return step(dynamic_scale, finite)

    dynamic_scale = make()
    for finite in [True] * 5 + [False] + [True] * 4:
        dynamic_scale, *_ = train_step(dynamic_scale, finite)
    assert len(traces) == 1


def test_gradients_of_complex_parameters_keep_their_imaginary_part():
    """The gradient of |p|**2 at 1+1j is 2-2j."""
    result = DynamicScale().value_and_grad(lambda p: jnp.abs(p) ** 2)(jnp.complex64(1 + 1j))
    np.testing.assert_allclose(result.grad, 2 - 2j, rtol=1e-6)


def test_gradients_of_float64_parameters_are_float64():
    """With x64 enabled nothing is rounded to float32."""
    with jax.enable_x64(True):
        result = DynamicScale().value_and_grad(lambda p: p * np.pi)(jnp.float64(1))
    assert (result.grad.dtype, float(result.grad)) == (np.float64, np.pi)


def test_integer_leaves_and_keyword_arguments_are_no_obstacle():
    """Integers get float0 gradients; keywords reach the function, also one called state."""

    def loss_fn(params, *, state, scale=1.0):
        return params["w"] * scale * state

    params = {"w": jnp.float32(2), "step": jnp.int32(7), "key": jax.random.key(0)}
    result = DynamicScale().value_and_grad(loss_fn)(params, state=jnp.float32(3), scale=jnp.float32(5))
    assert (float(result.aux), float(result.grad["w"])) == (30, 15)
    assert result.grad["step"].dtype == result.grad["key"].dtype == jax.dtypes.float0


@pytest.mark.parametrize("minimum", [None, 0.0, DynamicScale().minimum_scale], ids=str)
def test_the_scale_never_leaves_its_bounds(minimum):
    """After 400 bad steps the scale is at its floor, after 400 good ones below infinity, and its inverse finite."""
    dynamic_scale = DynamicScale(growth_interval=0, minimum_scale=minimum)
    for finite, bound in [(False, 2.0**-126), (True, 2.0**126)]:
        verdicts = jnp.full(400, finite)
        end, _ = jax.lax.scan(lambda scale, finite: (step(scale, finite).dynamic_scale, None), dynamic_scale, verdicts)
        assert float(end.scale) == bound


def test_a_floor_holds():
    """The scale does not fall below minimum_scale."""
    dynamic_scale = DynamicScale(scale=8.0, minimum_scale=2.0)
    for _ in range(4):
        dynamic_scale = step(dynamic_scale, False).dynamic_scale
    assert float(dynamic_scale.scale) == 2


@pytest.mark.parametrize("loss", [lambda w: jnp.int32(3), lambda w: jnp.ones(2) * w], ids=["integer", "vector"])
def test_a_loss_that_is_no_real_scalar_is_reported(loss):
    """The error says what was returned."""
    with pytest.raises(jmp.errors.InvalidFunctionError, match=r"int32\[\]|float32\[2\]"):
        DynamicScale().value_and_grad(loss)(1.0)


# --- Replicas, trees, checkpoints ---


@pytest.mark.parametrize("mapped", ["pmap", "shard_map"])
def test_replicas_average_their_gradients_and_agree(mapped):
    """One replica's overflow is everybody's; gradients are averaged before they are checked."""

    def replica_step(dynamic_scale, w, factor):
        new, finite, _, grads = dynamic_scale.value_and_grad(loss_of, axis_name="batch")(w, factor[0])
        return new.scale[None], finite[None], grads[None]

    if mapped == "pmap":
        run = jax.pmap(replica_step, axis_name="batch", in_axes=(None, None, 0))
    else:
        specs = PartitionSpec(), PartitionSpec(), PartitionSpec("batch")
        run = jax.jit(
            jax.shard_map(replica_step, mesh=mesh(), in_specs=specs, out_specs=PartitionSpec("batch"), check_vma=False)
        )
    factors = jnp.arange(float(DEVICES)).reshape(DEVICES, 1)
    for bad in (False, True):
        factors = factors.at[3].set(jnp.inf) if bad else factors
        scale, finite, grads = run(DynamicScale(), jnp.ones(()), factors)
        assert set(np.ravel(scale).tolist()) == {2.0**15 if bad else 2.0**16}
        assert set(np.ravel(finite).tolist()) == {not bad}
        assert bad or set(np.ravel(grads).tolist()) == {(DEVICES - 1) / 2}


def test_state_is_restored_from_bytes():
    """Scale and counter survive flax.serialization, under the names that Flax uses."""
    dynamic_scale, *_ = step(DynamicScale(scale=8.0), True)
    assert set(flax.serialization.to_state_dict(dynamic_scale)) == {"fin_steps", "scale"}
    restored = flax.serialization.from_bytes(DynamicScale(), flax.serialization.to_bytes(dynamic_scale))
    assert (float(restored.scale), int(restored.fin_steps)) == (8.0, 1)


@pytest.mark.parametrize("placeholder", [None, "x", PartitionSpec()], ids=str)
def test_trees_of_placeholders_can_be_made(placeholder):
    """A scale may be mapped to a tree of anything, such as shardings."""
    mapped = jax.tree.map(lambda _: placeholder, DynamicScale())
    assert (mapped.scale, mapped.fin_steps) == (placeholder, placeholder)
