"""Which precision holds where: rules, policies per module, and regions, resolved for a name scope and a primitive."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jmp_lite._dtypes import ACCEPTED_NAMES, FLOAT32, DType, parse_dtype
from jmp_lite._errors import InvalidPolicyError, InvalidRuleError, UnknownDtypeError
from jmp_lite._policy import Policy, PolicyMap, compile_pattern, get_policy
from jmp_lite.autocast import _regions
from jmp_lite.autocast._ops import Op
from jmp_lite.autocast._values import is_in_range

#: ``Module.method``, as Linen names the scope of any method but ``__call__``.
_METHOD = re.compile(r"\.[A-Za-z_]\w*(?=/|\Z)")


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""A precision for the equations of some name scopes, of some primitives, or both.

    The first rule that matches decides. Rules go before the policy, regions before rules.

    Args:
        scope: Regular expression over whole segments of a name scope such as ``GPT/block_0/attention``; it matches
            there and in everything inside. ``None`` matches everywhere. Flax modules, ``jax.named_scope`` and many
            functions of JAX open name scopes.
        primitive: Regular expression for the whole name of a primitive, such as ``exp`` or ``reduce_.*``; ``None``
            matches all.
        precision: ``"full"``, float32; ``"low"``, the compute dtype, for exponentials and sums too; ``"auto"``, the
            classes of the primitives; or a 16-bit dtype, which then takes the place of the compute dtype.
        dot: Takes the place of ``lax.dot_general`` and has its signature; for matrix products that run in the compute
            dtype.

    Raises:
        InvalidRuleError: If the precision means nothing.
        UnknownDtypeError: If a pattern is no regular expression.

    Example:
        >>> rules = [jmp.Rule("router", precision="full"), jmp.Rule(r"block_\d+", "exp", precision="low")]
        >>> def model(x, w):
        ...     with jax.named_scope("router"):
        ...         return x @ w
        >>> x, w = jnp.ones((2, 4)), jnp.ones((4, 3))
        >>> print(jmp.explain(model, "mixed_bfloat16", rules=rules)(x, w)[0].reason)
        rule for scope 'router'
    """

    scope: str | None = None
    primitive: str | None = None
    precision: Any = "auto"
    dot: Callable[..., Any] | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", _checked_precision(self.precision))
        for pattern in (self.scope, self.primitive):
            if pattern is not None:
                compile_pattern(pattern)

    def matches(self, scope: str, primitive: str) -> bool:
        """Whether the rule holds for a primitive in a scope."""
        if self.primitive is not None and not re.fullmatch(self.primitive, primitive):
            return False
        return self.scope is None or any(compile_pattern(self.scope).search(path) for path in _readings(scope))

    def __str__(self) -> str:
        wanted = [("scope", self.scope), ("primitive", self.primitive)]
        return "rule for " + (", ".join(f"{key} {value!r}" for key, value in wanted if value is not None) or "all")


def _checked_precision(precision: Any) -> Any:
    if isinstance(precision, str) and precision in ("auto", "full", "low"):
        return precision
    try:
        dtype = parse_dtype(precision) if isinstance(precision, str) else np.dtype(precision)
    except (TypeError, UnknownDtypeError):
        dtype = None
    if dtype is None or dtype.itemsize != 2 or dtype.kind not in "fV":
        raise InvalidRuleError(
            f"precision must be 'auto', 'full', 'low' or a 16-bit dtype, got {precision!r}. Write for example "
            "Rule('head', precision='full')."
        )
    return dtype


def _readings(scope: str) -> tuple[str, ...]:
    """Returns a scope as it is, and without the names of methods: what ``encoder.decode`` calls is in ``encoder``."""
    plain = _METHOD.sub("", scope)
    return (scope,) if plain == scope else (scope, plain)


