"""Converts a train state to its stored form and a header, and back through a template."""

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._messages import first_few
from jmp_lite._policy import PolicyLike, get_policy
from jmp_lite._tree import is_finite, path_string
from jmp_lite.checkpoint._digest import digests, is_shared
from jmp_lite.checkpoint._formats import check_formats, formats_of, with_saved_formats
from jmp_lite.checkpoint._stored import without_stored
from jmp_lite.errors import (
    CheckpointMismatchError,
    InvalidCheckpointError,
    InvalidLossScaleError,
    PolicyMismatchError,
)
from jmp_lite.scaling._in_state import is_loss_scale
from jmp_lite.scaling._loss_scale import DynamicLossScale, NoOpLossScale

T = TypeVar("T")

Header = dict[str, Any]

#: What a header has, beside its checksum.
_HEADER = {"policy", "loss_scales", "leaves", "formats"}
_NUMBERS = (bool, int, float, complex)
#: Arrays of so many bytes are worth reading without a copy.
_LARGE = 1 << 20


# --- Leaves ---------------------------------------------------------------------------------------


def is_key(leaf: Any) -> bool:
    """Whether a leaf, or its placeholder in a template, is a typed PRNG key."""
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_number(leaf: Any) -> bool:
    """Whether a leaf is a Python number; NumPy's float64 is a float, but keeps its type."""
    return isinstance(leaf, _NUMBERS) and not isinstance(leaf, np.generic)


def _key_impl(keys: Any) -> Any:
    """The generator of keys, abstract ones included."""
    impl: list[Any] = []
    jax.eval_shape(lambda k: impl.append(jax.random.key_impl(k)), jax.ShapeDtypeStruct(keys.shape, keys.dtype))
    return impl[0]


def key_data(leaf: Any) -> Any:
    """Replaces typed PRNG keys, which no format can store, with their data."""
    if not is_key(leaf):
        return leaf
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf)
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def wrap_key_data(template: Any, data: Any) -> Any:
    """Makes keys of the template's implementation from their data."""
    return jax.random.wrap_key_data(data, impl=_key_impl(template))


def to_store(state: Any) -> Any:
    """The leaves for Orbax: key data for keys, and copies of host arrays, which the program may change meanwhile.

    Process-local arrays in a job of several processes count as host arrays too.
    """

    def stored(leaf: Any) -> Any:
        leaf = key_data(leaf)
        if is_number(leaf):
            return leaf
        return leaf if is_shared(leaf) else np.array(leaf)

    return jax.tree.map(stored, state)


