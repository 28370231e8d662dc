"""``explain``: what autocast would do to every equation, and why; the matmuls first."""

import collections
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import jax

from jmp_lite._functions import check_function
from jmp_lite._policy import Policy, PolicyMap
from jmp_lite._text import table as laid_out
from jmp_lite.autocast._api import HANDLERS, is_array_or_shape, settings_from, trace
from jmp_lite.autocast._interpreter import Interpreter
from jmp_lite.autocast._ops import Op
from jmp_lite.autocast._record import Record
from jmp_lite.autocast._rules import Rule, Settings

_COLUMNS = ("scope", "primitive", "class", "tag", "operands", "results", "source", "reason")
#: Longer scopes and paths lose folders and outer scopes; longer lists of dtypes their end.
_WIDEST = 48
_GROUPS = {
    "low": "in 16 bits",
    "float32": "in float32",
    "outer": "too small for a matrix unit",
    "replaced": "replaced by dot= or ops=",
    "other": "of other dtypes, as written",
}


class Summary(NamedTuple):
    """Figures about a program under autocast.

    Example:
        >>> x, w = jnp.ones((2, 8)), jnp.ones((8, 4))
        >>> summary = jmp.explain(lambda x, w: jnp.exp(x @ w), "mixed_bfloat16")(x, w).summary
        >>> summary.matmuls["low"], summary.casts
        ((1, 1.0), 2)
    """

    matmuls: Mapping[str, tuple[int, float]]
    """Number of matmuls and convolutions, and their share of all FLOPs of matmuls: those with operands of 16
    bits or fewer (``low``), in ``float32``, of a few terms or two vectors (``outer``), ``replaced``, and of other
    dtypes (``other``).
    One in a scan counts as often as the scan runs it, in a while loop once; in a ``cond`` each branch counts; in a
    ``shard_map`` one device does. What kernels and linear algebra do inside does not count."""
    kernels: tuple[Record, ...]
    """Kernels and foreign calls, which run as written."""
    casts: int
    """Operands that are cast, each once, in loops too."""
    float32: tuple[Record, ...]
    """The matmuls in float32, the largest first."""
    not_replaced: tuple[Record, ...]
    """With ``dot=``, as an argument or in a rule: the matmuls that it was not applied to, the largest first."""


class Explanation(Sequence[Record]):
    """The decisions about a program, in program order; the equations inside a loop or a call follow it.

    It prints as a summary and a table of the equations on floats.

    Example:
        >>> explanation = jmp.explain(jnp.exp, "mixed_bfloat16")(jnp.ones(3))
        >>> len(explanation), explanation[0].in_dtypes
        (1, ('float32',))
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = tuple(records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "Explanation": ...
    def __getitem__(self, index: int | slice) -> "Record | Explanation":
        if isinstance(index, slice):
            return Explanation(self._records[index])
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    @property
    def summary(self) -> Summary:
        """The totals that are printed first."""
        counts = collections.Counter[str]()
        work = collections.Counter[str]()
        for record in self._records:
            counts[record.group] += record.trips
            work[record.group] += record.flops * record.trips
        total = _flops(self._records)
        costliest = sorted(self._records, key=lambda record: -record.flops * record.trips)
        return Summary(
            {group: (counts[group], work[group] / total) for group in _GROUPS},
            tuple(record for record in self._records if record.group == "kernel"),
            sum(record.casts for record in self._records),
            tuple(record for record in costliest if record.group == "float32"),
            tuple(record for record in costliest if record.skips_dot),
        )

    def table(self, *, all: bool = False) -> str:  # noqa: A002  # the word that a reader would look for
        """Returns the decisions as text, one per line.

        Args:
            all: Whether to also list equations on no floating-point array.

        Example:
            >>> explanation = jmp.explain(lambda x: x + 1, "mixed_bfloat16")(jnp.arange(3))
            >>> [len(explanation.table(all=everything).splitlines()) for everything in (False, True)]
            [1, 2]
        """
        records = [record for record in self._records if all or _concerns_floats(record)]
        return laid_out(_COLUMNS, [_row(record) for record in records])

    def __str__(self) -> str:
        return f"{_summarized(self.summary, self._records)}\n\n{self.table()}"

    __repr__ = __str__


def _flops(records: Sequence[Record]) -> int:
    """Counts the FLOPs of all matmuls, and 1 if there are none, to divide by."""
    return max(sum(record.flops * record.trips for record in records), 1)


def _summarized(summary: Summary, records: Sequence[Record]) -> str:
    total = _flops(records)

    def line(record: Record, *what: str) -> str:
        share = f"{record.flops * record.trips / total:.1%}"
        return f"  {', '.join([*what, share])}: {_where(record)}: {record.reason}"

    parts = [
        f"{count} {_GROUPS[group]} ({share:.1%} of FLOPs)" for group, (count, share) in summary.matmuls.items() if count
    ]
    skipped = "dot= not applied"
    loops = {record.primitive for record in records} & {"while", "cond"} if parts else ()
    lines = [
        f"Matmuls and convolutions: {', '.join(parts) or 'none'}. Operands cast: {summary.casts}.",
        *(["  A body of a while loop counts once."] if "while" in loops else []),
        *(["  Each branch of a cond counts."] if "cond" in loops else []),
        *(line(record, "float32", *[skipped] * record.skips_dot) for record in summary.float32),
        *(line(record, skipped) for record in summary.not_replaced if record.group != "float32"),
        *(f"  kernel {r.primitive} on {_listed(r.in_dtypes)}, as written: {_where(r)}" for r in summary.kernels),
    ]
    return "\n".join(lines)


def _where(record: Record) -> str:
    """Returns the source line and the scope: a library's line serves many layers."""
    return " in ".join(filter(None, (_place(record), _tail(record.scope)))) or "somewhere"


