"""Many devices, one verdict: under pmap, shard_map and jit a bad replica skips the step for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.comparisons import DEVICES, assert_identical, fused, mesh, standard, two_calls

import jmp_lite as jmp

BAD_VALUES = [np.nan, np.inf, -np.inf]
forms = pytest.mark.parametrize("form", [fused, two_calls])


def loss_fn(params, x):
    return jnp.sum(params["w"] * x) + jnp.sum(params["b"] * x * x)


def optimizer(axis_name):
    inner = standard(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.125)))
    return jmp.loss_scaled(inner, jmp.DynamicLossScale(2.0**6, period=2), axis_name=axis_name)


def batches(rng, bad):
    """Seven rows of data per device, one with something not finite on one device if asked."""
    x = rng.standard_normal((DEVICES, 3)).astype(np.float32)
    if bad:
        x[rng.integers(DEVICES), rng.integers(3)] = rng.choice(BAD_VALUES)
    return jnp.asarray(x)


def start():
    return {"w": jnp.ones(3), "b": jnp.full(3, 0.5)}


def replicated(tree):
    return jax.tree.map(lambda x: np.stack([x] * DEVICES), tree)


def assert_replicas_equal(tree):
    """Asserts that all devices hold the same bits."""
    tree = jax.tree.map(np.asarray, tree)
    for i in range(1, DEVICES):
        assert_identical(jax.tree.map(lambda x, i=i: x[i], tree), jax.tree.map(lambda x: x[0], tree))


def train_step(tx, form, mean):
    """One step per device; with `mean` over the gradients of all."""

    def step(params, state, x):
        loss, grads = jmp.scaled_value_and_grad(loss_fn, loss_scale=state)(params, x)
        grads = jax.lax.pmean(grads, "batch") if mean else grads
        return *form(tx)(params, state, grads), loss

    return step


VERDICTS = [False, True, False, False, True, True, False]


@pytest.mark.parametrize(
    ("form", "axis_name"), [(fused, None), pytest.param(two_calls, "batch", marks=pytest.mark.slow)]
)
def test_pmap_with_mean_gradients(form, axis_name, rng):
    """After pmean all replicas agree bit for bit, skip together, and only the bad replica's loss is not finite."""
    tx = optimizer(axis_name)
    params, state = replicated(start()), replicated(tx.init(start()))
    step = jax.pmap(train_step(tx, form, mean=True), "batch")
    for bad in VERDICTS:
        before = params, state.inner_state
        params, state, loss = step(params, state, batches(rng, bad))
        assert_replicas_equal((params, state))
        assert int(np.sum(~np.isfinite(loss))) == int(bad)
        if bad:
            assert_identical((params, state.inner_state), before)
    assert int(state.total_notfinite[0]) == sum(VERDICTS)


@pytest.mark.parametrize(("form", "axis_name"), [(fused, "batch"), (two_calls, None)])
def test_pmap_with_different_gradients(form, axis_name, rng):
    """Replicas that keep different gradients (shards) skip together with axis_name, and only then."""
    tx = optimizer(axis_name)
    params, state = replicated(start()), replicated(tx.init(start()))
    step = jax.pmap(train_step(tx, form, mean=False), "batch")
    for bad in (False, True):
        before = params
        params, state, _ = step(params, state, batches(rng, bad))
    moved = np.any(np.asarray(params["w"] != before["w"]), axis=1)
    assert int(moved.sum()) == (0 if axis_name else DEVICES - 1)
    assert len(set(state.loss_scale.loss_scale.tolist())) == (1 if axis_name else 2)


@pytest.mark.covering(1)
@forms
@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_shard_map_with_replicated_parameters(axis_name, form, rng):
    """With varying-axes checks on, parameters and state stay provably replicated, and bad steps are skipped."""
    tx = optimizer(axis_name)

    def step(params, state, x):
        params, state, loss = train_step(tx, form, mean=True)(params, state, x[0])
        return params, state, loss[None]

    mapped = jax.shard_map(step, mesh=mesh(), in_specs=(P(), P(), P("batch")), out_specs=(P(), P(), P("batch")))
    params, state, run = start(), tx.init(start()), jax.jit(mapped)
    for bad in VERDICTS[:3]:
        before = params, state.inner_state
        params, state, loss = run(params, state, batches(rng, bad))
        assert int(np.sum(~np.isfinite(loss))) == int(bad)
        if bad:
            assert_identical((params, state.inner_state), before)
    assert int(state.total_notfinite) == 1
    for leaf in jax.tree.leaves(params):
        copies = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
        assert len(copies) == 1


