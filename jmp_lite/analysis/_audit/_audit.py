"""``audit``: which precision a program runs in, and what is wrong with it, before it runs."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jmp_lite._functions import check_function
from jmp_lite._policy import Policy, PolicyMap
from jmp_lite._text import table as laid_out
from jmp_lite.analysis._audit import _check_dtypes, _check_numbers, _check_sums
from jmp_lite.analysis._audit._census import CastRow, CollectiveRow, KernelRow, MatmulRow, census
from jmp_lite.analysis._audit._flow import Flow
from jmp_lite.analysis._audit._subject import Subject
from jmp_lite.analysis._finding import Finding, ordered
from jmp_lite.analysis._programs import Program, traced_program
from jmp_lite.autocast._api import settings_from
from jmp_lite.autocast._ops import Op
from jmp_lite.autocast._rules import Rule, Settings

CHECKS = (*_check_numbers.CHECKS, *_check_sums.CHECKS, *_check_dtypes.CHECKS)


@dataclasses.dataclass(frozen=True)
class Audit:
    """The precision of everything in a program, and what is wrong with it.

    It prints as a verdict, then tables, then findings.

    Example:
        >>> x, w = jnp.ones((8, 16), jnp.bfloat16), jnp.ones((16, 4), jnp.bfloat16)
        >>> audit = jmp.analysis.audit(lambda w, x: x @ w)(w, x)
        >>> [(row.operands, row.result, row.times) for row in audit.matmuls], audit.findings
        ([(('bfloat16', 'bfloat16'), 'bfloat16', 1)], ())
    """

    matmuls: tuple[MatmulRow, ...]
    """Matmuls and convolutions, the largest first."""
    kernels: tuple[KernelRow, ...]
    """Kernels and foreign calls."""
    casts: tuple[CastRow, ...]
    """Casts between dtypes."""
    collectives: tuple[CollectiveRow, ...]
    """What is sent between devices."""
    residual_bytes: Mapping[str, int]
    """Of a loss: bytes that are kept for the backward pass, arguments not counted, by dtype."""
    findings: tuple[Finding, ...]
    """The worst first."""
    is_loss: bool
    """Whether the program is a loss with its gradient."""

    @property
    def verdict(self) -> str:
        """A summary in one paragraph."""
        what = "The loss and its gradient have" if self.is_loss else "The program has"
        count = sum(row.times for row in self.matmuls)
        low = sum(row.flop_share for row in self.matmuls if _is_low(row.operands))
        figures = f"{what} {count} matmuls and convolutions"
        figures += f", {low:.1%} of their FLOPs on operands of 16 bits or fewer." if count else "."
        counts = [(s, sum(f.severity == s for f in self.findings)) for s in ("error", "warning", "note")]
        said = ", ".join(f"{n} {severity}{'s' if n > 1 else ''}" for severity, n in counts if n)
        worst = f" The worst: {self.findings[0].message}" if self.findings else ""
        return f"{figures} Found: {said or 'nothing'}.{worst}"

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as dictionaries, lists, strings and numbers, as JSON has them.

        Example:
            >>> jmp.analysis.audit(jnp.sin)(jnp.ones(3)).to_dict()["findings"]
            []
        """
        tables = {name: [_plain(row) for row in getattr(self, name)] for name in _TABLES}
        findings = [_plain(f) | {"severity": f.severity, "advice": f.advice} for f in self.findings]
        about = {"verdict": self.verdict, "is_loss": self.is_loss, "residual_bytes": dict(self.residual_bytes)}
        return {**about, **tables, "findings": findings}

    def __str__(self) -> str:
        parts = [self.verdict, *(_table(name, getattr(self, name)) for name in _TABLES)]
        if self.residual_bytes:
            kept = ", ".join(f"{size} in {dtype}" for dtype, size in self.residual_bytes.items())
            parts.append(f"Bytes kept for the backward pass: {kept}.")
        return "\n\n".join([*filter(None, parts), *map(str, self.findings)])

    __repr__ = __str__


