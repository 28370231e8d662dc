"""The copies that a compiler makes for matmuls: with another axis last, and with sizes that the matrix units divide.

References:
    OpenXLA, ``cublas_pad_for_gemms.cc``: operands are filled up with zeros, and the result is cut. "cuBLAS", section
    cublasLtMatmul: matmuls in FP8 take the first operand transposed, the second one not.
"""

import math
from collections.abc import Sequence

from jmp_lite.analysis._estimation._dataflow import Array, Dataflow, Node
from jmp_lite.autocast._record import as_count

#: What the sizes of a matmul are filled up to a multiple of, by operand dtype.
_MULTIPLES = {"bfloat16": 8, "float16": 8, "float8": 16, "int8": 4}


def with_layouts(flow: Dataflow) -> Dataflow:
    """Returns a program with the copies that its matmuls need, one per array."""
    copies = _Copies(flow)
    for node in flow.nodes:
        copies.add(node)
    return Dataflow(copies.arrays, tuple(copies.nodes), flow.inputs, flow.outputs)


class _Copies:
    """State while copies are added."""

    def __init__(self, flow: Dataflow) -> None:
        self.arrays, self.nodes = list(flow.arrays), list[Node]()
        self._made: dict[tuple[int, Array, str], int] = {}

    def add(self, node: Node) -> None:
        if node.primitive != "dot_general" or len(node.operands) < 2:
            self.nodes.append(node)
            return
        operands = list(node.operands)
        for index in (0, 1):
            if wants_last(node, index):
                operands[index] = self.copied(node, operands[index], self.arrays[operands[index]], "relayout")
        sizes = _sizes(node)
        padded = _padded(node, sizes)
        if padded == sizes:
            self.nodes.append(node._replace(operands=tuple(operands)))
            return
        batch, rows, terms, columns = padded
        for index, shape in enumerate([(batch, rows, terms), (batch, terms, columns)]):
            before = self.arrays[operands[index]]
            if math.prod(shape) == before.elements:
                continue
            if not _leads(node, index):
                operands[index] = self.copied(node, operands[index], before, "relayout")
            operands[index] = self.copied(node, operands[index], Array(shape, before.width), "pad")
        [result] = node.results
        self.arrays.append(Array((batch, rows, columns), self.arrays[result].width))
        whole = len(self.arrays) - 1
        self.nodes.append(node._replace(operands=tuple(operands), results=(whole,)))
        self.nodes.append(Node("slice", node.eqn, (whole,), (result,)))

    def copied(self, node: Node, array: int, copy: Array, how: str) -> int:
        """Returns the copy of an array."""
        key = array, copy, how
        if key not in self._made:
            self._made[key] = len(self.arrays)
            self.arrays.append(copy)
            self.nodes.append(Node(how, node.eqn, (array,), (self._made[key],)))
        return self._made[key]


def wants_last(node: Node, index: int) -> bool:
    """Whether an 8-bit matmul needs a copy of an operand, with the contracted axis last."""
    if "float8" not in str(node.eqn.invars[index].aval.dtype):
        return False
    contracted: tuple[int, ...] = tuple(node.eqn.params["dimension_numbers"][0][index])
    axes = [axis for axis, size in enumerate(_shape(node, index)) if size != 1]
    return bool(axes) and axes[-1] not in contracted


def _leads(node: Node, index: int) -> bool:
    """Whether the batch axes of an operand come first, as those of a filled up operand do."""
    batch = node.eqn.params["dimension_numbers"][1][index]
    axes = [axis for axis, size in enumerate(_shape(node, index)) if size != 1]
    wide = [axis for axis in batch if axis in axes]
    return axes[: len(wide)] == wide


def _sizes(node: Node) -> tuple[int, ...]:
    """Returns the sizes of a matmul: batch, rows, terms of a sum, columns."""
    (contracted, _), (batch, _) = node.eqn.params["dimension_numbers"]
    shapes = _shape(node, 0), _shape(node, 1)
    shared, terms = (math.prod(shapes[0][axis] for axis in axes) for axes in (batch, contracted))
    inner = max(shared * terms, 1)
    return shared, math.prod(shapes[0]) // inner, terms, math.prod(shapes[1]) // max(inner, 1)


def _padded(node: Node, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the sizes filled up; a product with a vector keeps its own, and so do operands of two dtypes."""
    names = [str(v.aval.dtype) for v in node.eqn.invars[:2]]
    multiples = {size for name in names for dtype, size in _MULTIPLES.items() if name.startswith(dtype)}
    is_known = all(name.startswith(tuple(_MULTIPLES)) for name in names)
    batch, *others = sizes
    if not is_known or len(multiples) != 1 or 1 in (others[0], others[2]):
        return sizes
    [multiple] = multiples
    return batch, *(-(-size // multiple) * multiple for size in others)


def _shape(node: Node, index: int) -> Sequence[int]:
    return [as_count(size) for size in node.eqn.invars[index].aval.shape]
