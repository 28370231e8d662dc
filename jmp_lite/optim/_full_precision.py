"""Float32 weights behind 16-bit parameters: read from the state of ``stored``, and written into it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmp_lite._dtypes import FLOAT32, dtype_or_none
from jmp_lite._messages import described, first_few, quote
from jmp_lite._policy import PolicyLike, get_policy
from jmp_lite._tree import is_narrow, leaf_key
from jmp_lite.errors import InvalidStorageError
from jmp_lite.optim._stored import decoded, encoded_at_first, stored_states
from jmp_lite.optim._weights import WeightFormat, format_of
from jmp_lite.scaling._in_state import is_stored, nodes, stored_params
from jmp_lite.scaling._loss_scaled import LossScaledState, check_optimizer, trainable
from jmp_lite.scaling._lost_updates import warn_of_lost_updates


def _low_bits(opt_state: Any) -> dict[str, Any]:
    """Low bits by the key of the parameter, collected from every ``stored`` in the state."""
    states = stored_states(opt_state)
    return {leaf_key(path): low for s in states for path, low in jax.tree_util.tree_leaves_with_path(s.low)}


def full_precision_params(opt_state: Any, params: Any) -> Any:
    """Returns the float32 weights that a ``stored`` optimizer holds, for evaluation, averaging and export.

    Args:
        opt_state: Its state, or any state that holds it.
        params: The parameters that the model sees.

    Returns:
        A tree like ``params`` with 16-bit leaves in float32, including the low bits that the state holds.

    Raises:
        InvalidStorageError: If the state holds no state of ``stored``, or belongs to other parameters.

    Example:
        >>> tx = jmp.optim.master_weights(optax.sgd(0.1))
        >>> params, opt_state = jmp.optim.from_full_precision(tx, {"w": jnp.array([0.1, 0.2])})
        >>> print(params["w"], jmp.optim.full_precision_params(opt_state, params)["w"])
        [0.100098 0.200195] [0.1 0.2]
    """
    low_bits = _low_bits(opt_state)
    shapes = {leaf_key(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    unknown = sorted(path for path, low in low_bits.items() if shapes.get(path) != low.shape)
    if unknown:
        raise InvalidStorageError(
            f"The state has low bits of {first_few(unknown)}, which the parameters do not have in that shape. Pass "
            "the parameters of this state, in the tree that init was called with."
        )

    def decode(path: Any, param: Any) -> Any:
        low = low_bits.get(leaf_key(path))
        return _whole(param, low) if is_narrow(param) else param

    return jax.tree_util.tree_map_with_path(decode, params)


def from_full_precision(
    tx: optax.GradientTransformation,
    params: Any,
    policy: PolicyLike | jax.typing.DTypeLike = "bfloat16",
    *,
    opt_state: Any = None,
) -> tuple[Any, Any]:
    """Starts training from float32 weights: returns the parameters for the model, and a state with the remaining bits.

    Args:
        tx: An optimizer made by ``stored``, or a wrapper of one, such as ``loss_scaled``.
        params: Weights in float32.
        policy: Its ``param_dtype`` sets which leaves the model sees in 16 bits: a dtype, a ``Policy`` or a
            ``PolicyMap``, for example to keep norms in float32.
        opt_state: State of the same optimizer without ``stored``, to resume from a float32 run, or with ``stored`` in
            other formats.

    Returns:
        ``(params, opt_state)``. Without ``opt_state``, an optimizer that copies parameters at ``init`` copies the
        rounded ones.

    Raises:
        InvalidStorageError: If ``tx`` contains no ``stored``, or ``opt_state`` belongs to another optimizer; otherwise
            as its ``init``.

    Warns:
        LostUpdatesWarning: For 16-bit parameters that an optimizer outside of ``stored`` trains.

    Example:
        >>> params = {"norm": {"scale": jnp.ones(4)}, "dense": {"kernel": jnp.ones((4, 4))}}
        >>> float32_state = optax.adam(1e-3).init(params)
        >>> tx = jmp.optim.stored(optax.adam(1e-3), params="split8", state="8bit")
        >>> policy = jmp.PolicyMap({"norm": "float32"}, default="bfloat16")
        >>> params, opt_state = jmp.optim.from_full_precision(tx, params, policy, opt_state=float32_state)
        >>> jax.tree.map(jnp.result_type, params)
        {'dense': {'kernel': dtype(bfloat16)}, 'norm': {'scale': dtype('float32')}}
    """
    check_optimizer(tx, "from_full_precision")
    given: Any = policy
    dtype = None if isinstance(given, str) else dtype_or_none(given)
    seen = get_policy(given if dtype is None else dtype.name).cast_to_param(params)
    state = tx.init(seen)
    low_bits = _low_bits(state)
    _warn_of_the_rest(tx, state, seen)
    if opt_state is not None:
        state = _filled(state, opt_state)

    def split(path: Any, full: Any, leaf: Any) -> tuple[Any, Any]:
        low = low_bits.get(leaf_key(path))
        return (leaf, None) if low is None else halves(full, low, leaf.dtype)

    pairs = jax.tree_util.tree_map_with_path(split, params, seen)
    seen, low = (jax.tree.map(lambda _, pair, i=i: pair[i], params, pairs) for i in (0, 1))
    given = {leaf_key(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(low)}

    def fill(node: Any) -> Any:
        if not is_stored(node):
            return node
        return node._replace(low=jax.tree_util.tree_map_with_path(lambda path, _: given[leaf_key(path)], node.low))

    return seen, jax.tree.map(fill, state, is_leaf=is_stored)


def _warn_of_the_rest(tx: optax.GradientTransformation, state: Any, params: Any) -> None:
    """Warns about 16-bit parameters that only another optimizer updates, as ``loss_scaled`` does in its ``init``."""
    if not nodes(state, lambda node: isinstance(node, LossScaledState)):
        known = trainable(params)
        warn_of_lost_updates(lambda grads: tx.update(grads, state, known)[0], known, stored_params(state))


@jax.jit
def _whole(seen: Any, low: Any) -> jax.Array:
    return format_of(low).decode(seen, low)


def halves(full: Any, low: Any, dtype: Any) -> tuple[jax.Array, Any]:
    """Splits float32 into a number of this dtype, rounded to nearest, and low bits as ``Split`` stores them."""
    split: tuple[jax.Array, Any] = _nearest(jnp.asarray(full, FLOAT32), format_of(low), dtype)
    return split


@functools.partial(jax.jit, static_argnums=(1, 2))
def _nearest(full: jax.Array, weights: WeightFormat, dtype: Any) -> tuple[jax.Array, Any]:
    return weights.encode(full, jnp.full(full.shape, 2**31, jnp.uint32), dtype)


def _filled(state: Any, opt_state: Any) -> Any:
    """Fills a state from one in other formats, or from that of the inner optimizer in place of ``stored``'s."""

    def fill(node: Any, given: Any) -> Any:
        if not is_stored(node):
            return given
        given = decoded(given.inner_state, given.layout) if is_stored(given) else given
        inner_state = _like(given, decoded(node.inner_state, node.layout))
        return node._replace(inner_state=encoded_at_first(inner_state, node.layout))

    try:
        return jax.tree.map(fill, state, opt_state, is_leaf=is_stored)
    except (ValueError, TypeError) as error:
        raise InvalidStorageError(
            f"opt_state is not a state of this optimizer without stored: {described(error)} Pass what the optimizer of "
            "the run in float32 returned."
        ) from error


def _like(tree: Any, other: Any) -> Any:
    """Returns a tree of the same structure and shapes as another one, or raises."""

    def same(leaf: Any, wanted: Any) -> Any:
        if np.shape(leaf) != np.shape(wanted):
            raise ValueError(f"{quote(leaf)} in place of {quote(wanted)}")
        return leaf

    return jax.tree.map(same, tree, other)
