"""The input of ``audit``'s checks, and the questions that several of them share."""

import dataclasses
import functools
from collections.abc import Mapping

from jmp_lite.analysis._audit._census import is_low, products_of
from jmp_lite.analysis._audit._flow import Flow, Node, Value
from jmp_lite.analysis._audit._transposes import differentiated_by
from jmp_lite.analysis._finding import Finding
from jmp_lite.analysis._programs import Program
from jmp_lite.autocast import _regions
from jmp_lite.autocast._ops import PRODUCTS

#: Dtypes of 16 bits, with the largest number up to which they hold every integer.
EXACT_INTEGERS = {"bfloat16": 1 << 8, "float16": 1 << 11}
#: A sum of as many terms in 16 bits loses digits that one would miss.
LONG = 16


@dataclasses.dataclass(frozen=True)
class Subject:
    """A program, and what is known about it."""

    flow: Flow
    """The program as a graph."""
    program: Program

    @functools.cached_property
    def products(self) -> list[tuple[Node, float]]:
        """The matmuls and convolutions, each with its share of all FLOPs."""
        products = products_of(self.flow)
        total = max(sum(flops for _, flops in products), 1)
        return [(node, flops / total) for node, flops in products]

    @functools.cached_property
    def differentiated_by(self) -> Mapping[int, Node]:
        """The matmul whose derivative each backward matmul computes, by number of the backward one."""
        return differentiated_by(self.flow, [node for node, _ in self.products])

    @functools.cached_property
    def has_low_products(self) -> bool:
        """Whether a matmul has operands of 16 bits or fewer."""
        return any(is_low(node) for node, _ in self.products)

    def name_of(self, value: Value) -> str:
        """Returns the name of a value that no equation makes."""
        if value in self.flow.inputs:
            return f"argument {self.program.arguments[self.flow.inputs.index(value)]}"
        return "a number" if self.flow.size(value) == 1 else "an array that the function closes over"


def found(kind: str, node: Node, message: str, share: float = 0.0) -> Finding:
    """Returns a finding at an equation."""
    return Finding(kind, message, node.site.source, node.site.scope, share)


def is_decided(node: Node) -> bool:
    """Whether the author set the precision with a region."""
    return _regions.innermost(node.site.scope) is not None


def is_16_bits(dtype: str) -> bool:
    """Whether a dtype is a 16-bit floating dtype."""
    return dtype in EXACT_INTEGERS


def terms(flow: Flow, node: Node) -> int:
    """Returns how many terms a reduction sums for each of its results."""
    return max(flow.size(node.operands[0]) // max(flow.size(node.results[0]), 1), 1)


def is_square(flow: Flow, node: Node) -> bool:
    """Whether an equation multiplies an array by itself, or sums such products."""
    if node.name == "mul" or node.name in PRODUCTS:
        return flow.roots(node.operands[0]) == flow.roots(node.operands[1])
    return node.name == "square" or (node.name == "integer_pow" and bool(node.eqn.params["y"] == 2))
