"""The launches of a program by a model of fusion, and the bytes and FLOPs of each.

Launches that read the same arrays and have the same number of elements become one, unless one depends on the other;
shared arrays are then read once. A launch holds at most two sums over columns. One that normalizes rows takes in no
maximum of everything, such as that for a scale of FP8.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jmp_lite._compat import scan_counts
from jmp_lite.analysis._estimation import _kinds
from jmp_lite.analysis._estimation._dataflow import Dataflow, Node
from jmp_lite.analysis._estimation._fusion import SMALL, Fusion
from jmp_lite.autocast._record import _flops

#: Sums over columns that one launch holds.
_COLUMNS = 2


class Launch(NamedTuple):
    """A launch of a program.

    Attributes:
        part: ``matmuls``, ``quantize`` (passes that find scales, round to 8 bits or copy for a matmul), ``casts`` (of
            whole arrays), ``loops`` (arrays that a scan stacks) or ``other``.
        bytes: Bytes read and written by one run.
        trips: How often it runs.
        flops: FLOPs of one run in matmuls and convolutions.
        dtypes: Operand dtypes of these.
        exact: Whether these run with high precision.
    """

    part: str
    bytes: float
    trips: int = 1
    flops: int = 0
    dtypes: tuple[str, ...] = ()
    exact: bool = False


def launches(flow: Dataflow, trips: int = 1) -> Iterator[Launch]:
    """Yields the launches of a program; a ``cond`` counts as its most expensive branch, a ``while`` loop once."""
    fusion = Fusion(flow)
    for at, node in enumerate(fusion.nodes):
        if node.bodies:
            yield from _of_programs(fusion, node, trips)
        elif _kinds.is_heavy(node):
            yield _alone(fusion, at, trips)
    yield from (group.launch(fusion, trips) for group in _grouped(fusion))


def _alone(fusion: Fusion, at: int, trips: int) -> Launch:
    """A matmul with its epilogue, or a kernel."""
    node, (read, written) = fusion.nodes[at], fusion.ends(at)
    moved = sum(fusion.arrays[array].bytes for array in (*read, *written))
    if not _kinds.is_product(node):
        return Launch("other", moved, trips)
    dtypes = tuple(str(v.aval.dtype) for v in node.eqn.invars[:2])
    exact = "HIGHEST" in str(node.eqn.params.get("precision"))
    return Launch("matmuls", moved, trips, _flops(node.eqn), dtypes, exact)


def _of_programs(fusion: Fusion, node: Node, trips: int) -> Iterator[Launch]:
    inside = [list(launches(body, trips * node.trips)) for body in node.bodies]
    if node.primitive == "cond":
        yield from max(inside, key=lambda branch: sum(launch.bytes * launch.trips for launch in branch))
        return
    for body in inside:
        yield from body
    if node.primitive == "scan":
        yield from _stacks(fusion, node, trips)


def _stacks(fusion: Fusion, node: Node, trips: int) -> Iterator[Launch]:
    """The arrays that a scan stacks: filled first; written where computed, or copied if an iteration uses them too."""
    _, carries = scan_counts(node.eqn.params)
    [body] = node.bodies
    stacked = node.results[carries:]
    for array in stacked:
        yield Launch("loops", fusion.arrays[array].bytes, trips)
    makers = {array: inner for inner in body.nodes for array in inner.results}
    used = {array for inner in body.nodes for array in inner.operands}
    for array in body.outputs[len(body.outputs) - len(stacked) :]:
        if array in used or array not in makers or not _kinds.is_pointwise(makers[array]):
            yield Launch("loops", 2 * body.arrays[array].bytes, trips * node.trips)


class _Group:
    """Launches that are fused into one.

    Attributes:
        space: Its number of elements, and whether it sums columns of few rows, which fuses with nothing else.
        reads: Number of elements that it reads of each array.
        writes: Number of elements that it writes of each array.
        nodes: The nodes that compute these.
        columns: Number of sums over columns.
    """

    def __init__(self, space: tuple[int, bool] | None) -> None:
        self.space = space
        self.reads: dict[int, float] = {}
        self.writes: dict[int, float] = {}
        self.nodes: list[Node] = []
        self.columns = 0

    def takes(self, space: tuple[int, bool], *, is_column: bool) -> bool:
        """Whether it has the same number of elements, and enough of them."""
        return self.space == space and 4 * space[0] >= SMALL and not (is_column and self.columns >= _COLUMNS)

    def normalizes(self, fusion: Fusion) -> bool:
        """Whether it computes with a sum or maximum of each row, as a softmax or a norm does: row by row."""
        makers = [fusion.nodes[fusion.maker[array]] for array in self.reads if array in fusion.maker]
        return any(_kinds.is_of_rows(node) for node in makers)

    def launch(self, fusion: Fusion, trips: int) -> Launch:
        return Launch(self.part(fusion), fusion.bytes(self.reads) + fusion.bytes(self.writes), trips)

    def part(self, fusion: Fusion) -> str:
        """Its purpose, by the nodes whose results it writes."""
        if any(node.primitive in _kinds.QUANTIZES for node in self.nodes):
            return "quantize"
        is_scale = [
            node.primitive == "reduce_max" and fusion.arrays[node.results[0]].elements == 1 for node in self.nodes
        ]
        if all(is_scale) and max(self.reads.values(), default=0) > 1:
            return "quantize"
        is_cast = [
            node.primitive == "convert_element_type" and set(node.operands) <= set(self.reads) for node in self.nodes
        ]
        return "casts" if all(is_cast) else "other"

    def follows(self, other: "_Group", of: dict[int, "_Group"]) -> bool:
        """Whether it depends on another."""
        waiting: list[_Group] = [self]
        known = set[int]()
        while waiting:
            group = waiting.pop()
            if group is other:
                return True
            if id(group) not in known:
                known.add(id(group))
                waiting += [of[array] for array in group.reads if array in of and of[array] is not group]
        return False


def _grouped(fusion: Fusion) -> Sequence[_Group]:
    """Fuses elementwise operations and sums into launches."""
    groups, of = list[_Group](), dict[int, _Group]()
    for at, node in enumerate(fusion.nodes):
        if at in fusion.absorbed:
            continue
        if _kinds.is_heavy(node):
            _note_heavy(fusion, at, of)
            continue
        roots = [array for array in node.results if array in fusion.held]
        if not roots:
            continue
        reads, space, rows = fusion.read(roots), _space(fusion, node, roots), _kinds.rows_of_columns(node)
        fitting = [] if space is None else [group for group in groups if group.takes(space, is_column=bool(rows))]
        if _kinds.is_whole(node):
            fitting = [group for group in fitting if not group.normalizes(fusion)]
        group = _partner(fusion, fitting, of, reads)
        if group is None:
            group = _Group(space)
            groups.append(group)
        for array, count in reads.items():
            if array not in group.writes:
                group.reads[array] = max(group.reads.get(array, 0), count)
        for array in roots:
            group.writes[array] = _kinds.updated(node) if _kinds.is_update(node) else fusion.arrays[array].elements
            of[array] = group
        group.nodes.append(node)
        group.columns += bool(rows)
    return groups


def _note_heavy(fusion: Fusion, at: int, of: dict[int, _Group]) -> None:
    """Records a group that fuses with nothing, so that its dependents are known."""
    read, written = fusion.ends(at)
    group = _Group(None)
    group.reads = dict.fromkeys(read, 1)
    of.update(dict.fromkeys(written, group))


def _space(fusion: Fusion, node: Node, roots: Sequence[int]) -> tuple[int, bool] | None:
    if _kinds.is_update(node):
        return None
    first = node.operands[0] if _kinds.is_reduction(node) and node.operands else roots[0]
    return fusion.arrays[first].elements, 0 < _kinds.rows_of_columns(node) <= _kinds.COLUMN


def _partner(fusion: Fusion, groups: Sequence[_Group], of: dict[int, _Group], reads: dict[int, float]) -> _Group | None:
    """Returns the group that shares most bytes with a launch and does not depend on the launch's other operands."""
    large = {array: count * fusion.arrays[array].width for array, count in reads.items()}
    large = {array: size for array, size in large.items() if size >= SMALL}
    makers = {id(of[array]): of[array] for array in reads if array in of}.values()
    best, most = None, 0.0
    for group in reversed(groups):
        shared = math.fsum(size for array, size in large.items() if array in group.reads or array in group.writes)
        adds_up = any(
            _kinds.is_reduction(fusion.nodes[fusion.maker[array]]) for array in reads if array in group.writes
        )
        if shared <= most or adds_up or any(maker is not group and maker.follows(group, of) for maker in makers):
            continue
        best, most = group, shared
    return best
