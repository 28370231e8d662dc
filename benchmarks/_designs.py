"""The loss-scaled AdamW step as each library would have its user write it, in one common form.

Every design is a pair `init(params) -> state` and `step(params, state, grads) -> (params, state)`,
where `grads` are gradients of a loss that was multiplied by `LOSS_SCALE`, and `state` holds the
optimizer state together with the library's loss scale. Parameters are float32.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks import _peers

LOSS_SCALE = 2.0**15
NEVER = 2**30

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Design:
    """One way to write the step.

    Attributes:
      init: makes the state from the parameters.
      step: (params, state, scaled grads) -> (params, state).
      moments: takes a state to the part that a skipped step must leave alone.
      skips: whether it claims to skip a step whose gradients are not finite.
    """

    init: Callable[[Any], Any]
    step: Step
    moments: Callable[[Any], Any] = lambda state: state[0]
    skips: bool = True


def optimizer() -> optax.GradientTransformation:
    """The inner optimizer shared by all designs."""
    return optax.adamw(1e-3, weight_decay=1e-4)


def to_float32(tree: Any) -> Any:
    """Casts every leaf to float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def bare() -> Design:
    """Optax alone: no loss scale, no check, no skip."""
    tx = optimizer()

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, inner = tx.update(to_float32(grads), state[0], params)
        return optax.apply_updates(params, updates), (inner,)

    return Design(lambda params: (tx.init(params),), step, skips=False)


def idle() -> Design:
    """Returns its inputs: what calling a compiled step with these trees costs by itself."""
    tx = optimizer()

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        del grads
        return params, state

    return Design(lambda params: (tx.init(params),), step, skips=False)


def jmp_readme() -> Design:
    """The dynamic branch of the training step in jmp's README.

    The loss scale crosses `jit` as its two fields: `jit(...).lower` cannot take the object itself.
    """
    jmp = importlib.import_module("jmp")
    tx = optimizer()

    def init(params: Any) -> Any:
        return tx.init(params), (jnp.float32(LOSS_SCALE), jnp.int32(0))

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        inner, fields = state
        loss_scale = jmp.DynamicLossScale(*fields)
        grads = loss_scale.unscale(jmp.cast_to_full(grads))
        finite = jmp.all_finite(grads)
        updates, stepped = tx.update(grads, inner, params)
        applied = optax.apply_updates(params, updates)
        params, inner = jmp.select_tree(finite, (applied, stepped), (params, inner))
        loss_scale = loss_scale.adjust(finite)
        return params, (inner, (loss_scale.loss_scale, loss_scale.counter))

    return Design(init, step)


@jax.custom_vjp
def _with_gradient(tree: Any, grads: Any) -> jax.Array:
    """A scalar whose gradient by `tree` is `grads`, whatever the cotangent."""
    return jnp.zeros((), jnp.float32)


def _with_gradient_fwd(tree: Any, grads: Any) -> tuple[jax.Array, Any]:
    return _with_gradient(tree, grads), grads


def _with_gradient_bwd(grads: Any, cotangent: jax.Array) -> tuple[Any, None]:
    return grads, None


_with_gradient.defvjp(_with_gradient_fwd, _with_gradient_bwd)


def flax_dynamic_scale() -> Design:
    """Flax's DynamicScale, with the `where` skip of Flax's ImageNet example."""
    dynamic_scale = importlib.import_module("flax.training.dynamic_scale")
    tx = optimizer()

    def init(params: Any) -> Any:
        scale = dynamic_scale.DynamicScale(fin_steps=jnp.int32(0), scale=jnp.float32(LOSS_SCALE), minimum_scale=1.0)
        return tx.init(params), scale

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        inner, scale = state
        value_and_grad = scale.value_and_grad(lambda tree: _with_gradient(tree, grads))
        scale, finite, _, unscaled = value_and_grad(grads)
        updates, stepped = tx.update(unscaled, inner, params)
        applied = optax.apply_updates(params, updates)
        keep = functools.partial(jnp.where, finite)
        params, inner = jax.tree.map(keep, (applied, stepped), (params, inner))
        return params, (inner, scale)

    return Design(init, step)


def mpx_update() -> Design:
    """`mpx.optimizer_update` after the tail of `mpx.filter_value_and_grad`."""
    mpx = importlib.import_module("mpx")
    tx = optimizer()

    def init(params: Any) -> Any:
        scale = mpx.DynamicLossScaling(jnp.float32(LOSS_SCALE), jnp.float32(1.0))
        return tx.init(params), scale

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        inner, scale = state
        finite = mpx.all_finite(grads)
        scale = scale.adjust(finite)
        params, inner = mpx.optimizer_update(params, tx, inner, scale.unscale(grads), finite)
        return params, (inner, scale)

    return Design(init, step)


def optax_apply_if_finite() -> Design:
    """`optax.apply_if_finite` around AdamW, with a loss scale kept beside it."""
    tx = optax.apply_if_finite(optimizer(), max_consecutive_errors=NEVER)

    def init(params: Any) -> Any:
        return tx.init(params), jnp.float32(LOSS_SCALE), jnp.int32(0)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        guarded, scale, good_steps = state
        inverse = 1.0 / scale
        unscaled = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * inverse, grads)
        updates, guarded = tx.update(unscaled, guarded, params)
        finite = guarded.last_finite
        grows = finite & (good_steps == 1999)
        scale = jnp.where(grows, scale * 2.0, jnp.where(finite, scale, jnp.maximum(scale / 2.0, 1.0)))
        good_steps = jnp.where(finite & ~grows, good_steps + 1, 0)
        return optax.apply_updates(params, updates), (guarded, scale, good_steps)

    return Design(init, step, lambda state: state[0].inner_state)


