"""Checks for dtypes wider than needed: leaks, kernels, collectives, and settings that did nothing."""

from collections.abc import Iterator
from typing import NamedTuple

from jmp_lite._messages import first_few
from jmp_lite.analysis._audit._census import MOVING, bytes_of, collectives_of, is_low, kernels_of, widest, width
from jmp_lite.analysis._audit._flow import Node, Value, moves
from jmp_lite.analysis._audit._subject import Subject, found, is_16_bits, is_decided
from jmp_lite.analysis._finding import Finding
from jmp_lite.autocast._explain import Explanation
from jmp_lite.autocast._ops import PRODUCTS, OpClass, asked_precision, classify
from jmp_lite.errors import UnmatchedRuleWarning

#: Reasons of autocast that are the author's own.
_ASKED = ("rule for ", "in a ", "compute dtype of the policy")
_NOT_DECIDED = "not a matmul of float32 arrays"
_ELEMENTWISE = frozenset(
    {"add", "add_any", "sub", "mul", "div", "neg", "sqrt", "rsqrt", "max", "min", "integer_pow", "square"}
)


class Entry(NamedTuple):
    """Where a wide dtype came in."""

    what: str
    """What happened there."""
    source: str
    scope: str
    kind: str = "float32-leak"

    @classmethod
    def at(cls, node: Node, what: str, kind: str = "float32-leak") -> "Entry":
        """Returns what happened at an equation."""
        return cls(what, node.site.source, node.site.scope, kind)


def leaks(subject: Subject) -> Iterator[Finding]:
    """Finds float32 matmuls in a program with 16-bit ones, and names where float32 came in."""
    groups: dict[Entry, list[tuple[Node, float]]] = {}
    entries = dict[int, Entry]()
    for node, share in subject.products:
        made = subject.differentiated_by.get(node.site.number)
        if widest(node) != 4 or is_decided(node) or (made and _follows(made)):
            continue
        kind, message = why_wide(node, subject.program.explanation)
        if kind == "highest-precision" or (kind == "float32-as-written" and subject.has_low_products):
            yield found(kind, node, message, share)
        if kind != "float32-leak" or not subject.has_low_products:
            continue
        entry = entries.get(made.site.number) or _of_cotangents(made) if made else None
        entries[node.site.number] = entry = entry or origin(subject, node)
        groups.setdefault(entry, []).append((node, share))
    for entry, members in groups.items():
        lines = list(dict.fromkeys(node.site.source for node, _ in members))
        share = sum(share for _, share in members)
        count = f"{len(members)} matmul{'s run' if len(members) > 1 else ' runs'}"
        message = f"{count} in float32 ({share:.1%} of FLOPs; {first_few(lines)}), because {entry.what}."
        yield Finding(entry.kind, message, entry.source, entry.scope, share)


def _follows(node: Node) -> bool:
    """Whether a matmul has the dtype of its operands by right, and so have its gradients: a handful of terms."""
    return classify(node.eqn, {})[0] is not OpClass.ALLOW


def _of_cotangents(made: Node) -> Entry | None:
    """Returns what a backward matmul is wide for if the matmul that it differentiates asks for a float32 result."""
    if not is_low(made) or width(made.site.out_dtypes[0]) != 4:
        return None
    return Entry.at(made, "it multiplies the cotangents of a result of float32", "float32-cotangents")


def why_wide(node: Node, explanation: Explanation | None) -> tuple[str, str]:
    """Returns the kind of finding for a float32 matmul, empty if none, and its message."""
    asked = asked_precision(node.eqn)
    if asked:
        return "highest-precision", f"A matmul runs in float32, because it asks for precision={asked}."
    if _follows(node):
        return "", ""
    if explanation is None:
        return "float32-leak", ""
    on_line = [record for record in explanation if (record.primitive, record.source) == (node.name, node.site.source)]
    for record in [record for record in on_line if record.scope == node.site.scope] or on_line:
        if record.group == "float32":
            reason = record.reason
            if reason.startswith(_ASKED):
                return "", ""
            if not reason.startswith(_NOT_DECIDED):
                return "float32-as-written", f"A matmul runs in float32: {reason}."
    return "float32-leak", ""


def origin(subject: Subject, product: Node) -> Entry:
    """Returns where float32 came into a matmul, and what happened there."""
    flow = subject.flow
    casts, results, others = list[Node](), list[Node](), list[Value]()

    def goes_on(node: Node, position: int) -> bool:
        return not _enters(node) and width(flow.dtype(node.operands[position])) >= 4

    for operand in product.operands[:2]:
        if width(flow.dtype(operand)) < 4:
            continue
        for value, node in flow.backward(operand, goes_on):
            if node is None:
                others.append(value)
            elif _enters(node):
                (casts if node.name == "convert_element_type" else results).append(node)
    if casts:
        first = min(casts, key=lambda node: node.site.number)
        return Entry.at(
            first,
            f"{first.site.in_dtypes[0]} is cast or promoted to {first.site.out_dtypes[0]}{_promoter(subject, first)}",
        )
    if results:
        first = min(results, key=lambda node: node.site.number)
        return Entry.at(first, f"{first.name} returns {first.site.out_dtypes[0]}")
    wide = [value for value in others if flow.size(value) > 1] or others
    dtype = flow.dtype(wide[0]) if wide else "float32"
    return Entry.at(product, f"{subject.name_of(wide[0]) if wide else 'what is made in the program'} is {dtype}")


