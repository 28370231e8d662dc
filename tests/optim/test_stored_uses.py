"""`stored` among other transforms, and the float32 weights behind what it keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparisons import (
    apply_updates,
    assert_identical,
    fused,
    slow_but_for,
    standard,
    structure_and_dtypes,
    two_calls,
)
from support.storage import (
    KEPT,
    SHAPES,
    WEIGHTS,
    adam,
    dtypes,
    gradients,
    moment_bound,
    weight_bound,
    weights,
)

import jmp_lite as jmp
from jmp_lite.optim import Log, Ratio, stored
from jmp_lite.optim._stored import decoded

# Compiled at once: one by one, their operations take seconds to compile.
full_precision_params = jax.jit(jmp.optim.full_precision_params)


def from_full_precision(tx, dtype="bfloat16"):
    return jax.jit(lambda params: jmp.optim.from_full_precision(tx, params, dtype))


def largest_difference(a, b):
    return np.max(np.abs(np.asarray(a) - np.asarray(b)))


# --- With other transforms ------------------------------------------------------------------------

COMPOSITIONS = {
    "alone": lambda: stored(adam(), **KEPT),
    "around a chain": lambda: stored(standard(optax.chain(optax.clip_by_global_norm(1.0), adam())), **KEPT),
    "in a chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), stored(adam(), **KEPT)),
    "around weight decay": lambda: stored(standard(optax.adamw(1e-2, weight_decay=0.1)), **KEPT),
    "in loss_scaled": lambda: jmp.loss_scaled(stored(adam(), **KEPT)),
    "in MultiSteps": lambda: standard(optax.MultiSteps(stored(adam(), **KEPT), 2).gradient_transformation()),
    "around MultiSteps": lambda: stored(standard(optax.MultiSteps(adam(), 2).gradient_transformation()), **KEPT),
    "masked": lambda: optax.masked(stored(adam(), **KEPT), {"kernel": True, "bias": True, "gain": True}),
    "two of them": lambda: optax.multi_transform(
        {"a": stored(adam(), **KEPT), "b": stored(adam(), params="split16", state="bfloat16")},
        {"kernel": "a", "bias": "b", "gain": "a"},
    ),
    "in inject_hyperparams": lambda: standard(
        optax.inject_hyperparams(lambda learning_rate: stored(adam(learning_rate), **KEPT))(learning_rate=1e-2)
    ),
    "around inject_hyperparams": lambda: stored(
        standard(optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)), **KEPT
    ),
    "in apply_if_finite": lambda: standard(optax.apply_if_finite(stored(adam(), **KEPT), 3)),
    "around prune": lambda: stored(optax.chain(adam(), jmp.optim.prune(0.5, where=lambda _, x: x.ndim == 2)), **KEPT),
    "before prune": lambda: optax.chain(stored(adam(), **KEPT), jmp.optim.prune(0.5, where=lambda _, x: x.ndim == 2)),
}


QUICK = {
    *("in a chain", "in loss_scaled", "in MultiSteps", "around MultiSteps"),
    *("two of them", "in inject_hyperparams", "before prune"),  # the first is made of masked ones
}


@pytest.mark.filterwarnings("ignore:state='8bit' leaves 'acc_grads'")
@pytest.mark.parametrize("name", slow_but_for(QUICK, COMPOSITIONS))
def test_compositions(name, rng):
    """One trace, the same structure, and the way that float32 goes, to a few units of what the model sees."""
    tx = COMPOSITIONS[name]()
    params, opt_state = from_full_precision(tx)(weights(rng, jnp.float32))
    before = structure_and_dtypes((params, opt_state))
    start = full_precision_params(opt_state, params)
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, grads):
        traces.append(1)
        updates, opt_state = tx.update(grads, opt_state, params)
        return apply_updates(params, updates), opt_state

    full, plain_state, plain_step = start, adam().init(start), jax.jit(two_calls(adam()))
    scale = 2.0**15 if name == "in loss_scaled" else 1.0
    for _ in range(6):
        grads = gradients(rng)
        params, opt_state = step(params, opt_state, jax.tree.map(lambda g: g * scale, grads))
        full, plain_state = plain_step(full, plain_state, grads)
    assert len(traces) == 1
    assert structure_and_dtypes((params, opt_state)) == before
    found = full_precision_params(opt_state, params)
    moved = jax.tree.map(largest_difference, found, start)
    assert all(0 < size < 0.3 for size in jax.tree.leaves(moved)) or "prune" in name
    if "prune" in name:
        assert np.mean(np.asarray(params["kernel"]) == 0) == 0.5
    elif "MultiSteps" not in name and "decay" not in name:
        # Six steps of at most 1e-2 each; moments of 8 bits are off by a quarter.
        distance = jax.tree.map(largest_difference, found, full)
        assert max(jax.tree.leaves(distance)) < 6e-2 / 3


@pytest.mark.covering(2)
@pytest.mark.parametrize("form", [fused, two_calls], ids=["fused", "two calls"])
@pytest.mark.parametrize("run", [pytest.param(lambda f: f, marks=pytest.mark.slow), jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("params", slow_but_for(("stochastic", "split8"), WEIGHTS))
@dtypes
def test_a_skipped_step_changes_no_bit(dtype, params, run, form, rng):
    tx = jmp.loss_scaled(stored(adam(), params=params, state="8bit"))
    step = run(form(tx))
    leaves = weights(rng, dtype)
    leaves["kernel"] = leaves["kernel"].at[0].set(jnp.asarray(-0.0, dtype))
    scaled = jax.tree.map(lambda g: g * 2.0**15, gradients(rng))
    leaves, opt_state = step(leaves, jax.jit(tx.init)(leaves), scaled)
    bad = {**scaled, "bias": np.where(np.arange(8) == 3, np.float32(np.inf), scaled["bias"])}
    after, skipped = step(leaves, opt_state, bad)
    assert_identical((after, skipped.inner_state), (leaves, opt_state.inner_state))
    assert not skipped.last_finite
    assert skipped.total_notfinite == 1


def test_forms_of_a_step_are_the_same(rng):
    """`apply_gradients` and Optax's two calls."""
    tx = jmp.loss_scaled(stored(adam(), **KEPT))
    leaves = weights(rng)
    scaled = jax.tree.map(lambda g: g * 2.0**15, gradients(rng))
    states = [jax.jit(form(tx))(leaves, tx.init(leaves), scaled) for form in (fused, two_calls)]
    assert_identical(*states)


