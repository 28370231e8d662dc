"""Loss scales: their bits, bounds and messages, the same inside every transformation and container."""

import copy
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import assert_identical, compilations, mesh, structure_and_dtypes, with_scale_forced

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

# One scale per setting that could be lost on the way.
SCALES = {
    "default": jmp.DynamicLossScale,
    "min below 1": lambda: jmp.DynamicLossScale(1.0, min_loss_scale=0.25),
    "max": lambda: jmp.DynamicLossScale(2.0**9, period=1, max_loss_scale=2.0**10),
    "factor": lambda: jmp.DynamicLossScale(3.0, period=2, factor=3),
    "backoff": lambda: jmp.DynamicLossScale(2.0**15, period=2, backoff_factor=0.75),
    "hysteresis": lambda: jmp.DynamicLossScale(2.0**15, period=3, hysteresis=2),
    "consecutive": lambda: jmp.DynamicLossScale(2.0**15, period=3, hysteresis=2, consecutive_hysteresis=True),
    "grace": lambda: jmp.DynamicLossScale(2.0**15, -2, 2, grace_steps=2),
    "constant": lambda: jmp.DynamicLossScale(5.0, factor=1),
    **{
        name: lambda name=name: jmp.DynamicLossScale.like(name, period=3)
        for name in ("torch", "flax", "megatron", "deepspeed")
    },
}

every_scale = pytest.mark.parametrize("make", SCALES.values(), ids=SCALES)
every_idiom = pytest.mark.parametrize("make", IDIOMS.values(), ids=IDIOMS)


def on_device(scale):
    return jax.tree.map(jnp.asarray, scale)


def run(scale, verdicts):
    """The scale after a string of verdicts such as ``"++-"``."""
    for verdict in verdicts:
        scale = scale.adjust(verdict == "+")
    return scale


def path_of(scale, verdicts):
    """The values of the scale after each verdict, as exponents of two."""
    exponents = []
    for verdict in verdicts:
        scale = scale.adjust(verdict == "+")
        exponents.append(int(np.log2(scale.loss_scale)))
    return exponents


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


@pytest.mark.parametrize(
    ("make", "fused"),
    [*((make, True) for make in IDIOMS.values()), (IDIOMS["weak array"], False)],
    ids=[*IDIOMS, "update"],
)
def test_one_trace_and_one_compilation_in_ten_steps(make, fused):
    """Over growth and overflow, for every way to build a scale, the step is traced once and compiled once."""
    tx = jmp.loss_scaled(optax.sgd(0.5), make())
    params = {"w": jnp.ones(3)}
    state, traces = tx.init(params), 0

    @jax.jit
    def step(params, state, x):
        nonlocal traces
        traces += 1
        loss, grads = jmp.scaled_value_and_grad(lambda p: jnp.sum(p["w"] * x))(params, state=state)
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


# --- The automaton ---


@pytest.mark.parametrize("period", [1, 2, 7, 2000])
def test_growth_on_exactly_the_last_step_of_the_period(period):
    """The scale doubles after the period-th finite step in a row, not before and not after, each time."""
    scale = on_device(jmp.DynamicLossScale(2.0**4, period=period))

    def step(scale, _):
        scale = scale.adjust(True)
        return scale, scale.loss_scale

    _, values = jax.lax.scan(step, scale, length=2 * period + 1)
    growths = 1 + np.flatnonzero(np.diff(np.log2(np.concatenate([[2.0**4], values]))))
    np.testing.assert_array_equal(growths, np.arange(period, 2 * period + 2, period))


