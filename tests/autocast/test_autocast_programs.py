"""Rules for primitives that hold programs: the program is what they are about."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jmp_lite as jmp

X, W = jax.ShapeDtypeStruct((64, 16), "float32"), jax.ShapeDtypeStruct((16, 16), "float32")

PROGRAMS = {
    "scan": lambda x, w: lax.scan(lambda h, _: (h @ w, None), x, None, length=2)[0],
    "while": lambda x, w: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] @ w), (0, x))[1],
    "cond": lambda x, w: lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x @ w @ w, x),
    "jit": lambda x, w: jax.jit(lambda x: x @ w)(x),
    "remat2?|checkpoint": lambda x, w: jax.checkpoint(lambda x: x @ w)(x),
}


@pytest.mark.parametrize("wrap", [lambda fun: fun, lambda fun: jax.grad(lambda *args: jnp.sum(fun(*args)))])
@pytest.mark.parametrize(("primitive", "fun"), PROGRAMS.items(), ids=PROGRAMS)
def test_full_precision_covers_the_program(primitive, fun, wrap):
    """Nothing in it is rounded, forward and backward; without the rule its products are."""
    if primitive == "while":
        wrap = lambda fun: fun  # noqa: E731  JAX cannot differentiate it backward
    for rules, is_low in (([], True), ([jmp.Rule(None, primitive, "full")], False)):
        jaxpr = jax.make_jaxpr(wrap(jmp.autocast(fun, "mixed_bfloat16", rules=rules)))(X, W)
        assert ("bf16" in str(jaxpr)) is is_low
