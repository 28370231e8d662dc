"""Pruning: exactly so many zeros, exactly zero, for good, in every combination with other transformations."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowbit import slow_but_for
from support import assert_identical, fused, gradients_like, standard, structure_and_dtypes, two_calls

import jmp_lite as jmp
from jmp_lite.optim import PruneState, prune


def everywhere(path, leaf):
    return True


def masks_after(tx, params, updates=None, steps=1):
    """The masks after so many steps from the start that keep the parameters."""
    state = tx.init(params)
    updates = jax.tree.map(jnp.zeros_like, params) if updates is None else updates
    for _ in range(steps):
        _, state = tx.update(updates, state, params)
    return state.masks


def smallest(magnitudes, zeros):
    """The mask without the smallest magnitudes, by a stable sort."""
    mask = np.ones(magnitudes.size, bool)
    mask[np.argsort(magnitudes.ravel(), kind="stable")[:zeros]] = False
    return mask.reshape(magnitudes.shape)


def groups_of(array, axis, m):
    """The consecutive groups along an axis, as rows."""
    return np.moveaxis(np.asarray(array), axis, -1).reshape(-1, m)


forms = pytest.mark.parametrize("form", [fused, two_calls])

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


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=repr)
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
    find = jax.jit(functools.partial(masks_after, prune(nm=nm, axis=axis, where=everywhere)))
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
    for tx, expected in ((prune(0.5), pruned), (prune(nm=(2, 4)), grouped)):
        masks = tx.init(params).masks
        assert [mask.shape for mask in jax.tree.leaves(masks)] == ([shape] if expected else [])


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
    params_after, state = jmp.apply_gradients(tx, updates, tx.init(params), params)
    for name, zeros in (("frozen", 0), ("float0", 0), ("free", 8)):
        assert int((params_after[name] == 0).sum()) == int((~state.masks[name]).sum()) == zeros


# --- Combinations ---


def weights(rng, dtype=jnp.float32):
    return {"w": jnp.asarray(rng.standard_normal((8, 4)), dtype), "v": jnp.asarray(rng.standard_normal((4, 6)), dtype)}


def pruned_sgd(**settings):
    return optax.chain(optax.sgd(0.1), prune(**{"sparsity": 0.5, "where": everywhere, **settings}))


SKIPPING = {
    "loss_scaled": lambda tx: jmp.loss_scaled(tx, jmp.StaticLossScale(1.0)),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 10),
}


@forms
@pytest.mark.parametrize("wrapper", SKIPPING)
def test_skipped_step_prunes_nothing(wrapper, form, rng):
    """A NaN changes neither parameters nor masks nor the step count, before the zeros and after."""
    tx = standard(SKIPPING[wrapper](pruned_sgd(begin=1)))
    params = weights(rng)
    state, step = tx.init(params), jax.jit(form(tx))
    taken, zeros = 0, []
    for bad in (True, False, True, False, True, False):
        before = params, optax.tree.get(state, "masks")
        grads = gradients_like(params, rng)
        grads = jax.tree.map(lambda g: g * jnp.nan, grads) if bad else grads
        params, state = step(params, state, grads)
        taken += not bad
        assert int(optax.tree.get(state, "step")) == taken
        if bad:
            assert_identical((params, optax.tree.get(state, "masks")), before)
        zeros.append(int((params["w"] == 0).sum()))
    assert zeros == [0, 0, 0, 16, 16, 16]


@forms
def test_accumulating_steps_do_not_count(form, rng):
    """With MultiSteps the schedule runs by updates; micro-steps leave masks and zeros."""
    tx = pruned_sgd(sparsity=optax.linear_schedule(0.0, 0.75, 3))
    tx = standard(optax.MultiSteps(tx, 4).gradient_transformation())
    params = weights(rng)
    state, step = tx.init(params), jax.jit(form(tx))
    seen = []
    for _ in range(16):
        params, state = step(params, state, gradients_like(params, rng))
        seen.append((int(optax.tree.get(state, "step")), int((params["w"] == 0).sum())))
    assert seen == [*[(0, 0)] * 3, *[(1, 0)] * 4, *[(2, 8)] * 4, *[(3, 16)] * 4, (4, 24)]


COMBINATIONS = {
    "named_chain": lambda tx: optax.named_chain(("all", tx), ("nothing", optax.identity())),
    "masked": lambda tx: optax.masked(tx, {"w": True, "v": False}),
    "multi_transform": lambda tx: optax.multi_transform(
        {"sparse": tx, "rest": optax.sgd(0.1)}, {"w": "sparse", "v": "rest"}
    ),
    "partition of all": lambda tx: optax.multi_transform({"all": tx}, {"w": "all", "v": "all"}),
    "extra args": optax.with_extra_args_support,
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda sparsity: pruned_sgd(sparsity=sparsity))(
        sparsity=0.5
    ),
    "a second prune": lambda tx: optax.chain(tx, prune(nm=(1, 2), where=lambda path, leaf: path == "v")),
}


@pytest.mark.slow
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_combinations(combination, rng):
    """Inside other transformations pruning does what it does alone, in one trace, and its state is found."""
    alone, combined = standard(pruned_sgd()), standard(COMBINATIONS[combination](pruned_sgd()))
    params, traces = weights(rng), []

    def counted(*args):
        traces.append(args)
        return two_calls(combined)(*args)

    ours, theirs = (params, combined.init(params)), (params, alone.init(params))
    step, reference = jax.jit(counted, donate_argnums=(1,)), jax.jit(two_calls(alone))
    for _ in range(4):
        grads = gradients_like(params, rng)
        ours, theirs = step(*ours, grads), reference(*theirs, grads)
        np.testing.assert_array_equal(ours[0]["w"], theirs[0]["w"])
        assert int((ours[0]["w"] == 0).sum()) == 16
    assert len(traces) == 1
    masks = [value["w"] for _, value in optax.tree.get_all_with_path(ours[1], "masks")]
    assert any(np.array_equal(mask, optax.tree.get(theirs[1], "masks")["w"]) for mask in masks)


def test_one_compilation_with_donated_parameters(rng):
    """Parameters and state may be donated, over steps that renew the masks and steps that do not."""
    tx = jmp.loss_scaled(pruned_sgd(sparsity=optax.linear_schedule(0.0, 0.8, 9), every=2), jmp.StaticLossScale(1.0))
    step = jax.jit(fused(tx), donate_argnums=(0, 1))
    for _ in range(2):  # the transformation is as good as new after a run that donated its state
        params = weights(rng)
        state = tx.init(params)
        for _ in range(6):
            params, state = step(params, state, gradients_like(params, rng))
    assert step._cache_size() == 1


def test_state_can_be_read_and_mapped(rng):
    """`optax.tree.get` finds the masks, `map_params` puts sharding specs in their places, `eval_shape` their shapes."""
    tx = optax.chain(optax.sgd(0.1), prune(0.5, where=lambda path, leaf: path == "w"))
    params = weights(rng)
    state = tx.init(params)
    assert isinstance(state[1], PruneState)
    assert optax.tree.get(state, "masks")["w"].dtype == bool
    specs = optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        state,
        {"w": "rows", "v": "columns"},
        transform_non_params=lambda _: "replicated",
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    assert specs[1].step == "replicated"
    assert specs[1].masks["w"] == "rows"
    assert jax.tree.map(jnp.result_type, jax.eval_shape(tx.init, params)) == jax.tree.map(jnp.result_type, state)


@pytest.mark.slow
def test_ensembles(rng):
    """Under vmap each member has its own masks."""
    params = {"w": jnp.asarray(rng.standard_normal((5, 8, 4)), jnp.float32)}
    for settings in ({"sparsity": 0.4}, {"nm": (2, 4)}):
        tx = pruned_sgd(**{"sparsity": None, **settings})
        zero = jax.tree.map(jnp.zeros_like, params)
        together, _ = jax.vmap(fused(tx))(params, jax.vmap(tx.init)(params), zero)
        for i, new in enumerate(together["w"]):
            member = {"w": params["w"][i]}
            alone, _ = fused(tx)(member, tx.init(member), {"w": zero["w"][i]})
            np.testing.assert_array_equal(new, alone["w"])


@pytest.mark.parametrize("option", [jax.debug_nans, jax.enable_x64], ids=["debug_nans", "x64"])
def test_under_options_of_jax(option, rng):
    """Nothing on the way is NaN, and no dtype depends on 64-bit types being enabled."""
    params = weights(rng)
    tx = pruned_sgd(sparsity=optax.linear_schedule(0.0, 0.75, 3))
    with option(True):
        state, step = tx.init(params), jax.jit(fused(tx))
        types = structure_and_dtypes((params, state))
        for _ in range(4):
            params, state = step(params, state, gradients_like(params, rng))
            assert structure_and_dtypes((params, state)) == types
    assert int((params["v"] == 0).sum()) == 18


# --- Devices ---


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(kind, kind))


SPECS = [P("rows"), P(None, "columns"), P("rows", "columns"), P(("rows", "columns"))]
RULES = {
    "number": {"sparsity": 0.7},
    "schedule": {"sparsity": optax.linear_schedule(0.3, 0.9, 3)},
    "groups": {"nm": (2, 4)},
}


@pytest.mark.parametrize("kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("spec", slow_but_for(SPECS[2:3], SPECS), ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_sharded_is_unsharded(rule, spec, kind, rng):
    """On eight devices the masks are those of one, bit by bit and with ties, and lie where the parameters lie."""
    tx = prune(**RULES[rule], where=everywhere)
    params = {"w": jnp.asarray(rng.integers(-30, 30, (64, 16)), jnp.float32)}
    updates = {"w": jnp.asarray(rng.integers(-3, 3, (64, 16)), jnp.float32)}
    sharding = NamedSharding(mesh_of(kind), spec)

    def run(params, updates):
        state = tx.init(params)
        for _ in range(3):
            new, state = tx.update(updates, state, params)
        return new, state

    with jax.set_mesh(sharding.mesh):
        new, state = jax.jit(run)(*jax.device_put((params, updates), sharding))
    assert_identical((new, state), jax.jit(run)(params, updates))
    for array in (new["w"], state.masks["w"]):
        assert array.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize("rule", RULES)
def test_no_weight_travels(rule, rng):
    """What devices exchange to find the masks of a sharded leaf is counts."""
    tx = prune(**RULES[rule], where=everywhere)
    sharding = NamedSharding(mesh_of(AxisType.Auto), P("rows", "columns"))
    params = jax.device_put({"w": jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)}, sharding)
    program = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    moves = ("all-gather(", "all-to-all(", "collective-permute(", "reduce-scatter(")
    assert [move for move in moves if move in program] == []
    reduced = [line.split(" all-reduce(")[0] for line in program.splitlines() if " all-reduce(" in line]
    assert all("u32[]" in line or "u32[1]" in line for line in reduced)
    assert bool(reduced) == (rule != "groups")


def test_shard_map_prunes_each_shard(rng):
    """Inside shard_map, with its check of varying axes, every device has the sparsity in its own shard."""
    tx, mesh = pruned_sgd(sparsity=0.75), mesh_of(AxisType.Auto)
    params = {"w": jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)}

    def step(params, grads):
        return fused(tx)(params, tx.init(params), grads)[0]

    spec = P("rows", "columns")
    new = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(spec, spec), out_specs=spec))(params, params)
    assert [int((shard.data == 0).sum()) for shard in new["w"].addressable_shards] == [96] * 8


# --- Train states and models ---


def make_step(tx):
    def loss_fn(params, x):
        hidden = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"][None])
        return jnp.mean(jnp.square(hidden @ params["head"]["kernel"] - 1))

    @jax.jit
    def step(state, x):
        grads = jmp.scaled_value_and_grad(loss_fn)(state["params"], x, state=state["opt_state"])[1]
        params, opt_state = jmp.apply_gradients(tx, grads, state["opt_state"], state["params"])
        return {"params": params, "opt_state": opt_state}

    return step


def through_bytes(state, template, path):
    data = jmp.checkpoint.to_bytes(state, policy="full")
    return jmp.checkpoint.from_bytes(template, data, policy="full")


def through_orbax(state, template, path):
    jmp.checkpoint.save(path / "step", state, policy="full")
    return jmp.checkpoint.restore(path / "step", template, policy="full")


@pytest.mark.slow
@pytest.mark.parametrize("trip", [through_bytes, through_orbax])
def test_resumed_run_is_the_uninterrupted_one(trip, tmp_path, rng):
    """A whole train state through bytes and through Orbax: masks, the schedule's step, parameters that have none."""
    schedule = optax.polynomial_schedule(0.0, 0.8, power=3, transition_steps=6)
    tx = jmp.loss_scaled(optax.chain(optax.trace(0.9), optax.sgd(0.1), prune(schedule, every=2)))

    def fresh(fill):
        params = {"dense": {"kernel": fill((32, 64)), "bias": fill((64,))}, "head": {"kernel": fill((64, 4))}}
        return {"params": params, "opt_state": tx.init(params)}

    state, step = fresh(lambda shape: jnp.asarray(0.2 * rng.standard_normal(shape), jnp.float32)), make_step(tx)
    batches = [jnp.asarray(rng.standard_normal((16, 32)), jnp.float32) for _ in range(10)]
    for x in batches[:5]:
        state = step(state, x)
    resumed = trip(state, fresh(jnp.zeros), tmp_path)
    assert_identical(resumed, state)
    for x in batches[5:]:
        state, resumed = step(state, x), step(resumed, x)
    assert_identical(resumed, state)
    assert int((state["params"]["dense"]["kernel"] == 0).sum()) == round(0.8 * 2048)
    assert (state["params"]["head"]["kernel"] != 0).all()


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        return nn.Dense(8)(nn.LayerNorm()(x.reshape(x.shape[0], -1)))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.slow
def test_linen_model_in_groups_of_four(key):
    """2:4 along the input channels of a convolution and the inputs of a Dense; the first convolution stays dense."""
    model, tx = Net(), optax.chain(optax.adamw(1e-3), prune(nm=(2, 4), begin=1))
    x = jax.random.normal(key, (4, 8, 8, 1))
    params = model.init(key, x)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda params: jnp.sum(model.apply(params, x) ** 2))(params)
        return jmp.apply_gradients(tx, grads, state, params)

    for _ in range(3):
        params, state = step(params, state)
    layers = params["params"]
    for name, zeros in (("Conv_0", 0), ("Conv_1", 2), ("Dense_0", 2)):
        if zeros:
            assert (groups_of(layers[name]["kernel"] == 0, -2, 4).sum(1) == zeros).all()
        else:
            assert (layers[name]["kernel"] != 0).all()