# Settings, verdicts, exponent of the scale after each.
AUTOMATON = {
    "overflow restarts the count": ({"period": 2}, "+-++", [4, 3, 3, 4]),
    "tolerance of two": ({"period": 2, "hysteresis": 2}, "-+-+-", [4, 4, 3, 3, 2]),
    "growth restores the tolerance": ({"period": 2, "hysteresis": 2}, "-++--", [4, 4, 5, 5, 4]),
    "one good step restores it": (
        {"period": 9, "hysteresis": 2, "consecutive_hysteresis": True},
        "-+-+--",
        [4, 4, 4, 4, 4, 3],
    ),
    "once used up, each overflow counts": ({"period": 9, "hysteresis": 3}, "-----", [4, 4, 3, 2, 1]),
    "grace after an overflow": ({"period": 2, "grace_steps": 1}, "++-++++++", [4, 5, 4, 4, 4, 5, 5, 6, 6]),
    "grace at the start": ({"period": 1, "grace_steps": 2, "counter": -2}, "++++", [4, 4, 5, 6]),
    "factor and back-off": ({"period": 1, "factor": 8, "backoff_factor": 0.25}, "+-+", [7, 5, 8]),
    "1 / factor by default": ({"period": 1, "factor": 4}, "+--", [6, 4, 2]),
    "growth beyond the maximum is refused": (
        {"period": 1, "factor": 4, "max_loss_scale": 2.0**7},
        "++-+",
        [6, 6, 4, 6],
    ),
    "at the maximum the count goes on": ({"period": 2, "max_loss_scale": 2.0**4}, "+++-++", [4, 4, 4, 3, 3, 4]),
    "floor below one": ({"min_loss_scale": 2.0**-2}, "-------", [3, 2, 1, 0, -1, -2, -2]),
    "maximum equal to minimum": ({"period": 1, "min_loss_scale": 16.0, "max_loss_scale": 16.0}, "+-+-", [4, 4, 4, 4]),
    "start above the maximum": ({"period": 1, "max_loss_scale": 2.0**2}, "++-+-", [4, 4, 2, 2, 1]),
    "start below the minimum": ({"period": 1, "min_loss_scale": 2.0**6}, "+-+", [5, 6, 7]),
    "factor 1 never moves": ({"period": 1, "factor": 1}, "++--", [4, 4, 4, 4]),
    "not even outside the bounds": ({"factor": 1, "min_loss_scale": 2.0**6}, "+-", [4, 4]),
    "growth without back-off": ({"period": 1, "backoff_factor": 1.0}, "+-+", [5, 5, 6]),
}


@pytest.mark.parametrize(("settings", "verdicts", "expected"), AUTOMATON.values(), ids=AUTOMATON)
def test_automaton(settings, verdicts, expected):
    """Each rule of the automaton, on a short string of verdicts from a scale of 2**4."""
    assert path_of(jmp.DynamicLossScale(2.0**4, **settings), verdicts) == expected


@pytest.mark.parametrize("system", [None, "torch", "flax", "keras", "megatron", "deepspeed", "jmp"])
def test_scale_never_leaves_the_normal_numbers(system):
    """300 growths or back-offs leave a scale that still multiplies and divides exactly (Keras: inf, torch: 0)."""
    settings = {"period": 1, "counter": 0}
    if system is None:
        scale = jmp.DynamicLossScale(**settings, min_loss_scale=0, max_loss_scale=2.0**126)
    else:
        scale = jmp.DynamicLossScale.like(system, **settings)

    @jax.jit
    def run(scale, good):
        return jax.lax.scan(lambda s, _: ((n := s.adjust(good)), n.loss_scale), scale, length=300)

    lowest = max(scale.min_loss_scale, 2.0**-126)
    for start in (2.0**126, 2.0**24, 1.0, 2.0**-126):
        for good in (True, False):
            end, values = run(with_scale_forced(on_device(scale), start), jnp.array(good))
            assert np.all((values >= 2.0**-126) & (values <= 2.0**126))
            assert float(end.loss_scale) == (2.0**126 if good else lowest)
            assert float(end.unscale(end.scale(jnp.float32(1)))) == 1


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan, 2.0**-130, 2.0**127])
def test_scale_recovers_from_an_outside_edit(value):
    """A scale overwritten with a value that no method gives is back within the bounds after one bad step."""
    scale = with_scale_forced(jmp.DynamicLossScale(), value)
    for adjusted in (scale.adjust(False), jax.jit(lambda s: s.adjust(False))(scale)):
        assert 1 <= adjusted.loss_scale <= 2.0**24


