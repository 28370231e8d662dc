"""What `stored` does in a step: the arithmetic of float32, and an encoding that is off by one step at most."""

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
    raw,
    slow_but_for,
    standard,
    structure_and_dtypes,
    two_calls,
)
from support.optimizers import ALIASES, optimizer

import jmp_lite as jmp
from jmp_lite.optim import Float, Log, Ratio, SignedLog, stored
from jmp_lite.optim._stored import decoded

SHAPES = {"kernel": (16, 8), "bias": (8,), "gain": ()}
WEIGHTS = ["nearest", "stochastic", "split8", "split16"]
dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def weights(rng, dtype=jnp.bfloat16, shapes=SHAPES):
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def shapes_for(alias):
    """SM3 of Optax takes no scalars."""
    return {name: shape for name, shape in SHAPES.items() if shape or alias != "sm3"}


def gradients(rng, size=1e-2, shapes=SHAPES):
    return {name: jnp.asarray(rng.standard_normal(shape) * size, jnp.float32) for name, shape in shapes.items()}


def moment_bound(kept, value, other):
    """How far what is stored of a moment may be from it: the distance of two neighbors."""
    size = np.abs(np.float64(value))
    if isinstance(kept, Float):
        info = jnp.finfo(kept.dtype)
        return size * float(info.eps) + float(info.smallest_subnormal)
    if isinstance(kept, (Log, SignedLog)):
        lowest = kept.highest - (63 if isinstance(kept, Log) else 31)
        largest = {Log: 1.25, SignedLog: 1.5}[type(kept)] * 2.0**kept.highest
        return size / 4 + 2.0**lowest + np.maximum(size - largest, 0)
    largest = kept.bound * np.sqrt(np.float64(other))
    relative = np.minimum(size / np.maximum(largest, 1e-30), 1)
    return largest * (1 + relative) ** 2 / 250 + np.maximum(size - largest, 0) + 1e-7 * size


def weight_bound(name, value, dtype):
    size = np.abs(np.float64(value))
    eps = float(jnp.finfo(dtype).eps)
    least = float(jnp.finfo(dtype).smallest_subnormal)
    kept_bits = {"nearest": 0, "stochastic": 0, "split8": 8, "split16": 16}[name]
    if name == "split16" and dtype == "bfloat16":
        return np.zeros_like(size)
    return (size * eps + least) * 2.0**-kept_bits + np.maximum(size - float(jnp.finfo(dtype).max), 0)


def check_step(transforms, name, params, opt_state, grads):
    """Takes a step, and holds it against that of float32 from the same numbers."""
    tx, inner = transforms
    dtype = params["kernel"].dtype
    full = jmp.optim.full_precision_params(opt_state, params)
    updates, expected = inner.update(grads, decoded(opt_state.inner_state, opt_state.layout), full)
    wanted = jax.tree.map(lambda p, u: np.asarray(p + u), full, updates)
    steps, after = tx.update(grads, opt_state, params)
    new = apply_updates(params, steps)
    found = jmp.optim.full_precision_params(after, new)
    for leaf in params:
        error = np.abs(np.float64(found[leaf]) - np.float64(wanted[leaf]))
        bound = weight_bound(name, wanted[leaf], dtype)
        assert np.all((error <= bound) | ~np.isfinite(wanted[leaf])), (leaf, error.max())
        np.testing.assert_array_equal(np.isfinite(found[leaf]), np.isfinite(wanted[leaf]))
    of_float32, of_stored = jax.tree.leaves(expected), jax.tree.leaves(decoded(after.inner_state, after.layout))
    kept = {one.leaf: one for one in after.layout.kept}
    for i, (value, back) in enumerate(zip(of_float32, of_stored, strict=True)):
        if i not in kept:
            assert raw(back) == raw(value)
            continue
        other = None if kept[i].other is None else of_stored[kept[i].other]
        bound = moment_bound(kept[i].format, value, other)
        error = np.abs(np.float64(back) - np.float64(value))
        assert np.all((error <= bound) | ~np.isfinite(value)), (kept[i].name, error.max())
        np.testing.assert_array_equal(np.isfinite(back), np.isfinite(value))
    assert structure_and_dtypes(after) == structure_and_dtypes(opt_state)
    return new, after


COMMON = ("adamw", "sgd with momentum", "adafactor with momentum")