def test_a_step_writes_in_place(rng):
    """Everything that is donated is used."""
    tx = jmp.loss_scaled(stored(adam(), **KEPT))
    leaves = weights(rng)
    step = jax.jit(fused(tx), donate_argnums=(0, 1))
    compiled = step.lower(leaves, tx.init(leaves), gradients(rng)).compile()
    aliased = compiled.memory_analysis().alias_size_in_bytes
    donated = (leaves, tx.init(leaves)._replace(last_finite=()))  # which no step reads
    assert aliased == sum(leaf.nbytes for leaf in jax.tree.leaves(donated))


# --- Full precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.dtype(jnp.bfloat16), "bf16", jmp.get_policy("params=bfloat16")])
def test_dtypes_and_policies_say_what_the_model_sees(dtype, rng):
    full = {"w": weights(rng, jnp.float32)["bias"]}
    expected = jmp.optim.from_full_precision(stored(optax.sgd(0.1), params="split8"), full)
    assert_identical(jmp.optim.from_full_precision(stored(optax.sgd(0.1), params="split8"), full, dtype), expected)


@pytest.mark.parametrize("params", WEIGHTS)
@dtypes
def test_full_precision_comes_back(params, dtype, rng):
    tx = stored(adam(), params=params)
    full = weights(rng, jnp.float32)
    seen, opt_state = jmp.optim.from_full_precision(tx, full, dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(seen)} == {jnp.dtype(dtype)}
    back = jmp.optim.full_precision_params(opt_state, seen)
    for name in SHAPES:
        assert back[name].dtype == jnp.float32
        assert np.all(np.abs(back[name] - full[name]) <= weight_bound(params, full[name], dtype))
    if params == "split16":
        assert_identical(back, full)


def test_leaves_that_a_policy_keeps_in_float32(rng):
    """They are updated as ever, and have no low bits; their moments are stored like the others."""
    tx = jmp.loss_scaled(stored(adam(), **KEPT))
    policy = jmp.PolicyMap({"bias": "float32"}, default="bfloat16")
    full = weights(rng, jnp.float32)
    params, opt_state = jmp.optim.from_full_precision(tx, full, policy)
    assert params["bias"].dtype == jnp.float32
    assert opt_state.inner_state.low["bias"] == optax.MaskedNode()
    assert opt_state.inner_state.inner_state[0].nu["bias"].dtype == np.uint8
    grads = jax.tree.map(lambda g: g * 2.0**15, gradients(rng))
    params, opt_state = jmp.apply_gradients(tx, grads, opt_state, params)
    np.testing.assert_allclose(params["bias"], full["bias"] - 1e-2 * np.sign(grads["bias"]), rtol=0, atol=2e-7)
    assert_identical(jmp.optim.full_precision_params(opt_state, params)["bias"], params["bias"])


