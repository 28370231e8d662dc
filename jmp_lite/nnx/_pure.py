"""A function of modules as a pure function of their state, as ``nnx.jit`` sees it."""

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jmp_lite._tree import combine, partition
from jmp_lite.errors import InvalidFunctionError
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
    """Calls a transformed function of modules and applies its changes to the given modules.

    Unchanged modules are not written, so they may come from outside a trace.

    Args:
        fn: A function of modules and any other arguments.
        transform: Maps a pure function of pytrees to the one to call instead.
        args: Positional arguments of ``fn``.
        kwargs: Keyword arguments of ``fn``.
        around: Makes a context from the modules, in which ``fn`` runs.

    Raises:
        InvalidFunctionError: If a variable lives in a mutable array.
    """
    nodes, others, layout = partition((args, kwargs), is_node, is_leaf)
    _check_variables(nodes)

    def pure(state: Any, others: list[Any]) -> tuple[Any, ...]:
        with nnx.merge_context(_CONTEXT, inner=True) as context:
            copies = context.merge(graphdef, state)
        call_args, call_kwargs = combine(copies, others, layout)
        before = _contents(copies)
        with around(copies):
            returned, *rest = partition(fn(*call_args, **call_kwargs), is_node, is_leaf)
        if not returned and _are_same(before, _contents(copies)):
            return *rest, None, None
        with nnx.split_context(_CONTEXT) as context:
            return *rest, *context.split((copies, returned))

    with nnx.update_context(_CONTEXT):
        with nnx.split_context(_CONTEXT) as context:
            graphdef, state = context.split(nodes)
        results, layout_of_results, new_graphdef, new_state = transform(pure)(state, others)
        if new_graphdef is None:
            return combine((), results, layout_of_results)
        with nnx.merge_context(_CONTEXT, inner=False) as context:
            _, returned = context.merge(new_graphdef, new_state)
    return combine(returned, results, layout_of_results)


def _check_variables(nodes: list[Any]) -> None:
    for path, node in nnx.iter_graph(nodes, graph=True):
        if isinstance(node, nnx.Variable) and node.ref:
            raise InvalidFunctionError(
                f"Variable {'/'.join(map(str, path[1:]))!r} lives in a mutable array, whose updates would be lost. "
                "Give nnx.with_vars(model, ref=False) in its place."
            )


def _contents(nodes: list[Any]) -> tuple[Any, list[Any]]:
    """Returns the structure of a graph, and the values that it holds now."""
    graphdef, state = nnx.split(nodes)
    return graphdef, jax.tree.leaves(state)


def _are_same(before: tuple[Any, list[Any]], after: tuple[Any, list[Any]]) -> bool:
    """Whether the contents are the same, none of the values a copy."""
    values = before[1], after[1]
    return len(values[0]) == len(values[1]) and all(map(operator.is_, *values)) and bool(before[0] == after[0])
