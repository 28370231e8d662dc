"""A lock on a directory for the one job that writes to it; the kernel releases it when a job dies."""

import contextlib
import errno
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
#: What file systems that know no such locks answer.
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK}
#: What they answer for a file that has gone.
_GONE = {errno.ENOENT, errno.ESTALE}


class WriterLock:
    """The exclusive right to write to a directory, until ``release`` or the end of the process, however it ends.

    The lock is advisory and only among writers: readers ignore it. Object stores, file systems without ``flock`` and
    Windows do not support it; there every writer gets it.

    Args:
        directory: An existing directory, or an address such as ``gs://...``.

    Raises:
        CheckpointLockedError: If another process holds it.
        OSError: If the directory cannot be written to.
    """

    def __init__(self, directory: str) -> None:
        self._path = Path(directory) / NAME
        self._file = None if "://" in directory else _locked(self._path)
        if self._file is None:
            return
        if self._file.writable():
            self._file.truncate(0)
            self._file.write(f"Process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()
        _HELD.add(self)

    def release(self) -> None:
        """Releases the lock; does nothing if it was never held."""
        if self._file is not None and _is_at(self._path, self._file):
            with contextlib.suppress(PermissionError):  # another user's, in a directory such as /tmp
                self._path.unlink(missing_ok=True)
        self.let_go()

    def let_go(self) -> None:
        """Closes the file of this process; the lock stays as long as another has it open."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _locked(path: Path) -> IO[str] | None:
    """The file, open and locked; None without lock support."""
    if sys.platform == "win32":
        return None
    while True:
        file = _opened(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the latter on SMB
            file.seek(0)
            holder = file.read().strip() or "Another process"
            file.close()
            raise CheckpointLockedError(
                f"{holder} writes checkpoints to {path.parent} already. Wait until it ends or close it, or give this "
                "run its own directory; restoring needs no lock."
            ) from None
        except OSError as error:
            file.close()
            if error.errno in _NO_LOCKS:
                return None
            raise
        if _is_at(path, file):
            return file
        file.close()


def _opened(path: Path) -> IO[str]:
    try:
        return path.open("a+")
    except PermissionError:
        if not path.exists():
            raise
        return path.open()  # another user's: a lock takes no right to write


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether an open file is still the one at this path; its last holder may have removed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError as error:
        if error.errno in _GONE:
            return False
        raise


#: A forked process would share these, and hold them when its parent is dead.
_HELD: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _let_go() -> None:
    for lock in list(_HELD):
        lock.let_go()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_let_go)
