"""Checks for sums held in 16 bits: softmax, statistics, variances, accumulators, scores."""

import math
from collections.abc import Iterator

from jmp_lite.analysis._audit._flow import Flow, Node, Value, moves
from jmp_lite.analysis._audit._subject import LONG, Subject, found, is_16_bits, is_decided, is_square, terms
from jmp_lite.analysis._finding import Finding
from jmp_lite.autocast._ops import CHOOSES, PRODUCTS
from jmp_lite.autocast._record import as_count

_SCATTERED = frozenset({"scatter-add", "scatter-sub"})
_RUNNING = frozenset({"cumsum", "cumlogsumexp", "cumprod"})
_ADDS = frozenset({"add", "add_any"})
_EXPONENTIALS = frozenset({"exp", "exp2"})
_CHOICES = frozenset({"argmax", "argmin", "sort"}) | CHOOSES
#: What a score goes through on its way to where it counts.
_MILD = frozenset({"add", "sub", "mul", "div", "neg", "max", "min", "tanh", "logistic", "exp", "log", "clamp"})


def softmaxes(subject: Subject) -> Iterator[Finding]:
    """Finds 16-bit exponentials whose sum is rounded to 16 bits before a division or a logarithm."""
    flow = subject.flow
    for node in flow.nodes:
        if node.name in _EXPONENTIALS and is_16_bits(node.site.out_dtypes[0]) and not is_decided(node):
            for total in _sums_of(flow, node):
                if _normalizes(flow, total, node):
                    length = terms(flow, total)
                    what = f"Exponentials and their sums over {length} terms are rounded to {node.site.out_dtypes[0]}."
                    yield found("softmax-in-16-bits", node, what, length)


def _sums_of(flow: Flow, node: Node) -> list[Node]:
    return [use for use, _ in flow.forward(node.results[0], moves) if use.name == "reduce_sum"]


def _normalizes(flow: Flow, total: Node, exponential: Node) -> bool:
    """Whether a sum of exponentials is used in 16 bits: in a logarithm, or to divide what they weigh."""

    def stays_sum(node: Node, position: int) -> bool:
        others = [operand for i, operand in enumerate(node.operands) if i != position]
        is_shifted = node.name in ("add", "max") and all(map(flow.number, others))
        return moves(node, position) or node.name == "abs" or is_shifted

    def is_weighed(value: Value) -> bool:
        made_of = flow.backward(value, lambda node, i: moves(node, i) or node.name in PRODUCTS)
        return any(made == exponential for _, made in made_of)

    for use, position in flow.forward(total.results[0], stays_sum):
        if not use.site.out_dtypes or not is_16_bits(use.site.out_dtypes[0]):
            continue
        if use.name in ("log", "log2"):
            return True
        if use.name == "div" and position == 1 and is_weighed(use.operands[0]):
            return True
        if (use.name == "div" and position == 1 and flow.number(use.operands[0])) or use.name == "integer_pow":
            factors = [user for user, _ in flow.forward(use.results[0], moves) if user.name == "mul"]
            if any(is_weighed(operand) for user in factors for operand in user.operands):
                return True
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
            if not any(each.name in _EXPONENTIALS or _is_tie(flow, each) for each in made):
                yield found(kind, node, f"A sum of {length} terms accumulates in {dtype}.", length)
        elif not node.site.is_backward:
            squares = [each for each in made if is_square(flow, each) and each.site.out_dtypes[0] == "float16"]
            for square in squares:
                what = f"Squares from 256 on are infinite in float16, and {length} of them are summed."
                yield found("statistics-in-16-bits", square, what, length)


def _is_tie(flow: Flow, node: Node) -> bool:
    """Whether an equation finds the positions of a maximum, whose derivative counts them."""
    makers = [made for operand in node.operands for _, made in flow.backward(operand, moves) if made is not None]
    return node.name == "eq" and any(made.name in ("reduce_max", "reduce_min") for made in makers)


def cancellations(subject: Subject) -> Iterator[Finding]:
    """Finds variances that are computed as the mean of squares minus the square of the mean."""
    flow = subject.flow
    for node in flow.nodes:
        if node.site.is_backward or is_decided(node):
            continue
        squares = [
            square
            for first, second in _differences(flow, node)
            for square in _squares_in_mean(flow, first)
            if _is_squared_mean(flow, second)
        ]
        if not squares:
            continue
        if is_16_bits(node.site.out_dtypes[0]):
            message = f"The mean of squares minus the square of the mean cancels in {node.site.out_dtypes[0]}."
            yield found("cancellation", node, message)
        elif narrow := next((dtype for square in squares for dtype in _narrow(flow, square)), None):
            message = f"The variance of {narrow} values is the mean of their squares minus the square of their mean."
            yield found("cancellation-in-float32", node, message)


def _differences(flow: Flow, node: Node) -> Iterator[tuple[Value, Value]]:
    """Yields what an equation subtracts, and from what: in a difference, or a sum with a negated value."""
    if node.name == "sub":
        yield node.operands[0], node.operands[1]
    for i, operand in enumerate(node.operands if node.name in _ADDS else ()):
        for made in flow.producers(operand):
            if made.name == "neg":
                yield node.operands[1 - i], made.operands[0]


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
        if made is not None and (made.name == "reduce_sum" or made.name in PRODUCTS):
            yield made


def _squares_in_mean(flow: Flow, value: Value) -> list[Node]:
    """Returns the squares that a mean adds up: those that it sums, or a matmul of an array with itself."""
    means = list(_means(flow, value))
    summed = [made for mean in means for _, made in flow.backward(mean.operands[0], moves) if mean.name == "reduce_sum"]
    matmuls = [mean for mean in means if mean.name in PRODUCTS]
    return [made for made in (*summed, *matmuls) if made is not None and is_square(flow, made)]


def _is_squared_mean(flow: Flow, value: Value) -> bool:
    made = [made for _, made in flow.backward(value, lambda node, i: _averages(flow, node, i)) if made is not None]
    squares = [each for each in made if is_square(flow, each)]
    return any(mean.name == "reduce_sum" for each in squares for mean in _means(flow, each.operands[0]))


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
        elif any(use.name in _EXPONENTIALS and not use.site.is_backward and _sums_of(flow, use) for use in uses):
            yield found("logits-rounded", node, f"A softmax takes a matmul rounded to {dtype}.", share)


CHECKS = (softmaxes, statistics, cancellations, accumulations, scores)
