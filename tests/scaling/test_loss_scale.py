"""Loss scales: their bits and types, the same inside every transformation and container."""

import copy
import pickle
import sys
import types

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.comparisons import assert_identical, compilations, mesh, slow_but_for, structure_and_dtypes
from support.loss_scales import every_scale, on_device

import jmp_lite as jmp

# Every way in which users build a scale; all must become the same strong float32.
IDIOMS = {
    "default": lambda: jmp.DynamicLossScale(period=3),
    "python float": lambda: jmp.DynamicLossScale(2.0**15, period=3),
    "weak array": lambda: jmp.DynamicLossScale(jnp.asarray(2.0**15), period=3),
    "strong array": lambda: jmp.DynamicLossScale(jnp.float32(2**15), period=3),
    "numpy scalar": lambda: jmp.DynamicLossScale(np.float32(2**15), period=3),
    "numpy float64": lambda: jmp.DynamicLossScale(np.float64(2**15), period=3),
    "numpy array": lambda: jmp.DynamicLossScale(np.array(2.0**15), period=3),
    "float16": lambda: jmp.DynamicLossScale(jnp.float16(2**15), period=3),
    "bfloat16": lambda: jmp.DynamicLossScale(jnp.bfloat16(2**15), period=3),
    "array settings": lambda: jmp.DynamicLossScale(
        2.0**15,
        period=np.int32(3),
        factor=jnp.float32(2),
        min_loss_scale=jnp.bfloat16(1),
        max_loss_scale=np.float64(2**24),
    ),
    "array counter": lambda: jmp.DynamicLossScale(2.0**15, jnp.array(0, jnp.int32), 3),
    "jnp int counter": lambda: jmp.DynamicLossScale(2.0**15, jnp.asarray(0), 3),
}

BEFORE = jmp.loss_scaled(optax.sgd(0.1))
every_idiom = pytest.mark.parametrize("make", IDIOMS.values(), ids=IDIOMS)


def run(scale, verdicts):
    """The scale after a string of verdicts such as ``"++-"``."""
    for verdict in verdicts:
        scale = scale.adjust(verdict == "+")
    return scale


# --- The same everywhere ---


@every_scale
def test_adjust_is_the_same_eagerly_and_compiled(make, rng):
    """Twenty random verdicts give bit-identical scales and settings eagerly, under jit, in scan, vmap and remat."""
    verdicts = rng.random(20) < 0.6
    eager = on_device(make())
    for good in verdicts:
        eager = eager.adjust(jnp.asarray(good))

    def step(scale, good):
        return scale.adjust(good), None

    scanned = lambda scale: jax.lax.scan(step, scale, verdicts)[0]  # noqa: E731
    jitted = jax.jit(step)
    stepped = make()
    for good in verdicts:
        stepped, _ = jitted(stepped, good)
    assert_identical(stepped, eager)
    assert_identical(jax.jit(scanned)(on_device(make())), eager)
    assert_identical(jax.jit(jax.checkpoint(scanned))(on_device(make())), eager)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), on_device(make()))
    assert_identical(jax.tree.map(lambda x: x[1], jax.vmap(scanned)(twice)), eager)


def test_minimum_survives_compilation():
    """The floor below 1 that jmp loses in tree_flatten holds under jit and in a scan of twenty bad steps."""
    scale = jmp.DynamicLossScale(1.0, min_loss_scale=0.25)
    assert float(jax.jit(lambda s: s.adjust(False))(scale).loss_scale) == 0.5
    end, _ = jax.lax.scan(lambda s, _: (s.adjust(False), None), on_device(scale), length=20)
    assert float(end.loss_scale) == 0.25


@every_scale
def test_fields_survive_containers(make):
    """Copies, pickles, identity jits and tree.map keep every field."""
    scale = make()
    for same in (copy.copy(scale), copy.deepcopy(scale), pickle.loads(pickle.dumps(scale))):  # noqa: S301
        assert_identical(same, scale)
    assert_identical(jax.tree.map(lambda x: x, scale), scale)
    assert_identical(jax.jit(lambda s: s)(scale), on_device(scale))


@every_scale
def test_placeholders_can_stand_in_for_arrays(make):
    """Trees of shardings, None, strings, shapes and plain objects can be made of a scale, and it lowers and prints."""
    scale = make()
    sharding = NamedSharding(mesh(), PartitionSpec())
    for placeholder in (PartitionSpec(), None, "replicated", object(), sharding):
        mapped = jax.tree.map(lambda _, p=placeholder: p, scale)
        assert mapped.loss_scale is placeholder
        assert mapped.counter is placeholder
        assert mapped.period == scale.period
        assert repr(mapped)
    shapes = jax.eval_shape(lambda s: s.adjust(True), scale)
    assert shapes.loss_scale == jax.ShapeDtypeStruct((), jnp.float32)
    compiled = jax.jit(lambda s: s.adjust(False)).lower(scale).compile()
    assert_identical(compiled(scale), jax.jit(lambda s: s.adjust(False))(scale))
    placed = jax.jit(lambda s: s, in_shardings=(jax.tree.map(lambda _: sharding, scale),))(scale)
    assert placed.loss_scale.sharding.is_fully_replicated