@pytest.mark.parametrize(("params", "state"), [("split8", "8bit"), ("split16", "float32"), ("stochastic", "bfloat16")])
@pytest.mark.parametrize("alias", slow_but_for(COMMON, ALIASES))
def test_a_step_is_that_of_float32(alias, params, state, rng):
    """For every optimizer of Optax and every format: what is stored is a neighbor of what float32 would be."""
    inner = optimizer(alias)
    tx = stored(inner, params=params, state=state)
    leaves = weights(rng, shapes=shapes_for(alias))
    opt_state = tx.init(leaves)
    for _ in range(3):
        grads = gradients(rng, shapes=shapes_for(alias))
        leaves, opt_state = check_step((tx, inner), params, leaves, opt_state, grads)


HARD = {
    "zero": lambda rng, shape: np.zeros(shape),
    "tiny": lambda rng, shape: rng.standard_normal(shape) * 1e-12,
    "huge": lambda rng, shape: rng.standard_normal(shape) * 1e12,
    "decades": lambda rng, shape: rng.standard_normal(shape) * 10.0 ** rng.integers(-10, 3, shape),
    "NaN": lambda rng, shape: np.full(shape, np.nan),
}


@pytest.mark.parametrize("dtype", slow_but_for(("float16",), ("bfloat16", "float16")))
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("alias", slow_but_for(COMMON, ALIASES))
def test_hard_gradients(alias, kind, dtype, rng):
    """What is finite in float32 is finite, parameters of float16 too; what is not is visible."""
    inner = optimizer(alias)
    tx = stored(inner, params="split8", state="8bit")
    leaves = weights(rng, dtype, shapes_for(alias))
    opt_state = tx.init(leaves)
    for _ in range(2):
        grads = {name: jnp.asarray(HARD[kind](rng, leaf.shape), jnp.float32) for name, leaf in leaves.items()}
        leaves, opt_state = check_step((tx, inner), "split8", leaves, opt_state, grads)


# --- Formats of the state -------------------------------------------------------------------------


def formats_of(opt_state):
    return {kept.name: kept.format for kept in opt_state.layout.kept}


@pytest.mark.parametrize(
    ("inner", "formats"),
    [
        (optax.adam(RATE := 1e-3), {"mu": Ratio, "nu": Log}),
        (optax.nadamw(RATE), {"mu": Ratio, "nu": Log}),
        (optax.amsgrad(RATE), {"mu": Ratio, "nu": Log, "nu_max": Log}),
        (optax.adamax(RATE), {"mu": SignedLog, "nu": Log}),
        (optax.contrib.adopt(RATE), {"mu": SignedLog, "nu": Log}),
        (optax.adabelief(RATE), {"mu": SignedLog, "nu": Log}),
        (optax.lion(RATE), {"mu": SignedLog}),
        (optax.contrib.muon(RATE), {"mu": SignedLog}),
        (optax.sgd(RATE, momentum=0.9), {"trace": SignedLog}),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)), {"mu": Ratio, "nu": Log}),
        (optax.contrib.schedule_free_adamw(RATE), {"nu": Log}),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else "-".join(value),
)
def test_eight_bit_formats(inner, formats, rng):
    """A ratio only where ``mu`` grows as the root of ``nu``: in Adamax and ADOPT it does not."""
    opt_state = stored(standard(inner), params="split8", state="8bit").init({"kernel": weights(rng)["kernel"]})
    found = {name.split("/")[-2]: type(one) for name, one in formats_of(opt_state).items()}
    assert found == formats


def test_formats_by_pattern(rng):
    tx = stored(optax.adam(1e-3), params="split8", state={"mu/kernel": "bfloat16", "nu": Log(highest=20)})
    opt_state = tx.init(weights(rng))
    assert formats_of(opt_state) == {
        "0/mu/kernel": Float(),
        **{f"0/nu/{name}": Log(highest=20) for name in ("bias", "gain", "kernel")},
    }
    assert opt_state.inner_state[0].mu["bias"].dtype == jnp.float32
    assert opt_state.inner_state[0].mu["kernel"].dtype == jnp.bfloat16


