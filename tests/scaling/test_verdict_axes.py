"""One verdict over several mesh axes: whoever holds the bad element, all devices skip, and nothing moves anywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.comparisons import DEVICES, assert_identical, fused, slow_but_for, two_calls
from support.jaxprs import primitives

import jmp_lite as jmp

MESHES = {
    "data-model": {"data": 4, "model": 2},
    "stage-data": {"stage": 2, "data": 4},
    "expert-data": {"expert": 4, "data": 2},
    "data-stage-expert": {"data": 2, "stage": 2, "expert": 2},
}
meshes = pytest.mark.parametrize("name", slow_but_for(("data-model", "data-stage-expert"), MESHES))
VERDICTS = [True, False, False, True, False]
SHAPE = (DEVICES, 3)

# How gradients and parameters lie on a mesh of axes a, b, ...: which axes the rows of each leaf are split over.
LAYOUTS = {
    "replicated": lambda axes: {"w": P(), "b": P()},
    "sharded": lambda axes: {"w": P(axes), "b": P(axes)},
    "one axis": lambda axes: {"w": P(), "b": P(axes[0])},
    "each over another axis": lambda axes: {axis: P(axis) for axis in axes},
    "mixed": lambda axes: {"norm": P(), "shard": P(axes[-1]), "expert": P(axes), **{axis: P(axis) for axis in axes}},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def mesh_of(axes, kind):
    """The eight devices in a grid."""
    devices = np.array(jax.devices()[:DEVICES]).reshape(tuple(axes.values()))
    return jax.sharding.Mesh(devices, tuple(axes), (kind,) * len(axes))


def optimizer(axis_name):
    """Momentum with factors of one half: exact on small integers, so that every way to run it gives the same bits."""
    return jmp.loss_scaled(optax.sgd(0.5, momentum=0.5), jmp.DynamicLossScale(2.0**6, period=2), axis_name=axis_name)


def gradients(names, rng):
    """Odd numbers, whose momentum is never zero."""
    return {name: (2 * rng.integers(-4, 4, SHAPE) + 1).astype(np.float32) for name in names}


def with_bad_element(grads, rng):
    """The gradients with one element that is not finite, so that some devices see it and others do not."""
    grads = jax.tree.map(np.copy, grads)
    name = rng.choice(sorted(grads))
    grads[name][rng.integers(SHAPE[0]), rng.integers(SHAPE[1])] = rng.choice([np.nan, np.inf, -np.inf])
    return grads


def specs_of(tx, params, layout):
    """The layout of parameters and of the state of an optimizer for them: moments lie as their parameters do."""
    shapes = jax.eval_shape(tx.init, params)
    return layout, optax.tree.map_params(tx, lambda _, spec: spec, shapes, layout, transform_non_params=lambda _: P())


def copies(leaf):
    """The bytes of every shard of a leaf, by the part of the array that it holds."""
    parts = {}
    for shard in leaf.addressable_shards:
        parts.setdefault(str(shard.index), set()).add(np.asarray(shard.data).tobytes())
    return parts.values()


def placed(tree, specs, grid):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(grid, spec)), tree, specs)


def check_steps(step, grid, specs, rng):
    """Runs good and bad steps beside plain Optax on one device, and checks what each device holds after each."""
    plain, names = optax.sgd(0.5, momentum=0.5), tuple(specs[0])
    params = {name: jnp.ones(SHAPE) for name in names}
    ours = placed((params, optimizer(None).init(params)), specs, grid)
    theirs, skipped = (params, plain.init(params)), 0
    for good in VERDICTS:
        true, scale = gradients(names, rng), np.asarray(ours[1].loss_scale.loss_scale)
        scaled = {name: grad * scale for name, grad in true.items()}
        scaled = scaled if good else with_bad_element(scaled, rng)
        before, ours = ours, step(*ours, placed(scaled, specs[0], grid))
        if good:
            theirs = two_calls(plain)(*theirs, true)
            assert all(np.all(np.asarray(ours[0][name] != before[0][name])) for name in names)
        else:
            assert_identical((ours[0], ours[1].inner_state), (before[0], before[1].inner_state))
        skipped += not good
        assert_identical((ours[0], ours[1].inner_state), theirs)
        assert all(len(held) == 1 for leaf in jax.tree.leaves(ours) for held in copies(leaf))
        assert (bool(ours[1].last_finite), int(ours[1].total_notfinite)) == (good, skipped)


@pytest.mark.covering(1)
@meshes
@layouts
@pytest.mark.parametrize("check_vma", slow_but_for({True}, [True, False]))
def test_shard_map(name, layout, check_vma, rng):
    """In shard_map each device sees its own shard, yet all take or skip; counters and scale stay provably the same."""
    axes = MESHES[name]
    grid = mesh_of(axes, jax.sharding.AxisType.Auto)
    names = tuple(rng.permutation(tuple(axes)).tolist())
    tx, traces = optimizer(names), []
    layout = layout(tuple(axes))
    params = {name: jnp.ones(SHAPE) for name in layout}
    specs, form = specs_of(tx, params, layout), fused if rng.random() < 0.5 else two_calls

    def step(params, state, grads):
        traces.append(params)
        return form(tx)(params, state, grads)

    run = jax.shard_map(step, mesh=grid, in_specs=(*specs, layout), out_specs=specs, check_vma=check_vma)

    check_steps(jax.jit(run), grid, specs, rng)
    assert len(traces) == 1
    state = tx.init(params)
    found = primitives(run, params, state, params)
    assert found.count("pmin") == 2  # before the step whether to take it, after it whether its updates were finite
    assert not {"psum", "psum_invariant", "all_gather", "pmax"} & set(found)


@pytest.mark.covering(1)
@meshes
@layouts
@pytest.mark.parametrize("kind", slow_but_for({"Explicit"}, ["Auto", "Explicit"]))
def test_jit(name, layout, kind, rng):
    """Under jit the verdict is global without any axis name, whether the compiler or the types carry the shardings."""
    axes = MESHES[name]
    grid = mesh_of(axes, getattr(jax.sharding.AxisType, kind))
    tx, traces = optimizer(None), []
    layout = layout(tuple(axes))
    specs = specs_of(tx, {name: jnp.ones(SHAPE) for name in layout}, layout)
    form = fused if rng.random() < 0.5 else two_calls

    @jax.jit
    def step(params, state, grads):
        traces.append(params)
        return form(tx)(params, state, grads)

    with jax.set_mesh(grid):
        check_steps(step, grid, specs, rng)
    assert len(traces) == 1
