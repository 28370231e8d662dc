"""What autocast does to a user's function: ``explain``."""

from typing import Any

import jax

from jmp_lite._policy import get_policy
from jmp_lite.autocast import explain as explain_autocast
from jmp_lite.cli._target import with_call


def explain(target: str, spec: str, *, grad: bool) -> str:
    """Says what autocast does to every equation of a call.

    Args:
        target: As for ``with_call``.
        spec: A policy string.
        grad: Whether to explain the gradient with respect to the first argument.

    Raises:
        UnknownDtypeError: If there is no such policy.
        JmpLiteError: If there is no such function, or anything goes wrong in it.
    """
    policy = get_policy(spec)

    def explained(fun: Any, *args: Any) -> str:
        return str(explain_autocast(jax.grad(fun) if grad else fun, policy)(*args))

    return with_call("explain", target, explained)
