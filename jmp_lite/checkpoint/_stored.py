"""Migration from a float32 run to an optimizer that stores parameters and state in fewer bytes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmp_lite._dtypes import FLOAT32, NARROW_FORMATS
from jmp_lite._tree import Path, path_string
from jmp_lite.errors import CheckpointMismatchError
from jmp_lite.optim._full_precision import halves
from jmp_lite.optim._stored import StoredState, decoded, encoded_at_first
from jmp_lite.scaling._in_state import is_stored


def sharded_like(wide: Any, leaf: Any) -> Any:
    """The shape and sharding of a leaf, in another dtype."""
    is_placed = isinstance(leaf, jax.ShapeDtypeStruct) or (isinstance(leaf, jax.Array) and leaf.committed)
    return jax.ShapeDtypeStruct(wide.shape, wide.dtype, sharding=leaf.sharding if is_placed else None)


def _in_float32(node: StoredState) -> Any:
    """The state of the optimizer without ``stored``."""
    wide = jax.eval_shape(lambda inner_state: decoded(inner_state, node.layout), node.inner_state)
    return jax.tree.map(sharded_like, wide, node.inner_state)


def without_stored(saved: Any, template: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Replaces the state of ``optim.stored`` in a template with the state of a float32 run.

    Args:
        saved: Names of the leaves of the checkpoint. If it has the state of ``stored``, nothing is replaced.
        template: Of the new run.

    Returns:
        The new template, and a function that converts a state restored into it to the structure of the given one.

    Raises:
        CheckpointMismatchError: If two leaves could be the parameter that has low bits.
    """
    nodes = jax.tree_util.tree_leaves_with_path(template, is_leaf=is_stored)
    found = {
        path: node
        for path, node in nodes
        if is_stored(node) and not any(f"{name}/".startswith(f"{path_string(path)}/inner_state/") for name in saved)
    }
    if not found:
        return template, lambda read: read
    low = {path: leaf for node in found.values() for path, leaf in jax.tree_util.tree_leaves_with_path(node.low)}
    leaves = {path: leaf for path, leaf in nodes if getattr(leaf, "dtype", None) in NARROW_FORMATS}
    owner = {own: _parameter(own, leaf, leaves) for own, leaf in low.items()}
    own_of = {param: own for own, param in owner.items()}

    def replace(path: Path, node: Any) -> Any:
        if path in found:
            return _in_float32(node)
        return sharded_like(jax.ShapeDtypeStruct(node.shape, FLOAT32), node) if path in own_of else node

    def put_back(read: Any) -> Any:
        numbers = dict(jax.tree_util.tree_leaves_with_path(read))
        given = {
            param: halves(jnp.asarray(numbers[param]), low[own], leaves[param].dtype) for param, own in own_of.items()
        }

        def put(path: Path, node: Any, value: Any) -> Any:
            if path in given:
                return given[path][0]
            if path not in found:
                return value
            kept = jax.tree_util.tree_map_with_path(lambda own, _: given[owner[own]][1], node.low)
            inner_state = encoded_at_first(value, node.layout)
            return StoredState(inner_state, kept, jnp.zeros((), jnp.uint32), node.layout)

        return jax.tree_util.tree_map_with_path(put, template, read, is_leaf=is_stored)

    return jax.tree_util.tree_map_with_path(replace, template, is_leaf=is_stored), put_back


def _parameter(own: Path, low: Any, leaves: dict[Path, Any]) -> Path:
    """The path of the 16-bit template leaf that these low bits belong to: its keys end the same way."""
    found = [path for path, leaf in leaves.items() if path[len(path) - len(own) :] == own and leaf.shape == low.shape]
    if len(found) != 1:
        names = ", ".join(repr(path_string(path)) for path in found) or "none"
        raise CheckpointMismatchError(
            f"Of the leaves of the template one must be the parameter {path_string(own)!r} whose low bits the optimizer"
            f" keeps, and there are: {names}. Restore into a template in float32, and convert with "
            "optim.from_full_precision(tx, params, opt_state=opt_state)."
        )
    return found[0]
