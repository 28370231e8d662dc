"""Laws that hold for every policy, loss scale, transformation and tree: one table of each, multiplied.

The main law: what is public does inside any transformation of JAX exactly what it does outside.
"""

import dataclasses
import functools

import flax.nnx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from support.comparisons import DEVICES, assert_close, assert_identical, mesh, slow_but_for, standard

import jmp_lite as jmp

# --- Trees: each a function of a NumPy generator ---


@flax.struct.dataclass
class Block:
    kernel: jax.Array
    steps: jax.Array
    name: str = flax.struct.field(pytree_node=False, default="block")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "rest"], meta_fields=["size"])
@dataclasses.dataclass
class Layer:
    w: jax.Array
    rest: object
    size: int = 3


def floats(rng, dtype="float32", *shape):
    return jnp.asarray(rng.uniform(0.5, 2, shape or (3,)), dtype)


def nnx_state(rng):
    model = flax.nnx.BatchNorm(3, rngs=flax.nnx.Rngs(int(rng.integers(100))))
    return jax.tree.map(lambda x: x + floats(rng), flax.nnx.state(model))


TREES = {
    "array": floats,
    "dict of dtypes": lambda rng: {d: floats(rng, d) for d in ("float16", "bfloat16", "float32", "float8_e4m3fn")},
    "integers, booleans and keys": lambda rng: {
        "n": jnp.int32(3),
        "on": jnp.array([True, False]),
        "key": jax.random.key(int(rng.integers(100))),
        "dense": {"w": floats(rng)},
    },
    "complex": lambda rng: [floats(rng, "complex64") * (1 + 1j), floats(rng)],
    "None and empty nodes": lambda rng: {"a": None, "b": (), "c": [{}, floats(rng)], "d": {"e": []}},
    "dataclasses": lambda rng: (Block(floats(rng), jnp.int32(1)), Layer(floats(rng, "bfloat16"), None)),
    "nnx state": nnx_state,
    "optax state": lambda rng: jmp.loss_scaled(standard(optax.adam(0.1))).init({"w": floats(rng)}),
    "numpy": lambda rng: {"w": np.ones(3, np.float32), "h": np.float16(2), "n": np.arange(3, dtype=np.int32)},
    "nothing": lambda rng: {},
}


@pytest.fixture
def forest(rng):
    """All trees as one: inside a transformation that is one compilation instead of ten."""
    return {name: make(rng) for name, make in TREES.items()}


# --- Transformations: each turns a function of trees into one that gives the same result another way ---


def first(tree):
    return jax.tree.map(lambda x: x[0], tree)


def repeated(times, tree):
    return jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * times), tree)


def in_vmap(f):
    run = jax.jit(lambda args: jax.vmap(lambda _, args: f(*args))(jnp.arange(2), args))
    return lambda *args: first(run(repeated(2, args)))


def in_scan(f):
    def run(*args):
        _, out = jax.lax.scan(lambda carry, _: (carry, f(*carry)), args, length=2)
        return first(out)

    return lambda *args: jax.jit(run)(*jax.tree.map(jnp.asarray, args))


def in_shard_map(f):
    run = jax.jit(jax.shard_map(f, mesh=mesh(), in_specs=P(), out_specs=P()))
    return lambda *args: run(*jax.tree.map(jnp.asarray, args))


def in_pmap(f):
    run = jax.pmap(lambda _, args: f(*args))
    return lambda *args: first(jax.device_get(run(jnp.arange(DEVICES), repeated(DEVICES, args))))  # indexing adds 0


TRANSFORMS = {
    "jit": jax.jit,
    "grad": lambda f: jax.jit(lambda *args: jax.vjp(f, *args)[0]),
    "vmap": in_vmap,
    "scan": in_scan,
    "remat": lambda f: jax.jit(jax.checkpoint(f)),
    "shard_map": in_shard_map,
    "pmap": in_pmap,
}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
most_transforms = pytest.mark.parametrize(
    "transform",
    slow_but_for([TRANSFORMS[name] for name in ("jit", "scan", "shard_map")], TRANSFORMS.values()),
    ids=TRANSFORMS,
)


# --- Policies and scales ---

POLICIES = [
    "mixed_float16",
    "mixed_bfloat16",
    "half",
    "p=bf16,c=f16,o=f32",
    jmp.PolicyMap({"dense": "f32", "c/1": "bf16"}, default="mixed_float16"),
]

