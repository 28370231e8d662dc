"""``assert_compute_dtype``: a test that fails where a matmul is wider than it should be."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jmp_lite._dtypes import dtype_or_none
from jmp_lite._functions import check_function
from jmp_lite._messages import quote, warn
from jmp_lite._patterns import compile_pattern
from jmp_lite._policy import Policy, PolicyMap
from jmp_lite.analysis._audit._audit import settings_of
from jmp_lite.analysis._audit._census import kernels_of, operand_dtypes, widest
from jmp_lite.analysis._audit._check_dtypes import origin
from jmp_lite.analysis._audit._flow import Flow, Node
from jmp_lite.analysis._audit._subject import Subject
from jmp_lite.analysis._programs import traced_program
from jmp_lite.autocast._ops import Op
from jmp_lite.autocast._rules import Rule
from jmp_lite.errors import ComputeDtypeError, InvalidRuleError, UnmatchedRuleWarning

#: How many lines a message has.
_LINES = 10


def assert_compute_dtype(
    fun: Callable[..., Any],
    dtype: Any,
    *,
    allow: Iterable[str] = (),
    policy: str | Policy | PolicyMap | None = None,
    rules: Rule | Sequence[Rule] = (),
    ops: Mapping[str, Op] | None = None,
    dot: Callable[..., Any] | None = None,
    accumulation_dtype: Any = None,
) -> Callable[..., None]:
    """Raises if a matmul, a convolution or a kernel has operands wider than a dtype. Compiles and computes nothing.

    Put it in a test of your model: if a later change runs something in float32, the test fails and names the line.

    Args:
        fun: As for ``audit``; a loss is checked with its gradient.
        dtype: The widest floating dtype that operands may have, such as ``jnp.bfloat16`` or ``"bf16"``.
        allow: Regular expressions for exceptions, searched for in ``scope primitive source``, such as
            ``"router dot_general model.py:31:8 (layer)"``.
        policy: As for ``audit``.
        rules: As for ``audit``.
        ops: As for ``audit``.
        dot: As for ``audit``.
        accumulation_dtype: As for ``audit``.

    Returns:
        A function with the arguments of ``fun`` (arrays, or ``jax.ShapeDtypeStruct`` in their place) that returns
        ``None`` or raises.

    Raises:
        ComputeDtypeError: When called, with lines, shapes, shares of FLOPs, and the origin of wide operands.
        InvalidRuleError: If ``dtype`` is not a floating dtype; other errors are as in ``autocast``.
        InvalidPatternError: If an element of ``allow`` is not a regular expression.

    Warns:
        UnmatchedRuleWarning: When called, if an element of ``allow`` matches nothing.

    Example:
        >>> def model(x, w):
        ...     with jax.named_scope("head"):
        ...         return jnp.dot(x, w, precision="highest")
        >>> x, w = jnp.ones((8, 16)), jnp.ones((16, 8))
        >>> jmp.analysis.assert_compute_dtype(model, "bf16", policy="mixed_bfloat16", allow=["head"])(x, w)
        >>> jmp.analysis.assert_compute_dtype(model, "bf16", policy="mixed_bfloat16")(x, w)
        Traceback (most recent call last):
        jmp_lite.errors.ComputeDtypeError: 1 of 1 matmuls and kernels has operands wider than bfloat16...
    """
    check_function(fun, "assert_compute_dtype")
    widest_allowed = dtype_or_none(dtype)
    if widest_allowed is None or not jnp.issubdtype(widest_allowed, jnp.floating):
        raise InvalidRuleError(f"dtype must be a floating dtype, got {quote(dtype)}. Write for example jnp.bfloat16.")
    allowed = (allow,) if isinstance(allow, str) else tuple(allow)
    for pattern in allowed:
        compile_pattern(pattern)
    settings = settings_of(policy, rules=rules, ops=ops, dot=dot, accumulation_dtype=accumulation_dtype)

    def check(*args: Any, **kwargs: Any) -> None:
        program = traced_program(fun, settings, args, kwargs)
        subject = Subject(Flow(program.jaxpr), program)
        nodes = [*subject.products, *((node, 0.0) for node in kernels_of(subject.flow))]
        wide = [(node, share) for node, share in nodes if widest(node) > widest_allowed.itemsize]
        _warn_of_unused(allowed, [node for node, _ in wide])
        refused = [(node, share) for node, share in wide if not any(re.search(p, _described(node)) for p in allowed)]
        if refused:
            raise ComputeDtypeError(_message(subject, refused, len(nodes), str(widest_allowed)))

    return check


def _described(node: Node) -> str:
    return f"{node.site.scope} {node.name} {node.site.source}".strip()


def _warn_of_unused(allowed: Sequence[str], wide: Sequence[Node]) -> None:
    for pattern in allowed:
        if not any(re.search(pattern, _described(node)) for node in wide):
            warn(
                f"allow={quote(pattern)} allows nothing: no matmul or kernel that it matches is too wide. Delete it, "
                f"or correct it; the operands that are too wide are {quote([_described(node) for node in wide])}.",
                UnmatchedRuleWarning,
            )


def _message(subject: Subject, refused: Sequence[tuple[Node, float]], count: int, dtype: str) -> str:
    ordered = sorted(refused, key=lambda item: -item[1])
    have = "has" if len(refused) == 1 else "have"
    lines = [_line(subject, node, share) for node, share in ordered[:_LINES]]
    more = [f"  and {len(ordered) - _LINES} more"] if len(ordered) > _LINES else []
    head = f"{len(refused)} of {count} matmuls and kernels {have} operands wider than {dtype}:"
    advice = "Cast there, or say what may be wider: allow=[regular expressions of scope, primitive or source]."
    return "\n".join([head, *lines, *more, advice])


def _line(subject: Subject, node: Node, share: float) -> str:
    flow = subject.flow
    shapes = [str(list(flow.avals[v].shape)).replace(" ", "") for v in node.operands[:2]]
    operands = ", ".join(f"{d}{s}" for d, s in zip(operand_dtypes(node), shapes, strict=False))
    entry = origin(subject, node)
    where = entry.source or "its call"
    return f"  {_described(node)}: {operands}, {share:.1%} of FLOPs, because {entry.what} at {where}"
