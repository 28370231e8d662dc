"""Helpers that tests share: comparing bits, counting compilations, choosing the form of a skip."""

import contextlib
import functools
import json
import logging
import pathlib
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmp_lite as jmp

DATA = pathlib.Path(__file__).parents[1] / "data"
DEVICES = 8


def read_json(name):
    """A recorded table from tests/data."""
    return json.loads((DATA / name).read_text())


def patterns():
    """The recorded overflow patterns: name -> bool[10000], True where gradients are finite."""
    table = {}
    for name, recorded in read_json("patterns.json").items():
        finite = np.ones(recorded["n"], bool)
        finite[recorded["nonfinite_steps"]] = False
        table[name] = finite
    return table


def mesh():
    """The eight simulated devices along one axis."""
    return jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("batch",))


# --- Comparing ---


def raw(leaf):
    """Everything about a leaf that can differ: dtype, shape and bytes (the sign of zero and NaN payloads too)."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), raw(jax.random.key_data(leaf))
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        array = np.asarray(leaf)
        return str(array.dtype), array.shape, array.tobytes()
    return leaf


def assert_identical(actual, expected):
    """Asserts that two trees have the same structure (settings included), dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert raw(a) == raw(b), f"{jax.tree_util.keystr(path)}: {a!r} is not {b!r}"


def assert_close(actual, expected, *, ulps, least=0.0):
    """Asserts that two trees agree to so many units in the last place of each leaf's largest element.

    Where sums may cancel, as in moments, ``least`` is the magnitude of the terms.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, f"{jax.tree_util.keystr(path)}: {a.dtype} is not {b.dtype}"
        if jnp.issubdtype(a.dtype, jnp.inexact):
            wide = np.asarray(b).astype(np.complex128)
            error = np.max(np.abs(np.asarray(a).astype(np.complex128) - wide), initial=0.0)
            allowed = ulps * float(jnp.finfo(a.dtype).eps) * np.max(np.abs(wide), initial=least)
            assert error <= allowed, f"{jax.tree_util.keystr(path)}: off by {error}, {allowed} allowed"
        else:
            assert raw(a) == raw(b), f"{jax.tree_util.keystr(path)}: {a!r} is not {b!r}"


def structure_and_dtypes(tree):
    """The structure of a tree, with dtype, shape and weakness of its leaves."""
    leaves = jax.tree.leaves(tree)
    return jax.tree.structure(tree), [(jax.typeof(leaf), getattr(leaf, "weak_type", False)) for leaf in leaves]


# --- Running ---

#: Compiles a function to round where it is written, which XLA on CPU leaves out unless told.
jit_as_written = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})


def slow_but_for(quick, values):
    """Parameters of a test, of which all but a few are left to the slow tests."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def standard(tx):
    """The transformation with JAX's usual dtype promotion inside: Optax's own code does not keep to the strict one."""
    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def apply_updates(params, updates):
    """``optax.apply_updates`` with JAX's usual dtype promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


def fused(tx):
    """A step in the form of ``apply_gradients``."""
    return lambda params, state, grads: jmp.apply_gradients(tx, grads, state, params)


def two_calls(tx):
    """A step in Optax's own form."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state

    return step


def with_scale_forced(scale, value):
    """The dynamic loss scale with its value overwritten from outside, as no method of it would."""
    leaves, treedef = jax.tree.flatten(scale)
    return jax.tree.unflatten(treedef, [jnp.full(np.shape(leaves[0]), value, jnp.float32), *leaves[1:]])


@contextlib.contextmanager
def compiled_as_on(platform):
    """Makes code traced inside take the choices that it takes on a platform: ``cpu``, ``cuda`` or ``tpu``.

    Yields a list that grows by the platform for each choice.
    """
    choices = []

    def choose(*operands, default, **by_platform):
        choices.append(platform)
        return by_platform.get(platform, default)(*operands)

    with unittest.mock.patch.object(jax.lax, "platform_dependent", choose):
        yield choices


class _CompilationLog(logging.Handler):
    def __init__(self):
        super().__init__()
        self.finished = []

    def emit(self, record):
        message = record.getMessage()
        if message.startswith("Finished XLA compilation of "):
            self.finished.append(message.removeprefix("Finished XLA compilation of ").split(" in ")[0])


@contextlib.contextmanager
def compilations():
    """Collects the names of what XLA compiles in this thread, such as ``jit(step)``."""
    handler, logger = _CompilationLog(), logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield handler.finished
    finally:
        logger.removeHandler(handler)


# --- Optimizers ---


def parameters(rng, dtype=jnp.float32):
    """A small tree of parameters with an empty node and a None; few shapes, for few compilations."""
    one, two, scalar = (jnp.asarray(rng.uniform(0.5, 2.0, shape), dtype) for shape in ((4, 3), (4, 3), ()))
    return {"a": {"matrix": one, "nothing": {}}, "b": [two, None], "c": scalar}


def gradients_like(params, rng, dtype=None, size=1.0):
    """Normal deviates in the shape of a tree."""
    return jax.tree.map(lambda p: jnp.asarray(size * rng.standard_normal(p.shape), dtype or p.dtype), params)


def with_bad_element(grads, rng, value=None):
    """The gradients with NaN or an infinity at one random place, and the name of that leaf."""
    leaves, treedef = jax.tree.flatten(grads)
    i = rng.integers(len(leaves))
    position = tuple(int(rng.integers(n)) for n in leaves[i].shape)
    bad = rng.choice([np.nan, np.inf, -np.inf]) if value is None else value
    changed = np.array(leaves[i])
    changed[position] = bad
    leaves[i] = jax.device_put(changed, leaves[i].sharding if leaves[i].committed else None)
    return jax.tree.unflatten(treedef, leaves)


def _labels(params):
    return {"a": "adam", "b": jax.tree.map(lambda _: "sgd", params["b"]), "c": "sgd"}


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "adam bf16 moments": lambda: optax.adam(1e-2, mu_dtype=jnp.bfloat16),
    "lion": lambda: optax.lion(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "clip by norm": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2)),
    "schedule": lambda: optax.sgd(optax.warmup_cosine_decay_schedule(0.01, 0.1, 2, 6)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 0.0, 5)),
    "masked": lambda: optax.masked(optax.adam(1e-2), {"a": True, "b": False, "c": True}),
    "multi_transform": lambda: optax.multi_transform({"adam": optax.adam(1e-2), "sgd": optax.sgd(0.1)}, _labels),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "clipped, with noise": lambda: optax.chain(optax.clip(0.3), optax.add_noise(0.1, 0.5, key=7), optax.sgd(0.1)),
}
