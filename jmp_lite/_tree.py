"""Casting, checking and selecting whole pytrees.

One rule decides what a cast touches: arrays whose dtype is a standard floating format (float16, bfloat16, float32) or
one that the caller names. Everything else is handed through as the same object.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._dtypes import (
    FLOAT32,
    STANDARD_FORMATS,
    DType,
    at_least_float32,
    canonical,
    half_dtype,
)
from jmp_lite._errors import NonScalarPredicateError, UnselectableLeafError

T = TypeVar("T")
Path = tuple[Any, ...]


class Opaque:
    """Base of pytree nodes whose arrays are bookkeeping and keep their dtype under every policy."""


def _is_opaque(node: Any) -> bool:
    return isinstance(node, Opaque)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is a JAX or NumPy array or a NumPy scalar."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is a floating or complex array, or a Python ``float`` or ``complex``."""
    if is_array(leaf):
        return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
    return isinstance(leaf, (float, complex))


def path_string(path: Path) -> str:
    """Writes a key path as ``decoder/layers_3/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def cast_leaf(leaf: Any, dtype: DType, named: Iterable[DType] = ()) -> Any:
    """Casts one leaf if it is an array of a standard or a named floating format.

    Args:
        leaf: Anything.
        dtype: The floating dtype to cast to.
        named: Further dtypes, beyond the standard ones and ``dtype`` itself, that are cast from.

    Returns:
        The leaf itself where nothing is to be done, else an array of the same kind (JAX or NumPy) and the new dtype.
    """
    if not is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    source = canonical(leaf.dtype)
    target = canonical(dtype) if isinstance(leaf, jax.Array) else dtype
    castable = source in STANDARD_FORMATS or source == target or source in named
    if not castable or leaf.dtype == target:
        return leaf
    return leaf.astype(target)


def map_leaves(fun: Callable[[Path, Any], Any], tree: T) -> T:
    """Maps ``fun(path, leaf)`` over a tree; loss scales and other opaque nodes stay as they are."""

    def leaf_or_node(path: Path, node: Any) -> Any:
        return node if _is_opaque(node) else fun(path, node)

    mapped: T = jax.tree_util.tree_map_with_path(leaf_or_node, tree, is_leaf=_is_opaque)
    return mapped


def cast_floating(tree: T, dtype: DType, named: Iterable[DType] = ()) -> T:
    """Casts the floating arrays of a tree; see ``cast_leaf`` for which ones those are."""
    return map_leaves(lambda _, leaf: cast_leaf(leaf, dtype, named), tree)


def cast_to_full(tree: T) -> T:
    """Casts the float16 and bfloat16 arrays of a tree to float32.

    Integers, booleans, complex numbers, float8, float64 (with x64 enabled), PRNG keys, ``None``, Python scalars,
    strings and loss scales pass through untouched.

    Args:
        tree: Any pytree.

    Returns:
        A tree of the same structure.

    Example:
        >>> jax.tree.map(jnp.dtype, jmp.cast_to_full({"w": jnp.ones(2, jnp.bfloat16), "step": jnp.int32(3)}))
        {'step': dtype('int32'), 'w': dtype('float32')}
    """
    return cast_floating(tree, FLOAT32)


def cast_to_half(tree: T) -> T:
    """Casts the float32 and 16-bit floating arrays of a tree to ``half_dtype()``.

    Args:
        tree: Any pytree; see ``cast_to_full`` for what passes through untouched.

    Returns:
        A tree of the same structure.

    Example:
        >>> jmp.cast_to_half({"w": jnp.ones(2), "name": "head"})["w"].dtype == jmp.half_dtype()
        True
    """
    return cast_floating(tree, half_dtype())


def cast_to_at_least_float32(leaf: Any) -> jax.Array:
    """Converts an inexact leaf to float32; float64 and complex numbers keep their precision."""
    dtype = leaf.dtype if is_array(leaf) else np.result_type(type(leaf), np.float16)
    return jnp.asarray(leaf, at_least_float32(dtype))


def scalar_predicate(value: Any) -> jax.Array:
    """Returns a boolean scalar array, or says what else it was given.

    Raises:
        NonScalarPredicateError: If the value is not one boolean.
    """
    shape, dtype = np.shape(value), jnp.result_type(value)
    if shape != () or dtype != np.bool_:
        raise NonScalarPredicateError(
            f"expected boolean scalar, got {dtype}{list(shape)}. Reduce it first, for example with jmp_lite.all_finite."
        )
    return jnp.asarray(value)


def agree(verdict: jax.Array, axis_name: Any) -> jax.Array:
    """Returns whether a verdict holds on every device along the named mapped axes (``None``: as it is)."""
    if axis_name is None:
        return verdict
    return jax.lax.pmin(verdict.astype(jnp.int32), axis_name) > 0


def all_finite(tree: Any, *, axis_name: Any = None) -> jax.Array:
    """Returns whether every floating and complex number of a tree is finite.

    Under ``jit`` with sharded arrays the answer is global. Inside ``pmap`` and ``shard_map`` each device sees its own
    values: pass ``axis_name`` to get one answer for all.

    Args:
        tree: Any pytree; leaves that are not floating or complex count as finite.
        axis_name: Name, or tuple of names, of mapped axes to agree over.

    Returns:
        ``bool[]``; True for a tree without such leaves.

    Example:
        >>> print(jmp.all_finite({"w": jnp.array([1.0, jnp.inf]), "step": 3}))
        False
    """
    leaves = [cast_to_at_least_float32(x) for x in jax.tree.leaves(tree) if is_inexact(x)]
    finite = jnp.stack([jnp.isfinite(x).all() for x in leaves]).all() if leaves else jnp.array(True)
    return agree(finite, axis_name)


def _select_leaf(pred: jax.Array, path: Path, on_true: Any, on_false: Any) -> Any:
    if getattr(on_true, "dtype", None) == jax.dtypes.float0:
        return on_true
    if is_array(on_true) or isinstance(on_true, (bool, int, float, complex)):
        on_true, on_false = jnp.asarray(on_true), jnp.asarray(on_false)
        if on_true.dtype != on_false.dtype:
            dtype = jnp.promote_types(on_true.dtype, on_false.dtype)
            on_true, on_false = on_true.astype(dtype), on_false.astype(dtype)
        return jax.lax.select(pred, on_true, on_false)
    if on_true is on_false or on_true == on_false:
        return on_true
    raise UnselectableLeafError(
        f"Leaf {path_string(path)!r} is {on_true!r} in one tree and {on_false!r} in the other: only arrays can be "
        "selected. Keep other values out of the tree, or make them equal."
    )


def select_tree(pred: Any, on_true: T, on_false: T) -> T:
    """Chooses between two trees of the same structure with one boolean, without branching.

    Args:
        pred: ``bool[]``, or a Python bool.
        on_true: Tree returned where ``pred`` is True.
        on_false: Tree returned where it is False. Leaves of different dtypes are promoted; leaves that are not arrays
            must be equal in both trees.

    Returns:
        A tree of the same structure.

    Raises:
        NonScalarPredicateError: If ``pred`` is not one boolean.
        UnselectableLeafError: If a leaf that is not an array differs.

    Example:
        >>> jmp.select_tree(False, {"step": jnp.int32(1)}, {"step": jnp.int32(0)})
        {'step': Array(0, dtype=int32)}
    """
    scalar = scalar_predicate(pred)
    selected: T = jax.tree_util.tree_map_with_path(
        lambda path, a, b: _select_leaf(scalar, path, a, b), on_true, on_false
    )
    return selected