def jmp_lite_update() -> Design:
    """jmp_lite in plain Optax form: `tx.update`, then `optax.apply_updates`."""
    jmp = importlib.import_module("jmp_lite")
    tx = jmp.loss_scaled(optimizer(), jmp.DynamicLossScale(LOSS_SCALE))

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Design(tx.init, step, lambda state: state.inner_state)


def jmp_lite_apply() -> Design:
    """jmp_lite's fused form: `apply_gradients`."""
    jmp = importlib.import_module("jmp_lite")
    tx = jmp.loss_scaled(optimizer(), jmp.DynamicLossScale(LOSS_SCALE))

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        applied: tuple[Any, Any] = jmp.apply_gradients(tx, grads, state, params)
        return applied

    return Design(tx.init, step, lambda state: state.inner_state)


BARE = "bare optax"
IDLE = "call alone"
OURS: Mapping[str, Callable[[], Design]] = {
    "jmp_lite tx.update": jmp_lite_update,
    "jmp_lite apply_gradients": jmp_lite_apply,
}
PEERS: Mapping[str, Callable[[], Design]] = {
    "jmp": jmp_readme,
    "flax DynamicScale": flax_dynamic_scale,
    "mpx": mpx_update,
    "optax.apply_if_finite": optax_apply_if_finite,
}

ALL: Mapping[str, Callable[[], Design]] = {BARE: bare, IDLE: idle, **PEERS, **OURS}


def available(skip_peers: bool = False) -> tuple[dict[str, Design], dict[str, str]]:
    """Builds every design that can be built here.

    Args:
      skip_peers: leave out the other libraries, but not bare Optax.

    Returns:
      The designs by name, bare Optax first, and for each that is missing the reason.
    """
    return _peers.build({BARE: bare, IDLE: idle, **OURS} if skip_peers else ALL)


#: Seconds of compilation from which on one is enough.
PATIENCE = 30.0


class Built(NamedTuple):
    """A compiled step, and the processor seconds that it took to trace it and to compile it."""

    compiled: Any
    trace: float
    compilation: float


def built(design: Design, params: Any, grads: Any, sharding: Any = None) -> Built:
    """Compiles the step for the given shapes, with params and state donated in output order.

    Args:
      design: the step.
      params: float32 tree of arrays or `jax.ShapeDtypeStruct`.
      grads: tree of the same structure and shapes.
      sharding: where the arguments live; None for the default device.

    Both times are the fastest of three, each of a function that JAX has not seen; what takes longer than
    `PATIENCE` to compile is compiled once.
    """

    def abstract(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    state = jax.eval_shape(design.init, params)
    arguments = abstract(params), abstract(state), abstract(grads)
    traces, compilations = [], []
    for _ in range(3):
        step = jax.jit(functools.partial(design.step), donate_argnums=(0, 1))
        start = time.process_time()
        traced = step.trace(*arguments)
        traces.append(time.process_time() - start)
        if not compilations or min(compilations) < PATIENCE:
            start = time.process_time()
            compiled = traced.lower().compile()
            compilations.append(time.process_time() - start)
    return Built(compiled, min(traces), min(compilations))


TREES = {
    "one": "1 leaf, 33.6 M parameters",
    "65": "65 leaves, 29.4 M parameters",
    "300": "300 leaves, 4.9 M parameters",
    "tiny": "8 leaves, 1.0 M parameters",
}
"""The benchmark trees by name: one matrix, a small transformer, many small matrices, and one for smoke tests."""


def shapes(tree: str) -> dict[str, tuple[int, ...]]:
    """Leaf shapes of one of `TREES`.

    Raises:
      ValueError: another name.
    """
    if tree == "one":
        return {"kernel": (32768, 1024)}
    if tree == "tiny":
        return {f"kernel_{index}": (512, 256) for index in range(8)}
    if tree == "300":
        return {f"kernel_{index:03d}": (64, 256) for index in range(300)}
    if tree != "65":
        raise ValueError(f"unknown tree {tree!r}: expected one of {sorted(TREES)}")
    block = {
        "attention_in": (512, 1536),
        "attention_out": (512, 512),
        "mlp_in": (512, 2048),
        "mlp_out": (2048, 512),
        "norm_1": (512,),
        "norm_2": (512,),
        "mlp_in_bias": (2048,),
        "mlp_out_bias": (512,),
    }
    leaves: dict[str, tuple[int, ...]] = {"embedding": (8192, 512)}
    for index in range(8):
        leaves |= {f"block_{index}/{name}": shape for name, shape in block.items()}
    return leaves


def abstract_trees(tree: str, grad_dtype: str) -> tuple[Any, Any]:
    """Shapes of (params, grads) for one of the benchmark trees."""
    leaves = shapes(tree)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}
    grads = {name: jax.ShapeDtypeStruct(shape, grad_dtype) for name, shape in leaves.items()}
    return params, grads


def ideal_bytes_per_parameter(grad_dtype: str) -> float:
    """The least a checked AdamW step can move: p, m, v in and out, and the gradient twice.

    >>> ideal_bytes_per_parameter("float32"), ideal_bytes_per_parameter("float16")
    (32.0, 28.0)
    """
    return 24.0 + 2.0 * jnp.dtype(grad_dtype).itemsize