@every_scale
def test_flax_serialization_round_trip(make, rng):
    """A scale saved in the middle of its window continues exactly."""
    middle = run(on_device(make()), rng.choice(["+", "-"], 5))
    restored = flax.serialization.from_bytes(make(), flax.serialization.to_bytes(middle))
    assert_identical(on_device(restored), middle)
    verdicts = rng.choice(["+", "-"], 10)
    assert_identical(on_device(run(restored, verdicts)), run(middle, verdicts))


@pytest.mark.parametrize(
    "make",
    [
        jmp.NoOpLossScale,
        lambda: jmp.StaticLossScale(2.0),
        jmp.DynamicLossScale,
        lambda: BEFORE.init({"w": jnp.ones(2)}),
    ],
    ids=["none", "static", "dynamic", "state"],
)
def test_flax_may_be_imported_last(make, monkeypatch):
    """It learns of scales when one is made, and also of one that was made before, in the state of an optimizer."""
    known = set()
    late = types.SimpleNamespace(register_serialization_state=lambda kind, *_, **__: known.add(kind))
    monkeypatch.setitem(sys.modules, "flax.serialization", late)
    make()
    assert known == {jmp.NoOpLossScale, jmp.StaticLossScale, jmp.DynamicLossScale}


def test_key_paths_have_names():
    """Paths into a scale read as attribute names."""
    scale = jmp.DynamicLossScale(hysteresis=2)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(scale)]
    assert paths == [".loss_scale", ".counter", ".hysteresis_left"]


def test_policies_leave_scales_alone():
    """Casting a train state to float16 must not turn a scale of 2**17 into infinity."""
    state = {"scale": jmp.DynamicLossScale(2.0**17), "w": jnp.ones(2)}
    cast = jmp.get_policy("mixed_float16").cast_to_compute(state)
    assert cast["w"].dtype == jnp.float16
    assert_identical(cast["scale"], state["scale"])


# --- One type, one trace ---


@pytest.mark.covering(1)
@every_idiom
@pytest.mark.parametrize("x64", [False, True])
def test_scale_is_a_strong_float32(make, x64):
    """Whatever it was built from, the scale is a strong float32 and the counter a strong int32, at any time."""
    with jax.enable_x64(x64):
        scale = make()
        assert structure_and_dtypes(on_device(scale)) == structure_and_dtypes(on_device(IDIOMS["default"]()))
        for stepped in (scale.adjust(True), jax.jit(lambda s: s.adjust(False))(scale)):
            assert structure_and_dtypes(on_device(stepped)) == structure_and_dtypes(on_device(scale))
        assert scale.scale(jnp.float16(3)).dtype == jnp.float32
        assert float(scale.scale(jnp.float16(3))) == 3 * 2.0**15


@pytest.mark.parametrize("value", [jnp.asarray(2**15), np.int64(2**15), np.array(True)], ids=str)
def test_integer_array_warns(value):
    """An integer array is converted, with one warning that points at the caller; Python integers are fine."""
    with pytest.warns(UserWarning, match=r"^Expected floating type for loss_scale, got (int|bool)") as caught:
        scale = jmp.DynamicLossScale(value)
    assert caught[0].filename == __file__
    assert scale.loss_scale.dtype == jnp.float32
    with pytest.warns(UserWarning, match="^Expected floating type for min_loss_scale, got int32"):
        jmp.DynamicLossScale(min_loss_scale=jnp.int32(1))
    scale.adjust(True)
    assert jmp.DynamicLossScale(2**15, min_loss_scale=1) == jmp.DynamicLossScale(2.0**15)


@pytest.mark.parametrize("fused", [True, False], ids=["apply_gradients", "update"])
@pytest.mark.parametrize(
    "idiom", slow_but_for(("default", "weak array", "float16", "array settings", "jnp int counter"), IDIOMS)
)
@pytest.mark.covering(1)
def test_one_trace_and_one_compilation_in_ten_steps(idiom, fused):
    """Over growth and overflow, for every way to build a scale, the step is traced once and compiled once."""
    tx = jmp.loss_scaled(optax.sgd(0.5), IDIOMS[idiom]())
    params = {"w": jnp.ones(3)}
    state, traces = tx.init(params), 0

    @jax.jit
    def step(params, state, x):
        nonlocal traces
        traces += 1
        loss, grads = jmp.scaled_value_and_grad(lambda p: jnp.sum(p["w"] * x), loss_scale=state)(params)
        if fused:
            return *jmp.apply_gradients(tx, grads, state, params), loss
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    values = [np.float32(v) for v in (1, 1, 1, np.inf, 1, 1, 1, np.nan, 1, 1)]
    seen = []
    with compilations() as compiled:
        for x in values:
            params, state, _ = step(params, state, x)
            seen.append(state.loss_scale.loss_scale)
    assert traces == 1
    assert compiled == ["jit(step)"]
    assert [int(np.log2(s)) for s in seen] == [15, 15, 16, 15, 15, 15, 16, 15, 15, 15]
