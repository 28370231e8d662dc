"""Delayed scaling: what enters the histories, where they stand, and that they change nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support.comparisons import slow_but_for
from support.lowbit import BOUNDS, MATMUL, amax, normal, relative

import jmp_lite as jmp
from jmp_lite import quant

STEPS = 4
RECIPE = dataclasses.replace(quant.FP8, history=STEPS)
dot = functools.partial(RECIPE, dimension_numbers=MATMUL)
current = functools.partial(quant.FP8, dimension_numbers=MATMUL)


@pytest.fixture
def data(rng):
    """Weights, inputs and targets of a square layer."""
    return normal(rng, 16, 16), normal(rng, 8, 16), normal(rng, 8, 16)


def loss(w, x, target, dot=dot):
    return jnp.mean((dot(x, w) - target) ** 2)


# --- What histories are ---------------------------------------------------------------------------


def test_what_is_seen_are_the_largest_magnitudes(data):
    w, x, target = data
    delayed = quant.delayed(loss)
    histories = jax.jit(delayed.init)(*data)
    observed = jax.jit(jax.grad(delayed))(histories, *data)
    cotangent = jax.grad(lambda y: jnp.mean((y - target) ** 2))(current(x, w))
    assert observed["dot"].shape == histories["dot"].shape == (3, STEPS)
    np.testing.assert_allclose(observed["dot"][:, 0], [amax(x), amax(w), amax(cotangent)], rtol=1e-6)
    assert not np.any(observed["dot"][:, 1:])


def test_init_holds_what_one_step_sees(data):
    delayed = quant.delayed(loss)
    histories = delayed.init(*data)
    observed = jax.grad(delayed)(histories, *data)
    np.testing.assert_array_equal(histories["dot"][:, 0], observed["dot"][:, 0])
    assert not np.any(histories["dot"][:, 1:])


def test_with_what_was_seen_products_are_those_of_current_scaling(data):
    """To the last bit, because the largest magnitudes are the same."""
    delayed = quant.delayed(loss)
    histories = delayed.init(*data)
    found = jax.jit(jax.value_and_grad(delayed, argnums=(1, 2)))(histories, *data)
    expected = jax.jit(jax.value_and_grad(functools.partial(loss, dot=current), argnums=(0, 1)))(*data)
    for result, plain in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(result, plain)


def test_warm_histories_meet_the_bounds_of_current_scaling(rng):
    """While data changes from step to step."""
    shapes = (64, 32), (16, 64), (16, 32)
    delayed = quant.delayed(lambda w, x, cotangent: jnp.sum(dot(x, w) * cotangent))
    step = jax.jit(jax.grad(delayed, argnums=(0, 1, 2, 3)))
    histories, squares = jax.jit(delayed.init)(*(normal(rng, *shape) for shape in shapes)), np.zeros((3, 2))
    for i in range(30):
        w, x, cotangent = arrays = [normal(rng, *shape) for shape in shapes]
        observed, *found = step(histories, *arrays)
        histories = quant.update_histories(histories, observed)
        if i >= STEPS:
            for j, (grad, true) in enumerate(zip(found, (x.T @ cotangent, cotangent @ w.T, x @ w), strict=True)):
                squares[j] += [jnp.sum((grad - true) ** 2), jnp.sum(true**2)]
    errors = np.sqrt(squares[:, 0] / squares[:, 1])
    assert np.all(errors < BOUNDS["fp8_delayed"]), errors


def test_scales_come_from_the_largest_of_the_history():
    """Not from the latest, nor from the array: values beyond it saturate."""
    run = quant.delayed(lambda w, x: dot(x, w))
    histories = {"dot": jnp.array([[0.5, 448.0, 2.0, 1.0], [0.1, 0.2, 448.0, 0.0], [0.0] * 4])}
    x, w = jnp.full((1, 16), 1000.0), jnp.eye(16)
    np.testing.assert_array_equal(run(histories, w, x), np.full((1, 16), 448.0))
    assert float(run({"dot": histories["dot"] * 4}, w, x)[0, 0]) == 1024.0


UPDATES = {
    "shifts": ([1, 2, 3], 5, [5, 1, 2]),
    "larger": ([1, 2, 3], 1e30, [1e30, 1, 2]),
    "infinite": ([1, 2, 3], np.inf, [1, 1, 2]),
    "not a number": ([1, 2, 3], np.nan, [1, 1, 2]),
    "not seen": ([1, 2, 3], 0, [1, 1, 2]),
    "empty": ([0, 0, 0], 4, [4, 0, 0]),
    "never seen": ([0, 0, 0], 0, [0, 0, 0]),
}


@pytest.mark.parametrize("case", UPDATES)
def test_updates(case):
    before, seen, after = UPDATES[case]
    histories = {name: jnp.tile(jnp.array(before, jnp.float32), (3, 1)) for name in ("a", "b")}
    observed = {name: jnp.zeros((3, 3)).at[:, 0].set(seen) for name in ("a", "b")}
    for updated in jax.jit(quant.update_histories)(histories, observed).values():
        np.testing.assert_array_equal(updated, np.tile(np.float32(after), (3, 1)))


def test_each_row_is_updated_for_itself():
    histories = {"dot": jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}
    observed = {"dot": jnp.array([[np.inf, 0.0], [7.0, 0.0], [0.0, 0.0]])}
    np.testing.assert_array_equal(
        quant.update_histories(histories, observed)["dot"], [[1.0, 1.0], [7.0, 3.0], [5.0, 5.0]]
    )


# --- How they begin -------------------------------------------------------------------------------


def test_histories_of_shapes_alone(data):
    delayed = quant.delayed(loss)
    shapes = jax.eval_shape(delayed.init, *jax.eval_shape(lambda *x: x, *data))
    assert shapes["dot"].shape == (3, STEPS)
    assert shapes["dot"].dtype == jnp.float32
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    value, observed = jax.value_and_grad(delayed)(empty, *data)  # scales of 1
    assert relative(value, loss(*data, dot=lambda x, w: x @ w)) < 0.2
    np.testing.assert_array_equal(
        quant.update_histories(empty, observed)["dot"][:2, 0], delayed.init(*data)["dot"][:2, 0]
    )


@pytest.mark.parametrize("wrap", [lambda scale: scale, lambda scale: {"state": (scale, jnp.zeros(3))}])
def test_init_under_a_loss_scale(wrap, data):
    """Cotangents are those of the scaled loss, so the first step clips none."""
    scale = jmp.DynamicLossScale(2.0**12)
    delayed = quant.delayed(loss)
    plain, scaled = delayed.init(*data), delayed.init(*data, loss_scale=wrap(scale))
    np.testing.assert_array_equal(scaled["dot"][:2], plain["dot"][:2])
    np.testing.assert_allclose(scaled["dot"][2, 0], 2.0**12 * plain["dot"][2, 0], rtol=1e-6)


def test_training_under_a_dynamic_loss_scale(data):
    """Skipped steps leave no trace in the histories; one trace serves all steps."""
    w, x, target = data
    traces = []

    def counted(w, x, target):
        traces.append(1)
        return loss(w, x, target)

    delayed = quant.delayed(counted)
    tx = jmp.loss_scaled(optax.sgd(0.05), jmp.DynamicLossScale(2.0**12))
    state = tx.init(w)
    histories = delayed.init(*data, loss_scale=state)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(w, state, histories, x):
        def split(both, x, target):
            return delayed(both[0], both[1], x, target)

        scaled = jax.value_and_grad(lambda both: state.loss_scale.scale(split(both, x, target)))
        value, (observed, grads) = scaled((histories, w))
        w, state = jmp.apply_gradients(tx, grads, state, w)
        return w, state, quant.update_histories(histories, observed), value

    before, values = len(traces), []
    for i in range(8):
        old, old_w = histories, np.asarray(w)
        x_now = x.at[0, 0].set(np.inf) if i == 3 else x
        w, state, histories, value = step(w, state, histories, x_now)
        assert old["dot"].is_deleted()
        assert np.all(np.isfinite(histories["dot"]))
        assert np.array_equal(old_w, w) == (i == 3)
        values.append(float(value))
    assert len(traces) == before + 1
    assert np.isnan(values[3])
    assert values[7] / 2.0**11 < values[0] / 2.0**12
    assert int(state.total_notfinite) == 1


# --- Where they stand -----------------------------------------------------------------------------


def looped(dot):
    """Three layers with the same weights."""

    def fun(w, x, target):
        y, _ = lax.scan(lambda y, _: (jnp.tanh(dot(y, w)), None), x, None, length=3)
        return jnp.mean((y - target) ** 2)

    return fun


def branched(dot):
    def fun(w, x, target):
        y = lax.cond(x[0, 0] > -1e9, lambda x: dot(x, w), lambda x: dot(2 * x, w), x)
        return jnp.mean((y - target) ** 2)

    return fun


def tied(dot):
    def fun(w, x, target):
        return jnp.mean((dot(jnp.tanh(dot(x, w)), w) - target) ** 2)

    return fun


def repeated(dot):
    """A loop that is only run forward."""

    def fun(w, x, target):
        y = lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(dot(c[1], lax.stop_gradient(w)))), (0, x))
        return jnp.mean((dot(y[1], w) - target) ** 2)

    return fun


STRUCTURES = {
    "plain": (lambda dot: functools.partial(loss, dot=dot), 1),
    "jit": (lambda dot: jax.jit(functools.partial(loss, dot=dot)), 1),
    "checkpoint": (lambda dot: jax.checkpoint(functools.partial(loss, dot=dot)), 1),
    "jit of checkpoint of jit": (lambda dot: jax.jit(jax.checkpoint(jax.jit(functools.partial(loss, dot=dot)))), 1),
    "scan": (looped, 1),
    "checkpoint of scan": (lambda dot: jax.checkpoint(looped(dot)), 1),
    "cond": (branched, 2),
    "twice": (tied, 2),
    "vmap": (lambda dot: lambda w, x, t: jnp.mean(jax.vmap(lambda x, t: loss(w, x[None], t[None], dot))(x, t)), 1),
}


@pytest.mark.parametrize("case", slow_but_for(("scan", "cond"), STRUCTURES))
def test_places_inside_of_programs(case, data):
    """All are found; a history of what each of them sees gives products within the bounds."""
    make, count = STRUCTURES[case]
    data = data[0] / 4, *data[1:]
    delayed = quant.delayed(make(dot))
    histories = delayed.init(*data)
    assert list(histories) == ["dot", "dot#2"][:count]
    found = jax.jit(jax.value_and_grad(delayed, argnums=(0, 1, 2)))(histories, *data)
    like_current, expected = (
        jax.jit(jax.grad(make(dot), argnums=(0, 1)))(*data)
        for dot in (current, lambda x, w: lax.dot_general(x, w, MATMUL))
    )
    _, (observed, *grads) = found
    for grad, other, plain in zip(grads, like_current, expected, strict=True):
        assert relative(grad, plain) < 2 * relative(other, plain) + 0.01
    seen = np.stack([observed[name][:, 0] for name in histories])
    if case == "cond":  # the branch that was not taken has seen nothing, and keeps what it had
        assert not np.any(seen[0])
        seen = seen[1:]
    assert np.all(seen[0] > 0)
    if case in ("plain", "jit", "checkpoint", "jit of checkpoint of jit", "vmap", "cond"):
        np.testing.assert_allclose(seen[0][:2], [amax(data[1]), amax(data[0])], rtol=1e-6)


def test_loops_forward_alone(data):
    """``while`` has no reverse mode; its products take their scales from histories all the same."""
    data = data[0] / 4, *data[1:]
    histories = {name: jnp.full((3, STEPS), 448.0 * 2.0**-6) for name in ("dot", "dot#2")}
    run = jax.jit(quant.delayed(repeated(dot)))
    value = run(histories, *data)
    small = jax.tree.map(lambda h: h * 2.0**-16, histories)
    assert abs(value - repeated(lambda x, w: x @ w)(*data)) < 0.2 * value
    assert abs(run(small, *data) - value) > 1e-3  # saturated: the scales are those of the histories


def test_a_loop_sees_the_sum_over_its_runs_and_clips_nothing(rng):
    w = normal(rng, 16, 16) / 4
    x = normal(rng, 8, 16)

    def fun(w, x):
        return jnp.sum(lax.scan(lambda y, _: (dot(y, w), y), x, None, length=3)[0])

    observed = jax.grad(quant.delayed(fun))(quant.delayed(fun).init(w, x), w, x)["dot"][:, 0]
    inputs = [x]
    for _ in range(3):
        inputs.append(current(inputs[-1], w))
    largest = [amax(y) for y in inputs[:3]]
    assert abs(float(observed[1]) - 3 * amax(w)) < 1e-5 * 3 * amax(w)
    assert max(largest) * 0.99 < float(observed[0]) < sum(largest) * 1.2


def test_weights_used_twice_have_two_histories(data):
    w, x, _ = data
    delayed = quant.delayed(tied(dot))
    histories = delayed.init(*data)
    observed = jax.grad(delayed)(histories, *data)
    assert float(observed["dot"][1, 0]) == float(observed["dot#2"][1, 0]) == amax(w)
    assert float(observed["dot"][0, 0]) == amax(x)
    assert float(observed["dot#2"][0, 0]) <= 1  # of a hyperbolic tangent


def test_names_are_those_of_scopes(data):
    w, x, _ = data

    def fun(w, x):
        with jax.named_scope("encoder"):
            y = dot(x, w)
            with jax.named_scope("layer"):
                y = jax.jit(lambda y: dot(y, w))(y)
            y = dot(y, w)
        return dot(y, w)

    assert sorted(quant.delayed(fun).init(w, x)) == ["dot", "encoder", "encoder#2", "encoder/layer"]


WRONG = {
    "none": (lambda h: {}, r"\{\}"),
    "another name": (lambda h: {"head": h["dot"]}, "'head'"),
    "one too many": (lambda h: {**h, "extra": h["dot"]}, "'extra'"),
    "fewer steps": (lambda h: {"dot": h["dot"][:, :2]}, r"\(3, 2\)"),
    "an array": (lambda h: h["dot"], "must be the histories"),
    "a number": (lambda h: 7, "got 7"),
}


@pytest.mark.parametrize("case", WRONG)
def test_histories_of_something_else_are_refused(case, data):
    change, quoted = WRONG[case]
    delayed = quant.delayed(loss)
    histories = delayed.init(*data)
    with pytest.raises(jmp.errors.InvalidRecipeError, match=quoted) as caught:
        delayed(change(histories), *data)
    assert "'dot': float32[3, 4]" in str(caught.value)
    assert ".init(" in str(caught.value)


def test_a_function_without_such_products_has_no_histories(data):
    delayed = quant.delayed(functools.partial(loss, dot=current))
    assert delayed.init(*data) == {}
    np.testing.assert_array_equal(delayed({}, *data), loss(*data, dot=current))


# --- Devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("weights", ["replicated", "varying"])
def test_devices_see_the_maximum_over_all_of_them(checks, weights, data):
    """Not the sum of eight: that is what the gradient of something replicated usually is."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    recipe = dataclasses.replace(RECIPE, axis_name="data")
    delayed = quant.delayed(functools.partial(loss, dot=functools.partial(recipe, dimension_numbers=MATMUL)))

    def init(w, x, target):
        return delayed.init(w, x, target)

    def step(histories, w, x, target):
        if weights == "varying" and checks:
            w = lax.pcast(w, "data", to="varying")
        observed, grad = jax.grad(delayed, argnums=(0, 1))(histories, w, x, target)
        grad = grad if weights == "replicated" and checks else lax.psum(grad, "data")
        return quant.update_histories(histories, observed), grad / 8

    data_specs = P(), P("data"), P("data")
    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=checks)
    histories = jax.jit(mapped(init, in_specs=data_specs, out_specs=P()))(*data)
    expected = quant.delayed(loss).init(*data)["dot"][:, 0] * np.float32([1, 1, 8])  # a mean over fewer rows
    np.testing.assert_allclose(histories["dot"][:, 0], expected, rtol=1e-6)
    run = jax.jit(mapped(step, in_specs=(P(), *data_specs), out_specs=(P(), P())))
    for i in range(2):
        histories, grad = run(histories, *data)
        np.testing.assert_allclose(histories["dot"][:, : i + 2], np.tile(expected[:, None], i + 2), rtol=1e-6)
    assert relative(grad, jax.grad(functools.partial(loss, dot=current))(*data)) < 1e-6


def test_pmap_sees_the_maximum(data):
    w, x, target = data
    recipe = dataclasses.replace(RECIPE, axis_name="data")
    delayed = quant.delayed(functools.partial(loss, dot=functools.partial(recipe, dimension_numbers=MATMUL)))
    step = jax.pmap(
        lambda w, x, target: jax.grad(delayed)(delayed.init(w, x, target), w, x, target), "data", in_axes=(None, 0, 0)
    )
    observed = step(w, x[:, None], target[:, None])["dot"]
    expected = quant.delayed(loss).init(*data)["dot"][:, 0] * np.float32([1, 1, 8])
    np.testing.assert_allclose(observed[:, :, 0], np.tile(expected, (8, 1)), rtol=1e-6)