SCALES = {
    "none": jmp.NoOpLossScale(),
    "static": jmp.StaticLossScale(2.0**10),
    "dynamic": jmp.DynamicLossScale(2.0**10, period=1),
    "megatron": jmp.DynamicLossScale.like("megatron", period=2, loss_scale=2.0**10),
    "deepspeed": jmp.DynamicLossScale.like("deepspeed", period=2, loss_scale=2.0**10),
}
every_scale = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)


# --- Casting ---


def casts(tree):
    """Everything that casts."""
    policies = [jmp.get_policy(p) for p in POLICIES]
    cast = [(p.cast_to_param(tree), p.cast_to_compute(tree), p.cast_to_output(tree)) for p in policies]
    return cast, jmp.cast_to_full(tree), jmp.cast_to_half(tree)


@every_transform
def test_casts_are_the_same_everywhere(transform, forest):
    """Every policy casts every tree inside every transformation as it does outside, bit for bit."""
    assert_identical(transform(casts)(forest), casts(forest))


def test_casts_keep_structure_and_repeat(forest):
    """Casts keep the structure and shapes, do nothing the second time, and leave alone what is not a standard float."""
    for policy in (jmp.get_policy(p) for p in POLICIES):
        for cast in (policy.cast_to_param, policy.cast_to_compute, policy.cast_to_output):
            once = cast(forest)
            assert jax.tree.structure(once) == jax.tree.structure(forest)
            assert all(a is b for a, b in zip(jax.tree.leaves(cast(once)), jax.tree.leaves(once), strict=True))
            for new, old in zip(jax.tree.leaves(once), jax.tree.leaves(forest), strict=True):
                standard_float = old.dtype in (jnp.float16, jnp.bfloat16, jnp.float32)
                assert new is old or standard_float
                assert new.shape == old.shape


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_gradient_through_a_cast_has_the_type_of_the_parameter(policy, forest):
    """Gradients through a cast have the dtypes of the parameters, float0 for what is not a float."""
    params = forest
    compute = jmp.get_policy(policy).cast_to_compute

    def loss(params):
        leaves = [x for x in jax.tree.leaves(compute(params)) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return sum((jnp.sum(jnp.real(x).astype(jnp.float32)) for x in leaves), jnp.float32(0))

    _, grads = jmp.scaled_value_and_grad(loss, loss_scale=jmp.DynamicLossScale(8.0))(params)
    for grad, param in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        inexact = jnp.issubdtype(param.dtype, jnp.inexact)
        assert (grad.dtype, grad.shape) == (param.dtype if inexact else jax.dtypes.float0, param.shape)
        assert not inexact or np.all(np.asarray(grad).astype(np.complex64) == 8)


@pytest.mark.covering(1)
@every_transform
@pytest.mark.parametrize("policy", ["mixed_float16", "bf16", "f32"])
def test_with_policy_is_the_same_everywhere(transform, policy, rng):
    """A function wrapped in a policy gives the same output, of the output dtype, inside every transformation."""
    run = jmp.with_policy(lambda params, x: x * params["w"] + params["b"], policy)
    params, x = {"w": jnp.float32(2), "b": floats(rng)}, jnp.arange(3, dtype=jnp.float32)
    out = transform(run)(params, x)
    assert out.dtype == jmp.get_policy(policy).output_dtype
    # A matmul and a sum, each rounded in the compute dtype, or once if fused.
    compute = jnp.finfo(jmp.get_policy(policy).compute_dtype).eps / jnp.finfo(out.dtype).eps
    assert_close(out, run(params, x), ulps=2 * float(compute))


# --- Loss scales ---


def scaled(scale, tree):
    """Everything that a loss scale does."""
    return scale.scale(tree), scale.unscale(tree), scale.adjust(True), scale.adjust(False).adjust(False).adjust(True)


@most_transforms
def test_scales_are_the_same_everywhere(transform, forest):
    """Every loss scale scales, unscales and adjusts inside every transformation as it does outside, bit for bit."""
    everything = lambda scales, tree: [scaled(scale, tree) for scale in scales]  # noqa: E731
    scales = list(SCALES.values())
    assert_identical(transform(everything)(scales, forest), everything(scales, forest))


@every_scale
def test_unscaling_undoes_scaling(scale, forest):
    """For powers of two, unscale after scale restores every value exactly, in float32 or wider."""
    back = scale.unscale(scale.scale(forest))
    assert jax.tree.structure(back) == jax.tree.structure(forest)
    for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(forest), strict=True):
        if jnp.issubdtype(old.dtype, jnp.inexact):
            np.testing.assert_array_equal(np.asarray(new).astype(np.complex128), np.asarray(old).astype(np.complex128))
        else:
            assert new is old


