"""Which precision holds where: rules, policies per module, and regions, resolved for a name scope and a primitive."""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jmp_lite._dtypes import FLOAT32, DType, dtype_or_none, refuse_8_bits
from jmp_lite._messages import quote
from jmp_lite._patterns import compile_pattern, matches
from jmp_lite._policy import Policy, PolicyMap, get_policy
from jmp_lite.autocast import _regions
from jmp_lite.autocast._ops import PRODUCTS, Op, OpClass, is_kernel
from jmp_lite.autocast._values import Value, is_in_range
from jmp_lite.errors import InvalidRuleError, UnknownDtypeError
from jmp_lite.products._matmul import RoundsOperands

#: ``Module.method``, as Linen names the scope of any method but ``__call__``.
_METHOD = re.compile(r"\.[A-Za-z_]\w*(?=/|\Z)")


class Precision(NamedTuple):
    """The precision of an equation: a mode (auto, full, low, off), a compute dtype, a matmul, and why."""

    mode: str
    dtype: DType
    dot: Callable[..., Any] | None = None
    reason: str = ""
    result: DType | None = None
    """The dtype that matmuls are asked to leave in."""
    accumulates: bool = False
    """Whether matmuls are asked to add up in float32."""
    leaves_whole: bool = False
    """Whether an equation that holds programs runs as it was written, programs included."""
    reduce_dtype: DType = FLOAT32
    """What gradients of weights are added up in, over devices."""
    asked: str = ""
    """What a rule or a ``PolicyMap`` asks of matmuls: a ``dot`` that replaces them, or a ``dtype`` for operands."""

    def turned(self, operands: Sequence[Value]) -> "Precision":
        """Returns the precision of a matmul of these operands, where it matters which of them is a weight."""
        dot: Any = self.dot
        is_ours = isinstance(dot, RoundsOperands)
        return self._replace(dot=dot.turned([x.is_parameter for x in operands[:2]])) if is_ours else self

    @property
    def widens_gradients(self) -> bool:
        """Whether equations return float32 gradients of weights, because devices may sum them right there."""
        return self.dtype.itemsize < FLOAT32.itemsize and self.reduce_dtype != self.dtype


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""Sets the precision of equations by name scope, by primitive, or both.

    The first matching rule wins. Rules override the policy, regions override rules.

    Args:
        scope: Regular expression over whole segments of a name scope such as ``GPT/block_0/attention``; it matches
            that scope and everything inside. ``None`` matches everywhere. Flax modules, ``jax.named_scope`` and many
            JAX functions open name scopes.
        primitive: Regular expression for the whole name of a primitive, such as ``exp`` or ``reduce_.*``; ``None``
            matches all.
        precision: ``"full"``, float32; ``"low"``, the compute dtype, for exponentials and sums too; ``"auto"``, the
            classes of the primitives; or a dtype or policy as ``get_policy`` takes it, whose 16-bit compute dtype then
            replaces the one of the policy. ``None`` is ``"auto"`` for a rule with ``dot`` or ``result``.
        dot: Replaces ``lax.dot_general`` and has the same signature; for matmuls that run in the compute dtype.
        result: ``jnp.float32`` makes matmuls return float32 from operands in the compute dtype, even if the result
            takes more bytes than they do. By default, matmuls return float32 if all their consumers want that and it
            costs nothing.

    Raises:
        InvalidRuleError: If the precision or the result is invalid, or neither they nor ``dot`` are given.
        InvalidPatternError: If a pattern is not a regular expression.

    Example:
        >>> rules = [jmp.Rule("router", precision="full")]
        >>> def model(x, w):
        ...     with jax.named_scope("router"):
        ...         return x @ w
        >>> x, w = jnp.ones((2, 8)), jnp.ones((8, 3))
        >>> print(jmp.explain(model, "mixed_bfloat16", rules=rules)(x, w)[0].reason)
        rule for scope 'router'
    """

    scope: str | None = None
    primitive: str | None = None
    precision: Any = None
    dot: Callable[..., Any] | None = dataclasses.field(default=None, kw_only=True)
    result: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if _is_precision(self.primitive):
            raise InvalidRuleError(
                f"primitive is {self.primitive!r}, which is a precision. Write Rule({self.scope!r}, "
                f"precision={self.primitive!r})."
            )
        for field in ("scope", "primitive"):
            pattern = getattr(self, field)
            if not (pattern is None or isinstance(pattern, str)):
                raise InvalidRuleError(f"{field} must be a regular expression or None, got {quote(pattern)}.")
            if pattern is not None:
                compile_pattern(pattern)
        if self.precision is None and self.dot is None and self.result is None:
            raise InvalidRuleError(
                f"The {self} asks for nothing. Give it precision='full', 'low', a dtype, dot= or result=."
            )
        object.__setattr__(self, "precision", _checked_precision("auto" if self.precision is None else self.precision))
        if self.result is not None and dtype_or_none(self.result) != FLOAT32:
            raise InvalidRuleError(f"result must be float32 or None, got {self.result!r}.")
        object.__setattr__(self, "result", None if self.result is None else FLOAT32)
        checked_dot(self.dot)
        self._check_matmul_settings()
        if self.primitive is not None and is_kernel(self.primitive) and self.precision != "full":
            raise InvalidRuleError(
                f"Primitive {self.primitive!r} is a kernel, traced for the dtypes it has: no rule can change them. "
                "Cast around it with jmp.with_policy(function, policy)."
            )

    def _check_matmul_settings(self) -> None:
        """Refuses settings of matmuls that can mean nothing."""
        for name in ("dot", "result"):
            pattern, value = self.primitive, getattr(self, name)
            if value is None or pattern is None or any(re.fullmatch(pattern, product) for product in PRODUCTS):
                continue
            raise InvalidRuleError(
                f"{name}= is for matmuls, and primitive {quote(pattern)} matches none of "
                f"{', '.join(sorted(PRODUCTS))}. Write Rule({self.scope!r}, {name}=...)."
            )
        if self.dot is not None and self.precision == "full":
            raise InvalidRuleError(
                "precision='full' leaves matmuls as they were written, so dot= would never be called. Give one of the "
                "two."
            )

    def matches(self, scope: str, primitive: str) -> bool:
        """Whether the rule holds for a primitive in a scope."""
        if self.primitive is not None and not re.fullmatch(self.primitive, primitive):
            return False
        return self.scope is None or any(matches(self.scope, path) for path in _readings(scope))

    def applied_to(self, precision: Precision) -> Precision:
        """Returns the precision where the rule matches, given the precision without it."""
        is_whole = self.precision == "full" and self.primitive is not None
        dot, reason = self.dot or precision.dot, str(self)
        asked = "dot" if self.dot else "" if self.precision in ("full", "auto") else "dtype"
        held = precision._replace(dot=dot, reason=reason, result=self.result, asked=asked)
        if not isinstance(self.precision, str):
            return held._replace(mode="auto", dtype=self.precision)
        if self.precision != "full" and precision.dtype.itemsize >= FLOAT32.itemsize:
            return precision if dot is None else held._replace(mode="auto")
        return held._replace(mode=self.precision, leaves_whole=is_whole)

    def __str__(self) -> str:
        wanted = [("scope", self.scope), ("primitive", self.primitive)]
        return "rule for " + (", ".join(f"{key} {value!r}" for key, value in wanted if value is not None) or "all")


_MODES = ("auto", "full", "low")


def checked_dot(dot: Any) -> Any:
    """Returns the user's replacement for a matmul, if it can be called."""
    if dot is not None and not callable(dot):
        raise InvalidRuleError(f"dot must be a function with the signature of lax.dot_general, got {quote(dot)}.")
    return dot