def _sharding(leaf: Any) -> Any:
    """The template's sharding of a leaf, None for any."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding
    return leaf.sharding if isinstance(leaf, jax.Array) and leaf.committed else None


# --- The header -----------------------------------------------------------------------------------


def named_leaves(state: Any) -> dict[str, Any]:
    """Leaves by path; raises if two paths are the same on disk."""
    leaves: dict[str, Any] = {}
    on_disk: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = path_string(path)
        other = on_disk.setdefault(name.replace("/", "."), jax.tree_util.keystr(path))
        if other != jax.tree_util.keystr(path):
            raise CheckpointMismatchError(
                f"{other} and {jax.tree_util.keystr(path)} would be stored under one name, {name!r}. Rename one."
            )
        leaves[name] = leaf
    return leaves


def _fields(scale: Any) -> list[str]:
    """Names of the arrays of a loss scale."""
    return [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(scale)]


def _loss_scales(state: Any) -> dict[str, dict[str, Any]]:
    """Class and fields of every loss scale, by path."""
    nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_loss_scale)
    return {
        path_string(path): {"class": type(node).__name__, "fields": _fields(node)}
        for path, node in nodes
        if is_loss_scale(node)
    }


def _type_of(leaf: Any) -> dict[str, Any]:
    """Shape and dtype as the header has them; a Python number is a scalar of any dtype of its kind."""
    if is_number(leaf):
        return {"shape": [], "dtype": np.asarray(leaf).dtype.name, "number": True}
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "number": False}


def _checksum(header: Header) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _is_storable(leaf: Any) -> bool:
    if not (is_number(leaf) or isinstance(leaf, (jax.Array, np.ndarray, np.generic))):
        return False
    data = key_data(leaf)
    dtype = data.dtype if hasattr(data, "dtype") else np.asarray(data).dtype
    return bool(dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.number)) and dtype.isnative


def describe(state: Any, policy: PolicyLike) -> Header:
    """Describes a state by policy, loss scales, and shape, dtype and digest of every leaf; a collective.

    Raises:
        CheckpointMismatchError: If a leaf is replicated, on devices or on processes, and its copies differ.
        InvalidCheckpointError: If a leaf is not an array, key or number.
    """
    leaves = named_leaves(state)
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.core.Tracer):
            raise InvalidCheckpointError(
                f"Leaf {name!r} is traced and has no value to save. Save outside of jit what the jitted step returned."
            )
        if not _is_storable(leaf):
            of_dtype = f" of dtype {leaf.dtype!r:.80}" if hasattr(leaf, "dtype") else ""
            raise InvalidCheckpointError(
                f"Leaf {name!r} is {leaf!r:.80}{of_dtype}, and a checkpoint holds arrays, keys and numbers, of dtypes "
                "that JAX has, in the byte order of this machine. Convert it, leave it out, or keep it in the "
                "structure of the state."
            )
    hashed, alike = digests([key_data(leaf) for leaf in leaves.values()])
    drifted = [repr(name) for name, same in zip(leaves, alike, strict=True) if not same]
    if drifted:
        raise CheckpointMismatchError(
            f"The copies of {first_few(drifted)} on different devices or processes differ, and only one of them would "
            "be saved. Make them equal, or store them as one array sharded over the devices."
        )
    entries = {
        name: {**_type_of(leaf), "digest": digest} for (name, leaf), digest in zip(leaves.items(), hashed, strict=True)
    }
    header = {"policy": str(get_policy(policy)), "loss_scales": _loss_scales(state), "leaves": entries}
    header["formats"] = formats_of(state)
    return {**header, "checksum": _checksum(header)}


def check_header(header: Any) -> Header:
    """Returns the header as it was written.

    Raises:
        ValueError: If it was changed since, or another version of jmp_lite wrote it.
    """
    body = {name: value for name, value in header.items() if name != "checksum"}
    if header.get("checksum") != _checksum(body):
        raise ValueError("its header was changed after it was written")
    if set(body) != _HEADER:
        raise ValueError(f"another version of jmp_lite wrote it, with the header {sorted(body)}")
    return body


# --- Checks ---------------------------------------------------------------------------------------


def check_policy(saved: str, policy: PolicyLike) -> None:
    """Raises PolicyMismatchError unless a checkpoint was written under this policy."""
    expected = str(get_policy(policy))
    if saved != expected:
        raise PolicyMismatchError(
            f"The checkpoint was written under policy {saved!r}, but is restored under {expected!r}. Restore it "
            "with the policy it was written under, and cast afterwards if you mean to change, or pass migrate=True."
        )


def changed_loss_scales(header: Header, template: Any) -> set[str]:
    """Paths where checkpoint and template have loss scales of different kinds."""
    saved = header["loss_scales"]
    return {path for path, kind in _loss_scales(template).items() if path in saved and saved[path] != kind}


def check_loss_scales(header: Header, template: Any) -> None:
    """Raises InvalidLossScaleError if the class of a loss scale, or its fields, changed."""

    def say(kind: dict[str, Any]) -> str:
        return f"{kind['class']}({', '.join(kind['fields'])})"

    for path in sorted(changed_loss_scales(header, template)):
        raise InvalidLossScaleError(
            f"The loss scale at {path!r} is a {say(header['loss_scales'][path])} in the checkpoint, but a "
            f"{say(_loss_scales(template)[path])} in the template. Restore with the kind of loss scale it was saved "
            "with, or pass migrate=True to continue with the template's own."
        )


def check_structure(header: Header, template: Any, *, migrate: bool) -> None:
    """Raises CheckpointMismatchError, naming the first paths, unless the template fits the checkpoint."""
    saved, wanted = header["leaves"], named_leaves(template)
    missing = [name for name in saved if name not in wanted]
    extra = [name for name in wanted if name not in saved]
    if missing or extra:
        only = [f"only the checkpoint has {first_few([*map(repr, missing)])}"] if missing else []
        only += [f"only the template has {first_few([*map(repr, extra)])}"] if extra else []
        raise CheckpointMismatchError(
            f"Checkpoint and template differ in structure: {'; '.join(only)}. Restore into a state made by the same "
            f"program.{_hint(header, template, missing + extra)}"
        )
    differing = {
        name: f"{name!r} is {_say_type(saved[name])} in the checkpoint and {_say_type(_type_of(leaf))} in the template"
        for name, leaf in wanted.items()
        if not _fits(saved[name], leaf, migrate=migrate)
    }
    if differing:
        raise CheckpointMismatchError(
            f"Checkpoint and template differ: {first_few([*differing.values()])}. Restore into a state of the same "
            f"shapes and dtypes{'' if migrate else '; migrate=True casts from one floating dtype to another'}."
            f"{_hint(header, template, differing)}"
        )


def _hint(header: Header, template: Any, names: Iterable[str]) -> str:
    """What to do where low bits of parameters differ."""
    known = header["formats"] | formats_of(template)
    if any(str(known.get(name, {}).get("format")).startswith("low bits") for name in names):
        return " To store parameters in another format, restore them in this one and call optim.from_full_precision."
    return ""


def agree(header: Header, template: Any, policy: PolicyLike, *, migrate: bool) -> tuple[Any, Callable[[Any], Any]]:
    """Checks that a checkpoint and a template match, before any array is read.

    Returns:
        The target to read into, which is the template or, if a loss scale migrates, a tree of the saved structure; and
        a function that puts the template's loss scales into a state of this structure.

    Raises:
        PolicyMismatchError: If it was saved under another policy, and may not migrate.
        InvalidLossScaleError: If a loss scale in the template is of another class than the one saved, likewise.
        CheckpointMismatchError: If structures, shapes, dtypes or formats of moments differ, or a sharding does not
            divide a shape.
        InvalidCheckpointError: If a leaf of the template is traced, or no array, key or number.
    """
    stand_in: Any = template
    put_back: Callable[[Any], Any] = _unchanged
    _check_template(template)
    if migrate:
        unscaled, put_back_scales = without_changed_scales(header, template)
        unstored, put_back_stored = without_stored(header["leaves"], unscaled)
        stand_in, convert = with_saved_formats(header, unstored)

        def put_back(state: Any) -> Any:
            return put_back_scales(put_back_stored(convert(state)))
    else:
        check_policy(header["policy"], policy)
        check_loss_scales(header, template)
        check_formats(header, template)
    check_structure(header, stand_in, migrate=migrate)
    return stand_in, put_back


def _check_template(template: Any) -> None:
    """Raises for a template that no checkpoint can be restored into, so that no good checkpoint counts as damaged."""
    for name, leaf in named_leaves(template).items():
        if isinstance(leaf, jax.core.Tracer):
            raise InvalidCheckpointError(
                f"Leaf {name!r} of the template is traced, and a checkpoint is read from files. Restore outside of "
                "jit, and pass the state in."
            )
        if not (is_number(leaf) or hasattr(leaf, "shape")):
            raise InvalidCheckpointError(
                f"Leaf {name!r} of the template is {leaf!r:.80}, and a checkpoint holds arrays, keys and numbers. Make "
                "the template as the state was made that was saved."
            )
        sharding = None if is_number(leaf) else getattr(leaf, "sharding", None)
        try:
            _ = sharding and sharding.shard_shape(tuple(leaf.shape))
        except ValueError as error:
            raise CheckpointMismatchError(
                f"Leaf {name!r} of the template cannot be sharded so: {str(error).splitlines()[0]} Choose a sharding "
                "that divides its shape."
            ) from None


def _unchanged(state: Any) -> Any:
    return state


def _say_type(entry: dict[str, Any]) -> str:
    size = f"[{','.join(map(str, entry['shape']))}]"
    return f"a Python number ({entry['dtype']})" if entry["number"] else f"{entry['dtype']}{size}"


def _kind(dtype: str) -> Any:
    """The family within which a cast keeps the meaning of a number."""
    families = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    return next((f for f in families if not _is_key_type(dtype) and jnp.issubdtype(jnp.dtype(dtype), f)), dtype)


def _is_key_type(dtype: str) -> bool:
    return dtype.startswith("key<")


def _fits(entry: dict[str, Any], leaf: Any, *, migrate: bool) -> bool:
    """Whether a saved leaf can become the template's leaf."""
    wanted = _type_of(leaf)
    kind = _kind(entry["dtype"])
    castable = entry["number"] or wanted["number"] or (migrate and kind in {jnp.floating, jnp.complexfloating})
    alike = entry["dtype"] == wanted["dtype"] or (castable and kind == _kind(wanted["dtype"]))
    return alike and entry["shape"] == wanted["shape"]


