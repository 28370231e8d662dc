"""Laws of casts, loss scales, the finite check and selection over arbitrary trees, with x64 off and on."""
# ruff: noqa: SIM300 - the expected value comes first

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import strategies
from support.strategies import is_array, is_key, kind_of, value_of

import jmp_lite as jmp

LOSS_SCALES = (jmp.NoOpLossScale, jmp.StaticLossScale, jmp.DynamicLossScale)
BOTH_WIDTHS = pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])


def is_loss_scale(node):
    return isinstance(node, LOSS_SCALES)


def nodes_of(tree):
    """The leaves of a tree, loss scales counting as leaves."""
    return jax.tree.leaves(tree, is_leaf=is_loss_scale)


def same_structure(first, second):
    return jax.tree.structure(first) == jax.tree.structure(second)


def seen_by_jax(name, x64):
    return name if x64 else {"float64": "float32", "complex128": "complex64", "int64": "int32"}.get(name, name)


# --- Casts ------------------------------------------------------------------------------------------------------------


def casts_of(policy):
    """Every cast of a policy with the dtype it casts to and those that it casts besides the standard ones."""
    fields = {"param": policy.param_dtype, "compute": policy.compute_dtype, "output": policy.output_dtype}
    named = [dtype.name for dtype in fields.values()]
    return [(getattr(policy, f"cast_to_{field}"), dtype.name, named) for field, dtype in fields.items()]


FIXED_CASTS = [(jmp.cast_to_full, "float32", []), (jmp.cast_to_half, "float16", [])]


def dtype_after_cast(leaf, to, named, x64):
    """The dtype of a leaf after a cast; ``None`` if it must come through as the same object."""
    if not is_array(leaf) or kind_of(leaf) != "floating":
        return None
    castable = {*strategies.STANDARD, *(seen_by_jax(name, x64) for name in named)}
    after = seen_by_jax(to, x64) if isinstance(leaf, jax.Array) else to
    untouched = seen_by_jax(leaf.dtype.name, x64) not in castable
    return None if untouched or leaf.dtype == strategies.dtype_named(after) else after


def check_cast(cast, to, named, tree, x64):
    """The laws of one cast on one tree."""
    result = cast(tree)
    assert same_structure(tree, result)
    for before, after in zip(nodes_of(tree), nodes_of(result), strict=True):
        expected = dtype_after_cast(before, to, named, x64)
        if expected is None:
            assert before is after
        else:
            assert expected == after.dtype.name
            assert isinstance(before, jax.Array) == isinstance(after, jax.Array)
            assert before.shape == after.shape
            assert after.dtype.isnative
            assert value_of(before) == value_of(after)
    for once, twice in zip(nodes_of(result), nodes_of(cast(result)), strict=True):
        assert once is twice


@BOTH_WIDTHS
@settings(max_examples=30)
@given(data=st.data())
def test_casts_keep_the_laws_on_any_tree(x64, data):
    """Casts keep structure, kind and value, reach the right dtype, pass the rest through and are idempotent."""
    with jax.enable_x64(x64):
        names = [name for name in strategies.FORMATS if x64 or name != "float64"]
        policy = data.draw(strategies.policies(names), "policy")
        tree = data.draw(strategies.trees(strategies.leaves() | strategies.loss_scales()), "tree")
        for cast, to, named in [*casts_of(policy), *FIXED_CASTS]:
            check_cast(cast, to, named, tree, x64)


@BOTH_WIDTHS
@settings(max_examples=30)
@given(data=st.data())
def test_map_with_one_policy_casts_like_that_policy(x64, data):
    """A ``PolicyMap`` whose entries agree is the same function as the policy itself."""
    with jax.enable_x64(x64):
        policy = data.draw(strategies.policies([*strategies.STANDARD, "float8_e4m3fn"]), "policy")
        tree = data.draw(strategies.trees(strategies.leaves() | strategies.loss_scales()), "tree")
        policies = jmp.PolicyMap({"[a-m]+": policy, "first": policy}, default=policy)
        for (cast, to, named), (cast_one, _, _) in zip(casts_of_map(policies), casts_of(policy), strict=True):
            check_cast(cast, to, named, tree, x64)
            dtypes = [[getattr(leaf, "dtype", None) for leaf in nodes_of(c(tree))] for c in (cast_one, cast)]
            assert dtypes[0] == dtypes[1]


def casts_of_map(policies):
    """The casts of a map whose policies are all the default one."""
    cast = [policies.cast_to_param, policies.cast_to_compute, policies.cast_to_output]
    return [(own, to, named) for own, (_, to, named) in zip(cast, casts_of(policies.default), strict=True)]


@settings(max_examples=30)
@given(tree=strategies.trees(strategies.jax_arrays()), policy=strategies.policies(["float16", "bfloat16", "float32"]))
def test_casts_are_the_same_traced_as_eager(tree, policy):
    """Under ``jit`` the dtypes are those of an eager cast, and a cast with nothing to do leaves no operation."""
    for cast, _, _ in casts_of(policy):
        eager = cast(tree)
        expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), eager)
        assert expected == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), jax.eval_shape(cast, tree))
        assert [] == jax.make_jaxpr(cast)(eager).eqns


# --- Scaling ----------------------------------------------------------------------------------------------------------

