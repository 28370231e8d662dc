"""What an analysis has to say: findings, each of a kind that has one row in a table."""

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
KINDS: Mapping[str, Kind] = {}

_ORDER = {"error": 0, "warning": 1, "note": 2}


class Finding(NamedTuple):
    """Something that an analysis found.

    Attributes:
        kind: A key of ``KINDS``.
        message: What is the case, with its figures, as one sentence.
        source: The user's file, line and function.
        scope: Name scopes, or the path of a parameter.
        share: Of what it concerns, such as FLOPs or elements; orders findings of one severity.
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
    """Returns findings without repetitions, the worst first."""
    kinds = list(KINDS)
    return tuple(
        sorted(dict.fromkeys(findings), key=lambda f: (_ORDER[f.severity], -f.share, kinds.index(f.kind), quote(f)))
    )
