"""What sums of gradients travel in where the parameters themselves are 16 bits wide."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from support.comparisons import DEVICES, mesh
from support.jaxprs import equations

import jmp_lite as jmp
from jmp_lite.distributed import gather_params


@pytest.mark.covering(1)
@pytest.mark.parametrize(("reduce", "expected"), [("", "float32"), (",r=bf16", "bfloat16"), (",r=f32", "float32")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_narrow_parameters_are_added_up_in_float32(dtype, reduce, expected):
    """Unless ``reduce_dtype`` says otherwise; the gradient has the dtype of the parameter in any case."""
    policy = jmp.get_policy(f"p={dtype},c={dtype},o=float32{reduce}")

    def loss(w, x):
        return jnp.sum((gather_params({"w": w}, {"w": P("batch")}, policy)["w"][None] * x).astype(jnp.float32))

    specs = P("batch"), P("batch")
    grad = jax.shard_map(jax.grad(loss), mesh=mesh(), in_specs=specs, out_specs=P("batch"))
    arrays = jnp.ones(2 * DEVICES, dtype), jnp.ones((DEVICES, 2 * DEVICES), dtype)
    assert [eqn.invars[0].aval.dtype for eqn in equations("reduce_scatter", grad, *arrays)] == [expected]
    assert grad(*arrays).dtype == dtype
