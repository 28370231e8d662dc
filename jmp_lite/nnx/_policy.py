"""A policy around a function of NNX modules: autocast inside, results in the output dtype."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jmp_lite._policy import Policy, PolicyMap, get_policy
from jmp_lite.nnx._autocast import autocast
from jmp_lite.nnx._modules import is_leaf, is_node, unbound, wraps


def with_policy(fn: Callable[..., Any], policy: str | Policy | PolicyMap) -> Callable[..., Any]:
    """Wraps a function of NNX modules: ``nnx.autocast`` inside, results in the output dtype.

    The function runs as under ``nnx.autocast``, and its floating results are cast to the output dtype of the policy
    (for a map, of its default). Every change that it makes to its modules survives, in the dtypes that the function
    gives: running statistics, random counts, caches. Modules and variables in the results are not cast. Gradients have
    the dtype of the parameters. With a compute dtype of float32 or wider, the function runs as written.

    Args:
        fn: A function of modules and any other arguments, usually ``fn(model, *args)``; a module, a bound method or a
            ``functools.partial`` works too, with the module already bound.
        policy: A policy, a policy string or a map, with paths inside the passed module, such as ``layers/0/attention``.

    Returns:
        A function with the signature of ``fn``, for use in ``nnx.jit``, ``nnx.value_and_grad`` and the like.

    Raises:
        InvalidFunctionError: If ``fn`` cannot be called.
        InvalidPolicyError: If the compute dtype has fewer than 16 bits; when called, if two patterns of a map
            contradict each other.
        UnknownDtypeError: If the policy string cannot be parsed.

    Example:
        >>> from flax import nnx
        >>> class Model(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.body, self.norm = nnx.Linear(8, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        ...
        ...     def __call__(self, x):
        ...         return self.norm(self.body(x))
        >>> forward = jmp.nnx.with_policy(lambda model, x: model(x), "p=f32,c=bf16,o=bf16")
        >>> model, x = Model(nnx.Rngs(0)), jnp.ones((2, 8))
        >>> grads = nnx.grad(lambda model, x: jnp.mean(forward(model, x).astype(jnp.float32)))(model, x)
        >>> forward(model, x).dtype, grads.body.kernel.dtype, model.norm.mean.dtype
        (dtype(bfloat16), dtype('float32'), dtype('float32'))

    References:
        ``jmp_lite.nnx.autocast``; policies of jmp (github.com/google-deepmind/jmp).
    """
    function, first = unbound(fn, "nnx.with_policy")
    resolved = get_policy(policy)
    run = autocast(function, resolved)

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        return jax.tree.map(
            lambda leaf: leaf if is_node(leaf) else resolved.cast_to_output(leaf), result, is_leaf=is_leaf
        )

    return functools.partial(wrapped, *first) if first else wrapped
