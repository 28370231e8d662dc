"""``diff``: where two runs or configurations differ, the first difference first."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jmp_lite._functions import read_on_host
from jmp_lite._messages import quote


class Difference(NamedTuple):
    """A difference.

    Attributes:
        path: Keys and numbers, joined by slashes.
        first: Value in the first.
        second: Value in the second.

    Example:
        >>> [difference] = jmp.analysis.diff({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 0})
        >>> difference.path, difference.first, difference.second
        ('lr', 0.1, 0.2)
    """

    path: str
    first: Any
    second: Any

    def __str__(self) -> str:
        return f"{self.path or 'they'}: {quote(self.first, 80)} and {quote(self.second, 80)}"


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


#: Stands for what one of the two does not have.
MISSING = _Missing()


def diff(first: Any, second: Any, *, rtol: float = 0.0) -> tuple[Difference, ...]:
    """Compares two recorded runs or two configurations, and returns their differences in the order of the first.

    Args:
        first: Anything made of mappings, sequences, frozen dataclasses, numbers, names and arrays, or that has a method
            ``to_dict``: histories of ``jmp.metrics``, ``Ranges``, an ``Audit``, policies, settings of a run.
        second: The same from the other run.
        rtol: Numbers that are this close, relative to the larger, count as equal; so do two NaN.

    Returns:
        Differences; empty if both are equal. The runs diverge at the first.

    Raises:
        InvalidAnalysisError: If an array is traced, as inside ``jax.jit``.

    Example:
        >>> runs = [[{"loss": 2.0, "loss_scale": 8.0}, {"loss": x, "loss_scale": 8.0}] for x in (1.5, 1.25)]
        >>> for difference in jmp.analysis.diff(*runs):
        ...     print(difference)
        1/loss: 1.5 and 1.25
    """
    return tuple(_differences(first, second, (), rtol))


def _differences(first: Any, second: Any, path: tuple[str, ...], rtol: float) -> Iterator[Difference]:
    first, second = _plain(first), _plain(second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in dict.fromkeys([*first, *second]):
            yield from _differences(first.get(key, MISSING), second.get(key, MISSING), (*path, str(key)), rtol)
    elif _is_sequence(first) and _is_sequence(second):
        for index in range(max(len(first), len(second))):
            a, b = (one[index] if index < len(one) else MISSING for one in (first, second))
            yield from _differences(a, b, (*path, str(index)), rtol)
    elif not _are_equal(first, second, rtol):
        yield Difference("/".join(path), first, second)


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if hasattr(value, "_asdict"):
        return value._asdict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return np.asarray(read_on_host(value, "diff")).tolist()
    return value


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _are_equal(first: Any, second: Any, rtol: float) -> bool:
    if isinstance(first, (int, float)) and isinstance(second, (int, float)):
        return math.isclose(first, second, rel_tol=rtol) or (first != first and second != second)  # noqa: PLR0124  # NaN
    return bool(first == second)
