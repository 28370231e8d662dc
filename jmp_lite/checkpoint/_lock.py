"""A lock on a directory for the one job that writes to it; the kernel takes it from a job that died."""

import os
import socket
import sys
import weakref
from pathlib import Path
from typing import IO, Any

from jmp_lite.errors import CheckpointLockedError

if sys.platform != "win32":
    import fcntl

#: In the directory; it stays there, locked or not, and names the last writer.
NAME = ".writer"


class WriterLock:
    """The right to write to a directory, until ``release`` or the end of the process, however it ends.

    It is advice among writers: readers do not ask for it, and none is needed to restore. Object stores, file systems
    without ``flock`` and Windows know no such lock, and every writer gets it there.

    Args:
        directory: A directory that exists, or an address such as ``gs://...``.

    Raises:
        CheckpointLockedError: If somebody else has it.
    """

    def __init__(self, directory: str) -> None:
        self._file: IO[str] | None = None
        if "://" in directory or sys.platform == "win32":
            return
        file = (Path(directory) / NAME).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "Another process"
            file.close()
            raise CheckpointLockedError(
                f"{holder} writes checkpoints to {directory} already. Wait until it ends or close it, or give this run "
                "a directory of its own; to read, restore without saving."
            ) from None
        except OSError:
            file.close()
            return
        file.truncate(0)
        file.write(f"Process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file
        _close_in_children(self)

    def release(self) -> None:
        """Gives the lock back; nothing happens if it was never there."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _close_in_children(lock: WriterLock) -> None:
    """A forked process would share the lock, and hold it when its parent is dead."""
    seen = weakref.ref(lock)

    def close(*_: Any) -> None:
        here = seen()
        if here is not None:
            here.release()

    os.register_at_fork(after_in_child=close)
