"""Casting, checking and selecting whole pytrees.

One rule decides what a cast touches: arrays whose dtype is a standard floating format (float16, bfloat16, float32) or
one that the caller names. Everything else is handed through as the same object.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import INLINE
from jmp_lite._dtypes import (
    FLOAT32,
    NARROW_FORMATS,
    STANDARD_FORMATS,
    DType,
    at_least_float32,
    canonical,
    half_dtype,
)
from jmp_lite._messages import quote, type_of
from jmp_lite.errors import InvalidSelectionError, MissingAxisError

T = TypeVar("T")
Path = tuple[Any, ...]
#: The structure of a tree, and which of its leaves were chosen.
Layout = tuple[Any, list[bool]]


#: What Flax, Haiku and Equinox call parameters that are added or that scale; those of attention and of stacked layers
#: have two axes, as weights have.
NOT_WEIGHTS = frozenset({"b", "bias", "offset", "scale"})


class Opaque:
    """Base of pytree nodes whose arrays are bookkeeping and keep their dtype under every policy."""


def _is_opaque(node: Any) -> bool:
    return isinstance(node, Opaque)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is a JAX or NumPy array or a NumPy scalar."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def partition(
    tree: Any, is_chosen: Callable[[Any], bool], is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], list[Any], Layout]:
    """Splits the leaves of a tree into those chosen, the others, and how they stand together."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
    chosen = [is_chosen(leaf) for leaf in leaves]
    others = [leaf for leaf, flag in zip(leaves, chosen, strict=True) if not flag]
    return list(itertools.compress(leaves, chosen)), others, (treedef, chosen)


def combine(chosen: Iterable[Any], others: Iterable[Any], layout: Layout) -> Any:
    """Undoes ``partition``, with other leaves in the same places."""
    treedef, flags = layout
    remaining, remaining_others = iter(chosen), iter(others)
    return jax.tree.unflatten(treedef, [next(remaining if flag else remaining_others) for flag in flags])


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is a floating or complex array, or a Python ``float`` or ``complex``."""
    if is_array(leaf):
        return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
    return isinstance(leaf, (float, complex))


def is_narrow(leaf: Any) -> bool:
    """Whether a leaf is an array of a floating dtype of 16 bits."""
    return is_array(leaf) and leaf.dtype in NARROW_FORMATS


def is_number(leaf: Any) -> bool:
    """Whether a leaf is a number or an array of them; JAX's gradient of integers, ``float0``, is not."""
    if is_array(leaf):
        return bool(leaf.dtype != jax.dtypes.float0)
    return isinstance(leaf, (bool, int, float, complex))


