"""What the tests of pruning share: parameters, an optimizer, and the masks that are expected."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmp_lite as jmp
from jmp_lite.optim import prune
from support.comparisons import two_calls


def fused(tx):
    """A step of ``apply_gradients``, on the state of the transformation without a loss scale around it."""
    scaled = jmp.loss_scaled(tx, jmp.NoOpLossScale())

    def step(params, state, grads):
        around = scaled.init(params)._replace(inner_state=state)
        params, around = jmp.apply_gradients(scaled, grads, around, params)
        return params, around.inner_state

    return step


forms = pytest.mark.parametrize("form", [fused, two_calls])


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


def weights(rng, dtype=jnp.float32):
    return {"w": jnp.asarray(rng.standard_normal((8, 4)), dtype), "v": jnp.asarray(rng.standard_normal((4, 6)), dtype)}


def pruned_sgd(**settings):
    return optax.chain(optax.sgd(0.1), prune(**{"sparsity": 0.5, "where": everywhere, **settings}))