# --- From storage to the template -----------------------------------------------------------------


def without_changed_scales(header: Header, template: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Replaces loss scales whose kind changed with stand-ins of the saved kind.

    Returns:
        The new template, and a function that puts the template's loss scales into a state of its structure.
    """
    changed = changed_loss_scales(header, template)

    def replace(path: Any, node: Any) -> Any:
        at = path_string(path)
        return _stand_in(header["loss_scales"][at]["fields"]) if at in changed and is_loss_scale(node) else node

    def put_back(path: Any, node: Any, read: Any) -> Any:
        return node if path_string(path) in changed and is_loss_scale(node) else read

    stand_in = jax.tree_util.tree_map_with_path(replace, template, is_leaf=is_loss_scale)
    return stand_in, lambda state: jax.tree_util.tree_map_with_path(put_back, template, state, is_leaf=is_loss_scale)


def _stand_in(fields: list[str]) -> Any:
    """A loss scale with these fields, unchecked."""
    kinds = (NoOpLossScale(), DynamicLossScale(), DynamicLossScale(hysteresis=2))
    kind = next((kind for kind in kinds if _fields(kind) == fields), kinds[0])
    return jax.tree.map(np.asarray, kind)


def target(entry: dict[str, Any], leaf: Any) -> Any:
    """The target for Orbax: the saved dtype, with the template's sharding."""
    leaf = key_data(leaf)
    dtype = leaf.dtype if _is_key_type(entry["dtype"]) else jnp.dtype(entry["dtype"])
    sharding = _sharding(leaf) or _host(leaf, dtype)
    if entry["number"] or sharding is None:
        return np.empty(np.shape(leaf), dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def _host(leaf: Any, dtype: Any) -> Any:
    """Sharding for which Orbax creates an array that NumPy sees without a copy, for a large leaf on CPU; else None.

    Such an array is tied to its device, and ``fill`` makes one of it that is not, in the same memory.
    """
    is_array = isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))
    if not is_array or jax.process_count() > 1 or leaf.size * dtype.itemsize < _LARGE:
        return None
    [device] = jax.device_put(False).devices()
    fits = jax.dtypes.canonicalize_dtype(dtype) == dtype
    return jax.sharding.SingleDeviceSharding(device) if device.platform == "cpu" and fits else None


