"""Parts of a program with their own precision: decorators and context managers.

A region is a name scope. Name scopes survive ``jit``, loops, custom rules and differentiation, so a region covers its
backward pass too. It counts inside of the function that autocast takes; elsewhere, around a call of what autocast
returned too, it does nothing.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, overload

import jax

from jmp_lite._compat import NO_AUTOCAST

F = TypeVar("F", bound=Callable[..., Any])

#: What the name scopes of regions stand for.
MODES = {"jmp.full_precision": "full", "jmp.low_precision": "low", NO_AUTOCAST: "off"}


@overload
def full_precision() -> AbstractContextManager[None]: ...
@overload
def full_precision(fun: F) -> F: ...
def full_precision(fun: Any = None) -> Any:
    """Keeps part of a program in float32 under ``autocast``; its results stay float32 until the next matmul.

    It acts inside of the function that ``autocast`` takes, not around a call of the function that ``autocast`` returns.

    Args:
        fun: The function to decorate. Without it, a context manager is returned.

    Returns:
        The function, or a context manager.

    Example:
        >>> @jmp.full_precision
        ... def router(x, w):
        ...     return x @ w
        >>> x, w = jnp.ones((2, 4)), jnp.ones((4, 3))
        >>> print(jmp.explain(router, "mixed_bfloat16")(x, w)[0].out_dtypes)
        ('float32',)

    References:
        ``torch.autocast(enabled=False)`` with inputs cast to float32.
    """
    return _region("jmp.full_precision", fun)


@overload
def low_precision() -> AbstractContextManager[None]: ...
@overload
def low_precision(fun: F) -> F: ...
def low_precision(fun: Any = None) -> Any:
    """Keeps part of a program in the compute dtype under ``autocast``, sums and exponentials included.

    Linear algebra, random numbers and other operations that must stay exact still do. It acts inside of the function
    that ``autocast`` takes.

    Args:
        fun: The function to decorate. Without it, a context manager is returned.

    Returns:
        The function, or a context manager.

    Example:
        >>> def attention_weights(logits):
        ...     with jmp.low_precision():
        ...         return jax.nn.softmax(logits)
        >>> decisions = jmp.explain(attention_weights, "mixed_bfloat16")(jnp.ones((2, 4)))
        >>> {d.out_dtypes for d in decisions if d.primitive == "exp"}
        {('bfloat16',)}
    """
    return _region("jmp.low_precision", fun)


@overload
def no_autocast() -> AbstractContextManager[None]: ...
@overload
def no_autocast(fun: F) -> F: ...
def no_autocast(fun: Any = None) -> Any:
    """Leaves part of a program as written; its results count as untouched inputs to the rest.

    It acts inside of the function that ``autocast`` takes; around a call of the function that ``autocast`` returns,
    which has decided already, it does nothing.

    Args:
        fun: The function to decorate. Without it, a context manager is returned.

    Returns:
        The function, or a context manager.

    Example:
        >>> def loss(x, w):
        ...     with jmp.no_autocast():
        ...         table = x @ w
        ...     return table
        >>> print(jmp.explain(loss, "mixed_bfloat16")(jnp.ones((2, 4)), jnp.ones((4, 3)))[0].reason)
        in a no_autocast region

    References:
        ``torch.autocast(enabled=False)``.
    """
    return _region(NO_AUTOCAST, fun)


def _region(scope: str, fun: Any) -> Any:
    if fun is None:
        return _named(scope)

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(scope):
            return fun(*args, **kwargs)

    return wrapped


@contextmanager
def _named(scope: str) -> Iterator[None]:
    with jax.named_scope(scope):
        yield


def innermost(scope: str) -> str | None:
    """Returns the name scope of the innermost region that a scope lies in."""
    if "jmp." not in scope:
        return None
    return next((name for name in reversed(scope.split("/")) if name in MODES), None)
