"""loss_scaled as an Optax transformation: exact steps, frozen skips, and every way to combine it."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparisons import (
    OPTIMIZERS,
    assert_close,
    assert_identical,
    fused,
    gradients_like,
    parameters,
    raw,
    standard,
    structure_and_dtypes,
    two_calls,
    with_bad_element,
)

import jmp_lite as jmp

#: What happens to parameters of 16 bits is asked here of plain optimizers.
pytestmark = pytest.mark.filterwarnings("ignore:Parameters of 16 bits")

SCALE = 2.0**10


both_forms = pytest.mark.parametrize("form", [fused, two_calls], ids=["apply_gradients", "update"])


def times(tree, factor):
    return jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), tree)


def scaled_stream(params, rng, good):
    """True gradients, and the same times SCALE with something not finite in the bad ones."""
    true = [gradients_like(params, rng) for _ in good]
    scaled = [times(grads, SCALE) for grads in true]
    return true, [g if ok else with_bad_element(g, rng) for g, ok in zip(scaled, good, strict=True)]


def uncompiled(optimizer):
    """What to run an eager step under: the lax.cond of MultiSteps would otherwise compile on every call."""
    return jax.disable_jit(optimizer == "MultiSteps")


# --- Equal to Optax, frozen when skipped ---


@pytest.mark.covering(1)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("form", [fused, two_calls])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_is_optax_on_unscaled_gradients_or_nothing(optimizer, form, compiled, rng):
    """Good steps are plain Optax on the true gradients; bad ones leave parameters and inner state bit-identical."""
    plain = standard(OPTIMIZERS[optimizer]())
    tx = jmp.loss_scaled(plain, jmp.DynamicLossScale(SCALE, factor=1))
    params, good = parameters(rng), [True, False, False, True, True]
    true, scaled = scaled_stream(params, rng, good)
    traces, step, plain_step = [], form(tx), two_calls(plain)

    def counted(*args):
        traces.append(args)
        return step(*args)

    run = jax.jit(counted) if compiled else counted
    ours, theirs = (params, tx.init(params)), (params, plain.init(params))
    for bad_grads, grads, finite in zip(scaled, true, good, strict=True):
        with uncompiled(optimizer) if not compiled else contextlib.nullcontext():
            before, ours = ours, run(*ours, bad_grads)
        if finite:
            with uncompiled(optimizer):
                theirs = plain_step(*theirs, grads)
        else:
            assert_identical((ours[0], ours[1].inner_state), (before[0], before[1].inner_state))
    result = ours[0], ours[1].inner_state
    if compiled:
        # Fusion saves roundings: at most some ten per update of Adam's formula (eps/2 each), over three steps; a moment
        # kept in bfloat16 may not be rounded at all, which is half an ulp of bfloat16 in an update of 0.01.
        lost = 3 * 0.01 * 2.0**-9 / float(jnp.finfo(jnp.float32).eps) if "bf16" in optimizer else 0
        assert_close(result, theirs, ulps=3 * 10 / 2 + lost, least=1.0)
        assert len(traces) == 1
    else:
        assert_identical(result, theirs)
    assert (bool(ours[1].last_finite), int(ours[1].notfinite_count), int(ours[1].total_notfinite)) == (True, 0, 2)


def test_skipped_updates_are_zeros(rng):
    """`update` returns zeros of the dtypes and shapes that a step would return."""
    tx = jmp.loss_scaled(standard(optax.adam(1e-2)))
    params = parameters(rng, jnp.bfloat16)
    grads = gradients_like(params, rng)
    taken, _ = tx.update(grads, tx.init(params), params)
    skipped, _ = tx.update(with_bad_element(grads, rng), tx.init(params), params)
    assert jax.tree.map(jnp.result_type, skipped) == jax.tree.map(jnp.result_type, taken)
    assert_identical(skipped, jax.tree.map(lambda x: -jnp.zeros_like(x), taken))


def test_counters_count(rng):
    """`notfinite_count` counts skips in a row, `total_notfinite` all of them, `last_finite` the last verdict."""
    tx = jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(2.0**20))
    params = parameters(rng)
    state, step = tx.init(params), jax.jit(fused(tx))
    in_a_row, total = 0, 0
    for finite in rng.random(30) < 0.5:
        grads = gradients_like(params, rng)
        params, state = step(params, state, grads if finite else with_bad_element(grads, rng))
        in_a_row, total = (0, total) if finite else (in_a_row + 1, total + 1)
        assert [int(x) for x in state[2:5]] == [finite, in_a_row, total]


# --- Dtypes ---


PAIRS = [
    ("float32", "float16"),
    ("float32", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "float32"),
    ("float16", "bfloat16"),
]


@pytest.mark.covering(1)
@both_forms
@pytest.mark.parametrize(("param_dtype", "grad_dtype"), PAIRS)
def test_no_dtype_ever_changes(param_dtype, grad_dtype, form, rng):
    """Half gradients with float32 parameters, and other pairs, keep all types over good and bad steps."""
    tx = jmp.loss_scaled(
        standard(optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2))), jmp.DynamicLossScale(2.0**4)
    )
    params = parameters(rng, param_dtype)
    state, step = tx.init(params), jax.jit(form(tx))
    types = structure_and_dtypes((params, state))
    for bad in (False, True, False):
        grads = gradients_like(params, rng, grad_dtype)
        params, state = step(params, state, with_bad_element(grads, rng) if bad else grads)
        assert structure_and_dtypes((params, state)) == types
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(params))


def test_gradients_reach_the_optimizer_in_float32(rng):
    """The inner transformation sees float32, whatever the gradients were; complex and float64 keep their precision."""
    seen = {}

    def record(updates, state, params=None):
        seen.update(jax.tree.map(jnp.result_type, updates))
        return updates, state

    tx = jmp.loss_scaled(optax.GradientTransformation(lambda _: optax.EmptyState(), record))
    names = ["float16", "bfloat16", "float32", "complex64", "float8_e5m2", "float64"]
    with jax.enable_x64(True):
        grads = {name: jnp.ones(2, name) for name in names}
        updates, _ = tx.update(grads, tx.init(grads))
    expected = dict.fromkeys(names, jnp.float32) | {"complex64": jnp.complex64, "float64": jnp.float64}
    assert seen == expected
    assert float(updates["float16"][0]) == 2.0**-15


# --- Combinations ---


def test_extra_arguments_reach_the_optimizer(rng):
    """Keyword arguments of `update` and `apply_gradients` reach a transformation that asks for them."""
    tx = jmp.loss_scaled(optax.chain(optax.sgd(1.0), standard(optax.contrib.reduce_on_plateau(factor=0.5, patience=1))))
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update({"w": jnp.ones(2)}, state, params, value=jnp.float32(1))
        params, state = jmp.apply_gradients(tx, {"w": jnp.ones(2)}, state, params, value=jnp.float32(1))
    assert float(optax.tree.get(state, "scale")) < 1
    with pytest.raises(TypeError, match="value"):
        tx.update({"w": jnp.ones(2)}, state, params)


@both_forms
def test_steps_accumulated_inside(form, rng):
    """MultiSteps inside: a bad micro-step is left out of the average and not counted, the window continues."""
    plain = standard(optax.MultiSteps(optax.sgd(0.5), 2))
    tx = jmp.loss_scaled(plain, jmp.DynamicLossScale(4.0, min_loss_scale=4.0))
    params, state, step = {"w": jnp.zeros(2)}, tx.init({"w": jnp.zeros(2)}), jax.jit(form(tx))
    for value in (1.0, np.inf, 3.0):
        params, state = step(params, state, {"w": jnp.full(2, 4 * value)})
    np.testing.assert_array_equal(params["w"], [-1, -1])
    assert int(optax.tree.get(state, "mini_step")) == 0


@both_forms
def test_steps_accumulated_outside(form):
    """MultiSteps outside: one update per window, with its scale; a bad micro-step never reaches the parameters."""
    scaled = jmp.loss_scaled(optax.sgd(0.5), jmp.DynamicLossScale(4.0, period=1))
    tx = standard(optax.MultiSteps(scaled, 2).gradient_transformation())
    params, state, step = {"w": jnp.zeros(2)}, tx.init({"w": jnp.zeros(2)}), jax.jit(form(tx))
    seen = []
    for value in (1.0, 3.0, 2.0, 4.0, np.inf, 1.0):
        _, scale = jmp.scaled_value_and_grad(lambda p: p, loss_scale=state)(1.0)
        params, state = step(params, state, {"w": jnp.full(2, value) * scale})
        seen.append((float(params["w"][0]), float(jmp.metrics(state)["loss_scale"])))
    assert seen == [(0, 4), (-1, 8), (-1, 8), (-2.5, 16), (-2.5, 16), (-2.5, 8)]


COMBINATIONS = {
    "chain": lambda tx: optax.chain(tx, optax.scale(2.0), optax.scale(0.5)),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.identity()), ("scaled", tx)),
    "masked": lambda tx: optax.masked(tx, {"w": True, "v": True}),
    "multi_transform": lambda tx: optax.multi_transform({"all": tx}, {"w": "all", "v": "all"}),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(
        rate=1.0
    ),
    "flatten": optax.flatten,
    "extra args": optax.with_extra_args_support,
}


@functools.cache
def scaled_adam():
    """An optimizer, and its step by itself."""
    alone = jmp.loss_scaled(standard(optax.adam(1e-2)), jmp.DynamicLossScale(8.0))
    return alone, jax.jit(two_calls(alone))


@pytest.mark.parametrize("combine", COMBINATIONS.values(), ids=COMBINATIONS)
def test_combinations(combine, rng):
    """Inside other transformations the scaled one steps and skips as it does alone, and its state is found."""
    alone, step_alone = scaled_adam()
    combined = standard(combine(alone))
    step = jax.jit(fused(combined))
    params = {"w": jnp.ones(3), "v": jnp.ones((2, 2))}
    all_grads = [times(gradients_like(params, rng), 8.0) for _ in range(3)]
    all_grads[1] = with_bad_element(all_grads[1], rng)
    ours, theirs = (params, combined.init(params)), (params, alone.init(params))
    for grads in all_grads:
        ours, theirs = step(*ours, grads), step_alone(*theirs, grads)
    # Flattened leaves are vectorized differently: ten roundings of Adam's formula in each of two updates may differ.
    assert_close(ours[0], theirs[0], ulps=2 * 10 / 2)
    assert_identical(jmp.metrics(ours[1]), jmp.metrics(theirs[1]))
    for field in ("notfinite_count", "total_notfinite", "last_finite"):
        assert optax.tree.get(ours[1], field) == optax.tree.get(theirs[1], field)
    assert int(optax.tree.get(ours[1], "total_notfinite")) == 1


def test_parts_of_the_state_can_be_read_and_set(rng):
    """`optax.tree.get`, `tree.set` and `tree.map_params` work on the state."""
    tx = jmp.loss_scaled(standard(optax.adam(optax.linear_schedule(0.1, 0.0, 5))))
    params = parameters(rng)
    state = tx.init(params)
    assert isinstance(
        optax.tree.get(state, "loss_scale", filtering=lambda path, _: len(path) == 1), jmp.DynamicLossScale
    )
    state = optax.tree.set(state, notfinite_count=jnp.int32(5))
    assert int(jmp.metrics(state)["notfinite_count"]) == 5
    specs = optax.tree.map_params(tx, lambda _: "sharded", state, transform_non_params=lambda _: "replicated")
    assert specs.inner_state[0].mu == jax.tree.map(lambda _: "sharded", params)
    assert specs.loss_scale.loss_scale == specs.last_finite == specs.inner_state[0].count == "replicated"


# --- Verdicts ---


@pytest.mark.covering(1)
@both_forms
@pytest.mark.parametrize(
    "scale",
    [jmp.NoOpLossScale(), jmp.StaticLossScale(8.0), jmp.DynamicLossScale(8.0, factor=1)],
    ids=["none", "static", "constant"],
)
def test_constant_scales_skip_too(scale, form, rng):
    """Without dynamic scaling a bad step is skipped as well, and the scale stays."""
    tx = jmp.loss_scaled(optax.sgd(0.5), scale)
    params = {"w": jnp.ones(2)}
    state, step = tx.init(params), jax.jit(form(tx))
    params, state = step(params, state, {"w": jnp.full(2, scale.loss_scale, jnp.float32)})
    np.testing.assert_array_equal(params["w"], [0.5, 0.5])
    params, state = step(params, state, {"w": jnp.array([1.0, np.nan])})
    np.testing.assert_array_equal(params["w"], [0.5, 0.5])
    assert int(state.total_notfinite) == 1
    assert raw(state.loss_scale.loss_scale) == raw(tx.init(params).loss_scale.loss_scale)


def test_scale_is_adjusted_after_unscaling(rng):
    """On the growth step gradients are divided by the old scale (mpx divides by the new one)."""
    tx = jmp.loss_scaled(optax.sgd(1.0), jmp.DynamicLossScale(8.0, period=1))
    updates, state = tx.update({"w": jnp.full(2, 8.0)}, tx.init({"w": jnp.ones(2)}))
    np.testing.assert_array_equal(updates["w"], [-1, -1])
    assert float(state.loss_scale.loss_scale) == 16


@pytest.mark.parametrize("loss_scale", [2.0**15, "dynamic", jmp.DynamicLossScale], ids=repr)
def test_what_is_no_loss_scale_is_refused(loss_scale):
    """A number, a name or the class itself are quoted."""
    with pytest.raises(jmp.errors.InvalidLossScaleError, match=r"got .*Write for example"):
        jmp.loss_scaled(optax.sgd(0.1), loss_scale)


def test_state_of_another_optimizer_is_refused():
    """The state of plain Optax, or gradients in place of the state, are named."""
    tx, params = jmp.loss_scaled(optax.sgd(0.1)), {"w": jnp.ones(2)}
    for state in (optax.sgd(0.1).init(params), params):
        with pytest.raises(jmp.errors.LossScaleNotFoundError, match=f"got {type(state).__name__}"):
            jmp.apply_gradients(tx, params, state, params)


def test_donated_state_leaves_the_optimizer_usable():
    """Two runs from one optimizer, both donating their state, although its scale was given as a JAX array."""
    tx, params = jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(jnp.float32(8.0))), {"w": jnp.ones(2)}
    step = jax.jit(lambda state: jmp.apply_gradients(tx, params, state, params)[1], donate_argnums=0)
    assert [float(step(tx.init(params)).loss_scale.loss_scale) for _ in range(2)] == [8.0, 8.0]
