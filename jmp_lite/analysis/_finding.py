"""Findings of the analyses; each has a kind with one row in a table."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jmp_lite._messages import quote


class Kind(NamedTuple):
    """A kind of finding.

    Attributes:
        severity: ``error`` (wrong numbers), ``warning`` (lost accuracy, speed or memory) or ``note`` (good to know).
        advice: What to do about it.
    """

    severity: str
    advice: str


#: Every kind of finding, the worst first.
KINDS: Mapping[str, Kind] = {
    # Of a program, as written.
    "literal-out-of-range": Kind(
        "error", "Write the number for the dtype it meets, from jnp.finfo(x.dtype), or compute this in float32."
    ),
    "cancellation": Kind(
        "error", "Subtract the mean before squaring, or compute the statistics in float32: x.astype(jnp.float32)."
    ),
    "integer-rounded": Kind(
        "error", "Keep integers in int32 or float32, and cast values computed from them; or index instead of counting."
    ),
    "narrow-accumulation": Kind(
        "warning", "Start the sum in float32, jnp.zeros(shape, jnp.float32), and cast it once."
    ),
    "statistics-in-16-bits": Kind(
        "warning",
        "Compute the statistics of x.astype(jnp.float32) and cast them back, or use jmp.autocast.",
    ),
    "softmax-in-16-bits": Kind(
        "warning",
        "Write jax.nn.softmax(x.astype(jnp.float32)).astype(x.dtype), or use jmp.autocast.",
    ),
    "epsilon-subnormal": Kind("warning", "Use a number near jnp.finfo(x.dtype).tiny, or compute this in float32."),
    "scores-rounded": Kind(
        "warning",
        "Ask for them in float32: preferred_element_type, or jmp.Rule(scope, result=jnp.float32).",
    ),
    "nothing-low": Kind("warning", "See jmp.explain(fun, policy)(*args) for the reason of every matmul."),
    "recipe-not-applied": Kind("warning", 'A recipe with products="all" or jmp.Rule(scope, dot=recipe) reaches more.'),
    "unmatched-rule": Kind("warning", "Correct the pattern, or delete it."),
    "float32-leak": Kind(
        "warning",
        "Cast there to the dtype of the other operand, or use jmp.autocast. If you mean float32, "
        "say so with precision=HIGHEST or jmp.full_precision.",
    ),
    "float32-cotangents": Kind(
        "warning", "Under jmp.autocast, matmuls of float32 arrays take 16-bit operands in the backward pass too."
    ),
    "float32-kernel": Kind("warning", "Cast around the kernel: jmp.with_policy(kernel, policy)."),
    "float32-collective": Kind("warning", "Cast before sending: jmp.distributed.gather_params does for parameters."),
    "x64": Kind("warning", "Give dtypes to np arrays and scalars, or leave jax_enable_x64 off."),
    "gradient-sum-in-16-bits": Kind(
        "note",
        "Under jmp.autocast the gradients of weights accumulate in float32.",
    ),
    "logits-rounded": Kind(
        "note",
        "Where digits matter, use preferred_element_type, or jmp.Rule(scope, result=jnp.float32).",
    ),
    "cancellation-in-float32": Kind("note", "Where means are larger than deviations, use_fast_variance=False."),
    "one-hot-product": Kind("note", 'Index the table, table[ids], or give jmp.Rule(scope, precision="full").'),
    "infinite-mask": Kind("note", "Use jnp.finfo(x.dtype).min, or leave no row without an element."),
    "recipe-partly-applied": Kind("note", 'A recipe with products="all" or jmp.Rule(scope, dot=recipe) reaches more.'),
    "highest-precision": Kind("note", "Without precision=, it would run in 16 bits."),
    "float32-as-written": Kind("note", "It runs in float32 for a reason; jmp.explain shows the operands."),
    "no-gradient": Kind("note", "A loop of lax.scan has a gradient, one of lax.while_loop has none."),
    "float32-reduction": Kind(
        "note", "It keeps sums over devices exact; a cast before, or a 16-bit reduce_dtype, halves the bytes sent."
    ),
    # Of a run, compared with float32.
    "gradient-turned": Kind(
        "warning",
        'Keep the equations that add most error in float32: jmp.Rule(scope, precision="full").',
    ),
    "error-amplified": Kind(
        "warning",
        'Compute this and its operands in float32: jmp.full_precision, or jmp.Rule(scope, precision="full").',
    ),
    "updates-lost": Kind("warning", "Keep parameters in float32, or wrap the optimizer in jmp.optim.stored."),
    # Of the numbers that it computes.
    "nan": Kind("error", "jmp.analysis.first_nonfinite(fun)(*args) names the equation that made the first."),
    "overflow": Kind(
        "error", 'Keep this in float32, PolicyMap({scope: "full"}, default=policy), use bfloat16, or scale it down.'
    ),
    "gradient-underflow": Kind("warning", "Scale the loss, jmp.loss_scaled(tx) finds how much, or use bfloat16."),
    "exploding": Kind("warning", "Normalize between the layers, or start with smaller weights."),
    "lost-in-int8": Kind(
        "warning", "Move outliers into the weights with jmp.quant.smooth, or use scales for rows or tiles."
    ),
    "dead": Kind("warning", "It learns nothing: check its inputs, its ReLU or its mask."),
}

_ORDER = {"error": 0, "warning": 1, "note": 2}


class Finding(NamedTuple):
    """Something that an analysis found.

    Attributes:
        kind: A key of ``KINDS``.
        message: The finding and its figures, as one sentence.
        source: The user's file, line and function.
        scope: Name scopes, or the path of a parameter.
        share: Affected share, such as of FLOPs or elements; orders findings of one severity.

    Example:
        >>> def variance(x):
        ...     return jnp.mean(x * x) - jnp.mean(x) ** 2
        >>> found = jmp.analysis.audit(variance)(jnp.ones(64, jnp.bfloat16)).findings[0]
        >>> found.kind, found.severity
        ('cancellation', 'error')
    """

    kind: str
    message: str
    source: str = ""
    scope: str = ""
    share: float = 0.0

    @property
    def severity(self) -> str:
        """``error``, ``warning`` or ``note``."""
        return KINDS[self.kind].severity

    @property
    def advice(self) -> str:
        """What to do about it."""
        return KINDS[self.kind].advice

    def __str__(self) -> str:
        where = " in ".join(filter(None, (self.source, self.scope)))
        return f"{self.severity}: {self.kind}: {self.message}{f' At {where}.' if where else ''} {self.advice}"


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Returns findings without duplicates, worst first."""
    kinds = list(KINDS)
    return tuple(
        sorted(dict.fromkeys(findings), key=lambda f: (_ORDER[f.severity], -f.share, kinds.index(f.kind), quote(f)))
    )
