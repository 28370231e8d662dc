"""What a user wrote, as messages quote it, and the name that comes nearest to it."""

import contextlib
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jmp_lite._compat import FRAMEWORKS
from jmp_lite.errors import JmpLiteError

#: How many of several things a message names.
_NAMED = 3
#: Packages whose lines are none that users can change.
_NOT_THE_USERS = frozenset({"jmp_lite", "jax", "contextlib", "functools", "importlib", *FRAMEWORKS})


class _Type(str):
    __slots__ = ()
    __repr__ = str.__str__


def type_of(leaf: Any) -> str:
    """Writes an array, or a shape in its place, as ``float32[2, 3]``."""
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else quote(leaf)


def quote(value: Any, limit: int = 200) -> str:
    """Returns what a user gave on one line, arrays as ``float32[2, 3]``, cut where it is long."""
    text = ""
    with contextlib.suppress(Exception):  # of trees that cannot be flattened, or written without their arrays
        text = repr(jax.tree.map(lambda x: _Type(type_of(x)) if isinstance(x, (jax.Array, np.ndarray)) else x, value))
    text = re.sub(r"\n\s*", " ", text or repr(value))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def described(error: BaseException) -> str:
    """Returns what an exception says, as one sentence on one line."""
    said = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, JmpLiteError):
        return f"{said}."
    return f"{': '.join(filter(None, [type(error).__name__, said[:300]]))}."


@contextlib.contextmanager
def naming_extra(chapter: str, extra: str) -> Iterator[None]:
    """Around the imports of a chapter: where a package is missing, the error names the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("jmp_lite"):
            raise
        package = (error.name or "a package").partition(".")[0]
        raise ModuleNotFoundError(
            f"{chapter} needs {package}, which is not installed. Run pip install 'jmp-lite[{extra}]'.", name=error.name
        ) from error


def nearest(name: str, names: Iterable[str], limit: int) -> list[str]:
    """Returns the names that are at most so many edits away from a mistyped one, nearest first; case is ignored."""
    rated = [(edits(name.lower(), known.lower(), limit), known) for known in dict.fromkeys(names)]
    return [known for distance, known in sorted(rated, key=lambda pair: pair[0]) if distance <= limit]


def edits(first: str, second: str, limit: int) -> int:
    """Counts the characters to insert, delete, replace or swap with a neighbor to turn one text into another.

    Args:
        first: A text.
        second: Another one.
        limit: Where to stop counting: whatever is more is returned as one more.

    References:
        Optimal string alignment, a restricted form of the distance of Damerau (Communications of the ACM 7, 1964).
    """
    if abs(len(first) - len(second)) > limit:
        return limit + 1
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, a in enumerate(first):
        above, row = row, [i + 1]
        for j, b in enumerate(second):
            row.append(min(above[j] + (a != b), above[j + 1] + 1, row[j] + 1))
            if i and j and a == second[j - 1] and b == first[i - 1]:
                row[-1] = min(row[-1], before[j - 1] + 1)
        if min(row) > limit:
            return limit + 1
        before = above
    return min(row[-1], limit + 1)


def first_few(items: list[str]) -> str:
    """Names some, and counts the others."""
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return ", ".join(items[:_NAMED]) + more


def is_users(frame: Any) -> bool:
    """Whether a frame belongs to the user's code."""
    return str(frame.f_globals.get("__name__")).partition(".")[0] not in _NOT_THE_USERS


def users_frame() -> Any:
    """Returns the innermost frame of the user's code; the outermost of all if none is the user's."""
    frame: Any = inspect.currentframe()
    while frame.f_back is not None and not is_users(frame):
        frame = frame.f_back
    return frame


def warn(text: str, category: type[Warning]) -> None:
    """Warns at the line where the user's code called something that led here."""
    frame = users_frame()
    names, place = frame.f_globals, (frame.f_code.co_filename, frame.f_lineno)
    known = names.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, category, *place, names.get("__name__"), known)
