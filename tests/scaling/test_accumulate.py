"""accumulate_gradients: gradients of the whole batch from its parts, in float32, at one scale, bad parts left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.comparisons import DEVICES, assert_identical, compilations, fused, mesh, raw, standard
from support.jaxprs import equations
from support.microbatches import SCALE, both_policies, linear, rows_of

import jmp_lite as jmp
from jmp_lite import _compat

BAD_VALUES = [np.nan, np.inf, -np.inf]


def squares(params, x, y):
    """Linear regression."""
    return jnp.mean((x @ params["w"] - y) ** 2)


def wide(grad):
    """A gradient in float32, or wider if it is."""
    return np.asarray(grad) if grad.dtype in (np.float64, np.complex64) else np.asarray(grad).astype(np.float32)


def scaled(total, share):
    """A sum times a real number."""
    share = total.real.dtype.type(share)
    return total.real * share + 1j * (total.imag * share) if np.iscomplexobj(total) else total * share


def mean_by_hand(fun, params, x, state, good):
    """Losses of the good microbatches, each by itself, and their gradients summed in float32 one after the other."""
    kept = [
        jmp.scaled_value_and_grad(fun, loss_scale=state)(params, rows_of(x, i, len(good))) for i in np.flatnonzero(good)
    ]
    total = sum(wide(grads["w"]) for _, grads in kept)
    one = total.real.dtype.type(1)
    return [float(loss) for loss, _ in kept], {"w": scaled(total, one / total.real.dtype.type(len(kept)))}


# --- The same gradient as in one piece ---


@pytest.mark.covering(1)
@both_policies
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 24])
def test_mean_is_that_of_the_whole_batch(steps, policy, rng):
    """Loss and gradients are those of the whole batch, to the error of sums of so many float32 numbers."""
    n, d = 24, 5
    x, y, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((n, d), n, d))
    state = jmp.StaticLossScale(SCALE)
    grad_fn = jmp.accumulate_gradients(squares, steps, on_nonfinite=policy, loss_scale=state)
    loss, grads, *skipped = jax.jit(grad_fn)({"w": jnp.asarray(w)}, x, y)
    assert [int(s) for s in skipped] == ([0] if policy == "skip_microbatch" else [])
    x, y, w = (a.astype(np.float64) for a in (x, y, w))
    # Each matmul and sum rounds by at most 2**-24 of its magnitude: d to form the residual, n to sum, some to scale.
    unit = (2 * d + n + steps + 10) * 2.0**-24
    residual, magnitude = x @ w - y, np.abs(x) @ np.abs(w) + np.abs(y)
    bound = unit * np.mean(2 * np.abs(x) * magnitude[:, None], axis=0)
    assert np.all(np.abs(np.asarray(grads["w"]) / SCALE - np.mean(2 * x * residual[:, None], axis=0)) <= bound)
    assert abs(float(loss) - np.mean(residual**2)) <= 2 * unit * np.mean(magnitude**2)


@pytest.mark.covering(1)
@both_policies
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "complex64", "float8_e5m2"])
def test_sum_is_that_by_hand_to_the_bit(dtype, policy, rng):
    """Gradients of any dtype are summed in float32 (float64, complex64) in the order of the microbatches."""
    steps = 7
    complex_or_real = "complex64" if dtype == "complex64" else "float64" if dtype == "float64" else "float32"

    def loss_fn(params, x):
        return jnp.real((x * params["w"].astype(x.dtype)[None]).sum())

    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(rng.standard_normal((steps, 3)) * 2.0 ** rng.integers(-4, 4, (steps, 3)), complex_or_real)
        x = x * jnp.asarray(1 + 3j, x.dtype) if dtype == "complex64" else x
        params, state = {"w": jnp.ones(3).astype(dtype)}, jmp.StaticLossScale(SCALE)
        grad_fn = jmp.accumulate_gradients(loss_fn, steps, on_nonfinite=policy, loss_scale=state)
        for run in (jax.jit, lambda f: f):
            _, grads, *_ = run(grad_fn)(params, x)
            _, expected = mean_by_hand(loss_fn, params, x, state, [True] * steps)
            assert raw(grads["w"]) == raw(expected["w"])


@pytest.mark.covering(1)
@both_policies
@pytest.mark.parametrize("has_aux", [False, True])
def test_one_step_is_scaled_value_and_grad(has_aux, policy, rng):
    """With one microbatch the results are the same bits, in float32."""

    def loss_fn(params, x):
        loss = jnp.mean(jnp.tanh(x @ params["w"].astype(jnp.float32)) ** 2)
        return (loss, {"rows": x, "loss": loss}) if has_aux else loss

    params = {"w": jnp.asarray(rng.standard_normal((3, 2)), jnp.bfloat16), "unused": jnp.zeros(2), "n": jnp.int32(3)}
    x, state = jnp.asarray(rng.standard_normal((8, 3)), jnp.float32), jmp.DynamicLossScale(SCALE)

    def plain(state, *args):
        return jmp.scaled_value_and_grad(loss_fn, has_aux=has_aux, loss_scale=state)(*args)

    def accumulated(state, *args):
        return jmp.accumulate_gradients(loss_fn, 1, has_aux=has_aux, on_nonfinite=policy, loss_scale=state)(*args)

    for run in (jax.jit, lambda f: f):
        expected, true = run(plain)(state, params, x)
        value, grads, *_ = run(accumulated)(state, params, x)
        wide = {name: g if name == "n" else g.astype(jnp.float32) for name, g in true.items()}
        assert_identical(jax.tree.map(np.asarray, grads), jax.tree.map(np.asarray, wide))
        if has_aux:
            expected = expected[0], jax.tree.map(lambda a: a[None], expected[1])
        assert_identical(value, expected)


def test_scale_is_one_for_the_whole_window(rng):
    """Every microbatch is scaled alike although the scale would grow with each step, and it grows once per window."""
    tx = jmp.loss_scaled(optax.sgd(1.0), jmp.DynamicLossScale(4.0, period=1))
    params, steps = {"w": jnp.zeros(3)}, 4
    state = tx.init(params)
    for window in range(3):
        x = jnp.asarray(rng.integers(-8, 8, (8, 3)), jnp.float32)
        _, grads = jmp.accumulate_gradients(linear, steps, loss_scale=state)(params, x)
        np.testing.assert_array_equal(grads["w"], 4 * 2.0**window * np.asarray(x).mean(axis=0))
        params, state = jmp.apply_gradients(tx, grads, state, params)
    assert float(state.loss_scale.loss_scale) == 2.0**5


# --- Bad microbatches ---


def with_faults(rng, x, good, steps):
    """The rows with something not finite in one row of each bad microbatch."""
    x = np.array(x)
    for i in np.flatnonzero(~np.asarray(good)):
        x[i + steps * rng.integers(len(x) // steps), rng.integers(x.shape[1])] = rng.choice(BAD_VALUES)
    return jnp.asarray(x)


def random_faults(rng, steps):
    """Every single position, none, all, and some at random."""
    single = [np.arange(steps) != i for i in range(steps)]
    return [*single, np.ones(steps, bool), np.zeros(steps, bool), *(rng.random((4, steps)) < 0.6)]


def test_skip_window(rng):
    """One bad microbatch, wherever it stands and whatever it holds, makes the gradients so: the optimizer skips."""
    steps, tx = 5, jmp.loss_scaled(optax.sgd(1.0), jmp.DynamicLossScale(SCALE))
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    grad_fn = jax.jit(lambda state, *args: jmp.accumulate_gradients(linear, steps, loss_scale=state)(*args))
    for good in random_faults(rng, steps):
        x = with_faults(rng, rng.standard_normal((10, 3)).astype(np.float32), good, steps)
        loss, grads = grad_fn(state, params, x)
        assert bool(jmp.all_finite(grads)) == bool(jnp.isfinite(loss)) == all(good)
        after, stepped = fused(tx)(params, state, grads)
        assert bool(stepped.last_finite) == all(good)
        assert bool(jnp.all(after["w"] == params["w"])) != all(good)


def test_skip_microbatch(rng):
    """Bad microbatches are left out to the bit; if all are bad, the optimizer skips and the scale is lowered."""
    steps, tx = 5, jmp.loss_scaled(optax.sgd(1.0), jmp.DynamicLossScale(SCALE))
    params = {"w": jnp.ones(3)}
    state = tx.init(params)

    @jax.jit
    def grad_fn(state, *args):
        return jmp.accumulate_gradients(linear, steps, on_nonfinite="skip_microbatch", loss_scale=state)(*args)

    for good in random_faults(rng, steps):
        x = with_faults(rng, rng.standard_normal((steps, 3)).astype(np.float32), good, steps)
        loss, grads, skipped = grad_fn(state, params, x)
        assert skipped.dtype == jnp.int32
        assert int(skipped) == steps - sum(good)
        if any(good):
            losses, expected = mean_by_hand(linear, params, x, state, good)
            assert raw(grads["w"]) == raw(expected["w"])
            error = (steps + 2) * 2.0**-24 * np.mean(np.abs(losses))
            assert abs(float(loss) - np.mean(losses)) <= error
        else:
            assert np.all(np.isnan(grads["w"]))
            assert np.isnan(loss)
        _, stepped = fused(tx)(params, state, grads)
        assert bool(stepped.last_finite) == any(good)
        assert float(stepped.loss_scale.loss_scale) == (SCALE if any(good) else SCALE / 2)


@pytest.mark.parametrize("scale", [2.0**4, 2.0**12], ids=["no overflow", "overflow"])
def test_microbatch_that_overflows_at_this_scale(scale):
    """A gradient beyond float16 counts as bad by the scale, though the loss is finite."""
    x = jnp.array([1.0, 100.0, 2.0, 3.0])

    def loss_fn(w, x):
        return (w.astype(jnp.float16) * x.astype(jnp.float16)).sum().astype(jnp.float32)

    loss, grad, skipped = jmp.accumulate_gradients(
        loss_fn, 4, on_nonfinite="skip_microbatch", loss_scale=jmp.DynamicLossScale(scale)
    )(jnp.float32(1), x)
    good = [1.0, 2.0, 3.0] if scale > 2.0**10 else [1.0, 100.0, 2.0, 3.0]
    assert (float(loss), float(grad) / scale, int(skipped)) == (np.mean(good), np.mean(good), 4 - len(good))


def test_unscaling_that_overflows_counts_as_bad():
    """With a scale below one a gradient may be finite while scaled and infinite once unscaled."""
    state = jmp.DynamicLossScale(2.0**-10, min_loss_scale=0)
    loss, grad, skipped = jmp.accumulate_gradients(
        lambda w, x: jnp.sum(w * x[:, 0] * x[:, 1]), 2, on_nonfinite="skip_microbatch", loss_scale=state
    )(jnp.float32(2.0**-100), jnp.array([[2.0**12, 2.0**120], [1.0, 3.0]]))
    assert (float(loss), float(grad) * 2.0**10, int(skipped)) == (3 * 2.0**-100, 3, 1)


# --- Replicas ---


@pytest.fixture
def shards(rng):
    """Six rows for each device, with a fault in some microbatches of some devices; which microbatches are good."""
    steps = 3
    x = rng.integers(-8, 8, (DEVICES, 6, 3)).astype(np.float32)
    good = np.ones(steps, bool)
    good[rng.integers(steps)] = False
    device = rng.integers(DEVICES)
    x[device] = with_faults(rng, x[device], good, steps)
    return steps, jnp.asarray(x), good


def expected_mean(x, good, steps):
    """The mean of the rows of the good microbatches of all devices; exact, as the rows hold small whole numbers."""
    kept = [np.asarray(x)[:, i::steps] for i in range(steps) if good[i]]
    return np.mean(np.concatenate(kept, axis=1), axis=(0, 1), dtype=np.float64).astype(np.float32)


@pytest.mark.parametrize("axis_name", ["batch", None])
def test_replicas_of_pmap_leave_out_the_same(axis_name, shards):
    """With axis_name the microbatch that is bad on one replica is left out on all; without it on that one only."""
    steps, x, good = shards
    settings = {"on_nonfinite": "skip_microbatch", "axis_name": axis_name}
    grad_fn = jmp.accumulate_gradients(linear, steps, loss_scale=jmp.StaticLossScale(SCALE), **settings)

    def replica(x):
        _, grads, skipped = grad_fn({"w": jnp.zeros(3)}, x)
        return grads, skipped

    grads, skipped = jax.pmap(replica, "batch")(x)
    assert int(skipped.sum()) == (DEVICES if axis_name else 1)
    if axis_name:
        np.testing.assert_array_equal(grads["w"].mean(axis=0) / SCALE, expected_mean(x, good, steps))


@pytest.mark.covering(1)
@pytest.mark.parametrize("check_vma", [True, False])
@both_policies
def test_replicas_of_shard_map(check_vma, policy, shards):
    """Parameters and state stay provably the same on all devices; the window is skipped, or its bad part, by all."""
    steps, x, good = shards
    tx = jmp.loss_scaled(optax.sgd(1.0), jmp.DynamicLossScale(SCALE), axis_name="batch")

    def step(params, state, x):
        grad_fn = jmp.accumulate_gradients(linear, steps, on_nonfinite=policy, axis_name="batch", loss_scale=state)
        local = jax.lax.pcast(params, "batch", to="varying") if check_vma else params
        _, grads, *skipped = grad_fn(local, x[0])
        return *fused(tx)(params, state, jax.lax.pmean(grads, "batch")), skipped

    run = jax.jit(jax.shard_map(step, mesh=mesh(), in_specs=(P(), P(), P("batch")), out_specs=P(), check_vma=check_vma))
    params = {"w": jnp.zeros(3)}
    after, state, skipped = run(params, tx.init(params), x)
    if policy == "skip_window":
        assert_identical(after, params)
        assert not state.last_finite
        return
    assert [int(s) for s in skipped] == [1]
    np.testing.assert_array_equal(after["w"], -expected_mean(x, good, steps))
    for leaf in jax.tree.leaves((after, state)):
        assert len({np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}) == 1


def test_sharded_parameters_beside_replicated_ones(rng):
    """On a mesh of two axes, with some parameters split over one, all devices leave out the same microbatch."""
    grid = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]).reshape(4, 2), ("data", "model"))
    specs, steps = {"split": P("model"), "whole": P()}, 2
    grad_fn = jmp.accumulate_gradients(
        lambda p, x: jnp.mean(x * p["split"][None] + p["whole"]),
        steps,
        on_nonfinite="skip_microbatch",
        axis_name=("data", "model"),
        loss_scale=jmp.NoOpLossScale(),
    )

    def step(params, x):
        local = jax.lax.pcast(params, "data", to="varying")
        _, grads, skipped = grad_fn(local, x)
        return jax.lax.pmean(grads, "data"), skipped

    run = jax.jit(jax.shard_map(step, mesh=grid, in_specs=(specs, P("data", "model")), out_specs=(specs, P())))
    params = {"split": jnp.zeros(4), "whole": jnp.zeros(())}
    x = rng.integers(-8, 8, (16, 4)).astype(np.float32)
    x[rng.integers(16), rng.integers(4)] = rng.choice(BAD_VALUES)
    grads, skipped = run(params, jnp.asarray(x))
    assert int(skipped) == 1
    assert bool(jmp.all_finite(grads))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@both_policies
def test_sharded_rows_stay_on_their_device(kind, policy, rng):
    """Under jit with the batch split over devices the only exchange is the sum of the gradients, and the verdict."""
    grid = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("batch",), (getattr(jax.sharding.AxisType, kind),))
    steps, x = 4, rng.integers(-8, 8, (DEVICES * 8, 3)).astype(np.float32)
    state = jmp.StaticLossScale(SCALE)
    grad_fn = jax.jit(jmp.accumulate_gradients(linear, steps, on_nonfinite=policy, loss_scale=state))
    with jax.set_mesh(grid):
        params = jax.device_put({"w": jnp.zeros(3)}, NamedSharding(grid, P()))
        sharded = jax.device_put(x, NamedSharding(grid, P("batch")))
        loss, grads, *_ = grad_fn(params, sharded)
        compiled = grad_fn.lower(params, sharded).compile().as_text()
    np.testing.assert_array_equal(grads["w"] / SCALE, x.mean(axis=0))
    assert float(loss) == 0
    assert "all-reduce(" in compiled
    assert not any(f"{name}(" in compiled for name in ("all-gather", "all-to-all", "collective-permute"))


# --- One program ---


@both_policies
def test_one_trace_and_one_compilation(policy, rng):
    """Training over good and bad windows traces the loss once and compiles one program."""
    tx = jmp.loss_scaled(standard(optax.adam(0.1)), jmp.DynamicLossScale(SCALE, period=2))
    traces, steps = [], 4

    def loss_fn(params, x):
        traces.append(x)
        return linear(params, x)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x):
        loss, grads, *_ = jmp.accumulate_gradients(loss_fn, steps, on_nonfinite=policy, loss_scale=state)(params, x)
        return *fused(tx)(params, state, grads), loss

    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    windows = [
        with_faults(rng, rng.standard_normal((8, 3)).astype(np.float32), g, steps) for g in rng.random((6, 4)) < 0.8
    ]
    with compilations() as compiled:
        for x in windows:
            params, state, _ = step(params, state, x)
    assert len(traces) == 1
    assert compiled == ["jit(step)"]


@both_policies
def test_what_is_kept_between_microbatches(policy):
    """The loop carries one float32 tree like the parameters and stacks nothing but scalars and aux."""
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "v": jnp.ones(5), "n": jnp.int32(1)}

    def loss_fn(params, x):
        return (x @ params["w"].astype(jnp.float32)).mean() + params["v"].sum(), x[0, 0]

    def grad_fn(params, x, state):
        return jmp.accumulate_gradients(loss_fn, 4, has_aux=True, on_nonfinite=policy, loss_scale=state)(params, x)

    [loop] = equations("scan", grad_fn, params, jnp.ones((8, 3)), jmp.StaticLossScale(2.0))
    _, carried = _compat.scan_counts(loop.params)
    kept = [str(v.aval.str_short()) for v in loop.outvars[:carried]]
    assert sorted(kept) == ["float32[3,2]", "float32[5]"]
    assert {v.aval.shape for v in loop.outvars[carried:]} == {(4,)}


def test_memory_is_that_of_one_microbatch():
    """A wide activation of the whole batch never exists."""

    def loss_fn(params, x):
        return jnp.mean(jnp.sin(jnp.sin(x @ params)) ** 2)

    params, x, state = jnp.ones((4, 512)), jnp.ones((512, 4)), jmp.StaticLossScale(2.0)
    whole = jax.jit(jmp.scaled_value_and_grad(loss_fn, loss_scale=state)).lower(params, x).compile()
    parts = jax.jit(jmp.accumulate_gradients(loss_fn, 16, loss_scale=state)).lower(params, x).compile()
    sizes = [compiled.memory_analysis().temp_size_in_bytes for compiled in (parts, whole)]
    assert sizes[0] < sizes[1] / 4
