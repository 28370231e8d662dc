"""One training step three ways: data parallel with ``pmap`` or ``shard_map``, sharded parameters with ``jit``.

The state is the same tree ``(params, statistics, opt_state)`` in all of them; what differs is where its arrays lie and
who writes the collectives. Each mode is a ``Mode`` of functions, so the loop around it is the same as well.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import _devices
import _pod_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _digits_model import Network
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jmp_lite as jmp

AXIS = _devices.AXIS
State = tuple[Any, Any, Any]


class Mode(NamedTuple):
    """How a way of parallelism treats state and data.

    Attributes:
        layout: ``(state) -> shardings`` of its arrays as global arrays.
        enter: ``(global arrays) -> state``, as ``step`` wants it.
        leave: ``(state) -> global arrays``, for checkpoints and the test.
        split: ``(rows of this host) -> batch``, as ``step`` wants it.
        step: ``(state, batch) -> (state, metrics)``.
        host: ``(metrics) -> NumPy scalars``.
        agree: ``(state) -> bool``, whether what several local devices have is the same bits.
    """

    layout: Callable[[State], State]
    enter: Callable[[State], State]
    leave: Callable[[State], State]
    split: Callable[[Any], Any]
    step: Callable[[State, Any], tuple[State, dict[str, jax.Array]]]
    host: Callable[[Any], Any]
    agree: Callable[[State], bool]


def make_mesh() -> Mesh:
    """All devices of all hosts in one row."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


# --- What all modes share -------------------------------------------------------------------------


