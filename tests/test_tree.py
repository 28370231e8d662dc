"""Casting and scaling trees: by value, and without the defects of jmp and mpx."""
# ruff: noqa: SIM300 - the expected value comes first

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from support import strategies
from support.strategies import dtypes_of

import jmp_lite as jmp
from jmp_lite import _tree

SCALE_KINDS = {"static": jmp.StaticLossScale, "dynamic": jmp.DynamicLossScale}


def casts_of(policy):
    """The casts of a policy, and the two that need none."""
    return [policy.cast_to_param, policy.cast_to_compute, policy.cast_to_output, jmp.cast_to_full, jmp.cast_to_half]


# --- Casts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", strategies.STANDARD)
@pytest.mark.parametrize("to", strategies.STANDARD)
def test_cast_rounds_like_numpy(name, to, rng):
    """The value of a cast is the nearest one, on both kinds of arrays."""
    values = rng.standard_normal(64).astype(strategies.dtype_named(name))
    expected = values.astype(strategies.dtype_named(to)).astype(np.float32)
    cast = jmp.get_policy(to).cast_to_compute
    np.testing.assert_array_equal(expected, cast(values).astype(np.float32))
    np.testing.assert_array_equal(expected, np.asarray(cast(jnp.asarray(values)), np.float32))


def test_cast_of_large_numbers_overflows_to_infinity():
    """A cast does not clip: what float16 cannot hold becomes infinite and is seen by the loss scale."""
    cast = jmp.get_policy("float16").cast_to_compute(jnp.float32([65504, 65520, -1e30, jnp.nan]))
    np.testing.assert_array_equal(np.float16([65504, np.inf, -np.inf, np.nan]), cast)


def test_float64_that_is_not_enabled_is_not_silent():
    """Where x64 is off JAX says that a policy with float64 runs in float32."""
    policy = jmp.get_policy("64-true")
    for leaf in (jnp.ones(2), jnp.ones(2, jnp.float16)):
        with pytest.warns(UserWarning, match="float64 .* is not available"):
            assert "float32" == policy.cast_to_compute(leaf).dtype
    assert "float64" == policy.cast_to_compute(np.ones(2, np.float32)).dtype


def test_float64_is_left_alone_unless_named():
    """With x64 on, float64 stays; a policy that names it anywhere casts from it and to it."""
    with jax.enable_x64(True):
        tree = {"jax": jnp.ones(2, jnp.float64), "numpy": np.ones(2)}
        for cast in casts_of(jmp.get_policy("mixed_float16")):
            assert tree is not cast(tree)
            assert all(before is after for before, after in zip(tree.values(), cast(tree).values(), strict=True))
        policy = jmp.get_policy("p=f64,c=f32,o=f64")
        assert {"jax": np.float32, "numpy": np.float32} == dtypes_of(policy.cast_to_compute(tree))
        assert {"jax": np.float64, "numpy": np.float64} == dtypes_of(
            policy.cast_to_output(policy.cast_to_compute(tree))
        )


def test_cast_costs_linear_time_in_the_number_of_patterns():
    """A thousand patterns and a thousand leaves are cast in seconds: each pattern is compiled once."""
    policies = jmp.PolicyMap({rf"layer_{i}(_x)?": "bf16" for i in range(1000)}, default="float32")
    tree = {f"layer_{i}": np.ones(1, np.float32) for i in range(1000)}
    assert {"bfloat16"} == {leaf.dtype.name for leaf in policies.cast_to_compute(tree).values()}


# --- Scaling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*strategies.STANDARD, "float8_e5m2"])
@pytest.mark.parametrize("kind", SCALE_KINDS)
def test_unscale_keeps_what_the_gradient_dtype_would_lose(name, kind):
    """The smallest gradient of a format, unscaled by 2**24, is not flushed to zero."""
    dtype = strategies.dtype_named(name)
    tiny = jnp.asarray(max(float(jnp.finfo(dtype).tiny), 2.0**-100), dtype)
    unscaled = SCALE_KINDS[kind](2.0**24).unscale(tiny)
    assert np.float32 == unscaled.dtype
    assert float(tiny) * 2.0**-24 == float(unscaled)