def path_string(path: Path) -> str:
    """Writes a key path as ``decoder/layers_3/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _unboxed(path: Path) -> Path:
    """Leaves out a box of Flax: ``nnx.Optimizer`` gives variables to ``init``, and the arrays in them to ``update``."""
    is_boxed = path[-1:] in ((jax.tree_util.GetAttrKey("value"),), (jax.tree_util.GetAttrKey("raw_value"),))
    return path[:-1] if is_boxed else path


def leaf_key(path: Path) -> str:
    """Writes the path of a leaf so that no two are alike, as ``['decoder'].layers[3]['kernel']``, without boxes."""
    return jax.tree_util.keystr(_unboxed(path))


def difference(trees: dict[str, Any]) -> str:
    """Says where two trees, given by what they hold, differ: in paths, or else in a shape; empty if in neither."""

    def leaves(tree: Any) -> dict[str, Any]:
        named = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: node is None)
        return {path_string(_unboxed(path)): leaf for path, leaf in named}

    (first, second), (these, those) = trees, map(leaves, trees.values())
    alone = [
        f"{path!r} is only in the {name}" if path else f"there is only {quote(mine[path])} in the {name}"
        for name, mine, other in ((first, these, those), (second, those, these))
        for path in [path for path in mine if path not in other][:1]
    ]
    unlike = [
        f"{path!r} is {type_of(leaf)} in the {first} and {type_of(those[path])} in the {second}"
        for path, leaf in these.items()
        if path in those and np.shape(leaf) != np.shape(those[path])
    ]
    return " and ".join(alone) or (unlike or [""])[0]


def cast(array: Any, dtype: Any) -> Any:
    """Casts an array that may be in that dtype already."""
    return array if array.dtype == dtype else _converter(dtype)(array)


@functools.lru_cache(maxsize=64)
def _converter(dtype: Any) -> Callable[[Any], Any]:
    """JAX remembers the derivative of what is jitted."""
    return jax.jit(functools.partial(jax.lax.convert_element_type, new_dtype=dtype), inline=INLINE)


def vary_over(flags: jax.Array, axis_name: Any) -> jax.Array:
    """Returns booleans as they are, but known to vary over all of the axes, as a collective over them demands.

    The comparison is always true.
    """
    return flags & (jax.lax.axis_index(axis_name) >= 0)


def cast_leaf(leaf: Any, dtype: DType, named: Iterable[DType] = ()) -> Any:
    """Casts one leaf if it is an array of a standard or a named floating format.

    Args:
        leaf: Anything.
        dtype: The floating dtype to cast to.
        named: Further dtypes, beyond the standard ones, that are cast from.

    Returns:
        The leaf itself where nothing is to be done, else an array of the same kind (JAX or NumPy) and the new dtype.
        JAX warns where a float64 that it was asked for is not enabled.
    """
    if not is_array(leaf) or leaf.dtype == dtype or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    source = canonical(leaf.dtype)
    return leaf.astype(dtype) if source in STANDARD_FORMATS or source in named else leaf


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
        >>> jax.tree.map(jnp.result_type, jmp.cast_to_full({"w": jnp.ones(2, jnp.bfloat16), "step": jnp.int32(3)}))
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


def is_finite(array: Any) -> jax.Array:
    """Returns which floating or complex numbers of an array are finite, of a dtype that JAX asks about or not."""
    return jnp.isfinite(cast_to_at_least_float32(array))


def scalar_predicate(value: Any) -> jax.Array:
    """Returns a boolean scalar array, or says what else it was given.

    Raises:
        InvalidSelectionError: If the value is not one boolean.
    """
    is_boolean = isinstance(value, bool) or (is_array(value) and value.shape == () and value.dtype == np.bool_)
    if not is_boolean:
        raise InvalidSelectionError(
            f"expected boolean scalar, got {quote(value)}. Reduce it first, for example with jmp_lite.all_finite."
        )
    return jnp.asarray(value)


def mapped_axes(axis_name: Any) -> Any:
    """Returns the name, or tuple of names, of mapped axes as JAX takes them.

    Raises:
        MissingAxisError: If one is not mapped here.
    """
    names = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    try:
        jax.lax.axis_size(names)
    except (NameError, TypeError, ValueError):
        raise MissingAxisError(
            f"axis_name={quote(axis_name)} is not an axis that pmap, shard_map or vmap maps here. Call this inside of "
            "one that does, or leave axis_name out."
        ) from None
    return names


def agree(verdict: jax.Array, axis_name: Any) -> jax.Array:
    """Returns whether a verdict holds on every device along the named mapped axes (``None``: as it is)."""
    if axis_name is None:
        return verdict
    axis_name = mapped_axes(axis_name)
    agreed: jax.Array = jax.lax.pmin(vary_over(verdict, axis_name).astype(jnp.int32), axis_name) > 0
    return agreed


def all_finite(tree: Any, *, axis_name: Any = None) -> jax.Array:
    """Returns whether every floating and complex number of a tree is finite.

    Under ``jit`` with sharded arrays the answer is global. Inside ``pmap`` and ``shard_map`` each device sees its own
    values: pass ``axis_name`` to get one answer for all.

    Args:
        tree: Any pytree; leaves that are not floating or complex count as finite.
        axis_name: Name, or tuple of names, of mapped axes to agree over.

    Returns:
        ``bool[]``; True for a tree without such leaves.

    Raises:
        MissingAxisError: If an axis is not mapped here.

    Example:
        >>> print(jmp.all_finite({"w": jnp.array([1.0, jnp.inf]), "step": 3}))
        False
    """
    leaves = [is_finite(x).all() for x in jax.tree.leaves(tree) if is_inexact(x)]
    finite = jnp.stack(leaves).all() if leaves else jnp.array(True)
    return agree(finite, axis_name)


def _is_numeric(leaf: Any) -> bool:
    """Whether arithmetic can choose the leaf: a number, or an array of numbers or booleans."""
    if not is_array(leaf):
        return isinstance(leaf, (bool, int, float, complex))
    return bool(jnp.issubdtype(leaf.dtype, jnp.number)) or leaf.dtype == np.bool_


def _native(leaf: Any) -> jax.Array:
    """Converts a numeric leaf to a JAX array; JAX itself takes no arrays in foreign byte order."""
    return jnp.asarray(leaf, canonical(leaf.dtype) if isinstance(leaf, (np.ndarray, np.generic)) else None)


def _alike(first: Any, second: Any) -> tuple[jax.Array, jax.Array] | None:
    """Converts two leaves to arrays of one dtype; ``None`` where no array operation can choose between them."""
    arrays_of_one_dtype = isinstance(first, jax.Array) and isinstance(second, jax.Array) and first.dtype == second.dtype
    numeric = _is_numeric(first) and _is_numeric(second)
    if np.shape(first) != np.shape(second) or not (arrays_of_one_dtype or numeric):
        return None
    pair = _native(first), _native(second)
    if pair[0].dtype == pair[1].dtype:
        return pair
    with jax.numpy_dtype_promotion("standard"):
        try:
            dtype = jnp.result_type(*pair)
        except ValueError:  # float8 has no common dtype with others
            return None
    return pair[0].astype(dtype), pair[1].astype(dtype)


def _select_leaf(pred: jax.Array, path: Path, on_true: Any, on_false: Any) -> Any:
    pair = _alike(on_true, on_false)
    if pair is not None:
        return jax.lax.select(pred, *pair)
    numeric = _is_numeric(on_true) or _is_numeric(on_false)
    if not numeric and (on_true is on_false or np.array_equal(on_true, on_false)):
        return on_true
    raise InvalidSelectionError(
        f"Leaf {path_string(path)!r} is {quote(on_true)} in one tree and {quote(on_false)} in the other: only "
        "arrays of one shape and compatible dtypes can be selected. Make the two alike, or keep them out of the tree."
    )


def select_tree(pred: Any, on_true: T, on_false: T) -> T:
    """Chooses between two trees of the same structure with one boolean, without branching.

    Args:
        pred: ``bool[]``, or a Python bool.
        on_true: Tree returned where ``pred`` is True.
        on_false: Tree returned where it is False. Leaves of different dtypes are promoted as JAX does by default;
            leaves that are not arrays must be equal in both trees.

    Returns:
        A tree of the same structure.

    Raises:
        InvalidSelectionError: If ``pred`` is not one boolean, a leaf that is not an array differs, or two arrays have
            no common shape and dtype.

    Example:
        >>> jmp.select_tree(False, {"step": jnp.int32(1)}, {"step": jnp.int32(0)})
        {'step': Array(0, dtype=int32)}
    """
    scalar = scalar_predicate(pred)
    structures: Any = map(jax.tree.structure, (on_true, on_false))
    if operator.ne(*structures):
        where = difference({"first one": on_true, "second one": on_false}) or "they are made of other classes"
        raise InvalidSelectionError(f"The two trees differ: {where}. Select between trees of one structure.")
    selected: T = jax.tree_util.tree_map_with_path(
        lambda path, a, b: _select_leaf(scalar, path, a, b), on_true, on_false
    )
    return selected
