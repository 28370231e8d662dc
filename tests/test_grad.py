"""Gradients of a scaled loss: true losses, exact gradients, every kind of argument, every transformation, retries."""

import functools
from typing import NamedTuple

import flax.linen
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from support import DEVICES, assert_identical, compilations, mesh, standard

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
    """A float32 loss of products that are exact in float32 for small integers."""
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


def unscaled(grads, scale):
    return jax.tree.map(lambda g: g / scale.loss_scale, grads)


# --- The loss and the gradients ---


@every_scale
def test_loss_is_true_and_gradients_are_scaled(make, problem):
    """The loss is the unscaled one and the gradients are the scale times the true ones, exactly (powers of two)."""
    scale, (params, x) = make(), problem
    expected, true_grads = jax.value_and_grad(quadratic)(params, x)
    for transform in (lambda f: f, jax.jit):
        loss, grads = transform(jmp.scaled_value_and_grad(quadratic))(params, x, state=scale)
        assert_identical(loss, expected)
        assert_identical(unscaled(grads, scale), true_grads)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn"])
def test_loss_is_float32_also_on_an_overflowing_step(dtype):
    """A loss of any dtype comes back as its own value in float32 although its gradients are infinite."""
    params = jnp.full(2, 300.0).astype(dtype)
    scale = jmp.DynamicLossScale(2.0**20 if dtype.startswith("float16") else 2.0**126)

    def loss_fn(p):
        return jnp.sum(p.astype(jnp.float32) * 2.0**4).astype(dtype)

    loss, grads = jmp.scaled_value_and_grad(loss_fn)(params, state=scale)
    assert loss.dtype == jnp.float32
    assert_identical(loss, loss_fn(params).astype(jnp.float32))
    assert not jnp.isfinite(grads.astype(jnp.float32)).any() or dtype == "float8_e4m3fn"


def test_double_precision_loss_stays_double():
    """Under x64 a float64 loss and its gradients keep their precision."""
    with jax.enable_x64(True):
        loss, grads = jmp.scaled_value_and_grad(lambda p: p / 3)(jnp.float64(1), state=jmp.DynamicLossScale(2.0**10))
        assert loss.dtype == grads.dtype == jnp.float64
        assert float(loss) == 1 / 3
        loss, grads = jmp.scaled_value_and_grad(lambda p: p / 3)(jnp.float32(1), state=jmp.DynamicLossScale(2.0**10))
        assert loss.dtype == grads.dtype == jnp.float32


def test_gradient_is_exact_on_the_growth_step():
    """The gradients of a step are unscaled with the scale that made them, also when the scale grows on it."""
    params = jnp.array([1.0, 2.0])
    tx = jmp.loss_scaled(optax.sgd(1.0), jmp.DynamicLossScale(1024.0, period=1))
    state = tx.init(params)
    for growths in range(1, 4):
        loss, grads = jmp.scaled_value_and_grad(lambda p: jnp.sum(p**2))(params, state=state)
        assert float(loss) == 5
        updates, state = tx.update(grads, state, params)
        np.testing.assert_array_equal(updates, [-2, -4])
        assert float(state.loss_scale.loss_scale) == 1024 * 2**growths


# --- Arguments ---


def loss_of_many(a, b, c, *, factor=1.0):
    return factor * (jnp.sum(a) + 2 * jnp.sum(b) + 3 * jnp.sum(c))


@pytest.mark.parametrize("argnums", [0, 2, -1, (0,), (0, 2), (2, 0), (-1, 1), [1], ()], ids=str)
def test_argnums(argnums):
    """Gradients are those of the arguments named, in that order, alone or as a tuple, as in JAX."""
    args, scale = (jnp.ones(2), jnp.ones(3), jnp.ones(4)), jmp.DynamicLossScale(8.0)
    grad_fn = jmp.scaled_value_and_grad(loss_of_many, argnums)
    if argnums == ():
        assert grad_fn(*args, state=scale) == (jnp.float32(20), ())
        return
    expected = jax.value_and_grad(loss_of_many, argnums)(*args)
    loss, grads = grad_fn(*args, state=scale)
    assert_identical((loss, unscaled(grads, scale)), expected)


@pytest.mark.parametrize("argnums", [3, -4, (0, 3), (1, 1), (0, -3)], ids=str)
def test_argnums_that_do_not_fit(argnums):
    """Positions out of range or named twice are refused, not answered with zeros."""
    with pytest.raises(TypeError, match=r"^argnums=.* (does not fit a call with 3|names an argument twice)"):
        jmp.scaled_value_and_grad(loss_of_many, argnums)(1.0, 2.0, 3.0, state=jmp.NoOpLossScale())


