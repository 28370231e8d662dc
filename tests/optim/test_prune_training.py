"""Pruning in every combination: with other transformations, on several devices, in train states and models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.comparisons import (
    assert_identical,
    gradients_like,
    slow_but_for,
    standard,
    structure_and_dtypes,
    two_calls,
)
from support.pruning import everywhere, forms, fused, groups_of, pruned_sgd, weights

import jmp_lite as jmp
from jmp_lite.optim import PruneState, prune

# --- Combinations ---


SKIPPING = {
    "loss_scaled": lambda tx: jmp.loss_scaled(tx, jmp.StaticLossScale(1.0)),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 10),
}


@pytest.mark.covering(1)
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
        return two_calls(tx)(params, tx.init(params), grads)[0]

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
        grads = jmp.scaled_value_and_grad(loss_fn, loss_scale=state["opt_state"])(state["params"], x)[1]
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
    model, x = Net(), jax.random.normal(key, (4, 8, 8, 1))
    params = model.init(key, x)
    axes = jmp.quant.contracted_axes(model.apply)(params, x)
    tx = optax.chain(optax.adamw(1e-3), prune(nm=(2, 4), axes=axes, begin=1))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda params: jnp.sum(model.apply(params, x) ** 2))(params)
        return fused(tx)(params, state, grads)

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
def test_zeros_stay_through_quantization(key):
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
