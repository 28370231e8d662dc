"""Functions that users give: anything else is refused, with what to give instead."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jmp_lite._messages import quote
from jmp_lite.errors import InvalidAnalysisError, InvalidFunctionError


def check_function(fun: Any, caller: str) -> None:
    """Raises for what cannot be called as a pure function.

    Args:
        fun: What the user gave.
        caller: Public name of the function that it was given to.
    """
    linen = sys.modules.get("flax.linen")
    if linen is not None and isinstance(fun, linen.Module):
        raise InvalidFunctionError(
            f"{caller} takes a function, got the Linen module {quote(type(fun).__name__)}. Give its method apply, such "
            "as model.apply, or a loss function that calls it."
        )
    if not callable(fun):
        advice = " Give its function apply." if callable(getattr(fun, "apply", None)) else ""
        if isinstance(fun, str) or hasattr(fun, "policy_for"):
            advice = f" The function comes first: write {caller}(fun, ...)(*args); {caller} is not a context manager."
        raise InvalidFunctionError(f"{caller} takes a function, got {quote(fun)}.{advice}")


def require_arrays(values: Any, caller: str) -> None:
    """Raises for a pytree with shapes in the place of arrays.

    Args:
        values: The pytree.
        caller: Public name of the function.
    """
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(values)):
        raise InvalidAnalysisError(
            f"{caller} computes with numbers, and a jax.ShapeDtypeStruct has none. Give it arrays instead."
        )


def require_numbers(values: Any, caller: str) -> None:
    """Raises for a pytree without numbers to read: shapes, or arrays inside ``jax.jit``, ``vmap`` or ``scan``.

    Args:
        values: The pytree.
        caller: Public name of the function.
    """
    require_arrays(values, caller)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values)):
        raise InvalidAnalysisError(
            f"{caller} reads numbers on the host, and was called inside jax.jit, vmap, scan or grad, where there are "
            "none. Call it outside, and give it the transformed function or what the transformed function returned."
        )


def read_on_host(values: Any, caller: str) -> Any:
    """Returns a pytree of arrays as NumPy arrays; raises as ``require_numbers`` does.

    Args:
        values: The pytree.
        caller: Public name of the function.
    """
    require_numbers(values, caller)
    return jax.device_get(values)


def refuse_modules(fun: Callable[..., Any], args: Any, kwargs: Any, caller: str, *, twin: bool = True) -> None:
    """Raises for an NNX module that is the function, is held by it, or is among its arguments.

    A pure function would lose what happens to it.

    Args:
        fun: The function.
        args: Its arguments.
        kwargs: The same, by keyword.
        caller: Public name of the function that calls it.
        twin: Whether ``jmp_lite.nnx`` has a function of this name, for modules.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    held: list[Any] = [args, kwargs]
    while isinstance(fun, functools.partial):
        held += [fun.args, fun.keywords]
        fun = fun.func
    held += [fun, getattr(fun, "__self__", None)]
    advice = (
        f"Use jmp_lite.nnx.{caller}, which keeps every change of a module."
        if twin
        else "Split it, graphdef, state = nnx.split(module), give the state, and merge both inside the function."
    )
    for leaf in jax.tree.leaves(held, is_leaf=lambda x: isinstance(x, nnx.Pytree)):
        if isinstance(leaf, nnx.Pytree):
            raise InvalidFunctionError(
                f"{caller} was called with the NNX module {type(leaf).__name__}, whose statistics and random counts "
                f"would stay as they are. {advice}"
            )


@contextlib.contextmanager
def without_captured_modules() -> Iterator[None]:
    """Around a call of a user's function: says what to do with an NNX module that it changes and does not take."""
    try:
        yield
    except getattr(sys.modules.get("flax.errors"), "TraceContextError", ()) as error:
        said = str(error).partition(" (http")[0]
        raise InvalidFunctionError(
            f"The function uses an NNX module that is not one of its arguments: {said}. Make the module an argument, "
            "and wrap the function in jmp_lite.nnx.autocast or jmp_lite.nnx.scaled_value_and_grad."
        ) from error
