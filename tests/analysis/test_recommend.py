"""What is recommended is measured: it keeps what needs float32, and nothing else, within the tolerance."""

import contextlib
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparisons import slow_but_for

import jmp_lite as jmp
from benchmarks import _models
from jmp_lite.analysis import perturb, recommend
from jmp_lite.analysis._recommendation._choices import Choice, Plan

WIDTH = 32


def mlp(params, x, fragile):
    """Six layers. In a fragile one, what the next one uses is the small difference of two large matmuls."""
    for index, w in enumerate(params):
        with jax.named_scope(f"layer_{index}"):
            if index in fragile:
                shifted = jnp.concatenate([x, jnp.full_like(x, 301.37)], axis=1)
                large = shifted @ jnp.concatenate([w, jnp.eye(WIDTH)])
                x = jnp.tanh(large - 301.37)
            else:
                x = jnp.tanh(x @ w)
    return x


def problem(rng, fragile, count=6):
    params = [jnp.asarray(rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)) / WIDTH**0.5 for _ in range(count)]
    batches = [(jnp.asarray(rng.normal(size=(64, WIDTH)).astype(np.float32)),) for _ in range(3)]
    target = jnp.asarray(rng.normal(size=(64, WIDTH)).astype(np.float32))
    return lambda params, x: jnp.mean((mlp(params, x, fragile) - target) ** 2), params, batches


TOLERANCE = 0.02


@pytest.fixture(scope="module")
def of_three():
    """Three layers of which the second is fragile, and what is recommended for them."""
    rng = np.random.default_rng([int(os.environ["JMP_LITE_SEED"]), 3])
    arguments = problem(rng, (1,), count=3)
    return *arguments, recommend(*arguments, tolerance=TOLERANCE)


def test_the_layer_that_needs_float32_is_found_and_no_other(of_three):
    *_, found = of_three
    [line] = [line for line in found.lines if line.format == "float32"]
    assert line.scope == "layer_1"
    assert "would change the gradient" in line.reason


@pytest.mark.slow
@pytest.mark.parametrize("fragile", [(1, 4), (0, 5), (2, 3), (3,), ()], ids=str)
def test_the_layers_that_need_float32_are_found_and_no_others(fragile, rng):
    loss, params, batches = problem(rng, fragile)
    found = recommend(loss, params, batches, tolerance=0.03)
    assert [line.scope for line in found.lines if line.format == "float32"] == [f"layer_{i}" for i in fragile]
    assert found.error <= 0.03
    assert all("would change the gradient" in line.reason for line in found.lines if line.format == "float32")


def test_printed_code_runs_as_it_is(of_three):
    loss, params, batches, found = of_three
    names = {"loss_fn": loss}
    exec(found.policy(), names)  # noqa: S102  # it is ours
    by_code, by_method = (jax.jit(jax.grad(f))(params, *batches[-1]) for f in (names["loss_fn"], found.autocast(loss)))
    for a, b in zip(by_code, by_method, strict=True):
        np.testing.assert_array_equal(a, b)
    assert found.policy("other").rstrip().endswith('other = jmp.autocast(other, "mixed_bfloat16", rules=rules)')


@pytest.mark.slow
def test_what_overflows_float16_is_kept_and_named(rng):
    w = jnp.asarray(rng.normal(size=(WIDTH, WIDTH)).astype(np.float32))

    def loss(params, x):
        with jax.named_scope("small"):
            x = jnp.tanh(x @ params["a"])
        with jax.named_scope("large"):
            return jnp.mean(jnp.tanh(((1e4 * x) @ (params["b"] * 100)) * 1e-7) ** 2)

    batches = [(jnp.asarray(rng.normal(size=(16, WIDTH)).astype(np.float32)),) for _ in range(3)]
    found = recommend(loss, {"a": w, "b": w}, batches, tolerance=0.05, formats=["float16"])
    assert [line.format for line in found.lines] == ["float16", "float32"]
    assert "does not fit float16" in found.lines[1].reason
    both = recommend(loss, {"a": w, "b": w}, batches, tolerance=0.05, formats=["float16", "bfloat16"])
    assert both.low_share == pytest.approx(1)


@pytest.mark.slow
def test_a_loss_scale_for_float16_leaves_room(rng):
    loss, params, batches = problem(rng, (), count=3)
    found = recommend(lambda p, x: loss(p, x) * 1e-4, params, batches, tolerance=0.05, formats=["float16"])
    scaled = jax.grad(lambda p: loss(p, *batches[0]) * 1e-4 * found.loss_scale)(params)
    largest = max(float(jnp.max(jnp.abs(g))) for g in scaled)
    assert np.log2(found.loss_scale) == int(np.log2(found.loss_scale))
    assert largest < 65504 / 4
    assert found.loss_scale >= 2.0**10