def test_going_on_from_float32(rng):
    """Moments and steps of the run in float32 are taken over, as a step would have stored them."""
    inner = standard(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)))
    plain, tx = (jmp.loss_scaled(t, jmp.StaticLossScale(8.0)) for t in (inner, stored(inner, **KEPT)))
    params = weights(rng, jnp.float32)
    state = plain.init(params)
    for _ in range(3):
        params, state = jmp.apply_gradients(plain, gradients(rng), state, params)
    seen, opt_state = jmp.optim.from_full_precision(tx, params, opt_state=state)
    after = opt_state.inner_state
    assert after.inner_state[1][0].count == 3
    wanted = state.inner_state[1][0]
    back = decoded(after.inner_state, after.layout)[1][0]
    for name in SHAPES:
        nu, mu = back.nu[name], back.mu[name]
        assert np.all(np.abs(nu - wanted.nu[name]) <= moment_bound(Log(), wanted.nu[name], None))
        assert np.all(np.abs(mu - wanted.mu[name]) <= moment_bound(Ratio(), wanted.mu[name], nu))
        full = jmp.optim.full_precision_params(opt_state, seen)[name]
        assert np.all(np.abs(full - params[name]) <= weight_bound("split8", params[name], "bfloat16"))
    with pytest.raises(jmp.errors.InvalidStorageError, match="not a state of this optimizer without stored"):
        jmp.optim.from_full_precision(tx, params, opt_state=adam().init(params))
    other = jax.tree.map(lambda leaf: jnp.zeros((3, *jnp.shape(leaf))), state)
    with pytest.raises(jmp.errors.InvalidStorageError, match="in place of"):
        jmp.optim.from_full_precision(tx, params, opt_state=other)


FORMATS = [("split16", "float32", "bfloat16"), ("stochastic", "bfloat16", "float16"), ("float32", "float32", "float32")]


@pytest.mark.parametrize(("params", "state", "dtype"), FORMATS, ids=lambda value: value)
def test_going_on_in_other_formats(params, state, dtype, rng):
    """Back to float32 too, where the state inside is Optax's own: moments are those that were stored."""
    inner = standard(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)))
    before, after = (jmp.loss_scaled(stored(inner, **kept)) for kept in (KEPT, {"params": params, "state": state}))
    seen, opt_state = from_full_precision(before)(weights(rng, jnp.float32))
    seen, opt_state = jax.jit(fused(before))(seen, opt_state, jax.tree.map(lambda g: g * 2.0**15, gradients(rng)))
    full = full_precision_params(opt_state, seen)
    seen, found = jmp.optim.from_full_precision(after, full, dtype, opt_state=opt_state)
    old, new = (decoded(s.inner_state.inner_state, s.inner_state.layout)[1][0] for s in (opt_state, found))
    assert new.count == 1
    for name in SHAPES:
        assert {seen[name].dtype} == {jnp.dtype(dtype)}
        for moment in ("mu", "nu"):
            value, back = (getattr(one, moment)[name] for one in (old, new))
            assert np.all(np.abs(back - value) <= moment_bound(jmp.optim.Float(state), value, None)), moment
    if state == "float32":
        assert_identical(new, old)
        assert_identical(full_precision_params(found, seen), full)


def test_saturated_moments_are_counted(rng):
    tx = stored(adam(), **KEPT)
    leaves = weights(rng)
    grads = gradients(rng)
    grads["kernel"] = grads["kernel"].at[:4].set(1e6)
    _, opt_state = tx.update(grads, tx.init(leaves), leaves)
    shares = jmp.optim.saturated(jmp.loss_scaled(tx).init(leaves)._replace(inner_state=opt_state))
    assert float(shares["0/nu/kernel"]) == 0.25
    assert {name: float(share) for name, share in shares.items() if "kernel" not in name} == {
        f"0/{moment}/{name}": 0.0 for moment in ("mu", "nu") for name in ("bias", "gain")
    }
    raised = stored(adam(), params="split8", state={"mu": "ratio", "nu": Log(highest=40)})
    _, opt_state = raised.update(grads, raised.init(leaves), leaves)
    assert float(jmp.optim.saturated(opt_state)["0/nu/kernel"]) == 0.0


