"""Autocast for ``model.apply``, with module paths instead of name scopes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from jmp_lite._functions import check_function
from jmp_lite._policy import Policy, PolicyMap
from jmp_lite.autocast._api import settings_from, wrap
from jmp_lite.autocast._explain import Explanation, explained
from jmp_lite.autocast._ops import Op
from jmp_lite.autocast._rules import Rule, Settings


def autocast(
    apply: Callable[..., Any],
    policy: str | Policy | PolicyMap,
    *,
    rules: Rule | Sequence[Rule] = (),
    ops: Mapping[str, Op] | None = None,
    dot: Callable[..., Any] | None = None,
    accumulation_dtype: Any = None,
    residuals: str = "all",
) -> Callable[..., Any]:
    """Runs ``model.apply`` in mixed precision: ``autocast`` with ``PolicyMap`` paths inside the model.

    Paths are those inside ``params``, such as ``encoder/Dense_0``, as for ``linen.with_policy``. Parameters, statistics
    and every other collection keep their dtypes, in and out; random bits do not change; layers need no ``dtype``.

    Args:
        apply: ``model.apply`` or another method of a bound signature, also as a ``functools.partial``.
        policy: As for ``autocast``; patterns are matched on paths inside the model.
        rules: As for ``autocast``; scopes start with the name of the model's class, which patterns may omit.
        ops: As for ``autocast``.
        dot: As for ``autocast``.
        accumulation_dtype: As for ``autocast``.
        residuals: As for ``autocast``.

    Returns:
        A function with the signature of ``apply``.

    Raises:
        InvalidRuleError: As ``autocast``; other errors likewise.

    Example:
        >>> import flax.linen as nn
        >>> class Model(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.Dense(1, name="head")(
        ...             nn.BatchNorm(use_running_average=False)(nn.Dense(8, name="body")(x))
        ...         )
        >>> model, x = Model(), jnp.ones((2, 8))
        >>> variables = model.init(jax.random.key(0), x)
        >>> policies = jmp.PolicyMap({"head": "full"}, default="mixed_bfloat16")
        >>> apply = jmp.linen.autocast(model.apply, policies)
        >>> output, updated = apply(variables, x, mutable=["batch_stats"])
        >>> output.dtype, updated["batch_stats"]["BatchNorm_0"]["mean"].dtype
        (dtype('float32'), dtype('float32'))
        >>> explanation = jmp.linen.explain(model.apply, policies)(variables, x, mutable=["batch_stats"])
        >>> [decision.in_dtypes[0] for decision in explanation if decision.primitive == "dot_general"]
        ['bfloat16', 'float32']

    References:
        ``torch.autocast``.
    """
    check_function(apply, "linen.autocast")
    settings = _settings(apply, policy, rules=rules, ops=ops, dot=dot, accumulation_dtype=accumulation_dtype)
    return wrap(apply, settings, residuals)


def explain(
    apply: Callable[..., Any],
    policy: str | Policy | PolicyMap,
    *,
    rules: Rule | Sequence[Rule] = (),
    ops: Mapping[str, Op] | None = None,
    dot: Callable[..., Any] | None = None,
    accumulation_dtype: Any = None,
) -> Callable[..., Explanation]:
    """Explains what ``linen.autocast`` does to every equation of ``model.apply``, and why: ``jmp.explain`` for Linen.

    Args:
        apply: As for ``linen.autocast``.
        policy: As for ``linen.autocast``; patterns are matched on paths inside the model.
        rules: As for ``autocast``.
        ops: As for ``autocast``.
        dot: As for ``autocast``.
        accumulation_dtype: As for ``autocast``.

    Returns:
        A function with the arguments of ``apply`` that returns an ``Explanation``.

    Raises:
        InvalidRuleError: As ``autocast``; other errors likewise.

    Example:
        >>> import flax.linen as nn
        >>> model, x = nn.Sequential([nn.Dense(8), nn.Dense(8)]), jnp.ones((2, 8))
        >>> variables = model.init(jax.random.key(0), x)
        >>> policies = jmp.PolicyMap({"layers_1": "full"}, default="mixed_bfloat16")
        >>> explanation = jmp.linen.explain(model.apply, policies)(variables, x)
        >>> [decision.in_dtypes[0] for decision in explanation if decision.primitive == "dot_general"]
        ['bfloat16', 'float32']

    References:
        ``jmp_lite.explain``.
    """
    check_function(apply, "linen.explain")
    settings = _settings(apply, policy, rules=rules, ops=ops, dot=dot, accumulation_dtype=accumulation_dtype)
    return lambda *args, **kwargs: explained(apply, settings, args, kwargs)[0]


def _settings(apply: Callable[..., Any], policy: Any, **given: Any) -> Settings:
    """Checks settings; paths of the policy are those inside the model."""
    function: Any = apply.func if isinstance(apply, functools.partial) else apply
    model = getattr(function, "__self__", None)
    root = (model.name or type(model).__name__) if isinstance(model, nn.Module) else ""
    return settings_from(policy, root=root, **given)
