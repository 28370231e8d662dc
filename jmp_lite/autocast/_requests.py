"""What the user asked for, and whether the program had any use for it: the lines that call it are told once if not."""

import re

from jmp_lite._messages import first_few, nearest, users_frame, warn
from jmp_lite._patterns import nearest_modules
from jmp_lite.autocast._decision import Decision, How
from jmp_lite.autocast._ops import PRODUCTS
from jmp_lite.autocast._rules import Pattern, Precision, Settings
from jmp_lite.errors import UnmatchedRuleWarning

#: How many letters of the name of a primitive may be wrong for another name to be suggested.
_TYPOS = 2
CHANGES_NONE = "changes no matmul"


class Requests:
    """The settings that have changed nothing so far, in one function or in a program of one."""

    def __init__(self, settings: Settings, *, is_explained: bool) -> None:
        """Starts with all settings; where decisions are explained, what matmuls do not follow is said there."""
        self._settings = settings
        self._is_explained = is_explained
        self.unmatched = dict(settings.patterns)
        self.overruled = list(settings.rules)
        self._ops = set(settings.ops_by_name)
        self._dots = [f"The {rule}" for rule in settings.rules if rule.dot] + ["dot="] * (settings.dot is not None)
        self.followed: set[str] = set()
        self.refused: dict[str, str] = {}
        """Why the first matmul does not run as a rule, or ``dot=``, asks."""
        self.asked: set[tuple[str, str]] = set()

    def resolved(self, scope: str, primitive: str) -> None:
        """Notes that the precision of a primitive in a scope was asked for."""
        if (scope, primitive) in self.asked:
            return
        self.asked.add((scope, primitive))
        for name in [name for name, pattern in self.unmatched.items() if pattern.holds(scope, primitive)]:
            del self.unmatched[name]
        rule = self._settings.rule_for(scope, primitive)
        self.overruled = [other for other in self.overruled if other is not rule]

    def weigh(self, primitive: str, precision: Precision, decision: Decision) -> None:
        """Notes whether a matmul runs as it is asked to."""
        if primitive not in PRODUCTS:
            return
        rule, is_replaced, follows = f"The {precision.reason}", decision.how is How.DOT, dict[str, bool]()
        if precision.asked:
            follows[rule] = is_replaced if precision.asked == "dot" else decision.dtype == precision.dtype
        if precision.asked != "dot" and precision.dot is not None:
            follows["dot="] = is_replaced
        self.followed.update(name for name, does in follows.items() if does)
        for name in follows:
            self.refused.setdefault(name, f"{primitive} does not run as it asks: {decision.reason}")

    def include(self, inner: "Requests") -> None:
        """Notes what a program inside has any use for."""
        self.unmatched = {name: self.unmatched[name] for name in inner.unmatched if name in self.unmatched}
        self.overruled = [rule for rule in self.overruled if any(rule is other for other in inner.overruled)]
        self.followed |= inner.followed
        self.refused = inner.refused | self.refused
        self.asked |= inner.asked

    def warn(self, told: set[tuple[str, int]]) -> None:
        """Warns about what changed nothing.

        Args:
            told: Lines of the user that have been warned; this one is added.

        Warns:
            UnmatchedRuleWarning: About each of them.
        """
        frame = users_frame()
        line = frame.f_code.co_filename, frame.f_lineno
        if line in told:
            return
        for text in [*self._of_patterns(), *self._of_rules(), *self._of_ops(), *self._of_matmuls()]:
            told.add(line)
            warn(text, UnmatchedRuleWarning)

    def _of_patterns(self) -> list[str]:
        return [
            f"The {name} matched no equation of the program and does nothing. {self._meant(pattern)}"
            for name, pattern in self.unmatched.items()
        ]

    @property
    def _primitives(self) -> list[str]:
        return sorted({primitive for _, primitive in self.asked})

    def _meant(self, pattern: Pattern) -> str:
        """Says what comes near a pattern that matched nothing."""
        known, (scope, primitive) = self._primitives, (pattern.scope or "", pattern.primitive)
        if primitive is not None and not any(re.fullmatch(primitive, name) for name in known):
            return _nearest_primitive(primitive, known)
        # As many typing errors as would make of another name a primitive are too many.
        for name in nearest(scope, known, len(scope) // 5)[:1]:
            return f"Did you mean the primitive? Write Rule(primitive={name!r}, ...)."
        paths = sorted({pattern.path(path) for path, _ in self.asked})
        near = " and ".join(map(repr, nearest_modules(scope, paths)[:3]))
        if not near:
            return "The program has no name scopes; open one with jax.named_scope."
        return f"The nearest name scopes are {near}. jmp.explain shows the scopes of all equations."

    def _of_rules(self) -> list[str]:
        overruled = [str(rule) for rule in self.overruled if str(rule) not in self.unmatched]
        return [
            f"The {rule} decides nothing: wherever it matches, an earlier rule or a region decides. Put it first, or "
            "delete it."
            for rule in overruled
        ]

    def _of_ops(self) -> list[str]:
        known = self._primitives
        if any(name.startswith("custom_vjp") for name in known):
            return []  # its backward rule, which is traced later if at all, may hold them
        return [
            f"ops= names {name!r}, and the program has no such primitive. {_nearest_primitive(name, known)}"
            for name in sorted(self._ops.difference(known))
        ]

    def _of_matmuls(self) -> list[str]:
        settled = self.followed | {f"The {name}" for name in self.unmatched}
        reasons = {} if self._is_explained else dict.fromkeys(self._dots, "there is none for it") | self.refused
        return [
            f"{name} {CHANGES_NONE}: {reason}. jmp.explain shows all decisions."
            for name, reason in reasons.items()
            if name not in settled
        ]


def _nearest_primitive(name: str, known: list[str]) -> str:
    near = nearest(name, known, _TYPOS)
    return f"Did you mean {near[0]!r}?" if near else f"The program has {first_few(known)}."
