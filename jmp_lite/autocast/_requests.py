"""What the user asked for, and whether the program had any use for it: what had none warns once."""

import warnings

from jmp_lite._messages import first_few, nearest
from jmp_lite._patterns import nearest_modules
from jmp_lite.autocast._rules import Precision, Settings
from jmp_lite.errors import UnmatchedRuleWarning

#: How many letters of the name of a primitive may be wrong for another name to be suggested.
_TYPOS = 2
REPLACED_NONE = "replaced no matmul of the program"


class Requests:
    """The settings that have changed nothing so far."""

    def __init__(self, settings: Settings, *, is_explained: bool) -> None:
        """Starts with all settings; where decisions are explained, matmuls that are not replaced are too."""
        self._settings = settings
        self._unmatched = dict(settings.patterns)
        self._overruled = list(settings.rules)
        self._ops = set(settings.ops_by_name)
        of_rules = {f"dot= of the {rule}" for rule in settings.rules if rule.dot}
        self._dots = set() if is_explained else of_rules | ({"dot="} if settings.dot else set())
        self._scopes: set[str] = set()
        self._primitives: set[str] = set()

    def resolved(self, scope: str, primitive: str) -> None:
        """Notes that the precision of a primitive in a scope was asked for."""
        self._scopes.add(scope)
        for name in [name for name, (_, holds) in self._unmatched.items() if holds(scope, primitive)]:
            del self._unmatched[name]
        rule = self._settings.rule_for(scope, primitive)
        self._overruled = [other for other in self._overruled if other is not rule]

    def met(self, primitive: str) -> None:
        """Notes that the program has a primitive."""
        self._primitives.add(primitive)

    def replaced(self, precision: Precision) -> None:
        """Notes that a matmul was replaced."""
        of_rule = f"dot= of the {precision.reason}"
        self._dots.discard(of_rule if of_rule in self._dots else "dot=")

    def warn(self) -> None:
        """Warns about what changed nothing.

        Warns:
            UnmatchedRuleWarning: About each of them.
        """
        for text in [*self._of_patterns(), *self._of_rules(), *self._of_ops(), *self._of_dots()]:
            warnings.warn(text, UnmatchedRuleWarning, stacklevel=2)
        self._unmatched, self._overruled, self._ops, self._dots = {}, [], set(), set()

    def _of_patterns(self) -> list[str]:
        near = {
            name: " and ".join(map(repr, nearest_modules(pattern, sorted(self._scopes))[:3]))
            for name, (pattern, _) in self._unmatched.items()
        }
        return [
            f"The {name} matched no equation of the program and does nothing. The nearest name scopes are "
            f"{scopes or 'none: the program has no name scopes'}. jmp.explain shows the scopes of all equations."
            for name, scopes in near.items()
        ]

    def _of_rules(self) -> list[str]:
        overruled = [str(rule) for rule in self._overruled if str(rule) not in self._unmatched]
        return [
            f"The {rule} decides nothing: wherever it matches, an earlier rule or a region decides. Put it first, or "
            "delete it."
            for rule in overruled
        ]

    def _of_ops(self) -> list[str]:
        known = sorted(self._primitives)
        near = {name: nearest(name, known, _TYPOS) for name in sorted(self._ops - self._primitives)}
        return [
            f"ops= names {name!r}, and the program has no such primitive. "
            + (f"Did you mean {names[0]!r}?" if names else f"It has {first_few(known)}.")
            for name, names in near.items()
        ]

    def _of_dots(self) -> list[str]:
        return [f"{name} {REPLACED_NONE}. jmp.explain gives the reason for each matmul." for name in sorted(self._dots)]