def make_loss(network: Network) -> Callable[..., Any]:
    """The mean cross-entropy of a batch, and the statistics that BatchNorm saw."""

    def loss_fn(params: Any, statistics: Any, images: jax.Array, labels: jax.Array) -> Any:
        logits, statistics = network.apply(params, statistics, images, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
        return losses.mean(), statistics

    return loss_fn


def update(tx: Any, grads: Any, state: State, seen: Any, loss: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """Takes the step, or skips it whole: a step whose gradients overflow may have seen infinite activations too."""
    params, statistics, opt_state = state
    params, opt_state = jmp.apply_gradients(tx, grads, opt_state, params)
    metrics = jmp.metrics(opt_state)
    statistics = jmp.select_tree(metrics["last_finite"], seen, statistics)
    return (params, statistics, opt_state), {"loss": loss, **metrics}


def put(tree: Any, shardings: Any) -> Any:
    """Makes global arrays from arrays that are equal on every host; each device gets its part."""

    def put_array(x: Any, sharding: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put_array, tree, shardings)


def everywhere(mesh: Mesh) -> Callable[[Any], Any]:
    """A layout in which every device has all arrays."""
    sharding = NamedSharding(mesh, P())
    return lambda tree: jax.tree.map(lambda _: sharding, tree)


def as_it_is(state: State) -> State:
    """The state is made of global arrays already."""
    return state


def on_host(tree: Any) -> Any:
    """NumPy arrays of what every device has a copy of."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)


def copies_agree(tree: Any) -> bool:
    """Whether local devices that have the same part of an array have the same bits."""

    def agree(x: jax.Array) -> bool:
        copies: dict[str, set[bytes]] = {}
        for shard in x.addressable_shards:
            copies.setdefault(str(shard.index), set()).add(np.asarray(shard.data).tobytes())
        return all(len(bits) == 1 for bits in copies.values())

    return all(agree(x) for x in jax.tree.leaves(tree))


def global_mode(layout: Callable[[State], State], step: Callable[..., Any], mesh: Mesh) -> Mode:
    """A mode whose state is made of global arrays all along, as jitted functions have it."""
    rows = NamedSharding(mesh, P(AXIS))
    return Mode(
        layout=layout,
        enter=as_it_is,
        leave=as_it_is,
        split=lambda batch: _pod_data.to_global(batch, rows),
        step=jax.jit(step, donate_argnums=0),
        host=on_host,
        agree=copies_agree,
    )


# --- The modes ------------------------------------------------------------------------------------


def pmap_mode(make_network: Callable[..., Network], tx: Any, policy: jmp.Policy, mesh: Mesh) -> Mode:
    """Every device has a copy of the state, along a leading device axis."""
    loss_fn, layout = make_loss(make_network(policy, AXIS)), everywhere(mesh)

    def train_step(state: State, batch: Any) -> Any:
        params, statistics, opt_state = state
        value_and_grad = jmp.scaled_value_and_grad(loss_fn, has_aux=True, loss_scale=opt_state)
        (loss, seen), grads = value_and_grad(params, statistics, *batch)
        grads = jmp.distributed.reduce_gradients(grads, AXIS, policy)
        return update(tx, grads, state, seen, jax.lax.pmean(loss, AXIS))

    def leave(state: State) -> State:
        first = _devices.first_replica(state)
        return put(first, layout(first))

    return Mode(
        layout=layout,
        enter=lambda state: _devices.replicate(on_host(state)),
        leave=leave,
        split=lambda rows: _devices.shard(rows, jax.local_device_count()),
        step=jax.pmap(train_step, AXIS, donate_argnums=0),
        host=_devices.first_replica,
        agree=_devices.replicas_agree,
    )


def shard_map_mode(make_network: Callable[..., Network], tx: Any, policy: jmp.Policy, mesh: Mesh) -> Mode:
    """Every device has a copy of the state, and JAX checks that the copies stay equal."""
    loss_fn = make_loss(make_network(policy, AXIS))

    def local_step(state: State, batch: Any) -> Any:
        params, statistics, opt_state = state
        # Gradients of parameters that are the same everywhere would arrive summed, in 16 bits.
        params = jax.lax.pcast(params, AXIS, to="varying")
        value_and_grad = jmp.scaled_value_and_grad(loss_fn, has_aux=True, loss_scale=opt_state)
        (loss, seen), grads = value_and_grad(params, statistics, *batch)
        grads = jmp.distributed.reduce_gradients(grads, AXIS, policy)
        return update(tx, grads, state, seen, jax.lax.pmean(loss, AXIS))

    train_step = jax.shard_map(local_step, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(), check_vma=True)
    return global_mode(everywhere(mesh), train_step, mesh)


def fsdp_spec(shape: tuple[int, ...], devices: int) -> P:
    """Shards the longest axis that divides among the devices; an array without one is on all of them."""
    fitting = [(size, -axis) for axis, size in enumerate(shape) if size % devices == 0]
    if devices == 1 or not fitting:
        return P()
    axis = -max(fitting)[1]
    return P(*[None] * axis, AXIS)


def jit_mode(make_network: Callable[..., Network], tx: Any, policy: jmp.Policy, mesh: Mesh) -> Mode:
    """Parameters and optimizer state are in shards, one per device (FSDP); XLA writes the collectives."""
    loss_fn = make_loss(make_network(policy))  # no axis: the batch of a jitted function is the whole batch
    replicated = everywhere(mesh)

    def layout(state: State) -> State:
        params, statistics, opt_state = state

        def shard(tree: Any) -> Any:
            return jax.tree.map(lambda x: NamedSharding(mesh, fsdp_spec(np.shape(x), mesh.size)), tree)

        return shard(params), replicated(statistics), shard(opt_state)

    def train_step(state: State, batch: Any) -> Any:
        params, statistics, opt_state = state
        shardings = layout(state)

        def gathered_loss(params: Any, *arguments: Any) -> Any:
            return loss_fn(jmp.distributed.gather_params(params, shardings[0], policy), *arguments)

        value_and_grad = jmp.scaled_value_and_grad(gathered_loss, has_aux=True, loss_scale=opt_state)
        (loss, seen), grads = value_and_grad(params, statistics, *batch)
        state, metrics = update(tx, grads, state, seen, loss)
        # Without this, XLA chooses where the new state lies.
        return jax.lax.with_sharding_constraint((state, metrics), (shardings, replicated(metrics)))

    return global_mode(layout, train_step, mesh)


MODES = {"pmap": pmap_mode, "shard_map": shard_map_mode, "jit": jit_mode}