class Precision(NamedTuple):
    """What holds for an equation: a mode (auto, full, low, off), a compute dtype, a matrix product, and why."""

    mode: str
    dtype: DType
    dot: Callable[..., Any] | None
    reason: str = ""
    leaves_whole: bool = False
    """Whether an equation that holds programs runs as it was written, programs included."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that the user said, checked; equal settings share what was made for them."""

    policy: Policy | PolicyMap
    rules: tuple[Rule, ...] = ()
    ops: tuple[tuple[str, Op], ...] = ()
    dot: Callable[..., Any] | None = None
    root: str = ""
    """Name scope of the model, if paths of the policy are those inside it."""

    @functools.cached_property
    def ops_by_name(self) -> Mapping[str, Op]:
        """Maps primitive names to what the user gave for them."""
        return dict(self.ops)

    @functools.cached_property
    def dtypes(self) -> frozenset[DType]:
        """The compute dtypes that values may be held in."""
        policies = [self.policy] if isinstance(self.policy, Policy) else self.policy.all_policies()
        named = [policy.compute_dtype for policy in policies]
        named += [rule.precision for rule in self.rules if not isinstance(rule.precision, str)]
        return frozenset(dtype for dtype in named if dtype.itemsize < FLOAT32.itemsize)

    @property
    def depends_on_scope(self) -> bool:
        """Whether the precision of an equation depends on its name scope, regions apart."""
        return bool(self.rules) or isinstance(self.policy, PolicyMap)

    def precision(self, scope: str, primitive: str) -> Precision:
        """Resolves the precision of a primitive in a name scope."""
        return _resolve(self, scope, primitive if self.rules else "")

    def is_in_range(self, number: float) -> bool:
        """Whether all compute dtypes hold a number to within their rounding error."""
        return all(is_in_range(number, dtype) for dtype in self.dtypes)


@functools.lru_cache(maxsize=65536)
def _resolve(settings: Settings, scope: str, primitive: str) -> Precision:
    policy = settings.policy.policy_for(_path_in_model(settings, scope))
    dtype, dot = policy.compute_dtype, settings.dot
    is_full = dtype.itemsize >= FLOAT32.itemsize
    in_policy = Precision("full" if is_full else "auto", dtype, dot, "compute dtype of the policy is float32")
    region = _regions.innermost(scope)
    if region is not None:
        mode = "full" if is_full and _regions.MODES[region] == "low" else _regions.MODES[region]
        return Precision(mode, dtype, dot, f"in a {region.removeprefix('jmp.')} region", leaves_whole=mode == "off")
    for rule in settings.rules:
        if rule.matches(scope, primitive):
            is_dtype = not isinstance(rule.precision, str)
            mode = "auto" if is_dtype else rule.precision
            if mode != "full" and is_full and not is_dtype:
                return in_policy
            chosen = rule.precision if is_dtype else dtype
            return Precision(
                mode, chosen, rule.dot or dot, str(rule), leaves_whole=mode == "full" and rule.primitive is not None
            )
    return in_policy


def _path_in_model(settings: Settings, scope: str) -> str:
    path = _readings(scope)[-1]
    return path.removeprefix(settings.root).removeprefix("/") if settings.root else path


def checked_settings(
    policy: Any, rules: Any, ops: Mapping[str, Op], dot: Callable[..., Any] | None, root: str = ""
) -> Settings:
    """Builds settings from what the user gave.

    Raises:
        InvalidPolicyError: If the compute dtype has fewer than 16 bits.
        InvalidRuleError: If something among the rules is no rule.
    """
    rules = (rules,) if isinstance(rules, Rule) else tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise InvalidRuleError(
                f"rules must be a sequence of Rule, got {rule!r}. Write Rule(scope, primitive, ...)."
            )
    settings = Settings(get_policy(policy), rules, tuple(sorted(ops.items(), key=lambda item: item[0])), dot, root)
    for dtype in settings.dtypes:
        if dtype.itemsize < 2:
            raise InvalidPolicyError(
                f"autocast computes in 16 bits, got the compute dtype {dtype}. Name a 16-bit dtype, and give "
                f"the matrix products in {dtype} as dot=. Accepted names: {ACCEPTED_NAMES}."
            )
    return settings
