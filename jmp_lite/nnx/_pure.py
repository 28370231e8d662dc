"""A function of modules as a pure function of their state, as ``nnx.jit`` sees it."""

import contextlib
from collections.abc import Callable
from typing import Any

from flax import nnx

from jmp_lite._tree import combine, partition
from jmp_lite.nnx._modules import is_leaf, is_node

_CONTEXT = "jmp_lite.nnx.call_pure"


def call_pure(
    fn: Callable[..., Any],
    transform: Callable[[Callable[..., Any]], Callable[..., Any]],
    args: Any,
    kwargs: Any,
    *,
    around: Callable[[list[Any]], contextlib.AbstractContextManager[Any]],
) -> Any:
    """Calls a transformed function of modules; what the function does to the modules is done to those given.

    Args:
        fn: A function of modules and any other arguments.
        transform: Takes a pure function of pytrees, and returns one that is called in its place.
        args: Positional arguments of ``fn``.
        kwargs: Keyword arguments of ``fn``.
        around: Makes a context, from the modules that ``fn`` is called with, for it to run in.
    """
    nodes, others, layout = partition((args, kwargs), is_node, is_leaf)

    def pure(state: Any, others: list[Any]) -> tuple[Any, ...]:
        with nnx.merge_context(_CONTEXT, inner=True) as context:
            copies = context.merge(graphdef, state)
        call_args, call_kwargs = combine(copies, others, layout)
        with around(copies):
            returned, *rest = partition(fn(*call_args, **call_kwargs), is_node, is_leaf)
        with nnx.split_context(_CONTEXT) as context:
            return *rest, *context.split((copies, returned))

    with nnx.update_context(_CONTEXT):
        with nnx.split_context(_CONTEXT) as context:
            graphdef, state = context.split(nodes)
        results, layout_of_results, new_graphdef, new_state = transform(pure)(state, others)
        with nnx.merge_context(_CONTEXT, inner=False) as context:
            _, returned = context.merge(new_graphdef, new_state)
    return combine(returned, results, layout_of_results)
