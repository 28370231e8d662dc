"""``module:function`` on a command line: a function without parameters that returns a call to look at."""

import importlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from jmp_lite._functions import check_function
from jmp_lite._messages import described
from jmp_lite.errors import JmpLiteError

T = TypeVar("T")


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
    hint = "Write 'module:function', a function without parameters that returns (fun, *args)."
    if not (module and name):
        raise JmpLiteError(f"Cannot {verb} {target!r}: it names no {'function' if module else 'module'}. {hint}")
    path = list(sys.path)
    sys.path.insert(0, "")
    try:
        call: Any = getattr(importlib.import_module(module), name)
        fun, *args = call()
        check_function(fun, verb)
        return use(fun, *args)
    except (Exception, SystemExit) as error:
        raise JmpLiteError(f"Cannot {verb} {target!r}: {described(error)} {hint}") from error
    finally:
        sys.path[:] = path
