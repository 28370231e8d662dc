"""Rules for primitives that hold programs: the program is what they are about."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas
from jax.sharding import PartitionSpec as P
from support import jaxprs

import jmp_lite as jmp

X, W = jax.ShapeDtypeStruct((64, 16), "float32"), jax.ShapeDtypeStruct((16, 16), "float32")


def multiply(refs):
    """Writes the matmul of two references into another."""
    result, x, w = refs
    result[...] = x[...] @ w[...]


PROGRAMS = {
    "scan": lambda x, w: lax.scan(lambda h, _: (h @ w, None), x, None, length=2)[0],
    "while": lambda x, w: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] @ w), (0, x))[1],
    "cond": lambda x, w: lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x @ w @ w, x),
    "jit": lambda x, w: jax.jit(lambda x: x @ w)(x),
    "remat2?|checkpoint": lambda x, w: jax.checkpoint(lambda x: x @ w)(x),
    "run_state": lambda x, w: pallas.run_state(multiply)((x, x, w))[0],
}


@pytest.mark.parametrize("wrap", [lambda fun: fun, lambda fun: jax.grad(lambda *args: jnp.sum(fun(*args)))])
@pytest.mark.parametrize(("primitive", "fun"), PROGRAMS.items(), ids=PROGRAMS)
def test_full_precision_covers_the_program(primitive, fun, wrap):
    """Nothing in it is rounded, forward and backward; without the rule its matmuls are."""
    if primitive in {"while", "run_state"}:
        wrap = lambda fun: fun  # noqa: E731  JAX cannot differentiate these backward
    products = [record.group for record in jmp.explain(fun, "mixed_bfloat16")(X, W) if record.flops]
    assert set(products) == {"low"}
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


# --- Over devices ---

MESH = jax.make_mesh((4, 2), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
MAPS = {
    "all axes": {"in_specs": (P("d"), P(None, "m")), "out_specs": P("d", "m")},
    "one axis": {"in_specs": (P("d"), P()), "out_specs": P("d"), "axis_names": {"d"}},
    "types unchecked": {"in_specs": (P("d"), P()), "out_specs": P("d"), "check_vma": False},
}


#: Programs whose results are not all computed in them: constants of other dtypes, and what goes in, as it is.
CONSTANT_RESULTS = {
    "while": lambda step, x: lax.while_loop(
        lambda c: c[1] < 2, lambda c: (step(c[0]), c[1] + 1, True, 3), (x, 0, False, 0)
    ),
    "fori_loop": lambda step, x: lax.fori_loop(0, 2, lambda i, c: (step(c[0]), 5, False), (x, 0, True)),
    "scan": lambda step, x: lax.scan(lambda c, _: ((step(c[0]), True, 7), 2.0), (x, False, 0), None, length=2),
    "cond": lambda step, x: lax.cond(x[0, 0] > 0, lambda: (step(x), True, 1), lambda: (x, False, 2)),
    "jit": lambda step, x: jax.jit(lambda x: (step(x), True, 1, 2.0))(x),
    "checkpoint": lambda step, x: jax.checkpoint(lambda x: (step(x), True, 1, x))(x),
}


@pytest.mark.parametrize("program", CONSTANT_RESULTS.values(), ids=CONSTANT_RESULTS)
def test_results_that_are_constants_keep_their_dtype(program):
    x = jnp.full((16, 16), 0.125)

    def fun(x):
        return program(lambda h: jnp.tanh(h @ h), x)

    plain, cast = jax.tree.leaves(jax.jit(fun)(x)), jax.tree.leaves(jmp.autocast(fun, "mixed_bfloat16")(x))
    assert [(leaf.dtype, leaf.shape) for leaf in cast] == [(leaf.dtype, leaf.shape) for leaf in plain]
    assert [bool(leaf) for leaf in cast[1:] if not leaf.ndim] == [bool(leaf) for leaf in plain[1:] if not leaf.ndim]


@pytest.mark.parametrize("settings", MAPS.values(), ids=MAPS)
def test_a_map_over_devices_is_rebuilt_as_it_was(settings):
    """With the same mesh, specifications, axes and checks; one matmul in it is in 16 bits."""
    fun = jax.shard_map(lambda x, w: jnp.tanh(x @ w), mesh=MESH, **settings)
    found, plain = (jax.make_jaxpr(run)(X, W).eqns for run in (jmp.autocast(fun, "mixed_bfloat16"), fun))
    [found], [plain] = ([eqn.params for eqn in eqns if eqn.primitive.name == "shard_map"] for eqns in (found, plain))
    same = plain.keys() - {"jaxpr"}
    assert found.keys() == plain.keys()
    assert {name: found[name] for name in same} == {name: plain[name] for name in same}
    assert "bf16" in str(found["jaxpr"])


def policy(compute, reduce):
    return jmp.Policy("float32", compute, "float32", reduce_dtype=reduce)


#: The dtypes that a weight travels in, there, and its gradient, back.
WIRES = {
    "float32 back": ("mixed_bfloat16", "bfloat16", "float32"),
    "16 bits back": (policy("bfloat16", "bfloat16"), "bfloat16", "bfloat16"),
    "other 16 bits back": (policy("float16", "bfloat16"), "float16", "bfloat16"),
    "float32": ("full", "float32", "float32"),
}


@pytest.mark.parametrize(("policy", "there", "back"), WIRES.values(), ids=WIRES)
def test_weights_are_gathered_in_16_bits_and_their_gradients_as_the_policy_says(policy, there, back):
    fun = lambda x, w: jnp.tanh(x @ lax.all_gather(w, "d", axis=0, tiled=True)).sum()  # noqa: E731
    grad = jax.shard_map(
        jax.grad(jmp.autocast(fun, policy), 1), mesh=MESH, in_specs=(P(), P("d")), out_specs=P("d"), check_vma=False
    )
    for name, expected in (("all_gather", there), ("reduce_scatter", back)):
        [eqn] = jaxprs.equations(name, grad, X, W)
        assert [v.aval.dtype for v in (*eqn.invars, *eqn.outvars)] == [expected] * 2


# --- What a scan keeps for the backward pass ---


def test_with_low_residuals_a_scan_keeps_no_float32_of_its_iterations():
    """Neither between the passes nor within the backward pass, which recomputes one iteration at a time."""

    def fun(weights, x):
        return jnp.sum(lax.scan(lambda x, w: (x + jax.nn.softmax(x @ w), None), x, weights)[0])

    weights, x, kept, made = jnp.ones((3, 64, 64)), jnp.ones((128, 64)), {}, {}
    for residuals in ("all", "low"):
        run = jmp.autocast(fun, "mixed_bfloat16", residuals=residuals)
        leaves = jax.tree.leaves(jax.eval_shape(lambda w, run=run: jax.vjp(lambda w: run(w, x), w)[1], weights))
        kept[residuals] = [leaf.dtype.name for leaf in leaves if leaf.shape == (3, 128, 64)]
        loops = jaxprs.equations("scan", jax.grad(run), weights, x)
        made[residuals] = {v.aval.dtype.name for eqn in loops for v in eqn.outvars if v.aval.shape == (3, 128, 64)}
    assert kept["low"].count("float32") == 0 < kept["all"].count("float32")
    assert "bfloat16" in kept["low"]
    assert made == {"all": {"bfloat16", "float32"}, "low": {"bfloat16"}}
