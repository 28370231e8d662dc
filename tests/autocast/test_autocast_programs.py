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
    """Nothing in it is rounded, forward and backward; without the rule its matmuls are."""
    if primitive == "while":
        wrap = lambda fun: fun  # noqa: E731  JAX cannot differentiate it backward
    for rules, is_low in (([], True), ([jmp.Rule(None, primitive, "full")], False)):
        jaxpr = jax.make_jaxpr(wrap(jmp.autocast(fun, "mixed_bfloat16", rules=rules)))(X, W)
        assert ("bf16" in str(jaxpr)) is is_low


# What runs in float32 in one part of a program, and whose results a matmul takes.
IN_PART = {
    "scan, carry": ("scan", lambda x, w: lax.scan(lambda h, _: (jnp.exp(h), None), x @ w, None, length=2)[0]),
    "scan, second round": (
        "scan",
        lambda x, w: lax.scan(lambda c, _: ((c[1], jnp.exp(c[0])), None), (x @ w, x @ w), None, length=2)[0][0],
    ),
    "while": (
        "while",
        lambda x, w: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.exp(c[1])), (0, x @ w))[1],
    ),
    "cond, one branch": ("cond", lambda x, w: lax.cond(x[0, 0] > 0, jnp.exp, lambda h: h * 2, x @ w)),
    "cond, the other": ("cond", lambda x, w: lax.cond(x[0, 0] > 0, lambda h: h * 2, jnp.exp, x @ w)),
    "switch": ("cond", lambda x, w: lax.switch(0, [jnp.negative, jnp.exp, jnp.tanh], x @ w)),
}


@pytest.mark.parametrize(("primitive", "fun"), IN_PART.values(), ids=IN_PART)
def test_float32_in_one_part_of_a_program_decides_for_its_results(primitive, fun):
    """A carry is not rounded in each iteration, nor a branch because of the others."""
    equations = jax.make_jaxpr(jmp.autocast(lambda x, w: fun(x, w) @ w.T, "mixed_bfloat16"))(X, W).eqns
    [found] = [eqn for eqn in equations if eqn.primitive.name == primitive]
    assert {v.aval.dtype.name for v in found.outvars if v.aval.ndim} == {"float32"}