@pytest.mark.parametrize("tolerance", slow_but_for([TOLERANCE], [1e-6, TOLERANCE, 100]))
def test_errors_are_within_the_tolerance_on_batches_held_out(tolerance, of_three):
    loss, params, batches, found = of_three
    if tolerance != TOLERANCE:
        found = recommend(loss, params, batches, tolerance=tolerance)
    assert found.error <= tolerance
    exact, low = (jax.jit(jax.grad(f))(params, *batches[-1]) for f in (loss, found.autocast(loss)))
    norm = np.sqrt(sum(np.sum(np.square(np.asarray(g, np.float64))) for g in exact))
    error = np.sqrt(sum(np.sum(np.square(np.asarray(a - b, np.float64))) for a, b in zip(low, exact, strict=True)))
    assert error / norm <= tolerance * 1.01 + 1e-6
    assert found.low_share == (0 if tolerance == 1e-6 else pytest.approx(1) if tolerance == 100 else found.low_share)


@pytest.mark.slow
def test_casts_are_bounded(rng):
    loss, params, batches = problem(rng, (), count=4)
    free = recommend(loss, params, batches, tolerance=0.5)
    bounded = recommend(loss, params, batches, tolerance=0.5, max_casts=free.casts - 1)
    assert bounded.casts < free.casts
    assert 0 < bounded.low_share < 1
    assert any("little work for its casts" in line.reason for line in bounded.lines)


@pytest.mark.slow
def test_the_same_arguments_get_the_same_answer(rng):
    loss, params, batches = problem(rng, (1,), count=3)
    first, second = (recommend(loss, params, batches, tolerance=0.03) for _ in range(2))
    assert first.to_dict() == second.to_dict()
    assert str(first) == str(second)


@pytest.mark.slow
def test_recipes_are_chosen_beside_formats(rng):
    loss, params, batches = problem(rng, (), count=3)
    low = recommend(loss, params, batches, tolerance=0.5, formats=["w8a8", "bfloat16"])
    assert {line.format for line in low.lines} == {"w8a8"}
    names = {"loss_fn": loss}
    exec(low.policy(), names)  # noqa: S102
    jax.jit(jax.grad(names["loss_fn"]))(params, *batches[0])


def test_what_a_recipe_does_not_apply_to_is_said(rng):
    def loss(w, x):
        with jax.named_scope("weights"):
            x = jnp.tanh(x @ w)
        with jax.named_scope("scores"):
            return jnp.mean(jnp.tanh(x @ x.T) ** 2)

    w = jnp.asarray(rng.normal(size=(WIDTH, WIDTH)).astype(np.float32))
    batches = [(jnp.asarray(rng.normal(size=(16, WIDTH)).astype(np.float32)),) for _ in range(2)]
    found = recommend(loss, w, batches, tolerance=0.9, formats=["fp8", "bfloat16"])
    assert {line.scope: line.format for line in found.lines} == {"weights": "fp8", "scores": "bfloat16"}
    assert found.lines[1].reason == "fp8 applies to no matmul here"
    assert len(found.plan.rules) == 1  # a rule for scores would change nothing
    before, after = found.cost.rows
    assert after.bytes < before.bytes


SCOPES = ("", "a", "a/b", "ab")


@pytest.mark.parametrize("formats", [*itertools.product(["float32", "bfloat16"], repeat=4)], ids="-".join)
def test_each_group_runs_in_its_format_and_no_other_in_it(formats):
    """Also what is in no scope, or in a scope whose name begins that of another."""
    plan = Plan({scope: Choice(name, name) for scope, name in zip(SCOPES, formats, strict=True)})

    def chain(x):
        for scope in SCOPES:
            with contextlib.ExitStack() as stack:
                for name in filter(None, scope.split("/")):
                    stack.enter_context(jax.named_scope(name))
                x = jnp.tanh(x @ x)
        return x

    records = jmp.explain(chain, plan.policy, rules=plan.rules)(jnp.ones((8, 8)))
    found = {r.scope: r.in_dtypes[0] for r in records if r.primitive == "dot_general"}
    assert found == dict(zip(SCOPES, formats, strict=True))


@pytest.mark.slow
def test_outliers_of_a_layer_keep_it_from_int8(rng):
    loss, params, batches = problem(rng, (), count=3)
    params[1] = params[1].at[0].multiply(200.0)

    def smooth(params, x):
        return loss(params, x)

    found = recommend(smooth, params, batches, tolerance=0.1, formats=["w8a8", "bfloat16"])
    assert found.error <= 0.1


@pytest.mark.slow
def test_what_is_more_exact_is_kept_where_it_fits(rng):
    """A wider range is not a step up for numbers that fit: half of them in bfloat16 is worse than all in float16."""
    loss, params, batches = problem(rng, (), count=3)
    both = recommend(loss, params, batches, tolerance=2.0**-10, formats=["float16", "bfloat16"])
    assert {line.format for line in both.lines} <= {"float16", "float32"}
    wide = recommend(loss, params, batches, tolerance=0.5, formats=["float16", "bfloat16"])
    assert {line.format for line in wide.lines} == {"float16"}