@forms
def test_shard_map_with_sharded_parameters(form, rng):
    """Parameters and moments split over devices step and skip together: the scale and the counters stay replicated."""
    tx = jmp.loss_scaled(standard(optax.adam(0.125)), jmp.DynamicLossScale(2.0**6), axis_name="batch")
    params = {"w": jnp.ones(3 * DEVICES)}
    state = tx.init(params)
    specs = jax.tree.map(lambda x: P("batch") if x.ndim else P(), (params, state))

    def step(params, state, x):
        _, grads = jmp.scaled_value_and_grad(lambda p: jnp.sum(p["w"] * x[0]), loss_scale=state)(params)
        return form(tx)(params, state, grads)

    run = jax.jit(jax.shard_map(step, mesh=mesh(), in_specs=(*specs, P("batch")), out_specs=specs))
    taken, taken_state = run(params, state, batches(rng, bad=False))
    assert np.all(np.asarray(taken["w"] != params["w"]))
    skipped, skipped_state = run(taken, taken_state, batches(rng, bad=True))
    assert_identical((skipped, skipped_state.inner_state), (taken, taken_state.inner_state))
    assert float(skipped_state.loss_scale.loss_scale) == 2.0**5


@forms
def test_jit_with_sharded_batch(form, rng):
    """Under jit with the batch split over devices the verdict is global without an axis name."""
    tx, sharded = optimizer(None), NamedSharding(mesh(), P("batch"))

    @jax.jit
    def step(params, state, x):
        loss, grads = jmp.scaled_value_and_grad(loss_fn, loss_scale=state)(params, jnp.mean(x, axis=0))
        return *form(tx)(params, state, grads), loss

    replicas = NamedSharding(mesh(), P())
    params, state = jax.device_put((start(), tx.init(start())), replicas)
    for bad in VERDICTS[:3]:
        before = params, state.inner_state
        params, state, loss = step(params, state, jax.device_put(batches(rng, bad), sharded))
        assert bool(jnp.isfinite(loss)) != bad
        if bad:
            assert_identical((params, state.inner_state), before)
        assert params["w"].sharding.is_fully_replicated
    assert int(state.total_notfinite) == 1


@forms
def test_jit_on_an_explicit_mesh(form, rng):
    """With shardings in types (explicit mesh axes, jax.make_mesh's default) the step keeps them, and skips globally."""
    explicit = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("batch",), (jax.sharding.AxisType.Explicit,))
    tx = jmp.loss_scaled(standard(optax.adam(0.125)), jmp.DynamicLossScale(2.0**6))
    with jax.set_mesh(explicit):
        params = jax.device_put({"w": jnp.ones((DEVICES, 3))}, P("batch"))
        state, step = tx.init(params), jax.jit(form(tx))
        for bad in (False, True):
            before, types = (params, state.inner_state), jax.tree.map(jax.typeof, (params, state))
            params, state = step(params, state, {"w": jax.device_put(batches(rng, bad), P("batch"))})
            assert jax.tree.map(jax.typeof, (params, state)) == types
        assert_identical((params, state.inner_state), before)
    assert float(state.loss_scale.loss_scale) == 2.0**5


@pytest.mark.parametrize("axes", ["rows", ("rows", "columns")], ids=str)
def test_agreement_over_several_axes(axes):
    """The verdict can be agreed over one axis of a mesh or over all of them."""
    grid = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]).reshape(4, 2), ("rows", "columns"))

    def verdict(x):
        return jmp.all_finite(x, axis_name=axes)[None, None]

    mapped = jax.jit(jax.shard_map(verdict, mesh=grid, in_specs=P("rows", "columns"), out_specs=P("rows", "columns")))
    x = jnp.ones((4, 2)).at[2, 1].set(np.nan)
    expected = np.zeros((4, 2), bool)
    expected[:, 0] = axes == "rows"
    np.testing.assert_array_equal(mapped(x), expected)
