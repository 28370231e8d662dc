"""Agreement among the processes of a job: all see the same steps, and a failure in one fails all."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from jmp_lite._messages import described

#: Bytes of a message that travel to the other processes.
_LONGEST = 400


def without_mesh() -> contextlib.AbstractContextManager[Any]:
    """Hides the caller's mesh from programs that run on one device, or on their own mesh."""
    return jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ()))


def gather(array: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Stacks the arrays of all processes, ``[processes, ...]``; a collective."""
    if jax.process_count() == 1:
        return array[None]
    with without_mesh():
        return np.asarray(multihost_utils.process_allgather(array))


def of_first_process(number: int) -> int:
    """Broadcasts a number from process 0, which must lie in ``[-1, 2**64 - 1)``; a collective."""
    halves = np.array([(number + 1) >> 32, (number + 1) & 0xFFFFFFFF], np.uint32)
    high, low = (int(half) for half in gather(halves)[0])
    return (high << 32 | low) - 1


def in_first_process(act: Callable[[], None], otherwise: type[Exception]) -> None:
    """Runs a function in process 0; if it fails there, the others raise ``otherwise`` with its reason. A collective."""
    cause: Exception | None = None
    if jax.process_index() == 0:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - or the others would wait for ever
            cause = error
    if reason := first_failure(None if cause is None else described(cause)):
        raise cause or otherwise(reason)


def first_failure(reason: str | None) -> str | None:
    """Returns the reason of the first process that has one, None if all succeeded; a collective."""
    if jax.process_count() == 1:
        return reason
    text = (reason or "").encode()[:_LONGEST].ljust(_LONGEST, b"\0")
    for process, row in enumerate(gather(np.frombuffer(text, np.uint32))):
        if found := row.tobytes().rstrip(b"\0"):
            return f"{found.decode(errors='replace').rstrip('.')} (seen by process {process})."
    return None
