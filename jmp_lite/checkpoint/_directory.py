"""A train state as a directory, with Orbax."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jmp_lite._messages import described, first_few, quote
from jmp_lite._policy import PolicyLike
from jmp_lite.checkpoint._digest import combine, local_sums
from jmp_lite.checkpoint._processes import first_failure
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
from jmp_lite.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    ForeignCheckpointError,
    InvalidCheckpointError,
)

T = TypeVar("T")

_UNWRITTEN = (jnp.uint4, jnp.int2, jnp.uint2)
#: What only checkpoints have: those of old versions of Orbax, and any.
_OLD_SIGNS = ("_METADATA", "checkpoint", "*/_METADATA", "*/checkpoint")
_SIGNS = ("header", "state", "_CHECKPOINT_METADATA", *_OLD_SIGNS)


def absolute(path: str | Path) -> epath.Path:
    """The absolute path, as Orbax requires; ``gs://...`` is already one.

    Raises:
        InvalidCheckpointError: For what is not a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidCheckpointError(
            f"A checkpoint is in a directory, given as a string or a pathlib.Path; got {quote(path)}."
        )
    return epath.Path(path if "://" in str(path) else Path(path).absolute())


def items(state: Any, policy: PolicyLike) -> ocp.args.Composite:
    """The items of a checkpoint; a collective.

    Raises:
        InvalidCheckpointError: If Orbax or jmp_lite cannot store a leaf.
    """
    _check_for_orbax(state)
    header = ocp.args.JsonSave(describe(state, policy))
    return ocp.args.Composite(state=ocp.args.StandardSave(to_store(state)), header=header)


def _check_for_orbax(state: Any) -> None:
    """Raises for leaves that Orbax rejects, in some cases only after ``save`` has returned."""
    leaves = named_leaves(state)
    problems = [] if leaves else ["The state is empty"]
    problems += ["The state is a bare leaf"] if jax.tree_util.all_leaves([state]) else []
    for name, leaf in leaves.items():
        if np.size(leaf) == 0:
            problems.append(f"Leaf {name!r} has no elements")
        elif isinstance(leaf, complex) or getattr(leaf, "dtype", None) in _UNWRITTEN:
            problems.append(f"Leaf {name!r} is of a dtype that Orbax does not write")
    if problems:
        raise InvalidCheckpointError(
            f"{problems[0]}, and Orbax writes no such checkpoint. Put a bare leaf in a dict, leave out what is empty, "
            "or use to_bytes, which takes all of these."
        )


