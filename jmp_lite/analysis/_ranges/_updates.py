"""``lost_updates``: the share of the updates that rounding drops when they are added to parameters."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jmp_lite._dtypes import at_least_float32, is_floating
from jmp_lite._functions import read_on_host
from jmp_lite._messages import first_few
from jmp_lite._text import table
from jmp_lite._tree import path_string
from jmp_lite.analysis._finding import Finding, ordered
from jmp_lite.errors import InvalidStepError

#: Updates of which more than this share changes nothing are a finding.
_MUCH = 0.5


@functools.partial(jax.tree_util.register_dataclass, data_fields=["shares"], meta_fields=["paths"])
@dataclasses.dataclass(frozen=True)
class LostUpdates(Mapping[str, Any]):
    """Shares of updates that change nothing, by path of the parameter: a pytree, and a mapping.

    Attributes:
        paths: Paths of the parameters.
        shares: ``float32`` scalars: the share of nonzero updates that leave their parameter unchanged.

    Example:
        >>> params = {"w": jnp.ones(4, jnp.bfloat16)}
        >>> lost = jmp.analysis.lost_updates(params, {"w": jnp.array([1e-3, 1e-3, 1.0, 0.0])})
        >>> print(lost.to_dict()["lost"])
        {'w': 0.6666666865348816}
    """

    paths: tuple[str, ...]
    shares: list[jax.Array]

    def __getitem__(self, path: str) -> Any:
        return dict(zip(self.paths, self.shares, strict=True))[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    __hash__ = object.__hash__

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Parameters that lose most of their updates."""
        return ordered(
            Finding(
                "updates-lost", f"{share:.1%} of the updates{path and f' of {path}'} are rounded away.", "", path, share
            )
            for path, share in self._sorted()
            if share > _MUCH
        )

    def _sorted(self) -> list[tuple[str, float]]:
        shares = map(float, read_on_host(self.shares, "LostUpdates"))
        return sorted(zip(self.paths, shares, strict=True), key=lambda pair: -pair[1])

    def table(self) -> str:
        """Returns the shares as text, the largest first."""
        return table(("lost", "parameter"), [(f"{share:.1%}", path) for path, share in self._sorted()])

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers and names."""
        return {"lost": dict(self._sorted()), "findings": [finding._asdict() for finding in self.findings]}

    def __str__(self) -> str:
        return "\n".join([self.table(), *map(str, self.findings)])

    __repr__ = __str__


def lost_updates(params: Any, updates: Any) -> LostUpdates:
    """Counts the updates that rounding drops when ``optax.apply_updates`` adds them to parameters.

    Args:
        params: Parameters, in the dtypes in which they are stored.
        updates: The updates that the optimizer returned for them.

    Returns:
        ``LostUpdates``, also inside ``jax.jit``.

    Raises:
        InvalidStepError: If the trees differ in structure or shapes.

    Example:
        >>> params = {"w": jnp.ones(4, jnp.bfloat16), "b": jnp.zeros(4, jnp.bfloat16)}
        >>> lost = jmp.analysis.lost_updates(params, {"w": jnp.full(4, 1e-3), "b": jnp.full(4, 1e-3)})
        >>> print(lost["w"], lost["b"])
        1.0 0.0
        >>> print(lost.findings[0].kind)
        updates-lost

    References:
        Parameters in bfloat16 that stall: Zamirai et al., "Revisiting BFloat16 Training", arXiv:2010.06192.
    """
    layout: Any = jax.tree.structure(params)
    if layout != jax.tree.structure(updates):
        raise InvalidStepError(
            f"updates have another structure than params: {first_few(_paths(updates))} instead of "
            f"{first_few(_paths(params))}. Pass the updates that the optimizer returned for these parameters."
        )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), update in zip(leaves, jax.tree.leaves(updates), strict=True):
        if jnp.shape(leaf) != jnp.shape(update):
            raise InvalidStepError(
                f"The update of {path_string(path)!r} has shape {jnp.shape(update)}, and the parameter "
                f"{jnp.shape(leaf)}. Pass the updates that the optimizer returned for these parameters."
            )
    pairs = [
        (path_string(path), leaf, jnp.asarray(update))
        for (path, leaf), update in zip(leaves, jax.tree.leaves(updates), strict=True)
        if is_floating(leaf)
    ]
    return LostUpdates(tuple(path for path, _, _ in pairs), [_share(leaf, update) for _, leaf, update in pairs])


@jax.jit
def _share(param: jax.Array, update: jax.Array) -> jax.Array:
    wide = max(at_least_float32(param.dtype), at_least_float32(update.dtype), key=lambda dtype: dtype.itemsize)
    added = (param.astype(wide) + update.astype(wide)).astype(param.dtype)
    is_asked = update != 0
    lost = jnp.sum(is_asked & (added == param), dtype=jnp.float32)
    return lost / jnp.maximum(jnp.sum(is_asked, dtype=jnp.float32), 1)


def _paths(tree: Any) -> list[str]:
    return [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