def test_keywords_reach_the_function():
    """Keyword arguments are passed on, are not differentiated, and may be traced."""
    args = (jnp.ones(2), jnp.ones(3), jnp.ones(4))
    grad_fn = jax.jit(jmp.scaled_value_and_grad(loss_of_many))
    loss, grads = grad_fn(*args, factor=jnp.float32(2), state=jmp.StaticLossScale(4.0))
    assert float(loss) == 40
    np.testing.assert_array_equal(grads, [8, 8])


@pytest.mark.parametrize("aux", [{"logits": 1.5, "count": 3}, None, "text", [jnp.float16(2)]], ids=str)
def test_auxiliary_output_is_untouched(aux):
    """`has_aux` returns what the function returned, of any type, without scaling it."""
    (loss, seen), grad = jmp.scaled_value_and_grad(lambda p: (p * p, aux), has_aux=True)(
        3.0, state=jmp.StaticLossScale(2.0)
    )
    assert float(loss) == 9
    assert float(grad) == 12
    assert jax.tree.structure(seen) == jax.tree.structure(aux)
    assert jax.tree.leaves(seen) == jax.tree.leaves(aux)


class Mixed(NamedTuple):
    weights: object
    rest: object


def mixed_loss(p):
    noise = jax.random.uniform(p.rest["key"]) * 0
    steps = p.rest["step"].astype(jnp.float32)
    return jnp.sum(p.weights["w"]) * steps + p.weights["scalar"] + jnp.where(p.rest["on"], noise, 0.0)


def test_leaves_that_cannot_be_differentiated_get_float0(key):
    """Integers, booleans, typed keys, float0 and None in the parameters need no care; their gradients are float0."""
    rest = {"step": jnp.int32(2), "on": jnp.array(True), "key": key, "n": 5, "flag": True, "none": None}
    rest["float0"] = np.zeros(3, jax.dtypes.float0)
    params = Mixed({"w": jnp.ones(3), "scalar": 1.5, "np": np.float32(2), "half": jnp.float16(1)}, rest)
    scale = jmp.DynamicLossScale(4.0)
    loss, grads = jmp.scaled_value_and_grad(mixed_loss)(params, state=scale)
    assert float(loss) == 7.5
    np.testing.assert_array_equal(grads.weights["w"], [8, 8, 8])
    assert float(grads.weights["scalar"]) == 4
    assert grads.weights["half"].dtype == jnp.float16
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    for name, grad in grads.rest.items():
        assert (
            grad is None if name == "none" else (grad.dtype == jax.dtypes.float0 and grad.shape == np.shape(rest[name]))
        )


def test_complex_parameters():
    """Complex parameters get JAX's gradient times the scale: |p|^2 at 1+1j gives 2-2j."""
    loss, grad = jmp.scaled_value_and_grad(lambda p: jnp.abs(p) ** 2)(
        jnp.complex64(1 + 1j), state=jmp.StaticLossScale(8.0)
    )
    np.testing.assert_allclose(complex(grad) / 8, 2 - 2j, rtol=4 * 2**-23)  # abs: a root, a square and a division
    np.testing.assert_allclose(float(loss), 2, rtol=2 * 2**-23)


def test_empty_parameters():
    """A model without parameters still has a loss."""
    loss, grads = jmp.scaled_value_and_grad(lambda p, x: x)({}, 2.0, state=jmp.DynamicLossScale())
    assert (float(loss), grads) == (2, {})


BAD_LOSSES = {
    "int32[]": lambda p: jnp.int32(3),
    "float32[2]": lambda p: p * jnp.ones(2),
    "complex64[]": lambda p: p * 1j,
    "bool[]": lambda p: p > 0,
}


@pytest.mark.parametrize(("described", "fun"), BAD_LOSSES.items(), ids=BAD_LOSSES)
def test_loss_that_is_not_a_real_number(described, fun):
    """A loss of another type or shape is quoted, with what to do."""
    with pytest.raises(jmp.LossDtypeError) as error:
        jmp.scaled_value_and_grad(fun)(1.0, state=jmp.NoOpLossScale())
    assert str(error.value) == (
        f"The loss must be a real floating-point scalar, got {described}. Reduce it, for example with jnp.mean, or "
        "return further values with has_aux=True."
    )


def test_missing_aux():
    """`has_aux` with a function that returns no pair says so."""
    with pytest.raises(jmp.LossDtypeError, match=r"^With has_aux=True the function must return \(loss, aux\), got "):
        jmp.scaled_value_and_grad(lambda p: p, has_aux=True)(1.0, state=jmp.NoOpLossScale())


# --- Where the scale is found ---


