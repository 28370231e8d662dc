"""What verdicts on gradients and updates look at, leaf by leaf."""

import jax.numpy as jnp
import numpy as np
import pytest

import jmp_lite as jmp
from jmp_lite.scaling import _verdict

# The dtype of each leaf and which elements are finite, and whether that looks finite without a pass over memory.
LEAVES = {
    "all elements of 16 bits": ([(jnp.bfloat16, [1, 1, 0])], False),
    "float32 beside a smaller leaf of 16 bits": ([(jnp.float16, [1]), (jnp.float32, [0, 0])], False),
    "float32 beside no elements": ([(jnp.float32, []), (jnp.float32, [0, 0])], False),
    "the smallest of float32 for all": ([(jnp.float32, [0, 0]), (jnp.float32, [1])], True),
    "a small leaf of float32": ([(jnp.float32, [0] * _verdict.SMALL_LEAF)], False),
    "a large leaf of float32": ([(jnp.float32, [0] * (_verdict.SMALL_LEAF + 1))], True),
}


@pytest.mark.parametrize(("leaves", "looks_finite"), LEAVES.values(), ids=LEAVES)
def test_what_is_looked_at_to_count_updates(leaves, looks_finite):
    seen = [(jnp.dtype(dtype), jnp.asarray(np.array(finite, bool))) for dtype, finite in leaves]
    assert bool(_verdict.watched(seen)) == looks_finite


def test_integers_have_no_say():
    """Nothing unscales them; multiplied as gradients are, these would be infinite."""
    grads = {"w": jnp.full(3, 2.0**-100), "n": jnp.full(3, 2**30)}
    assert _verdict.judge(grads, jmp.StaticLossScale(2.0**-100), None)
