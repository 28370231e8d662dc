"""What a training step must not do in silence: each slip is an error of ours, or changes nothing and is counted."""

import collections
import functools
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from support.comparisons import DEVICES, assert_identical, fused, slow_but_for, two_calls

import jmp_lite as jmp
from jmp_lite import errors
from jmp_lite.scaling import _verdict

#: What happens to parameters of 16 bits is asked here of plain optimizers.
pytestmark = pytest.mark.filterwarnings("ignore:Parameters of 16 bits")

PARAMS = {"a": jnp.ones((2, 3)), "b": jnp.zeros(4)}
forms = pytest.mark.parametrize("form", [fused, two_calls], ids=["fused", "two calls"])
runs = pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])


def sgd(scale=1.0, **options):
    return jmp.loss_scaled(optax.sgd(0.5, **options), jmp.StaticLossScale(scale))


def step_of(tx, form):
    return form(tx)


# --- Arguments that do not belong together ---


@forms
@pytest.mark.parametrize("optimizer", [optax.sgd(0.5), optax.adam(0.5)], ids=["sgd", "adam"])
def test_integer_gradients_of_a_parameter_are_refused(optimizer, form):
    """They would count as a good step, and move nothing, or be added as they are."""
    tx = jmp.loss_scaled(optimizer)
    with pytest.raises(errors.InvalidStepError, match=r"gradient of 'b' is int32\[4\], and the parameter float32\[4\]"):
        form(tx)(PARAMS, tx.init(PARAMS), PARAMS | {"b": jnp.ones(4, jnp.int32)})


def test_integer_gradients_are_refused_without_parameters():
    """Nothing says there that the parameter is an integer too."""
    tx = jmp.loss_scaled(optax.sgd(0.5))
    with pytest.raises(errors.InvalidStepError, match=r"gradient of 'b' is int32\[4\], and params are not given"):
        tx.update(PARAMS | {"b": jnp.ones(4, jnp.int32)}, tx.init(PARAMS))


@forms
def test_integer_gradients_of_integers_move_nothing(form):
    params = PARAMS | {"n": jnp.arange(3)}
    tx = sgd(4.0)
    new, _ = form(tx)(params, tx.init(params), params)
    assert_identical(new["n"], params["n"])


@pytest.mark.covering(2)
@runs
@forms
@pytest.mark.parametrize("around", [lambda tx: tx, optax.chain], ids=["alone", "chain"])
def test_updates_that_are_whole_numbers_are_applied(run, form, around):
    signs = optax.stateless(lambda updates, _: jax.tree.map(lambda u: jnp.sign(u).astype(jnp.int8), updates))
    tx = around(jmp.loss_scaled(signs, jmp.StaticLossScale(4.0)))
    with jax.numpy_dtype_promotion("standard"):
        new, _ = run(form(tx))(PARAMS, tx.init(PARAMS), PARAMS)
    assert_identical(new, {"a": jnp.full((2, 3), 2.0), "b": jnp.zeros(4)})


