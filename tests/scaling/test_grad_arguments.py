"""Gradients of a scaled loss: every kind of argument and output, a scale found in any state, what is refused."""

import functools
import inspect
import re
from typing import NamedTuple

import flax.linen
import flax.nnx
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparisons import assert_identical, standard
from support.loss_scales import unscaled

import jmp_lite as jmp

# --- Arguments ---


def loss_of_many(a, b, c, *, factor=1.0):
    return factor * (jnp.sum(a) + 2 * jnp.sum(b) + 3 * jnp.sum(c))


@pytest.mark.parametrize("argnums", [0, np.int64(2), -1, (0,), (0, 2), (2, 0), (-1, 1), [1], ()], ids=str)
def test_argnums(argnums):
    """Gradients are those of the arguments named, in that order, alone or as a tuple, as in JAX."""
    args, scale = (jnp.ones(2), jnp.ones(3), jnp.ones(4)), jmp.DynamicLossScale(8.0)
    grad_fn = jmp.scaled_value_and_grad(loss_of_many, argnums, loss_scale=scale)
    if isinstance(argnums, tuple) and not argnums:
        assert grad_fn(*args) == (jnp.float32(20), ())
        return
    expected = jax.value_and_grad(loss_of_many, argnums)(*args)
    loss, grads = grad_fn(*args)
    assert_identical((loss, unscaled(grads, scale)), expected)


@pytest.mark.parametrize("argnums", [3, -4, (0, 3), (1, 1), (0, -3)], ids=str)
def test_argnums_that_do_not_fit(argnums):
    """Positions out of range or named twice are refused, not answered with zeros."""
    with pytest.raises(TypeError, match=r"^argnums=.* (does not fit a call with 3|names an argument twice)"):
        jmp.scaled_value_and_grad(loss_of_many, argnums, loss_scale=jmp.NoOpLossScale())(1.0, 2.0, 3.0)


@pytest.mark.parametrize("argnums", [0.0, "a", None, (0, "a")], ids=repr)
def test_argnums_that_are_no_positions(argnums):
    with pytest.raises(TypeError, match=r"^argnums must be an integer or a sequence of integers, got "):
        jmp.scaled_value_and_grad(loss_of_many, argnums, loss_scale=jmp.NoOpLossScale())(1.0, 2.0, 3.0)


@pytest.mark.parametrize("max_retries", [-1, 1.5, None, "2"], ids=repr)
def test_retries_are_counted_in_whole_numbers(max_retries):
    with pytest.raises(jmp.errors.InvalidStepError, match="max_retries must be a whole number, at least 0, got "):
        jmp.scaled_value_and_grad(loss_of_many, max_retries=max_retries, loss_scale=jmp.DynamicLossScale(8.0))


def test_keywords_reach_the_function():
    """Keyword arguments are passed on, are not differentiated, and may be traced."""
    args = (jnp.ones(2), jnp.ones(3), jnp.ones(4))
    grad_fn = jax.jit(jmp.scaled_value_and_grad(loss_of_many, loss_scale=jmp.StaticLossScale(4.0)))
    loss, grads = grad_fn(*args, factor=jnp.float32(2))
    assert float(loss) == 40
    np.testing.assert_array_equal(grads, [8, 8])


MAKERS = {
    "scaled_value_and_grad": jmp.scaled_value_and_grad,
    "accumulate_gradients": lambda fun, **settings: jmp.accumulate_gradients(fun, 2, **settings),
}
both_makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@both_makers
def test_signature_is_that_of_the_function(make):
    """Nothing is added to the parameters of the function, its name or its docstring."""

    def loss_fn(params: dict, /, x, *rest, factor: float = 1.0, **options) -> float:
        """A loss."""

    grad_fn = make(loss_fn, loss_scale=jmp.NoOpLossScale())
    assert inspect.signature(grad_fn) == inspect.signature(loss_fn)
    assert (grad_fn.__name__, grad_fn.__doc__) == ("loss_fn", "A loss.")


