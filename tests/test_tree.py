"""Casting, scaling, checking and selecting trees: by value, under every transform, on eight devices."""
# ruff: noqa: SIM300 - the expected value comes first

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import strategies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from strategies import value_of

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


def dtypes_of(tree):
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


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


# --- Finiteness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float8_e5m2", "float8_e4m3fn", "complex64"])
def test_one_bad_number_is_found(name, position, bad, rng):
    """One non-finite number among many finite ones of any inexact format is found, eagerly and compiled."""
    values = rng.standard_normal(100).astype(strategies.dtype_named(name))
    tree = {"bad": jnp.asarray(values), "good": jnp.ones(3), "step": jnp.int32(1), "nothing": None}
    assert bool(jmp.all_finite(tree))
    index = {"first": 0, "last": -1}[position]
    tree["bad"] = tree["bad"].at[index].set(jnp.asarray(bad, tree["bad"].dtype))
    assert not jmp.all_finite(tree)
    assert not jax.jit(jmp.all_finite)(tree)


@pytest.mark.parametrize(
    "leaf",
    [complex(0, np.inf), complex(np.nan, 0), np.inf, np.float64(np.nan), np.float16(-np.inf), np.array([1, np.nan])],
    ids=repr,
)
def test_bad_python_and_numpy_numbers_are_found(leaf):
    """Imaginary parts, Python floats and NumPy scalars count."""
    assert not jmp.all_finite({"leaf": leaf})


@pytest.mark.parametrize(
    "tree",
    [None, {}, [], (), jnp.zeros(0), "inf", 3, True, np.array(["nan"]), np.zeros(2, jax.dtypes.float0), jnp.int32(7)],
    ids=repr,
)
def test_what_holds_no_number_is_finite(tree):
    """A tree without inexact numbers is finite, also seen from a mapped axis."""
    assert bool(jmp.all_finite(tree))
    assert [True, True] == jax.vmap(lambda _: jmp.all_finite(tree, axis_name="x"), axis_name="x")(jnp.ones(2)).tolist()


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_largest_numbers_are_finite(name):
    """A sum of squares would overflow here; the verdict does not."""
    with jax.enable_x64(True):
        largest = jnp.full(1000, jnp.finfo(name).max, name)
        assert bool(jmp.all_finite({"largest": largest, "lowest": -largest}))


def devices_as(*shape):
    names = ("x", "y")[: len(shape)]
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), names)


def one_bad_shard(rng):
    """Eight numbers, one of them non-finite, and which one."""
    bad = int(rng.integers(8))
    return np.where(np.arange(8) == bad, rng.choice([np.inf, -np.inf, np.nan]), 1.0).astype(np.float32), bad


def under_pmap(function):
    return jax.pmap(function, axis_name="x")


def under_shard_map(function):
    per_shard = jax.shard_map(lambda x: function(x)[None], mesh=devices_as(8), in_specs=P("x"), out_specs=P("x"))
    return jax.jit(per_shard)


def under_vmap(function):
    return jax.vmap(function, axis_name="x")


MAPPED = {"pmap": under_pmap, "shard_map": under_shard_map, "vmap": under_vmap}


@pytest.mark.parametrize("mapped", MAPPED.values(), ids=MAPPED)
def test_all_finite_with_axis_name_agrees_everywhere(mapped, rng):
    """With ``axis_name`` one bad replica makes every replica say no."""
    x, _ = one_bad_shard(rng)
    together = mapped(lambda shard: jmp.all_finite({"g": shard, "same": jnp.ones(2)}, axis_name="x"))
    assert [False] * 8 == together(x).tolist()
    assert [True] * 8 == together(np.ones(8, np.float32)).tolist()


@pytest.mark.parametrize("mapped", MAPPED.values(), ids=MAPPED)
def test_jmp_all_finite_is_per_shard_without_axis_name(mapped, rng):
    """Defect 12 of jmp: replicas see their own values; only ``axis_name`` makes them agree."""
    x, bad = one_bad_shard(rng)
    alone = mapped(lambda shard: jmp.all_finite({"g": shard, "same": jnp.ones(2)}))
    assert [i != bad for i in range(8)] == alone(x).tolist()


@pytest.mark.parametrize(
    ("axis_name", "expected"),
    [("x", [[True, False, True, True]] * 2), ("y", [[True] * 4, [False] * 4]), (("x", "y"), [[False] * 4] * 2)],
)
def test_all_finite_over_axes_of_a_mesh(axis_name, expected):
    """The verdict is agreed over the named axes and no others."""
    x = np.ones((2, 4), np.float32)
    x[1, 1] = np.nan
    function = jax.shard_map(
        lambda shard: jmp.all_finite(shard, axis_name=axis_name)[None, None],
        mesh=devices_as(2, 4),
        in_specs=P("x", "y"),
        out_specs=P("x", "y"),
        check_vma=False,
    )
    assert expected == jax.jit(function)(x).tolist()