@runs
def test_numbers_that_an_optimizer_returns_for_its_state_take_the_dtype_of_the_state(run):
    inner = optax.GradientTransformation(
        lambda _: {"first": jnp.array(True)}, lambda u, s, p=None: (u, {"first": False})
    )
    tx = jmp.loss_scaled(inner)
    _, state = run(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    assert state.inner_state["first"].dtype == jnp.bool_
    assert not state.inner_state["first"]


TX = sgd()
STATE = TX.init(PARAMS)
ADAM = jmp.loss_scaled(optax.adam(1e-3))
OTHER = PARAMS | {"b": jnp.ones(5)}
WRONG = {
    "an optimizer that was not called": (lambda: jmp.loss_scaled(optax.adam), r"the function adam; call it"),
    "no optimizer": (lambda: jmp.loss_scaled(3e-4), r"got 0\.0003"),
    "an optimizer that was not called, in the step": (
        lambda: jmp.apply_gradients(optax.sgd, PARAMS, STATE, PARAMS),
        "the function sgd; call it",
    ),
    "gradients first": (lambda: jmp.apply_gradients(PARAMS, TX, STATE, PARAMS), "apply_gradients takes an Optax"),
    "another tree": (
        lambda: jmp.apply_gradients(TX, {"c": jnp.ones(2)}, STATE, PARAMS),
        "'c' is only in the gradients and 'a' is",
    ),
    "another depth": (lambda: jmp.apply_gradients(TX, PARAMS | {"b": None}, STATE, PARAMS["a"]), "are different trees"),
    "another shape": (
        lambda: jmp.apply_gradients(TX, PARAMS | {"b": jnp.ones(5)}, STATE, PARAMS),
        r"'b' is float32\[5\], but the parameter is float32\[4\]",
    ),
    "parameters and gradients of one name swapped": (
        lambda: jmp.apply_gradients(TX, [jnp.ones(2)], STATE, (jnp.ones(2),)),
        "'0' is only|they are made of other classes",
    ),
    "a state of another optimizer": (
        lambda: jmp.apply_gradients(ADAM, PARAMS, STATE, PARAMS),
        r"another optimizer or of other parameters: .*'0/count' is only in the state that init makes",
    ),
    "a state of other parameters": (
        lambda: jmp.apply_gradients(ADAM, PARAMS, ADAM.init(OTHER), PARAMS),
        r"'0/mu/b' is float32\[5\] in the given state and float32\[4\] in the state that init makes",
    ),
    "a state of parameters that broadcast": (
        lambda: jmp.apply_gradients(ADAM, PARAMS, ADAM.init(PARAMS | {"b": jnp.ones(())}), PARAMS),
        r"'0/mu/b' is float32\[\] in the given state",
    ),
    "another tree, in two calls": (lambda: ADAM.update({"b": OTHER["b"]}, ADAM.init(PARAMS), PARAMS), "'a' is only in"),
    "another shape, in two calls": (lambda: TX.update(OTHER, STATE, PARAMS), "but the parameter is float32"),
    "a state of other parameters, in two calls": (
        lambda: optax.chain(ADAM).update(PARAMS, (ADAM.init(OTHER),), PARAMS),
        "or pass what the last step returned",
    ),
    "loss scaling twice": (lambda: jmp.loss_scaled(sgd(2.0)).init(PARAMS), "unscaled twice"),
    "loss scaling twice, far apart": (
        lambda: jmp.loss_scaled(optax.chain(optax.clip(1.0), optax.named_chain(("a", sgd(2.0))))).init(PARAMS),
        "unscaled twice",
    ),
    "a check under jit": (lambda: jax.jit(jmp.check_loss_scale)(STATE), "inside jit"),
    "a check of shapes": (lambda: jmp.check_loss_scale(jax.eval_shape(lambda: STATE)), "with shapes"),
    "a limit that is not a number": (lambda: jmp.check_loss_scale(STATE, max_skips="a"), "at least 1, got 'a'"),
    "no limit": (lambda: jmp.check_loss_scale(STATE, max_skips=0), "at least 1, got 0"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_arguments_that_do_not_belong_together_are_quoted(call, message):
    with pytest.raises(errors.InvalidStepError, match=message):
        call()


def test_what_an_optimizer_itself_raises_is_not_explained_away():
    def fail(updates, state, params=None):
        raise TypeError("its own")

    tx = jmp.loss_scaled(optax.GradientTransformation(optax.adam(0.1).init, fail))
    with pytest.raises(TypeError, match=r"^its own"):
        jmp.apply_gradients(tx, PARAMS, tx.init(PARAMS), PARAMS)


BARE = {
    "sgd": optax.sgd(0.1),
    "chain": optax.chain(optax.clip(1.0), optax.adam(1e-3)),
    "accumulation": optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    "hyperparameters": optax.inject_hyperparams(optax.sgd)(0.1),
}


@pytest.mark.parametrize("tx", BARE.values(), ids=BARE)
def test_scaled_gradients_reach_no_plain_optimizer(tx):
    with pytest.raises(errors.LossScaleNotFoundError, match=r"wrapped in jmp_lite\.loss_scaled"):
        jmp.apply_gradients(tx, PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("state", [lambda state: state, lambda state: (state,)], ids=["alone", "in a tuple"])
@pytest.mark.parametrize("tx", [*BARE.values(), optax.scale(-0.1)], ids=[*BARE, "stateless"])
def test_the_state_of_a_scaled_optimizer_does_for_no_plain_one(tx, state):
    """One that keeps no state would take scaled gradients as they are, and hand the loss scale on."""
    opt_state = state(jmp.loss_scaled(optax.adam(1e-3)).init(PARAMS))
    with pytest.raises(errors.InvalidStepError, match=r"is not in tx: .* Pass the tx whose init made the state"):
        jmp.apply_gradients(tx, PARAMS, opt_state, PARAMS)


@pytest.mark.parametrize("around", [lambda tx: tx, optax.chain, lambda tx: optax.MultiSteps(tx, 1)])
def test_an_optimizer_around_a_scaled_one_is_taken(around):
    tx = around(sgd())
    with jax.numpy_dtype_promotion("standard"):
        params, _ = jmp.apply_gradients(tx, PARAMS, tx.init(PARAMS), PARAMS)
    assert_identical(params["a"], jnp.full((2, 3), 0.5))


def test_an_optimizer_around_a_scaled_one_may_leave_a_step_out():
    tx = sgd()
    idle = optax.GradientTransformation(
        tx.init, lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), state)
    )
    params, state = jmp.apply_gradients(idle, PARAMS, tx.init(PARAMS), PARAMS)
    assert_identical((params, state), (PARAMS, tx.init(PARAMS)))


# --- Steps that are skipped ---


@runs
@forms
def test_a_skipped_step_keeps_every_bit(run, form, rng):
    bits = [0.0, -0.0, 1.0, -1.5e-38, np.inf, -np.inf, np.nan]
    params = {"w": jnp.asarray(rng.permutation(bits), jnp.float32), "h": jnp.asarray([-0.0, 1.0], jnp.float16)}
    params["c"] = jax.lax.complex(jnp.array([-0.0, 1.0]), jnp.array([-0.0, -0.0]))
    grads = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    tx = sgd(momentum=0.9)
    new, state = run(step_of(tx, form))(params, tx.init(params), grads)
    assert_identical(new, params)
    assert int(state.total_notfinite) == 1


# --- Updates that are not finite, of gradients that are ---


def constant(value):
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: jnp.full_like(u, value), updates))