# --- Scaling trees ---


@every_scale
def test_unscale_undoes_scale(make, rng):
    """Unscaling by a power of two restores values of every dtype exactly, by another scale within 1.5 ulp."""
    scale = make()
    tree = {
        "f32": jnp.asarray(rng.standard_normal(50), jnp.float32),
        "f16": jnp.asarray(rng.standard_normal(50), jnp.float16),
        "bf16": jnp.asarray(rng.standard_normal(50), jnp.bfloat16),
        "c64": jnp.asarray(rng.standard_normal(50) + 1j * rng.standard_normal(50), jnp.complex64),
        "f8": jnp.asarray(rng.standard_normal(5), jnp.float8_e4m3fn),
    }
    back = scale.unscale(scale.scale(tree))
    assert {k: v.dtype for k, v in back.items()} == dict.fromkeys(tree, jnp.float32) | {"c64": jnp.complex64}
    exact = np.log2(scale.loss_scale) % 1 == 0
    for name, value in tree.items():
        # Product, reciprocal and product again round once each: 3 * eps/2 relative, complex parts separately.
        error = 0 if exact else 1.5 * float(jnp.finfo(jnp.float32).eps)
        wide = np.asarray(value).astype(np.complex128)
        assert np.all(np.abs(np.asarray(back[name]).astype(np.complex128) - wide) <= error * np.abs(wide))


@pytest.mark.parametrize("scale", [jmp.StaticLossScale(2.0), jmp.DynamicLossScale(2.0)], ids=["static", "dynamic"])
def test_other_leaves_pass_through(scale, key):
    """Integers, booleans, keys, float0, None, strings and NumPy integers are the same objects afterwards."""
    tree = [jnp.int32(3), True, 7, key, np.zeros(3, jax.dtypes.float0), "name", np.int64(4), np.array([True]), None]
    for new in (scale.scale(tree), scale.unscale(tree)):
        assert all(a is b for a, b in zip(new, tree, strict=True))


def test_python_and_numpy_numbers_are_scaled():
    """Python floats and complex numbers, and NumPy arrays, are scaled like arrays."""
    scale = jmp.DynamicLossScale(4.0)
    scaled = scale.scale({"float": 1.5, "complex": 1j, "array": np.ones(2, np.float32), "scalar": np.float16(1)})
    assert_identical(
        scaled,
        {
            "float": jnp.float32(6),
            "complex": jnp.complex64(4j),
            "array": jnp.full(2, 4, "float32"),
            "scalar": jnp.float32(4),
        },
    )


# --- Static and none ---


def test_static_scale_is_structure():
    """A static scale has no leaves, crosses jit and scan unchanged, and a new value is a new trace."""
    scale = jmp.StaticLossScale(jnp.float32(8))
    assert jax.tree.leaves(scale) == []
    assert isinstance(scale.loss_scale, float)
    traces = []

    @jax.jit
    def step(scale, x):
        traces.append(scale)
        return scale.adjust(x > 0), scale.scale(x)

    for value in (8.0, 8.0, 16.0):
        out, scaled = step(jmp.StaticLossScale(value), jnp.float32(3))
        assert out == jmp.StaticLossScale(value)
        assert float(scaled) == 3 * value
    assert len(traces) == 2
    end, _ = jax.lax.scan(lambda s, x: (s.adjust(x), s.unscale(1.0)), scale, jnp.array([True, False]))
    assert end == scale


@pytest.mark.parametrize("make", [jmp.StaticLossScale, lambda s: jmp.DynamicLossScale(min_loss_scale=s)])
def test_traced_static_value_is_refused(make):
    """A traced value where structure is needed raises at once instead of leaking a tracer out of jit."""
    with pytest.raises(
        jmp.TracedStaticScaleError, match=r"needs a Python number, got a traced value .*DynamicLossScale"
    ):
        jax.jit(make)(8.0)


