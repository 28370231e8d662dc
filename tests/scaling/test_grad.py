"""Gradients of a scaled loss: true losses, exact gradients, under every transformation, tried again at lower scales."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from support.comparisons import DEVICES, assert_identical, compilations, mesh
from support.loss_scales import unscaled

import jmp_lite as jmp

SCALES = {
    "none": jmp.NoOpLossScale,
    "static": lambda: jmp.StaticLossScale(2.0**10),
    "dynamic": lambda: jmp.DynamicLossScale(2.0**10),
    "small": lambda: jmp.DynamicLossScale(2.0**-20, min_loss_scale=0),
    "megatron": lambda: jmp.DynamicLossScale.like("megatron"),
}
every_scale = pytest.mark.parametrize("make", SCALES.values(), ids=SCALES)


def quadratic(params, x):
    """A float32 loss of matmuls that are exact in float32 for small integers."""
    return jnp.sum(params["w"] * x * params["w"]) + jnp.sum(params["b"] * x)


def half_loss(params, x):
    """A float16 loss whose gradient overflows when the scale times x passes 65504."""
    return jnp.sum(params["w"].astype(jnp.float16) * x.astype(jnp.float16))


def integers(rng, *shape):
    """Small whole numbers, on which float arithmetic makes no error."""
    return jnp.asarray(rng.integers(-8, 8, shape), jnp.float32)


@pytest.fixture
def problem(rng):
    return {"w": integers(rng, 3), "b": integers(rng, 3)}, integers(rng, 3)


# --- The loss and the gradients ---


@every_scale
def test_loss_is_true_and_gradients_are_scaled(make, problem):
    """The loss is the unscaled one and the gradients are the scale times the true ones, exactly (powers of two)."""
    scale, (params, x) = make(), problem
    expected, true_grads = jax.value_and_grad(quadratic)(params, x)
    for transform in (lambda f: f, jax.jit):
        grad_fn = transform(lambda scale, *args: jmp.scaled_value_and_grad(quadratic, loss_scale=scale)(*args))
        loss, grads = grad_fn(scale, params, x)
        assert_identical(loss, expected)
        assert_identical(unscaled(grads, scale), true_grads)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn"])
def test_loss_is_float32_also_on_an_overflowing_step(dtype):
    """A loss of any dtype comes back as its own value in float32 although its gradients are infinite."""
    params = jnp.full(2, 300.0).astype(dtype)
    scale = jmp.DynamicLossScale(2.0**20 if dtype.startswith("float16") else 2.0**126)

    def loss_fn(p):
        return jnp.sum(p.astype(jnp.float32) * 2.0**4).astype(dtype)

    loss, grads = jmp.scaled_value_and_grad(loss_fn, loss_scale=scale)(params)
    assert loss.dtype == jnp.float32
    assert_identical(loss, loss_fn(params).astype(jnp.float32))
    assert not jnp.isfinite(grads.astype(jnp.float32)).any() or dtype == "float8_e4m3fn"


def test_double_precision_loss_stays_double():
    """Under x64 a float64 loss and its gradients keep their precision."""
    with jax.enable_x64(True):
        loss, grads = jmp.scaled_value_and_grad(lambda p: p / 3, loss_scale=jmp.DynamicLossScale(2.0**10))(
            jnp.float64(1)
        )
        assert loss.dtype == grads.dtype == jnp.float64
        assert float(loss) == 1 / 3
        loss, grads = jmp.scaled_value_and_grad(lambda p: p / 3, loss_scale=jmp.DynamicLossScale(2.0**10))(
            jnp.float32(1)
        )
        assert loss.dtype == grads.dtype == jnp.float32


def test_gradient_is_exact_on_the_growth_step():
    """The gradients of a step are unscaled with the scale that made them, also when the scale grows on it."""
    params = jnp.array([1.0, 2.0])
    tx = jmp.loss_scaled(optax.sgd(1.0), jmp.DynamicLossScale(1024.0, period=1))
    state = tx.init(params)
    for growths in range(1, 4):
        loss, grads = jmp.scaled_value_and_grad(lambda p: jnp.sum(p**2), loss_scale=state)(params)
        assert float(loss) == 5
        updates, state = tx.update(grads, state, params)
        np.testing.assert_array_equal(updates, [-2, -4])
        assert float(state.loss_scale.loss_scale) == 1024 * 2**growths


# --- Transformations ---


def test_transformations_agree(problem, rng):
    """vmap over examples, remat inside, scan over steps, pmap and shard_map give what the plain call gives."""
    params, _ = problem
    scale, xs = jmp.DynamicLossScale(2.0**10), integers(rng, DEVICES, 3)
    call = functools.partial(jmp.scaled_value_and_grad(quadratic, loss_scale=scale), params)
    expected = jax.tree.map(lambda *rows: jnp.stack(rows), *[call(x) for x in xs])
    assert_identical(jax.vmap(call)(xs), expected)
    assert_identical(jax.lax.scan(lambda _, x: (None, call(x)), None, xs)[1], expected)
    assert_identical(jax.pmap(call)(xs), expected)
    remat = jmp.scaled_value_and_grad(jax.checkpoint(quadratic), loss_scale=scale)
    assert_identical(jax.jit(jax.vmap(functools.partial(remat, params)))(xs), expected)

    def per_device(params, x, scale):
        params = jax.lax.pcast(params, "batch", to="varying")  # else the gradient is summed over devices
        return jax.tree.map(lambda v: v[None], jmp.scaled_value_and_grad(quadratic, loss_scale=scale)(params, x[0]))

    mapped = jax.shard_map(per_device, mesh=mesh(), in_specs=(P(), P("batch"), P()), out_specs=P("batch"))
    assert_identical(jax.jit(mapped)(params, xs, scale), expected)


def test_gradient_of_gradient(problem):
    """The scaled gradient can itself be differentiated (Hessian-vector matmuls)."""
    params, x = problem
    scale = jmp.DynamicLossScale(2.0**10)
    inner = lambda p: jnp.sum(jmp.scaled_value_and_grad(quadratic, loss_scale=scale)(p, x)[1]["w"])  # noqa: E731
    np.testing.assert_array_equal(jax.grad(inner)(params)["w"], 2 * x * 2.0**10)


# --- Retries ---


def manual_retry(fun, params, x, scale, max_retries):
    """Halving by hand until the gradients are finite."""
    for tries in range(max_retries + 1):
        loss, grads = jmp.scaled_value_and_grad(fun, loss_scale=scale)(params, x)
        if tries == max_retries or jmp.all_finite(grads):
            return loss, grads, scale
        scale = scale.adjust(False)
    raise AssertionError


@pytest.mark.covering(1)
@pytest.mark.parametrize("size", [1.0, 3.0, 1000.0, 60000.0, np.inf])
@pytest.mark.parametrize("max_retries", [1, 3, 20])
def test_retries_agree_with_halving_by_hand(size, max_retries):
    """Loss, gradients and the lowered scale are those of a loop of so many retries that halves by hand."""
    params, x = {"w": jnp.full(2, 0.5)}, jnp.array([size, 1.0])
    scale = jmp.DynamicLossScale(2.0**15)

    @jax.jit
    def retried(scale, *args):
        return jmp.scaled_value_and_grad(half_loss, loss_scale=scale, max_retries=max_retries)(*args)

    expected = manual_retry(half_loss, params, x, jax.tree.map(jnp.asarray, scale), max_retries)
    assert_identical(retried(scale, params, x), expected)


def test_retry_is_one_compiled_step():
    """A step that retries is traced and compiled once, whether it does retry or not, and returns a new state."""
    tx = jmp.loss_scaled(optax.sgd(2.0**-10), jmp.DynamicLossScale(2.0**15))
    params, traces = {"w": jnp.full(2, 0.5)}, []

    @jax.jit
    def step(params, state, x):
        traces.append(x)
        with_aux = lambda *a: (half_loss(*a), x)  # noqa: E731
        grad_fn = jmp.scaled_value_and_grad(with_aux, has_aux=True, loss_scale=state, max_retries=8)
        (loss, aux), grads, state = grad_fn(params, x)
        params, state = jmp.apply_gradients(tx, grads, state, params)
        return params, state, loss, aux

    state = tx.init(params)
    xs = [jnp.full(2, size) for size in (1.0, 16.0, 1.0, 1000.0)]
    with compilations() as compiled:
        for x in xs:
            params, state, _, aux = step(params, state, x)
            np.testing.assert_array_equal(aux, x)
    assert len(traces) == 1
    assert compiled == ["jit(step)"]
    assert int(state.total_notfinite) == 0
    assert (
        float(state.loss_scale.loss_scale) == 2.0**6
    )  # 1000 * 2**6 < 65504 < 1000 * 2**7 (16 * 2**12 = 65536 is too much)


@pytest.mark.parametrize("mapped", ["pmap", "shard_map"])
def test_replicas_retry_together(mapped):
    """With `axis_name` one replica that overflows makes all of them retry, so that their scales stay equal."""
    params, scale = {"w": jnp.full(2, 0.5)}, jmp.DynamicLossScale(2.0**15)
    xs = jnp.ones((DEVICES, 2)).at[3].set(100.0)
    grad_fn = jmp.scaled_value_and_grad(half_loss, loss_scale=scale, max_retries=9, axis_name="batch")
    if mapped == "pmap":
        _, grads, state = jax.pmap(grad_fn, "batch", in_axes=(None, 0))(params, xs)
        np.testing.assert_array_equal(state.loss_scale, np.full(DEVICES, 2.0**9))
    else:

        def per_device(params, xs):
            params = jax.lax.pcast(params, "batch", to="varying")
            loss, grads, state = grad_fn(params, xs[0])
            return loss[None], jax.tree.map(lambda g: g[None], grads), state

        specs = (P("batch"), P("batch"), P())
        run = jax.jit(jax.shard_map(per_device, mesh=mesh(), in_specs=(P(), P("batch")), out_specs=specs))
        _, grads, state = run(params, xs)
        assert float(state.loss_scale) == 2.0**9
    np.testing.assert_array_equal(grads["w"], xs * 2.0**9)


@every_scale
def test_retry_needs_a_scale_that_moves(make):
    """Only a dynamic scale can be lowered; others are refused by name."""
    scale = make()
    grad_fn = jmp.scaled_value_and_grad(lambda p: p, loss_scale=scale, max_retries=2)
    if isinstance(scale, jmp.DynamicLossScale):
        assert_identical(grad_fn(1.0)[2], jax.tree.map(jnp.asarray, scale))
        return
    with pytest.raises(
        jmp.errors.InvalidLossScaleError, match=r"^max_retries=2 needs a DynamicLossScale, .*(NoOp|Static)LossScale"
    ):
        grad_fn(1.0)


def test_retry_stops_at_the_floor():
    """At the lowest scale further retries change nothing, and the step is left to be skipped."""
    scale = jmp.DynamicLossScale(4.0, min_loss_scale=2.0)
    _, grads, state = jmp.scaled_value_and_grad(half_loss, max_retries=5, loss_scale=scale)(
        {"w": jnp.ones(2)}, jnp.full(2, 60000.0)
    )
    assert not jmp.all_finite(grads)
    assert float(state.loss_scale) == 2
