"""apply_gradients and the skip under it: hostile numbers, both forms of a skip, odd trees, donated buffers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.comparisons import (
    OPTIMIZERS,
    assert_close,
    assert_identical,
    compiled_as_on,
    fused,
    gradients_like,
    mesh,
    parameters,
    standard,
    two_calls,
    with_bad_element,
    with_scale_forced,
)

import jmp_lite as jmp

#: What happens to parameters of 16 bits is asked here of plain optimizers.
pytestmark = pytest.mark.filterwarnings("ignore:Parameters of 16 bits")

FORMS = {
    "fused": fused,
    "two calls": two_calls,
    "fused, jit": lambda tx: jax.jit(fused(tx)),
    "two calls, jit": lambda tx: jax.jit(two_calls(tx)),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def adam():
    return standard(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.125)))


# --- Numbers that must not get through ---


@functools.cache
def clipped_adam(form):
    """Clipped Adam with a dynamic scale, and a step of it: compiled once for each dtype of gradients."""
    tx = jmp.loss_scaled(adam(), jmp.DynamicLossScale(1.0, min_loss_scale=2.0**-100))
    return tx, form(tx)


def scale_after_skip(form, scale, grads):
    """Asserts that a step from ones with these gradients changes nothing else, and returns the scale after it."""
    tx, step = clipped_adam(form)
    params = {"w": jnp.ones(grads.shape, jnp.complex64 if jnp.iscomplexobj(grads) else jnp.float32)}
    state = tx.init(params)
    state = state._replace(loss_scale=with_scale_forced(state.loss_scale, scale))
    new_params, new_state = step(params, state, {"w": grads})
    assert_identical(new_params, params)
    assert_identical(new_state.inner_state, state.inner_state)
    assert [int(x) for x in new_state[2:5]] == [0, 1, 1]
    return new_state.loss_scale.loss_scale


@every_form
@pytest.mark.parametrize("value", [0.0, np.inf, np.nan, 2.0**-130, 2.0**127])
@pytest.mark.parametrize("gradient", [0.0, 1.0])
def test_collapsed_scale_is_survived(value, gradient, form):
    """A scale edited to something unusable (torch writes NaN at 0, -inf at 2**-130) costs a step and is then usable."""
    assert 2.0**-100 <= scale_after_skip(form, value, jnp.full(8, gradient)) <= 2.0**24


HOSTILE = {
    "product with 1 / scale overflows": (2.0**-70, jnp.float32, [1e18]),
    "norm overflows after unscaling": (2.0**-20, jnp.float32, [1e15]),
    "square overflows": (1.0, jnp.float32, [1e25]),
    "sum of squares overflows": (1.0, jnp.float32, [1.5e19] * 8),
    "nan": (1.0, jnp.float32, [np.nan]),
    "inf": (1.0, jnp.float32, [1.0, np.inf]),
    "-inf": (1.0, jnp.float32, [-np.inf]),
    "inf and -inf": (1.0, jnp.float32, [np.inf, -np.inf]),
    "float16 inf": (2.0**10, jnp.float16, [1.0, np.inf]),
    "bfloat16 nan": (2.0**10, jnp.bfloat16, [1.0, np.nan]),
    "complex with a bad imaginary part": (1.0, jnp.complex64, [1.0, complex(1.0, np.inf)]),
}


@every_form
@pytest.mark.parametrize(("scale", "dtype", "values"), HOSTILE.values(), ids=HOSTILE)
def test_overflow_anywhere_is_skipped(scale, dtype, values, form):
    """NaN, infinities and overflows in unscaling or in a norm skip the step; a clip would make zeros of some."""
    grads = np.ones(8, np.complex64)
    grads[: len(values)] = values
    grads = jnp.asarray(grads if dtype == jnp.complex64 else grads.real, dtype)
    assert scale_after_skip(form, scale, grads) == scale / 2


@every_form
def test_half_gradients_whose_half_norm_overflows_still_train(form):
    """Ten float16 gradients of 3e4 have an infinite float16 norm but a fine float32 one, which clipping uses."""
    tx = jmp.loss_scaled(
        standard(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))), jmp.StaticLossScale(2.0)
    )
    params = {"w": jnp.zeros(10)}
    params, state = form(tx)(params, tx.init(params), {"w": jnp.full(10, 3e4, jnp.float16)})
    # Ten squares, a sum, a root and a division: 13 roundings of eps/2, the direction is exact.
    np.testing.assert_allclose(params["w"], -1 / math.sqrt(10), rtol=13 / 2 * 2.0**-23)
    assert bool(state.last_finite)


@every_form
def test_large_finite_gradients_are_not_skipped(form):
    """The verdict is not stricter than it says: 1e18 in a small tree is fine, and so are zeros and subnormals."""
    tx = jmp.loss_scaled(optax.sgd(1.0), jmp.DynamicLossScale(1.0, max_loss_scale=2.0**126))
    params = {"w": jnp.zeros(3)}
    for scale in (1.0, 2.0**60):  # what counts is the size after unscaling
        state = tx.init(params)
        state = state._replace(loss_scale=with_scale_forced(state.loss_scale, scale))
        updated, state = form(tx)(params, state, {"w": jnp.array([1e18, 0.0, 1e-40]) * scale})
        assert bool(state.last_finite)
        assert float(updated["w"][0]) == -np.float32(1e18)


def test_what_is_taken_has_a_finite_norm(rng):
    """Whatever the magnitudes, gradients that pass have a global norm that float32 can hold."""
    grads = {"w": jnp.asarray(10 ** rng.uniform(15, 23, (500, 4)), jnp.float32), "b": jnp.zeros((500, 3))}
    grads["b"] += jnp.asarray(10 ** rng.uniform(15, 20, (500, 1)), jnp.float32)
    tx = jmp.loss_scaled(optax.identity(), jmp.NoOpLossScale())
    start = tx.init(None)
    taken = jax.jit(jax.vmap(lambda g: tx.update(g, start)[1].last_finite))(grads)
    norms = jax.vmap(optax.tree.norm)(grads)
    assert 0 < int(taken.sum()) < 500
    assert np.all(np.isfinite(norms[taken]))
    assert np.all(np.asarray(taken)[norms < 1e18])


PLATFORMS = ["cpu", "cuda", "tpu"]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_no_element_is_overlooked(platform, rng):
    """First, last or in between, in leaves of any size and dtype, one bad element decides, on every kind of device."""
    shapes = [1, 7, 8, 33, 1000, 70_000, (700, 100), (100, 700), 70_001]
    grads = {f"{i}": jnp.ones(shape, jnp.float16 if i % 2 else jnp.float32) for i, shape in enumerate(shapes)}
    tx = jmp.loss_scaled(optax.identity(), jmp.NoOpLossScale())

    def verdict(grads):
        return tx.update(grads, tx.init(None))[1].last_finite

    with compiled_as_on(platform) as choices:
        # Inside shard_map leaves are local: only there may they be folded and concatenated.
        check = jax.jit(jax.shard_map(verdict, mesh=mesh(), in_specs=P(), out_specs=P()))
        assert bool(check(grads))
    assert len(choices) > 1
    for name, good in grads.items():
        for position in {0, good.size - 1, good.size // 2, int(rng.integers(good.size))}:
            leaf = np.ones(good.shape, good.dtype)
            leaf.flat[position] = rng.choice([np.nan, np.inf, -np.inf])
            assert not bool(check({**grads, name: leaf})), (good.shape, position)


@pytest.mark.parametrize(("platform", "reductions"), [("cpu", 42), ("cuda", 4), ("tpu", 41)])
def test_a_gpu_checks_large_leaves_of_one_size_together(platform, reductions):
    """34 of one size, more than a kernel reads, 6 of another shape and size, one of another dtype, and a small one."""
    wide, other, half = jnp.ones((256, 300)), jnp.ones((300, 257)), jnp.ones((256, 300), jnp.bfloat16)
    grads = {"wide": [wide, wide.T] * 17, "other": [other] * 6, "half": half, "small": jnp.ones(3)}
    tx = jmp.loss_scaled(optax.identity(), jmp.NoOpLossScale())
    check = jax.shard_map(
        lambda grads: tx.update(grads, tx.init(None))[1].last_finite, mesh=mesh(), in_specs=P(), out_specs=P()
    )
    program = jax.jit(check).trace(grads).lower(lowering_platforms=(platform,)).as_text()
    assert program.count("call @_are_below") == reductions


@pytest.mark.parametrize("is_stored", [False, True], ids=["plain", "stored"])
@pytest.mark.parametrize("form", [fused, two_calls])
def test_a_tpu_branches_only_where_it_would_decode_and_encode_for_nothing(form, is_stored):
    """A CPU always branches, a GPU never does."""
    inner, params = optax.sgd(0.5), {"w": jnp.ones(3, jnp.bfloat16)}
    tx = jmp.loss_scaled(jmp.optim.stored(inner, params="split16") if is_stored else inner)
    traced = jax.jit(form(tx)).trace(params, tx.init(params), params)
    branches = {name: traced.lower(lowering_platforms=(name,)).as_text().count("stablehlo.case") for name in PLATFORMS}
    assert branches["cpu"] > branches["cuda"]
    assert branches["tpu"] == branches["cpu" if is_stored else "cuda"]


# --- Two forms of a skip ---


@pytest.mark.covering(1)
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("call", [fused, two_calls])
def test_forms_of_a_skip_agree(platform, call, rng):
    """What a CPU compiles (cond) and what others compile (select) give the eager steps and freeze bad ones exactly."""
    for optimizer in ("adamw", "masked"):
        tx = jmp.loss_scaled(standard(OPTIMIZERS[optimizer]()), jmp.DynamicLossScale(4.0))
        params = parameters(rng)
        eager = fast = params, tx.init(params)
        with compiled_as_on(platform) as choices:
            step = jax.jit(call(tx))
            for bad in (False, True, False):
                grads = gradients_like(params, rng, size=4.0)
                grads = with_bad_element(grads, rng) if bad else grads
                before, fast = fast, step(*fast, grads)
                eager = call(tx)(*eager, grads)
                if bad:
                    assert_identical((fast[0], fast[1].inner_state), (before[0], before[1].inner_state))
        assert choices
        assert_close(fast, eager, ulps=2 * 10 / 2, least=1.0)  # ten roundings per update of Adam's formula, two updates


@pytest.mark.parametrize("call", [fused, two_calls])
def test_only_the_cpu_branches(call, rng):
    """Lowered for GPU and TPU the step has no branch (the host would have to wait), for the CPU it has one."""
    tx = jmp.loss_scaled(adam())
    params = parameters(rng)
    traced = jax.jit(call(tx)).trace(params, tx.init(params), params)

    def branches(platform):
        return traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.case")

    # Each platform_dependent leaves a `case` on a constant, which XLA removes.
    assert branches("cuda") == branches("rocm") == branches("tpu") == branches("cpu") - 1


# --- Trees ---


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_frozen_leaves(compiled, key):
    """Integers and keys among the parameters have float0 for a gradient, None has None, and all stay as they are."""
    params = {"w": jnp.ones(3), "step": jnp.int32(4), "key": key, "none": None}
    tx = jmp.loss_scaled(
        optax.masked(standard(optax.adam(0.125)), {"w": True, "step": False, "key": False, "none": None})
    )

    def step(params, state, size):
        _, grads = jmp.scaled_value_and_grad(lambda p: jnp.sum(p["w"] * size), loss_scale=state)(params)
        updates, _ = tx.update(grads, state, params)
        return *jmp.apply_gradients(tx, grads, state, params), updates["w"]

    step = jax.jit(step) if compiled else step
    new_params, state, update = step(params, tx.init(params), jnp.float32(1))
    np.testing.assert_allclose(new_params["w"], 0.875, rtol=1e-5)  # Adam's eps and bias correction
    np.testing.assert_allclose(update, -0.125, rtol=1e-5)
    assert_identical({**new_params, "w": 0}, {**params, "w": 0})
    skipped, _, update = step(new_params, state, jnp.float32(np.inf))
    assert_identical(skipped, new_params)
    assert_identical(update, -jnp.zeros(3))


def test_frozen_leaves_without_a_mask():
    """None as a gradient leaves its parameter alone (optax.apply_updates does the same, but raises for integers)."""
    params = {"w": jnp.ones(2), "frozen": jnp.ones(2)}
    tx = jmp.loss_scaled(optax.sgd(0.5), jmp.StaticLossScale(2.0))
    params, _ = jmp.apply_gradients(tx, {"w": jnp.ones(2), "frozen": None}, tx.init(params), params)
    np.testing.assert_array_equal(params["w"], [0.75, 0.75])
    np.testing.assert_array_equal(params["frozen"], [1, 1])


@pytest.mark.covering(1)
@every_form
@pytest.mark.parametrize("params", [{}, (), None, {"a": [], "b": None}], ids=str)
def test_empty_trees(params, form):
    """A model without parameters steps; nothing in it can be non-finite."""
    tx = jmp.loss_scaled(adam(), jmp.DynamicLossScale(4.0, period=1))
    new_params, state = form(tx)(params, tx.init(params), params)
    assert new_params == params
    assert bool(state.last_finite)
    assert float(state.loss_scale.loss_scale) == 8


@every_form
def test_complex_parameters(form):
    """Complex parameters are updated with both parts of the gradient."""
    tx = jmp.loss_scaled(optax.sgd(0.5), jmp.StaticLossScale(4.0))
    params = {"z": jnp.array([1 + 1j], jnp.complex64), "w": jnp.ones(1)}
    grads = {"z": jnp.array([4 - 8j], jnp.complex64), "w": jnp.full(1, 4.0)}
    params, _ = form(tx)(params, tx.init(params), grads)
    assert_identical(params, {"z": jnp.array([0.5 + 2j], jnp.complex64), "w": jnp.full(1, 0.5)})


def test_python_and_numpy_parameters():
    """Parameters that are Python floats or NumPy arrays become arrays of their dtype."""
    tx = jmp.loss_scaled(optax.sgd(0.5), jmp.StaticLossScale(2.0))
    params = {"python": 1.0, "numpy": np.ones(2, np.float32), "scalar": np.float16(1)}
    grads = {"python": jnp.float32(2), "numpy": jnp.full(2, 2.0), "scalar": jnp.float16(2)}
    step = jax.jit(lambda p, s, g: jmp.apply_gradients(tx, g, s, p))
    for run in (fused(tx), step):
        new, _ = run(params, tx.init(params), grads)
        assert {k: (v.dtype.name, float(np.max(v))) for k, v in new.items()} == {
            "python": ("float32", 0.5),
            "numpy": ("float32", 0.5),
            "scalar": ("float16", 0.5),
        }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_update_is_added_in_float32_and_rounded_once(dtype, rng):
    """A half parameter plus a float32 update is the nearest half number to the exact sum."""
    params = jnp.asarray(rng.uniform(1, 2, 1000), dtype)
    updates = jnp.asarray(rng.uniform(-1, 1, 1000), jnp.float32)
    tx = jmp.loss_scaled(
        optax.GradientTransformation(lambda p: (), lambda u, s, p=None: (updates, s)), jmp.NoOpLossScale()
    )
    new, _ = jmp.apply_gradients(tx, updates, tx.init(params), params)
    exact = np.asarray(params).astype(np.float64) + np.asarray(updates).astype(np.float64)
    half_ulp = (
        float(jnp.finfo(dtype).eps) * 2.0 ** np.floor(np.log2(np.maximum(np.abs(exact), jnp.finfo(dtype).tiny))) / 2
    )
    # The sum is rounded to float32 first: below 4 that moves a tie of the half format by up to 2**-23.
    assert np.all(np.abs(np.asarray(new).astype(np.float64) - exact) <= half_ulp + 2.0**-23)


# --- Memory, batches, devices ---


def trained(optimizer, dtype, rng):
    tx = jmp.loss_scaled(standard(OPTIMIZERS[optimizer]()), jmp.DynamicLossScale(2.0))
    params = parameters(rng, dtype)
    return tx, params, tx.init(params), gradients_like(params, rng)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [False, True])
def test_donated_buffers_are_used(dtype, bad, rng):
    """Donating parameters and state raises no warning, deletes them, and every byte is reused."""
    tx, params, state, grads = trained("adamw", dtype, rng)
    grads = with_bad_element(grads, rng) if bad else grads
    step = jax.jit(fused(tx), donate_argnums=(0, 1))
    donated = jax.tree.leaves((params, state._replace(last_finite=None)))  # the old verdict is not read
    size = sum(leaf.nbytes for leaf in donated)
    memory = step.lower(params, state, grads).compile().memory_analysis()
    assert memory.alias_size_in_bytes == size
    step(params, state, grads)
    assert all(leaf.is_deleted() for leaf in donated)


def test_batch_of_scales(rng):
    """Under vmap every member of a batch has its own verdict, scale and skip; the result is that of a loop."""
    tx = jmp.loss_scaled(adam(), jmp.DynamicLossScale(4.0, period=1))
    params = [parameters(rng) for _ in range(3)]
    grads = [gradients_like(p, rng, size=4.0) for p in params]
    grads[1] = with_bad_element(grads[1], rng)
    stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
    batch = [jax.tree.map(stack, *trees) for trees in (params, [tx.init(p) for p in params], grads)]
    for call in (fused, two_calls):
        together = jax.jit(jax.vmap(call(tx)))(*batch)
        alone = [call(tx)(p, tx.init(p), g) for p, g in zip(params, grads, strict=True)]
        assert_close(together, jax.tree.map(stack, *alone), ulps=10 / 2, least=1.0)  # ten roundings of Adam's formula
        np.testing.assert_array_equal(together[1].loss_scale.loss_scale, [8, 2, 8])


def test_sharded_arrays(rng):
    """Under jit one bad element on one device skips the step for all; parameters keep their sharding."""
    sharded = NamedSharding(mesh(), P("batch"))
    params = jax.device_put({"w": jnp.ones((16, 4)), "b": jnp.ones(8)}, sharded)
    tx = jmp.loss_scaled(adam(), jmp.DynamicLossScale(4.0))
    step, state = jax.jit(fused(tx)), tx.init(params)
    good = gradients_like(params, rng, size=4.0)
    bad = jax.device_put({"w": good["w"].at[15, 3].set(np.inf), "b": good["b"]}, sharded)
    skipped, skipped_state = step(params, state, bad)
    assert_identical(skipped, params)
    assert float(skipped_state.loss_scale.loss_scale) == 2
    taken, _ = step(params, state, jax.device_put(good, sharded))
    assert taken["w"].sharding.is_equivalent_to(sharded, 2)
    expected, _ = fused(tx)(jax.device_get(params), jax.device_get(state), good)
    # The norm sums 72 squares in another order (72 eps/2), then ten roundings of Adam's formula.
    assert_close(taken, expected, ulps=82 / 2, least=1.0)
