"""The same bits on one device and on many, whatever says how arrays are spread over them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from support.comparisons import apply_updates, assert_identical, slow_but_for, standard

import jmp_lite as jmp
from jmp_lite._rounding import counted_bits

SHAPES = {"matrix": (16, 24), "stack": (8, 4, 16), "bias": (16,), "scalar": ()}
#: Which mesh axes each axis of a leaf is split over.
LAYOUTS = {
    "replicated": dict.fromkeys(SHAPES, P()),
    "rows": {"matrix": P("x"), "stack": P("x"), "bias": P("x"), "scalar": P()},
    "columns": {"matrix": P(None, "x"), "stack": P(None, None, "x"), "bias": P(), "scalar": P()},
    "both": {"matrix": P("y", "x"), "stack": P("x", "y"), "bias": P(("x", "y")), "scalar": P()},
    "together": {"matrix": P(None, ("y", "x")), "stack": P(("x", "y")), "bias": P("y"), "scalar": P()},
}
FORMATS = [
    ("split8", "8bit"),
    pytest.param("stochastic", "8bit", marks=pytest.mark.slow),
    pytest.param("stochastic", "bfloat16", marks=pytest.mark.slow),
    pytest.param("split16", "float32", marks=pytest.mark.slow),
]
formats = pytest.mark.parametrize(("params", "state"), FORMATS)


def mesh_of(x, y, kind=AxisType.Auto):
    return Mesh(np.array(jax.devices()[: x * y]).reshape(x, y), ("x", "y"), axis_types=(kind, kind))


def start(rng, dtype=jnp.bfloat16):
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def optimizer(params, state, **options):
    """Products by powers of two are exact, so it does not matter where the compiler fuses them with sums."""
    adam = standard(optax.adam(2.0**-7, b1=0.5, b2=0.5, eps=2.0**-20))
    return jmp.optim.stored(adam, params=params, state=state, seed=7, **options)


def steps(tx, gradients, params, opt_state):
    """Two steps."""
    for grads in gradients:
        updates, opt_state = tx.update(grads, opt_state, params)
        params = apply_updates(params, updates)
    return params, opt_state


def placed(tree, mesh, specs):
    """A tree of leaves that are called as those of SHAPES, or none of them."""

    def place(path, leaf):
        name = next((n for n in SHAPES if n in jax.tree_util.keystr(path) and leaf.shape == SHAPES[n]), None)
        return jax.device_put(leaf, NamedSharding(mesh, specs[name] if name else P()))

    return jax.tree_util.tree_map_with_path(place, tree)


@functools.cache
def on_one_device(params, state):
    """The state that two steps begin with, and both steps, each compiled once."""
    tx = optimizer(params, state)
    return jax.jit(tx.init), jax.jit(functools.partial(steps, tx))


@formats
@pytest.mark.parametrize("devices", slow_but_for(((4, 2),), [(1, 1), (2, 1), (4, 1), (4, 2)]), ids=str)
@pytest.mark.parametrize("layout", slow_but_for(("both",), LAYOUTS))
def test_sharded_arrays_under_jit(layout, devices, params, state, rng):
    init, run = on_one_device(params, state)
    leaves = start(rng)
    gradients = [start(rng, jnp.float32) for _ in range(2)]
    args = gradients, leaves, init(leaves)
    assert_identical(run(*placed(args, mesh_of(*devices), LAYOUTS[layout])), run(*args))


@formats
@pytest.mark.parametrize("checked", slow_but_for((True,), (True, False)), ids=["check_vma", "unchecked"])
@pytest.mark.parametrize("layout", slow_but_for(("together",), ["rows", "columns", "both", "together"]))
def test_shards_inside_shard_map(layout, checked, params, state, rng):
    specs = LAYOUTS[layout]
    tx, (init, run) = optimizer(params, state, specs=specs), on_one_device(params, state)
    leaves = start(rng)
    gradients = [start(rng, jnp.float32) for _ in range(2)]
    opt_state = init(leaves)
    assert_identical(opt_state, jax.jit(tx.init)(leaves))

    def spec(path, leaf):
        name = next((n for n in SHAPES if n in jax.tree_util.keystr(path) and leaf.shape == SHAPES[n]), None)
        return specs[name] if name else P()

    of_state = jax.tree_util.tree_map_with_path(spec, opt_state)
    mapped = jax.shard_map(
        functools.partial(steps, tx),
        mesh=mesh_of(4, 2),
        in_specs=([specs, specs], specs, of_state),
        out_specs=(specs, of_state),
        check_vma=checked,
    )
    assert_identical(jax.jit(mapped)(gradients, leaves, opt_state), run(gradients, leaves, opt_state))


@pytest.mark.slow
def test_replicas_of_pmap_have_the_same_bits(rng):
    tx = optimizer("split8", "8bit")
    leaves = start(rng)
    gradients = [start(rng, jnp.float32) for _ in range(2)]
    expected = jax.jit(functools.partial(steps, tx))(gradients, leaves, tx.init(leaves))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), (gradients, leaves, tx.init(leaves)))
    found = jax.pmap(functools.partial(steps, tx), devices=jax.devices()[:4])(*stacked)
    for device in range(4):
        assert_identical(jax.tree.map(lambda leaf, i=device: leaf[i], found), expected)


def test_forgotten_specs_are_an_error(rng):
    """Shards without them would all be rounded with the random bits of the first."""
    tx = optimizer("split8", "8bit")
    leaves = {"matrix": start(rng)["matrix"]}
    opt_state = tx.init(leaves)
    of_state = jax.tree.map(lambda leaf: P("x") if leaf.ndim == 2 else P(), opt_state)
    mapped = jax.shard_map(
        lambda grads, params, state: tx.update(grads, state, params),
        mesh=mesh_of(4, 2),
        in_specs=(P("x"), P("x"), of_state),
        out_specs=(P("x"), of_state),
    )
    with pytest.raises(jmp.errors.MissingAxisError, match=r"'matrix' is sharded over 'x'.*specs="):
        jax.eval_shape(mapped, leaves, leaves, opt_state)


@pytest.mark.parametrize("layout", slow_but_for(("both", "together"), ["rows", "columns", "both", "together"]))
def test_places_are_those_in_the_whole_array(layout):
    key = jnp.uint32(3)
    for name, shape in SHAPES.items():
        spec = LAYOUTS[layout][name]
        local = jax.jit(
            jax.shard_map(
                lambda x, spec=spec: counted_bits(key, x.shape, spec), mesh=mesh_of(2, 4), in_specs=spec, out_specs=spec
            )
        )
        np.testing.assert_array_equal(local(jnp.zeros(shape)), counted_bits(key, shape))
