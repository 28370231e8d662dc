"""A policy around a Linen model: autocast inside, results in the output dtype."""

import functools
from collections.abc import Callable
from typing import Any

import flax.core

from jmp_lite._functions import check_function
from jmp_lite._policy import Policy, PolicyMap, get_policy
from jmp_lite.linen._autocast import autocast

_INITS = ("init", "init_with_output", "lazy_init")


def with_policy(apply: Callable[..., Any], policy: str | Policy | PolicyMap) -> Callable[..., Any]:
    """Wraps ``model.apply`` or ``model.init``: ``linen.autocast`` inside, results in the output dtype.

    Under ``apply`` the model runs as under ``linen.autocast``, and its floating results are cast to the output dtype of
    the policy (for a map, of its default). Updated collections (``batch_stats``, ``cache``, ...) keep the dtypes that
    the model gives them. Gradients have the dtype of the parameters. With a compute dtype of float32 or wider, the
    model runs as written.

    Under ``init`` the model runs as written, and parameters are cast to the parameter dtype, by path for a map.

    Args:
        apply: ``model.apply``, ``model.init``, ``model.init_with_output``, ``model.lazy_init``, or a function with the
            signature of ``apply``; also as a ``functools.partial``, which may fix ``mutable``.
        policy: A policy, a policy string or a map, with paths inside ``params``, such as ``encoder/Dense_0``.

    Returns:
        A function with the signature of ``apply``.

    Raises:
        InvalidFunctionError: If ``apply`` is not a function, for example the model itself.
        InvalidPolicyError: If the compute dtype has fewer than 16 bits; when called, if two patterns of a map
            contradict each other.
        UnknownDtypeError: If the policy string cannot be parsed.

    Example:
        >>> import flax.linen as nn
        >>> class Model(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         x = nn.BatchNorm(use_running_average=False)(nn.Dense(8, name="body")(x))
        ...         return nn.Dense(1, name="head")(x)
        >>> model, x, policy = Model(), jnp.ones((2, 8)), "p=f32,c=bf16,o=bf16"
        >>> variables = jmp.linen.with_policy(model.init, policy)(jax.random.key(0), x)
        >>> apply = jmp.linen.with_policy(model.apply, policy)
        >>> output, updated = apply(variables, x, mutable=["batch_stats"])
        >>> output.dtype, updated["batch_stats"]["BatchNorm_0"]["mean"].dtype
        (dtype(bfloat16), dtype('float32'))

    References:
        ``jmp_lite.linen.autocast``; policies of jmp (github.com/google-deepmind/jmp).
    """
    check_function(apply, "linen.with_policy")
    resolved = get_policy(policy)
    partial = apply if isinstance(apply, functools.partial) else functools.partial(apply)
    name = getattr(partial.func, "__name__", "")
    run = apply if name in _INITS else autocast(apply, resolved)

    @functools.wraps(partial.func)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        if name in _INITS and name != "init_with_output":
            return _params_cast(result, resolved)
        if name == "init_with_output":
            output, variables = result
            return resolved.cast_to_output(output), _params_cast(variables, resolved)
        if _returns_variables(**{**partial.keywords, **kwargs}):
            output, updated = result
            return resolved.cast_to_output(output), updated
        return resolved.cast_to_output(result)

    return wrapped


def _params_cast(variables: Any, policy: Policy | PolicyMap) -> Any:
    if "params" not in variables:
        return variables
    return flax.core.copy(variables, {"params": policy.cast_to_param(variables["params"])})


def _returns_variables(mutable: Any = False, capture_intermediates: Any = False, **_: Any) -> bool:
    """Whether ``apply`` with these keywords also returns updated collections."""
    return mutable is not False or bool(capture_intermediates)
