"""What policies do beside float32: errors of equations are derived from the format, gradients from a plain run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparisons import slow_but_for

import jmp_lite as jmp
from jmp_lite.analysis import compare, lost_updates

CONSTRUCTS = {
    "plain": lambda f, x, w: f(x, w),
    "jit": lambda f, x, w: jax.jit(f)(x, w),
    "scan": lambda f, x, w: jax.lax.scan(lambda c, _: (f(c, w), None), x, None, length=3)[0],
    "checkpoint": lambda f, x, w: jax.checkpoint(f)(x, w),
    "cond": lambda f, x, w: jax.lax.cond(x[0, 0] > -100, f, lambda x, w: x, x, w),
}


def product(x, w):
    return jnp.tanh(x @ w)


def arrays(rng, *shapes):
    return [jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in shapes]


@pytest.mark.parametrize(("policy", "eps"), [("mixed_bfloat16", 2.0**-8), ("mixed_float16", 2.0**-11)])
@pytest.mark.parametrize("construct", slow_but_for(("scan", "cond"), CONSTRUCTS))
def test_errors_are_those_of_the_format(construct, policy, eps, rng):
    x, w = arrays(rng, (16, 8), (8, 8))

    def loss(w, x):
        return jnp.mean(CONSTRUCTS[construct](product, x, w / 3) ** 2)

    found = compare(loss, policy)(w, x)[policy]
    products = [e for e in found.equations if e.site.primitive == "dot_general"]
    assert products
    # Rounding to nearest is off by eps at most, and by eps / sqrt(12) to eps / sqrt(3) in the mean.
    assert all(e.added <= eps for e in found.equations)
    assert max(e.carried for e in products) > eps / 10
    assert found.error < 40 * eps
    assert {result.path for result in found.results} == {"loss", ""}


def test_float32_has_no_error(rng):
    x, w = arrays(rng, (4, 8), (8, 8))
    found = compare(lambda w, x: jnp.mean(product(x, w)), "float32")(w, x)["float32"]
    assert all(e.added == 0 for e in found.equations)
    assert found.error < 1e-5


def test_gradients_are_those_of_plain_runs(rng):
    x, w = arrays(rng, (16, 8), (8, 4))

    def loss(p, x):
        return jnp.mean(jax.nn.softmax(x @ p["w"] + p["b"][None])[:, 0])

    params = {"w": w, "b": jnp.ones(4)}
    low = jmp.autocast(loss, "mixed_bfloat16")
    [result] = [r for r in compare(loss, low)(params, x)["loss"].results if r.path == "w"]
    a, b = (np.asarray(jax.jit(jax.grad(f))(params, x)["w"], np.float64).ravel() for f in (low, loss))
    assert result.norm_ratio == pytest.approx(np.linalg.norm(a) / np.linalg.norm(b), rel=1e-3)
    assert result.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-4)
    assert result.error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=0.1)


def test_a_function_that_is_no_loss_is_compared_by_its_results(rng):
    x, w = arrays(rng, (4, 8), (8, 8))
    found = compare(lambda w, x: {"y": product(x, w), "n": jnp.arange(3)}, "mixed_bfloat16")(w, x)
    [result] = found["mixed_bfloat16"].results
    assert result.path == "y"
    assert 0 < result.error < 0.02


def test_quantized_products_are_compared(rng):
    x, w = arrays(rng, (16, 32), (32, 8))

    def loss(w, x):
        return jnp.mean(product(x, w) ** 2)

    fp8 = jmp.autocast(loss, "mixed_bfloat16", dot=jmp.quant.FP8)
    found = compare(loss, {"bf16": "mixed_bfloat16", "fp8": fp8})(w, x)
    assert list(found.policies) == ["bf16", "fp8"]
    assert found["fp8"].error > found["bf16"].error


def test_a_variance_of_data_with_a_large_mean_is_named():
    x = jnp.linspace(-1, 1, 256).reshape(1, 256) + 300.0

    def unstable(x):
        x = x.astype(jnp.bfloat16)
        return jnp.mean(x * x) - jnp.mean(x) ** 2

    found = compare(jnp.var, {"by hand": unstable})(x)
    assert any("sub amplifies the error" in f.message and "test_compare.py" in f.source for f in found.findings)


def test_a_gradient_that_underflows_has_turned():
    def loss(w):
        return jnp.sum((w.astype(jnp.float16) * jnp.float16(1e-3)).astype(jnp.float32)) * 1e-6

    found = compare(lambda w: jnp.sum(w * 1e-3) * 1e-6, {"fp16": loss})(jnp.ones((8, 8)))
    assert found.findings[0].kind == "gradient-turned"
    assert found["fp16"].results[0].cosine == 0


@pytest.mark.parametrize(
    ("low", "wanted", "cosine", "norm_ratio", "error"),
    [
        ([0, 0], [3, 4], 0, 0, 1),
        ([3, 4], [0, 0], 0, np.inf, np.inf),
        ([0, 0], [0, 0], 1, 1, 0),
        ([], [], 1, 1, 0),
        ([-3, -4], [3, 4], -1, 1, 2),
        ([np.inf, 4], [3, 4], 0, np.inf, np.inf),
        ([np.nan, 4], [np.inf, 4], 0, np.inf, np.inf),
        ([-np.inf, np.nan, 4], [-np.inf, np.nan, 4], 1, 1, 0),
    ],
    ids=str,
)
def test_errors_of_results_are_distances_over_what_is_wanted(low, wanted, cosine, norm_ratio, error):
    low, wanted = np.float32(low), np.float32(wanted)
    found = compare(lambda x: x + wanted, {"low": lambda x: x + low})(jnp.zeros(low.shape))["low"]
    assert found.results == (pytest.approx(("", cosine, norm_ratio, error)),)
    assert found.error == pytest.approx(error)


def test_everything_is_rows_of_plain_values(rng):
    x, w = arrays(rng, (4, 8), (8, 8))
    found = compare(lambda w, x: jnp.mean(product(x, w)), ["mixed_bfloat16", "mixed_float16"])(w, x)
    plain = json.loads(json.dumps(found.to_dict()))
    assert {row["policy"] for row in plain["equations"]} == {"mixed_bfloat16", "mixed_float16"}
    assert {row["path"] for row in plain["results"]} == {"loss", ""}
    assert all(isinstance(value, (str, float, bool)) for row in plain["equations"] for value in row.values())


def test_functions_of_one_name_are_all_compared():
    found = compare(lambda x: x, [lambda x: x, lambda x: 2 * x])(jnp.ones(3))
    assert [errors.error for errors in found.policies.values()] == [0, 1]
    assert list(found.policies) == ["<lambda>", "<lambda> (2)"]


@pytest.mark.parametrize("policies", [3, None, [3]])
def test_what_is_no_policy_is_refused(policies):
    with pytest.raises(jmp.errors.InvalidFunctionError, match=r"compare takes a function, got (3|None)"):
        compare(jnp.sum, policies)


def test_functions_that_return_something_else_are_refused():
    with pytest.raises(jmp.errors.InvalidFunctionError, match="'two' returns 2 arrays"):
        compare(lambda x: x * 2, {"two": lambda x: (x, x)})(jnp.ones(3))
    with pytest.raises(jmp.errors.InvalidFunctionError, match="compare takes a function"):
        compare("no function")


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5, 1e-9])
def test_lost_updates_are_those_that_apply_updates_loses(dtype, size, rng):
    params = {"w": jnp.asarray(rng.normal(size=200), dtype), "i": jnp.arange(3)}
    updates = {"w": jnp.asarray(rng.normal(size=200) * size, jnp.float32).at[:10].set(0), "i": jnp.zeros(3, jnp.int32)}
    lost = jax.jit(lost_updates)(params, updates)
    with jax.numpy_dtype_promotion("standard"):
        after = optax.apply_updates(params, updates)
    expected = np.mean(np.asarray(after["w"] == params["w"])[10:])
    assert list(lost) == ["w"]
    assert float(lost["w"]) == pytest.approx(expected)
    assert bool(lost.findings) == (expected > 0.5)


def test_updates_of_other_parameters_are_refused():
    with pytest.raises(jmp.errors.InvalidStepError, match="another structure"):
        lost_updates({"a": jnp.ones(2)}, {"b": jnp.ones(2)})
    with pytest.raises(jmp.errors.InvalidStepError, match=r"update of 'a' has shape \(3,\)"):
        lost_updates({"a": jnp.ones(2)}, {"a": jnp.ones(3)})


def test_gradient_that_is_only_rounding_errors_is_no_finding(rng):
    """A softmax cancels what is added to all its scores: in exact arithmetic that bias has no gradient."""
    x, w, b = arrays(rng, (16, 8), (8, 8), (8,))

    def loss(p, x):
        keys = x @ p["w"] + p["b"][None]
        return jnp.mean(jnp.square(jax.nn.softmax(x @ keys.T) @ x))

    found = compare(loss, ["mixed_bfloat16", "mixed_float16"])({"w": w, "b": b}, x)
    assert all(errors.error > 100 for errors in found.policies.values())
    assert found.findings == ()