def test_names_of_parameters_are_no_fields(rng):
    """Parameters that are called as moments are."""
    params = {"mu": {"nu": weights(rng)["kernel"]}, "nu": weights(rng)["bias"]}
    opt_state = stored(standard(optax.adam(1e-3)), params="split8", state="8bit").init(params)
    adam = opt_state.inner_state[0]
    assert [leaf.dtype for leaf in jax.tree.leaves(adam.mu)] == [np.int8, np.int8]
    assert [leaf.dtype for leaf in jax.tree.leaves(adam.nu)] == [np.uint8, np.uint8]


def test_resident_bytes(rng):
    """Of AdamW, per parameter, what the model sees included."""
    leaves = {"kernel": jnp.zeros((64, 64), jnp.bfloat16)}
    expected = {
        ("split16", "float32"): 12,
        ("split8", "float32"): 11,
        ("stochastic", "float32"): 10,
        ("stochastic", "bfloat16"): 6,
        ("split8", "8bit"): 5,
        ("stochastic", "8bit"): 4,
    }
    for (params, state), size in expected.items():
        opt_state = stored(standard(optax.adamw(1e-3)), params=params, state=state).init(leaves)
        arrays = [leaf for leaf in jax.tree.leaves((leaves, opt_state)) if leaf.size > 1]
        assert sum(leaf.nbytes for leaf in arrays) == size * 64 * 64, (params, state)


# --- With other transforms ------------------------------------------------------------------------

KEPT = {"params": "split8", "state": "8bit"}


def adam(rate=1e-2):
    return standard(optax.adam(rate))


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


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions(name, rng):
    """One trace, the same structure, and the way that float32 goes, to a few units of what the model sees."""
    tx = COMPOSITIONS[name]()
    params, opt_state = jmp.optim.from_full_precision(tx, weights(rng, jnp.float32))
    before = structure_and_dtypes((params, opt_state))
    start = jmp.optim.full_precision_params(opt_state, params)
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, grads):
        traces.append(1)
        updates, opt_state = tx.update(grads, opt_state, params)
        return apply_updates(params, updates), opt_state

    plain = adam()
    full, plain_state = start, plain.init(start)
    scale = 2.0**15 if name == "in loss_scaled" else 1.0
    for _ in range(6):
        grads = gradients(rng)
        params, opt_state = step(params, opt_state, jax.tree.map(lambda g: g * scale, grads))
        updates, plain_state = plain.update(grads, plain_state, full)
        full = apply_updates(full, updates)
    assert len(traces) == 1
    assert structure_and_dtypes((params, opt_state)) == before
    found = jmp.optim.full_precision_params(opt_state, params)
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), found, start)
    assert all(0 < size < 0.3 for size in jax.tree.leaves(moved)) or "prune" in name
    if "prune" in name:
        assert np.mean(np.asarray(params["kernel"]) == 0) == 0.5
    elif "MultiSteps" not in name and "decay" not in name:
        # Six steps of at most 1e-2 each; moments of 8 bits are off by a quarter.
        distance = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), found, full)
        assert max(jax.tree.leaves(distance)) < 6e-2 / 3


