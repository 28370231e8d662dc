"""Checks for sums held in 16 bits: softmax, statistics, variances, accumulators, scores."""

import math
from collections.abc import Iterator

from jmp_lite.analysis._audit._flow import Flow, Node, Value, moves
from jmp_lite.analysis._audit._subject import LONG, Subject, found, is_16_bits, is_decided, terms
from jmp_lite.analysis._finding import Finding
from jmp_lite.autocast._ops import CHOOSES, PRODUCTS
from jmp_lite.autocast._record import as_count

_SCATTERED = frozenset({"scatter-add", "scatter-sub"})
_RUNNING = frozenset({"cumsum", "cumlogsumexp", "cumprod"})
_ADDS = frozenset({"add", "add_any"})
_CHOICES = frozenset({"argmax", "argmin", "sort"}) | CHOOSES
#: What a score goes through on its way to where it counts.
_MILD = frozenset({"add", "sub", "mul", "div", "neg", "max", "min", "tanh", "logistic", "exp", "log", "clamp"})


def softmaxes(subject: Subject) -> Iterator[Finding]:
    """Finds 16-bit exponentials whose sum is rounded to 16 bits before a division or a logarithm."""
    flow = subject.flow
    for node in flow.nodes:
        if node.name == "exp" and is_16_bits(node.site.out_dtypes[0]) and not is_decided(node):
            for total in _sums_of(flow, node):
                if _normalizes(flow, total, node):
                    length = terms(flow, total)
                    what = f"Exponentials and their sums over {length} terms are rounded to {node.site.out_dtypes[0]}."
                    yield found("softmax-in-16-bits", node, what, length)


def _sums_of(flow: Flow, node: Node) -> list[Node]:
    return [use for use, _ in flow.forward(node.results[0], moves) if use.name == "reduce_sum"]


def _normalizes(flow: Flow, total: Node, exponential: Node) -> bool:
    """Whether a sum of exponentials is used in 16 bits, in a division or a logarithm."""
    for use, position in flow.forward(total.results[0], moves):
        is_low = use.name in ("log", "div") and is_16_bits(use.site.out_dtypes[0])
        if is_low and use.name == "log":
            return True
        if is_low and position == 1:
            return any(made == exponential for _, made in flow.backward(use.operands[0], moves))
    return False


def statistics(subject: Subject) -> Iterator[Finding]:
    """Finds long sums that accumulate in 16 bits, and squares that overflow before they are summed."""
    flow = subject.flow
    for node in flow.nodes:
        if node.name not in ("reduce_sum", "reduce_window_sum") or is_decided(node):
            continue
        length = math.prod(node.eqn.params["window_dimensions"]) if node.name != "reduce_sum" else terms(flow, node)
        dtype = node.site.in_dtypes[0]
        made = [made for _, made in flow.backward(node.operands[0], moves) if made is not None]
        if is_16_bits(dtype) and length >= LONG:
            kind = "gradient-sum-in-16-bits" if node.site.is_backward else "statistics-in-16-bits"
            if not any(each.name == "exp" or _is_tie(flow, each) for each in made):
                yield found(kind, node, f"A sum of {length} terms accumulates in {dtype}.", length)
        elif not node.site.is_backward:
            squares = [each for each in made if _is_square(flow, each) and each.site.out_dtypes[0] == "float16"]
            for square in squares:
                what = f"Squares from 256 on are infinite in float16, and {length} of them are summed."
                yield found("statistics-in-16-bits", square, what, length)


def _is_tie(flow: Flow, node: Node) -> bool:
    """Whether an equation finds the positions of a maximum, whose derivative counts them."""
    makers = [made for operand in node.operands for _, made in flow.backward(operand, moves) if made is not None]
    return node.name == "eq" and any(made.name in ("reduce_max", "reduce_min") for made in makers)


def _is_square(flow: Flow, node: Node) -> bool:
    if node.name == "mul":
        return flow.roots(node.operands[0]) == flow.roots(node.operands[1])
    return node.name == "square" or (node.name == "integer_pow" and node.eqn.params["y"] == 2)


def cancellations(subject: Subject) -> Iterator[Finding]:
    """Finds variances that are computed as the mean of squares minus the square of the mean."""
    flow = subject.flow
    for node in flow.nodes:
        if node.name != "sub" or node.site.is_backward or is_decided(node):
            continue
        squares = _squares_in_mean(flow, node.operands[0])
        if not squares or not _is_squared_mean(flow, node.operands[1]):
            continue
        if is_16_bits(node.site.out_dtypes[0]):
            message = f"The mean of squares minus the square of the mean cancels in {node.site.out_dtypes[0]}."
            yield found("cancellation", node, message)
        elif narrow := next((dtype for square in squares for dtype in _narrow(flow, square)), None):
            message = f"The variance of {narrow} values is the mean of their squares minus the square of their mean."
            yield found("cancellation-in-float32", node, message)