def states_with_one_scale():
    params = {"w": jnp.ones(2)}
    tx = jmp.loss_scaled(standard(optax.adam(1e-3)), jmp.DynamicLossScale(8.0))
    apply_fn = flax.linen.Dense(2).apply
    return {
        "scale": jmp.DynamicLossScale(8.0),
        "optimizer": tx.init(params),
        "chain": optax.chain(optax.clip(1.0), tx).init(params),
        "masked": optax.masked(tx, {"w": True}).init(params),
        "MultiSteps": optax.MultiSteps(tx, 2).init(params),
        "multi_transform": optax.multi_transform({"a": tx, "b": optax.sgd(1.0)}, {"w": "a"}).init(params),
        "inject_hyperparams": optax.inject_hyperparams(
            lambda lr: jmp.loss_scaled(optax.sgd(lr), jmp.DynamicLossScale(8.0))
        )(lr=1.0).init(params),
        "train state": flax.training.train_state.TrainState.create(apply_fn=apply_fn, params=params, tx=tx),
        "nested": {"a": [1, {"b": (tx.init(params), None)}]},
    }


@pytest.mark.parametrize("kind", states_with_one_scale())
def test_scale_is_found_anywhere(kind):
    """The scale is found in any state, whatever is nested around it, under jit too."""
    state = states_with_one_scale()[kind]
    grad_fn = jmp.scaled_value_and_grad(lambda p: jnp.sum(p["w"]))
    _, grads = (
        jax.jit(lambda p, s: grad_fn(p, state=s))({"w": jnp.ones(2)}, state)
        if kind != "nested"
        else grad_fn({"w": jnp.ones(2)}, state=state)
    )
    np.testing.assert_array_equal(grads["w"], [8, 8])


def test_two_scales_need_a_name():
    """Two scales without a name is an error that gives both paths; a segment of the path picks one."""
    pair = {"a": jmp.loss_scaled(optax.sgd(1.0), jmp.StaticLossScale(2.0)), "b": jmp.loss_scaled(optax.sgd(1.0))}
    state = optax.multi_transform(pair, {"w": "a", "v": "b"}).init({"w": 1.0, "v": 1.0})
    with pytest.raises(jmp.AmbiguousLossScaleError) as error:
        jmp.scaled_value_and_grad(lambda p: p)(1.0, state=state)
    assert str(error.value) == (
        "2 loss scales in the state: 'inner_states/a/inner_state/loss_scale', 'inner_states/b/inner_state/loss_scale'. "
        "Pass name= with a segment that only one path has."
    )
    for name, scale in {"a": 2, "b": 2**15}.items():
        _, grad = jmp.scaled_value_and_grad(lambda p: p, name=name)(1.0, state=state)
        assert float(grad) == scale
    with pytest.raises(jmp.AmbiguousLossScaleError):
        jmp.scaled_value_and_grad(lambda p: p, name="inner_state")(1.0, state=state)
    with pytest.raises(jmp.LossScaleNotFoundError, match=r"named 'c' \(there are: 'inner_states/a/"):
        jmp.scaled_value_and_grad(lambda p: p, name="c")(1.0, state=state)


def test_no_scale_in_the_state():
    """A state without a scale is named, with the remedy."""
    with pytest.raises(
        jmp.LossScaleNotFoundError, match=r"^No loss scale in the state, a dict\. .*jmp_lite\.loss_scaled"
    ):
        jmp.scaled_value_and_grad(lambda p: p)(1.0, state={"w": jnp.ones(2)})


# --- Transformations ---


def test_transformations_agree(problem, rng):
    """vmap over examples, remat inside, scan over steps, pmap and shard_map give what the plain call gives."""
    params, _ = problem
    scale, xs = jmp.DynamicLossScale(2.0**10), integers(rng, DEVICES, 3)
    grad_fn = jmp.scaled_value_and_grad(quadratic)
    call = lambda x: grad_fn(params, x, state=scale)  # noqa: E731
    expected = jax.tree.map(lambda *rows: jnp.stack(rows), *[call(x) for x in xs])
    assert_identical(jax.vmap(call)(xs), expected)
    assert_identical(jax.lax.scan(lambda _, x: (None, call(x)), None, xs)[1], expected)
    assert_identical(jax.pmap(call)(xs), expected)
    remat = jmp.scaled_value_and_grad(jax.checkpoint(quadratic))
    assert_identical(jax.jit(jax.vmap(lambda x: remat(params, x, state=scale)))(xs), expected)

    def per_device(params, x, scale):
        params = jax.lax.pcast(params, "batch", to="varying")  # else the gradient is summed over devices
        return jax.tree.map(lambda v: v[None], grad_fn(params, x[0], state=scale))

    mapped = jax.shard_map(per_device, mesh=mesh(), in_specs=(P(), P("batch"), P()), out_specs=P("batch"))
    assert_identical(jax.jit(mapped)(params, xs, scale), expected)