def one_element(updates, _):
    return jax.tree.map(lambda u: u.at[(0,) * u.ndim].set(jnp.nan), updates)


# inner optimizer, dtype of parameters, whether all elements of a leaf stay as they are
BAD = {
    "nan": (constant(jnp.nan), jnp.float32, True),
    "inf": (constant(-jnp.inf), jnp.float32, True),
    "nan in float16": (constant(jnp.nan), jnp.float16, True),
    "one element in bfloat16": (optax.stateless(one_element), jnp.bfloat16, False),
    "a learning rate": (optax.sgd(jnp.inf), jnp.float32, True),
    "rounded hyperparameters": (
        optax.inject_hyperparams(optax.adamw, hyperparam_dtype=jnp.bfloat16)(1e-3, b2=0.9999),
        jnp.bfloat16,
        True,
    ),
}


@pytest.mark.covering(1)
@runs
@forms
@pytest.mark.parametrize(("inner", "dtype", "whole"), BAD.values(), ids=BAD)
def test_no_update_that_is_not_finite_reaches_a_parameter(inner, dtype, whole, form, run):
    tx = jmp.loss_scaled(inner)
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    grads = jax.tree.map(jnp.ones_like, params)
    step, state, new = run(step_of(tx, form)), tx.init(params), params
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            new, state = step(new, state, grads)
    assert all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(new))
    if whole:
        assert_identical(new, params)
    values = jmp.metrics(state)
    assert (bool(values["last_finite"]), int(values["total_notfinite"])) == (True, 0)
    assert (int(values["nonfinite_updates"]), int(values["total_nonfinite_updates"])) == (3, 3)
    with pytest.warns(errors.NonFiniteUpdateWarning, match=r"3 steps in a row\. .* eps"):
        jmp.check_loss_scale(state)
    with pytest.raises(errors.LossScaleStalledError, match=r"updates that are not finite .* 3 steps in a row"):
        jmp.check_loss_scale(state, max_skips=3)


@runs
def test_no_parameter_goes_beyond_its_dtype(run):
    """An update that is finite itself; in the plain form the sum is Optax's."""
    tx, params = jmp.loss_scaled(constant(1e6)), {"w": jnp.ones(3, jnp.float16)}
    new, state = run(step_of(tx, fused))(params, tx.init(params), params)
    assert_identical(new, params)
    assert int(state.nonfinite_updates) == 1