def _compute_dtype(precision: Any) -> DType | None:
    """Returns the dtype that a dtype or a policy string stands for; ``None`` if it is neither."""
    try:
        return get_policy(precision).compute_dtype if isinstance(precision, str) else dtype_or_none(precision)
    except UnknownDtypeError:
        return None


def _is_precision(primitive: Any) -> bool:
    if not isinstance(primitive, str):
        return primitive is not None and dtype_or_none(primitive) is not None
    return primitive in _MODES or _compute_dtype(primitive) is not None


def _checked_precision(precision: Any) -> Any:
    if isinstance(precision, str) and precision in _MODES:
        return precision
    dtype = _compute_dtype(precision)
    if dtype == FLOAT32:
        return "full"
    if dtype is None or dtype.itemsize != 2 or not jnp.issubdtype(dtype, jnp.floating):
        raise InvalidRuleError(
            f"precision must be 'auto', 'full', 'low', or stand for float32 or a 16-bit dtype, got {quote(precision)}. "
            "Write for example Rule('head', precision='full'); matmuls in 8 bits are Rule('head', dot=jmp.quant.FP8)."
        )
    return dtype


def _readings(scope: str) -> tuple[str, ...]:
    """Returns a scope unchanged, and without method names: a call inside ``encoder.decode`` is in ``encoder``."""
    plain = _METHOD.sub("", scope)
    return (scope,) if plain == scope else (scope, plain)


class Pattern(NamedTuple):
    """What the user wrote for a part of the program."""

    scope: str | None
    primitive: str | None
    holds: Callable[[str, str], bool]
    """Whether it stands for a primitive in a name scope."""
    path: Callable[[str], str]
    """What the scope pattern is compared with, of a name scope."""