def test_gradient_of_gradient(problem):
    """The scaled gradient can itself be differentiated (Hessian-vector products)."""
    params, x = problem
    scale = jmp.DynamicLossScale(2.0**10)
    inner = lambda p: jnp.sum(jmp.scaled_value_and_grad(quadratic)(p, x, state=scale)[1]["w"])  # noqa: E731
    np.testing.assert_array_equal(jax.grad(inner)(params)["w"], 2 * x * 2.0**10)


# --- Retries ---


def manual_retry(fun, params, x, scale, max_retries):
    """Halving by hand until the gradients are finite."""
    for tries in range(max_retries + 1):
        loss, grads = jmp.scaled_value_and_grad(fun)(params, x, state=scale)
        if tries == max_retries or jmp.all_finite(grads):
            return loss, grads, scale
        scale = scale.adjust(False)
    raise AssertionError


@pytest.mark.parametrize("size", [1.0, 3.0, 1000.0, 60000.0, np.inf])
@pytest.mark.parametrize("max_retries", [1, 3, 20])
def test_retries_agree_with_halving_by_hand(size, max_retries):
    """Loss, gradients and the lowered scale are those of a loop of so many retries that halves by hand."""
    params, x = {"w": jnp.full(2, 0.5)}, jnp.array([size, 1.0])
    scale = jmp.DynamicLossScale(2.0**15)
    grad_fn = jmp.scaled_value_and_grad(half_loss, max_retries=max_retries)
    expected = manual_retry(half_loss, params, x, jax.tree.map(jnp.asarray, scale), max_retries)
    assert_identical(jax.jit(grad_fn)(params, x, state=scale), expected)


def test_retry_is_one_compiled_step():
    """A step that retries is traced and compiled once, whether it does retry or not, and returns a new state."""
    tx = jmp.loss_scaled(optax.sgd(2.0**-10), jmp.DynamicLossScale(2.0**15))
    params, traces = {"w": jnp.full(2, 0.5)}, []

    @jax.jit
    def step(params, state, x):
        traces.append(x)
        grad_fn = jmp.scaled_value_and_grad(lambda *a: (half_loss(*a), x), has_aux=True, max_retries=8)
        (loss, aux), grads, state = grad_fn(params, x, state=state)
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
    grad_fn = jmp.scaled_value_and_grad(half_loss, max_retries=9, axis_name="batch")
    if mapped == "pmap":
        _, grads, state = jax.pmap(functools.partial(grad_fn, state=scale), "batch", in_axes=(None, 0))(params, xs)
        np.testing.assert_array_equal(state.loss_scale, np.full(DEVICES, 2.0**9))
    else:

        def per_device(params, xs):
            params = jax.lax.pcast(params, "batch", to="varying")
            loss, grads, state = grad_fn(params, xs[0], state=scale)
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
    grad_fn = jmp.scaled_value_and_grad(lambda p: p, max_retries=2)
    if isinstance(scale, jmp.DynamicLossScale):
        assert_identical(grad_fn(1.0, state=scale)[2], jax.tree.map(jnp.asarray, scale))
        return
    with pytest.raises(
        jmp.InvalidLossScaleError, match=r"^max_retries=2 needs a DynamicLossScale, .*(NoOp|Static)LossScale"
    ):
        grad_fn(1.0, state=scale)


def test_retry_stops_at_the_floor():
    """At the lowest scale further retries change nothing, and the step is left to be skipped."""
    scale = jmp.DynamicLossScale(4.0, min_loss_scale=2.0)
    _, grads, state = jmp.scaled_value_and_grad(half_loss, max_retries=5)(
        {"w": jnp.ones(2)}, jnp.full(2, 60000.0), state=scale
    )
    assert not jmp.all_finite(grads)
    assert float(state.loss_scale) == 2


@pytest.mark.parametrize("output", [None, "x", {"loss": 1.0}, (1.0, 2.0)], ids=str)
def test_output_that_is_no_number_is_named(output):
    """A forgotten has_aux, a forgotten return: the message says what came back."""
    with pytest.raises(jmp.LossDtypeError, match=f"got {type(output).__name__}"):
        jmp.scaled_value_and_grad(lambda w: output)(1.0, state=jmp.NoOpLossScale())


def test_forgotten_state_is_named():
    """Without state there is no loss scale, and the message says where one comes from."""
    with pytest.raises(jmp.LossScaleNotFoundError, match="Pass a loss scale, or the state of an optimiser"):
        jmp.scaled_value_and_grad(lambda w: w * w)(1.0)