@runs
def test_good_updates_end_a_row_and_skipped_steps_do_not(run):
    tx = jmp.loss_scaled(optax.inject_hyperparams(optax.sgd)(1.0))
    params, state, seen = PARAMS, tx.init(PARAMS), []
    step = run(step_of(tx, fused))
    for rate, grad in ((jnp.inf, 1.0), (jnp.inf, jnp.nan), (jnp.inf, 1.0), (0.5, 1.0)):
        state.inner_state.hyperparams["learning_rate"] = jnp.asarray(rate, jnp.float32)
        params, state = step(params, state, jax.tree.map(lambda p, grad=grad: jnp.full_like(p, grad), PARAMS))
        seen.append((int(state.nonfinite_updates), int(state.total_nonfinite_updates), int(state.notfinite_count)))
    assert seen == [(1, 1, 0), (1, 1, 1), (2, 2, 0), (0, 2, 0)]


IN_FLOAT16 = ("adam", "adafactor", "novograd", "lamb", "rmsprop", "yogi")
OPTIMIZERS = [*((name, jnp.float16) for name in IN_FLOAT16), ("adafactor", jnp.bfloat16), ("novograd", jnp.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), OPTIMIZERS)
def test_optimizers_compute_in_float32_for_parameters_of_16_bits(name, dtype):
    """Without a gradient a parameter moves by its decay alone, whatever an eps of 1e-8 or 1e-30 is in its dtype."""
    tx = jmp.loss_scaled(getattr(optax, name)(1e-3))
    params = {"w": jnp.ones((8, 8), dtype)}
    state = tx.init(params)
    before = jax.tree.map(jnp.result_type, state)
    step = jax.jit(functools.partial(jmp.apply_gradients, tx))
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            params, state = step({"w": jnp.zeros((8, 8), dtype)}, state, params)
    assert np.all(np.abs(np.asarray(params["w"], np.float32) - 1) < 0.01)
    assert int(state.total_nonfinite_updates) == 0
    assert jax.tree.map(jnp.result_type, state) == before


# --- Line searches ---


@pytest.mark.parametrize("scale", slow_but_for({2.0**10}, [1.0, 2.0**10, 2.0**-3]))
def test_a_line_search_sees_unscaled_gradients(scale):
    def loss(p):
        return jnp.sum((p - jnp.arange(4.0)) ** 4 + jnp.cos(3 * p))

    inner = optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(10))
    tx = jmp.loss_scaled(inner, jmp.StaticLossScale(scale))
    params = expected = jnp.full(4, 3.0)
    state, plain = tx.init(params), inner.init(expected)

    @jax.jit
    def both(params, state, expected, plain):
        value, grads = jmp.scaled_value_and_grad(loss, loss_scale=state)(params)
        params, state = jmp.apply_gradients(tx, grads, state, params, value=value, grad=grads, value_fn=loss)
        value, grads = jax.value_and_grad(loss)(expected)
        updates, plain = inner.update(grads, plain, expected, value=value, grad=grads, value_fn=loss)
        return params, state, optax.apply_updates(expected, updates), plain

    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            params, state, expected, plain = both(params, state, expected, plain)
    np.testing.assert_allclose(params, expected, rtol=8 * np.finfo(np.float32).eps)


# --- Leaves that are not floating arrays ---

STATIC = {
    "functions": {"w": jnp.ones(2), "act": jnp.tanh},
    "strings": {"w": jnp.ones(2), "name": "dense"},
    "integers": {"w": jnp.ones(2), "count": jnp.arange(3), "size": 3},
    "keys": {"w": jnp.ones(2), "key": jax.random.key(0)},
    "none": {"w": jnp.ones(2), "bias": None},
}


@pytest.mark.covering(1)
@runs
@pytest.mark.parametrize("params", STATIC.values(), ids=STATIC)
@pytest.mark.parametrize("filtered", [False, True], ids=["whole", "filtered"])
def test_leaves_without_gradients_stay(params, filtered, run):
    def is_float(leaf):
        return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)

    tx = jmp.loss_scaled(optax.adam(0.5), jmp.StaticLossScale(4.0))
    static = {k: v for k, v in params.items() if not isinstance(v, jax.Array)}

    @run
    def step(arrays, state):
        whole = arrays | static
        loss, grads = jmp.scaled_value_and_grad(lambda p: jnp.sum(p["w"] ** 2), loss_scale=state)(whole)
        if filtered:
            grads = jax.tree.map(lambda g: g if is_float(g) else None, grads)
        new, state = jmp.apply_gradients(tx, grads, state, whole)
        return {k: new[k] for k in arrays}, state, loss

    kept = jax.tree.map(lambda p: p if is_float(p) else None, params) if filtered and "count" not in params else params
    kept = params if "key" in params else kept
    arrays = {k: v for k, v in params.items() if isinstance(v, jax.Array)}
    with jax.numpy_dtype_promotion("standard"):
        new, _, loss = step(arrays, tx.init(kept))
    assert float(loss) == 2.0
    assert_identical({k: v for k, v in new.items() if k != "w"}, {k: v for k, v in arrays.items() if k != "w"})
    np.testing.assert_allclose(new["w"], 0.5, rtol=1e-5)  # an eps, and a power of 0.999 in float32