@both_makers
def test_keywords_named_like_ours_reach_the_function(make):
    """A function may have keywords `state`, `loss_scale` and `name`: ours are given when the gradient is made."""
    seen = {}

    def loss_fn(w, x, *, state, loss_scale, name):
        seen.update(name=name)
        return state * loss_scale * jnp.mean(w * x)

    grad_fn = make(loss_fn, loss_scale=jmp.StaticLossScale(4.0))
    loss, grad = grad_fn(jnp.float32(1), jnp.ones(2), state=jnp.float32(3), loss_scale=jnp.float32(5), name="theirs")
    assert (float(loss), float(grad), seen) == (15, 60, {"name": "theirs"})


@pytest.mark.parametrize("aux", [{"logits": 1.5, "count": 3}, None, "text", [jnp.float16(2)]], ids=str)
def test_auxiliary_output_is_untouched(aux):
    """`has_aux` returns what the function returned, of any type, without scaling it."""
    (loss, seen), grad = jmp.scaled_value_and_grad(
        lambda p: (p * p, aux), has_aux=True, loss_scale=jmp.StaticLossScale(2.0)
    )(3.0)
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
    loss, grads = jmp.scaled_value_and_grad(mixed_loss, loss_scale=scale)(params)
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
    loss, grad = jmp.scaled_value_and_grad(lambda p: jnp.abs(p) ** 2, loss_scale=jmp.StaticLossScale(8.0))(
        jnp.complex64(1 + 1j)
    )
    np.testing.assert_allclose(complex(grad) / 8, 2 - 2j, rtol=4 * 2**-23)  # abs: a root, a square and a division
    np.testing.assert_allclose(float(loss), 2, rtol=2 * 2**-23)


def test_empty_parameters():
    """A model without parameters still has a loss."""
    loss, grads = jmp.scaled_value_and_grad(lambda p, x: x, loss_scale=jmp.DynamicLossScale())({}, 2.0)
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
    with pytest.raises(jmp.errors.InvalidFunctionError) as error:
        jmp.scaled_value_and_grad(fun, loss_scale=jmp.NoOpLossScale())(1.0)
    assert str(error.value) == (
        f"The loss must be a real floating-point scalar, got {described}. Reduce it, for example with jnp.mean, or "
        "return further values with has_aux=True."
    )


def test_missing_aux():
    """`has_aux` with a function that returns no pair says so."""
    with pytest.raises(
        jmp.errors.InvalidFunctionError,
        match=r"^With has_aux=True the function must return \(loss, aux\), got float32\[\]\. ",
    ):
        jmp.scaled_value_and_grad(lambda p: p, has_aux=True, loss_scale=jmp.NoOpLossScale())(1.0)


@pytest.mark.parametrize("output", [None, "x", {"loss": 1.0}, (1.0, 2.0)], ids=str)
def test_output_that_is_no_number_is_named(output):
    """A forgotten has_aux, a forgotten return: the message says what came back."""
    with pytest.raises(jmp.errors.InvalidFunctionError, match=re.escape(f"got {output!r}. ")):
        jmp.scaled_value_and_grad(lambda w: output, loss_scale=jmp.NoOpLossScale())(1.0)


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

    def grad_fn(p, s):
        return jmp.scaled_value_and_grad(lambda p: jnp.sum(p["w"]), loss_scale=s)(p)

    _, grads = (grad_fn if kind == "nested" else jax.jit(grad_fn))({"w": jnp.ones(2)}, state)
    np.testing.assert_array_equal(grads["w"], [8, 8])


