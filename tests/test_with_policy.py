"""Functions under a policy: the dtype of every matmul, result and gradient, under every transform."""
# ruff: noqa: SIM300 - the expected value comes first

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import strategies
from support.comparisons import slow_but_for
from support.jaxprs import contractions

import jmp_lite as jmp


def dtypes_of_products(function, *args):
    """The dtypes of the operands of all matmuls of a function."""
    products = contractions(function, *args)
    assert products
    return set().union(*(dtypes for _, dtypes in products))


def model(params, x, *, scale=None):
    """A two-layer network with a bias, a count and a key among its parameters."""
    hidden = jnp.tanh(jnp.dot(x, params["w1"]) + params["b"][None, :])
    hidden = hidden if scale is None else hidden * scale
    return {"y": jnp.dot(hidden, params["w2"]), "count": params["count"], "name": None}


def parameters(rng, dtype=np.float32):
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    extra = {"count": jnp.int32(3), "key": jax.random.key(0)}
    return {"w1": draw(4, 8), "b": draw(8), "w2": draw(8, 2), **extra}


def mesh_of_eight():
    return jax.sharding.Mesh(np.array(jax.devices()), ("x",))


def gradients(apply):
    def value(weights, rest, x):
        return jnp.sum(apply({**rest, **weights}, x)["y"])

    def split(params, x):
        weights = {name: params[name] for name in ("w1", "b", "w2")}
        return jax.grad(value)(weights, params, x)

    return split


def scanned(apply):
    return lambda params, x: jax.lax.scan(lambda c, row: (c, apply(params, row[None])["y"][0]), None, x)[1]


def branched(apply):
    taken = lambda params, x: apply(params, x)["y"]  # noqa: E731
    return lambda params, x: jax.lax.cond(jnp.sum(x) > -1e9, taken, lambda p, x: taken(p, x * 2), params, x)


def vmapped(apply):
    return jax.vmap(lambda params, row: apply(params, row[None])["y"][0], in_axes=(None, 0))


def pmapped(apply):
    return jax.pmap(lambda params, row: apply(params, row[None])["y"][0], in_axes=(None, 0))


def sharded(apply):
    function = lambda params, x: apply(params, x)["y"]  # noqa: E731
    return jax.shard_map(function, mesh=mesh_of_eight(), in_specs=(P(), P("x")), out_specs=P("x"))


TRANSFORMS = {
    "eager": lambda apply: lambda params, x: apply(params, x)["y"],
    "jit": lambda apply: jax.jit(lambda params, x: apply(params, x)["y"]),
    "remat": lambda apply: jax.checkpoint(lambda params, x: apply(params, x)["y"]),
    "vmap": vmapped,
    "scan": scanned,
    "cond": branched,
    "pmap": pmapped,
    "shard_map": sharded,
    "grad": gradients,
    "jit_grad_scan": lambda apply: jax.jit(gradients(lambda p, x: {"y": scanned(apply)(p, x)})),
    "grad_vmap": lambda apply: gradients(lambda p, x: {"y": vmapped(apply)(p, x)}),
}
TRAINING = ["mixed_float16", "mixed_bfloat16", "float32", "bf16", "p=bf16,c=f32,o=f16", "p=f16,c=bf16,o=f32"]


@pytest.mark.parametrize("spec", TRAINING)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_products_run_in_the_compute_dtype(transform, spec, rng):
    """All matmuls run in the compute dtype, results have the output dtype, gradients that of the parameters."""
    policy = jmp.get_policy(spec)
    params = parameters(rng, policy.param_dtype)
    x = jnp.asarray(rng.standard_normal((8, 4)), np.float32)
    function = TRANSFORMS[transform](jmp.with_policy(model, policy))
    assert {policy.compute_dtype.name} == dtypes_of_products(function, params, x)
    result = jax.eval_shape(function, params, x)
    expected = policy.param_dtype if "grad" in transform else policy.output_dtype
    assert {expected} == {leaf.dtype for leaf in jax.tree.leaves(result)}


@pytest.mark.parametrize("transform", slow_but_for(("eager", "scan", "cond", "shard_map", "jit_grad_scan"), TRANSFORMS))
def test_values_are_those_of_a_cast_by_hand(transform, rng):
    """The wrapped function computes what the user's own casts compute, under every transform."""
    params, x = parameters(rng), jnp.asarray(rng.standard_normal((8, 4)), np.float32)

    def by_hand(params, x):
        low = {name: leaf.astype(jnp.bfloat16) for name, leaf in params.items() if name in ("w1", "b", "w2")}
        out = model({**params, **low}, x.astype(jnp.bfloat16))
        return {**out, "y": out["y"].astype(np.float32)}

    results = [TRANSFORMS[transform](apply)(params, x) for apply in (by_hand, jmp.with_policy(model, "mixed_bfloat16"))]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_wrapped_function_keeps_keywords_structure_and_name(rng):
    """Keyword arguments are cast too; integers, keys and ``None`` come through; the name stays."""
    apply = jmp.with_policy(model, "mixed_float16")
    params, x = parameters(rng), jnp.ones((2, 4))
    result = apply(params, x, scale=jnp.float32(2))
    assert (np.float32, np.int32, None) == (result["y"].dtype, result["count"].dtype, result["name"])
    assert {"float16"} == dtypes_of_products(functools.partial(apply, scale=jnp.float32(2)), params, x)
    assert ("model", model.__doc__) == (apply.__name__, apply.__doc__)