# --- Devices ---


def spread(tx, step, axis="data"):
    mesh = jax.make_mesh((DEVICES,), (axis,), axis_types=(jax.sharding.AxisType.Auto,))
    params = jnp.ones((DEVICES, 4))
    specs = jax.tree.map(lambda a: P(axis) if a.ndim == 2 else P(), tx.init(params))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(axis), specs, P(axis)), out_specs=(P(axis), specs))
    return jax.jit(mapped)(params, tx.init(params), params)


@forms
@pytest.mark.parametrize("axis", ["data", "expert"])
def test_an_axis_that_was_forgotten_is_named(form, axis):
    tx = sgd(momentum=0.9)
    with pytest.raises(errors.MissingAxisError, match=rf"axis_name='{axis}'"):
        spread(tx, step_of(tx, form), axis)


def accumulated(loss_fn, scale, axis_name):
    options = {"on_nonfinite": "skip_microbatch", "axis_name": axis_name}
    return jmp.accumulate_gradients(loss_fn, 2, loss_scale=scale, **options)


def retried(loss_fn, scale, axis_name):
    return jmp.scaled_value_and_grad(loss_fn, loss_scale=scale, max_retries=3, axis_name=axis_name)


@pytest.mark.covering(1)
@pytest.mark.parametrize("gradient", [accumulated, retried])
@pytest.mark.parametrize("axis", ["data", "expert"])
def test_an_axis_that_was_forgotten_when_the_gradient_is_made(gradient, axis):
    """Devices would try again, or leave out microbatches, each by itself."""
    mesh = jax.make_mesh((DEVICES,), (axis,), axis_types=(jax.sharding.AxisType.Auto,))

    def run(axis_name):
        def each(w, scale, x):
            w = jax.lax.pcast(w, axis, to="varying")
            return gradient(lambda w, x: jnp.mean((w * x) ** 2), scale, axis_name)(w, x)[1]

        mapped = jax.shard_map(each, mesh=mesh, in_specs=(P(), P(), P(axis)), out_specs=P(axis))
        return jax.jit(mapped)(jnp.ones((1, 1)), jmp.DynamicLossScale(), jnp.ones((2 * DEVICES, 1)))

    with pytest.raises(errors.MissingAxisError, match=rf"{axis}.*\(\.\.\., axis_name='{axis}'\)"):
        run(None)
    assert np.isfinite(run(axis)).all()


def mean(w, x):
    return jnp.mean(w * x)


UNMAPPED = {
    "a step": lambda tx, axis: tx.update(PARAMS, tx.init(PARAMS)),
    "a fused step": lambda tx, axis: jmp.apply_gradients(tx, PARAMS, tx.init(PARAMS), PARAMS),
    "a verdict": lambda tx, axis: jmp.all_finite(PARAMS, axis_name=axis),
    "microbatches": lambda tx, axis: accumulated(mean, jmp.DynamicLossScale(), axis)(1.0, jnp.ones(4)),
}


@pytest.mark.parametrize("axis", ["data", ("data", "model"), ["data"], 3], ids=str)
@pytest.mark.parametrize("call", UNMAPPED)
def test_an_axis_that_is_not_mapped_is_quoted(call, axis):
    with pytest.raises(errors.MissingAxisError, match=rf"axis_name={re.escape(repr(axis))} is not an axis that"):
        UNMAPPED[call](jmp.loss_scaled(optax.sgd(0.1), axis_name=axis), axis)


def test_axes_may_be_a_list():
    tx = jmp.loss_scaled(optax.sgd(0.5), jmp.StaticLossScale(1.0), axis_name=["data"])
    params, state = spread(tx, lambda grads, state, params: jmp.apply_gradients(tx, grads, state, params))
    assert (params == 0.5).all()
    assert state.last_finite


def test_an_axis_that_was_named_is_enough():
    tx = jmp.loss_scaled(optax.sgd(0.5), axis_name="data")
    params, _ = spread(tx, step_of(tx, fused))
    assert params.shape == (DEVICES, 4)


