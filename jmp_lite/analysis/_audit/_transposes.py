"""The matmul that a backward matmul differentiates, found by the operand that both take."""

import collections
from collections.abc import Mapping, Sequence

from jmp_lite.analysis._audit._flow import Flow, Node, Value, moves


def differentiated_by(flow: Flow, products: Sequence[Node]) -> Mapping[int, Node]:
    """Returns the matmul whose derivative each backward matmul computes, by number of the backward one.

    A matmul of ``a`` and ``b`` has two transposes: one takes the cotangent and ``b`` and has the size of ``a``; the
    other takes ``a`` and has the size of ``b``. A recomputed matmul counts like the one that it repeats. Of several
    that fit, such as three projections of one array, first come those that are not derivatives themselves, as two
    derivatives take the same cotangent; then those on the same line; then the last.
    """
    takers = collections.defaultdict[Value, list[tuple[Node, int]]](list)
    found: dict[int, Node] = {}
    for node in products:
        origins = [dict.fromkeys(v for v, _ in flow.backward(operand, moves)) for operand in node.operands[:2]]
        source = node.site.source
        if node.site.is_backward:
            fitting = [
                made
                for side, values in enumerate(origins)
                for value in values
                for made, place in takers[value]
                if _is_transpose(flow, made, place, node, side)
            ]
            if fitting:
                found[node.site.number] = max(
                    fitting,
                    key=lambda made: (made.site.number not in found, made.site.source == source, made.site.number),
                )
        for place, values in enumerate(origins):
            for value in values:
                takers[value].append((node, place))
    return found


def _is_transpose(flow: Flow, made: Node, place: int, node: Node, side: int) -> bool:
    """Whether the sizes fit: the other operand is the cotangent of a result, and the result that of an operand."""
    cotangent, other = node.operands[1 - side], made.operands[1 - place]
    return flow.size(cotangent) == flow.size(made.results[0]) and flow.size(node.results[0]) == flow.size(other)
