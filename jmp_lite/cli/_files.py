"""Files and folders that a command writes when minutes have passed: what cannot be written is refused at once."""

from collections.abc import Callable
from pathlib import Path

from jmp_lite.errors import JmpLiteError


def check_file(path: str | None) -> None:
    """Raises if a file cannot be written.

    Raises:
        JmpLiteError: With the reason.
    """
    if path is not None:
        _check(path, lambda: Path(path).open("ab").close())


def check_folder(path: str | None) -> None:
    """Makes a folder, or raises if it cannot be made.

    Raises:
        JmpLiteError: With the reason.
    """
    if path is not None:
        _check(path, lambda: Path(path).mkdir(parents=True, exist_ok=True))


def _check(path: str, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise JmpLiteError(f"Cannot write {path!r}: {reason}. Name a file or folder that you may write.") from error
