"""``module:function`` on a command line: a function without parameters that returns a call to look at."""

import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from jmp_lite._functions import check_function
from jmp_lite._messages import described, is_users
from jmp_lite.errors import JmpLiteError

T = TypeVar("T")
_HINT = "Write 'module:function', a function without parameters that returns (fun, *args)."


def with_call(verb: str, target: str, use: Callable[..., T]) -> T:
    """Returns what ``use(fun, *args)`` makes of the call that a target stands for.

    Args:
        verb: What is done to the function, such as ``"explain"``; for messages.
        target: ``module:function``, a function without parameters that returns ``(fun, *args)``; modules are looked for
            in the working directory as well.
        use: What is done.

    Returns:
        Its result.

    Raises:
        JmpLiteError: In one line, if there is no such function, or if anything goes wrong in it or in ``use``.

    Example:
        >>> from jmp_lite.cli._target import with_call
        >>> with_call("explain", "math", lambda fun: fun)
        Traceback (most recent call last):
        jmp_lite.errors.JmpLiteError: Cannot explain 'math': it names no function. Write 'module:function'...
    """
    module, _, name = target.partition(":")
    if not (module and name):
        raise JmpLiteError(f"Cannot {verb} {target!r}: it names no {'function' if module else 'module'}. {_HINT}")
    path_of_file = Path(module).with_suffix("") if module.endswith(".py") else Path(module)
    if path_of_file != Path(module) or len(path_of_file.parts) > 1:
        dotted = ".".join(part for part in path_of_file.parts if part.strip("./"))
        raise JmpLiteError(f"Cannot {verb} {target!r}: it names a file, not a module. Write {f'{dotted}:{name}'!r}.")
    path = list(sys.path)
    sys.path.insert(0, "")
    try:
        call: Any = getattr(importlib.import_module(module), name)
        fun, *args = call()
        check_function(fun, verb)
        return use(fun, *args)
    except (Exception, SystemExit) as error:
        raise JmpLiteError(f"Cannot {verb} {target!r}: {described(error)} {_advice(error, module)}") from error
    finally:
        sys.path[:] = path


def _advice(error: BaseException, module: str) -> str:
    """Says where the user's code raised, or what a target should be if it did not."""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return f"Modules are looked for in {Path.cwd()} and where Python finds those that are installed."
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if is_users(frame)]
    for frame, line in frames[-1:]:
        return f"Raised at {frame.f_code.co_filename}:{line}, in {frame.f_code.co_name}."
    return _HINT
