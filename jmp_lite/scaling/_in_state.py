"""Find or replace the loss scale in an optimizer state."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from jmp_lite._tree import path_string
from jmp_lite.errors import LossScaleNotFoundError
from jmp_lite.scaling._loss_scale import DynamicLossScale, LossScale, NoOpLossScale, StaticLossScale

T = TypeVar("T")


def is_loss_scale(node: Any) -> bool:
    """Whether a pytree node is one of the three loss scales."""
    return isinstance(node, (NoOpLossScale, StaticLossScale, DynamicLossScale))


def nodes(state: Any, is_node: Callable[[Any], bool]) -> list[tuple[str, Any]]:
    """Returns the path and the node of everything of one kind in a state."""
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_node)
    return [(path_string(path), node) for path, node in leaves if is_node(node)]


def is_stored(node: Any) -> bool:
    """Whether a node is the state of an optimizer that handles 16-bit parameters itself."""
    return isinstance(getattr(node, "params_in_float32", None), frozenset)


def stored_params(state: Any) -> frozenset[str]:
    """Returns the paths of the parameters that optimizers in a state already compute with in float32."""
    return frozenset().union(*(node.params_in_float32 for _, node in nodes(state, is_stored)))


def find_loss_scale(state: Any, name: str | None = None) -> tuple[str, LossScale]:
    """Finds the one loss scale in a state, however deeply transforms are nested around it.

    Args:
        state: A loss scale, an Optax state, a train state: any pytree.
        name: A path segment of the scale to find, required if there are several.

    Returns:
        Its path (``inner_states/a/loss_scale``; empty if ``state`` is the scale itself) and the scale.

    Raises:
        LossScaleNotFoundError: If there is none (of that name), or several; the message gives their paths.
    """
    scales = nodes(state, is_loss_scale)
    found = [(path, scale) for path, scale in scales if name is None or name in path.split("/")]
    if len(found) == 1:
        return found[0]
    paths = ", ".join(repr(path) for path, _ in found or scales)
    if found:
        raise LossScaleNotFoundError(
            f"{len(found)} loss scales in the state: {paths}. Pass name= with a segment that only one path has."
        )
    if not scales:
        _refuse_what_is_no_state(state)
    named = f" named {name!r} (there are: {paths})" if scales else ""
    raise LossScaleNotFoundError(
        f"No loss scale in the state{named}, which is of type {type(state).__name__}. Pass a loss scale, or the state "
        "of an optimizer wrapped in jmp_lite.loss_scaled."
    )


def _refuse_what_is_no_state(given: Any) -> None:
    """Raises for what users write in the place of a loss scale or a state."""
    advice = ""
    if given is None:
        advice = "missing. Give it with the function: scaled_value_and_grad(fun, loss_scale=opt_state)(params)"
    elif isinstance(given, type):
        advice = f"the class {given.__name__}. Call it: {given.__name__}()"
    elif callable(getattr(given, "init", None)):
        advice = "the optimizer. Its state has the scale: opt_state = tx.init(params)"
    elif isinstance(given, (int, float)):
        advice = f"a number. Write DynamicLossScale({given!r}), or StaticLossScale({given!r})"
    if advice:
        raise LossScaleNotFoundError(
            f"loss_scale= is {advice}. Pass a loss scale, or the state of an optimizer wrapped in jmp_lite.loss_scaled."
        )


def replace_loss_scale(state: T, at: str, loss_scale: LossScale) -> T:
    """Returns the state with the loss scale at a path replaced."""

    def replace(path: Any, node: Any) -> Any:
        return loss_scale if is_loss_scale(node) and path_string(path) == at else node

    replaced: T = jax.tree_util.tree_map_with_path(replace, state, is_leaf=is_loss_scale)
    return replaced
