"""Training steps on many devices, in every way in which JAX spreads them, beside those of the peers."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jmp_lite as jmp
from benchmarks import _precisions

AXIS = "data"
LAYERS, WIDTH, ROWS_PER_DEVICE = 4, 1024, 32
PARAMETERS = LAYERS * WIDTH * WIDTH

Step = tuple[Callable[..., Any], tuple[Any, ...]]
"""A jitted step and abstract arguments for it."""
Gradient = Callable[[Any, jax.Array, jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to spread a step over devices.

    Attributes:
      title: as in the table.
      is_sharded: whether parameters are split over the devices (FSDP) instead of copied.
      form: "jit", "shard_map" or "pmap".
    """

    title: str
    is_sharded: bool
    form: str


MODES = (
    Mode("pmap", False, "pmap"),
    Mode("shard_map", False, "shard_map"),
    Mode("jit", False, "jit"),
    Mode("shard_map FSDP", True, "shard_map"),
    Mode("jit FSDP", True, "jit"),
)


def loss_fn(weights: list[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """A float32 multilayer perceptron without biases; mean squared error."""
    for weight in weights:
        x = jax.nn.gelu(x @ weight)
    return jnp.mean((x - y) ** 2)


def ours(policy: jmp.Policy, mode: Mode, sharding: NamedSharding) -> Gradient:
    """`autocast`, with `gather_params` and `reduce_gradients` where the mode has something to gather or to reduce."""
    loss = jmp.autocast(loss_fn, policy)
    stored = sharding.spec if mode.form == "shard_map" else sharding

    def gathered_loss(weights: list[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
        if mode.is_sharded:
            weights = jmp.distributed.gather_params(weights, stored, policy)
        return loss(weights, x, y)

    def gradient(weights: list[jax.Array], x: jax.Array, y: jax.Array) -> Any:
        if mode.form == "shard_map" and not mode.is_sharded:
            weights = jax.lax.pcast(weights, AXIS, to="varying")
        grads = jax.grad(gathered_loss)(weights, x, y)
        if mode.form == "jit":
            return grads
        return jmp.distributed.reduce_gradients(grads, AXIS, policy, shardings=sharding.spec)

    return gradient


def peer(name: str, mode: Mode, sharding: NamedSharding) -> Gradient:
    """The peer's cast of all arguments, and the mean that its users write; a shard is gathered as it is stored."""
    if name == "jmp":
        policy = importlib.import_module("jmp").get_policy(_precisions.POLICY)
        grad = jax.grad(lambda *arguments: loss_fn(*policy.cast_to_compute(arguments)).astype(jnp.float32))
    else:
        mpx = importlib.import_module("mpx")
        mpx.set_half_precision_datatype(_precisions.COMPUTE)

        def grad(*arguments: Any) -> Any:
            scaling = mpx.DynamicLossScaling(jnp.float32(1.0), jnp.float32(1.0))
            return mpx.filter_grad(loss_fn, scaling)(*arguments)[-1]

    def gradient(weights: list[jax.Array], x: jax.Array, y: jax.Array) -> Any:
        if mode.form == "jit":
            return grad(weights, x, y)
        if mode.form == "shard_map":
            weights = jax.lax.pcast(weights, AXIS, to="varying") if not mode.is_sharded else weights
        if not mode.is_sharded:
            return jax.lax.pmean(grad(weights, x, y), AXIS)
        full = [jax.lax.all_gather(weight, AXIS, tiled=True) for weight in weights]
        return [jax.lax.psum_scatter(g, AXIS, tiled=True) for g in grad(full, x, y)]

    return gradient


def spread(
    gradient: Callable[[NamedSharding], Gradient], mode: Mode, mesh: Mesh, tx: optax.GradientTransformation
) -> Step:
    """Builds the whole step: gradient, check if `tx` has one, update."""
    sharding = NamedSharding(mesh, P(AXIS) if mode.is_sharded else P())
    of_batch, replicated = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())
    gradient_fn, devices = gradient(sharding), mesh.devices.size

    def step(weights: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> Any:
        return jmp.apply_gradients(tx, gradient_fn(weights, x, y), opt_state, weights)

    def abstract(shape: tuple[int, ...], dtype: Any, placed: NamedSharding) -> jax.ShapeDtypeStruct:
        if mode.form == "pmap":
            return jax.ShapeDtypeStruct((devices, *shape), dtype)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def stored(leaf: Any) -> NamedSharding:
        return sharding if leaf.ndim else replicated

    rows = ROWS_PER_DEVICE * (1 if mode.form == "pmap" else devices)
    weights = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * LAYERS
    state = (weights, jax.eval_shape(tx.init, weights))
    state_shardings = jax.tree.map(stored, state)
    arguments = (
        *jax.tree.map(lambda leaf: abstract(leaf.shape, leaf.dtype, stored(leaf)), state),
        abstract((rows, WIDTH), jnp.float32, of_batch),
        abstract((rows, WIDTH), jnp.float32, of_batch),
    )
    if mode.form == "pmap":
        return jax.pmap(step, AXIS, devices=list(mesh.devices.flat), donate_argnums=(0, 1)), arguments
    if mode.form == "shard_map":
        specs = jax.tree.map(lambda leaf: stored(leaf).spec, state)
        step = jax.shard_map(step, mesh=mesh, in_specs=(*specs, P(AXIS), P(AXIS)), out_specs=specs)
    return jax.jit(step, out_shardings=state_shardings, donate_argnums=(0, 1)), arguments