#: What the operating system says of files that are not there, or not what they should be.
_DAMAGE = {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}
#: What storage says of a failure that says nothing about the files.
_OBSTACLES = ("PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


def _is_damage(error: Exception) -> bool:
    """Whether an error comes from the data, rather than from memory, permissions or the network."""
    if isinstance(error, OSError):
        return error.errno in _DAMAGE
    is_device = isinstance(error, (MemoryError, jax.errors.JaxRuntimeError))
    return not is_device and not any(word in str(error) for word in _OBSTACLES)


def _together(path: epath.Path, act: Callable[[], T]) -> T:
    """Runs a function that may fail on a damaged checkpoint; if it fails in one process, all raise. A collective."""
    result: Any = None
    cause: Exception | None = None
    try:
        result = act()
    except Exception as error:  # noqa: BLE001 - whatever a parser of damaged files comes up with
        cause = error
    said = None if cause is None else described(cause)
    if obstacle := first_failure(None if cause is None or _is_damage(cause) else said):
        raise cause or OSError(f"The checkpoint in {path} cannot be read now. {obstacle}")
    if reason := first_failure(said):
        raise CorruptCheckpointError(f"The checkpoint in {path} is damaged. {reason}") from cause
    done: T = result
    return done


def _check_origin(path: epath.Path) -> None:
    """Raises unless ``save`` wrote the checkpoint, whole or damaged; a collective."""
    if remedy := first_failure(_if_absent(path)):
        raise CheckpointNotFoundError(f"There is no checkpoint in {path}. {remedy}")
    if first_failure("file" if path.is_file() else None):
        raise ForeignCheckpointError(
            f"{path} is a file, and save makes directories. What to_bytes returned goes to from_bytes, and what Flax "
            "wrote by itself to flax.serialization.from_bytes."
        )
    if first_failure("foreign" if _is_plain_orbax(path) else None):
        raise ForeignCheckpointError(
            f"{path} is a plain Orbax checkpoint: it has no header of jmp_lite. Read it with orbax.checkpoint, and "
            "write it again with jmp_lite.checkpoint to have its policy and its values checked."
        )


def _if_absent(path: epath.Path) -> str | None:
    """Returns what to do about a path that holds nothing of a checkpoint."""
    if path.is_file() or any(any(path.glob(sign)) for sign in _SIGNS):
        return None
    steps = [int(step.parent.name) for step in path.glob("*/header") if step.parent.name.isdecimal()]
    if steps:
        return f"It holds one for each step: restore {path / str(max(steps))}, or use CheckpointManager."
    return "Check the path, or start from the beginning."


def _is_plain_orbax(path: epath.Path) -> bool:
    """Whether Orbax wrote it for another program: it has no header, and no sign of a lost one."""
    if (path / "header").exists():
        return False
    try:
        return "header" not in json.loads((path / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    except (OSError, ValueError, TypeError, KeyError):  # as old versions of Orbax wrote it, whole or in parts
        return any(file.parent.name != "state" for sign in _OLD_SIGNS for file in path.glob(sign))


def _reader() -> ocp.Checkpointer:
    """Reads without waiting for other processes: if one fails, the others would wait forever."""
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"read_{this}"
    )
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone)


def _read_header(path: epath.Path) -> Header:
    with _reader() as reader:
        return check_header(reader.restore(path, args=ocp.args.Composite(header=ocp.args.JsonRestore())).header)


def _read_state(path: epath.Path, header: Header, template: Any) -> Any:
    leaves, treedef = jax.tree.flatten(template)
    targets = [target(header["leaves"][name], leaf) for name, leaf in zip(named_leaves(template), leaves, strict=True)]
    wanted = ocp.args.StandardRestore(jax.tree.unflatten(treedef, targets))
    with _reader() as reader:
        return reader.restore(path, args=ocp.args.Composite(state=wanted)).state


def _check_values(path: epath.Path, header: Header, names: list[str], state: Any) -> None:
    """Raises CorruptCheckpointError, in all processes, unless the arrays match their digests."""
    leaves = jax.tree.leaves(state)
    sums = _together(path, lambda: local_sums(leaves))
    found = zip(names, *combine(leaves, sums), strict=True)
    changed = [repr(name) for name, digest, alike in found if digest != header["leaves"][name]["digest"] or not alike]
    if changed:
        raise CorruptCheckpointError(
            f"The checkpoint in {path} is damaged. The values of {first_few(changed)} are not those that were saved."
        )


def save(path: str | Path, state: Any, *, policy: PolicyLike) -> None:
    """Writes a train state to a new directory with Orbax, atomically: complete or not at all.

    All processes of a job call it together.

    Args:
        path: Directory to create, such as ``run/step_1000``.
        state: Any pytree of arrays, sharded or not, typed PRNG keys, and Python numbers.
        policy: The policy it is trained under.

    Raises:
        CheckpointMismatchError: If copies of a leaf on several devices or processes differ.
        InvalidCheckpointError: If a leaf is not an array, key or number.
        ValueError: From Orbax, if the directory exists.

    Example:
        >>> import tempfile
        >>> from jmp_lite import checkpoint
        >>> directory = tempfile.mkdtemp()
        >>> checkpoint.save(f"{directory}/step_1", {"w": jnp.array([1.0, 2.0])}, policy="mixed_float16")
        >>> checkpoint.restore(f"{directory}/step_1", {"w": jnp.zeros(2)}, policy="mixed_float16")
        {'w': Array([1., 2.], dtype=float32)}
    """
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(absolute(path), args=items(state, policy))


def restore(path: str | Path, template: T, *, policy: PolicyLike, migrate: bool = False) -> T:
    """Restores a state that ``save`` wrote.

    All processes of a job call it together, and all of them restore or all of them raise.

    Args:
        path: The directory.
        template: A state of the same structure, shapes and dtypes, of arrays or ``jax.ShapeDtypeStruct``; restored
            arrays get its shardings, on any devices and processes.
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
        CheckpointNotFoundError: If the checkpoint does not exist.
        CorruptCheckpointError: If it is incomplete, cannot be read, or an array does not match its digest.
        ForeignCheckpointError: If it is a plain Orbax checkpoint, written without jmp_lite.

    Example:
        >>> from jmp_lite import checkpoint
        >>> checkpoint.restore("no_such_run", {"w": jnp.zeros(2)}, policy="full")
        Traceback (most recent call last):
        jmp_lite.errors.CheckpointNotFoundError: There is no checkpoint in ...no_such_run...
    """
    place = absolute(path)
    _check_origin(place)
    header = _together(place, lambda: _read_header(place))
    stand_in, put_back = agree(header, template, policy, migrate=migrate)
    state = _together(place, lambda: _read_state(place, header, stand_in))
    _check_values(place, header, list(named_leaves(stand_in)), state)
    restored: T = put_back(jax.tree.map(fill, stand_in, state))
    return restored
