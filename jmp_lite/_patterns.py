"""Patterns of paths: keys of a ``PolicyMap``, scopes of a ``Rule``, and what they nearly match."""

import functools
import itertools
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

from jmp_lite._messages import edits, nearest, quote
from jmp_lite.errors import InvalidPatternError

#: Patterns are searched for in paths of up to so many characters: their cost may grow with a power of the length.
LONGEST_PATH = 1000
#: Seconds of processor time that a costly pattern may take for the beginning of a path.
_PATIENCE = 0.05
#: A repeated group, or more than two repetitions: these may take time that doubles with every character. So may what
#: has blanks that stand for nothing.
_COSTLY = re.compile(r"\)[*+{]|\(\?[a-zA-Z]*x|(?:(?<!\()[*+?{].*?){3}", re.DOTALL)
_FLAGS = re.compile(r"\A(?:\(\?[aimsux]+\))+")
_SPECIAL = re.compile(r"[\\.^$*+?{}\[\]|()]")


@functools.lru_cache(maxsize=4096)
def compile_pattern(key: str) -> Callable[[str], Any]:
    """Compiles a key of a ``PolicyMap``, or a pattern of a ``Rule``, to a search for it as whole segments of a path."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a class such as "[[" may mean more in a later Python
            flags = re.compile(key).flags
            end_of_comment = "\n" if flags & re.VERBOSE else ""
            search = re.compile(rf"(?:\A|/)(?:{_FLAGS.sub('', key)}{end_of_comment})(?:/|\Z)", flags).search
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        remedy = (
            "Write flags first, as in '(?i)norm'" if "flags" in str(error) else "A name as it is is re.escape(name)"
        )
        raise InvalidPatternError(f"Pattern {quote(key)} is not a regular expression: {error}. {remedy}.") from None
    return functools.partial(_search_patiently, key, search) if _COSTLY.search(key) else search


def is_plain(key: str) -> bool:
    """Whether a key, as a pattern, matches itself alone."""
    return _SPECIAL.search(key) is None


def _search_patiently(key: str, search: Callable[[str], Any], path: str) -> Any:
    """Searches ever longer beginnings of a path first, and gives up where that takes ever more time."""
    for stop in range(8, len(path), 4):
        # Twice, because the first may have met a collection of garbage.
        if all(_seconds(search, f"{path[:stop]}\0") > _PATIENCE for _ in range(2)):
            raise InvalidPatternError(
                f"Pattern {quote(key)} would search path {quote(path)} for ever. Repeat nothing that is itself "
                "repeated."
            )
    return search(path)


def _seconds(search: Callable[[str], Any], text: str) -> float:
    start = time.thread_time()
    search(text)
    return time.thread_time() - start


def matches(key: str, path: str) -> bool:
    """Whether a path has segments that a key, as a pattern, stands for.

    Raises:
        InvalidPatternError: If the path is longer than ``LONGEST_PATH``, or the search would not end.
    """
    if is_plain(key):
        return f"/{key}/" in f"/{path}/"
    return compile_pattern(key)(searchable(path)) is not None


def searchable(path: str) -> str:
    """Returns a path that patterns may be searched for in."""
    if len(path) > LONGEST_PATH:
        raise InvalidPatternError(
            f"Patterns are searched for in paths of up to {LONGEST_PATH} characters, and {quote(path)} has "
            f"{len(path)}. Give its modules shorter names, or use keys without regular expressions."
        )
    return path


def nearest_modules(key: str, paths: Iterable[str], limit: int = LONGEST_PATH) -> list[str]:
    """Returns the modules on some paths whose last segments are at most so many edits away from a key, nearest first.

    Numbers count as one another, and dots as slashes. Of modules with the same last segments the first is returned.
    """
    wanted = _simplified(key)
    depth = wanted.count("/") + 1
    modules: dict[str, str] = {}
    for path in paths:
        for module in itertools.accumulate(path.split("/"), "{}/{}".format):
            modules.setdefault(without_numbers("/".join(module.split("/")[-depth:])), module)
    return [modules[name] for name in nearest(wanted, filter(None, modules), limit)]


def is_misspelt(key: str, module: str) -> bool:
    """Whether a key is the last segments of a module but for a typing error, one in five characters of a segment.

    A path that differs in a number does not count: the module with that number may be elsewhere.
    """
    if without_numbers(f"/{module}").endswith(without_numbers(f"/{key}")):
        return False
    wanted = _simplified(key).lower().split("/")
    given = without_numbers(module).lower().split("/")[-len(wanted) :]
    pairs = zip(wanted, given, strict=False)
    return len(wanted) == len(given) and all(edits(a, b, len(a)) <= (len(a) + 2) // 5 for a, b in pairs)


def is_scattered(key: str, segments: Collection[str]) -> bool:
    """Whether a key names several segments of a tree, which do not stand one within the other there."""
    named = key.replace(".", "/").split("/")
    return len(named) > 1 and all(name and name in segments for name in named)


def without_numbers(path: str) -> str:
    """Returns a path with the same number in place of every number."""
    return re.sub(r"\d+", "0", path)


def _simplified(pattern: str) -> str:
    numbered = without_numbers(re.sub(r"\\d[+*]?", "0", pattern))
    name = re.sub(r"\.\*|[\\^$*+?()\[\]{}|]", "", numbered).removeprefix("params/").replace(".", "/")
    return name.strip("/") or name