def fill(leaf: Any, value: Any) -> Any:
    """Converts a restored leaf to the kind, dtype, sharding and (for keys) implementation of the template's leaf."""
    if is_key(leaf):
        return wrap_key_data(leaf, fill(key_data(leaf), value))
    if is_number(leaf):
        return type(leaf)(np.asarray(value).item())
    sharding = _sharding(leaf)
    if sharding is None:
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        value = _narrowed(value, leaf.dtype)
    if isinstance(leaf, np.generic):
        return value[()]
    if isinstance(leaf, np.ndarray):
        return value
    if sharding is None:
        return jax.device_put(value)
    if isinstance(value, np.ndarray):
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    return value if value.dtype == leaf.dtype else _checked(value.astype(leaf.dtype), value)


def _checked(cast: T, value: Any) -> T:
    """Returns a cast array, or raises if the cast made a number infinite."""
    array: Any = cast
    if jnp.issubdtype(array.dtype, jnp.floating) and not bool((is_finite(array) | ~is_finite(value)).all()):
        raise CheckpointMismatchError(
            f"The checkpoint has numbers of {value.dtype}{list(value.shape)} that are too large for {array.dtype}. Use "
            "a dtype with more range in the template."
        )
    return cast


def _narrowed(value: np.ndarray[Any, Any], dtype: Any) -> np.ndarray[Any, Any]:
    """Casts; integers keep their value, and no number becomes infinite."""
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        cast = _checked(value.astype(dtype), value)
    if jnp.issubdtype(dtype, jnp.integer) and not np.array_equal(cast, value):
        raise CheckpointMismatchError(
            f"The checkpoint has the number {value}, which {dtype} cannot hold. Use a wider dtype in the template, or "
            "a Python int."
        )
    return cast
