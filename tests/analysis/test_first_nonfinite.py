"""The first NaN or infinity that reaches a result is found, wherever it was made; those that reach none are not."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.comparisons import slow_but_for

import jmp_lite as jmp
from jmp_lite.analysis import first_nonfinite, replay

#: What breaks a number where a flag says so, and the primitive that makes the first NaN or infinity.
FAULTS = {
    "log of a negative": (lambda x, hit: jnp.log(jnp.where(hit, -1.0, 1.0) * (1 + x * x)), "log"),
    "overflow of exp": (lambda x, hit: jnp.exp(jnp.where(hit, 1000.0, 0.1) + 0.1 * jnp.sin(x)), "exp"),
    "division by zero": (lambda x, hit: x / jnp.where(hit, 0.0, 2.0), "div"),
    "root of a negative": (lambda x, hit: jnp.sqrt(jnp.where(hit, -1.0, 1.0) * (1 + x * x)), "sqrt"),
    "overflow of a product": (lambda x, hit: (2 + jnp.sin(x)) * jnp.where(hit, 3e38, 1.0) * 3.0, "mul"),
    "reciprocal root of zero": (lambda x, hit: jax.lax.rsqrt(jnp.where(hit, 0.0, 1.0) * (1 + x * x)), "rsqrt"),
}
DEPTH = 3


def layer(x, index, fault, hit):
    with jax.named_scope(f"layer_{index}"), jax.named_scope("fault"):
        return 0.5 * x + 0.1 * FAULTS[fault][0](x, hit)


def layers(x, step, at, fault):
    for index in range(DEPTH):
        x = layer(x, index, fault, (step == at[0]) & (index == at[1]))
    return x


@jax.custom_vjp
def ruled(x, scale):
    return x * scale


ruled.defvjp(lambda x, scale: (x * scale, scale), lambda scale, g: (g * scale, None))


def in_scan(x, at, fault):
    def body(x, step):
        x = layers(x, step, at, fault)
        return x, jnp.sum(x)

    x, sums = jax.lax.scan(body, x, jnp.arange(4))
    return jnp.sum(x) + jnp.sum(sums)


def in_while(x, at, fault):
    def body(step, x):
        return layers(x, step, at, fault)

    return jnp.sum(jax.lax.fori_loop(0, 4, body, x))


def in_cond(x, at, fault):
    for step in range(4):
        for index in range(DEPTH):
            hit = (step == at[0]) & (index == at[1])
            x = jax.lax.cond(hit, lambda x, i=index: layer(x, i, fault, True), lambda x: 0.9 * x, x)
    return jnp.sum(x)


def in_remat(x, at, fault):
    @jax.checkpoint
    def block(x, step):
        return layers(x, step, at, fault)

    for step in range(4):
        x = block(x, step)
    return jnp.sum(x)


def in_custom_vjp(x, at, fault):
    @jax.custom_vjp
    def block(x, step):
        return layers(x, step, at, fault)

    block.defvjp(lambda x, step: (block(x, step), None), lambda _, g: (g, None))
    for step in range(4):
        x = ruled(block(x, jnp.int32(step)), 0.5)
    return jnp.sum(x)


def in_jit(x, at, fault):
    @jax.jit
    def block(x, step):
        return layers(x, step, at, fault)

    return jnp.sum(block(block(block(block(x, 0), 1), 2), 3))


CONSTRUCTS = {f.__name__: f for f in (in_scan, in_while, in_cond, in_remat, in_custom_vjp, in_jit)}
WAYS = ["plain", "gradient", "jit", "sharded", "shard_map"]


def on_devices(fun, way):
    # With all eight, XLA on a busy CPU may keep one waiting for a thread while seven wait for it.
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    if way == "sharded":
        sharding = NamedSharding(mesh, P("data"))
        return lambda x: fun(jax.lax.with_sharding_constraint(x, sharding))

    def mapped(x):
        return jax.lax.psum(fun(x), "data")

    return jax.shard_map(mapped, mesh=mesh, in_specs=P("data"), out_specs=P())


def cases(count):
    """Draws what is broken, where, and how it is run, with one seed: each construct in each way at least once."""
    rng = np.random.default_rng(20261129)
    pairs = [
        (construct, way) for construct in CONSTRUCTS for way in WAYS if (construct, way) != ("in_while", "gradient")
    ]
    for number in range(count):
        construct, way = pairs[number % len(pairs)]
        at = (int(rng.integers(4)), int(rng.integers(DEPTH)))
        yield pytest.param(
            construct, way, str(rng.choice(list(FAULTS))), at, marks=[] if number % 11 == 0 else pytest.mark.slow
        )


@pytest.mark.parametrize(("construct", "way", "fault", "at"), [*cases(60)])
def test_injections_are_found(construct, way, fault, at, rng):
    x = jnp.asarray(rng.normal(size=(8, 3)).astype(np.float32))

    def fun(x):
        return CONSTRUCTS[construct](x, at, fault)

    run = {"plain": fun, "gradient": jax.value_and_grad(fun), "jit": jax.jit(fun)}.get(way) or on_devices(fun, way)
    found = first_nonfinite(run)(x)
    assert found.site.primitive == FAULTS[fault][1]
    assert f"layer_{at[1]}/fault" in found.site.scope
    assert "test_first_nonfinite.py" in found.site.source
    if construct in ("in_scan", "in_while") and way != "gradient":
        assert found.run == at[0]
    assert found.made.nan + found.made.inf > 0
    assert all(operand.is_finite for operand in found.operands if fault != "division by zero")


@pytest.mark.parametrize(
    ("fun", "x"),
    [
        (lambda x: jax.nn.softmax(jnp.where(x > 0, x, -jnp.inf)), [1.0, -1.0]),
        (lambda x: jnp.where(x > 0, jnp.log(x), 0.0), [1.0, 0.0]),
        (lambda x: jnp.minimum(jnp.exp(x), 1.0), [1000.0, 1.0]),
        (jnp.max, [1.0, 2.0]),
        (jax.nn.logsumexp, [1000.0, 2.0]),
        (lambda x: 1 / jnp.exp(x), [1000.0, 2.0]),
    ],
    ids=["masked softmax", "where", "clamp", "max", "logsumexp", "reciprocal of infinity"],
)
def test_what_reaches_no_result_is_none(fun, x):
    assert first_nonfinite(fun)(jnp.array(x)) is None


@pytest.mark.parametrize(
    ("fun", "primitive"),
    [
        (lambda x: jax.nn.softmax(jnp.where(x > 10, x, -jnp.inf)), "sub"),  # a row that is masked as a whole
        (lambda x: jnp.sum(jnp.where(x > 0, x, -jnp.inf) * 0), "mul"),
        (lambda x: jnp.where(x > 0, x, jnp.nan), "select_n"),
        (lambda x: jnp.log(x - 1) * 0 + jnp.log(x - 2), "log"),
    ],
    ids=["masked row", "infinity times zero", "written NaN", "first of two"],
)
def test_the_equation_to_blame(fun, primitive):
    found = first_nonfinite(fun)(jnp.array([1.0, -1.0]))
    assert found.site.primitive in (primitive, "broadcast_in_dim", "convert_element_type")


def test_a_gradient_that_breaks_alone():
    found = first_nonfinite(jax.grad(lambda x: jnp.sum(jnp.sqrt(x))))(jnp.array([0.0, 1.0]))
    assert found.site.primitive == "div"


def test_an_argument_that_was_not_finite():
    found = first_nonfinite(lambda p, x: {"y": p["w"] * x, "z": x})({"w": jnp.array([1.0, jnp.nan])}, jnp.ones(2))
    assert found.site is None
    assert found.argument == "0/w"
    assert found.results == ("y",)
    assert "Argument 0/w has a NaN already" in str(found)
    with pytest.raises(ValueError, match="no equation to save"):
        found.save("nowhere.npz")


def test_a_step_tells_its_loss_scale_and_the_device():
    scale = jmp.DynamicLossScale(jnp.float32(2.0**30))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(w, x, scale):
        def mapped(w, x):
            return jax.lax.pmean(jnp.sum(jnp.exp(w[None] * x)), "data")

        return jax.shard_map(mapped, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())(w, x)

    x = jnp.ones((8, 2)).at[5].set(100.0)
    found = first_nonfinite(step)(jnp.ones(2), x, scale)
    assert dict(found.device) == {"data": 5}
    assert found.loss_scales == {"0/2": 2.0**30}
    assert found.site.primitive == "exp"


def test_producers_lead_to_the_equation():
    found = first_nonfinite(lambda x: jnp.log(jnp.sin(x * 3) - 2))(jnp.ones(2))
    assert [site.primitive for site in found.producers] == ["sub", "sin", "mul"]


def test_inside_of_autocast():
    fun = jmp.autocast(lambda w, x: jnp.sum(jnp.exp(x @ w)), "mixed_float16")
    found = first_nonfinite(fun)(jnp.full((64, 4), 60.0), jnp.full((2, 64), 60.0))
    assert found.site.primitive == "exp"
    assert any(site.in_dtypes[:2] == ("float16", "float16") for site in found.producers)


@pytest.mark.parametrize("dtype", slow_but_for(("bfloat16",), ["float32", "float16", "bfloat16"]))
def test_a_bundle_replays_in_a_fresh_process(dtype, tmp_path):
    x = jnp.array([[1.0, 0.0], [-1.0, 2.0]], dtype)
    found = first_nonfinite(lambda x: jnp.sum(jnp.log(x) + 1))(x)
    path = tmp_path / "log.npz"
    found.save(path)
    here = replay(path)
    np.testing.assert_array_equal(here.operands[0].astype(np.float32), np.asarray(x, np.float32))
    code = f"from jmp_lite.analysis import replay; r = replay({str(path)!r}); print(r, r.results[0].dtype)"
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(jmp.__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert "log" in out
    assert dtype in out
    assert "nan" in out


def test_a_file_that_is_no_bundle(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"nothing")
    with pytest.raises(jmp.errors.CorruptArtifactError, match=r"holds no equation that NonFinite\.save wrote"):
        replay(path)
    with pytest.raises(FileNotFoundError):
        replay(tmp_path / "other.npz")


def test_a_finite_function_compiles_once_and_returns_none():
    assert first_nonfinite(jnp.sin)(jnp.ones(3)) is None


def test_complex_numbers_are_named():
    zeros = jnp.zeros(2, jnp.complex64)
    found = first_nonfinite(lambda z: 1 / z)(zeros)
    assert found.site.primitive == "div"
    assert found.made.count == 4
    assert first_nonfinite(lambda z: z + 1)(zeros / 0).argument == "0"


HOSTED = {
    "first_nonfinite": lambda w, x: jmp.analysis.first_nonfinite(jnp.matmul)(x, w),
    "compare": jmp.analysis.compare(lambda w, x: (x @ w).sum(), ["mixed_bfloat16"]),
    "perturb": jmp.analysis.perturb(lambda w, x: (x @ w).sum()),
    "recommend": lambda w, x: jmp.analysis.recommend(lambda w, x: (x @ w).sum(), w, [(x,), (x,)]),
    "Ranges": lambda w, x: jmp.analysis.diagnose(jmp.analysis.ranges(w)),
}


@pytest.mark.parametrize("name", HOSTED)
@pytest.mark.parametrize("transform", [jax.jit, jax.vmap], ids=["jit", "vmap"])
def test_what_reads_numbers_says_so_inside_a_transformation(name, transform):
    with pytest.raises(jmp.errors.InvalidAnalysisError, match=f"{name} reads numbers on the host"):
        transform(HOSTED[name])(jnp.ones((2, 4, 4)), jnp.ones((2, 4, 4)))
