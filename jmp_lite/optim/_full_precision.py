"""Weights of float32 behind parameters of 16 bits: taken out of the state of ``stored``, and put into it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jmp_lite._dtypes import FLOAT32
from jmp_lite._policy import PolicyLike, get_policy
from jmp_lite._tree import path_string
from jmp_lite.errors import InvalidStorageError
from jmp_lite.optim._stored import StoredState, is_narrow, stored_states
from jmp_lite.optim._weights import format_of


def _low_bits(opt_state: Any) -> dict[str, Any]:
    """Low bits by path of the parameter; several ``stored``, each for some of them, have theirs."""
    states = list(stored_states(opt_state))
    if not states:
        raise InvalidStorageError(
            f"No full precision in the state, which is of type {type(opt_state).__name__}. Pass the state of an "
            "optimizer wrapped in jmp_lite.optim.stored."
        )
    return {path_string(path): low for s in states for path, low in jax.tree_util.tree_leaves_with_path(s.low)}


def full_precision_params(opt_state: Any, params: Any) -> Any:
    """Returns the float32 weights that an optimizer made by ``stored`` has, for evaluation, averaging and export.

    Args:
        opt_state: Its state, or any state that holds it.
        params: The parameters that the model sees.

    Returns:
        A tree like ``params``, the leaves of 16 bits in float32: with their low bits where the state has some.

    Raises:
        InvalidStorageError: If the state holds none of ``stored``.

    Example:
        >>> tx = jmp.optim.master_weights(optax.sgd(0.1))
        >>> params, opt_state = jmp.optim.from_full_precision(tx, {"w": jnp.array([0.1, 0.2])})
        >>> print(params["w"], jmp.optim.full_precision_params(opt_state, params)["w"])
        [0.100098 0.200195] [0.1 0.2]
    """
    low_bits = _low_bits(opt_state)

    def decode(path: Any, param: Any) -> Any:
        low = low_bits.get(path_string(path))
        return format_of(low).decode(param, low) if is_narrow(param) else param

    return jax.tree_util.tree_map_with_path(decode, params)


def from_full_precision(
    tx: optax.GradientTransformation, params: Any, policy: PolicyLike = "bfloat16"
) -> tuple[Any, Any]:
    """Starts training from float32 weights: what the model sees of them, and a state that keeps the rest.

    Args:
        tx: An optimizer made by ``stored``, or one with it inside, such as by ``loss_scaled``.
        params: Weights in float32.
        policy: Its ``param_dtype`` says which leaves the model sees in 16 bits: a dtype, a ``Policy`` or a
            ``PolicyMap``, which leaves norms in float32 for example.

    Returns:
        ``(params, opt_state)``. Copies that an optimizer makes of parameters at ``init`` are of what the model sees.

    Raises:
        InvalidStorageError: If ``tx`` holds none of ``stored``; else as its ``init``.

    Example:
        >>> tx = jmp.optim.stored(optax.adam(1e-3), params="split8", state="8bit")
        >>> policy = jmp.PolicyMap({"norm": "float32"}, default="bfloat16")
        >>> params = {"norm": {"scale": jnp.ones(4)}, "dense": {"kernel": jnp.ones((4, 4))}}
        >>> params, opt_state = jmp.optim.from_full_precision(tx, params, policy)
        >>> jax.tree.map(jnp.result_type, params)
        {'dense': {'kernel': dtype(bfloat16)}, 'norm': {'scale': dtype('float32')}}
    """
    seen = get_policy(policy).cast_to_param(params)
    opt_state = tx.init(seen)
    full = {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    dtypes = {
        path_string(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(seen) if is_narrow(leaf)
    }

    def halves(name: str, low: Any) -> tuple[Any, Any]:
        to_nearest = jnp.full(low.shape, 2**31, jnp.uint32)
        return format_of(low).encode(jnp.asarray(full[name], FLOAT32), to_nearest, dtypes[name])

    split = {name: halves(name, low) for name, low in _low_bits(opt_state).items()}

    def put(which: int, path: Any, leaf: Any) -> Any:
        return split.get(path_string(path), (leaf, leaf))[which]

    def fill(node: Any) -> Any:
        if not isinstance(node, StoredState):
            return node
        return node._replace(low=jax.tree_util.tree_map_with_path(functools.partial(put, 1), node.low))

    seen = jax.tree_util.tree_map_with_path(functools.partial(put, 0), seen)
    return seen, jax.tree.map(fill, opt_state, is_leaf=lambda node: isinstance(node, StoredState))
