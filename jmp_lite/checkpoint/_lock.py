"""A lock on a directory for the one job that writes to it; the kernel takes it from a job that died."""

import os
import socket
import sys
import weakref
from pathlib import Path
from typing import IO

from jmp_lite.errors import CheckpointLockedError

if sys.platform != "win32":
    import fcntl

#: In the directory, while somebody writes; it says who.
NAME = ".writer"


class WriterLock:
    """The right to write to a directory, until ``release`` or the end of the process, however it ends.

    It is advice among writers: readers do not ask for it. Object stores, file systems without ``flock`` and Windows
    know no such lock, and every writer gets it there.

    Args:
        directory: A directory that exists, or an address such as ``gs://...``.

    Raises:
        CheckpointLockedError: If somebody else has it.
    """

    def __init__(self, directory: str) -> None:
        self._path = Path(directory) / NAME
        self._file = None if "://" in directory else _locked(self._path)
        if self._file is None:
            return
        self._file.truncate(0)
        self._file.write(f"Process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()
        _let_go_in_children(self)

    def release(self) -> None:
        """Gives the lock back; nothing happens if it was never there."""
        if self._file is not None and _is_at(self._path, self._file):
            self._path.unlink(missing_ok=True)
        self.let_go()

    def let_go(self) -> None:
        """Closes the file of this process; the lock stays as long as another has it open."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _locked(path: Path) -> IO[str] | None:
    """The file, open and locked; None where there are no locks."""
    if sys.platform == "win32":
        return None
    while True:
        try:
            file = path.open("a+")
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "Another process"
            file.close()
            raise CheckpointLockedError(
                f"{holder} writes checkpoints to {path.parent} already. Wait until it ends or close it, or give this "
                "run a directory of its own; restoring needs no lock."
            ) from None
        except OSError:
            file.close()
            return None
        if _is_at(path, file):
            return file
        file.close()


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether an open file is the one at this path, rather than one that its last holder removed."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _let_go_in_children(lock: WriterLock) -> None:
    """A forked process would share the lock, and hold it when its parent is dead."""
    seen = weakref.ref(lock)

    def let_go() -> None:
        here = seen()
        if here is not None:
            here.let_go()

    os.register_at_fork(after_in_child=let_go)
