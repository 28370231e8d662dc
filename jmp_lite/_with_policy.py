"""A policy around a function."""

import functools
from collections.abc import Callable
from typing import Any

from jmp_lite._dtypes import refuse_8_bits
from jmp_lite._functions import check_function, refuse_modules
from jmp_lite._policy import PolicyLike, get_policy


def with_policy(fun: Callable[..., Any], policy: PolicyLike) -> Callable[..., Any]:
    """Wraps a function: arguments are cast to the compute dtype, results to the output dtype.

    Gradients taken through the wrapper have the dtype of the arguments, so float32 parameters get float32 gradients.
    For Flax models use ``jmp_lite.linen.with_policy`` and ``jmp_lite.nnx.with_policy``, which also keep statistics in
    float32.

    Args:
        fun: Any function of pytrees. With a ``PolicyMap`` the paths are those inside each argument.
        policy: A policy or policy string.

    Returns:
        A function with the signature of ``fun``.

    Raises:
        InvalidPolicyError: If the compute dtype has fewer than 16 bits.
        InvalidFunctionError: If ``fun`` is not a function, or is called with a module of NNX.
        UnknownDtypeError: If the policy string cannot be parsed.

    Example:
        >>> def apply(params, x):
        ...     return x @ params["w"]
        >>> half_apply = jmp.with_policy(apply, "p=f32,c=bf16,o=f32")
        >>> jax.make_jaxpr(half_apply)({"w": jnp.ones((2, 2))}, jnp.ones((1, 2))).eqns[2].outvars[0].aval.dtype
        dtype(bfloat16)
        >>> half_apply({"w": jnp.ones((2, 2))}, jnp.ones((1, 2))).dtype
        dtype('float32')
    """
    check_function(fun, "with_policy")
    resolved = get_policy(policy)
    refuse_8_bits((one.compute_dtype for one in resolved.all_policies()), "with_policy")

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        refuse_modules(fun, args, kwargs, "with_policy")
        args = tuple(resolved.cast_to_compute(arg) for arg in args)
        kwargs = {key: resolved.cast_to_compute(arg) for key, arg in kwargs.items()}
        return resolved.cast_to_output(fun(*args, **kwargs))

    return wrapped
