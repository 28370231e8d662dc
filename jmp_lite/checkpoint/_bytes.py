"""A train state as bytes, with Flax."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import serialization

from jmp_lite._policy import PolicyLike, get_policy
from jmp_lite.checkpoint._state import check_policy, is_key, key_data, wrap_key_data
from jmp_lite.scaling._loss_scale import register_serialization

T = TypeVar("T")

register_serialization()


def _without_keys(state: Any) -> Any:
    return jax.tree.map(key_data, state)


def _like(template: Any, value: Any) -> Any:
    """Gives a restored leaf the kind, the sharding and (for keys) the implementation of the template's."""
    if is_key(template):
        return wrap_key_data(template, value)
    if isinstance(template, jax.Array):
        return jax.device_put(value, template.sharding) if template.committed else jnp.asarray(value)
    return value


def to_bytes(state: Any, *, policy: PolicyLike) -> bytes:
    """Serializes a train state with ``flax.serialization``.

    Args:
        state: Any pytree of containers that Flax can serialize (dicts, lists, NamedTuples, ``TrainState``), with arrays
            of any dtype and typed PRNG keys.
        policy: The policy it is trained under.

    Returns:
        The bytes, in Flax's msgpack format: ``{"policy": str, "state": ...}``.

    Example:
        >>> from jmp_lite import checkpoint
        >>> tx = jmp.loss_scaled(optax.sgd(0.1))
        >>> state = {"opt": tx.init({"w": jnp.ones(2)}), "rng": jax.random.key(0)}
        >>> data = checkpoint.to_bytes(state, policy="mixed_float16")
        >>> restored = checkpoint.from_bytes(state, data, policy="mixed_float16")
        >>> print(restored["opt"].loss_scale.loss_scale)
        32768.0
    """
    data: bytes = serialization.to_bytes({"policy": str(get_policy(policy)), "state": _without_keys(state)})
    return data


def from_bytes(template: T, data: bytes, *, policy: PolicyLike) -> T:
    """Restores what ``to_bytes`` wrote.

    Args:
        template: A state of the same structure, such as a freshly initialized one; it gives the restored arrays their
            sharding, and loss scales their settings.
        data: The bytes.
        policy: The policy that training goes on with.

    Returns:
        The saved state.

    Raises:
        PolicyMismatchError: If it was saved under another policy.
        ValueError: From Flax, if the structures differ.

    Example:
        >>> from jmp_lite import checkpoint
        >>> data = checkpoint.to_bytes({"w": jnp.array([1.0, 2.0])}, policy="bf16-mixed")
        >>> checkpoint.from_bytes({"w": jnp.zeros(2)}, data, policy="mixed_bfloat16")
        {'w': Array([1., 2.], dtype=float32)}
    """
    saved = serialization.msgpack_restore(data)
    check_policy(saved["policy"], policy)
    restored: T = jax.tree.map(_like, template, serialization.from_state_dict(_without_keys(template), saved["state"]))
    return restored