def _is_among(scopes: Collection[str], scope: str, primitive: str) -> bool:
    del primitive
    return scope in scopes


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of the user, checked; equal settings share their interpreter."""

    policy: Policy | PolicyMap
    rules: tuple[Rule, ...] = ()
    ops: tuple[tuple[str, Op], ...] = ()
    dot: Callable[..., Any] | None = None
    accumulates: bool = False
    residuals: str = "all"
    root: str = ""
    """Name scope of the model, if paths of the policy are those inside it."""

    @functools.cached_property
    def ops_by_name(self) -> Mapping[str, Op]:
        """Maps primitive names to the user's ops."""
        return dict(self.ops)

    @functools.cached_property
    def dtypes(self) -> frozenset[DType]:
        """The compute dtypes that values may be held in."""
        named = [policy.compute_dtype for policy in self.policy.all_policies()]
        named += [rule.precision for rule in self.rules if not isinstance(rule.precision, str)]
        return frozenset(dtype for dtype in named if dtype.itemsize < FLOAT32.itemsize)

    @property
    def has_replacements(self) -> bool:
        """Whether functions replace primitives, even where the compute dtype is float32."""
        return self.dot is not None or any(not isinstance(op, OpClass) for _, op in self.ops)

    @property
    def depends_on_scope(self) -> bool:
        """Whether the precision of an equation depends on its name scope, apart from regions."""
        dot: Any = self.dot
        of_dot = isinstance(dot, RoundsOperands) and dot.depends_on_scope
        return bool(self.rules) or isinstance(self.policy, PolicyMap) or of_dot

    def precision(self, scope: str, primitive: str) -> Precision:
        """Resolves the precision of a primitive in a name scope."""
        key, policy = self.policy.key_and_policy(_path_in_model(scope, self.root))
        dtype = policy.compute_dtype
        is_full = dtype.itemsize >= FLOAT32.itemsize and not self.has_replacements
        mode, reduce_dtype = "full" if is_full else "auto", policy.reduce_dtype or FLOAT32
        reason = "compute dtype of the policy is float32" if key is None else _named(key)
        asked = "" if key is None or mode == "full" else "dtype"
        in_policy = Precision(mode, dtype, self.dot, reason, None, self.accumulates, False, reduce_dtype, asked)
        region = _regions.innermost(scope)
        if region is not None:
            region_mode = _regions.MODES[region]
            mode = mode if dtype.itemsize >= FLOAT32.itemsize and region_mode == "low" else region_mode
            found = in_policy._replace(
                mode=mode, reason=f"in a {region.removeprefix('jmp.')} region", leaves_whole=mode == "off"
            )
        else:
            rule = self.rule_for(scope, primitive)
            found = in_policy if rule is None else rule.applied_to(in_policy)
        return found._replace(dot=found.dot.at(scope)) if isinstance(found.dot, RoundsOperands) else found

    def rule_for(self, scope: str, primitive: str) -> Rule | None:
        """Returns the rule that decides in a name scope: the first that matches, if no region does."""
        if _regions.innermost(scope) is not None:
            return None
        return next((rule for rule in self.rules if rule.matches(scope, primitive)), None)

    @functools.cached_property
    def patterns(self) -> Mapping[str, Pattern]:
        """The user's patterns for parts of the program, by how messages name them."""
        rules = {str(rule): Pattern(rule.scope, rule.primitive, rule.matches, str) for rule in self.rules}
        policies = self.policy.policies if isinstance(self.policy, PolicyMap) else ()
        inside = functools.partial(_path_in_model, root=self.root)
        keys = {_named(key): Pattern(key, None, _names(key, self.root), inside) for key, _ in policies}
        dots: dict[str, Any] = {"dot=": self.dot} | {f"dot= of the {rule}": rule.dot for rule in self.rules}
        calibrated = {
            f"calibration of {name}": Pattern(min(dot.scopes), None, functools.partial(_is_among, dot.scopes), str)
            for name, dot in dots.items()
            if isinstance(dot, RoundsOperands) and dot.scopes
        }
        return rules | keys | calibrated

    def is_in_range(self, number: float) -> bool:
        """Whether all compute dtypes hold a number to within their rounding error."""
        return all(is_in_range(number, dtype) for dtype in self.dtypes)


def _named(key: str) -> str:
    return f"pattern {quote(key)} of the PolicyMap"


def _names(key: str, root: str) -> Callable[[str, str], bool]:
    def names(scope: str, primitive: str) -> bool:
        del primitive
        path = _path_in_model(scope, root)
        return path == key or path.startswith(f"{key}/") or matches(key, path)

    return names


def _path_in_model(scope: str, root: str) -> str:
    path = _readings(scope)[-1]
    return path.removeprefix(root).removeprefix("/") if root else path


def checked_settings(policy: Any, rules: Any, ops: Mapping[str, Op], **settings: Any) -> Settings:
    """Builds settings from the user's arguments.

    Raises:
        InvalidPolicyError: If the compute dtype has fewer than 16 bits.
        InvalidRuleError: If an element of the rules is not a rule.
    """
    rules = (rules,) if isinstance(rules, Rule) else rules
    if not (isinstance(rules, Sequence) and all(isinstance(rule, Rule) for rule in rules)):
        raise InvalidRuleError(
            f"rules must be a sequence of Rule, got {quote(rules)}. Write rules=[Rule(scope, primitive, precision)]."
        )
    by_name = tuple(sorted(ops.items(), key=lambda item: item[0]))
    checked = Settings(get_policy(policy), tuple(rules), by_name, **settings)
    refuse_8_bits(checked.dtypes, "autocast")
    return checked