@pytest.mark.parametrize("form", [fused, two_calls], ids=["fused", "two calls"])
@pytest.mark.parametrize("run", [pytest.param(lambda f: f, marks=pytest.mark.slow), jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("params", WEIGHTS)
@dtypes
def test_a_skipped_step_changes_no_bit(dtype, params, run, form, rng):
    tx = jmp.loss_scaled(stored(adam(), params=params, state="8bit"))
    step = run(form(tx))
    leaves = weights(rng, dtype)
    leaves["kernel"] = leaves["kernel"].at[0].set(jnp.asarray(-0.0, dtype))
    scaled = jax.tree.map(lambda g: g * 2.0**15, gradients(rng))
    leaves, opt_state = step(leaves, tx.init(leaves), scaled)
    bad = {**scaled, "bias": scaled["bias"].at[3].set(jnp.inf)}
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
    assert opt_state.inner_state.low["bias"] is None
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
    with pytest.raises(jmp.errors.InvalidStorageError, match="no state of this optimizer without stored"):
        jmp.optim.from_full_precision(tx, params, opt_state=adam().init(params))
    other = jax.tree.map(lambda leaf: jnp.zeros((3, *jnp.shape(leaf))), state)
    with pytest.raises(jmp.errors.InvalidStorageError, match="in the place of"):
        jmp.optim.from_full_precision(tx, params, opt_state=other)


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


# --- What is refused, and what is said ------------------------------------------------------------

REFUSED = {
    "parameters that do not exist": (lambda: stored(adam(), params="split9"), r"params='split9' .* 'split8'\?"),
    "a dtype": (lambda: stored(adam(), params=jnp.bfloat16), "params=.*bfloat16.* is no format"),
    "state that does not exist": (lambda: stored(adam(), state="8bits"), r"state='8bits' .* '8bit'\?"),
    "one format for all": (lambda: stored(adam(), state="log"), r"write state=\{'mu': 'log'\}"),
    "no mapping": (lambda: stored(adam(), state=8), "got 8"),
    "a format in a pattern": (lambda: stored(adam(), state={"mu": "ration"}), r"'ration'\} .* 'ratio'\?"),
    "an object": (lambda: stored(adam(), state={"mu": 8}), r"\{'mu': 8\} is no format"),
    "a seed": (lambda: stored(adam(), seed=-1), "seed must be .* got -1"),
    "a range": (lambda: Log(highest=200), "highest"),
    "a bound": (lambda: Ratio(bound=0.0), "bound"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_once(name):
    make, message = REFUSED[name]
    with pytest.raises(jmp.errors.InvalidStorageError, match=message):
        make()


REFUSED_AT_INIT = {
    "a pattern that matches nothing": (
        {"state": {"mew": "slog"}},
        jnp.bfloat16,
        r"Pattern 'mew' matches nothing .* 'mu', 'nu'",
    ),
    "two patterns": ({"state": {"mu": "slog", "kernel": "bfloat16"}}, jnp.bfloat16, "'mu' and 'kernel' ask for"),
    "a ratio without its neighbor": ({"state": {"nu": Ratio(relative_to="mv")}}, jnp.bfloat16, "relative to '0/mv"),
    "a ratio of a ratio": ({"state": {"mu": "ratio", "nu": "ratio"}}, jnp.bfloat16, "on its own"),
    "all float32": ({}, jnp.float32, r"from_full_precision\(tx, params\)"),
    "float8": ({}, jnp.float8_e4m3fn, "is float8_e4m3fn.* takes bfloat16"),
    "16 bits as float32": ({"params": "float32"}, jnp.float16, "'bias' is float16.*Choose params='split8'"),
}


@pytest.mark.parametrize("name", REFUSED_AT_INIT)
def test_refused_at_init(name, rng):
    options, dtype, message = REFUSED_AT_INIT[name]
    tx = stored(adam(), **{"params": "split8", **options})
    with pytest.raises(jmp.errors.InvalidStorageError, match=message):
        tx.init(weights(rng, dtype))


def test_update_without_parameters(rng):
    tx = stored(adam(), **KEPT)
    with pytest.raises(jmp.errors.InvalidStorageError, match="needs the parameters"):
        tx.update(gradients(rng), tx.init(weights(rng)))


def test_no_full_precision_in_a_state(rng):
    with pytest.raises(jmp.errors.InvalidStorageError, match="of type tuple"):
        jmp.optim.full_precision_params(adam().init(weights(rng)), weights(rng))


def test_unknown_state_is_named(rng):
    """It stays in float32."""

    def init(params):
        return optax.TraceState(params)._replace(trace=jax.tree.map(jnp.zeros_like, params))

    class OwnState(optax.TraceState):
        pass

    own = optax.GradientTransformation(lambda params: OwnState(init(params).trace), lambda u, s, p=None: (u, s))
    with pytest.warns(jmp.errors.UncompressedStateWarning, match="trace of OwnState"):
        opt_state = stored(own, **KEPT).init(weights(rng))
    assert opt_state.inner_state.trace["kernel"].dtype == jnp.float32
    named = stored(own, params="split8", state={"trace": "slog"}).init(weights(rng))
    assert named.inner_state.trace["kernel"].dtype == np.uint8


@dtypes
def test_lost_updates_are_said(dtype, rng):
    """Once, at `init`, with the wrapper that helps; not under that wrapper."""
    leaves = weights(rng, dtype)
    with pytest.warns(jmp.errors.LostUpdatesWarning, match=rf"'bias' \({dtype}\).*optim.master_weights"):
        jmp.loss_scaled(adam()).init(leaves)
    for params in WEIGHTS:
        jmp.loss_scaled(stored(adam(), params=params)).init(leaves)
    jmp.loss_scaled(adam()).init(weights(rng, jnp.float32))
