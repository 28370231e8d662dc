"""Matmuls grouped by name scope, as far as rules can tell them apart."""

from collections.abc import Mapping, Sequence

from jmp_lite.analysis._sites import Site, Step, flat
from jmp_lite.autocast._ops import PRODUCTS
from jmp_lite.autocast._record import _flops


def groups_of(steps: Sequence[Step], depth: int | None = None) -> tuple[str, ...]:
    """Returns the scopes of the matmuls in a forward pass, in program order.

    Args:
        steps: Steps of a program.
        depth: How many scopes, from the outermost, to group by; ``None`` for all.
    """
    sites = [step.site for step in flat(steps) if step.site.primitive in PRODUCTS and not step.site.is_backward]
    return tuple(dict.fromkeys(_cut(site.scope, depth) for site in sites))


def group_of(site: Site, groups: Sequence[str]) -> str | None:
    """Returns the group of a matmul; a backward matmul may also have scopes around the group."""
    inside = [group for group in groups if f"/{group}/" in f"/{site.scope}/" or not group]
    return max(inside, key=len, default=None)


def flop_shares(steps: Sequence[Step], groups: Sequence[str]) -> Mapping[str, float]:
    """Returns each group's share of the FLOPs of all matmuls."""
    work = dict.fromkeys(groups, 0)
    for step in flat(steps):
        group = group_of(step.site, groups) if step.site.primitive in PRODUCTS else None
        if group is not None:
            work[group] += _flops(step.eqn) * step.site.trips
    total = max(sum(work.values()), 1)
    return {group: flops / total for group, flops in work.items()}


def _cut(scope: str, depth: int | None) -> str:
    return scope if depth is None else "/".join(scope.split("/")[:depth])
