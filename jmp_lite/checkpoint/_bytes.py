"""A train state as bytes, with Flax."""

from typing import Any, TypeVar

import jax
import numpy as np
from flax import serialization

from jmp_lite._messages import described, first_few, quote
from jmp_lite._policy import PolicyLike
from jmp_lite.checkpoint._digest import digests
from jmp_lite.checkpoint._state import (
    Header,
    agree,
    check_header,
    describe,
    fill,
    named_leaves,
    target,
    to_store,
)
from jmp_lite.errors import CorruptCheckpointError, ForeignCheckpointError, InvalidCheckpointError
from jmp_lite.scaling._loss_scale import register_serialization

T = TypeVar("T")

register_serialization()  # for those who use flax.serialization by itself


def to_bytes(state: Any, *, policy: PolicyLike) -> bytes:
    """Serializes a train state as a checkpoint in memory, with the same checks as a directory.

    Args:
        state: Any pytree of arrays, typed PRNG keys, and Python numbers.
        policy: The policy it is trained under.

    Returns:
        The bytes, in Flax's msgpack format: ``{"header": {...}, "state": {path: array}}``. The header has the policy,
        the classes of loss scales, and shape, dtype and digest of every array.

    Raises:
        CheckpointMismatchError: If copies of a leaf on several devices or processes differ, or two paths are the same
            when written with slashes.
        InvalidCheckpointError: If a leaf is not an array, key or number.

    Example:
        >>> from jmp_lite import checkpoint
        >>> tx = jmp.loss_scaled(optax.sgd(0.1))
        >>> state = {"opt": tx.init({"w": jnp.ones(2)}), "rng": jax.random.key(0)}
        >>> data = checkpoint.to_bytes(state, policy="mixed_float16")
        >>> restored = checkpoint.from_bytes(state, data, policy="mixed_float16")
        >>> print(restored["opt"].loss_scale.loss_scale)
        32768.0
    """
    header = describe(state, policy)
    stored = jax.tree.map(_in_host_memory, to_store(state))
    data: bytes = serialization.msgpack_serialize({"header": header, "state": named_leaves(stored)})
    return data


def _in_host_memory(leaf: Any) -> Any:
    return np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf


def from_bytes(template: T, data: bytes, *, policy: PolicyLike, migrate: bool = False) -> T:
    """Restores a state from the bytes of ``to_bytes``.

    Args:
        template: A state of the same structure, shapes and dtypes, such as a freshly initialized one, of arrays or
            ``jax.ShapeDtypeStruct``; restored arrays get its shardings, and loss scales its settings.
        data: The bytes.
        policy: The policy of the resumed run.
        migrate: Lets the policy change. Arrays are cast to the template's floating dtypes; a loss scale of another
            class or with other fields comes from the template; a float32 run can continue in a template with the state
            of ``optim.stored``, and such a state in one with other formats of moments. Everything else must match.

    Returns:
        The saved state, with every array verified against its saved digest.

    Raises:
        PolicyMismatchError: If it was saved under another policy.
        InvalidLossScaleError: If a loss scale in the template is of another class than the one saved.
        CheckpointMismatchError: If structures, shapes, dtypes or formats of moments differ.
        CorruptCheckpointError: If the bytes cannot be read, or an array does not match its digest.
        ForeignCheckpointError: If Flax wrote them without jmp_lite.
        InvalidCheckpointError: If ``data`` is not bytes.

    Example:
        >>> from jmp_lite import checkpoint
        >>> data = checkpoint.to_bytes({"w": jnp.array([1.0, 2.0])}, policy="bf16-mixed")
        >>> checkpoint.from_bytes({"w": jnp.zeros(2)}, data, policy="mixed_bfloat16")
        {'w': Array([1., 2.], dtype=float32)}
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise InvalidCheckpointError(
            f"from_bytes(template, data) takes the bytes that to_bytes returned, got {quote(data)}. Read a file with "
            "pathlib.Path(path).read_bytes()."
        )
    header, stored = _read(data)
    stand_in, put_back = agree(header, template, policy, migrate=migrate)
    state = _checked_values(header, stored, stand_in)
    restored: T = put_back(jax.tree.map(fill, stand_in, state))
    return restored


def _read(data: bytes) -> tuple[Header, Any]:
    """Splits the bytes into the header and the arrays."""
    try:
        parts = serialization.msgpack_restore(data)
        if isinstance(parts, dict) and set(parts) == {"header", "state"} and isinstance(parts["header"], dict):
            return check_header(parts["header"]), parts["state"]
    except Exception as error:  # whatever a parser of damaged bytes comes up with
        raise _damaged(error) from error
    raise ForeignCheckpointError(
        "These bytes have no header of jmp_lite.checkpoint.to_bytes. If Flax wrote them by itself, restore them with "
        "flax.serialization.from_bytes."
    )


def _checked_values(header: Header, stored: Any, template: Any) -> Any:
    """The leaves in the structure of the template, once verified."""
    names, (leaves, treedef) = list(named_leaves(template)), jax.tree.flatten(template)
    try:
        values = [_own(stored[name]) for name in names]
        found, _ = digests(values)
        kinds = [(np.shape(value), np.asarray(value).dtype) for value in values]
    except Exception as error:
        raise _damaged(error) from error
    entries = [header["leaves"][name] for name in names]
    wanted = [target(entry, leaf) for entry, leaf in zip(entries, leaves, strict=True)]
    changed = [
        repr(name)
        for name, digest, kind, entry, like in zip(names, found, kinds, entries, wanted, strict=True)
        if digest != entry["digest"] or kind != (like.shape, like.dtype)
    ]
    if changed:
        raise CorruptCheckpointError(
            f"The bytes are damaged. The values of {first_few(changed)} are not those that were saved."
        )
    return jax.tree.unflatten(treedef, values)


def _damaged(error: Exception) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"The bytes are damaged. {described(error)}")


def _own(value: Any) -> Any:
    """A writable array; Flax returns views of bytes."""
    return np.array(value) if isinstance(value, (np.ndarray, np.generic)) else value
