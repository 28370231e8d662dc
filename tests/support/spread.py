"""One training step in every way in which JAX spreads it over devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jmp_lite as jmp

AXIS = "data"
WIDTH, ROWS = 16, 32


@dataclasses.dataclass(frozen=True)
class Mode:
    """A form (jit, explicit, shard_map, unchecked, pmap), and whether matrices are split over devices."""

    form: str
    is_sharded: bool

    @property
    def is_local(self):
        """Whether the step is written for one device."""
        return self.form in ("shard_map", "unchecked", "pmap")

    def __str__(self):
        return f"{self.form}{' FSDP' if self.is_sharded else ''}"


MODES = [
    Mode(form, is_sharded) for form in ("jit", "explicit", "shard_map", "unchecked") for is_sharded in (False, True)
]
MODES.append(Mode("pmap", False))


def parameters(rng):
    """Two layers with biases and a scale; leading axes divide by eight."""

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(WIDTH), jnp.float32)

    return {
        "first": {"w": normal(WIDTH, 2 * WIDTH), "b": normal(2 * WIDTH)},
        "scale": 1 + normal(2 * WIDTH),
        "second": {"w": normal(2 * WIDTH, WIDTH), "b": normal(WIDTH)},
    }


def batch(rng):
    """Inputs and targets."""
    return tuple(jnp.asarray(rng.standard_normal((ROWS, WIDTH)), jnp.float32) for _ in range(2))


def loss_fn(params, x, y):
    """Mean squared error of a perceptron with a norm."""
    hidden = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"][None])
    hidden = hidden * jax.lax.rsqrt(jnp.mean(hidden**2, -1, keepdims=True) + 1e-6) * params["scale"][None]
    return jnp.mean((hidden @ params["second"]["w"] + params["second"]["b"][None] - y) ** 2)


def specs_of(mode, params):
    """Which leaves are split: matrices along their first axis."""
    return jax.tree.map(lambda leaf: P(AXIS) if mode.is_sharded and leaf.ndim == 2 else P(), params)


def mesh_of(mode, devices):
    """The first devices along one axis."""
    kind = AxisType.Explicit if mode.form == "explicit" else AxisType.Auto
    return Mesh(np.array(jax.devices()[:devices]), (AXIS,), axis_types=(kind,))


def gradient(mode, mesh, policy, specs, *, loss):
    """``(params, x, y) -> (loss, grads)``, averaged over the devices as the library means it to be done."""
    autocast = jmp.autocast(loss, policy)
    stored = specs if mode.is_local else jax.tree.map(functools.partial(NamedSharding, mesh), specs)

    def whole(params, x, y):
        if mode.is_sharded:
            params = jmp.distributed.gather_params(params, stored, policy)
        return autocast(params, x, y)

    def compute(params, x, y, state):
        if mode.form == "shard_map" and not mode.is_sharded:
            params = jax.lax.pcast(params, AXIS, to="varying")
        value, grads = jmp.scaled_value_and_grad(whole, loss_scale=state)(params, x, y)
        if mode.is_local:
            grads = jmp.distributed.reduce_gradients(grads, AXIS, policy, shardings=specs)
            value = jax.lax.pmean(value, AXIS)
        return value, grads

    return compute


class Training:
    """A step ``(params, opt_state, x, y) -> (params, opt_state, loss)``, and what it is called with."""

    def __init__(self, mode, policy, tx, params, *, devices=8, loss=loss_fn):
        self.mode, self.devices, self.mesh = mode, devices, mesh_of(mode, devices)
        specs = specs_of(mode, params)
        state = tx(AXIS if mode.is_local else None).init(params)
        compute = gradient(mode, self.mesh, policy, specs, loss=loss)
        self.tx = tx(AXIS if mode.is_local else None)

        def step(params, opt_state, x, y):
            value, grads = compute(params, x, y, opt_state)
            with jax.numpy_dtype_promotion("standard"):
                params, opt_state = jmp.apply_gradients(self.tx, grads, opt_state, params)
            return params, opt_state, value

        all_specs = jax.tree.map(lambda leaf: P(AXIS) if mode.is_sharded and leaf.ndim == 2 else P(), (params, state))
        if mode.form == "pmap":
            self.step = jax.pmap(step, AXIS, devices=jax.devices()[:devices])
            self.state = jax.tree.map(lambda leaf: jnp.stack([leaf] * devices), (params, state))
            return
        if mode.is_local:
            mapped = jax.shard_map(
                step,
                mesh=self.mesh,
                in_specs=(*all_specs, P(AXIS), P(AXIS)),
                out_specs=(*all_specs, P()),
                check_vma=mode.form == "shard_map",
            )
            self.step = jax.jit(mapped)
        else:
            self.step = jax.jit(step)
        shardings = jax.tree.map(functools.partial(NamedSharding, self.mesh), all_specs)
        self.state = jax.device_put((params, state), shardings)

    def place(self, *arrays):
        """Spreads the rows of a batch."""
        if self.mode.form == "pmap":
            return [x.reshape(self.devices, -1, *x.shape[1:]) for x in arrays]
        return jax.device_put(arrays, NamedSharding(self.mesh, P(AXIS)))

    def __call__(self, x, y):
        """Takes one step; returns the loss."""
        with jax.set_mesh(self.mesh) if self.mode.form == "explicit" else jax.default_device(jax.devices()[0]):
            *self.state, value = self.step(*self.state, *self.place(x, y))
        return float(np.asarray(value).reshape(-1)[0])

    @property
    def whole(self):
        """Parameters and optimizer state as NumPy arrays, without a device axis; devices must agree."""
        if self.mode.form == "pmap":
            return jax.tree.map(lambda leaf: np.asarray(leaf)[0], tuple(self.state))
        return jax.tree.map(np.asarray, tuple(self.state))

    def lowered(self, x, y):
        """The step as StableHLO."""
        with jax.set_mesh(self.mesh) if self.mode.form == "explicit" else jax.default_device(jax.devices()[0]):
            return self.step.lower(*self.state, *self.place(x, y))


def scaled(inner=optax.sgd, rate=0.1, scale=2.0**10):
    """An optimizer with dynamic loss scaling, as a function of the axis that replicas agree over."""
    return lambda axis_name: jmp.loss_scaled(inner(rate), jmp.DynamicLossScale(scale, period=3), axis_name=axis_name)
