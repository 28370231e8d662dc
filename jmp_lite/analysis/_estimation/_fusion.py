"""The arrays of a program that are in memory, by a simple model of what XLA fuses into one launch.

Elementwise results are computed in their consumers. So only these are in memory: inputs and outputs of the
program; operands and results of matmuls, loops and kernels; sums and maxima; arrays written in place; and arrays that
are cheaper to write once than to recompute for every launch that uses them. Sums and matmuls with small arrays that
follow a matmul are part of it.

References:
    OpenXLA, "XLA:GPU Architecture Overview" (priority fusion, multi-output fusion, GEMM rewriting).
"""

import collections
import heapq
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from jmp_lite.analysis._estimation import _kinds
from jmp_lite.analysis._estimation._dataflow import Dataflow, Node
from jmp_lite.analysis._estimation._layouts import with_layouts

#: Arrays of fewer bytes are nobody's concern.
SMALL = 4096


class Epilogue(NamedTuple):
    """The operations on the result of a matmul before it is written.

    Attributes:
        result: The array that it writes.
        added: Arrays that it adds.
        members: Numbers of the nodes.
    """

    result: int
    added: tuple[int, ...]
    members: tuple[int, ...]


class Fusion:
    """A program and its arrays in memory.

    Attributes:
        flow: The program, with the copies that matmuls need.
        arrays: Its arrays.
        nodes: Its nodes.
        maker: For each array, the number of the node that makes it.
        held: The arrays in memory.
        epilogues: Epilogues by the number of the matmul.
        absorbed: Numbers of the nodes that are part of a matmul.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.flow = with_layouts(flow)
        self.arrays, self.nodes = self.flow.arrays, self.flow.nodes
        self.maker = {array: at for at, node in enumerate(self.nodes) for array in node.results}
        users = collections.defaultdict[int, list[int]](list)
        for at, node in enumerate(self.nodes):
            for array in dict.fromkeys(node.operands):
                users[array].append(at)
        self.users: Mapping[int, list[int]] = users
        self.held = {*self.flow.inputs, *self.flow.outputs}
        for node in self.nodes:
            self.held.update(self._held_for(node))
        self.epilogues = {at: found for at in range(len(self.nodes)) if (found := self._epilogue(at))}
        self.absorbed = {member for epilogue in self.epilogues.values() for member in epilogue.members}
        for at, epilogue in self.epilogues.items():
            self.held.discard(self.nodes[at].results[0])
            self.held |= {epilogue.result, *map(self.seen, epilogue.added)}
        for at in range(len(self.nodes)):
            self.held.update(array for array in self.nodes[at].results if self._is_better_held(at, array))

    def seen(self, array: int) -> int:
        """Returns the array in memory if a matmul takes its transpose."""
        while array in self.maker and _kinds.is_view(self.nodes[self.maker[array]]):
            array = self.nodes[self.maker[array]].operands[0]
        return array

    def ends(self, at: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the arrays that a matmul, a loop or a kernel reads, each once, and the arrays that it writes."""
        epilogue = self.epilogues.get(at, Epilogue(0, (), ()))
        read = map(self.seen, (*self.nodes[at].operands, *epilogue.added))
        return tuple(dict.fromkeys(read)), (epilogue.result,) if epilogue.members else self.nodes[at].results

    def bytes(self, elements: Mapping[int, float]) -> float:
        """Returns the bytes of these numbers of elements of arrays."""
        return sum(self.arrays[array].width * count for array, count in elements.items())

    def read(self, roots: Iterable[int]) -> dict[int, float]:
        """Returns how many elements of each array in memory are read to compute some: only slices and rows."""
        wanted = collections.defaultdict[int, float](float)
        found = collections.defaultdict[int, float](float)
        waiting: list[int] = []

        def ask(node: Node) -> None:
            amount = sum(min(wanted[array], self.arrays[array].elements) for array in node.results)
            for array, count in _needed(node, amount):
                counter = found if array in self.held or array not in self.maker else wanted
                if counter is wanted and not wanted[array]:
                    heapq.heappush(waiting, -self.maker[array])
                counter[array] += min(count, self.arrays[array].elements)

        for array in roots:
            wanted[array] += self.arrays[array].elements
        for at in dict.fromkeys(self.maker[array] for array in roots):
            ask(self.nodes[at])
        last = None
        while waiting:
            at = -heapq.heappop(waiting)
            if at != last:
                ask(self.nodes[at])
            last = at
        return {array: min(count, self.arrays[array].elements) for array, count in found.items()}

    def _held_for(self, node: Node) -> Iterator[int]:
        """Yields the arrays that are in memory because of a node."""
        if _kinds.is_heavy(node):
            yield from node.results
            yield from map(self.seen, node.operands)
        elif _kinds.is_reduction(node):
            yield from () if _kinds.is_row_maximum(node) else node.results
        elif _kinds.is_update(node):
            yield from (*node.results, node.operands[0])
        elif node.primitive == "pad":
            yield from (array for array in node.operands if self._is_moved(array))

    def _epilogue(self, at: int) -> Epilogue | None:
        """Follows the result of a matmul while its only use can be fused into it."""
        if not _kinds.is_product(self.nodes[at]):
            return None
        array, added, members = self.nodes[at].results[0], list[int](), list[int]()
        while array not in self.flow.outputs and len(self.users[array]) == 1:
            [user] = self.users[array]
            others = [other for other in self.nodes[user].operands if other != array]
            if not self._joins(at, user, array, others, added):
                break
            if self.nodes[user].primitive in ("add", "add_any"):
                vector = self._vector(others[0], array)
                added.append(others[0] if vector is None else vector)
            members.append(user)
            array = self.nodes[user].results[0]
        return Epilogue(array, tuple(added), tuple(members)) if members else None

    def _joins(self, at: int, user: int, array: int, others: list[int], added: list[int]) -> bool:
        """Whether a node can be fused into the matmul that feeds it."""
        node, arrays = self.nodes[user], self.arrays
        if node.primitive == "convert_element_type":
            return arrays[node.results[0]].width <= arrays[array].width
        if node.primitive == "mul":
            return all(arrays[other].elements == 1 for other in others)
        if node.primitive not in ("add", "add_any") or not others:
            return _kinds.is_view(node)
        if self._vector(others[0], array) is not None:
            return not added
        if arrays[others[0]].elements != arrays[array].elements:
            return False
        is_first = all(arrays[one].elements != arrays[array].elements for one in added)
        return is_first and self.maker.get(others[0], -1) < at

    def _vector(self, array: int, result: int) -> int | None:
        """Returns the vector that is added to all rows of a result, if it is one."""
        while array in self.maker:
            node = self.nodes[self.maker[array]]
            if node.primitive not in ("broadcast_in_dim", "convert_element_type") or not node.operands:
                break
            array = node.operands[0]
        is_smaller = self.arrays[array].elements < self.arrays[result].elements
        return array if is_smaller and _kinds.is_vector(self.arrays[array]) else None

    def _is_better_held(self, at: int, array: int) -> bool:
        """Whether writing an array costs fewer bytes than recomputing it for every launch that uses it."""
        node, size, uses = self.nodes[at], self.arrays[array].bytes, len(self.users[array])
        if array in self.held or at in self.absorbed or uses < 2 or size <= SMALL or not _kinds.is_pointwise(node):
            return False
        needed = self.bytes(self.read([array]))
        if self.arrays[array].width <= 2 and size <= needed and self._takes_long(array):
            return True
        return uses * needed > needed + size + uses * size or (_kinds.is_expensive(node) and self._is_filled_up(array))

    def _is_moved(self, array: int) -> bool:
        """Whether an array is a copy with other axes, which is a launch."""
        return array in self.maker and self.nodes[self.maker[array]].primitive == "relayout"

    def _is_filled_up(self, array: int) -> bool:
        """Whether a copy that fills up an operand computes with an array, which is not done row by row."""
        waiting, known = [array], set[int]()
        while waiting:
            for at in self.users[waiting.pop()]:
                if self.nodes[at].primitive == "pad":
                    return True
                if at not in known and _kinds.is_pointwise(self.nodes[at]):
                    known.add(at)
                    waiting += [result for result in self.nodes[at].results if result not in self.held]
        return False

    def _takes_long(self, array: int) -> bool:
        """Whether expensive functions are between memory and an array."""
        waiting, known = [array], set[int]()
        while waiting:
            other = waiting.pop()
            if other in known or other not in self.maker:
                continue
            known.add(other)
            node = self.nodes[self.maker[other]]
            if _kinds.is_expensive(node) and 4 * self.arrays[other].elements >= self.arrays[array].elements:
                return True
            if _kinds.is_pointwise(node):
                waiting += [operand for operand in node.operands if operand not in self.held]
        return False


def _needed(node: Node, amount: float) -> Iterator[tuple[int, float]]:
    """Yields how many elements of each operand this many results need."""
    if _kinds.is_update(node):
        rows = 0 if node.primitive == "dynamic_update_slice" else _kinds.updated(node)
        yield node.operands[0], rows
        yield from ((array, math.inf) for array in node.operands[1:])
    else:
        yield from ((array, amount if _kinds.is_pointwise(node) else math.inf) for array in node.operands)