def _place(record: Record) -> str:
    """Returns file, line and function; of nested functions the innermost."""
    return _tail(re.sub(r"\(.*<locals>\.", "(", record.source))


def _tail(path: str) -> str:
    """Drops folders or outer scopes that do not fit; never cuts a name."""
    *outer, tail = path.split("/")
    while outer and len(f".../{outer[-1]}/{tail}") <= _WIDEST:
        tail = f"{outer.pop()}/{tail}"
    return f".../{tail}" if outer else tail


def _concerns_floats(record: Record) -> bool:
    return any("float" in dtype for dtype in (*record.in_dtypes, *record.out_dtypes))


def _row(record: Record) -> tuple[str, ...]:
    dtypes = (_listed(record.in_dtypes), _listed(record.out_dtypes))
    about = (_tail(record.scope), record.primitive, record.op_class, record.tag)
    return (*about, *dtypes, _place(record), record.reason)


def _listed(dtypes: Sequence[str]) -> str:
    """Abbreviates dtypes; names repeated ones once."""
    runs = [(dtype, len(list(run))) for dtype, run in itertools.groupby(map(_short, dtypes))]
    cell = ", ".join(f"{dtype} x{n}" if n > 4 else ", ".join([dtype] * n) for dtype, n in runs)
    return cell if len(cell) <= _WIDEST else f"{cell[:_WIDEST].rpartition(', ')[0]}, ..."


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
    """Shows what ``autocast`` does to every equation of a function, and why. Computes nothing.

    Pass ``jax.grad(fun)`` to see the backward pass. For Flax models use ``linen.explain`` and ``nnx.explain``.

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
        and for matmuls ``group``, ``flops`` (of one run) and ``trips`` (how often it runs). It prints its ``summary``
        first; ``table(all=True)`` also lists equations on no floats.

    Raises:
        InvalidRuleError: As in ``autocast``, which lists the other errors.

    Example:
        >>> explanation = jmp.explain(lambda x, w: jnp.exp(x @ w), "mixed_bfloat16")(jnp.ones((2, 8)), jnp.ones((8, 4)))
        >>> for decision in explanation:
        ...     print(decision.primitive, decision.in_dtypes, decision.tag)
        dot_general ('bfloat16', 'bfloat16') HIGH
        exp ('float32',) HIGH
        >>> print(str(explanation).splitlines()[0])
        Matmuls and convolutions: 1 in 16 bits (100.0% of FLOPs). Operands cast: 2.

    References:
        TensorFlow's ``auto_mixed_precision`` writes the same to a file as its debug log.
    """
    check_function(fun, "explain")
    settings = settings_from(policy, rules=rules, ops=ops, dot=dot, accumulation_dtype=accumulation_dtype)
    return lambda *args, **kwargs: explained(fun, settings, args, kwargs)[0]


def explained(
    fun: Callable[..., Any], settings: Settings, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Explanation, Any]:
    """Explains a call under checked settings; also returns its results as shapes."""
    check_function(fun, "explain")
    interpreter = Interpreter(settings, HANDLERS, keeps_records=True)
    traced = trace(fun, args, kwargs, is_array_or_shape)
    results = jax.eval_shape(lambda arrays: interpreter.run(traced.jaxpr, arrays), traced.arrays)
    return Explanation(interpreter.records), traced.output(results)