# --- Checking and selecting ---


@every_transform
def test_check_and_select_are_the_same_everywhere(transform, forest):
    """all_finite and select_tree give inside every transformation what they give outside."""
    other = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.zeros_like(x), forest)

    def chosen(good, a, b):
        return jmp.all_finite(a), jmp.select_tree(good, a, b), jmp.select_tree(jmp.all_finite(b), b, a)

    run = transform(chosen)
    for good, expected in ((True, forest), (False, other)):
        finite, by_flag, by_check = run(jnp.array(good), forest, other)
        assert bool(finite)
        assert_identical(by_flag, expected)
        assert_identical(by_check, other)


# --- Gradients and steps ---


def loss_fn(params, x):
    """Products and sums of small whole numbers: no roundings in any dtype."""
    return jnp.sum(params["w"] * x) * params["n"].astype(jnp.float32) + jnp.sum(params["half"]).astype(jnp.float32)


def whole_parameters(rng):
    whole = lambda *shape: jnp.asarray(rng.integers(1, 8, shape), jnp.float32)  # noqa: E731
    return {"w": whole(3), "n": jnp.int32(2), "half": whole(2).astype(jnp.float16), "none": None}, whole(3)


def value_and_float_grads(scale, params, x):
    """The loss and the gradients that are floats (float0 cannot leave a transformation)."""
    loss, grads = jmp.scaled_value_and_grad(loss_fn, loss_scale=scale)(params, x)
    return loss, {"w": grads["w"], "half": grads["half"]}


@every_transform
def test_gradients_are_the_same_everywhere(transform, rng):
    """Under every scale and transformation the loss is true and the gradients are scaled, exactly."""
    scales = list(SCALES.values())
    params, x = whole_parameters(rng)
    found = transform(lambda *args: [value_and_float_grads(scale, *args) for scale in scales])(params, x)
    true, true_grads = jax.value_and_grad(lambda p: loss_fn({**params, **p}, x))({k: params[k] for k in ("w", "half")})
    for (loss, grads), scale in zip(found, scales, strict=True):
        assert_identical(loss, true)
        assert_identical(jax.tree.map(lambda g, s=scale: g / jnp.asarray(s.loss_scale, g.dtype), grads), true_grads)


def steps(scales, params, grads, bad):
    """A good and a bad step in both forms, for every scale."""
    results = []
    for scale in scales:
        tx = jmp.loss_scaled(standard(optax.sgd(0.1, momentum=0.9)), scale)
        after, state = jmp.apply_gradients(tx, scale.scale(grads), tx.init(params), params)
        skipped, state = jmp.apply_gradients(tx, bad, state, after)
        updates, last = tx.update(bad, state, skipped)
        results.append((after, skipped, updates, last))
    return results


@pytest.mark.filterwarnings("ignore:Parameters of 16 bits")
@most_transforms
def test_steps_are_the_same_everywhere(transform, rng):
    """Under every scale and transformation a good step moves, a bad step freezes, and all states are those outside."""
    params = {"w": floats(rng), "half": floats(rng, "bfloat16")}
    grads = {"w": floats(rng), "half": floats(rng, "bfloat16")}
    bad = {**grads, "w": grads["w"].at[1].set(rng.choice([np.nan, np.inf]))}
    scales = [SCALES[name] for name in ("none", "static", "deepspeed")]
    found, expected = transform(steps)(scales, params, grads, bad), steps(scales, params, grads, bad)
    # Two matmuls and two sums, each rounded by half an ulp, or not if fused.
    assert_close(found, expected, ulps=4 / 2)
    for after, skipped, updates, state in found:
        assert_identical(skipped, after)
        assert_identical(updates, jax.tree.map(lambda x: -jnp.zeros_like(x), updates))
        assert [int(x) for x in state[2:5]] == [0, 2, 2]