@pytest.mark.usefixtures("standard_promotion")
def test_nnx_model(seed):
    """`nnx.Optimizer` takes it; biases of NNX are left alone."""
    model = nnx.Linear(64, 32, rngs=nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.chain(optax.adamw(1e-2), prune(0.8)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 64))) ** 2))(model))

    for _ in range(3):
        step(model, optimizer)
    assert int((model.kernel[...] == 0).sum()) == round(0.8 * 2048)
    assert (model.bias[...] != 0).all()


@pytest.mark.slow
def test_zeros_stay_through_quantisation(key):
    """Training through int8 with straight-through gradients: a zero is a zero in int8 too."""

    def int8(w):
        scale = jax.lax.stop_gradient(jnp.max(jnp.abs(w)) / 127)
        return w + jax.lax.stop_gradient(jnp.round(w / scale) * scale - w)

    params = {"kernel": jax.random.normal(key, (64, 32))}
    x, y = jax.random.normal(key, (16, 64)), jnp.ones((16, 32))
    tx = optax.chain(optax.sgd(1e-2), prune(optax.linear_schedule(0.0, 0.8, 5)))
    state = tx.init(params)
    for _ in range(8):
        grads = jax.grad(lambda params: jnp.mean(jnp.square(x @ int8(params["kernel"]) - y)))(params)
        params, state = fused(tx)(params, state, grads)
    pruned = ~optax.tree.get(state, "masks")["kernel"]
    assert int(pruned.sum()) == round(0.8 * 2048)
    assert (params["kernel"][pruned] == 0).all()
    assert (int8(params["kernel"])[pruned] == 0).all()


