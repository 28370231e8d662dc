"""Saving and restoring a whole train state: parameters, optimiser state with its loss scale, PRNG keys, policy.

Two forms of the same: bytes through ``flax.serialization``, and a directory through Orbax. Both need the extra
``jmp_lite[checkpoint]``. What is restored is bit-identical, so a resumed run continues as if it had not stopped. The
policy travels with the state, because weights restored under another one would silently compute something else.
"""

from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import serialization

from jmp_lite._errors import PolicyMismatchError
from jmp_lite._loss_scale import register_serialization
from jmp_lite._policy import PolicyLike, get_policy

__all__ = ["from_bytes", "restore", "save", "to_bytes"]

T = TypeVar("T")

register_serialization()


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(state: Any) -> Any:
    """Replaces typed PRNG keys by their data, which both formats can store."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, state)


def _like(template: Any, value: Any) -> Any:
    """Gives a restored leaf the kind, the sharding and (for keys) the implementation of the template's."""
    if _is_key(template):
        return jax.random.wrap_key_data(value, impl=jax.random.key_impl(template))
    if isinstance(template, jax.Array):
        return jax.device_put(value, template.sharding) if template.committed else jnp.asarray(value)
    return value


def _check_policy(saved: str, policy: PolicyLike) -> None:
    expected = str(get_policy(policy))
    if saved != expected:
        raise PolicyMismatchError(
            f"The checkpoint was written under policy {saved!r}, but is restored under {expected!r}. Restore it "
            "with the policy it was written under, and cast afterwards if you mean to change."
        )


def to_bytes(state: Any, *, policy: PolicyLike) -> bytes:
    """Serialises a train state with ``flax.serialization``.

    Args:
        state: Any pytree of containers that Flax can serialise (dicts, lists, NamedTuples, ``TrainState``), with arrays
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
        template: A state of the same structure, such as a freshly initialised one; it gives the restored arrays their
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
    _check_policy(saved["policy"], policy)
    restored: T = jax.tree.map(_like, template, serialization.from_state_dict(_without_keys(template), saved["state"]))
    return restored


def save(path: str | Path, state: Any, *, policy: PolicyLike) -> None:
    """Writes a train state to a new directory with Orbax, atomically: it is there complete or not at all.

    Args:
        path: Directory to create, such as ``run/step_1000``.
        state: Any pytree of arrays, sharded or not, and typed PRNG keys.
        policy: The policy it is trained under.

    Raises:
        ValueError: From Orbax, if the directory exists.

    Example:
        >>> import tempfile
        >>> from jmp_lite import checkpoint
        >>> directory = tempfile.mkdtemp()
        >>> checkpoint.save(f"{directory}/step_1", {"w": jnp.array([1.0, 2.0])}, policy="mixed_float16")
        >>> checkpoint.restore(f"{directory}/step_1", {"w": jnp.zeros(2)}, policy="mixed_float16")
        {'w': Array([1., 2.], dtype=float32)}
    """
    parts = ocp.args.Composite(
        state=ocp.args.StandardSave(_without_keys(state)), policy=ocp.args.JsonSave({"policy": str(get_policy(policy))})
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(Path(path).absolute(), args=parts)


def restore(path: str | Path, template: T, *, policy: PolicyLike) -> T:
    """Restores what ``save`` wrote.

    Args:
        path: The directory.
        template: A state of the same structure, shapes and dtypes; restored arrays get its shardings.
        policy: The policy that training goes on with.

    Returns:
        The saved state.

    Raises:
        PolicyMismatchError: If it was saved under another policy.
        FileNotFoundError: From Orbax, if there is no such checkpoint.
        ValueError: From Orbax, if structures or shapes differ.

    Example:
        >>> from jmp_lite import checkpoint
        >>> checkpoint.restore("no_such_run", {"w": jnp.zeros(2)}, policy="full")
        Traceback (most recent call last):
        FileNotFoundError: ...
    """
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        saved = checkpointer.restore(Path(path).absolute(), args=ocp.args.Composite(policy=ocp.args.JsonRestore()))
        _check_policy(saved.policy["policy"], policy)
        parts = ocp.args.Composite(state=ocp.args.StandardRestore(_without_keys(template)))
        state = checkpointer.restore(Path(path).absolute(), args=parts).state
    restored: T = jax.tree.map(_like, template, state)
    return restored
