"""Ranges as extra results: right through every construct, on every mesh, at no cost to the results."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.comparisons import assert_identical, slow_but_for

import jmp_lite as jmp
from jmp_lite.analysis import collect, ranges
from jmp_lite.analysis._evaluate import HANDLERS
from jmp_lite.autocast._programs import PROGRAMS


def product(x, w):
    with jax.named_scope("layer"):
        return jnp.tanh(x @ w)


@jax.custom_vjp
def ruled(x, w):
    return product(x, w)


ruled.defvjp(lambda x, w: (ruled(x, w), (x, w)), lambda kept, g: jax.vjp(product, *kept)[1](g))

CONSTRUCTS = {
    "plain": product,
    "jit": jax.jit(product),
    "checkpoint": jax.checkpoint(product),
    "custom_vjp": ruled,
    "custom_jvp": lambda x, w: jax.nn.relu(product(x, w)),
    "scan": lambda x, w: jax.lax.scan(lambda c, _: (product(c, w), c), x, None, length=3)[0],
    "scan over weights": lambda x, w: jax.lax.scan(lambda c, w: (product(c, w), c), x, jnp.stack([w, 2 * w]))[0],
    "while": lambda x, w: jax.lax.fori_loop(0, 3, lambda _, c: product(c, w), x),
    "cond": lambda x, w: jax.lax.cond(x[0, 0] > 0, product, lambda x, w: product(-x, w), x, w),
    "vmap": lambda x, w: jax.vmap(product, (0, None))(x[None], w)[0],
}


def made_by_products(x, w, construct):
    """What the matmuls of a construct make, computed one by one."""
    made = []
    c = x
    weights = [w, 2 * w] if construct == "scan over weights" else [w] * (3 if construct in ("scan", "while") else 1)
    for one in weights:
        c = c if construct != "cond" or x[0, 0] > 0 else -c
        made.append(c @ one)
        c = jnp.tanh(made[-1])
    return np.concatenate([np.ravel(m) for m in made])


def test_analyses_enter_all_that_holds_programs():
    assert PROGRAMS.keys() - {"run_state"} == HANDLERS.keys()  # a program on references returns nothing


@pytest.mark.parametrize("construct", slow_but_for(CONSTRUCTS.keys() - {"plain", "checkpoint", "scan"}, CONSTRUCTS))
def test_products_are_counted_in_every_construct(construct, rng):
    x, w = (jnp.asarray(rng.normal(size=(4, 4)).astype(np.float32)) for _ in range(2))
    fun = CONSTRUCTS[construct]
    result, found = collect(fun)(x, w)
    np.testing.assert_allclose(result, jax.jit(fun)(x, w), rtol=1e-5, atol=1e-6)
    made = made_by_products(x, w, construct)
    rows = [one for row, one in found.pairs if row.site and row.name == "out" and one.count]
    assert sum(one.count for one in rows) == made.size
    assert max(one.largest for one in rows) == pytest.approx(np.abs(made).max(), rel=1e-5)
    total = sum(one.rms**2 * one.count for one in rows)
    assert total == pytest.approx(np.sum(made.astype(np.float64) ** 2), rel=1e-5)


@pytest.mark.parametrize(
    "construct", slow_but_for(("checkpoint", "custom_vjp", "scan over weights", "cond", "vmap"), CONSTRUCTS)
)
def test_gradients_are_those_of_the_plain_function(construct, rng):
    x, w = (jnp.asarray(rng.normal(size=(4, 4)).astype(np.float32)) for _ in range(2))
    if construct == "while":
        pytest.skip("JAX differentiates no fori_loop of a bound that it takes for traced")
    grad = jax.grad(lambda w: jnp.sum(CONSTRUCTS[construct](x, w)))
    result, found = collect(grad)(w)
    np.testing.assert_allclose(result, jax.jit(grad)(w), rtol=1e-5, atol=1e-6)
    assert any(row.site and row.site.is_backward for row in found.rows)
    assert found["result"].largest == pytest.approx(float(jnp.abs(result).max()))


def sharded(mesh, *specs):
    return [NamedSharding(mesh, spec) for spec in specs]


@pytest.mark.parametrize("n", slow_but_for([8], [1, 2, 4, 8]))
@pytest.mark.parametrize(
    "way",
    slow_but_for(("jit", "shard_map of scan"), ["jit", "shard_map", "shard_map of scan", "unchecked shard_map"]),
)
def test_sharded_is_as_unsharded(n, way, rng):
    x, w = (jnp.asarray(rng.normal(size=(8, 8)).astype(np.float32)) for _ in range(2))
    mesh = jax.make_mesh((n,), ("i",), devices=jax.devices()[:n], axis_types=(jax.sharding.AxisType.Auto,))

    def body(x, w):
        if way == "shard_map of scan":
            x, _ = jax.lax.scan(lambda c, _: (product(c, w), None), x, None, length=2)
        return jax.lax.psum(jnp.sum(product(x, w)), "i") if way != "jit" else jnp.sum(product(x, w))

    def fun(x, w):
        if way == "jit":
            return body(x, w)
        is_checked = not way.startswith("unchecked")
        return jax.shard_map(body, mesh=mesh, in_specs=(P("i"), P()), out_specs=P(), check_vma=is_checked)(x, w)

    def whole(x, w):
        for _ in range(2 if way == "shard_map of scan" else 0):
            x = product(x, w)
        return jnp.sum(product(x, w))

    where = r".*(dot_general|psum\w*)"
    _, found = jax.jit(collect(fun, where=where))(*map(jax.device_put, (x, w), sharded(mesh, P("i"), P())))
    _, expected = jax.jit(collect(whole, where=where))(x, w)
    for role in ("lhs", "rhs", "out"):
        of_found = [one for row, one in found.pairs if row.site and row.name == role and "dot" in row.site.primitive]
        of_whole = [one for row, one in expected.pairs if row.site and row.name == role and "dot" in row.site.primitive]
        assert sum(one.count for one in of_found) == sum(one.count for one in of_whole)
        assert max(one.largest for one in of_found) == pytest.approx(max(one.largest for one in of_whole), rel=1e-5)


def test_pmap_adds_up_over_devices(rng):
    x = jnp.asarray(rng.normal(size=(8, 2, 4)).astype(np.float32))
    w = jnp.asarray(rng.normal(size=(4, 4)).astype(np.float32))
    inside, outside = (
        make(product)(x, w)[1]
        for make in (
            lambda fun: jax.pmap(collect(fun), in_axes=(0, None)),
            lambda fun: collect(jax.pmap(fun, in_axes=(0, None))),
        )
    )
    for found in (inside, outside):
        assert found["dot_general out"].count == 64
    assert outside["dot_general rhs"].count == 16  # copies on 8 devices
    for found in (inside, outside):
        assert found["dot_general out"].largest == pytest.approx(float(jnp.abs(x @ w).max()), rel=1e-5)


def test_a_scan_of_steps_is_added_up(rng):
    xs = jnp.asarray(rng.normal(size=(5, 2, 4)).astype(np.float32))
    w = jnp.asarray(rng.normal(size=(4, 4)).astype(np.float32))
    _, found = jax.jit(lambda: jax.lax.scan(lambda c, x: (c, collect(product)(x, w)[1]), 0, xs))()
    assert found["dot_general out"].count == 40
    _, each = jax.lax.scan(lambda c, x: (c, collect(product)(x, w)[1]), 0, xs[:1])
    several = sum(jax.tree.map(lambda leaf: leaf[0], each) for _ in range(3))
    assert several["dot_general out"].count == 24


AT_EVEN_STEPS = jax.jit(collect(lambda x, step: x @ x * step.astype(x.dtype), when=lambda x, step: step % 2 == 0))


@pytest.mark.parametrize("step", [0, 1, 4])
def test_when_says_at_which_steps(step):
    result, found = AT_EVEN_STEPS(jnp.eye(3), jnp.int32(step))
    assert_identical(result, jnp.eye(3) * jnp.float32(step))
    assert found["dot_general out"].count == found["argument 0"].count == (9 if step % 2 == 0 else 0)


@pytest.mark.parametrize(
    ("where", "primitives"),
    [
        (None, {"dot_general"}),
        ("tanh", {"tanh"}),
        ("layer", {"dot_general", "tanh"}),
        ("layer/tanh", {"tanh"}),
        (".*", {"dot_general", "tanh", "exp"}),
    ],
)
def test_where_chooses_equations(where, primitives):
    _, found = collect(lambda x: jnp.exp(product(x, x)), where=where)(jnp.eye(2))
    assert {row.site.primitive for row in found.rows if row.site} == primitives


def test_where_that_matches_nothing_is_said():
    with pytest.warns(jmp.errors.UnmatchedRuleWarning, match="where='laier' matches no equation"):
        collect(product, where="laier")(jnp.eye(2), jnp.eye(2))


def test_the_ranges_of_an_autocast_step_name_parameters_and_gradients():
    params = {"w": jnp.full((4, 4), 1e-6)}
    step = jax.value_and_grad(jmp.autocast(lambda p, x: jnp.mean(x @ p["w"]) * 1e-6, "mixed_float16"))
    _, found = jax.jit(collect(step))(params, jnp.ones((2, 4)))
    assert found["argument 0/w"].fates["float16"].subnormal == 1
    assert found["result 1/w"].fates["float16"].subnormal == 1
    assert "dot_general backward out" in list(found)


def test_what_runs_once_is_not_added_to_nothing(rng):
    """A sum of tallies rescales both by powers of two."""
    x, w = (jnp.asarray(rng.normal(size=(4, 4)).astype(np.float32)) for _ in range(2))
    once, often = (
        jax.jit(collect(CONSTRUCTS[name])).trace(x, w).lower().as_text().count("exponential")
        for name in ("plain", "scan")
    )
    assert once == 0 < often


def test_nothing_is_called_back_and_a_second_call_compiles_nothing(rng):
    fun = jax.jit(collect(product))
    x, w = (jnp.asarray(rng.normal(size=(4, 4)).astype(np.float32)) for _ in range(2))
    assert "callback" not in fun.lower(x, w).as_text()
    fun(x, w)
    assert fun._cache_size() == 1
    fun(w, x)
    assert fun._cache_size() == 1


@pytest.fixture(scope="module")
def ranges_of_a_product():
    _, found = collect(product)(jnp.eye(2), jnp.eye(2))
    return found


@pytest.mark.parametrize(
    ("change", "expectation"),
    [
        (lambda found: found["no such row"], pytest.raises(KeyError, match="No range of 'no such row'")),
        (
            lambda found: found + ranges({"a": jnp.ones(2)}),
            pytest.raises(ValueError, match="different programs"),
        ),
        (str, contextlib.nullcontext()),
        (lambda found: found.to_dict(), contextlib.nullcontext()),
        (lambda found: found.by_scope(), contextlib.nullcontext()),
    ],
)
def test_uses_of_ranges(change, expectation, ranges_of_a_product):
    with expectation:
        change(ranges_of_a_product)


def test_the_table_lists_what_a_format_treats_worst_first():
    found = ranges({"fine": jnp.ones(3), "large": jnp.full(3, 1e6), "nan": jnp.array([1.0, np.nan])}, "gradient")
    lines = found.table("float16").splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["nan", "large", "fine"]
    assert found.table("bfloat16").splitlines()[0] == "As bfloat16 would hold them:"


def test_modules_are_told_apart_by_scope():
    def model(x):
        for name in "ab":
            with jax.named_scope(name):
                x = product(x, x)
        return x

    _, found = collect(model)(jnp.eye(2))
    assert {"equation a", "equation b"} < set(found.by_scope())
    assert found.by_scope()["equation a"].count == 12
    assert "equation a/layer" in found.by_scope(2)


def test_leaves_that_are_no_floats_have_no_range():
    found = ranges({"i": jnp.arange(3), "key": jax.random.key(0), "c": jnp.ones(2, jnp.complex64), "x": jnp.ones(2)})
    assert list(found) == ["x"]


@pytest.mark.parametrize(
    ("when", "got"),
    [
        (lambda x: x > 0, r"bool\[3\]"),
        (lambda x: x.sum(), r"float32\[\]"),
        (lambda x: None, "None"),
        (lambda x: "always", "'always'"),
    ],
)
def test_when_returns_one_boolean(when, got):
    with pytest.raises(jmp.errors.InvalidAnalysisError, match=f"one boolean, such as .*, got {got}"):
        collect(jnp.sin, when=when)(jnp.ones(3))


def test_what_does_not_say_when_or_is_no_format_is_refused():
    with pytest.raises(jmp.errors.InvalidFunctionError, match="when= of collect takes a function, got True"):
        collect(jnp.sum, when=True)
    with pytest.raises(jmp.errors.UnknownDtypeError, match="Unknown format 'float15'"):
        jmp.analysis.ranges(jnp.ones(3)).table("float15")
    ranges = jmp.analysis.ranges(jnp.ones(3))
    assert ranges.table("f16") == ranges.table("float16")
