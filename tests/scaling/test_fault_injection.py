"""Ten thousand steps with faults injected: parameters stay finite, replicas equal, skipped steps leave no trace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from support import scaler_models
from support.comparisons import DEVICES, fused, mesh, standard, two_calls

import jmp_lite as jmp

STEPS = 10_000
PERIOD = 20
VALUES = np.array([0.0, np.nan, np.inf, -np.inf], np.float32)
PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(2), "s": jnp.float32(1)}
SIZES = np.array([leaf.size for leaf in jax.tree.leaves(PARAMS)])


def faults(rng, steps, replicas=DEVICES):
    """For each step and replica, what is added to which element of which leaf: nothing, nan, inf or -inf.

    Faults come one by one and in bursts, on one replica or on several at once.
    """
    probability = np.repeat(rng.choice([0.0, 0.02, 0.5], steps // 50, p=[0.3, 0.5, 0.2]), 50)
    probability[:100] = 0  # the scale reaches its maximum
    probability[100:200] = 0.5  # and its minimum
    hit = (rng.random((steps, replicas)) < probability[:, None] / 3) & (rng.random((steps, 1)) < 0.6)
    return {
        "kind": np.where(hit, rng.integers(1, 4, hit.shape), 0).astype(np.int32),
        "leaf": rng.integers(len(SIZES), size=hit.shape).astype(np.int32),
        "element": rng.integers(SIZES.max(), size=hit.shape).astype(np.int32),
        "x": rng.standard_normal(hit.shape).astype(np.float32),
    }


def inject(grads, fault):
    """Puts the fault into one element of one leaf."""
    leaves, treedef = jax.tree.flatten(grads)
    for i, leaf in enumerate(leaves):
        here = (jnp.arange(leaf.size) == fault["element"] % leaf.size) & (fault["leaf"] == i)
        bad = jnp.where(here, jnp.asarray(VALUES)[fault["kind"]], np.float32(0)).reshape(leaf.shape)
        leaves[i] = leaf + bad.astype(leaf.dtype)
    return jax.tree.unflatten(treedef, leaves)


def bits(tree):
    """A number that changes with almost any bit of a tree."""
    words = [jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) for x in jax.tree.leaves(tree)]
    return sum((jnp.sum(w * np.uint32(2 * i + 1)) for i, w in enumerate(words)), jnp.uint32(0))


def unchanged(new, old):
    same = [jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)]
    return jnp.stack(same).all()


def loss_fn(params, x):
    """Zero gradient at x: parameters follow the data, which stays near 0."""
    return sum(jnp.sum((leaf.astype(jnp.float16) - x.astype(jnp.float16)) ** 2) for leaf in jax.tree.leaves(params))


def train(tx, form, mean_over, start, faults):
    """Runs all steps in one scan; returns the end and what was seen after each step."""

    def step(carry, fault):
        params, state = carry
        _, grads = jmp.scaled_value_and_grad(loss_fn, loss_scale=state)(params, fault["x"])
        grads = inject(grads, fault)
        grads = jax.lax.pmean(grads, mean_over) if mean_over else grads
        new_params, new_state = form(tx)(params, state, grads)
        seen = {
            **jmp.metrics(new_state),
            "finite": jmp.all_finite((new_params, new_state.inner_state)),
            "frozen": unchanged((new_params, new_state.inner_state), (params, state.inner_state)),
            "bits": bits((new_params, new_state.inner_state)),
        }
        return (new_params, new_state), seen

    return jax.lax.scan(step, start, faults)


def optimizer(**settings):
    inner = standard(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.1, 0.01, STEPS))))
    return jmp.loss_scaled(inner, jmp.DynamicLossScale(2.0**8, period=PERIOD, **settings))


def run_on_replicas(kind, form, rng):
    """Trains on eight devices; what was seen gets a leading device axis."""
    injected = faults(rng, STEPS)
    tx = optimizer(max_loss_scale=2.0**10)
    if kind == "pmap":
        run = jax.pmap(functools.partial(train, tx, form, "batch"), "batch", in_axes=(None, 1))
        (params, state), seen = run((PARAMS, tx.init(PARAMS)), injected)
        return injected, jax.tree.map(lambda x: x[0], (params, state)), seen

    def per_device(start, injected):
        own = jax.tree.map(lambda x: x[:, 0], injected)
        end, seen = train(tx, form, "batch", start, own)
        return end, jax.tree.map(lambda x: jax.lax.pcast(x, "batch", to="varying")[None], seen)

    mapped = jax.shard_map(per_device, mesh=mesh(), in_specs=(P(), P(None, "batch")), out_specs=(P(), P("batch")))
    end, seen = jax.jit(mapped)((PARAMS, tx.init(PARAMS)), injected)
    return injected, end, seen


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), [("pmap", fused), ("shard_map", two_calls)], ids=["pmap", "shard_map"])
def test_ten_thousand_steps_with_faults_on_random_replicas(kind, form, rng):
    """Parameters are never non-finite, replicas never differ in a bit, skips freeze all, counters are right."""
    injected, (_, state), seen = run_on_replicas(kind, form, rng)
    seen = jax.tree.map(np.asarray, seen)
    for values in seen.values():
        np.testing.assert_array_equal(values, np.broadcast_to(values[:1], values.shape))
    seen = {name: values[0] for name, values in seen.items()}
    good = ~np.any(injected["kind"] > 0, axis=1)
    assert 500 < np.sum(~good) < 5000  # else this run proves little
    assert seen["finite"].all()
    np.testing.assert_array_equal(seen["last_finite"], good)
    np.testing.assert_array_equal(seen["frozen"], ~good)
    np.testing.assert_array_equal(seen["total_notfinite"], np.cumsum(~good))
    last_good = np.maximum.accumulate(np.where(good, np.arange(STEPS), -1))
    np.testing.assert_array_equal(seen["notfinite_count"], np.arange(STEPS) - last_good)
    scales = scaler_models.jmp(
        good.tolist(), (1.0, 2.0**10), loss_scale=2.0**8, period=PERIOD, factor=2, min_loss_scale=1.0
    )
    np.testing.assert_array_equal(seen["loss_scale"], [s["scale"] for s in scales][1:])
    assert {1.0, 2.0**10} <= set(seen["loss_scale"].tolist())
    assert set(np.ravel(optax.tree.get_all_with_path(state, "count")[0][1])) == {good.sum()}


def no_faults(steps, bad=()):
    kinds = np.zeros(steps, np.int32)
    kinds[list(bad)] = 1
    zeros = np.zeros(steps, np.int32)
    return {"kind": kinds, "leaf": zeros, "element": zeros, "x": np.zeros(steps, np.float32)}


@pytest.mark.covering(1)
@pytest.mark.parametrize("minimum", [1.0, 0.0])
@pytest.mark.parametrize("form", [fused, two_calls])
def test_recovery_after_three_hundred_bad_steps(minimum, form):
    """All steps bad for 300 in a row leave everything as it was; then training continues and the scale grows again."""
    tx = optimizer(min_loss_scale=minimum)
    (params, state), seen = jax.jit(functools.partial(train, tx, form, None))(
        (PARAMS, tx.init(PARAMS)), no_faults(400, range(300))
    )
    np.testing.assert_array_equal(seen["frozen"], np.arange(400) < 300)
    floor = max(minimum, 2.0**-126)
    np.testing.assert_array_equal(
        seen["loss_scale"][np.array([299, 319, 399])], np.float32(floor) * np.array([1, 2, 2**5])
    )
    assert seen["finite"].all()
    assert int(state.total_notfinite) == 300
    # At the lowest scale float16 gradients are zero; at 1 parameters have come closer to their minimum, 0.
    assert minimum == 0 or all(float(jnp.max(jnp.abs(p))) < 1 for p in jax.tree.leaves(params))


@pytest.mark.parametrize("form", [fused, two_calls])
def test_three_hundred_good_steps_from_the_top(form):
    """From the highest scale there is, growth is refused, overflows back off, and nothing becomes infinite."""
    tx = jmp.loss_scaled(standard(optax.adam(0.01)), jmp.DynamicLossScale(2.0**126, period=1, max_loss_scale=2.0**126))
    wide = {"w": jnp.full(3, 0.5)}
    run = jax.jit(functools.partial(train, tx, form, None))
    (params, state), seen = run((wide, tx.init(wide)), no_faults(300))
    assert seen["finite"].all()
    assert np.all((seen["loss_scale"] >= 1) & (seen["loss_scale"] <= 2.0**126))
    assert int(jnp.sum(seen["last_finite"])) > 80
    assert float(jnp.max(jnp.abs(params["w"]))) < 0.5
    assert bool(jmp.all_finite(state))
