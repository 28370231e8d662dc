"""The formats that ``recommend`` chooses from, and the rules for one choice per group of matmuls."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from jmp_lite.analysis._ranges._formats import INT8
from jmp_lite.analysis._ranges._range import Range
from jmp_lite.autocast._rules import Rule
from jmp_lite.quant._recipes import DotRecipe, get_recipe

FLOAT32 = "float32"
_HALVES = ("bfloat16", "float16")
#: Relative error of rounding to three mantissa bits, as all of a power of two are alike.
_OF_FLOAT8 = 2.0**-4 / math.sqrt(3)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A format for matmuls.

    Attributes:
        name: Name as the user gave it, or ``float32``.
        dtype: The compute dtype with it.
        recipe: How matmuls are quantized, or ``None``.
    """

    name: str
    dtype: str
    recipe: DotRecipe | None = None

    @property
    def bits(self) -> int:
        """Of an operand of the matmuls."""
        return 8 if self.recipe else 32 if self.name == FLOAT32 else 16

    def error(self, operand: Range) -> float:
        """Returns the relative error of rounding an operand, infinite if it does not fit."""
        if self.name == FLOAT32:
            return 0.0
        if self.recipe is None:
            fate = operand.fates[self.dtype]
            return math.inf if fate.overflow else fate.rms_error
        is_integer = str(self.recipe.lhs or self.recipe.rhs).startswith("int")
        return operand.fates[INT8].rms_error if is_integer else _OF_FLOAT8


def choices_of(formats: str | Sequence[str]) -> list[Choice]:
    """Returns the user's choices from the narrowest to the widest, float32 last.

    Raises:
        InvalidRecipeError: If a format is neither a 16-bit dtype nor a recipe.
    """
    formats = [formats] if isinstance(formats, str) else list(formats)
    half = next((name for name in formats if name in _HALVES), "bfloat16")
    found = [Choice(name, name) if name in _HALVES else Choice(name, half, get_recipe(name)) for name in formats]
    return [*sorted(found, key=lambda choice: choice.bits), Choice(FLOAT32, FLOAT32)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A choice for each group of matmuls, as a policy and rules.

    Attributes:
        choices: Choices by the name scope of the group.
        beyond: Groups that no recipe applies to, with or without rules.
    """

    choices: Mapping[str, Choice]
    beyond: frozenset[str] = frozenset()

    @property
    def base(self) -> Choice:
        """The choice of most groups that have one."""
        free = [choice for scope, choice in self.choices.items() if scope not in self.beyond]
        return collections.Counter(free or self.choices.values()).most_common(1)[0][0]

    @property
    def policy(self) -> str:
        """The policy string of the base."""
        return FLOAT32 if self.base.dtype == FLOAT32 else f"mixed_{self.base.dtype}"

    def exceptions(self) -> dict[str, Choice]:
        """Returns the groups that need a rule, inner ones before outer ones."""
        plain = Choice(self.base.dtype, self.base.dtype) if self.base.recipe else self.base
        differing = [
            scope
            for scope, choice in self.choices.items()
            if choice != self.base and not (scope in self.beyond and choice == plain)
        ]
        inside = [
            scope
            for scope, choice in self.choices.items()
            if choice == self.base and any(f"/{outer}/" in f"/{scope}/" for outer in differing)
        ]
        return {scope: self.choices[scope] for scope in sorted([*differing, *inside], key=len, reverse=True)}

    @property
    def rules(self) -> list[Rule]:
        """The rules, in the order in which they are tried."""
        found = [_rule(scope, choice) for scope, choice in self.exceptions().items()]
        return [*found, *([Rule(dot=self.base.recipe)] if self.base.recipe else [])]

    def code(self, function: str, reasons: Mapping[str, str]) -> str:
        """Returns the code that wraps a function this way."""
        lines = [f"{_code(scope, choice)},  # {reasons[scope]}" for scope, choice in self.exceptions().items()]
        if self.base.recipe:
            lines.append(f"jmp.Rule(dot=jmp.quant.get_recipe({self.base.name!r})),")
        if not lines:
            return f'import jmp_lite as jmp\n\n{function} = jmp.autocast({function}, "{self.policy}")\n'
        listed = "".join(f"    {line}\n" for line in lines)
        return (
            f"import jmp_lite as jmp\n\nrules = [\n{listed}]\n"
            f'{function} = jmp.autocast({function}, "{self.policy}", rules=rules)\n'
        )


def _pattern(scope: str) -> str:
    return re.escape(scope).replace("\\-", "-") if scope else "^$"


def _rule(scope: str, choice: Choice) -> Rule:
    precision = "full" if choice.name == FLOAT32 else choice.dtype
    return Rule(_pattern(scope), precision=precision, dot=choice.recipe)


def _code(scope: str, choice: Choice) -> str:
    precision = "full" if choice.name == FLOAT32 else choice.dtype
    recipe = f", dot=jmp.quant.get_recipe({choice.name!r})" if choice.recipe else ""
    return f'jmp.Rule({_pattern(scope)!r}, precision="{precision}"{recipe})'
