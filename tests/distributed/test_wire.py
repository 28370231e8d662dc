"""What travels between devices: parameters in the compute dtype, sums of gradients in ``reduce_dtype``."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.comparisons import DEVICES, assert_identical
from support.jaxprs import contractions
from support.spread import AXIS, MODES, Training, batch, parameters, scaled

import jmp_lite as jmp
from jmp_lite.distributed import gather_params, reduce_gradients

AUTO = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(AxisType.Auto,))
GRID = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def policy(compute, reduce=None):
    """Float32 parameters and outputs."""
    return jmp.Policy(jnp.float32, compute, jnp.float32, reduce_dtype=reduce)


def local(fun, in_specs, out_specs, *, mesh=AUTO, check_vma=True):
    """A function of one device, compiled."""
    mapped = jax.shard_map(fun, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    return jax.jit(mapped)


def rounded(x, dtype):
    """To a dtype and back."""
    return jnp.asarray(x).astype(dtype).astype(jnp.float32)


# --- What is sent ---


def sent(training, x, y):
    """The collectives of a step for one device: (name, dtype) of those that carry arrays."""
    text = training.lowered(x, y).as_text()
    pattern = r'"?stablehlo\.(all_gather|all_reduce|reduce_scatter)"?.*?-> ?\(?tensor<((?:\d+x)*)(\w+)>'
    return [(name, dtype) for name, shape, dtype in re.findall(pattern, text, re.DOTALL) if shape]


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("compute", "reduce"),
    [("bfloat16", None), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float16"), ("float16", None)],
)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.is_local], ids=str)
def test_dtypes_of_collectives(mode, compute, reduce, rng):
    """Gathers are in the compute dtype, all sums in ``reduce_dtype``; each parameter is sent once each way."""
    params = parameters(rng)
    found = sent(Training(mode, policy(compute, reduce), scaled(), params), *batch(rng))
    matrices, others = 2, 3
    summed = NAMES[reduce or "float32"]
    expected = [("all_reduce", summed)] * (others if mode.is_sharded else matrices + others)
    if mode.is_sharded:
        expected += [("all_gather", NAMES[compute])] * matrices + [("reduce_scatter", summed)] * matrices
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("reduce", ["float32", "bfloat16"])
def test_autocast_sums_what_others_gather(reduce, rng):
    """A gather that the user wrote travels in the compute dtype, its gradient in ``reduce_dtype``."""

    def loss(w, x):
        return jnp.mean((x @ jax.lax.all_gather(w, AXIS, tiled=True)) ** 2)

    grad = local(jax.grad(jmp.autocast(loss, policy("bfloat16", reduce))), (P(AXIS), P(AXIS)), P(AXIS))
    w, x = (jnp.asarray(rng.standard_normal((16, 16)), jnp.float32) for _ in range(2))
    text = grad.lower(w, x).as_text()
    assert re.search(r"all_gather.*?-> tensor<16x16xbf16>", text)
    assert re.search(rf"reduce_scatter.*?-> tensor<2x16x{NAMES[reduce]}>", text, re.DOTALL)
    np.testing.assert_allclose(grad(w, x), local(jax.grad(loss), (P(AXIS), P(AXIS)), P(AXIS))(w, x), atol=0.05)


# --- Gathering ---

FORMS = {
    "jit": lambda fun, spec, mesh: jax.jit(lambda w: fun(w, NamedSharding(mesh, spec))),
    "shard_map": lambda fun, spec, mesh: local(lambda w: fun(w, spec)[None], spec, P(mesh.axis_names), mesh=mesh),
    "unchecked": lambda fun, spec, mesh: local(
        lambda w: fun(w, spec)[None], spec, P(mesh.axis_names), mesh=mesh, check_vma=False
    ),
}
LAYOUTS = {
    "rows": (AUTO, P(AXIS)),
    "columns": (AUTO, P(None, AXIS)),
    "both": (GRID, P("data", "model")),
    "rows over two axes": (GRID, P(("data", "model"))),
    "columns over two axes, the other way": (GRID, P(None, ("model", "data"))),
    "one of two axes": (GRID, P(None, "model")),
    "not split": (GRID, P()),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_a_gathered_parameter_is_the_whole_one_rounded(form, layout, compute, rng):
    """Rounded to the compute dtype if it travels, in its own dtype and order; as it is otherwise."""
    mesh, spec = LAYOUTS[layout]
    w = jnp.asarray(rng.standard_normal((16, 24)), jnp.float32)
    expected = rounded(w, compute) if any(spec) else w
    gathered = FORMS[form](lambda w, sharding: gather_params(w, sharding, policy(compute)), spec, mesh)(w)
    for whole in gathered if form != "jit" else [gathered]:
        assert_identical(whole.reshape(w.shape), expected)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "not split"])
def test_the_gradient_is_the_sum_over_devices(layout, rng):
    """Each device keeps the sum, over the axes that were gathered, for its own shard: exactly, for whole numbers."""
    mesh, spec = LAYOUTS[layout]
    w = jnp.asarray(rng.integers(-8, 8, (16, 24)), jnp.float32)
    factors = jnp.asarray(rng.integers(-8, 8, (*mesh.devices.shape, 16, 24)), jnp.float32)

    def grad(w, factors, sharding):
        return jax.grad(lambda w: jnp.sum(gather_params(w, sharding, policy("bfloat16")) * factors))(w)

    in_all = jax.jit(lambda w: grad(w, factors.reshape(-1, 16, 24).sum(0), NamedSharding(mesh, spec)))(w)
    assert_identical(in_all, factors.sum(tuple(range(mesh.devices.ndim))))
    axes = mesh.axis_names
    fun = local(
        lambda w, factors: grad(w, factors.reshape(16, 24), spec).reshape(*[1] * len(axes), -1),
        (spec, P(*axes)),
        P(*axes),
        mesh=mesh,
        check_vma=False,
    )
    found, places = fun(w, factors), NamedSharding(mesh, spec).devices_indices_map(w.shape)
    over = tuple(i for i, axis in enumerate(axes) if axis in str(spec))
    sums = jnp.broadcast_to(factors.sum(over, keepdims=True), factors.shape)
    for at, device in np.ndenumerate(mesh.devices):
        assert_identical(found[at], sums[at][places[device]].ravel())


def test_forward_mode_and_second_derivatives(rng):
    """Gathering is linear to both modes of differentiation."""
    w, v = (jnp.asarray(rng.integers(-8, 8, (16, 4)), jnp.float32) for _ in range(2))
    sharding = NamedSharding(AUTO, P(AXIS))

    def loss(w):
        return jnp.sum(gather_params(w, sharding, policy("bfloat16")) ** 3)

    _, tangent = jax.jit(lambda w, v: jax.jvp(loss, (w,), (v,)))(w, v)
    assert float(tangent) == float(jnp.sum(3 * w**2 * v))
    second = jax.jit(lambda w, v: jax.jvp(jax.grad(loss), (w,), (v,))[1])(w, v)
    assert_identical(second, 6 * w * v)


def test_leaves_that_do_not_round(rng):
    """Integers, keys, ``None`` and narrow parameters travel as they are; a policy map decides by path."""
    params = {
        "w": jnp.asarray(rng.standard_normal((8, 4)), jnp.float32),
        "head": {"w": jnp.asarray(rng.standard_normal((8, 4)), jnp.float32)},
        "narrow": jnp.asarray(rng.standard_normal((8, 4)), jnp.float16),
        "steps": jnp.arange(8),
        "keys": jax.random.split(jax.random.key(0), 8),
        "nothing": None,
    }
    policies = jmp.PolicyMap({"head": "float32"}, default="mixed_bfloat16")
    full = jax.jit(lambda params: gather_params(params, NamedSharding(AUTO, P(AXIS)), policies))(params)
    assert_identical(full, {**params, "w": rounded(params["w"], "bfloat16")})


def test_models_see_nothing_of_it(rng):
    """Under autocast the matmuls behind a gather are in the compute dtype, and what is not split keeps its digits."""
    params = parameters(rng)
    shardings = jax.tree.map(lambda leaf: NamedSharding(AUTO, P(AXIS) if leaf.ndim == 2 else P()), params)

    def predict(params, x):
        params = gather_params(params, shardings, "mixed_bfloat16")
        return (x @ params["first"]["w"]) * params["scale"][None]

    found = contractions(
        jax.grad(lambda p, x: jmp.autocast(predict, "mixed_bfloat16")(p, x).sum()), params, batch(rng)[0]
    )
    assert found
    assert {dtype for _, dtypes in found for dtype in dtypes} == {"bfloat16"}


@pytest.mark.parametrize("form", ["jit", "shard_map"])
def test_double_precision_stays_double(form, rng):
    """A policy that does not name float64 leaves it alone, on the wire too."""
    with jax.enable_x64(True):
        w = jnp.asarray(rng.standard_normal((16, 2)))
        assert w.dtype == jnp.float64
        loss = lambda w, sharding: jnp.sum(gather_params(w, sharding, "mixed_bfloat16") ** 3)  # noqa: E731
        if form == "jit":
            found = jax.jit(jax.grad(lambda w: loss(w, NamedSharding(AUTO, P(AXIS)))))(w)
        else:
            found = local(jax.grad(lambda w: loss(w, P(AXIS)) / DEVICES), P(AXIS), P(AXIS))(w)
        np.testing.assert_allclose(found, 3 * w**2, rtol=1e-14)
        means = jax.pmap(lambda x: reduce_gradients(x, AXIS), AXIS)(jnp.full((DEVICES, 1), 1e300))
        assert_identical(means, jnp.full((DEVICES, 1), 1e300))


def test_what_is_not_split_may_come_with_any_sharding():
    """``jax.tree.map(lambda x: x.sharding, params)`` is a tree of shardings on one device as well."""
    w = jax.device_put(jnp.ones(8), jax.devices()[3])
    assert gather_params({"w": w}, {"w": w.sharding}, "mixed_bfloat16")["w"] is w


BAD_SHARDINGS = {
    "a name": ("data", "must be a NamedSharding, a PartitionSpec or None, got 'data'"),
    "another tree": ({"v": P(AXIS)}, "not a prefix of the tree"),
    "no mesh": (P(AXIS), "'data' is not an axis of a mesh here. No mesh is set. Pass a NamedSharding"),
}


@pytest.mark.parametrize("case", BAD_SHARDINGS)
def test_bad_shardings(case):
    """Whatever cannot be gathered from is named, with its path."""
    shardings, message = BAD_SHARDINGS[case]
    with pytest.raises(jmp.errors.InvalidShardingError, match=message):
        gather_params({"w": jnp.ones(8)}, shardings, "mixed_bfloat16")


def test_a_misspelt_axis_is_no_axis():
    """Nothing is left ungathered in silence."""
    for call in (
        lambda: gather_params({"w": jnp.ones(8)}, NamedSharding(AUTO, P(AXIS)), "float32", axis_name="dat"),
        lambda: local(lambda w: gather_params(w, P(AXIS), "float32", axis_name="dat"), P(AXIS), P(AXIS))(jnp.ones(8)),
    ):
        with pytest.raises(
            jmp.errors.InvalidShardingError, match=r"'dat' is not an axis of a mesh here. Known are \['data'\]"
        ):
            call()


def test_rows_are_never_out_of_order():
    """A dimension that is split over two axes cannot be gathered over one of them inside ``shard_map``."""
    fun = local(
        lambda w: gather_params({"w": w}, P(("data", "model")), "float32", axis_name="data")["w"],
        P(("data", "model")),
        P("model"),
        mesh=GRID,
        check_vma=False,
    )
    with pytest.raises(
        jmp.errors.InvalidShardingError, match=r"Dimension 0 of 'w' is sharded over \['data', 'model'\]"
    ):
        fun(jnp.ones(8))


# --- Reducing ---

MAPS = {
    "pmap": lambda fun: jax.pmap(fun, AXIS),
    "shard_map": lambda fun: local(fun, P(AXIS), P()),
    "unchecked": lambda fun: local(fun, P(AXIS), P(), check_vma=False),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("form", MAPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_the_mean_is_exact_for_whole_numbers(form, dtype, rng):
    """It is float32 or wider, the same on all devices, and no digit is lost where none need be."""
    x = jnp.asarray(8 * rng.integers(-4, 4, (DEVICES, 4)), dtype)
    found = MAPS[form](lambda x: reduce_gradients({"w": x, "n": 3, "none": None}, AXIS)["w"])(x)
    wide = x.astype("complex64" if dtype == "complex64" else "float32")
    for row in found.reshape(-1, 4):
        assert_identical(row, wide.mean(0))


def test_sums_do_not_overflow_by_the_number_of_devices():
    """Gradients are divided before they are rounded to a narrow dtype and added up."""
    x = jnp.full((DEVICES, 2), 2.0**15)
    assert float(jax.pmap(lambda x: reduce_gradients(x, AXIS, policy("float16", "float16")), AXIS)(x)[0, 0]) == 2.0**15


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_reaches_all(bad, rng):
    """One bad element of one device is bad on all."""
    x = jnp.ones((DEVICES, 4)).at[rng.integers(DEVICES), 1].set(bad)
    found = jax.pmap(lambda x: reduce_gradients(x, AXIS, policy("bfloat16", "bfloat16")), AXIS)(x)
    np.testing.assert_array_equal(np.isfinite(found), np.tile([True, False, True, True], (DEVICES, 1)))


def test_gradients_that_jax_has_summed_are_divided_only(rng):
    """Under ``check_vma`` the mean is right whether parameters were marked as varying or not."""
    w, x = jnp.asarray(rng.integers(-8, 8, 4), jnp.float32), jnp.asarray(8 * rng.integers(-8, 8, (8, 4)), jnp.float32)

    def step(w, x, *, mark):
        w = jax.lax.pcast(w, AXIS, to="varying") if mark else w
        return reduce_gradients(jax.grad(lambda w: jnp.sum(w * x[0]))(w), AXIS)

    for mark in (False, True):
        found = local(functools.partial(step, mark=mark), (P(), P(AXIS)), P())(w, x)
        assert_identical(found, x.mean(0))


def test_policies_by_path(rng):
    """A policy map gives each gradient its own dtype on the wire."""
    policies = jmp.PolicyMap({"head": policy("bfloat16", "float32")}, default=policy("bfloat16", "bfloat16"))
    fun = jax.pmap(lambda grads: reduce_gradients(grads, AXIS, policies), AXIS)
    text = fun.lower({"body": jnp.ones((8, 3)), "head": jnp.ones((8, 5))}).as_text()
    assert "tensor<3xbf16>" in text
    assert "tensor<5xbf16>" not in text
