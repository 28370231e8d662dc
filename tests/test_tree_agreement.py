"""Verdicts that vary over some axes of a mesh and are agreed upon over all of them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from support.comparisons import slow_but_for

import jmp_lite as jmp

MESH = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize("axis_name", slow_but_for([("a", "b")], [("a", "b"), ("b", "a")]), ids=str)
@pytest.mark.parametrize("spec", slow_but_for([P("a"), P("b")], [P(), P("a"), P("b"), P(("a", "b"))]), ids=str)
def test_a_verdict_that_varies_over_some_axes_may_be_agreed_upon_over_all(spec, axis_name):
    """With the checks of `shard_map` on, too."""
    agreed = jax.shard_map(
        lambda x: jmp.all_finite({"x": x}, axis_name=axis_name), mesh=MESH, in_specs=spec, out_specs=P()
    )
    assert bool(agreed(jnp.ones(8)))
    assert not agreed(jnp.ones(8).at[5].set(jnp.nan))