def replicated(axis_name, bad):
    """The state after a step of pmap in which one replica may see a bad gradient."""
    tx = jmp.loss_scaled(optax.sgd(0.5), axis_name=axis_name)
    grads = np.ones((DEVICES, 3), np.float32)
    grads[bad] = np.nan
    params = jnp.ones(3)
    params, state = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), (params, tx.init(params)))
    return jax.pmap(step_of(tx, fused), "data")(params, state, grads)[1]


def test_replicas_that_disagree_are_told():
    with pytest.raises(errors.ReplicasDisagreeError, match=r"loss scale is \[.*axis_name=\.\.\."):
        jmp.check_loss_scale(replicated(None, 3))
    jmp.check_loss_scale(replicated("data", 3))
    jmp.check_loss_scale(replicated(None, slice(0, 0)))


def test_copies_of_a_scale_that_disagree_are_told():
    """As `shard_map` makes them when its checks are off."""
    tx = jmp.loss_scaled(optax.sgd(0.5))
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    grads, params = jnp.ones((DEVICES, 1)).at[3].set(jnp.nan), jnp.ones((DEVICES, 1))
    step = jax.shard_map(step_of(tx, fused), mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=False)
    _, state = jax.jit(step)(params[:1], tx.init(params[:1]), grads)
    with pytest.raises(errors.ReplicasDisagreeError, match="loss scale is"):
        jmp.check_loss_scale(state)


def test_finite_gradients_of_skipped_steps_are_called_that():
    """Their norm may overflow; nobody is asked for what was given."""
    tx = jmp.loss_scaled(optax.sgd(0.5), jmp.NoOpLossScale())
    params = {"w": jnp.ones(3)}
    grads, state = {"w": jnp.full(3, 1e30)}, tx.init(params)
    for _ in range(3):
        _, state = tx.update(grads, state, params)
    with pytest.raises(errors.LossScaleStalledError, match="given are finite: either so large"):
        jmp.check_loss_scale(state, grads, max_skips=3)


def ensemble(rows):
    """The state of independent models: for each, the bad steps after which good ones follow, then bad ones."""
    tx = jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(2.0**24))
    params = jnp.ones((len(rows), 3))
    state = jax.vmap(tx.init)(params)
    step = jax.jit(jax.vmap(step_of(tx, fused)))
    for number in range(max(map(len, rows))):
        grads = jnp.asarray([[jnp.nan if row[number] == "-" else 1.0] * 3 for row in rows])
        params, state = step(params, state, grads)
    return state


def test_members_of_an_ensemble_count_for_themselves():
    lowest, late = "-" * 24 + "+" * 10, "+" * 24 + "-" * 10
    jmp.check_loss_scale(ensemble([lowest, late]))
    with pytest.raises(errors.LossScaleStalledError, match=r"34 steps in a row .* member 2 of the ensemble"):
        jmp.check_loss_scale(ensemble([lowest, late, "-" * 34]))


# --- Traces ---


@forms
def test_a_step_traces_its_optimizer_once_and_its_check_once_per_shape(form, monkeypatch):
    updates, checks = [], []
    inner = optax.adam(1e-3)

    def update(*args, **kwargs):
        updates.append(args)
        return inner.update(*args, **kwargs)

    original = _verdict.cast_to_at_least_float32
    monkeypatch.setattr(_verdict, "cast_to_at_least_float32", lambda leaf: checks.append(leaf.shape) or original(leaf))
    tx = jmp.loss_scaled(optax.GradientTransformation(inner.init, update))
    rows = (300, 301) if form is fused else (302, 303)  # JAX remembers shapes that it has traced
    params = {f"w{i}": jnp.ones((rows[i % 2], 256)) for i in range(6)}
    with jax.numpy_dtype_promotion("standard"):
        jax.jit(functools.partial(step_of(tx, form))).trace(params, tx.init(params), params)
    assert len(updates) == 1
    assert sorted(checks) == [(n, 256) for n in rows]


@pytest.mark.parametrize("made", [collections.OrderedDict, flax.core.freeze], ids=["OrderedDict", "FrozenDict"])
def test_parameters_may_be_of_another_class_than_gradients(made):
    """Optax takes them, and restored checkpoints mix them."""
    params, grads = {"w": jnp.ones(2)}, {"w": jnp.ones(2)}
    tx = jmp.loss_scaled(optax.sgd(0.5), jmp.StaticLossScale(1.0))
    updates, _ = tx.update(grads, tx.init(params), made(params))
    np.testing.assert_array_equal(updates["w"], [-0.5, -0.5])