def _promoter(subject: Subject, cast: Node) -> str:
    """Names the argument or constant that a value was promoted for, if there is one on the same line."""
    flow = subject.flow
    for use, position in flow.consumers(cast.results[0]):
        others = [v for i, v in enumerate(use.operands) if i != position and use.site.source == cast.site.source]
        for operand in others:
            for value, node in flow.backward(operand, moves):
                if node is None and width(flow.dtype(value)) >= 4:
                    return f", which {subject.name_of(value)} is"
    return ""


def _enters(node: Node) -> bool:
    """Whether an equation returns a wide value from narrow ones only."""
    is_narrow = node.name not in PRODUCTS or widest(node) < 4
    return is_narrow and width(node.site.out_dtypes[0]) >= 4 and any(is_16_bits(dtype) for dtype in node.site.in_dtypes)


def kernels(subject: Subject) -> Iterator[Finding]:
    """Finds kernels on float32 arrays in a 16-bit program."""
    if not subject.has_low_products:
        return
    for node in kernels_of(subject.flow):
        wide = [v for v in node.operands if width(subject.flow.dtype(v)) == 4 and subject.flow.size(v) > 1]
        if wide and not is_decided(node):
            yield found(
                "float32-kernel", node, f"{node.name} takes float32 in {len(wide)} of {len(node.operands)} operands."
            )


def collectives(subject: Subject) -> Iterator[Finding]:
    """Finds float32 arrays sent between devices in a 16-bit program; sums may be exact on purpose."""
    flow = subject.flow
    if not subject.has_low_products:
        return
    for node in collectives_of(flow):
        for operand in dict.fromkeys(node.operands):
            if width(flow.dtype(operand)) != 4 or flow.size(operand) == 1 or is_decided(node):
                continue
            message = f"{node.name} sends {bytes_of(flow, operand)} bytes of float32."
            makers = [made for _, made in flow.backward(operand, _is_elementwise) if made is not None]
            is_of_gradient = node.site.is_backward or any(made.site.is_backward for made in makers)
            if is_of_gradient or node.name not in MOVING:
                yield found("float32-reduction", node, message)
            else:
                yield found("float32-collective", node, message)


def _is_elementwise(node: Node, position: int) -> bool:
    return moves(node, position) or node.name in _ELEMENTWISE


def doubles(subject: Subject) -> Iterator[Finding]:
    """Finds the first equation that makes float64 in a 16-bit program."""
    flow = subject.flow
    if not any(is_16_bits(flow.dtype(value)) for value in range(len(flow.avals))):
        return
    made = [node for node in flow.nodes if "float64" in node.site.out_dtypes]
    taken = [node for node in flow.nodes if "float64" in node.site.in_dtypes]
    first = min([*made, *taken], key=lambda node: node.site.number, default=None)
    if first is not None:
        yield found(
            "x64", first, f"Operations in float64: {len(made) or len(taken)}, the first of which is {first.name}."
        )


def settings(subject: Subject) -> Iterator[Finding]:
    """Finds settings of autocast that had no effect."""
    for warning in subject.program.said:
        if issubclass(warning.category, UnmatchedRuleWarning):
            yield Finding("unmatched-rule", str(warning.message).partition(" jmp.explain")[0])
    if subject.program.no_gradient:
        yield Finding(
            "no-gradient",
            f"JAX has no gradient of this function, so only its value counts: {subject.program.no_gradient}",
        )
    if subject.program.explanation is None:
        return
    summary = subject.program.explanation.summary
    products = {group: count for group, (count, _) in summary.matmuls.items() if count}
    if subject.program.asks_16_bits and not products.keys() & {"low", "replaced"} and "float32" in products:
        reasons = list(dict.fromkeys(record.reason for record in summary.float32))
        message = f"None of {sum(products.values())} matmuls runs in 16 bits: {first_few(reasons)}."
        yield Finding("nothing-low", message, summary.float32[0].source, summary.float32[0].scope, 1.0)
    if summary.not_replaced:
        first, replaced = summary.not_replaced[0], products.get("replaced", 0)
        reasons = list(dict.fromkeys(record.reason.rpartition("; ")[2] for record in summary.not_replaced))
        count = sum(record.trips for record in summary.not_replaced)
        message = f"dot= replaces {replaced} matmuls and leaves {count}: {first_few(reasons)}."
        kind = "recipe-partly-applied" if replaced else "recipe-not-applied"
        yield Finding(kind, message, first.source, first.scope)


CHECKS = (leaks, kernels, collectives, doubles, settings)
