"""nonfinite_leaves: which leaf on which replica, in one collective, the same on every device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.comparisons import DEVICES, mesh
from support.jaxprs import primitives

import jmp_lite as jmp

AXES = {"data": 4, "model": 2}
BAD_VALUES = [np.nan, np.inf, -np.inf]
nonfinite_leaves = jmp.distributed.nonfinite_leaves


def grid():
    return jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]).reshape(tuple(AXES.values())), tuple(AXES))


def gradients(rng, names):
    """Rows for each device, with faults in some; and which leaf is bad on which device."""
    grads = {name: rng.standard_normal((DEVICES, 3)).astype(np.float32) for name in names}
    bad = {name: rng.random(DEVICES) < 0.3 for name in names}
    for name, rows in bad.items():
        for row in np.flatnonzero(rows):
            grads[name][row, rng.integers(3)] = rng.choice(BAD_VALUES)
    return jax.tree.map(jnp.asarray, grads), bad


def assert_flags(found, expected):
    assert found.keys() == expected.keys()
    for name, flags in expected.items():
        assert found[name].dtype == jnp.bool_
        np.testing.assert_array_equal(found[name], flags, err_msg=name)


@pytest.mark.covering(1)
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64", "float8_e5m2"])
def test_leaves_by_path(dtype, run, rng):
    """Without an axis each floating or complex leaf has one boolean under its path; what has no NaN is left out."""
    bad = jnp.ones(4).at[rng.integers(4)].set(rng.choice(BAD_VALUES)).astype(dtype)
    grads = {"decoder": {"w": bad, "b": [jnp.ones(2, dtype), None]}, "step": jnp.int32(1), "on": jnp.array(True)}
    found = run(nonfinite_leaves)(grads)
    assert_flags(found, {"decoder/b/0": False, "decoder/w": True})
    assert nonfinite_leaves({"step": 3}) == nonfinite_leaves({"step": 3}, axis_name="none is asked") == {}


def test_sharded_under_jit(rng):
    """Under jit with sharded gradients the answer is global."""
    grads, bad = gradients(rng, ["w", "b"])
    placed = jax.device_put(grads, NamedSharding(mesh(), P("batch")))
    assert_flags(jax.jit(nonfinite_leaves)(placed), {name: rows.any() for name, rows in bad.items()})


def test_replicas_of_pmap(rng):
    """Under pmap every device has the flags of all of them."""
    grads, bad = gradients(rng, ["w", "b"])
    found = jax.pmap(functools.partial(nonfinite_leaves, axis_name="batch"), "batch")(grads)
    assert_flags(found, {name: np.stack([rows] * DEVICES) for name, rows in bad.items()})


@pytest.mark.covering(1)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axes", [("data", "model"), ("model", "data"), ("data",), "data"], ids=str)
def test_replicas_of_shard_map(axes, check_vma, rng):
    """Replicas stand in the order of their index over the axes; JAX knows that the result is the same everywhere."""
    grads, bad = gradients(rng, ["w", "b"])
    names = (axes,) if isinstance(axes, str) else axes
    split = P(axes) if len(names) == 2 else P(("data", "model"))

    def flags(grads):
        found = nonfinite_leaves(grads, axis_name=axes)
        return found if len(names) == 2 else jax.tree.map(lambda x: x[None], found)

    out = P() if len(names) == 2 else P("model")
    run = jax.jit(jax.shard_map(flags, mesh=grid(), in_specs=split, out_specs=out, check_vma=check_vma))
    found = run(grads)
    expected = bad if len(names) == 2 else {name: rows.reshape(4, 2).T for name, rows in bad.items()}
    assert_flags(found, expected)
    if len(names) == 2:
        for leaf in found.values():
            assert len({np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}) == 1


@pytest.mark.parametrize("check_vma", [True, False])
def test_leaves_that_vary_over_some_axes_only(check_vma, rng):
    """Replicated and sharded leaves go together in one collective, whichever axes they vary over."""
    specs = {"whole": P(), "by data": P("data"), "by model": P("model"), "by both": P(("data", "model"))}
    grads = {name: jnp.ones(DEVICES) for name in specs}
    grads = {name: grad.at[3].set(np.nan) for name, grad in grads.items()}
    flags = functools.partial(nonfinite_leaves, axis_name=("data", "model"))
    run = jax.shard_map(flags, mesh=grid(), in_specs=(specs,), out_specs=P(), check_vma=check_vma)
    replica = np.arange(DEVICES)
    expected = {"whole": replica >= 0, "by data": replica // 2 == 1, "by model": replica % 2 == 0}
    assert_flags(jax.jit(run)(grads), {**expected, "by both": replica == 3})
    found = primitives(run, grads)
    assert sum(name.startswith("all_gather") for name in found) == 1
    assert not [name for name in found if name.startswith(("psum", "pmax", "pmin", "all_to_all", "ppermute"))]


STALLED = {
    "one leaf": ({"decoder/w": [3, 5]}, "decoder/w on replicas 3, 5. "),
    "two": ({"b": [0], "decoder/w": [3, 5]}, "b on replica 0; decoder/w on replicas 3, 5. "),
    "none": ({"b": [], "decoder/w": [7]}, "decoder/w on replica 7. "),
}


@pytest.mark.parametrize(("where", "message"), STALLED.values(), ids=STALLED)
@pytest.mark.parametrize("devices", [(), (DEVICES,)], ids=["shard_map", "pmap"])
def test_stalled_training_names_the_replicas(where, message, devices):
    """check_loss_scale says which leaf was bad on which replicas, given the flags in place of gradients."""
    tx, params = jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(1.0)), {"w": jnp.ones(2)}
    state = jax.lax.fori_loop(0, 10, lambda _, s: tx.update({"w": jnp.full(2, np.nan)}, s, params)[1], tx.init(params))
    replicas = jnp.zeros((*devices, DEVICES), bool)
    flags = {name: replicas.at[..., np.array(at, int)].set(True) for name, at in where.items()}
    with pytest.raises(jmp.errors.LossScaleStalledError) as error:
        jmp.check_loss_scale(state, flags)
    assert f"Not finite in the gradients given: {message}The gradients overflow" in str(error.value)
    scalars = {name: flag.any() for name, flag in flags.items()}
    bad = ", ".join(name for name, at in where.items() if at)
    with pytest.raises(jmp.errors.LossScaleStalledError, match=rf"Not finite in the gradients given: {bad}\. The"):
        jmp.check_loss_scale(state, scalars)


def test_paths_that_read_alike_hide_nothing():
    """A key with a slash in it and a nested key have one name; it is bad if either is."""
    found = nonfinite_leaves({"a": {"b": jnp.array(jnp.nan)}, "a/b": jnp.array(1.0)})
    assert {path: bool(bad) for path, bad in found.items()} == {"a/b": True}