@pytest.mark.parametrize(
    "function", [functools.partial(jnp.dot, precision="default"), operator.matmul, jax.jit(jnp.dot)]
)
def test_any_callable_can_be_wrapped(function):
    """Partial, builtin and jitted functions have no name to keep and work all the same."""
    apply = jmp.with_policy(function, "mixed_bfloat16")
    assert {"bfloat16"} == dtypes_of_products(apply, jnp.ones((8, 8)), jnp.ones((8, 8)))


def test_methods_can_be_wrapped():
    """A policy wraps a bound method, and in a class body a method."""

    class Model:
        def dot(self, x):
            return jnp.dot(x, x)

        low = jmp.with_policy(dot, "mixed_bfloat16")

    for function in (jmp.with_policy(Model().dot, "mixed_bfloat16"), Model().low):
        assert {"bfloat16"} == dtypes_of_products(function, jnp.ones((8, 8)))
        assert np.float32 == function(jnp.ones((8, 8))).dtype


def test_text_is_parsed_when_the_function_is_wrapped():
    """A wrong policy is reported where it is written, not at the first call."""
    with pytest.raises(jmp.errors.UnknownDtypeError, match=r"^Unknown dtype 'bf61' in policy 'bf61'\."):
        jmp.with_policy(model, "bf61")


def test_wrapping_costs_one_trace():
    """The wrapper is traced once for any number of calls with the same types, Python numbers included."""
    traces = []

    def function(params, x, rate):
        traces.append(1)
        return params["w"] * x * rate

    step = jax.jit(jmp.with_policy(function, "mixed_float16"))
    for i in range(5):
        step({"w": jnp.full(2, float(i))}, jnp.ones(2), 0.5 * i)
    assert 1 == len(traces)


def test_no_tracer_is_kept(rng):
    """Wrapping, tracing and using a policy inside and outside of ``jit`` leaks no tracer."""
    with jax.checking_leaks():
        apply = jmp.with_policy(model, "mixed_float16")
        params, x = parameters(rng), jnp.ones((2, 4))
        inside = jax.jit(lambda p, x: apply(p, x)["y"])(params, x)
        np.testing.assert_allclose(apply(params, x)["y"], inside, rtol=1e-2, atol=1e-2)
        assert jax.jit(lambda p: jmp.all_finite(jmp.get_policy("c=f16").cast_to_compute(p)))(params)


# --- Defects of mpx ---------------------------------------------------------------------------------------------------


def test_mpx_half_dtype_given_as_text():
    """Defect 2 of mpx: a half format given as text takes effect."""
    for name in ("float16", "bfloat16"):
        policy = jmp.Policy("float32", name, "float32")
        assert name == policy.cast_to_compute(jnp.ones(2)).dtype == jmp.get_policy(f"mixed_{name}").compute_dtype
        assert {name} == dtypes_of_products(jmp.with_policy(jnp.dot, policy), jnp.ones((8, 8)), jnp.ones((8, 8)))


def test_mpx_no_stale_global_half_dtype(monkeypatch):
    """Defect 2 of mpx: no global holds a half format that a later setting would leave stale."""
    cpu = jmp.half_dtype()
    monkeypatch.setattr(jax, "local_devices", lambda: [type("Device", (), {"platform": "tpu"})])
    assert ("float16", "bfloat16") == (cpu, jmp.half_dtype())
    assert "bfloat16" == jmp.parse_dtype("half") == jmp.get_policy("half").compute_dtype


@pytest.mark.parametrize("container", [lambda x: {"y": x}, lambda x: [x, x], lambda x: strategies.Pair(x, (x, None))])
def test_mpx_results_in_containers_are_cast(container):
    """Defect 4 of mpx: results inside dicts, lists and tuples reach the output dtype."""
    result = jmp.with_policy(lambda x: container(x + x), "mixed_bfloat16")(jnp.ones(2))
    assert {np.dtype("float32")} == {leaf.dtype for leaf in jax.tree.leaves(result)}


def test_mpx_full_precision_inside_a_bfloat16_model():
    """Defect 4 of mpx: a float32 island in a bfloat16 model gives bfloat16 back, not float16."""
    island = jmp.with_policy(jnp.exp, "p=bf16,c=f32,o=bf16")
    outer = jmp.with_policy(lambda x: island(x * x), "bf16")
    jaxpr = jax.make_jaxpr(outer)(jnp.ones(2, jnp.bfloat16))
    dtypes = {eqn.primitive.name: eqn.outvars[0].aval.dtype.name for eqn in jaxpr.eqns}
    assert ("bfloat16", "float32") == (dtypes["mul"], dtypes["exp"])
    assert "bfloat16" == jaxpr.out_avals[0].dtype


def test_mpx_float64_is_cast_where_the_policy_names_it():
    """Defect 4 of mpx: a policy with float64 casts from it and to it."""
    with jax.enable_x64(True):
        x = jnp.ones((8, 8), jnp.float64)
        apply = jmp.with_policy(jnp.dot, "p=f64,c=f32,o=f64")
        assert {"float32"} == dtypes_of_products(apply, x, x)
        assert np.float64 == apply(x, x).dtype
