"""``explain``: what autocast would do to every equation, and why."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import jax

from jmp_lite._policy import Policy, PolicyMap
from jmp_lite.autocast._api import HANDLERS, is_traced, settings_from, trace
from jmp_lite.autocast._interpreter import Interpreter, Record
from jmp_lite.autocast._ops import Op
from jmp_lite.autocast._rules import Rule

_COLUMNS = ("scope", "primitive", "class", "tag", "operands", "results", "source", "reason")
#: Longer entries are cut in the middle; not those of the last column.
_WIDEST = 40


class Explanation(Sequence[Record]):
    """The decisions about a program, in its order; what a loop or a call holds follows it. Printed as a table.

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

    def __str__(self) -> str:
        rows = [_COLUMNS, *map(_row, self._records)]
        widths = [min(_WIDEST, max(map(len, column))) for column in list(zip(*rows, strict=True))[:-1]]
        lines = ["  ".join([*map(_cut, row[:-1], widths), row[-1]]) for row in rows]
        return "\n".join(lines)

    __repr__ = __str__


def _row(record: Record) -> tuple[str, ...]:
    dtypes = [", ".join(map(_short, dtypes)) for dtypes in (record.in_dtypes, record.out_dtypes)]
    return (record.scope, record.primitive, record.op_class, record.tag, *dtypes, record.source, record.reason)


def _short(dtype: str) -> str:
    return dtype.replace("bfloat", "bf").replace("float", "f").replace("uint", "u").replace("int", "i")


def _cut(cell: str, width: int) -> str:
    if len(cell) <= width:
        return cell.ljust(width)
    head = (width - 3) // 2
    return f"{cell[:head]}...{cell[len(cell) - (width - 3 - head) :]}"


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

    Give ``jax.grad(fun)`` to see the backward pass.

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
        ``primitive``, ``op_class``, ``tag`` (how precise the results are), ``in_dtypes``, ``out_dtypes`` and
        ``reason``.

    Raises:
        InvalidRuleError: As ``autocast``, and so for the other errors.

    Example:
        >>> explanation = jmp.explain(lambda x, w: jnp.exp(x @ w), "mixed_bfloat16")(jnp.ones((2, 3)), jnp.ones((3, 4)))
        >>> for decision in explanation:
        ...     print(decision.primitive, decision.in_dtypes, decision.tag)
        dot_general ('bfloat16', 'bfloat16') LOW
        exp ('float32',) HIGH

    References:
        TensorFlow's ``auto_mixed_precision`` writes the same to a file when asked for its debug log.
    """
    settings = settings_from(policy, rules=rules, ops=ops, dot=dot, accumulation_dtype=accumulation_dtype)

    def explained(*args: Any, **kwargs: Any) -> Explanation:
        interpreter = Interpreter(settings, HANDLERS, keeps_records=True)
        traced = trace(fun, args, kwargs, lambda leaf: is_traced(leaf) or isinstance(leaf, jax.ShapeDtypeStruct))
        jax.eval_shape(functools.partial(interpreter.run, traced.jaxpr), traced.arrays)
        return Explanation(interpreter.records)

    return explained
