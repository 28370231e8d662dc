"""What the tests of accumulated gradients share: a loss, its rows, and both ways to treat a bad microbatch."""

import jax
import jax.numpy as jnp
import pytest

POLICIES = ["skip_window", "skip_microbatch"]
both_policies = pytest.mark.parametrize("policy", POLICIES)
SCALE = 2.0**6


def linear(params, x):
    """A loss whose gradient is the mean of the rows, exact for one row."""
    return jnp.mean((x * params["w"].astype(x.dtype)[None]).sum(axis=1))


def rows_of(x, i, steps):
    """The rows of microbatch i."""
    return jax.tree.map(lambda leaf: leaf[i::steps], x)
