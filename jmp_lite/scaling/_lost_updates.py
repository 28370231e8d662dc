"""Parameters of 16 bits whose updates are lost in rounding."""

import itertools
import operator
from collections.abc import Callable, Collection
from typing import Any

import jax

from jmp_lite._compat import is_literal
from jmp_lite._messages import first_few, warn
from jmp_lite._tree import is_narrow, leaf_key, path_string
from jmp_lite.errors import LostUpdatesWarning


def warn_of_lost_updates(step: Callable[[Any], Any], params: Any, stored: Collection[str]) -> None:
    """Warns about parameters of 16 bits that an optimizer changes and only rounds to nearest.

    Args:
        step: Makes updates of gradients.
        params: Floating arrays, and ``None`` for other leaves.
        stored: Parameters, named by ``leaf_key``, that ``optim.stored`` takes care of.

    Warns:
        LostUpdatesWarning: If there are some.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    may_lose = [is_narrow(leaf) and leaf_key(path) not in stored for path, leaf in leaves]
    if not any(may_lose):
        return
    lose = map(operator.and_, may_lose, _changes(step, params, len(leaves)))
    narrow = [f"{path_string(path)!r} ({leaf.dtype})" for path, leaf in itertools.compress(leaves, lose)]
    if narrow:
        warn(
            f"Parameters of 16 bits, {first_few(narrow)}, lose all updates below half a unit in their last place. "
            "Write loss_scaled(jmp_lite.optim.master_weights(inner)), or optim.stochastic_rounding, or, if you mean "
            "this, optim.stored(inner, params='nearest').",
            LostUpdatesWarning,
        )


def _changes(step: Callable[[Any], Any], params: Any, count: int) -> list[bool]:
    """Whether the update of each parameter depends on gradients; that of a frozen one is zero whatever they are."""
    try:
        jaxpr = jax.make_jaxpr(step)(params).jaxpr
    except Exception:  # noqa: BLE001 (it takes more arguments, needs a mesh, or fails: its first step will say why)
        return [True] * count
    reached = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(not is_literal(v) and v in reached for v in eqn.invars):
            reached.update(eqn.outvars)
    found = [not is_literal(v) and v in reached for v in jaxpr.outvars]
    return found if len(found) == count else [True] * count