def test_half_loss_does_not_overflow_under_a_static_scale():
    """A float16 loss is scaled in float32: 3 * 2**15 is not infinite (it is with jmp)."""
    for scale in (
        jmp.StaticLossScale(2**15),
        jmp.DynamicLossScale(2.0**15),
        jmp.DynamicLossScale(jnp.asarray(2.0**15)),
    ):
        assert float(scale.scale(jnp.float16(3))) == 98304


def test_noop_scale_returns_the_tree_itself():
    """The scale of 1 copies nothing and casts nothing."""
    tree = {"w": jnp.ones(2, jnp.float16)}
    scale = jmp.NoOpLossScale()
    assert scale.scale(tree) is tree
    assert scale.unscale(tree) is tree
    assert scale.adjust(False) is scale
    assert scale.loss_scale == 1
    assert jax.jit(lambda s: s)(scale) == scale


# --- Messages ---

INVALID = {
    "loss_scale must be positive and finite, got 0.0.": {"loss_scale": 0.0},
    "loss_scale must be positive and finite, got -2.0.": {"loss_scale": -2.0},
    "loss_scale must be positive and finite, got inf.": {"loss_scale": jnp.float32(np.inf)},
    "loss_scale must be positive and finite, got nan.": {"loss_scale": np.nan},
    "loss_scale must be at most 2**126, got 1.7014118346046923e+38.": {"loss_scale": 2.0**127},
    "period must be a whole number, at least 1, got 0.": {"period": 0},
    "factor must be at least 1 and finite, got 0.5.": {"factor": 0.5},
    "factor must be at least 1 and finite, got inf.": {"factor": np.inf},
    "backoff_factor must be in (0, 1], got 0.": {"backoff_factor": 0},
    "backoff_factor must be in (0, 1], got 2.": {"backoff_factor": 2},
    "min_loss_scale must be at least 0 and finite, got -1.0.": {"min_loss_scale": -1.0},
    "min_loss_scale must be at least 0 and finite, got nan.": {"min_loss_scale": np.nan},
    "max_loss_scale must be in [min_loss_scale=4.0, 2**126], got 2.0.": {"min_loss_scale": 4.0, "max_loss_scale": 2.0},
    "max_loss_scale must be in [min_loss_scale=1.0, 2**126], got inf.": {"max_loss_scale": np.inf},
    "hysteresis must be at least 1, got 0.": {"hysteresis": 0},
    "grace_steps must be at least 0, got -1.": {"grace_steps": -1},
}


@pytest.mark.parametrize(("message", "settings"), INVALID.items(), ids=INVALID)
def test_setting_out_of_range(message, settings):
    """Each setting out of range is named, with what was given and what is accepted."""
    with pytest.raises(jmp.InvalidLossScaleError) as error:
        jmp.DynamicLossScale(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan, 2.0**127, 2.0**-127])
def test_static_value_out_of_range(value):
    """A static scale out of range is refused where it is used."""
    for use in (jmp.StaticLossScale(value).scale, jmp.StaticLossScale(value).unscale):
        with pytest.raises(jmp.InvalidLossScaleError) as error:
            use(1.0)
        assert (
            str(error.value) == f"loss_scale must be in [2**-126, 2**126], got {value}. Try StaticLossScale(2.0**15)."
        )


def test_unknown_system():
    """An unknown preset names the known ones."""
    with pytest.raises(jmp.InvalidLossScaleError) as error:
        jmp.DynamicLossScale.like("apex")
    assert str(error.value) == "Unknown system 'apex'. Accepted: torch, flax, keras, jmp, megatron, deepspeed."


@pytest.mark.parametrize("verdict", [jnp.array([True, False]), jnp.float32(1), 1.0, None], ids=str)
def test_verdict_must_be_one_boolean(verdict):
    """A verdict per leaf or a number is refused rather than broadcast."""
    with pytest.raises(jmp.NonScalarPredicateError, match=r"^expected boolean scalar, got "):
        jmp.DynamicLossScale().adjust(verdict)
