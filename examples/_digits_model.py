"""A small ResNet with BatchNorm, in Flax Linen and in Flax NNX, as two pure functions each.

The models say nothing about dtypes: ``with_policy`` decides in which one they compute.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jmp_lite as jmp

WIDTHS = (16, 32)  # channels of each stage; every stage but the first halves the resolution
CLASSES = 10
MOMENTUM = 0.9


class Network(NamedTuple):
    """``init(key) -> (params, statistics)`` and
    ``apply(params, statistics, images, train=bool) -> (logits, statistics)``."""

    init: Callable[[jax.Array], tuple[Any, Any]]
    apply: Callable[..., tuple[jax.Array, Any]]


# --- Linen ----------------------------------------------------------------------------------------


class LinenBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    width: int
    stride: int
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = functools.partial(nn.Conv, self.width, use_bias=False)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=MOMENTUM, axis_name=self.axis_name
        )
        y = nn.relu(norm()(conv((3, 3), strides=self.stride)(x)))
        y = norm()(conv((3, 3))(y))
        if x.shape != y.shape:
            x = norm()(conv((1, 1), strides=self.stride)(x))
        return nn.relu(x + y)


class LinenResNet(nn.Module):
    """float[n, 8, 8, 1] -> logits, float[n, 10]; ``axis_name`` shares batch statistics in ``pmap``."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Conv(WIDTHS[0], (3, 3), use_bias=False)(x)
        norm = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, axis_name=self.axis_name)
        x = nn.relu(norm(x))
        for stage, width in enumerate(WIDTHS):
            x = LinenBlock(width, 2 if stage else 1, self.axis_name)(x, train=train)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


@jax.jit
def init_linen(key: jax.Array) -> Any:
    """Parameters and statistics in float32; compiled once for all policies."""
    return LinenResNet().init(key, jnp.zeros((1, 8, 8, 1)), train=False)


def linen_network(policy: Any, axis_name: str | None = None) -> Network:
    """The Linen model under a precision policy."""
    model = LinenResNet(axis_name)
    model_apply = jmp.linen.with_policy(model.apply, policy)

    def init(key: jax.Array) -> tuple[Any, Any]:
        variables = init_linen(key)
        return policy.cast_to_param(variables["params"]), variables["batch_stats"]

    def apply(params: Any, statistics: Any, images: jax.Array, *, train: bool) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": statistics}
        if not train:
            return model_apply(variables, images, train=False), statistics
        logits, updated = model_apply(variables, images, train=True, mutable=["batch_stats"])
        return logits, updated["batch_stats"]

    return Network(init, apply)


# --- NNX ------------------------------------------------------------------------------------------


class NnxBlock(nnx.Module):
    """The same block as ``LinenBlock``."""

    def __init__(self, channels: int, width: int, stride: int, axis_name: str | None, rngs: nnx.Rngs) -> None:
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        norm = functools.partial(nnx.BatchNorm, width, momentum=MOMENTUM, axis_name=axis_name, rngs=rngs)
        self.conv1, self.norm1 = conv(channels, width, (3, 3), strides=stride), norm()
        self.conv2, self.norm2 = conv(width, width, (3, 3)), norm()
        self.project = stride > 1 or channels != width
        if self.project:
            self.shortcut, self.shortcut_norm = conv(channels, width, (1, 1), strides=stride), norm()

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x), use_running_average=not train))
        y = self.norm2(self.conv2(y), use_running_average=not train)
        if self.project:
            x = self.shortcut_norm(self.shortcut(x), use_running_average=not train)
        return nnx.relu(x + y)


class NnxResNet(nnx.Module):
    """The same network as ``LinenResNet``."""

    def __init__(self, axis_name: str | None = None, *, rngs: nnx.Rngs) -> None:
        first, last = WIDTHS
        self.conv = nnx.Conv(1, first, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(first, momentum=MOMENTUM, axis_name=axis_name, rngs=rngs)
        self.stage1 = NnxBlock(first, first, 1, axis_name, rngs)
        self.stage2 = NnxBlock(first, last, 2, axis_name, rngs)
        self.head = nnx.Linear(last, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x), use_running_average=not train))
        x = self.stage2(self.stage1(x, train=train), train=train)
        return self.head(x.mean((1, 2)))


@jax.jit
def init_nnx(key: jax.Array) -> tuple[Any, Any]:
    """Parameters and statistics in float32; compiled once for all policies."""
    _, params, statistics = nnx.split(NnxResNet(rngs=nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)


def nnx_network(policy: Any, axis_name: str | None = None) -> Network:
    """The NNX model under a precision policy; its state travels as plain dictionaries."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: NnxResNet(axis_name, rngs=nnx.Rngs(0))))

    def init(key: jax.Array) -> tuple[Any, Any]:
        params, statistics = init_nnx(key)
        return policy.cast_to_param(params), statistics

    def apply(params: Any, statistics: Any, images: jax.Array, *, train: bool) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params, statistics)
        forward = jmp.nnx.with_policy(lambda model, images: model(images, train=train), policy)
        logits = forward(model, images)
        return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return Network(init, apply)


FRAMEWORKS = {"linen": linen_network, "nnx": nnx_network}


# --- Memory ---------------------------------------------------------------------------------------


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes of arrays, of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def activation_bytes(network: Network, params: Any, statistics: Any, images: jax.Array) -> int:
    """Bytes that the forward pass keeps for the backward pass, besides its own arguments.

    They are the residuals of ``jax.vjp`` of the logits, before the compiler recomputes or merges
    any of them: casts of the parameters count, the parameters themselves do not.
    """

    def residuals(params: Any, statistics: Any, images: jax.Array) -> Any:
        def forward(params: Any) -> tuple[jax.Array, Any]:
            return network.apply(params, statistics, images, train=True)

        _, pullback, _ = jax.vjp(forward, params, has_aux=True)
        return pullback

    jaxpr = jax.make_jaxpr(residuals)(params, statistics, images).jaxpr
    arguments = set(jaxpr.invars)
    kept = {var for var in jaxpr.outvars if not hasattr(var, "val") and var not in arguments}
    return num_bytes([var.aval for var in kept])
