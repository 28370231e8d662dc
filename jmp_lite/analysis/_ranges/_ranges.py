"""Ranges by name, of a tree or of the arguments, equations and results of a program."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._dtypes import is_floating
from jmp_lite._functions import read_on_host
from jmp_lite._text import table as laid_out
from jmp_lite._tree import path_string
from jmp_lite.analysis._ranges._range import Range, parse_format, range_of
from jmp_lite.analysis._ranges._tally import Tally, merged, stacked, tally
from jmp_lite.analysis._sites import Site


class Row(NamedTuple):
    """The array that a range describes.

    Attributes:
        kind: ``argument``, ``equation``, ``result``, or the name that you gave a tree.
        name: The path of a leaf; ``out`` for an equation, and for a matmul also ``lhs`` and ``rhs``.
        site: The equation; ``None`` for a leaf.

    Example:
        >>> _, ranges = jmp.analysis.collect(jnp.matmul)(jnp.ones((2, 3)), jnp.ones((3, 2)))
        >>> list(map(str, ranges.rows))
        ['argument 0', 'argument 1', 'dot_general lhs', 'dot_general out', 'dot_general rhs', 'result']
    """

    kind: str
    name: str
    site: Site | None = None

    def __str__(self) -> str:
        if self.site is None:
            return f"{self.kind} {self.name}".strip()
        direction = " backward" if self.site.is_backward else ""
        where = "/".join(filter(None, (self.site.scope, self.site.primitive)))
        return f"{where}{direction} {self.name}"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tallies"], meta_fields=["rows"])
@dataclasses.dataclass(frozen=True)
class Ranges(Mapping[str, Range]):
    """Ranges of many arrays: a pytree, and on the host a mapping from names to ``Range``.

    ``ranges + ranges`` adds two steps, also inside ``jax.jit``. Leading axes from a ``scan`` or a ``pmap`` are summed
    too. A name, or a part of one, looks up the first row that has it.

    Attributes:
        rows: The array of each range.

    Example:
        >>> grads = {"w": jnp.array([1e-9, 0.0, 3.0]), "b": jnp.zeros(2)}
        >>> ranges = jmp.analysis.ranges(grads, "gradient")
        >>> print(ranges["w"].zero, ranges["w"].fates["float16"].underflow)
        1 0.5
    """

    rows: tuple[Row, ...]
    tallies: Tally

    def __add__(self, other: "Ranges") -> "Ranges":
        if not isinstance(other, Ranges):
            return NotImplemented
        if self.rows != other.rows:
            raise ValueError(
                f"Ranges of different programs cannot be added up: {len(self.rows)} rows and {len(other.rows)}. Add "
                "those that one function returned for arguments of one shape."
            )
        return Ranges(self.rows, merged(self.tallies, other.tallies))

    def __radd__(self, other: Any) -> "Ranges":
        """Lets ``sum`` start from 0."""
        return self if other == 0 and isinstance(other, int) else NotImplemented

    @functools.cached_property
    def pairs(self) -> tuple[tuple[Row, Range], ...]:
        """Each row with its range; read from the device once."""
        return tuple((row, range_of(one)) for row, one in self._on_host())

    def _on_host(self) -> Iterator[tuple[Row, Tally]]:
        """Yields each row with its tally, summed over leading axes."""
        tallies: Tally = read_on_host(self.tallies, "Ranges")
        leading = tallies.power.ndim - 1
        for index, row in enumerate(self.rows):
            yield row, _summed(Tally(*(np.take(field, index, axis=leading) for field in tallies)))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return map(str, self.rows)

    def __getitem__(self, name: str) -> Range:
        exact = [found for row, found in self.pairs if str(row) == name]
        matching = exact or [found for row, found in self.pairs if name in str(row)]
        if not matching:
            raise KeyError(f"No range of {name!r}. There are ranges of {', '.join(self)[:500]}.")
        return matching[0]

    def by_scope(self, depth: int = 1) -> dict[str, Range]:
        """Returns the ranges of modules: of all equations whose name scopes start alike, and likewise of leaves.

        Args:
            depth: How many name scopes, or keys of a path, to group modules by.
        """
        groups: dict[str, list[Tally]] = {}
        for row, one in self._on_host():
            path = row.name if row.site is None else row.site.scope
            name = f"{row.kind} {'/'.join(path.split('/')[:depth])}".strip()
            groups.setdefault(name, []).append(one)
        return {name: range_of(functools.reduce(_merged_on_host, group)) for name, group in groups.items()}

    def table(self, format: str = "float16", *, limit: int | None = 40) -> str:  # noqa: A002  # what it is
        """Returns the ranges as text, those that lose most in a format first.

        Args:
            format: The format to judge by.
            limit: How many rows to print; ``None`` for all.

        Raises:
            UnknownDtypeError: If ranges do not know the format.
        """
        format = parse_format(format)  # noqa: A001
        pairs = sorted(self.pairs, key=lambda pair: _severity(pair[1], format), reverse=True)
        header = ("what", "count", "nan", "inf", "zero", "largest", "smallest", "rms", "overflow", "underflow", "error")
        text = laid_out(header, [_cells(row, found, format) for row, found in pairs[:limit]])
        more = [f"... and {len(pairs) - limit} more"] if limit is not None and len(pairs) > limit else []
        return "\n".join([f"As {format} would hold them:", text, *more])

    def __str__(self) -> str:
        return self.table()

    __repr__ = __str__
    __hash__ = object.__hash__

    def to_dict(self) -> list[dict[str, Any]]:
        """Returns plain data, one dictionary for each row."""
        return [
            {
                "kind": row.kind,
                "name": row.name,
                "site": row.site._asdict() if row.site else None,
                **found.to_dict(),
            }
            for row, found in self.pairs
        ]


def ranges(tree: Any, kind: str = "") -> Ranges:
    """Returns the ranges of the floating arrays in a tree, by their paths: of parameters, gradients, updates, states.

    Args:
        tree: A pytree. Leaves that are not floating arrays are left out.
        kind: What to call the leaves, such as ``"gradient"``.

    Returns:
        ``Ranges``, also inside ``jax.jit``.

    Example:
        >>> params = {"w": jnp.full((4, 4), 1e-5), "b": jnp.zeros(4)}
        >>> print(jmp.analysis.ranges(params, "parameter")["w"].fates["float16"].subnormal)
        1.0
    """
    pairs = named(kind, tree)
    return Ranges(tuple(row for row, _ in pairs), stacked([tally(array) for _, array in pairs]))


def named(kind: str, tree: Any) -> list[tuple[Row, Any]]:
    """Returns the floating arrays of a tree with their names."""
    return [
        (Row(kind, path_string(path)), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if is_floating(leaf)
    ]


def _severity(found: Range, name: str) -> tuple[float, ...]:
    fate = found.fates[name]
    return (found.nan + found.inf, fate.overflow, fate.underflow, fate.rms_error)


def _cells(row: Row, found: Range, name: str) -> tuple[str, ...]:
    fate = found.fates[name]
    shares = (found.zero / max(found.count, 1), fate.overflow, fate.underflow)
    zero, overflow, underflow = (f"{share:.2%}" if share else "" for share in shares)
    counts = (str(found.count), *(str(n) if n else "" for n in (found.nan, found.inf)), zero)
    numbers = (f"{x:.3g}" for x in (found.largest, found.smallest, found.rms))
    return (str(row), *counts, *numbers, overflow, underflow, f"{fate.rms_error:.1e}")


def _summed(one: Tally) -> Tally:
    """Sums over leading axes, on the host."""
    if np.ndim(one.power) == 0:
        return one
    flat = [np.reshape(field, (np.size(one.power), *np.shape(field)[np.ndim(one.power) :])) for field in one]
    parts = [Tally(*fields) for fields in zip(*flat, strict=True)]
    return functools.reduce(_merged_on_host, parts)


def _merged_on_host(first: Tally, second: Tally) -> Tally:
    """Like ``merged``, but counts cannot overflow."""
    summed: Tally = jax.device_get(merged(*(one._replace(classes=jnp.zeros(0, jnp.uint32)) for one in (first, second))))
    classes: Any = np.asarray(first.classes, np.int64) + np.asarray(second.classes, np.int64)
    return summed._replace(classes=classes)
