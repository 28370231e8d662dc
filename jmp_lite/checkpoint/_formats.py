"""Formats of the moments in the state of ``optim.stored``: the same bytes mean different numbers in another format."""

import ast
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jmp_lite._dtypes import FLOAT32
from jmp_lite._tree import Path, leaf_key, path_string
from jmp_lite.checkpoint._stored import sharded_like
from jmp_lite.errors import CheckpointMismatchError
from jmp_lite.optim._moments import Float, Log, Ratio, SignedLog, StateFormat
from jmp_lite.optim._stored import StoredState, encoded_at_first
from jmp_lite.scaling._in_state import is_stored

#: Name of a format and the path of the moment that it is relative to, by path of a moment.
Formats = Mapping[str, Mapping[str, Any]]


def _stored_nodes(state: Any) -> list[tuple[Path, StoredState]]:
    nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_stored)
    return [(path, node) for path, node in nodes if is_stored(node)]


def _names(path: Path, node: StoredState) -> list[str]:
    """Paths of the leaves of the inner state, as the header has them."""
    field = jax.tree_util.GetAttrKey("inner_state")
    leaves = jax.tree_util.tree_leaves_with_path(node.inner_state)
    return [path_string((*path, field, *own)) for own, _ in leaves]


def _low_bits(state: Any) -> dict[str, dict[str, Any]]:
    """What the low bits of parameters complete."""
    found = {}
    for path, node in _stored_nodes(state):
        dtypes, field = dict(node.layout.params), jax.tree_util.GetAttrKey("low")
        for own, _ in jax.tree_util.tree_leaves_with_path(node.low):
            name = path_string((*path, field, *own))
            found[name] = {"format": f"low bits of {dtypes.get(leaf_key(own))}", "other": None}
    return found


def _say(one: StateFormat) -> str:
    """The name of a format, with its settings if they are known."""
    kind = type(one)
    return repr(one) if kind in (Log, SignedLog, Ratio) else f"{kind.__module__}.{kind.__qualname__}"


def formats_of(state: Any) -> dict[str, dict[str, Any]]:
    """Returns the formats of what is stored in bytes that are not numbers by themselves."""
    found = _low_bits(state)
    for path, node in _stored_nodes(state):
        names = _names(path, node)
        for kept in node.layout.kept or ():
            if not isinstance(kept.format, Float):
                other = None if kept.other is None else names[kept.other]
                found[names[kept.leaf]] = {"format": _say(kept.format), "other": other}
    return found


def _changed(header: Mapping[str, Any], template: Any) -> list[str]:
    """Paths of moments that checkpoint and template store in different formats.

    Raises:
        CheckpointMismatchError: If low bits belong to parameters of another dtype, which nothing converts.
    """
    saved, wanted, low = header["formats"], formats_of(template), _low_bits(template)
    changed = [name for name in header["leaves"] if saved.get(name) != wanted.get(name)]
    for name in changed:
        if name in low and name in saved:
            raise CheckpointMismatchError(
                f"{name!r} is {saved[name]['format']} in the checkpoint and {low[name]['format']} in the template. "
                "Restore with parameters of the dtype that was saved, and convert with optim.full_precision_params and "
                "optim.from_full_precision."
            )
    return changed


def check_formats(header: Mapping[str, Any], template: Any) -> None:
    """Raises CheckpointMismatchError if the template stores a moment in another format."""
    saved, wanted = header["formats"], formats_of(template)
    named = {name for path, node in _stored_nodes(template) for name in _names(path, node)}
    for name in _changed(header, template):
        if name in named:
            here, there = (known.get(name, {"format": "a float"})["format"] for known in (wanted, saved))
            raise CheckpointMismatchError(
                f"The moment {name!r} is stored as {there} in the checkpoint and as {here} in the template: the same "
                "bytes would mean other numbers. Restore with the formats it was saved in, or pass migrate=True to "
                "convert."
            )


def with_saved_formats(header: Mapping[str, Any], template: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Replaces states of ``optim.stored`` by ones with the formats of the checkpoint, where they differ.

    Returns:
        The new template, and a function that converts a state restored into it to the formats of the given one.

    Raises:
        CheckpointMismatchError: If the checkpoint has a format that is not one of jmp_lite.
    """
    changed, saved = set(_changed(header, template)), header["formats"]
    names = {path: _names(path, node) for path, node in _stored_nodes(template)}
    found = {path for path, own in names.items() if changed & set(own)}
    formats = {name: _parsed(name, saved[name]["format"]) for path in found for name in names[path] if name in saved}

    def replace(path: Path, node: Any) -> Any:
        if path not in found:
            return node
        leaves, treedef = jax.tree.flatten(node.inner_state)
        for i, name in enumerate(names[path]):
            if name in changed:
                as_saved = jax.ShapeDtypeStruct(leaves[i].shape, jnp.dtype(header["leaves"][name]["dtype"]))
                leaves[i] = sharded_like(as_saved, leaves[i])
        return node._replace(inner_state=jax.tree.unflatten(treedef, leaves))

    def put_back(path: Path, node: Any, read: Any) -> Any:
        if path not in found:
            return read
        leaves, treedef = jax.tree.flatten(read.inner_state)
        values = dict(zip(names[path], leaves, strict=True))
        for name in sorted(set(values) & set(formats), key=lambda name: formats[name].relative_to is not None):
            other = saved[name]["other"]
            values[name] = formats[name].decode(values[name], None if other is None else values[other].astype(FLOAT32))
        return read._replace(
            inner_state=encoded_at_first(jax.tree.unflatten(treedef, list(values.values())), node.layout)
        )

    if not found:
        return template, lambda read: read
    stand_in = jax.tree_util.tree_map_with_path(replace, template, is_leaf=is_stored)
    return stand_in, lambda read: jax.tree_util.tree_map_with_path(put_back, template, read, is_leaf=is_stored)


def _parsed(name: str, text: str) -> StateFormat:
    """The format that writes itself so."""
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (Log, SignedLog, Ratio)}
    try:
        call: Any = ast.parse(text, mode="eval").body
        made: StateFormat = kinds[call.func.id](**{word.arg: ast.literal_eval(word.value) for word in call.keywords})
    except (AttributeError, KeyError, TypeError, ValueError, SyntaxError):
        raise CheckpointMismatchError(
            f"The moment {name!r} is stored as {text} in the checkpoint, which is not a format of jmp_lite, so "
            "migrate=True cannot convert it. Restore with the formats it was saved in."
        ) from None
    return made