#: Tasks of the benchmarks, made small.
SMALL = {
    "gpt": _models._gpt("", (2, 16), layers=1, width=32, heads=2, vocabulary=64),
    "resnet": _models._resnet("", 8, 8, widths=(8, 16), blocks=1),
}


def task_problem(name, rng):
    task = SMALL[name]
    params, statistics, _ = task.arguments()
    loss = task.loss()
    (shape, dtype), (label_shape, classes) = task.inputs, task.labels
    batches = []
    for _ in range(3):
        labels = jnp.asarray(rng.integers(0, classes, label_shape, dtype=np.int32))
        inputs = labels if dtype == np.int32 else jnp.asarray(rng.standard_normal(shape, dtype=dtype))
        batches.append((inputs, labels))
    return lambda params, *batch: loss(params, statistics, batch)[0], params, batches


def measured(low, loss, params, batch):
    """Error of loss and gradient, whichever is larger, by NumPy."""
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(jax.value_and_grad(loss))(params, *batch)
    found = jax.jit(jax.value_and_grad(low))(params, *batch)
    pairs = [
        [np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(part)]) for part in both]
        for both in zip(found, exact, strict=True)
    ]
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("formats", [("bfloat16",), ("float16", "bfloat16")], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_models_are_within_the_tolerance_and_cost_no_more(name, formats, rng):
    """Half of what all of bfloat16 makes is not to be had by it, and by float16 at once."""
    with jax.numpy_rank_promotion("allow"):  # positions are added to texts
        loss, params, batches = task_problem(name, rng)
        tolerance = measured(jmp.autocast(loss, "mixed_bfloat16"), loss, params, batches[-1]) / 2
        found = recommend(loss, params, batches, tolerance=tolerance, formats=formats)
        error = measured(found.autocast(loss), loss, params, batches[-1])
    assert error <= tolerance
    assert error == pytest.approx(found.error, rel=0.1)
    safe, recommended = found.cost.rows
    assert recommended.seconds <= safe.seconds
    assert recommended.bytes <= safe.bytes
    assert found.low_share > 0
    assert found.low_share == pytest.approx(1) or formats == ("bfloat16",)


def test_a_loss_that_is_not_finite_is_refused(rng):
    loss, params, batches = problem(rng, (), count=1)
    with pytest.raises(jmp.errors.InvalidAnalysisError, match="not finite in float32"):
        recommend(lambda p, x: loss(p, x) / 0.0, params, batches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "two batches or more"),
        ({"batches": [jnp.ones(3), jnp.ones(3)]}, "each a tuple"),
        ({"tolerance": 0}, "tolerance must be a positive number, got 0"),
        ({"tolerance": "a"}, "tolerance must be a positive number, got 'a'"),
        ({"tolerance": float("nan")}, "tolerance must be a positive number, got nan"),
        ({"loss_fn": lambda p, x: jnp.sum(p[0])}, "no matmul"),
    ],
)
def test_what_cannot_be_recommended(change, message, rng):
    loss, params, batches = problem(rng, ())
    arguments = {"loss_fn": loss, "params": params, "batches": batches} | change
    with pytest.raises(jmp.errors.InvalidAnalysisError, match=message):
        recommend(**arguments)


@pytest.mark.parametrize("formats", ["fp9", ["fp9"]])
def test_unknown_formats_are_refused(formats, rng):
    loss, params, batches = problem(rng, ())
    with pytest.raises(jmp.errors.InvalidRecipeError, match="fp9"):
        recommend(loss, params, batches, formats=formats)


@pytest.mark.slow
def test_one_format_needs_no_list(rng):
    loss, params, batches = problem(rng, (), count=1)
    one, listed = (recommend(loss, params, batches, formats=formats) for formats in ("float16", ["float16"]))
    assert one.to_dict() == listed.to_dict()


def test_sensitivities_follow_the_condition_of_products(rng):
    loss, params, batches = problem(rng, (2,))
    found = perturb(loss)(params, *batches[0])
    assert next(iter(found)) == "layer_2"
    assert found["layer_2"].gradient > 10 * found["layer_4"].gradient
    assert set(perturb(loss, depth=1)(params, *batches[0])) == set(found)


def test_perturb_takes_losses_and_a_size():
    with pytest.raises(jmp.errors.InvalidAnalysisError, match="scale must be positive, got 0"):
        perturb(jnp.sum, scale=0.0)
    with pytest.raises(jmp.errors.InvalidFunctionError, match="perturb takes a loss"):
        perturb(lambda x: x)(jnp.ones(3))