# --- Defects of jmp and mpx -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placeholder", [P("x"), P(), None, "x", object()], ids=lambda x: type(x).__name__)
def test_jmp_tree_of_placeholders_from_a_loss_scale(placeholder):
    """Defect 2 of jmp: trees of specifications, masks and ``None`` can be made from a loss scale."""
    scale = jmp.DynamicLossScale(jnp.float32(8))
    specs = jax.tree.map(lambda _: placeholder, {"scale": scale})
    assert placeholder is specs["scale"].loss_scale
    assert placeholder is specs["scale"].counter
    assert 2000 == specs["scale"].period


def test_jmp_lower_with_a_loss_scale():
    """Defect 2 of jmp: a function of a loss scale is lowered from the scale and from its shape."""
    scale = jmp.DynamicLossScale(jnp.float32(8))
    lowered = jax.jit(lambda s: s.adjust(True)).lower(scale)
    shape = jax.eval_shape(lambda s: s, scale)
    assert lowered.as_text() == jax.jit(lambda s: s.adjust(True)).lower(shape).as_text()


@pytest.mark.parametrize("kind", SCALE_KINDS)
def test_jmp_scale_of_ints_keys_and_float0(kind):
    """Defect 7 of jmp: integers, keys and ``float0`` are neither scaled nor a crash."""
    tree = {
        "int": jnp.int32(3),
        "bool": jnp.array(True),
        "python": 3,
        "key": jax.random.key(0),
        "raw": jax.random.PRNGKey(0),
        "float0": np.zeros(2, jax.dtypes.float0),
        "none": None,
    }
    scale = SCALE_KINDS[kind](2.0)
    assert all(tree[name] is leaf for name, leaf in scale.scale(tree).items())
    assert all(tree[name] is leaf for name, leaf in scale.unscale(tree).items())


@pytest.mark.parametrize("kind", SCALE_KINDS)
def test_jmp_unscale_of_half_gradients_is_float32(kind):
    """Defect 7 of jmp: float16 gradients divided by a Python number do not stay in float16 and underflow."""
    unscaled = SCALE_KINDS[kind](2.0**15).unscale({"w": jnp.float16([2.0**-14])})
    assert np.float32 == unscaled["w"].dtype
    assert [2.0**-29] == unscaled["w"].tolist()


def test_jmp_cast_of_train_state_leaves_the_loss_scale():
    """Defect 10 of jmp: a loss scale of 2**17 does not become infinite when its train state is cast."""
    tx = jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(2.0**17))
    params = {"w": jnp.ones(2)}
    state = {"params": params, "opt": tx.init(params), "scale": jmp.DynamicLossScale(2.0**17)}
    for cast in casts_of(jmp.get_policy("float16")):
        result = cast(state)
        assert (2.0**17, np.float32) == (result["scale"].loss_scale, result["scale"].loss_scale.dtype)
        assert state["opt"].loss_scale is result["opt"].loss_scale


def test_jmp_float8_is_not_cast_up():
    """Defect 10 of jmp: float8 arrays stay float8 under a policy that does not name them."""
    tree = {name: jnp.ones(2, name) for name in (*strategies.FLOAT8, *strategies.FLOAT8_FNUZ)}
    for cast in casts_of(jmp.get_policy("float16")):
        assert all(tree[name] is leaf for name, leaf in cast(tree).items())


def test_jmp_cast_to_full_does_not_lower_float64():
    """Defect 10 of jmp: ``cast_to_full`` raises precision and never lowers it."""
    with jax.enable_x64(True):
        tree = {"wide": jnp.ones(2, jnp.float64), "half": jnp.ones(2, jnp.bfloat16)}
        assert {"wide": np.float64, "half": np.float32} == dtypes_of(jmp.cast_to_full(tree))


def test_path_of_a_leaf_is_written_with_slashes():
    """Paths through dicts, lists, tuples, dataclasses and named tuples read alike."""
    tree = {"a": [strategies.Pair(1, strategies.State(2, {"b/c": 3}))]}
    paths = [_tree.path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert ["a/0/first", "a/0/second/params", "a/0/second/extra/b/c"] == paths


def test_loss_scales_are_leaves_to_no_function():
    """Whoever maps over the leaves of a tree does not meet the numbers inside a loss scale."""
    tree = {"w": 1.0, "scales": [jmp.DynamicLossScale(), jmp.StaticLossScale(2.0), jmp.NoOpLossScale()]}
    mapped = _tree.map_leaves(lambda path, leaf: (_tree.path_string(path), leaf), tree)
    assert {"w": ("w", 1.0), "scales": tree["scales"]} == mapped
