"""The parts of a program: tables of its matmuls, kernels, casts and collectives."""

import collections
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from jmp_lite.analysis._audit._flow import Flow, Node
from jmp_lite.autocast._ops import PRODUCTS, is_kernel
from jmp_lite.autocast._record import _flops

#: Primitives that send arrays to other devices as they are, so that a cast before loses nothing that one after keeps.
MOVING = frozenset({"ppermute", "all_to_all", "all_gather", "all_gather_invariant", "all_gather_reduced"})
#: Those that send arrays between devices.
COLLECTIVES = MOVING | {
    *("psum", "psum2", "psum_invariant", "pmax", "pmin", "reduce_scatter", "unreduced_psum"),
    "unreduced_reduce_scatter",
}


class MatmulRow(NamedTuple):
    """Identical matmuls or convolutions."""

    kind: str
    """``dot`` or ``conv``."""
    operands: tuple[str, ...]
    """Dtypes of the operands."""
    accumulation: str
    """The dtype that the sum is asked for in (``preferred_element_type``); empty if the compiler chooses."""
    result: str
    """The dtype in which the result is used."""
    is_backward: bool
    """Whether they belong to a backward pass."""
    times: int
    """How many there are; one in a scan counts as often as it runs."""
    flop_share: float
    """Their share of the FLOPs of all matmuls."""


class KernelRow(NamedTuple):
    """Identical kernels."""

    primitive: str
    operands: tuple[str, ...]
    """Dtypes of the operands."""
    times: int
    """How often they run."""


class CastRow(NamedTuple):
    """Casts between two dtypes."""

    source: str
    result: str
    times: int
    """How often they run."""
    bytes: int
    """Of their results."""


class CollectiveRow(NamedTuple):
    """Identical collectives."""

    primitive: str
    dtype: str
    times: int
    """How often they run."""
    bytes: int
    """Of their operands."""


class Census(NamedTuple):
    """The tables of a program."""

    matmuls: tuple[MatmulRow, ...]
    """The largest first."""
    kernels: tuple[KernelRow, ...]
    casts: tuple[CastRow, ...]
    collectives: tuple[CollectiveRow, ...]


def products_of(flow: Flow) -> list[tuple[Node, int]]:
    """Returns the matmuls and convolutions, each with its FLOPs, as often as it runs."""
    return [(node, _flops(node.eqn) * node.site.trips) for node in flow.nodes if node.name in PRODUCTS]


def kernels_of(flow: Flow) -> list[Node]:
    """Returns kernels and foreign calls."""
    return [node for node in flow.nodes if is_kernel(node.name)]


def collectives_of(flow: Flow) -> list[Node]:
    """Returns the collectives, which send arrays between devices."""
    return [node for node in flow.nodes if node.name in COLLECTIVES]


def operand_dtypes(node: Node) -> tuple[str, ...]:
    """Returns the dtypes of the multiplied operands, without group sizes and scales."""
    return node.site.in_dtypes[:2] if node.name in PRODUCTS else node.site.in_dtypes


def width(dtype: str) -> int:
    """Returns the bytes of a floating dtype; 0 for one that is not floating."""
    return jnp.dtype(dtype).itemsize if "float" in dtype and dtype != "float0" else 0


def widest(node: Node) -> int:
    """Returns the bytes of the widest floating operand."""
    return max(map(width, operand_dtypes(node)), default=0)


def is_low(node: Node) -> bool:
    """Whether a matmul has floating operands, of 16 bits or fewer."""
    return 0 < widest(node) <= 2


def census(flow: Flow) -> Census:
    """Counts the parts of a program."""
    products = collections.defaultdict[tuple[Any, ...], list[int]](lambda: [0, 0])
    kernels, casts, collectives = collections.Counter[Any](), *(_tally() for _ in range(2))
    for node, flops in products_of(flow):
        row = products[_product_key(flow, node)]
        row[0] += node.site.trips
        row[1] += flops
    for node in kernels_of(flow):
        kernels[node.name, node.site.in_dtypes] += node.site.trips
    for node in flow.nodes:
        if node.name == "convert_element_type" and node.site.in_dtypes != node.site.out_dtypes:
            _count(casts[node.site.in_dtypes[0], node.site.out_dtypes[0]], flow, node, [*node.results])
    for node in collectives_of(flow):
        for operand in node.operands:
            _count(collectives[node.name, flow.dtype(operand)], flow, node, [operand])
    total = max(sum(flops for _, flops in products.values()), 1)
    rows = [(key, count, flops / total) for key, (count, flops) in products.items()]
    return Census(
        tuple(MatmulRow._make((*key, count, share)) for key, count, share in sorted(rows, key=lambda row: -row[2])),
        tuple(KernelRow._make((*key, count)) for key, count in kernels.items()),
        tuple(CastRow(*key, *figures) for key, figures in _largest_first(casts)),
        tuple(CollectiveRow(*key, *figures) for key, figures in _largest_first(collectives)),
    )


def _product_key(flow: Flow, node: Node) -> tuple[Any, ...]:
    preferred = node.eqn.params.get("preferred_element_type")
    users = {user.site.out_dtypes[0] for user, _ in flow.consumers(node.results[0]) if user.name == _CAST}
    is_cast = len(users) == 1 and all(user.name == _CAST for user, _ in flow.consumers(node.results[0]))
    result = users.pop() if is_cast else node.site.out_dtypes[0]
    kind = "conv" if node.name.startswith("conv") else "dot"
    accumulation = "" if preferred is None else str(jnp.dtype(preferred))
    return kind, operand_dtypes(node), accumulation, result, node.site.is_backward


_CAST = "convert_element_type"


def _tally() -> dict[Any, list[int]]:
    return collections.defaultdict(lambda: [0, 0])


def _count(row: list[int], flow: Flow, node: Node, values: list[int]) -> None:
    row[0] += node.site.trips
    row[1] += node.site.trips * sum(bytes_of(flow, value) for value in values)


def bytes_of(flow: Flow, value: int) -> int:
    """Returns the bytes of an array."""
    itemsize = getattr(getattr(flow.avals[value], "dtype", None), "itemsize", 0)
    return flow.size(value) * int(itemsize)


def _largest_first(table: dict[Any, list[int]]) -> Iterator[tuple[Any, list[int]]]:
    return iter(sorted(table.items(), key=lambda item: -item[1][1]))
