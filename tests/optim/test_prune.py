"""Pruning: exactly so many zeros, of the smallest weights, exactly zero, for good."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparisons import assert_identical, gradients_like, slow_but_for, standard, structure_and_dtypes
from support.pruning import everywhere, forms, fused, groups_of, masks_after, pruned_sgd, smallest, weights

import jmp_lite as jmp
from jmp_lite.optim import prune

# --- Which weights ---

SHAPES = [(), (1,), (7,), (5, 3), (0, 4), (3, 5, 7), (64, 33)]
SPARSITIES = [0, 0.0, 0.1, 0.25, 0.5, 0.8, 0.999, np.float32(0.3)]
VALUES = {
    "distinct": lambda rng, shape: rng.permutation(int(np.prod(shape))).reshape(shape) - 0.5,
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "ties": lambda rng, shape: rng.integers(-3, 4, shape).astype(float),
    "equal": lambda rng, shape: np.full(shape, -2.0),
    "zero": lambda rng, shape: np.zeros(shape),
    "infinite": lambda rng, shape: rng.choice([-np.inf, 0.0, 1.0, np.inf], shape),
    "subnormal": lambda rng, shape: rng.integers(-3, 4, shape) * 2.0**-100,
}


@pytest.mark.parametrize("sparsity", slow_but_for((0, 0.25, np.float32(0.3)), SPARSITIES), ids=repr)
def test_exactly_so_many_of_the_smallest_go(sparsity, rng):
    """`round(sparsity * size)` weights of each leaf, and of equal ones the first."""
    find = jax.jit(functools.partial(masks_after, prune(sparsity, where=everywhere)))
    for values in VALUES.values():
        params = {str(shape): jnp.asarray(values(rng, shape), jnp.float32) for shape in SHAPES}
        masks = find(params)
        for name, param in params.items():
            zeros = round(float(sparsity) * param.size)
            np.testing.assert_array_equal(masks[name], smallest(np.abs(np.asarray(param)), zeros))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_score_is_the_magnitude_of_the_new_weight(dtype, rng):
    """Parameter plus update counts, in at least float32: in bfloat16 many of these sums would be equal."""
    with jax.enable_x64(dtype == "float64"):
        params = {"w": jnp.asarray(rng.standard_normal((40, 30)), dtype)}
        updates = {"w": jnp.asarray(rng.standard_normal((40, 30)), "float64" if dtype == "float64" else "float32")}
        kind = np.float64 if dtype == "float64" else np.float32
        new = np.abs(np.asarray(params["w"]).astype(kind) + np.asarray(updates["w"]))
        np.testing.assert_array_equal(
            masks_after(prune(0.6, where=everywhere), params, updates)["w"], smallest(new, 720)
        )


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [-1.0, 0.0, 0.3, 0.7, 1.0, 2.0])
def test_sparsity_may_be_known_at_run_time_only(sparsity, rng):
    """A schedule, and an array under jit as `inject_hyperparams` has it, count in float32; beyond [0, 1] is the end."""
    params = {"w": jnp.asarray(rng.standard_normal((9, 11)), jnp.float32)}
    zeros = int(np.clip(np.round(np.float32(sparsity) * np.float32(99)), 0, 99))
    expected = smallest(np.abs(np.asarray(params["w"])), zeros)
    given = jax.jit(lambda value: masks_after(prune(value, where=everywhere), params)["w"])(jnp.float32(sparsity))
    np.testing.assert_array_equal(given, expected)
    scheduled = masks_after(prune(lambda _: jnp.float32(sparsity), where=everywhere), params)["w"]
    np.testing.assert_array_equal(scheduled, expected)


@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (1, 2), (4, 8), [1, 3]], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((24, 5), 0), ((24, 5), -2), ((5, 24), -1), ((3, 3, 24, 2), -2)], ids=str)
def test_n_of_m(nm, shape, axis, rng):
    """The n largest of every m consecutive weights along the axis, exactly n, and of equal ones the last."""
    n, m = nm
    find = jax.jit(functools.partial(masks_after, prune(nm=nm, axes=axis, where=everywhere)))
    for values in VALUES.values():
        params = {"w": jnp.asarray(values(rng, shape), jnp.float32)}
        kept = groups_of(find(params)["w"], axis, m)
        magnitudes = groups_of(np.abs(np.asarray(params["w"])), axis, m)
        np.testing.assert_array_equal(kept, np.stack([smallest(group, m - n) for group in magnitudes]))
        assert (kept.sum(1) == n).all()


LEAVES = {
    "dense/kernel": ((32, 32), True, True),
    "wide/kernel": ((30, 64), True, False),  # 4 does not divide 30
    "conv/kernel": ((3, 3, 16, 8), True, True),
    "first_conv/kernel": ((3, 3, 1, 16), False, False),
    "mobilenet_conv/kernel": ((3, 3, 3, 32), False, False),
    "small/kernel": ((31, 33), False, False),
    "dense/bias": ((4096,), False, False),
    "attention/bias": ((16, 128), False, False),
    "stacked_norm/scale": ((12, 768), False, False),
    "linear/w": ((32, 32), True, True),
    "linear/b": ((32, 32), False, False),
    "boxed/kernel/value": ((32, 32), True, True),
    "boxed/bias/value": ((32, 32), False, False),
    "tokens/embedding": ((256, 64), True, False),
    "tokens/pos_embedding": ((1, 64, 64), True, False),
}


def nested(paths):
    tree = {}
    for path, leaf in paths.items():
        *parents, name = path.split("/")
        functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, tree)[name] = leaf
    return tree


@pytest.mark.parametrize("path", LEAVES)
def test_default_takes_large_kernels(path):
    """Neither biases nor scales nor what is small, and for groups of four nothing that cannot be divided."""
    shape, pruned, grouped = LEAVES[path]
    params = nested({path: jnp.ones(shape)})
    for tx, expected in ((prune(0.5), pruned), (prune(nm=(2, 4), axes=-2), grouped)):
        said = pytest.warns(jmp.errors.LeftDenseWarning, match=f"none of '{path}'")
        with contextlib.nullcontext() if expected else said:
            masks = tx.init(params).masks
        assert [mask.shape for mask in jax.tree.leaves(masks)] == ([shape] if expected else [])


def test_a_choice_of_nothing_is_said():
    """A misspelled path in `where`; a tree without floating leaves has nothing to choose from."""
    with pytest.warns(jmp.errors.LeftDenseWarning, match="where chooses none of 'bias', 'kernel'"):
        prune(0.5, where=lambda path, _: "kernal" in path).init({"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)})
    prune(0.5).init({"count": jnp.zeros((), jnp.int32)})


@pytest.mark.parametrize("settings", [{"nm": (2, 4), "axes": 9}, {"nm": (2, 3)}], ids=str)
def test_axes_that_fit_nothing_are_said(settings):
    said = f"large weights with a contracted axis that {settings['nm'][1]} divides, chooses none of 'w'"
    with pytest.warns(jmp.errors.LeftDenseWarning, match=said):
        prune(**settings).init({"w": jnp.ones((64, 64))})


def test_axes_may_be_a_tree_of_numbers(rng):
    """One contracted axis each, as ``axes=0`` is one for all."""
    params = {name: jnp.asarray(rng.standard_normal((64, n)), jnp.float32) for name, n in (("w", 64), ("v", 32))}
    found = masks_after(prune(nm=(2, 4), axes={"w": 0, "v": 1}), params)
    expected = {
        name: masks_after(prune(nm=(2, 4), axes=axis), {name: params[name]}) for name, axis in (("w", 0), ("v", 1))
    }
    for name, mask in expected.items():
        np.testing.assert_array_equal(found[name], mask[name])


def test_sparsity_of_quantized_weights_is_that_of_their_numbers():
    params = {"kernel": jnp.eye(4), "bias": jnp.ones(4)}
    shares = jmp.optim.sparsity(jmp.quant.quantize_tree(params))
    assert (float(shares["kernel"]), float(shares["bias"])) == (0.75, 0.0)


def test_what_is_not_known_to_be_contracted_stays_dense_and_is_named():
    """Kernels of convolutions, attention, experts and stacked layers."""
    params = {"dense": jnp.ones((64, 32)), "conv": jnp.ones((3, 3, 32, 32)), "query": jnp.ones((64, 8, 8))}
    with pytest.warns(jmp.errors.LeftDenseWarning, match=r"leaves conv, query dense.*axes=quant\.contracted_axes"):
        state = prune(nm=(2, 4)).init(params)
    assert {name for name, mask in state.masks.items() if isinstance(mask, jax.Array)} == {"dense"}
    with pytest.raises(jmp.errors.InvalidPruningError, match=r"'conv' is float32\[3, 3, 32, 32\]: which of"):
        prune(nm=(2, 4), where=everywhere).init(params)


def test_groups_lie_along_the_last_contracted_axis_that_fits(rng):
    shapes = {"conv": (3, 3, 8, 5), "out": (4, 3, 16), "stack": (2, 8, 8), "table": (8, 8), "odd": (6, 8)}
    axes = {"conv": (0, 1, 2), "out": (0, 1), "stack": (1,), "table": None, "odd": (0,)}
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    where = lambda path, leaf: path != "odd" and axes[path] is not None  # noqa: E731
    masks = masks_after(prune(nm=(2, 4), axes=axes, where=where), params)
    for name, axis in {"conv": 2, "out": 0, "stack": 1}.items():
        assert (groups_of(masks[name], axis, 4).sum(1) == 2).all()
    assert isinstance(masks["table"], optax.MaskedNode)
    with pytest.raises(jmp.errors.InvalidPruningError, match=r"'odd' .* none of its axes \(0,\) can be cut"):
        prune(nm=(2, 4), axes=axes, where=lambda path, _: path == "odd").init(params)
    with pytest.raises(jmp.errors.InvalidPruningError, match="axes has nothing for 'conv'"):
        prune(nm=(2, 4), axes={"out": (0,)}, where=everywhere).init(params)


@pytest.mark.usefixtures("standard_promotion")
def test_axes_are_found_by_path_where_a_mask_leaves_some_out(rng):
    params = {"a": jnp.asarray(rng.standard_normal((32, 32)), jnp.float32), "b": jnp.ones((32, 32))}
    tx = optax.masked(prune(nm=(2, 4), axes={"a": (1,), "b": (0,)}), {"a": True, "b": False})
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    pruned = optax.apply_updates(params, updates)
    assert (groups_of(pruned["a"] == 0, 1, 4).sum(1) == 2).all()
    assert (pruned["b"] == 1).all()


def test_where_sees_paths_and_leaves():
    """The path is written as everywhere else; only floating parameters are asked about."""
    seen = {}
    params = {"a": [jnp.ones((2, 2)), jnp.ones(3, jnp.int32)], "b": {"c": jnp.ones((), jnp.bfloat16)}}
    prune(0.5, where=lambda path, leaf: bool(seen.setdefault(path, leaf.shape))).init(params)
    assert seen == {"a/0": (2, 2), "b/c": ()}


# --- What becomes of them ---


def cubic(step, *, initial, final, start, pruning_steps, frequency):
    """Equation 1 of Zhu & Gupta: s_t from s_i, s_f, t_0, n and Delta t."""
    end = start + pruning_steps * frequency
    step = np.clip(step, start, end)
    return final + (initial - final) * (1 - (step - start) / (pruning_steps * frequency)) ** 3


def test_polynomial_schedule_is_the_one_of_zhu_and_gupta():
    """The schedule named in the docstring, up to the roundings of float32."""
    ours = optax.polynomial_schedule(0.1, 0.9, power=3, transition_steps=8 * 5, transition_begin=7)
    steps = np.arange(60)
    expected = cubic(steps, initial=0.1, final=0.9, start=7, pruning_steps=8, frequency=5)
    np.testing.assert_allclose([float(ours(step)) for step in steps], expected, atol=8 * np.finfo(np.float32).eps)


PAIRS = [("float32", "float32"), ("bfloat16", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")]


@pytest.mark.filterwarnings("ignore:Parameters of 16 bits")
@forms
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [PAIRS[0], *(pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS[1:])]
)
def test_zeros_are_exact_and_stay(dtype, grad_dtype, form, rng):
    """Under Adam with weight decay, with a schedule, each step has its zeros, all of the earlier among them."""
    schedule = optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=12, transition_begin=2)
    tx = standard(optax.chain(optax.adamw(1e-2, weight_decay=0.1), prune(schedule, begin=2, every=3)))
    params = {"kernel": jnp.asarray(rng.standard_normal((64, 48)), dtype), "bias": jnp.ones(48, dtype)}
    state, step, pruned = tx.init(params), jax.jit(form(tx)), np.zeros((64, 48), bool)
    types, latest = structure_and_dtypes((params, state[1])), 0
    for i in range(20):
        params, state = step(params, state, gradients_like(params, rng, grad_dtype))
        assert structure_and_dtypes((params, state[1])) == types
        latest = i if i >= 2 and (i - 2) % 3 == 0 else latest
        dead, kernel = ~np.asarray(state[1].masks["kernel"]), np.asarray(params["kernel"]).astype(np.float32)
        assert dead.sum() == np.round(np.float32(schedule(latest)) * np.float32(64 * 48))
        assert (dead >= pruned).all()
        assert (kernel[dead] == 0).all()
        assert not np.signbit(kernel[dead]).any()
        assert (kernel[~dead] == 0).mean() < 0.01  # a sum may round to zero in half precision
        assert (np.asarray(params["bias"]).astype(np.float32) != 0).all()
        pruned = dead
    assert pruned.sum() == round(0.9 * 64 * 48)


@pytest.mark.parametrize("alive", [0.0, 1.0])
def test_pruned_weights_go_before_all_others(alive):
    """Large updates of pruned weights, and zeros among the others, leave the number of zeros exact."""
    schedule = optax.linear_schedule(0.5, 0.75, 1)
    tx = prune(schedule, where=everywhere)
    _, state = tx.update({"w": jnp.zeros(4)}, tx.init({"w": jnp.ones(4)}), {"w": jnp.array([2.0, 2.0, 1.0, 1.0])})
    np.testing.assert_array_equal(state.masks["w"], [True, True, False, False])
    params, updates = {"w": jnp.array([alive, alive, 0.0, 0.0])}, {"w": jnp.array([0.0, 0.0, 9.0, 9.0])}
    _, state = tx.update(updates, state, params)
    np.testing.assert_array_equal(state.masks["w"], [False, True, False, False])


@pytest.mark.parametrize(
    "rule", [{"sparsity": lambda step: jnp.where(step == 0, 0.75, 0.25)}, {"nm": (1, 4)}], ids=["schedule", "groups"]
)
def test_what_is_pruned_stays_so(rule):
    """A schedule that falls revives nothing, nor does an update that makes other weights the smallest."""
    tx = prune(**rule, where=everywhere)
    params = {"w": jnp.arange(1.0, 9.0).reshape(8, 1)}
    _, state = tx.update({"w": jnp.zeros((8, 1))}, tx.init(params), params)
    pruned = ~np.asarray(state.masks["w"])
    _, state = tx.update({"w": jnp.where(pruned, 99.0, 0.0)}, state, params)
    assert not np.asarray(state.masks["w"])[pruned].any()


@pytest.mark.slow
@forms
def test_update_narrower_than_the_parameter_is_widened(form, rng):
    """Minus a float32 parameter cannot be written in the bfloat16 of its update."""
    tx, params = pruned_sgd(), weights(rng)
    params, _ = form(tx)(params, tx.init(params), gradients_like(params, rng, jnp.bfloat16))
    assert int((params["w"] == 0).sum()) == 16


@pytest.mark.slow
def test_sparsity_that_falls_revives_nothing(rng):
    """Masks are monotone whatever the schedule says."""
    params = {"w": jnp.asarray(rng.standard_normal((10, 10)), jnp.float32)}
    tx = prune(optax.linear_schedule(0.8, 0.2, 5), where=everywhere)
    first, last = masks_after(tx, params), masks_after(tx, params, steps=6)
    assert_identical(last, first)
    assert int((~first["w"]).sum()) == 80


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"nm": (2, 4)}], ids=str)
def test_constant_prunes_once(settings, rng):
    """Dense up to `begin`, then one mask, although other weights become the smallest later."""
    tx = prune(**settings, where=everywhere, begin=2)
    state, seen = tx.init({"w": jnp.ones((8, 8))}), []
    for _ in range(5):
        params = {"w": jnp.asarray(rng.standard_normal((8, 8)), jnp.float32)}
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        seen.append(np.asarray(state.masks["w"]))
        np.testing.assert_array_equal((params["w"] + updates["w"]) != 0, seen[-1])
    assert [mask.mean() for mask in seen] == [1, 1, 0.5, 0.5, 0.5]
    assert (seen[2] == seen[4]).all()
    assert int(state.step) == 5


def test_what_was_revived_is_zero_again(rng):
    """Whoever changes pruned weights from outside has them for one step only."""
    tx = prune(0.5, where=everywhere)
    params = {"w": jnp.asarray(rng.standard_normal((6, 6)), jnp.float32)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zero, tx.init(params), params)
    revived = jax.tree.map(lambda p: p + 1e30, params)
    updates, state = tx.update(zero, state, revived)
    np.testing.assert_array_equal(optax.apply_updates(revived, updates)["w"] == 0, ~state.masks["w"])


# --- What is left alone ---


def test_other_leaves_pass_untouched(key):
    """Integers, complex numbers, keys, None and float0 are handed through as the same objects, chosen or not."""
    float0 = np.zeros(3, jax.dtypes.float0)
    params = {"int": jnp.arange(3), "complex": jnp.ones(3, jnp.complex64), "key": key, "none": None, "python": 1.5}
    updates = {"int": float0, "complex": jnp.ones(3, jnp.complex64), "key": key, "none": None, "python": 0.5}
    tx = prune(0.5, where=everywhere)
    new, state = tx.update(updates, tx.init(params), params)
    assert jax.tree.leaves(state.masks) == []
    assert all(new[name] is updates[name] for name in updates)


def test_parameter_without_update_stays():
    """Where the update of a chosen parameter is None or float0, nothing happens to it, nor to its mask."""
    params = {"frozen": jnp.ones((4, 4)), "float0": jnp.ones((4, 4)), "free": jnp.ones((4, 4))}
    updates = {"frozen": None, "float0": np.zeros((4, 4), jax.dtypes.float0), "free": jnp.zeros((4, 4))}
    tx = prune(0.5, where=everywhere)
    params_after, state = fused(tx)(params, tx.init(params), updates)
    for name, zeros in (("frozen", 0), ("float0", 0), ("free", 8)):
        assert int((params_after[name] == 0).sum()) == int((~state.masks[name]).sum()) == zeros


# --- Errors ---

MISTAKES = {
    "nothing": ({}, "either a sparsity or nm"),
    "both": ({"sparsity": 0.5, "nm": (2, 4)}, r"got sparsity=0\.5 and nm=\(2, 4\)"),
    "percent": ({"sparsity": 80}, r"in \[0, 1\) or a schedule, got 80"),
    "everything": ({"sparsity": 1.0}, r"got 1\.0"),
    "negative": ({"sparsity": -0.1}, r"got -0\.1"),
    "not a number": ({"sparsity": float("nan")}, "got nan"),
    "a name": ({"sparsity": "0.8"}, "got '0.8'"),
    "a truth": ({"sparsity": True}, "got True"),
    "a list": ({"sparsity": [0.5]}, r"got \[0\.5\]"),
    "n of n": ({"nm": (4, 4)}, r"0 < n < m such as \(2, 4\), got \(4, 4\)"),
    "m of n": ({"nm": (4, 2)}, r"got \(4, 2\)"),
    "none of m": ({"nm": (0, 4)}, r"got \(0, 4\)"),
    "one number": ({"nm": 4}, "got 4"),
    "a ratio": ({"nm": "2:4"}, "got '2:4'"),
    "halves": ({"nm": (0.5, 4)}, r"got \(0\.5, 4\)"),
    "every 0": ({"sparsity": 0.5, "every": 0}, "every must be an integer of at least 1, got 0"),
    "begin -1": ({"sparsity": 0.5, "begin": -1}, "begin must be an integer of at least 0, got -1"),
    "begin 1.5": ({"sparsity": 0.5, "begin": 1.5}, r"begin .*got 1\.5"),
    "two of one": ({"sparsity": jnp.array([0.5, 0.5])}, "in .* or a schedule"),
    "a path for a choice": ({"sparsity": 0.5, "where": "kernel"}, "where must be a function .* got 'kernel'"),
    "a tree for a choice": ({"sparsity": 0.5, "where": {"kernel": True}}, "where must be a function .* got {'kernel'"),
    "axes of a sparsity": ({"sparsity": 0.5, "axes": 0}, "axes are those of nm.*got axes=0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_settings_that_mean_nothing(mistake):
    """Each is quoted, when the transformation is made."""
    settings, message = MISTAKES[mistake]
    with pytest.raises(jmp.errors.InvalidPruningError, match=message):
        prune(**settings)


@pytest.mark.parametrize(("shape", "axis"), [((6, 4), -2), ((4, 6), 1), ((4,), -2), ((4, 4), 2)], ids=str)
def test_chosen_leaf_that_cannot_be_grouped_is_named(shape, axis):
    """What the caller chose is never left out silently."""
    params = {"layer": {"kernel": jnp.ones(shape)}}
    with pytest.raises(
        jmp.errors.InvalidPruningError, match=r"'layer/kernel' is float32\[.*axes .* groups of 4\. Leave it out"
    ):
        prune(nm=(2, 4), axes=axis, where=everywhere).init(params)


def test_update_without_parameters_is_refused():
    """Optax's `params=None` is answered with what to write."""
    tx, params = prune(0.5), {"w": jnp.ones((32, 32))}
    with pytest.raises(jmp.errors.InvalidPruningError, match=r"call update\(updates, state, params\)"):
        tx.update(params, tx.init(params))
    with pytest.raises(jmp.errors.InvalidPruningError, match="must be a PruneState, got dict"):
        tx.update(tx.init(params), params, params)
