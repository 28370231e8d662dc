"""What the user asked for, and whether the program had any use for it: what had none warns once."""

import warnings

from jmp_lite._messages import first_few, nearest
from jmp_lite._patterns import nearest_modules
from jmp_lite.autocast._decision import Decision, How
from jmp_lite.autocast._ops import PRODUCTS
from jmp_lite.autocast._rules import Precision, Settings
from jmp_lite.errors import UnmatchedRuleWarning

#: How many letters of the name of a primitive may be wrong for another name to be suggested.
_TYPOS = 2
CHANGES_NONE = "changes no matmul"


class Requests:
    """The settings that have changed nothing so far."""

    def __init__(self, settings: Settings, *, is_explained: bool) -> None:
        """Starts with all settings; where decisions are explained, what matmuls do not follow is said there."""
        self._settings = settings
        self._is_explained = is_explained
        self._unmatched = dict(settings.patterns)
        self._overruled = list(settings.rules)
        self._ops = set(settings.ops_by_name)
        self._dots = [f"The {rule}" for rule in settings.rules if rule.dot] + ["dot="] * (settings.dot is not None)
        self._followed: set[str] = set()
        self._refused: dict[str, str] = {}
        """Why the first matmul does not run as a rule, or ``dot=``, asks."""
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

    def weigh(self, primitive: str, precision: Precision, decision: Decision) -> None:
        """Notes whether a matmul runs as it is asked to."""
        if primitive not in PRODUCTS:
            return
        rule, is_replaced, follows = f"The {precision.reason}", decision.how is How.DOT, dict[str, bool]()
        if precision.asked:
            follows[rule] = is_replaced if precision.asked == "dot" else decision.dtype == precision.dtype
        if precision.asked != "dot" and precision.dot is not None:
            follows["dot="] = is_replaced
        self._followed.update(name for name, does in follows.items() if does)
        for name in follows:
            self._refused.setdefault(name, f"{primitive} does not run as it asks: {decision.reason}")

    def warn(self) -> None:
        """Warns about what changed nothing.

        Warns:
            UnmatchedRuleWarning: About each of them.
        """
        for text in [*self._of_patterns(), *self._of_rules(), *self._of_ops(), *self._of_matmuls()]:
            warnings.warn(text, UnmatchedRuleWarning, stacklevel=2)
        self._unmatched, self._overruled, self._ops = {}, [], set()
        self._followed.update(self._dots, self._refused)  # said once

    def _of_patterns(self) -> list[str]:
        near = {
            name: " and ".join(map(repr, nearest_modules(pattern, sorted(self._scopes))[:3]))
            for name, (pattern, _) in self._unmatched.items()
        }
        where = "jmp.explain shows the scopes of all equations."
        none = "The program has no name scopes; open one with jax.named_scope."
        return [
            f"The {name} matched no equation of the program and does nothing. "
            + (f"The nearest name scopes are {scopes}. {where}" if scopes else none)
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
        if any(name.startswith("custom_vjp") for name in self._primitives):
            return []  # its backward rule, which is traced later if at all, may hold them
        known = sorted(self._primitives)
        near = {name: nearest(name, known, _TYPOS) for name in sorted(self._ops - self._primitives)}
        return [
            f"ops= names {name!r}, and the program has no such primitive. "
            + (f"Did you mean {names[0]!r}?" if names else f"It has {first_few(known)}.")
            for name, names in near.items()
        ]

    def _of_matmuls(self) -> list[str]:
        settled = self._followed | {f"The {name}" for name in self._unmatched}
        reasons = {} if self._is_explained else dict.fromkeys(self._dots, "there is none for it") | self._refused
        return [
            f"{name} {CHANGES_NONE}: {reason}. jmp.explain shows all decisions."
            for name, reason in reasons.items()
            if name not in settled
        ]