_TABLES = ("matmuls", "kernels", "casts", "collectives")


def audit(
    fun: Callable[..., Any],
    policy: str | Policy | PolicyMap | None = None,
    *,
    rules: Rule | Sequence[Rule] = (),
    ops: Mapping[str, Op] | None = None,
    dot: Callable[..., Any] | None = None,
    accumulation_dtype: Any = None,
) -> Callable[..., Audit]:
    """Reports which precision a function runs in, and what is wrong with it. Compiles and computes nothing.

    With a policy, it audits the program that ``autocast`` runs; without one, the program as written, with the casts and
    dtypes of its author. A function that returns one floating scalar, or a pair of one and auxiliary output, counts as
    a loss and is audited together with its gradient in the floating arrays of its first argument; any other function is
    audited alone.

    The audit follows values through loops, branches and calls, from producers to consumers: a softmax is a problem
    where its exponentials and their sum are rounded to 16 bits, not at every ``exp``.

    Args:
        fun: The function: a loss, a model, or a whole training step.
        policy: As for ``autocast``; ``None`` for the function as it is written.
        rules: As for ``autocast``.
        ops: As for ``autocast``.
        dot: As for ``autocast``.
        accumulation_dtype: As for ``autocast``.

    Returns:
        A function with the arguments of ``fun`` (arrays, or ``jax.ShapeDtypeStruct`` in their place) that returns an
        ``Audit``.

    Raises:
        InvalidFunctionError: If ``fun`` is not a function.
        InvalidRuleError: As in ``autocast``, which lists the other errors.

    Example:
        >>> def model(w, x):
        ...     with jax.named_scope("body"):
        ...         x = (x @ w).astype(jnp.float32)
        ...     with jax.named_scope("head"):
        ...         return x @ w.astype(jnp.float32)
        >>> [found] = jmp.analysis.audit(model)(*[jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)] * 2).findings
        >>> print(found.kind, found.scope, found.message)
        float32-leak body 1 matmul runs in float32 (50.0% of FLOPs; ...), because bfloat16 is cast or promoted to ...

    References:
        Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740, section 3.3, on sums. Chan, Golub and
        LeVeque, "Algorithms for Computing the Sample Variance", The American Statistician 37, 1983, on cancellation.
    """
    check_function(fun, "audit")
    settings = settings_of(policy, rules=rules, ops=ops, dot=dot, accumulation_dtype=accumulation_dtype)
    return lambda *args, **kwargs: audited(traced_program(fun, settings, args, kwargs))


def settings_of(policy: str | Policy | PolicyMap | None, **settings: Any) -> Settings | None:
    """Checks settings of autocast; settings without a policy get the float32 policy.

    Returns:
        ``None`` to analyze the program as written.
    """
    if policy is None and not any(value is not None and value != () for value in settings.values()):
        return None
    return settings_from("float32" if policy is None else policy, **settings)


def audited(program: Program) -> Audit:
    """Counts the parts of a program and checks it."""
    flow = Flow(program.jaxpr)
    subject = Subject(flow, program)
    findings = ordered(finding for check in CHECKS for finding in check(subject))
    tables = census(flow)
    return Audit(
        tables.matmuls,
        tables.kernels,
        tables.casts,
        tables.collectives,
        program.residual_bytes,
        findings,
        program.is_loss,
    )


def _is_low(dtypes: Sequence[str]) -> bool:
    return not any(dtype in ("float32", "float64") for dtype in dtypes)


def _plain(row: Any) -> dict[str, Any]:
    return {name: list(x) if isinstance(x, tuple) else x for name, x in row._asdict().items()}


def _table(name: str, rows: Sequence[Any]) -> str:
    if not rows:
        return ""
    return f"{name}:\n{laid_out(rows[0]._fields, [tuple(map(_cell, row)) for row in rows])}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}"
    return ", ".join(value) if isinstance(value, tuple) else str(value)
