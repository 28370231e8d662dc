"""Where loss scaling ends: the largest gradients that are taken, gradients that overflow late, scales that are NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from support.comparisons import DEVICES, assert_identical, mesh, with_scale_forced

import jmp_lite as jmp

LARGEST = float(np.finfo(np.float32).max)


def alike(elements, share):
    """So many equal numbers whose squares add up to a share of the largest float32, just below."""
    return np.full(elements, np.nextafter(np.float32(np.sqrt(share * LARGEST / elements)), np.float32(0)))


def verdict(axis_name=None):
    """Whether gradients are taken that are not scaled."""
    tx = jmp.loss_scaled(optax.identity(), jmp.NoOpLossScale(), axis_name=axis_name)
    return lambda grads: tx.update(grads, tx.init(grads))[1].last_finite


shares = pytest.mark.parametrize(("share", "is_taken"), [(0.25, True), (0.49, True), (0.9, False), (1.0, False)])


@shares
@pytest.mark.parametrize("elements", [1, 2, 7, 106, 2999])
def test_half_of_the_largest_norm_is_taken_and_the_whole_is_not(elements, share, is_taken):
    """A sum of squares is rounded, and by some orders of summation up: at the whole norm it may be infinite."""
    assert bool(verdict()({"w": alike(elements, share)})) is is_taken


@shares
@pytest.mark.parametrize("mapped", ["pmap", "shard_map"])
def test_the_largest_norm_is_that_of_all_replicas(mapped, share, is_taken):
    """What replicas add up is larger than what any of them holds."""
    grads = alike(DEVICES * 4, share)
    if mapped == "pmap":
        taken = jax.pmap(verdict("batch"), "batch")(grads.reshape(DEVICES, 4)).all()
    else:
        taken = jax.jit(jax.shard_map(verdict("batch"), mesh=mesh(), in_specs=P("batch"), out_specs=P()))(grads)
    assert bool(taken) is is_taken


@pytest.mark.parametrize(("share", "tries"), [(0.1, 0), (0.5, 1)])
def test_a_retry_judges_unscaled_gradients(share, tries):
    """As the optimizer will: under a scale below 1 they are larger than those that backward computes."""
    scale = jmp.DynamicLossScale(2.0**-60, min_loss_scale=0.0)
    grad_fn = jmp.scaled_value_and_grad(lambda w, x: jnp.sum(w * x), loss_scale=scale, max_retries=1)
    _, grad, lowered = grad_fn(jnp.float32(1e-10), jnp.full(4, share * LARGEST, jnp.float32))
    assert np.isfinite(grad)
    assert float(lowered.loss_scale) == 2.0 ** (-60 - tries)


@pytest.mark.parametrize("lowest", [2.0**-3, 1.0, 2.0**5])
def test_a_scale_that_is_nan_recovers_at_the_lowest(lowest):
    """From the highest, every step until it has come down would be lost."""
    scale = with_scale_forced(jmp.DynamicLossScale(min_loss_scale=lowest), np.nan)
    assert float(scale.adjust(False).loss_scale) == lowest


@pytest.mark.parametrize("argnum", [0, 1, 2])
def test_arguments_are_counted_from_the_end_too(argnum):
    """As far back as to the first."""
    gradients = [
        jmp.scaled_value_and_grad(lambda x, y, z: x * y * z, i, loss_scale=jmp.StaticLossScale(4.0))(2.0, 3.0, 5.0)
        for i in (argnum, argnum - 3)
    ]
    assert_identical(*gradients)


def test_extra_arguments_pass_through_a_chain_around():
    """The fused form gives them to whatever holds `loss_scaled`."""
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    asking = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params = {"w": jnp.ones(2)}
    for tx in (jmp.loss_scaled(asking), optax.chain(jmp.loss_scaled(asking))):
        jmp.apply_gradients(tx, params, tx.init(params), params, value=1.0)
    assert seen == [{"value": 1.0}] * 2


@pytest.mark.parametrize("bad", [False, True], ids=["good", "bad"])
def test_updates_of_a_skipped_step_vary_over_the_devices_that_those_of_a_step_do(bad):
    """With the checks of `shard_map` on, both branches of a step have one type."""
    tx = jmp.loss_scaled(optax.sgd(1.0), jmp.NoOpLossScale(), axis_name="batch")

    def step(grads):
        return tx.update(grads, tx.init(grads))[0]

    run = jax.jit(jax.shard_map(step, mesh=mesh(), in_specs=P("batch"), out_specs=P("batch")))
    grads = np.ones(DEVICES, np.float32)
    grads[-1] = np.nan if bad else 1
    np.testing.assert_array_equal(run(grads), np.full(DEVICES, 0.0 if bad else -1.0))
