"""Scales that are fixed: by data, wherever a matmul stands, or by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from support.comparisons import assert_identical, slow_but_for
from support.lowbit import BOUNDS, MATMUL, amax, normal, relative

import jmp_lite as jmp
from jmp_lite import quant


def applied(fun, policy="full"):
    """Makes the function of a recipe that ``calibrate`` wants."""
    return lambda dot: jmp.autocast(fun, policy, dot=dot)


def magnitudes(recipe):
    """Sites and the magnitudes that are fixed there."""
    specs = {scope: (site.lhs, site.rhs, site.grad) for scope, site in recipe.sites}
    return {scope: [spec and spec.amax for spec in three] for scope, three in specs.items()}


def test_scales_are_those_of_all_data(rng):
    """Later inputs saturate, each row is quantized like any other, and what is not finite is seen."""
    w = normal(rng, 16, 8)
    batches = [(w, normal(rng, 4, 16) * scale) for scale in (1, 3, 2)]
    make = applied(lambda w, x: x @ w)
    recipe = quant.calibrate(make, "w8a8_static", batches)
    largest = max(amax(x) for _, x in batches)
    assert magnitudes(recipe) == {"": [largest, None, None]}
    run = jax.jit(make(recipe))
    for _, x in batches:
        assert relative(run(w, x), x @ w) < 0.015 * largest / amax(x) * 2
        np.testing.assert_array_equal(run(w, x)[:1], run(w, x[:1]))
    clipped = jnp.clip(100 * batches[0][1], -largest, largest)
    assert relative(run(w, 100 * batches[0][1]), clipped @ w) < 0.015
    bad = run(w, batches[0][1].at[1, 2].set(np.inf))
    assert not np.any(np.isfinite(bad[1]))


def in_while(w, x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x))[1]


def in_scan(w, x):
    return lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=3)[0]


def in_cond(w, x):
    return in_scan(w, lax.cond(x[0, 0] > x[0, 0] + 1, lambda: x @ w, lambda: x))


CALIBRATED = {
    "while": in_while,
    "scan": in_scan,
    "jit": jax.jit(in_scan),
    "checkpoint": jax.checkpoint(in_scan),
    "cond": in_cond,
    "vmap": lambda w, x: jax.vmap(lambda row: in_scan(w, row))(x),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("case", slow_but_for(("scan", "cond"), CALIBRATED))
def test_the_largest_of_all_iterations_counts(case, compiles, rng):
    """Not their sum, which would leave an int8 matmul a fraction of its numbers."""
    w, x = normal(rng, 16, 16) / 4, normal(rng, 4, 16)
    seen = [x]
    for _ in range(2):
        seen.append(jnp.tanh(seen[-1] @ w))
    plain = applied(CALIBRATED[case])
    make = (lambda dot: jax.jit(plain(dot))) if compiles else plain
    recipe = quant.calibrate(make, quant.W8A8_STATIC, [(w, x / 2), (w, x)])
    [[found, *_]] = magnitudes(recipe).values()
    np.testing.assert_allclose(found, max(map(amax, seen)), rtol=0.1)
    assert relative(make(recipe)(w, x), CALIBRATED[case](w, x)) < 0.1


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="head")(nn.relu(nn.Dense(32, name="body")(x)))


def test_every_layer_has_scales_of_its_own(rng):
    """And without data of their own the gradients keep current scaling."""
    x = normal(rng, 16, 32)
    params = MLP().init(jax.random.key(0), x)
    recipe = quant.calibrate(applied(MLP().apply, "mixed_bfloat16"), "fp8", [(params, x)])
    body, head = params["params"]["body"], params["params"]["head"]
    hidden = nn.relu(x @ body["kernel"])
    found = magnitudes(recipe)
    assert list(found) == ["MLP/body", "MLP/head"]
    expected = [[amax(x), amax(body["kernel"])], [amax(hidden), amax(head["kernel"])]]
    np.testing.assert_allclose([sides[:2] for sides in found.values()], expected, rtol=BOUNDS["fp8"])
    assert [grad for *_, grad in found.values()] == [None, None]


def test_a_calibrated_recipe_is_a_value_and_its_fields_are_those_of_its_sites(rng):
    """Its text reads back, and tells one calibration from another; `replace` reaches every site."""
    x = normal(rng, 16, 32)
    params = MLP().init(jax.random.key(0), x)
    small, large = (quant.calibrate(applied(MLP().apply, "mixed_bfloat16"), "fp8", [(params, by * x)]) for by in (1, 9))
    assert str(small) != str(large)
    for recipe in (small, large, small.replace(products="all", axis_name="data")):
        assert quant.get_recipe(str(recipe)) == recipe
    changed = small.replace(products="all", grad=None)
    assert {(own.products, own.grad) for own in (changed, *dict(changed.sites).values())} == {("all", None)}
    assert magnitudes(changed) == magnitudes(small)
    assert small.replace(sites=()) == quant.FP8


def test_magnitudes_of_cotangents_come_from_a_function_that_takes_gradients(rng):
    w, x = normal(rng, 8, 4), normal(rng, 16, 8)

    def loss(w, x):
        return jnp.sum(jnp.sin(x @ w))

    def make(dot):
        return jax.jit(jax.grad(jmp.autocast(loss, "full", dot=dot)))

    recipe = quant.calibrate(make, quant.FP8, [(w, x)])
    cotangent = jnp.cos(quant.FP8(x, w, MATMUL))
    np.testing.assert_allclose(magnitudes(recipe)[""], [amax(x), amax(w), amax(cotangent)], rtol=1e-6)
    assert_identical(make(recipe)(w, x), make(quant.FP8)(w, x))  # on the very data


@pytest.mark.parametrize("wrap", [jmp.autocast, jmp.nnx.autocast], ids=["functional", "module"])
def test_models_of_nnx(wrap, rng):
    model, x = nnx.Linear(32, 16, rngs=nnx.Rngs(0)), normal(rng, 8, 32)
    graphdef, state = nnx.split(model)
    functional = wrap is jmp.autocast
    fun = (lambda state, x: nnx.merge(graphdef, state)(x)) if functional else (lambda model, x: model(x))
    recipe = quant.calibrate(
        lambda dot: wrap(fun, "full", dot=dot), "w8a8_static", [(state if functional else model, x)]
    )
    [found] = magnitudes(recipe).values()
    assert found[0] == amax(x)


def test_layers_with_the_recipe_inside_share_one_site(rng):
    """Outside of autocast nothing tells matmuls apart."""
    small, large, w = normal(rng, 4, 8), 10 * normal(rng, 4, 8), normal(rng, 8, 8)

    def make(dot):
        return lambda x, y: (dot(x, w, MATMUL), dot(y, w, MATMUL))

    recipe = quant.calibrate(make, "w8a8_static", [(small, large)])
    assert magnitudes(recipe) == {"": [amax(large), None, None]}
    np.testing.assert_array_equal(recipe(small, w, MATMUL), recipe.at("")(small, w, MATMUL))


def test_what_calibration_has_not_seen_has_scales_of_its_own(rng):
    """A branch that no batch took is not quantized to int8 with a made-up scale."""
    w, x = 1e-3 * normal(rng, 16, 8), 1e-3 * normal(rng, 4, 16)

    def branches(w, x, flag):
        with jax.named_scope("always"):
            y = x @ w
        with jax.named_scope("sometimes"):
            return lax.cond(flag, lambda: x @ w, lambda: y)

    make = applied(branches)
    recipe = quant.calibrate(make, "w8a8_static", [(w, x, jnp.array(False))])
    assert list(magnitudes(recipe)) == ["always"]
    assert relative(make(recipe)(w, x, jnp.array(True)), x @ w) < BOUNDS["int8_qat"] * 2


def test_a_scope_that_no_batch_reached_takes_nothing_from_the_root(rng):
    """The scales of matmuls without a scope are theirs alone."""
    w, x = normal(rng, 16, 16), normal(rng, 8, 16)

    def branches(w, x, flag):
        y = jnp.tanh(x @ w)
        with jax.named_scope("sometimes"):
            return lax.cond(flag, lambda: (1000 * y) @ w, lambda: y)

    make = applied(branches)
    recipe = quant.calibrate(make, "fp8", [(w, x, jnp.array(False))])
    assert list(magnitudes(recipe)) == [""]
    assert relative(make(recipe)(w, x, jnp.array(True)), branches(w, x, True)) < 2 * BOUNDS["fp8"]


def test_scopes_in_regions_are_told_apart(rng):
    w, x = normal(rng, 16, 16), normal(rng, 8, 16)

    def scoped(w, x):
        with jax.named_scope("a"), jmp.low_precision():
            y = x @ w
        with jax.named_scope("b"), jmp.low_precision():
            return (1000 * y) @ w

    recipe = quant.calibrate(applied(scoped, "mixed_bfloat16"), "fp8", [(w, x)])
    assert [scope.split("/")[0] for scope in magnitudes(recipe)] == ["a", "b"]


def test_rules_choose_where_it_is_calibrated(rng):
    x = normal(rng, 16, 4)
    params = MLP().init(jax.random.key(0), x)

    def make(dot):
        return jmp.autocast(MLP().apply, "mixed_bfloat16", rules=[jmp.Rule("MLP/head", dot=dot)])

    recipe = quant.calibrate(make, "w8a8_static", [(params, x)])
    assert list(magnitudes(recipe)) == ["MLP/head"]
    assert bool(jnp.isfinite(make(recipe)(params, x)).all())


def test_a_calibrated_function_compiles_once_and_calls_nobody(rng):
    """What watches goes with calibration."""
    w, x = normal(rng, 16, 8), normal(rng, 4, 16)
    make = applied(lambda w, x: x @ w, "mixed_bfloat16")
    recipe = quant.calibrate(make, "w8a8_static", [(w, x)])
    assert "callback" not in str(jax.make_jaxpr(make(recipe))(w, x))
    run = jax.jit(make(recipe))
    for i in range(3):
        run(w, x * i)
    assert run._cache_size() == 1


def zero(w, x):
    return (0 * x) @ w


def test_what_was_always_zero_is_not_fixed(rng):
    """Or every later number would be too large."""
    w, x = normal(rng, 16, 8), normal(rng, 4, 16)
    assert magnitudes(quant.calibrate(applied(zero), "w8a8_static", [(w, x)])) == {"": [None, None, None]}


WRONG = {
    "no batches": (applied(zero), "w8a8_static", [], "no batches"),
    "no products": (applied(lambda w, x: x), "w8a8_static", None, "No matmul used recipe lhs=int8"),
    "no function": (lambda dot: None, "w8a8_static", None, "make must return the function to calibrate.*returned None"),
    "a dict": (
        applied(zero),
        "w8a8_static",
        [{"x": 1}],
        r"tuple of arguments for each batch, such as \(x,\), got {'x': 1}",
    ),
    "parameters for a recipe": (applied(zero), {"w": jnp.ones(3)}, None, r"recipe is {'w': float32\[3\]}.*lambda dot"),
    "channels": (applied(zero), "w8a8", None, "nothing to calibrate"),
    "not finite": (applied(lambda w, x: (x / 0) @ w), "w8a8_static", None, "In scope '' lhs has inf"),
    "NaN": (applied(lambda w, x: (0 * x / 0) @ w), "w8a8_static", None, "In scope '' lhs has nan"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.filterwarnings("ignore::jmp_lite.errors.UnmatchedRuleWarning")
def test_what_cannot_be_calibrated(case):
    make, recipe, batches, message = WRONG[case]
    with pytest.raises(jmp.errors.InvalidRecipeError, match=message):
        quant.calibrate(make, recipe, [(jnp.eye(16), jnp.ones((8, 16)))] if batches is None else batches)


# --- By hand --------------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("side", ["lhs", "rhs", "grad"])
@pytest.mark.parametrize("name", ["fp8", "lhs=e4m3,rhs=e4m3,grad=e4m3"])
def test_the_same_magnitude_gives_the_same_bits(name, side, rng):
    x, w, by = normal(rng, 8, 16), normal(rng, 16, 4), normal(rng, 8, 4)
    recipe = quant.get_recipe(name)
    fixed = recipe.static(**{side: {"lhs": amax(x), "rhs": amax(w), "grad": amax(by)}[side]})

    def run(dot):
        return jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(dot(x, w, MATMUL) * by), (0, 1)))(x, w)

    assert_identical(run(fixed), run(recipe))


@pytest.mark.parametrize("name", ["fp8", "lhs=int8,rhs=int8,grad=int8", "lhs=e4m3:stochastic,rhs=e4m3,grad=e5m2"])
def test_numbers_beyond_are_seen_or_saturate(name, rng):
    """NaN in float8, up to the rounding of the largest; the largest number in int8."""
    x, w = jnp.clip(normal(rng, 8, 16), -4, 4).at[0, 0].set(9.0), jnp.eye(16)
    out = quant.get_recipe(name).static(lhs=4.0)(x, w, MATMUL)
    if "int8" in name:
        assert relative(out, jnp.clip(x, -4, 4)) < 0.02
    else:
        np.testing.assert_array_equal(np.isnan(out), np.arange(8)[:, None] == np.zeros(16))


def test_a_margin_leaves_room_beyond_a_fixed_magnitude():
    recipe = quant.DotRecipe("e4m3:margin1:pow2", "e4m3:pow2").static(lhs=4.0)
    assert recipe(jnp.array([8.0]), jnp.ones(1), (((0,), (0,)), ((), ()))) == 8
    assert np.isnan(recipe(jnp.array([15.0]), jnp.ones(1), (((0,), (0,)), ((), ()))))


def test_fixed_scales_look_at_nothing(rng):
    """No maximum is taken: each operand is read once."""
    x, w = normal(rng, 8, 16), normal(rng, 16, 4)

    def loss(dot, x, w):
        return jnp.sum(jnp.sin(dot(x, w, MATMUL)))

    for recipe, looks in ((quant.FP8, True), (quant.FP8.static(lhs=8, rhs=8, grad=1), False)):
        text = str(jax.make_jaxpr(jax.grad(functools.partial(loss, recipe), (0, 1)))(x, w))
        assert ("reduce_max" in text) == looks


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        (quant.W8A16, {"lhs": 2.0}, r"lhs=2\.0 was given.*does not quantize it"),
        (quant.INT8_QAT, {"lhs": 2.0}, r"amax=2\.0 is one number.*'channel'"),
        (quant.FP8, {"grad": 0.0}, r"positive number, got 0\.0"),
        (quant.FP8, {"grad": 1e39}, r"positive number, got 1e\+39"),
        (quant.FP8, {"grad": 1e-45}, "positive number, got 1e-45"),
        (quant.FP8, {"rhs": "2"}, "positive number, got '2'"),
        (quant.FP8, {"rhs": jnp.ones(2)}, "positive number, got Array"),
    ],
)
def test_what_cannot_be_fixed(recipe, settings, message):
    with pytest.raises(jmp.errors.InvalidRecipeError, match=message):
        recipe.static(**settings)


# --- Methods ---


def squared_error(x, amax):
    """Of int8 with this scale, number by number, in float64."""
    x, scale = np.asarray(x, np.float64), amax / 127
    return np.mean((np.clip(np.rint(x / scale), -127, 127) * scale - x) ** 2)


def with_outliers(rng):
    x = normal(rng, 64, 256)
    return x.at[3, 5].set(1000.0).at[7, 9].set(-700.0)


def amax_by(method, x, **options):
    """The magnitude that is fixed for the left operand, seen in two batches."""
    batches = [(jnp.ones((256, 4)), part) for part in jnp.split(x, 2)]
    recipe = quant.calibrate(applied(lambda w, x: x @ w), "w8a8_static", batches, method=method, **options)
    return recipe.at("").lhs.amax


@pytest.mark.parametrize("percentile", [50, 99.0, 99.9, 100])
def test_percentiles_are_those_of_all_numbers(percentile, rng):
    """To the width of a bucket, 1/128; never less than asked for."""
    x = with_outliers(rng)
    exact = np.quantile(np.abs(np.asarray(x, np.float64)), percentile / 100, method="inverted_cdf")
    assert exact <= amax_by("percentile", x, percentile=percentile) <= exact * (1 + 2**-7)


def test_zeros_are_no_part_of_a_percentile(rng):
    """Of one-hot rows, most numbers are zeros."""
    x = jnp.zeros((64, 256)).at[jnp.arange(64), jnp.arange(64)].set(0.4)
    assert amax_by("percentile", x) == pytest.approx(0.4)
    assert amax_by("mse", x) == pytest.approx(0.4, rel=0.01)


def test_no_scale_has_room_for_more_than_was_seen(rng):
    x = jnp.asarray(rng.integers(-127, 128, (64, 256)), jnp.float32).at[0, 0].set(127.0)
    assert amax_by("percentile", x, percentile=np.float32(100)) == 127
    assert amax_by("mse", x) <= 127


@pytest.mark.parametrize("kind", ["normal", "outliers", "uniform", "sparse"])
def test_the_least_error_is_found(kind, rng):
    """Of no other magnitude is the error of the same data much less; two percent is what the buckets may cost."""
    x = {
        "normal": lambda: normal(rng, 64, 256),
        "outliers": lambda: with_outliers(rng),
        "uniform": lambda: jnp.asarray(rng.uniform(-1, 1, (64, 256)), jnp.float32),
        "sparse": lambda: jnp.maximum(normal(rng, 64, 256), 0) ** 3,
    }[kind]()
    found = squared_error(x, amax_by("mse", x))
    tried = amax(x) * np.exp2(-np.arange(0, 8, 1 / 64))
    assert found <= 1.02 * min(squared_error(x, other) for other in tried)
    assert found <= squared_error(x, amax(x)) * 1.02


@pytest.mark.parametrize("method", ["absmax", "percentile", "mse"])
def test_methods_meet_zeros_and_what_is_not_finite(method, rng):
    plain = applied(lambda w, x: x @ w)
    w, make = jnp.ones((16, 4)), lambda dot: jax.jit(plain(dot))
    zeros = quant.calibrate(make, "w8a8_static", [(w, jnp.zeros((4, 16)))], method=method)
    assert zeros.at("").lhs.amax is None
    with pytest.raises(jmp.errors.InvalidRecipeError, match="finite numbers"):
        quant.calibrate(make, "w8a8_static", [(w, normal(rng, 2048, 16).at[1, 1].set(np.nan))], method=method)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("w8a8_static", {"method": "entropy"}, "one of 'absmax', 'percentile', 'mse', got 'entropy'"),
        ("w8a8_static", {"method": ["mse"]}, r"got \['mse'\]"),
        ("fp8", {"method": "mse"}, "become NaN in lhs=e4m3:pow2"),
        ("w8a8_static", {"method": "percentile", "percentile": 0}, "number of percent such as 99.9, got 0"),
        ("w8a8_static", {"method": "percentile", "percentile": "99"}, "got '99'"),
    ],
)
def test_methods_that_mean_nothing_are_refused(recipe, options, message, rng):
    with pytest.raises(jmp.errors.InvalidRecipeError, match=message):
        quant.calibrate(applied(lambda w, x: x @ w), recipe, [(jnp.ones((8, 4)), normal(rng, 4, 8))], **options)