SCALE_KINDS = {
    "static": jmp.StaticLossScale,
    "dynamic": functools.partial(jmp.DynamicLossScale, min_loss_scale=0.0),
    "dynamic_jax": lambda value: jmp.DynamicLossScale(jnp.float32(value)),
}
SCALES = st.integers(-20, 24).map(lambda exponent: 2.0**exponent)


def dtype_after_scaling(leaf, x64):
    """The dtype of a scaled leaf; ``None`` if it must come through as the same object."""
    kind = kind_of(leaf)
    if kind not in ("floating", "complex"):
        return None
    name = leaf.dtype.name if is_array(leaf) else {"floating": "float64", "complex": "complex128"}[kind]
    name = seen_by_jax(name, x64)
    return name if kind == "complex" or name == "float64" else "float32"


@pytest.mark.covering(1)
@BOTH_WIDTHS
@pytest.mark.parametrize("kind", SCALE_KINDS)
@settings(max_examples=20)
@given(data=st.data())
def test_scale_keeps_the_laws_on_any_tree(x64, kind, data):
    """Scaling is exact, at least in float32, undone exactly by unscaling, and passes the rest through."""
    with jax.enable_x64(x64):
        factor = data.draw(SCALES, "factor")
        tree = data.draw(strategies.trees(), "tree")
        loss_scale = SCALE_KINDS[kind](factor)
        scaled = loss_scale.scale(tree)
        unscaled = loss_scale.unscale(scaled)
        assert same_structure(tree, scaled)
        assert same_structure(tree, unscaled)
        for leaf, product, quotient in zip(*map(jax.tree.leaves, (tree, scaled, unscaled)), strict=True):
            expected = dtype_after_scaling(leaf, x64)
            if expected is None:
                assert leaf is product
                assert leaf is quotient
            else:
                assert [expected, expected] == [product.dtype.name, quotient.dtype.name]
                assert np.shape(leaf) == product.shape == quotient.shape
                assert (np.asarray(value_of(leaf)) * factor).tolist() == value_of(product)
                assert value_of(leaf) == value_of(quotient)


@given(tree=strategies.trees())
@settings(max_examples=20)
def test_no_op_scale_returns_the_tree_itself(tree):
    """The scale that does nothing returns the same object."""
    assert tree is jmp.NoOpLossScale().scale(tree)
    assert tree is jmp.NoOpLossScale().unscale(tree)


# --- Finiteness -------------------------------------------------------------------------------------------------------

INEXACT = (*strategies.FORMATS, "complex64", "complex128")
NUMBERS = (*strategies.EXACT, 1.0, 2.0, 3.0, np.inf, -np.inf, np.nan)


@BOTH_WIDTHS
@settings(max_examples=30)
@given(data=st.data())
def test_all_finite_is_that_of_numpy(x64, data):
    """The verdict is that of NumPy over all floating and complex leaves, whatever else is in the tree."""
    with jax.enable_x64(x64):
        inexact = strategies.numpy_arrays(INEXACT, NUMBERS)
        tree = data.draw(strategies.trees(inexact | inexact.map(strategies.to_jax) | strategies.leaves()), "tree")
        numbers = [leaf for leaf in jax.tree.leaves(tree) if kind_of(leaf) in ("floating", "complex")]
        expected = all(np.all(np.isfinite(np.asarray(value_of(leaf)))) for leaf in numbers)
        verdict = jmp.all_finite(tree)
        assert expected == bool(verdict)
        assert ((), np.bool_) == (verdict.shape, verdict.dtype)


# --- Selection --------------------------------------------------------------------------------------------------------


def another(leaf):
    """A leaf of the same shape and dtype with other numbers; the leaf itself where there are none."""
    if is_key(leaf):
        return jax.random.wrap_key_data(jax.random.key_data(leaf) + np.uint32(1))
    if kind_of(leaf) == "not selectable":
        return leaf
    if not is_array(leaf):
        return type(leaf)(not leaf)
    changed = (np.asarray(leaf) == 0).astype(leaf.dtype)
    return strategies.to_jax(changed) if isinstance(leaf, jax.Array) else changed


@BOTH_WIDTHS
@settings(max_examples=30)
@given(data=st.data())
def test_select_tree_returns_the_tree_asked_for(x64, data):
    """Selection keeps structure, canonical dtype, value and shape, and hands what is not a number through."""
    with jax.enable_x64(x64):
        tree = data.draw(strategies.trees(strategies.leaves() | strategies.loss_scales()), "tree")
        other = jax.tree.map(another, tree)
        predicates = [bool, np.bool_, np.array, jnp.array]
        for verdict, expected in [(True, tree), (False, other)]:
            selected = jmp.select_tree(data.draw(st.sampled_from(predicates), "as")(verdict), tree, other)
            assert same_structure(expected, selected)
            for leaf, result in zip(jax.tree.leaves(expected), jax.tree.leaves(selected), strict=True):
                if kind_of(leaf) == "not selectable":
                    assert leaf is result
                else:
                    expected_dtype = leaf.dtype.name if is_array(leaf) else jnp.asarray(leaf).dtype.name
                    assert seen_by_jax(expected_dtype, x64) == result.dtype.name
                    assert np.shape(leaf) == result.shape
                    assert value_of(leaf) == value_of(result)
