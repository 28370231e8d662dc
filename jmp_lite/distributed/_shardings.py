"""Reads shardings: which mesh axes an array is split over, and what JAX knows about them at this point of a trace."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jmp_lite._compat import varying_axes
from jmp_lite.errors import InvalidShardingError


def as_tuple(axis_name: Any) -> tuple[Any, ...]:
    """Returns one name of a mapped axis, or several, as a tuple."""
    return tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)


def per_leaf(shardings: Any, tree: Any) -> Any:
    """Repeats a pytree of shardings, or a prefix of one, for every leaf of a tree.

    Raises:
        InvalidShardingError: If it does not fit, or something in it is not a sharding.
    """
    known = jax.tree.map(_checked, shardings, is_leaf=lambda x: x is None)
    try:
        return jax.tree.broadcast(known, tree)
    except ValueError as error:
        raise InvalidShardingError(
            f"The shardings {shardings!r} are not a prefix of the tree: {error} Give one sharding for all, or a tree "
            "of the same structure."
        ) from None


def _checked(sharding: Any) -> Any:
    if sharding is None or (isinstance(sharding, Sharding) and sharding.is_fully_replicated):
        return PartitionSpec()
    if not isinstance(sharding, (NamedSharding, PartitionSpec)):
        raise InvalidShardingError(
            f"A sharding must be a NamedSharding, a PartitionSpec or None, got {sharding!r}. Write for example "
            "jax.P('data')."
        )
    return sharding


def check_axes(axes: Sequence[Any], stored: Any) -> None:
    """Raises if an axis belongs neither to the mesh that is set nor to a mesh among some shardings."""
    meshes = [leaf.mesh for leaf in jax.tree.leaves(stored) if isinstance(leaf, NamedSharding)]
    known = {name for mesh in (jax.sharding.get_abstract_mesh(), *meshes) for name in mesh.axis_names}
    for axis in axes:
        if axis not in known:
            names = f"Known are {sorted(known, key=str)}." if known else "No mesh is set."
            raise InvalidShardingError(
                f"{axis!r} is not an axis of a mesh here. {names} Pass a NamedSharding, or call under jax.set_mesh."
            )


def spec_of(sharding: Any) -> PartitionSpec:
    """Returns which axes the dimensions of an array are split over."""
    return sharding.spec if isinstance(sharding, NamedSharding) else sharding


def axes_of(entries: Iterable[Any]) -> list[Any]:
    """Returns the mesh axes that a ``PartitionSpec`` names, or some of its entries, in order."""
    return [axis for entry in entries if entry is not None for axis in as_tuple(entry)]


def without(sharding: Any, axes: Sequence[Any]) -> Any:
    """Returns a sharding that does not split over some axes."""
    kept = (tuple(axis for axis in axes_of((entry,)) if axis not in axes) for entry in spec_of(sharding))
    spec = PartitionSpec(*(entry or None for entry in kept))
    return NamedSharding(sharding.mesh, spec) if isinstance(sharding, NamedSharding) else spec


def manual(axes: Iterable[Any]) -> list[Any]:
    """Returns those axes over which the program is written for one device, as in ``shard_map`` and ``pmap``."""
    mesh = jax.sharding.get_abstract_mesh()
    return [axis for axis in axes if axis in mesh.manual_axes]


def tracked(axes: Iterable[Any]) -> frozenset[Any]:
    """Returns those axes along which JAX knows which arrays vary: the manual ones, under ``check_vma``."""
    return frozenset(axis for axis in manual(axes) if varying_axes(lax.axis_index(axis)))