def _narrow(flow: Flow, square: Node) -> list[str]:
    values = [value for value, _ in flow.backward(square.operands[0], moves)]
    return [flow.dtype(value) for value in values if is_16_bits(flow.dtype(value))]


def _averages(flow: Flow, node: Node, position: int) -> bool:
    """Whether an equation turns a sum into a mean: it moves it, reduces it over devices, or divides by a number."""
    if moves(node, position) or node.name.startswith("psum"):
        return True
    is_scaled = node.name == "mul" or (node.name in ("div", "max") and position == 0)
    others = [v for i, v in enumerate(node.operands) if i != position]
    return is_scaled and all(flow.number(v) is not None or flow.size(v) == 1 for v in others)


def _means(flow: Flow, value: Value) -> Iterator[Node]:
    for _, made in flow.backward(value, lambda node, i: _averages(flow, node, i)):
        if made is not None and made.name == "reduce_sum":
            yield made


def _squares_in_mean(flow: Flow, value: Value) -> list[Node]:
    return [
        made
        for total in _means(flow, value)
        for _, made in flow.backward(total.operands[0], moves)
        if made is not None and _is_square(flow, made)
    ]


def _is_squared_mean(flow: Flow, value: Value) -> bool:
    squares = [made for _, made in flow.backward(value, moves) if made is not None and _is_square(flow, made)]
    return any(True for square in squares for _ in _means(flow, square.operands[0]))


def accumulations(subject: Subject) -> Iterator[Finding]:
    """Finds sums that are held in 16 bits from one term to the next."""
    flow = subject.flow
    for node in flow.nodes:
        dtype = node.site.out_dtypes[0] if node.site.out_dtypes else ""
        if not is_16_bits(dtype) or is_decided(node):
            continue
        length, what = 0, ""
        if node.name in _RUNNING:
            length = as_count(flow.avals[node.operands[0]].shape[node.eqn.params["axis"]])
            what = f"A running sum of {length} terms is held in {dtype}."
        elif node.name in _SCATTERED:
            length = _times(flow, node)
            what = f"Up to {length} terms accumulate in each element of a {dtype} array."
        if length >= LONG:
            kind = "gradient-sum-in-16-bits" if node.site.is_backward else "narrow-accumulation"
            yield found(kind, node, what, length)
    yield from _carried_sums(flow)


def _times(flow: Flow, node: Node) -> int:
    """Returns how many terms may accumulate in one element."""
    if node.eqn.params.get("unique_indices"):
        return 1
    *shape, _ = flow.avals[node.operands[1]].shape
    batched = node.eqn.params["dimension_numbers"].scatter_indices_batching_dims
    return math.prod(as_count(size) for axis, size in enumerate(shape) if axis not in batched)


def _carried_sums(flow: Flow) -> Iterator[Finding]:
    for before, after in flow.carries:
        dtype = flow.dtype(before)
        if not is_16_bits(dtype):
            continue
        for _, node in flow.backward(after, moves, before):
            if node is None or node.name not in _ADDS or node.site.trips < LONG or is_decided(node):
                continue
            if _adds_something_new(flow, node, before):
                kind = "gradient-sum-in-16-bits" if node.site.is_backward else "narrow-accumulation"
                what = f"A sum of {node.site.trips} terms is carried in {dtype} from one iteration to the next."
                yield found(kind, node, what, node.site.trips)


def _adds_something_new(flow: Flow, node: Node, before: Value) -> bool:
    """Whether one operand is the carry and the other does not depend on it, unlike a layer on its residual stream."""
    carried = [flow.is_from(operand, before, moves) for operand in node.operands]
    depends = [flow.is_from(operand, before, lambda _node, _position: True) for operand in node.operands]
    return any(carried[i] and not depends[1 - i] for i in range(2))


def scores(subject: Subject) -> Iterator[Finding]:
    """Finds matmul results that are rounded to 16 bits before they decide a choice."""
    flow = subject.flow

    def through(node: Node, position: int) -> bool:
        return moves(node, position) or node.name in _MILD

    for node, share in subject.products:
        dtype = node.site.out_dtypes[0]
        if not is_16_bits(dtype) or node.site.is_backward or node.name not in PRODUCTS:
            continue
        uses = [use for use, _ in flow.forward(node.results[0], through)]
        choice = next((use for use in uses if use.name in _CHOICES and not use.site.is_backward), None)
        if choice is not None:
            yield found("scores-rounded", node, f"{choice.name} chooses by a matmul rounded to {dtype}.", share)
        elif any(use.name == "exp" and not use.site.is_backward and _sums_of(flow, use) for use in uses):
            yield found("logits-rounded", node, f"A softmax takes a matmul rounded to {dtype}.", share)


CHECKS = (softmaxes, statistics, cancellations, accumulations, scores)