def test_two_scales_need_a_name():
    """Two scales without a name is an error that gives both paths; a segment of the path picks one."""
    pair = {"a": jmp.loss_scaled(optax.sgd(1.0), jmp.StaticLossScale(2.0)), "b": jmp.loss_scaled(optax.sgd(1.0))}
    state = optax.multi_transform(pair, {"w": "a", "v": "b"}).init({"w": 1.0, "v": 1.0})
    with pytest.raises(jmp.errors.LossScaleNotFoundError) as error:
        jmp.scaled_value_and_grad(lambda p: p, loss_scale=state)(1.0)
    assert str(error.value) == (
        "2 loss scales in the state: 'inner_states/a/inner_state/loss_scale', 'inner_states/b/inner_state/loss_scale'. "
        "Pass name= with a segment that only one path has."
    )
    for name, scale in {"a": 2, "b": 2**15}.items():
        _, grad = jmp.scaled_value_and_grad(lambda p: p, name=name, loss_scale=state)(1.0)
        assert float(grad) == scale
    with pytest.raises(jmp.errors.LossScaleNotFoundError):
        jmp.scaled_value_and_grad(lambda p: p, name="inner_state", loss_scale=state)(1.0)
    with pytest.raises(jmp.errors.LossScaleNotFoundError, match=r"named 'c' \(there are: 'inner_states/a/"):
        jmp.scaled_value_and_grad(lambda p: p, name="c", loss_scale=state)(1.0)


def test_a_retry_lowers_the_named_scale_alone():
    state = {"a": jmp.DynamicLossScale(8.0), "b": jmp.DynamicLossScale(8.0)}
    grad_fn = jmp.scaled_value_and_grad(lambda p: p * jnp.inf, name="a", loss_scale=state, max_retries=1)
    _, _, lowered = grad_fn(1.0)
    assert [float(lowered[name].loss_scale) for name in "ab"] == [4, 8]


def test_no_scale_in_the_state():
    """A state without a scale is named, with the remedy."""
    with pytest.raises(
        jmp.errors.LossScaleNotFoundError,
        match=r"^No loss scale in the state, which is of type dict\. .*jmp_lite\.loss_scaled",
    ):
        jmp.scaled_value_and_grad(lambda p: p, loss_scale={"w": jnp.ones(2)})(1.0)


NO_SCALES = {
    "loss_scale= is missing. Give it with the function": {},
    "which is of type dict": {"loss_scale": {}},
    "a number. Write DynamicLossScale(1024.0)": {"loss_scale": 1024.0},
    "the class DynamicLossScale. Call it: DynamicLossScale()": {"loss_scale": jmp.DynamicLossScale},
    "the optimizer. Its state has the scale: opt_state = tx.init": {"loss_scale": jmp.loss_scaled(optax.sgd(0.1))},
}


@both_makers
@pytest.mark.parametrize(("said", "given"), NO_SCALES.items(), ids=NO_SCALES)
def test_what_holds_no_scale_is_refused_when_the_gradient_is_made(make, said, given):
    """The message says where one comes from; a bare number is not one."""
    pattern = f"{re.escape(said)}.*Pass a loss scale, or the state of an optimizer"
    with pytest.raises(jmp.errors.LossScaleNotFoundError, match=pattern):
        make(lambda w: w * w, **given)


@both_makers
@pytest.mark.parametrize("fun", [None, "mixed_float16", 3.0, {"w": 1.0}], ids=repr)
def test_what_is_no_function_is_refused_when_the_gradient_is_made(make, fun):
    with pytest.raises(jmp.errors.InvalidFunctionError, match=r"takes a function, got "):
        make(fun, loss_scale=jmp.NoOpLossScale())


MODEL = flax.nnx.Linear(2, 2, rngs=flax.nnx.Rngs(0))
MODULES = {
    "an argument": lambda make: make(lambda w, m: w)(1.0, MODEL),
    "among arguments": lambda make: make(lambda w, x: w)(1.0, {"m": [MODEL]}),
    "a keyword": lambda make: make(lambda w, x, m: w)(1.0, jnp.ones(4), m=MODEL),
    "the function": lambda make: make(MODEL)(jnp.ones((2, 2)), jnp.ones(4)),
    "a method": lambda make: make(MODEL.__call__)(jnp.ones((2, 2)), jnp.ones(4)),
}


@both_makers
@pytest.mark.parametrize("case", MODULES)
def test_modules_of_nnx_have_functions_of_their_own(make, case):
    """Their statistics and random counts would stay as they are."""
    with pytest.raises(jmp.errors.InvalidFunctionError, match=r"with the NNX module Linear.*Use jmp_lite\.nnx\."):
        MODULES[case](functools.partial(make, loss_scale=jmp.NoOpLossScale()))
