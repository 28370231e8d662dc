"""What autocast needs from NNX: values with an identity, and classes with wrapped methods."""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from jmp_lite._functions import check_function
from jmp_lite._tree import Opaque


def is_node(value: Any) -> bool:
    """Whether a value has an identity that must be kept: a module, a variable, ``nnx.Rngs``, an optimizer."""
    return isinstance(value, (nnx.Pytree, nnx.Variable))


def is_leaf(value: Any) -> bool:
    """Whether to treat a value as a leaf of a pytree."""
    return is_node(value) or isinstance(value, Opaque)


def objects(nodes: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields the mutable objects of a graph, each once, with their paths."""
    return ((path, node) for path, node in nnx.iter_graph(nodes, graph=True) if isinstance(node, nnx.Pytree))


def unbound(fn: Callable[..., Any], caller: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Splits a module, a bound method of one, or a partial function, into a function and its first arguments.

    Raises an error that names the caller if it is not a function.
    """
    check_function(fn, caller)
    if isinstance(fn, functools.partial):
        function, first = unbound(fn.func, caller)
        return functools.partial(function, **fn.keywords) if fn.keywords else function, (*first, *fn.args)
    if isinstance(fn, nnx.Module):
        return _call_module, (fn,)
    owner = getattr(fn, "__self__", None)
    return (fn.__func__, (owner,)) if isinstance(owner, nnx.Module) else (fn, ())  # type: ignore[attr-defined]


def _call_module(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def wraps(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``functools.wraps``, but for partial functions: Flax would take the keywords that these fix for missing ones."""
    return (lambda wrapped: wrapped) if isinstance(function, functools.partial) else functools.wraps(function)


def change_class(module: Any, derive: Callable[[tuple[str, ...], bool], type]) -> None:
    """Gives a module, if it has methods that others call, a class derived from its own.

    Args:
        module: Any object of a graph.
        derive: Makes the class, from the names of those methods and from whether the class is a pytree.
    """
    names = _public_methods(type(module))
    if isinstance(module, nnx.Module) and not isinstance(module, (nnx.List, nnx.Dict)) and names:
        is_pytree = not jax.tree_util.all_leaves([module])
        object.__setattr__(module, "__class__", derive(names, is_pytree))


def _public_methods(cls: type) -> tuple[str, ...]:
    """Returns the names of the methods that others call; of recurrent cells, and of containers, only ``__call__``."""
    return tuple(name for name in dir(cls) if _is_public_method(cls, name))


def _is_public_method(cls: type, name: str) -> bool:
    if name == "__call__":
        return True
    own = not name.startswith("_") and not hasattr(nnx.Module, name) and not issubclass(cls, nnx.RNNCellBase)
    return own and inspect.isfunction(inspect.getattr_static(cls, name))


def derived_class(cls: type, methods: dict[str, Any], *, is_pytree: bool) -> type:
    """Derives a class that looks like the original, with other methods."""
    namespace = {**methods, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    namespace["__doc__"] = cls.__doc__
    return types.new_class(cls.__name__, (cls,), {"pytree": is_pytree}, lambda body: body.update(namespace))