# --- Errors ---

MISTAKES = {
    "nothing": ({}, "either a sparsity or nm"),
    "both": ({"sparsity": 0.5, "nm": (2, 4)}, r"got sparsity=0\.5 and nm=\(2, 4\)"),
    "per cent": ({"sparsity": 80}, r"in \[0, 1\) or a schedule, got 80"),
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
    "axis": ({"nm": (2, 4), "axis": None}, "axis must be an integer, got None"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_settings_that_mean_nothing(mistake):
    """Each is quoted, when the transformation is made."""
    settings, message = MISTAKES[mistake]
    with pytest.raises(jmp.InvalidPruningError, match=message):
        prune(**settings)


@pytest.mark.parametrize(("shape", "axis"), [((6, 4), -2), ((4, 6), 1), ((4,), -2), ((4, 4), 2)], ids=str)
def test_chosen_leaf_that_cannot_be_grouped_is_named(shape, axis):
    """What the caller chose is never left out silently."""
    params = {"layer": {"kernel": jnp.ones(shape)}}
    with pytest.raises(
        jmp.InvalidPruningError, match=r"'layer/kernel' is float32\[.*axis .* groups of 4\. Leave it out"
    ):
        prune(nm=(2, 4), axis=axis, where=everywhere).init(params)


def test_update_without_parameters_is_refused():
    """Optax's `params=None` is answered with what to write."""
    tx, params = prune(0.5), {"w": jnp.ones((32, 32))}
    with pytest.raises(jmp.InvalidPruningError, match=r"call update\(updates, state, params\)"):
        tx.update(params, tx.init(params))
