"""``explain``: what autocast would do to every equation, and why; the matrix products first."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import jax

from jmp_lite._policy import Policy, PolicyMap
from jmp_lite.autocast._api import HANDLERS, is_traced, settings_from, trace
from jmp_lite.autocast._interpreter import Interpreter
from jmp_lite.autocast._ops import Op
from jmp_lite.autocast._record import Record
from jmp_lite.autocast._rules import Rule, Settings

_COLUMNS = ("scope", "primitive", "class", "tag", "operands", "results", "source", "reason")
#: Longer scopes and paths are cut from the left.
_WIDEST = 48
_GROUPS = {
    "low": "in 16 bits",
    "float32": "in float32",
    "outer": "of a few terms, which follow their operands",
    "replaced": "replaced by dot= or ops=",
}


class Summary(NamedTuple):
    """Figures about a program under autocast.

    Example:
        >>> summary = jmp.explain(lambda x, w: jnp.exp(x @ w), "mixed_bfloat16")(
        ...     jnp.ones((2, 8)), jnp.ones((8, 4))
        ... ).summary
        >>> summary.products["low"], summary.casts
        ((1, 1.0), 2)
    """

    products: Mapping[str, tuple[int, float]]
    """Number of matrix products and convolutions, and their share of all floating-point operations of products: those
    with 16-bit operands (``low``), in ``float32``, of a few terms (``outer``), and ``replaced``. Those in the body of
    a scan count with its length; in that of a while loop once; in branches all."""
    kernels: tuple[Record, ...]
    """Kernels and foreign calls, which run as written."""
    casts: int
    """Operands that are cast."""
    float32: tuple[Record, ...]
    """The products in float32, the largest first."""
    not_replaced: tuple[Record, ...]
    """With ``dot=``: the products that it was not applied to."""


class Explanation(Sequence[Record]):
    """The decisions about a program, in its order; what a loop or a call holds follows it. Printed as a table.

    Example:
        >>> explanation = jmp.explain(jnp.exp, "mixed_bfloat16")(jnp.ones(3))
        >>> len(explanation), explanation[0].in_dtypes
        (1, ('float32',))
    """

    def __init__(self, records: Sequence[Record], *, has_dot: bool = False) -> None:
        self._records = tuple(records)
        self._has_dot = has_dot

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "Explanation": ...
    def __getitem__(self, index: int | slice) -> "Record | Explanation":
        if isinstance(index, slice):
            return Explanation(self._records[index], has_dot=self._has_dot)
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    @property
    def summary(self) -> Summary:
        """The figures that are printed first."""
        products = [record for record in self._records if record.group in _GROUPS]
        counts = collections.Counter[str]()
        work = collections.Counter[str]()
        for record in products:
            counts[record.group] += record.trips
            work[record.group] += record.flops * record.trips
        total = max(sum(work.values()), 1)
        wide = sorted((r for r in products if r.group == "float32"), key=lambda r: -r.flops * r.trips)
        return Summary(
            {group: (counts[group], work[group] / total) for group in _GROUPS},
            tuple(record for record in self._records if record.group == "kernel"),
            sum(record.casts for record in self._records),
            tuple(wide),
            tuple(record for record in products if self._has_dot and record.group != "replaced"),
        )

    def table(self, *, all: bool = False) -> str:  # noqa: A002  # the word that a reader would look for
        """Returns the decisions as text, one a line.

        Args:
            all: Whether to list those that concern no floating-point array too.
        """
        records = [record for record in self._records if all or _concerns_floats(record)]
        rows = [_COLUMNS, *map(_row, records)]
        widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
        return "\n".join("  ".join([*map(str.ljust, row[:-1], widths), row[-1]]) for row in rows)

    def __str__(self) -> str:
        return f"{_summarized(self.summary, self._records)}\n\n{self.table()}"

    __repr__ = __str__


def _summarized(summary: Summary, records: Sequence[Record]) -> str:
    total = max(sum(record.flops * record.trips for record in records), 1)
    parts = [
        f"{count} {_GROUPS[group]} ({share:.1%} of FLOPs)"
        for group, (count, share) in summary.products.items()
        if count
    ]
    lines = [
        f"Matrix products and convolutions: {', '.join(parts) or 'none'}. Operands cast: {summary.casts}.",
        *(f"  float32, {r.flops * r.trips / total:.1%}: {_place(r)}: {r.reason}" for r in summary.float32),
        *(f"  dot= not applied: {_place(r)}: {r.reason}" for r in summary.not_replaced),
        *(f"  kernel {r.primitive} on {', '.join(r.in_dtypes)}, as written: {_place(r)}" for r in summary.kernels),
    ]
    return "\n".join(lines)


def _place(record: Record) -> str:
    """Returns file, line and function, without the folders that are too much."""
    *folders, place = record.source.split("/")
    while folders and len(place) + len(folders[-1]) < _WIDEST:
        place = f"{folders.pop()}/{place}"
    return place


def _concerns_floats(record: Record) -> bool:
    return any("float" in dtype for dtype in (*record.in_dtypes, *record.out_dtypes))


def _row(record: Record) -> tuple[str, ...]:
    dtypes = [", ".join(map(_short, dtypes)) for dtypes in (record.in_dtypes, record.out_dtypes)]
    scope = record.scope if len(record.scope) <= _WIDEST else f"...{record.scope[3 - _WIDEST :]}"
    return (scope, record.primitive, record.op_class, record.tag, *dtypes, _place(record), record.reason)


def _short(dtype: str) -> str:
    return dtype.replace("bfloat", "bf").replace("float", "f").replace("uint", "u").replace("int", "i")


def explain(
    fun: Callable[..., Any],
    policy: str | Policy | PolicyMap,
    *,
    rules: Rule | Sequence[Rule] = (),
    ops: Mapping[str, Op] | None = None,
    dot: Callable[..., Any] | None = None,
    accumulation_dtype: Any = None,
) -> Callable[..., Explanation]:
    """Tells what ``autocast`` does to every equation of a function, and why. Nothing is computed.

    Give ``jax.grad(fun)`` to see the backward pass. For Flax models there are ``linen.explain`` and ``nnx.explain``.

    Args:
        fun: The function.
        policy: As for ``autocast``.
        rules: As for ``autocast``.
        ops: As for ``autocast``.
        dot: As for ``autocast``.
        accumulation_dtype: As for ``autocast``.

    Returns:
        A function with the arguments of ``fun`` (arrays, or ``jax.ShapeDtypeStruct`` in their place) that returns an
        ``Explanation``: a sequence of records with the fields ``scope`` (name scopes), ``source`` (file and line),
        ``primitive``, ``op_class``, ``tag`` (how precise the results are), ``in_dtypes``, ``out_dtypes``, ``reason``,
        and for products ``flops`` and ``trips``. Printed, it opens with its ``summary``.

    Raises:
        InvalidRuleError: As ``autocast``, and so for the other errors.

    Example:
        >>> explanation = jmp.explain(lambda x, w: jnp.exp(x @ w), "mixed_bfloat16")(jnp.ones((2, 8)), jnp.ones((8, 4)))
        >>> for decision in explanation:
        ...     print(decision.primitive, decision.in_dtypes, decision.tag)
        dot_general ('bfloat16', 'bfloat16') HIGH
        exp ('float32',) HIGH
        >>> print(str(explanation).splitlines()[0])
        Matrix products and convolutions: 1 in 16 bits (100.0% of FLOPs). Operands cast: 2.

    References:
        TensorFlow's ``auto_mixed_precision`` writes the same to a file when asked for its debug log.
    """
    settings = settings_from(policy, rules=rules, ops=ops, dot=dot, accumulation_dtype=accumulation_dtype)
    return lambda *args, **kwargs: explained(fun, settings, args, kwargs)[0]


def explained(
    fun: Callable[..., Any], settings: Settings, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Explanation, Any]:
    """Explains a call under settings that have been checked; also returns what it returns, without its numbers."""
    interpreter = Interpreter(settings, HANDLERS, keeps_records=True)
    traced = trace(fun, args, kwargs, lambda leaf: is_traced(leaf) or isinstance(leaf, jax.ShapeDtypeStruct))
    results = jax.eval_shape(lambda arrays: interpreter.run(traced.jaxpr, arrays), traced.arrays)
    has_dot = settings.dot is not None or any(rule.dot is not None for rule in settings.rules)
    return Explanation(interpreter.records, has_dot=has_dot), traced.output(results)