def test_float16_goes_below_zero():
    """In steps that it does not see; its zero has no sign that would last."""
    for params in ("split16", "split8"):
        tx = stored(optax.sgd(1e-8), params=params)
        seen, opt_state = {"w": jnp.zeros(2, jnp.float16)}, tx.init({"w": jnp.zeros(2, jnp.float16)})
        step = jax.jit(two_calls(tx))
        for _ in range(1000):
            seen, opt_state = step(seen, opt_state, {"w": jnp.float32([1, -1])})
        # Each step rounds by 2**-41 or, at random, by up to 2**-32.
        error = np.abs(jmp.optim.full_precision_params(opt_state, seen)["w"] - np.float32([-1e-5, 1e-5]))
        assert np.all(error < {"split16": 1000 * 2.0**-41, "split8": 5 * np.sqrt(1000) * 2.0**-32}[params])


@pytest.mark.parametrize("params", ["split8", "split16"])
@dtypes
def test_who_sets_a_parameter_to_zero_has_zero(params, dtype, rng):
    """Whatever its low bits were; in float16 they are at most half of the smallest number."""
    tx = stored(optax.sgd(0.0), params=params)
    seen, opt_state = from_full_precision(tx, dtype)(weights(rng, jnp.float32))
    zeros = jax.tree.map(jnp.zeros_like, seen)
    zeros, opt_state = jax.jit(two_calls(tx))(zeros, opt_state, zeros)
    least = 0 if dtype == "bfloat16" else 2.0**-25
    for leaf in jax.tree.leaves(full_precision_params(opt_state, zeros)):
        assert np.all(np.abs(leaf) <= least)


def test_parameters_beside_those_that_are_stored():
    """Of one state `stored` keeps some; the others are taken care of, and warned of, as ever."""
    both = optax.multi_transform(
        {"a": stored(optax.sgd(1.0), params="split16"), "b": optax.sgd(1.0)}, {"w": "a", "b": "b"}
    )
    tx = jmp.loss_scaled(both, jmp.StaticLossScale(1.0))
    params = {"w": jnp.ones(4, jnp.float16), "b": jnp.full(2, 60000.0, jnp.float16)}
    with pytest.warns(jmp.errors.LostUpdatesWarning, match=r"'b' \(float16\)") as caught:
        opt_state = tx.init(params)
    assert "'w'" not in str(caught[0].message)
    params, opt_state = jmp.apply_gradients(tx, {"w": jnp.ones(4), "b": jnp.full(2, -1e4)}, opt_state, params)
    np.testing.assert_array_equal(params["b"], jnp.full(2, 60000.0, jnp.float16))
    assert opt_state.total_nonfinite_updates == 1


def test_weights_that_another_optimizer_would_round_are_said():
    """Not those that it leaves alone."""
    groups = {"a": stored(optax.sgd(1.0), params="split16"), "b": optax.sgd(1.0), "c": optax.set_to_zero()}
    tx = optax.multi_transform(groups, {name: name for name in groups})
    with pytest.warns(jmp.errors.LostUpdatesWarning, match=r"16 bits, 'b' \(bfloat16\), lose") as caught:
        jmp.optim.from_full_precision(tx, {name: jnp.ones(4) for name in groups})
    assert len(caught) == 1


def test_paths_that_print_alike(rng):
    full = {"a/b": weights(rng, jnp.float32)["bias"], "a": {"b": weights(rng, jnp.float32)["bias"]}}
    seen, opt_state = jmp.optim.from_full_precision(stored(optax.sgd(0.0), params="split16"), full)
    assert_identical(jmp.optim.full_precision_params(opt_state, seen), full)


def test_rate_that_is_traced(rng):
    init = jax.jit(lambda rate: stored(standard(optax.inject_hyperparams(optax.adam)(rate)), **KEPT).init(weights(rng)))
    assert init(1e-3).inner_state.inner_state[0].nu["kernel"].dtype == np.uint8


def test_presets(rng):
    leaves = weights(rng)
    for preset, same in [
        (jmp.optim.master_weights(adam()), stored(adam(), params="split16")),
        (jmp.optim.stochastic_rounding(adam(), seed=3), stored(adam(), params="stochastic", seed=3)),
    ]:
        grads = gradients(rng)
        assert_identical(*(tx.update(grads, tx.init(leaves), leaves) for tx in (preset, same)))


def test_seeds_differ(rng):
    leaves, grads = weights(rng), gradients(rng)
    first, again, other = (
        (tx := stored(adam(1e-3), params="stochastic", seed=seed)).update(grads, tx.init(leaves), leaves)[0]
        for seed in (0, 0, 1)
    )
    assert_identical(first, again)
    assert np.any(np.asarray(first["kernel"]) != np.asarray(other["kernel"]))
