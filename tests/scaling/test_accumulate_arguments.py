"""accumulate_gradients: which arguments are split and how, what may stand around it, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.comparisons import DEVICES, assert_identical
from support.jaxprs import equations
from support.microbatches import SCALE, both_policies, linear, rows_of

import jmp_lite as jmp
from jmp_lite import errors

# --- Arguments ---


def loss_of_many(a, x, b, y, *, factor=1.0):
    return factor * jnp.mean(x * a + y * b)


@pytest.mark.parametrize(
    ("argnums", "batch_argnums"), [((0, 2), None), ((2, 0), (1, 3)), (-2, (1, -1)), (0, [1, 3]), ((), (1, 3))], ids=str
)
def test_argnums(argnums, batch_argnums, rng):
    """Gradients come in the order asked for; the batch is what is not differentiated, or what is named."""
    x, y = (jnp.asarray(rng.integers(-8, 8, 8), jnp.float32) for _ in range(2))
    args, state = (jnp.float32(2), x, jnp.float32(3), y), jmp.StaticLossScale(4.0)
    grad_fn = jmp.accumulate_gradients(loss_of_many, 4, argnums, batch_argnums=batch_argnums, loss_scale=state)
    loss, grads = jax.jit(grad_fn)(*args, factor=jnp.float32(2))
    expected = jmp.scaled_value_and_grad(loss_of_many, argnums, loss_scale=state)(*args, factor=jnp.float32(2))
    assert_identical((loss, jax.tree.map(np.asarray, grads)), (expected[0], jax.tree.map(np.asarray, expected[1])))


def test_microbatches_are_strided_and_aux_is_stacked(rng):
    """Microbatch i holds rows i, i + n, ... of every array of the batch, of any dtype, with its weak type."""
    weak = jax.lax.full((12,), 2.0)
    batch = {
        "weak": weak,
        "x": jnp.arange(12.0),
        "nested": [jnp.arange(24, dtype=jnp.int8).reshape(12, 2), None],
        "np": np.arange(12),
    }
    seen = []

    def loss_fn(w, batch, fixed):
        seen.append(jax.tree.map(lambda a: a.weak_type, batch))
        return w * fixed, batch

    grad_fn = jmp.accumulate_gradients(loss_fn, 3, has_aux=True, batch_argnums=1, loss_scale=jmp.NoOpLossScale())
    (loss, aux), grad = grad_fn(2.0, batch, 5.0)
    assert (float(loss), float(grad)) == (10, 5)
    for i in range(3):
        part = jax.tree.map(lambda a, i=i: np.asarray(a[i]), aux)
        jax.tree.map(np.testing.assert_array_equal, part, rows_of(batch, i, 3))
    assert len(seen) == 1
    assert [name for name, flag in seen[0].items() if flag is True] == ["weak"]


def test_keys(key):
    """A key for each microbatch, or for each row, or the same for all."""
    steps, x, state = 4, jnp.ones(8), jmp.NoOpLossScale()
    keys, many = jax.random.split(key, steps), jax.random.split(key, 8)

    def one_each(w, x, keys):
        assert keys.shape == (1,)
        return w * jax.random.normal(keys[0]) * x.mean(), jax.random.normal(keys[0])

    (_, aux), _ = jmp.accumulate_gradients(one_each, steps, has_aux=True, loss_scale=state)(1.0, x, keys)
    np.testing.assert_array_equal(aux, jax.vmap(jax.random.normal)(keys))

    def per_row(w, x, keys):
        return w * jax.vmap(jax.random.normal)(keys).mean(), jax.random.key_data(keys)

    (_, aux), _ = jmp.accumulate_gradients(per_row, steps, has_aux=True, loss_scale=state)(1.0, x, many)
    np.testing.assert_array_equal(aux, np.moveaxis(np.asarray(jax.random.key_data(many)).reshape(2, 4, -1), 1, 0))

    def same(w, x, key):
        return w * jax.random.normal(key), jax.random.normal(key)

    (_, aux), _ = jmp.accumulate_gradients(same, steps, has_aux=True, batch_argnums=1, loss_scale=state)(1.0, x, key)
    np.testing.assert_array_equal(aux, np.full(4, jax.random.normal(key)))


@both_policies
def test_leaves_that_cannot_be_differentiated_get_float0(policy, key):
    """Integers, booleans and keys among the parameters get float0, as without accumulation."""
    params = {"w": jnp.ones(3), "step": jnp.int32(2), "on": jnp.array(True), "key": key, "n": 5, "scalar": 1.5}

    def loss_fn(p, x):
        return jnp.mean(x) * p["w"].sum() * p["scalar"]

    state = jmp.StaticLossScale(2.0)
    _, grads, *_ = jmp.accumulate_gradients(loss_fn, 2, on_nonfinite=policy, loss_scale=state)(params, jnp.ones(4))
    _, expected = jmp.scaled_value_and_grad(loss_fn, loss_scale=state)(params, jnp.ones(4))
    assert_identical(jax.tree.map(np.asarray, grads), jax.tree.map(np.asarray, expected))


def test_transformations_agree(rng):
    """jit, vmap over models, remat inside and autocast outside give what the plain call gives."""
    params, state = {"w": jnp.asarray(rng.integers(-8, 8, (2, 3)), jnp.float32)}, jmp.StaticLossScale(4.0)
    x = jnp.asarray(rng.integers(-8, 8, (8, 3)), jnp.float32)
    grad_fn = lambda fun: jmp.accumulate_gradients(fun, 4, loss_scale=state)  # noqa: E731
    one = [grad_fn(linear)(jax.tree.map(lambda p, i=i: p[i], params), x) for i in range(2)]
    expected = jax.tree.map(lambda *models: jnp.stack(models), *one)
    for fun in (linear, jax.checkpoint(linear)):
        call = jax.vmap(lambda p, fun=fun: grad_fn(fun)(p, x))
        assert_identical(call(params), expected)
        assert_identical(jax.jit(call)(params), expected)
    hessian = jax.grad(
        lambda p: jmp.accumulate_gradients(lambda w, x: jnp.mean(x * w**2), 4, loss_scale=state)(p, x[:, 0])[1]
    )
    assert float(hessian(1.0)) == 2 * 4 * float(x[:, 0].mean())


@both_policies
def test_with_autocast(policy, rng):
    """A function under autocast multiplies in half precision in the loop, and its gradients are summed in float32."""
    params, x = {"w": jnp.ones((16, 2))}, jnp.asarray(rng.integers(-4, 4, (8, 16)), jnp.float32)

    def loss_fn(params, x):
        return jnp.mean((x @ params["w"]) ** 2)

    state = jmp.DynamicLossScale(SCALE)
    autocast = jmp.autocast(loss_fn, "mixed_bfloat16")
    grad_fn = lambda p, x, s: jmp.accumulate_gradients(autocast, 4, on_nonfinite=policy, loss_scale=s)(p, x)  # noqa: E731
    products = equations("dot_general", grad_fn, params, x, state)
    assert {str(v.aval.dtype) for eqn in products for v in eqn.invars} == {"bfloat16"}
    _, grads, *_ = jax.jit(grad_fn)(params, x, state)
    assert grads["w"].dtype == jnp.float32


def test_double_precision():
    """Under x64 float64 stays float64, and float32 stays float32."""
    with jax.enable_x64(True):
        for dtype in (jnp.float64, jnp.float32):
            loss, grad, skipped = jmp.accumulate_gradients(
                lambda w, x: jnp.mean(w * x), 3, on_nonfinite="skip_microbatch", loss_scale=jmp.DynamicLossScale(4.0)
            )(dtype(1), jnp.full(3, 0.1, dtype))
            assert loss.dtype == grad.dtype == dtype
            assert skipped.dtype == jnp.int32


# --- Errors ---

X = jnp.ones((8, 2))
ERRORS = {
    "no microbatch": (
        lambda: jmp.accumulate_gradients(linear, 0, loss_scale=jmp.NoOpLossScale()),
        "num_microbatches must be a whole number, at least 1, got 0. ",
    ),
    "not a whole number": (
        lambda: jmp.accumulate_gradients(linear, 2.0, loss_scale=jmp.NoOpLossScale()),
        "num_microbatches must be a whole number, at least 1, got 2.0. ",
    ),
    "unknown policy": (
        lambda: jmp.accumulate_gradients(linear, 2, on_nonfinite="skip", loss_scale=jmp.NoOpLossScale()),
        "on_nonfinite must be 'skip_window' or 'skip_microbatch', got 'skip'. ",
    ),
    "not divisible": (
        lambda: call(3, {"x": X}),
        "Argument 1, leaf 'x' is float32[8, 2]: 8 rows do not divide into num_microbatches=3. Drop 2 of them, or ",
    ),
    "scalar": (lambda: call(2, X, jnp.float32(1)), "Argument 2 is float32[], which has no leading axis to split. "),
    "number": (lambda: call(2, {"a": [X, 3]}), "Argument 1, leaf 'a/1' is 3, which has no leading axis to split. "),
    "other length": (
        lambda: call(2, {"x": X, "y": X[:4]}),
        "Argument 1, leaf 'y' is float32[4, 2], but Argument 1, leaf 'x' has 8 rows. ",
    ),
    "a label per microbatch": (
        lambda: call(4, X, X[:4]),
        "Argument 2 is float32[4, 2], but Argument 1 has 8 rows. ",
    ),
    "no batch": (lambda: call(2), "No array to split into num_microbatches=2: "),
    "only keywords": (lambda: call(2, x=X), "No array to split into num_microbatches=2: "),
    "both": (
        lambda: jmp.accumulate_gradients(linear, 2, batch_argnums=(0, 1), loss_scale=jmp.NoOpLossScale())({}, X),
        "batch_argnums=(0, 1) names argument 0, which argnums differentiates. ",
    ),
}


def call(steps, *batch, **kwargs):
    return jmp.accumulate_gradients(lambda w, *a, **k: w, steps, loss_scale=jmp.NoOpLossScale())(1.0, *batch, **kwargs)


@pytest.mark.parametrize(("fail", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(fail, message):
    """Whatever cannot be split is quoted with its path, with what to do."""
    with pytest.raises(jmp.errors.InvalidMicrobatchError) as error:
        fail()
    assert str(error.value).startswith(message)
    assert isinstance(error.value, ValueError)


def test_rows_of_one_device_that_do_not_divide():
    """On an explicit mesh the rows of each device must divide; JAX would refuse to fold them without saying why."""
    grid = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("batch",), (jax.sharding.AxisType.Explicit,))
    with (
        jax.set_mesh(grid),
        pytest.raises(
            jmp.errors.InvalidMicrobatchError,
            match=r": 3 rows on each device do not divide into num_microbatches=2\. .* from 1, 3\.",
        ),
    ):
        call(2, jax.device_put(jnp.ones((3 * DEVICES, 2)), NamedSharding(grid, P("batch"))))


def test_a_batch_without_rows_is_refused():
    """Its mean loss is NaN, and its gradients are zeros that a step would take for good ones."""
    with pytest.raises(jmp.errors.InvalidMicrobatchError, match=r"float32\[0, 3\], which has no rows to split"):
        call(2, jnp.ones((0, 3)))


def test_scalar_key_is_told_how(key):
    """The message for a key gives the call that splits it."""
    with pytest.raises(jmp.errors.InvalidMicrobatchError, match=r"jax\.random\.split\(key, 2\), .* key\[0\]"):
        call(2, X, key)


def test_other_errors_are_those_of_one_step():
    """Bad losses, positions and states are refused as without accumulation."""
    with pytest.raises(jmp.errors.InvalidFunctionError, match=r"got int32\[\]"):
        jmp.accumulate_gradients(lambda w, x: jnp.int32(3), 2, loss_scale=jmp.NoOpLossScale())(1.0, X)
    with pytest.raises(jmp.errors.LossScaleNotFoundError):
        jmp.accumulate_gradients(linear, 2, loss_scale={"w": jnp.ones(2)})({"w": jnp.ones(2)}, X)
    with pytest.raises(TypeError, match=r"^argnums=5 does not fit"):
        jmp.accumulate_gradients(linear, 2, 5, loss_scale=jmp.NoOpLossScale())({"w": jnp.ones(2)}, X)
    with pytest.raises(TypeError, match=r"^batch_argnums=\(1, 1\) names an argument twice"):
        jmp.accumulate_gradients(linear, 2, batch_argnums=(1, 1), loss_scale=jmp.NoOpLossScale())({"w": jnp.ones(2)}, X)


# --- Microbatches ---


def accumulate(parts, *batch, **options):
    scale = options.pop("loss_scale", jmp.StaticLossScale(4.0))
    return jmp.accumulate_gradients(lambda w, x: jnp.mean(w * x), parts, loss_scale=scale, **options)(2.0, *batch)


REFUSED = {
    "a boolean": (True, 4, "num_microbatches must be a whole number, at least 1, got True."),
    "a negative number": (-2, 4, "num_microbatches must be a whole number, at least 1, got -2."),
    "more than rows": (3, 2, "2 rows do not divide into num_microbatches=3. Take num_microbatches from 1, 2."),
    "twice the rows": (8, 4, "4 rows do not divide into num_microbatches=8. Take num_microbatches from 1, 2, 4."),
    "a rest": (
        4,
        6,
        "6 rows do not divide into num_microbatches=4. Drop 2 of them, or take num_microbatches from 1, 2, 3, 6.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_how_many_microbatches_there_may_be(case):
    parts, rows, message = REFUSED[case]
    with pytest.raises(errors.InvalidMicrobatchError, match=re.escape(message)):
        accumulate(parts, np.ones(rows, np.float32))


@pytest.mark.parametrize("parts", [1, 4, np.int64(2), np.uint8(4)], ids=repr)
def test_numbers_of_microbatches_may_be_integers_of_any_kind(parts):
    loss, grad = accumulate(parts, np.float32([1, 2, 3, 6]))
    assert (float(loss), float(grad)) == (6, 12)


def test_the_scale_of_a_name_is_used_for_microbatches():
    scales = {"a": jmp.StaticLossScale(2.0), "b": jmp.StaticLossScale(8.0)}
    _, grad = accumulate(2, np.ones(4, np.float32), loss_scale=scales, name="b")
    assert float(grad) == 8
    with pytest.raises(errors.LossScaleNotFoundError, match="2 loss scales"):
        accumulate(2, np.ones(4, np.float32), loss_scale=scales)
