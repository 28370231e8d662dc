"""Whether trees are finite, and selection by that: by value, under every transform, on eight devices."""
# ruff: noqa: SIM300 - the expected value comes first

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import strategies
from support.strategies import dtypes_of, value_of

import jmp_lite as jmp

# --- Finiteness -------------------------------------------------------------------------------------------------------


@pytest.mark.covering(1)
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
    """An array of a dtype; weakly typed for "weak"; what is not a dtype comes back as it is."""
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
        (np.float32(1), "np.float32(1.0)"),
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
    for error in (jmp.errors.InvalidSelectionError, AssertionError, ValueError):
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            jmp.select_tree(predicate, 1.0, 2.0)
    with pytest.raises(jmp.errors.InvalidSelectionError, match=f"^{re.escape(text)}$"):
        jmp.DynamicLossScale().adjust(predicate)


def test_traced_predicate_is_described():
    """A predicate with a shape is refused while tracing."""
    with pytest.raises(jmp.errors.InvalidSelectionError, match=r"^expected boolean scalar, got bool\[2\]\. "):
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
    for error in (jmp.errors.InvalidSelectionError, TypeError):
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            jmp.select_tree(True, {"block": [on_true]}, {"block": [on_false]})


UNLIKE = {
    "'b' is only in the second one": ({"a": 1.0}, {"a": 1.0, "b": jnp.ones(2)}),
    "'0' is only in the first one and 'a' is only in the second one": ([1.0], {"a": 1.0}),
    "there is only float32[2] in the first one and 'a' is only in the second one": (jnp.ones(2), {"a": 1.0}),
    "they are made of other classes": ([1.0], (1.0,)),
}


@pytest.mark.parametrize(("where", "trees"), UNLIKE.items(), ids=UNLIKE)
def test_select_tree_of_different_structures_names_the_place(where, trees):
    text = f"The two trees differ: {where}. Select between trees of one structure."
    for error in (jmp.errors.InvalidSelectionError, ValueError):
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            jmp.select_tree(True, *trees)


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
