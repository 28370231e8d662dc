"""Laws of every mode: what many devices compute is what one computes, and all of them skip the same steps."""

import jax
import numpy as np
import optax
import pytest
from support.comparisons import assert_close, slow_but_for
from support.spread import MODES, ROWS, Training, batch, parameters, scaled

modes = pytest.mark.parametrize("mode", MODES, ids=str)
STEPS = 6


def run(mode, policy, rng, params, *, devices, inner=optax.sgd, faults=()):
    """Trains; returns losses, whether each step was taken with the scale behind it, and the final state."""
    training = Training(mode, policy, scaled(inner), params, devices=devices)
    losses, verdicts = [], []
    for step in range(STEPS):
        x, y = batch(rng)
        if step in faults:
            y = y.at[faults[step]].set(np.inf)
        losses.append(training(x, y))
        opt_state = training.whole[1]
        verdicts.append((bool(opt_state.last_finite), float(opt_state.loss_scale.loss_scale)))
    return losses, verdicts, training.whole


@pytest.mark.parametrize(
    "mode",
    slow_but_for([mode for mode in MODES if mode.form == "jit"], MODES),
    ids=str,
)
def test_eight_devices_are_one_device_in_float32(mode, seed):
    """Parameters and losses agree to the rounding of sums that are added up in another order.

    A sum of n terms is off by at most n eps times the sum of their magnitudes; gradients here are sums of 32 rows, and
    six steps of them, at a learning rate of 0.1, move parameters by less than their own size.
    """
    params = parameters(np.random.default_rng(seed))
    runs = [run(mode, "float32", np.random.default_rng(seed), params, devices=n) for n in (1, 8)]
    (losses, verdicts, state), (other_losses, other_verdicts, other_state) = runs
    assert_close(state[0], other_state[0], ulps=ROWS * STEPS)
    np.testing.assert_allclose(other_losses, losses, rtol=ROWS * STEPS * 2.0**-23)
    assert verdicts == other_verdicts


@pytest.mark.parametrize("mode", slow_but_for(tuple(MODES)[::4], MODES), ids=str)
def test_every_mode_skips_the_same_steps_in_float16(mode, seed):
    """An infinity in the rows of one device skips the step on all: the sequence of one device, and of plain jit."""
    rng = np.random.default_rng(seed)
    params = parameters(rng)
    chosen = rng.choice(STEPS, 3, replace=False)
    faults = {int(step): (int(rng.integers(ROWS)), int(rng.integers(16))) for step in chosen}
    runs = [
        run(m, "mixed_float16", np.random.default_rng(seed), params, devices=n, faults=faults)
        for m, n in ((MODES[0], 1), (mode, 8))
    ]
    (_, expected, state), (losses, verdicts, other_state) = runs
    assert verdicts == expected
    assert [not finite for finite, _ in verdicts] == [step in faults for step in range(STEPS)]
    assert [not np.isfinite(loss) for loss in losses] == [step in faults for step in range(STEPS)]
    # Matmuls of float16 operands: each is off by half an ulp, and so are weights and activations.
    difference = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), state[0], other_state[0])
    assert max(jax.tree.leaves(difference)) < STEPS * 2.0**-10