def test_verdict_agreed_over_an_axis_counts_as_replicated():
    """``shard_map`` accepts the agreed verdict as an output that is the same on every device."""
    function = jax.shard_map(
        lambda x: jmp.all_finite(x, axis_name="x"), mesh=devices_as(8), in_specs=P("x"), out_specs=P()
    )
    assert bool(jax.jit(function)(jnp.ones(8)))
    assert not jax.jit(function)(jnp.ones(8).at[5].set(jnp.nan))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_all_finite_is_global_under_jit_with_sharded_arrays(axis_type, rng):
    """Under ``jit`` a sharded array is one array: no axis name is needed."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    x, _ = one_bad_shard(rng)
    replicated = jax.device_put(jnp.ones(3), NamedSharding(mesh, P()))
    for values, expected in [(x, False), (np.ones(8, np.float32), True)]:
        sharded = jax.device_put(values, NamedSharding(mesh, P("x")))
        verdict = jax.jit(jmp.all_finite)({"sharded": sharded, "replicated": replicated})
        assert expected == bool(verdict)
        assert verdict.sharding.is_fully_replicated


# --- Selection --------------------------------------------------------------------------------------------------------


def weak_or_strong(number, dtype):
    """An array of a dtype; weakly typed for "weak"; what is no dtype comes back as it is."""
    if dtype == "weak":
        return jnp.asarray(float(number))
    return jnp.asarray(number, dtype) if isinstance(dtype, str) else dtype


@pytest.mark.parametrize("verdict", [True, False])
@pytest.mark.parametrize(
    ("on_true", "on_false", "expected"),
    [
        ("float32", "float16", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float16", "bfloat16", "float32"),
        ("int32", "float32", "float32"),
        ("int8", "int32", "int32"),
        ("bool", "int32", "int32"),
        ("float32", "complex64", "complex64"),
        ("weak", "float16", "float16"),
        ("float16", 2.0, "float16"),
        (2.0, "bfloat16", "bfloat16"),
        (3, "float32", "float32"),
        (3, 2.0, "float32"),
        (True, "int8", "int8"),
    ],
)
def test_jmp_select_tree_of_mixed_dtypes(on_true, on_false, expected, verdict):
    """Defect 8 of jmp: leaves of two dtypes are promoted as JAX does by default, under strict promotion as well."""
    numbers = {on_true: 1, on_false: 2}
    leaves = [weak_or_strong(number, dtype) for dtype, number in numbers.items()]
    chosen = leaves[0] if verdict else leaves[1]
    for select in (jmp.select_tree, jax.jit(jmp.select_tree)):
        result = select(verdict, leaves[0], leaves[1])
        assert expected == result.dtype
        assert value_of(jnp.asarray(chosen).astype(expected)) == value_of(result)


@pytest.mark.parametrize("verdict", [True, False, np.True_, np.False_, np.array(True), jnp.array(False)], ids=repr)
def test_jmp_select_tree_with_python_predicate(verdict):
    """Defect 8 of jmp: a Python or NumPy boolean is a predicate."""
    expected = 1.0 if verdict else 2.0
    assert expected == jmp.select_tree(verdict, {"w": jnp.float32(1)}, {"w": jnp.float32(2)})["w"]


def test_jmp_select_tree_with_strings():
    """Defect 8 of jmp: equal leaves that are not arrays pass through, in trees with ``None`` and ``float0``."""
    zeros = np.zeros(2, jax.dtypes.float0)
    tree = {"name": "head", "f": len, "none": None, "zeros": zeros, "text": np.array(["a"]), "key": jax.random.key(1)}
    selected = jmp.select_tree(jnp.array(True), tree, {**tree, "key": jax.random.key(2), "name": "".join("head")})
    assert all(tree[name] is selected[name] for name in ("name", "f", "none", "zeros", "text"))
    assert value_of(tree["key"]) == value_of(selected["key"])


SPEC = jax.ShapeDtypeStruct((), jnp.bool_)


@pytest.mark.parametrize(
    ("predicate", "described"),
    [
        (np.array([True]), "bool[1]"),
        (jnp.ones((2, 3), bool), "bool[2, 3]"),
        (jnp.int32(1), "int32[]"),
        (np.float32(1), "float32[]"),
        (jax.random.key(0), "key<fry>[]"),
        (1, "1"),
        (0.0, "0.0"),
        (None, "None"),
        ("True", "'True'"),
        ([True], "[True]"),
        (SPEC, repr(SPEC)),
    ],
    ids=repr,
)
def test_predicate_that_is_not_one_boolean(predicate, described):
    """Anything but one boolean is refused, described, and is an ``AssertionError`` as in jmp."""
    text = f"expected boolean scalar, got {described}. Reduce it first, for example with jmp_lite.all_finite."
    for error in (jmp.NonScalarPredicateError, AssertionError, ValueError):
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            jmp.select_tree(predicate, 1.0, 2.0)
    with pytest.raises(jmp.NonScalarPredicateError, match=f"^{re.escape(text)}$"):
        jmp.DynamicLossScale().adjust(predicate)


def test_traced_predicate_is_described():
    """A predicate with a shape is refused while tracing."""
    with pytest.raises(jmp.NonScalarPredicateError, match=r"^expected boolean scalar, got bool\[2\]\. "):
        jax.jit(jmp.select_tree)(jnp.ones(2, bool), jnp.ones(2), jnp.ones(2))


@pytest.mark.parametrize(
    ("on_true", "on_false", "first", "second"),
    [
        ("a", "b", "'a'", "'b'"),
        ("a", jnp.ones(2), "'a'", "float32[2]"),
        (jnp.ones(2), "a", "float32[2]", "'a'"),
        (np.array(["a"]), np.array(["b"]), "<U1[1]", "<U1[1]"),
        ("a", np.array(["a", "b"]), "'a'", "<U1[2]"),
        (jnp.ones(2), jnp.ones(3), "float32[2]", "float32[3]"),
        (jnp.ones(()), jnp.ones(3), "float32[]", "float32[3]"),
        (1.0, jnp.ones(3), "1.0", "float32[3]"),
        (jnp.ones(2, jnp.float8_e5m2), jnp.ones(2), "float8_e5m2[2]", "float32[2]"),
        (jax.random.key(0), jax.random.PRNGKey(0), "key<fry>[]", "uint32[2]"),
        (jax.random.key(0), jax.random.key(0, impl="rbg"), "key<fry>[]", "key<rbg>[]"),
        (np.zeros(2, jax.dtypes.float0), jnp.ones(2), "[('float0', 'V')][2]", "float32[2]"),
    ],
    ids=repr,
)
def test_leaves_that_cannot_be_selected(on_true, on_false, first, second):
    """Two leaves that no array operation can choose between are both described, with their path."""
    text = (
        f"Leaf 'block/0' is {first} in one tree and {second} in the other: only arrays of one shape and compatible "
        "dtypes can be selected. Make the two alike, or keep them out of the tree."
    )
    for error in (jmp.UnselectableLeafError, TypeError):
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            jmp.select_tree(True, {"block": [on_true]}, {"block": [on_false]})


def test_select_tree_of_different_structures_names_the_place():
    """Trees of different structures are refused by JAX, which says where they differ."""
    with pytest.raises(ValueError, match="'b'"):
        jmp.select_tree(True, {"a": 1.0, "b": None}, {"a": 1.0, "b": jnp.ones(2)})


def test_select_tree_keeps_weak_types():
    """Selecting between two weakly typed arrays gives one, so a state does not change its type in the first step."""
    weak = jnp.asarray(1.0)
    assert jax.typeof(weak).weak_type
    assert jax.typeof(jmp.select_tree(True, weak, weak)).weak_type
    assert not jax.typeof(jmp.select_tree(True, jnp.float32(1), jnp.float32(2))).weak_type


@pytest.mark.parametrize("mapped", MAPPED.values(), ids=MAPPED)
def test_select_tree_per_replica(mapped, rng):
    """Each replica selects by its own verdict; with an agreed verdict all select alike."""
    x, bad = one_bad_shard(rng)
    alone = mapped(lambda g: jmp.select_tree(jmp.all_finite(g), jnp.ones(()), jnp.zeros(())))
    assert [float(i != bad) for i in range(8)] == alone(x).tolist()
    together = mapped(lambda g: jmp.select_tree(jmp.all_finite(g, axis_name="x"), jnp.ones(()), jnp.zeros(())))
    assert [0.0] * 8 == together(x).tolist()


def test_select_tree_in_place_of_a_branch_under_grad_and_scan():
    """Selection is differentiable and keeps the carry of a scan."""
    weights = jax.grad(lambda w: jmp.select_tree(w > 0, w * 2, w * 3))
    assert [2.0, 3.0] == [float(weights(1.0)), float(weights(-1.0))]

    def step(carry, finite):
        return jmp.select_tree(finite, jax.tree.map(lambda leaf: leaf + leaf, carry), carry), None

    start = {"w": jnp.bfloat16(1), "n": jnp.int32(1)}
    final, _ = jax.lax.scan(step, start, jnp.array([True, False, True]))
    assert {"w": 4.0, "n": 4} == {name: leaf.item() for name, leaf in final.items()}
    assert dtypes_of(start) == dtypes_of(final)


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


def test_keep_dtypes_gives_back_what_was_there():
    """Floating arrays of the same place and shape take their old dtype; all else is handed through."""
    before = {"a": jnp.ones(2, jnp.bfloat16), "b": np.ones(2, np.float32), "n": jnp.int32(1), "s": jnp.ones(3)}
    after = {"a": jnp.ones(2), "b": np.ones(2, np.float32), "n": jnp.float32(1), "s": jnp.ones(2, jnp.float16)}
    kept = _tree.keep_dtypes(after, before)
    assert np.dtype(jnp.bfloat16) == kept["a"].dtype
    assert all(after[name] is kept[name] for name in ("b", "n", "s"))
    assert after is _tree.keep_dtypes(after, {"a": before["a"]})
