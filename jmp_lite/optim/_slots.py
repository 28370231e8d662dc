"""Where the state of an optimizer holds moments, and which format each is kept in."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._messages import first_few, nearest, quote
from jmp_lite._patterns import compile_pattern, matches
from jmp_lite._tree import Path, is_array, path_string
from jmp_lite.errors import InvalidStorageError, UncompressedStateWarning
from jmp_lite.optim._moments import FORMATS, StateFormat

Formats: TypeAlias = "str | Mapping[str, str | StateFormat]"

#: The moments of each class of state in Optax, in 8 bits. What is not listed is no moment and stays in float32: copies
#: of parameters, single gradients, sums that grow for ever.
EIGHT_BIT: dict[str, dict[str, str]] = {
    "COCOBState": {},
    "DAdaptAdamWState": {"exp_avg": "slog", "exp_avg_sq": "log"},
    "DoGState": {},
    "DoWGState": {},
    "EmaState": {"ema": "slog"},
    "FactoredState": {"v": "log"},
    "MadgradState": {},
    "MomoAdamState": {"exp_avg": "slog", "exp_avg_sq": "log"},
    "MomoState": {"exp_avg": "slog"},
    "MultiStepsState": {},
    "MuonState": {"mu": "slog"},
    "ProdigyState": {"exp_avg": "slog", "exp_avg_sq": "log"},
    "ScaleByAdaDeltaState": {"e_g": "log", "e_x": "log"},
    "ScaleByAdamState": {"mu": "ratio", "nu": "log"},
    "ScaleByAdanState": {"m": "slog", "v": "slog", "n": "log"},
    "ScaleByAdemamixState": {"m1": "slog", "m2": "slog", "nu": "log"},
    "ScaleByAmsgradState": {"mu": "ratio", "nu": "log", "nu_max": "log"},
    "ScaleByBeliefState": {"mu": "slog", "nu": "log"},
    "ScaleByLBFGSState": {},
    "ScaleByLionState": {"mu": "slog"},
    "ScaleByNovogradState": {"mu": "slog"},
    "ScaleByOptimisticGradientState": {},
    "ScaleByRStdDevState": {"mu": "slog", "nu": "log"},
    "ScaleByRmsState": {"nu": "log"},
    "ScaleByRmsWithCountState": {"nu": "log"},
    "ScaleByRpropState": {},
    "ScaleByRssState": {"sum_of_squares": "log"},
    "ScaleBySM3State": {"nu": "slog"},
    "ScaleBySimplifiedAdEMAMixState": {"m": "slog", "n": "log"},
    "ScaleByZoomLinesearchState": {},
    "ScheduleFreeState": {},
    "SophiaState": {"mu": "slog", "nu": "log"},
    "TraceState": {"trace": "slog"},
}
#: Formats that ``stored`` takes for all moments.
PRESETS = ("8bit", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Slot:
    """A leaf of the state that has the shape of the parameter it belongs to.

    Attributes:
        path: Keys of the leaf.
        field: Place in ``path`` of the field of a state that holds leaves for all parameters.
        owner: Name of the class of that state.
    """

    path: Path
    field: int
    owner: str

    @property
    def name(self) -> str:
        return path_string(self.path)

    @property
    def kind(self) -> str:
        """Name of the field."""
        return path_string(self.path[self.field : self.field + 1])

    @property
    def param(self) -> str:
        return path_string(self.path[self.field + 1 :])

    def neighbor(self, field: str) -> Path:
        """Path of the leaf for the same parameter under another field of the same state."""
        return (*self.path[: self.field], jax.tree_util.GetAttrKey(field), *self.path[self.field + 1 :])


@dataclasses.dataclass(frozen=True)
class Kept:
    """How one leaf of a state is kept.

    Attributes:
        leaf: Which one of all leaves it is.
        name: Its path.
        param: Path of its parameter.
        format: What encodes and decodes it.
        other: The leaf that it is stored relative to.
    """

    leaf: int
    name: str
    param: str
    format: StateFormat
    other: int | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """What of a state is kept how: a part of its structure. Leaves that others are relative to come first."""

    kept: tuple[Kept, ...] = ()


def slots(inner_state: Any, params: Any) -> dict[Path, Slot]:
    """Finds the floating leaves that belong to parameters: of the same shape, under the same keys behind a field.

    Returns:
        Slots by path.
    """
    shapes = {path: np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(inner_state):
        is_moment = is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        fields = [i for i, entry in enumerate(path) if isinstance(entry, jax.tree_util.GetAttrKey) and is_moment]
        field = next((i for i in fields if shapes.get(path[i + 1 :]) == leaf.shape), None)
        if field is not None:
            found[path] = Slot(path, field, type(_node_at(inner_state, path[:field])).__name__)
    return found


def _node_at(tree: Any, path: Path) -> Any:
    for entry in path:
        children = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node, whole=tree: node is not whole)
        tree = next(child for name, child in children if name == (entry,))
    return tree


def check_formats(formats: Any) -> None:
    """Raises for formats that do not exist, before there are parameters."""
    if isinstance(formats, str):
        if formats not in PRESETS:
            meant = nearest(formats, PRESETS, 3)
            hint = f" Did you mean {meant[0]!r}?" if meant else ""
            one = f" For one moment write state={{'mu': {formats!r}}}." if formats in FORMATS else ""
            raise InvalidStorageError(
                f"state={formats!r} is no format of all moments.{hint}{one} There are {', '.join(map(repr, PRESETS))}."
            )
        return
    if not isinstance(formats, Mapping):
        raise InvalidStorageError(
            f"state must be one of {', '.join(map(repr, PRESETS))}, or formats by pattern, such as "
            f"{{'mu': 'ratio', 'nu': 'log'}}, got {quote(formats)}."
        )
    for key, value in formats.items():
        compile_pattern(key)
        _format(key, value)


def _format(key: str, value: Any) -> StateFormat:
    found = FORMATS.get(value) if isinstance(value, str) else value
    if all(hasattr(found, name) for name in ("encode", "decode", "dtype", "relative_to", "largest")):
        made: StateFormat = found  # type: ignore[assignment]
        return made
    meant = nearest(value, FORMATS, 3) if isinstance(value, str) else []
    hint = f" Did you mean {meant[0]!r}?" if meant else ""
    raise InvalidStorageError(
        f"state={{{key!r}: {quote(value)}}} is no format of a moment.{hint} There are {', '.join(map(repr, FORMATS))}, "
        "and what has the attributes of optim.StateFormat."
    )


def choose(inner: Any, inner_state: Any, params: Any, formats: Formats) -> Layout:
    """Chooses formats for the state that an optimizer made of float32 parameters.

    Raises:
        InvalidStorageError: If a pattern matches nothing, or two contradict each other, or a moment has no neighbor
            that it could be relative to.
    """
    found = slots(inner_state, params)
    if not isinstance(formats, str):
        return _layout(_by_pattern(formats, found), inner_state)
    chosen = _preset(formats, found)
    ratio, slog = FORMATS["ratio"], FORMATS["slog"]
    if any(one == ratio for _, one in chosen):
        alike = _scaling_alike(inner, params)
        chosen = [
            (slot, slog if one == ratio and slot.path[: slot.field] not in alike else one) for slot, one in chosen
        ]
    return _layout(chosen, inner_state)


def _layout(chosen: list[tuple[Slot, StateFormat]], inner_state: Any) -> Layout:
    leaves = {path: i for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(inner_state))}
    relative = {slot.path for slot, one in chosen if one.relative_to is not None}
    kept = []
    for slot, one in sorted(chosen, key=lambda pair: pair[0].path in relative):
        other = None if one.relative_to is None else slot.neighbor(one.relative_to)
        if other is not None and (other not in leaves or other in relative):
            raise InvalidStorageError(
                f"{slot.name!r} is to be kept relative to {path_string(other)!r}, which is no moment of {slot.owner} "
                "that is kept on its own. Use 'slog' for it."
            )
        kept.append(Kept(leaves[slot.path], slot.name, slot.param, one, leaves[other] if other else None))
    return Layout(tuple(kept))


def _preset(name: str, found: Mapping[Path, Slot]) -> list[tuple[Slot, StateFormat]]:
    if name == "float32":
        return []
    unknown = [slot for slot in found.values() if slot.owner not in EIGHT_BIT]
    if unknown:
        kinds = list(dict.fromkeys(f"{slot.kind} of {slot.owner}" for slot in unknown))
        warnings.warn(
            f"state={name!r} leaves {first_few(kinds)} as the optimizer made it: no state of Optax. Name its formats, "
            f"such as state={{{unknown[0].kind!r}: 'slog'}}.",
            UncompressedStateWarning,
            stacklevel=4,
        )
    moments = [(slot, EIGHT_BIT.get(slot.owner, {}).get(slot.kind)) for slot in found.values()]
    return [(slot, FORMATS[one if name == "8bit" else name]) for slot, one in moments if one]


def _by_pattern(formats: Mapping[str, Any], found: Mapping[Path, Slot]) -> list[tuple[Slot, StateFormat]]:
    chosen = []
    unused = dict.fromkeys(formats)
    for slot in found.values():
        keys = [key for key in formats if matches(key, slot.name)]
        wanted = {key: _format(key, formats[key]) for key in keys}
        if len(set(wanted.values())) > 1:
            raise InvalidStorageError(
                f"Patterns {' and '.join(map(repr, wanted))} ask for different formats of {slot.name!r}. Write "
                "patterns of which one matches each moment."
            )
        for key in keys:
            unused.pop(key, None)
        chosen += [(slot, one) for one in set(wanted.values())]
    if unused:
        key = next(iter(unused))
        kinds = [repr(kind) for kind in dict.fromkeys(slot.kind for slot in found.values())]
        there = f"there are {first_few(kinds)}" if kinds else "it has no moments"
        raise InvalidStorageError(f"Pattern {key!r} matches nothing in the state of the optimizer: {there}.")
    return [(slot, one) for slot, one in chosen if one != FORMATS["float32"]]


def _scaling_alike(inner: Any, params: Any) -> set[Path]:
    """Paths of states whose ``mu`` grows with gradients as the root of ``nu`` does.

    Adam's do. Those of its relatives that use the same class may not: in Adamax ``nu`` is no square, and in ADOPT
    ``mu`` is of normalized gradients. So the optimizer is tried out, on one number for each parameter.
    """
    small = jax.tree.map(lambda x: np.ones((1,) * np.ndim(x), np.float32), params)

    def tried(size: float) -> Any:
        grads = jax.tree.map(lambda x: x * np.float32(size), small)
        state = inner.init(small)
        for _ in range(2):
            _, state = inner.update(grads, state, small, value=0.0)
        return state

    try:
        with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
            once, twice = tried(2.0**-10), tried(2.0**-9)
    except Exception:  # noqa: BLE001 (in code that is not ours; without an answer the format for any moment will do)
        return set()
    values = [
        {path: float(np.ravel(leaf)[0]) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf.size}
        for state in (once, twice)
    ]
    alike = set()
    for slot in slots(once, small).values():
        mu, nu = ([value.get(path, 0.0) for value in values] for path in (slot.path, slot.neighbor("nu")))
        if slot.kind == "mu" and 0 not in (*mu, *nu) and abs((mu[1] / mu[0]) ** 2 * nu[0] / nu[1] - 1) < 1 / 8:
            alike.add(slot.path[: slot.field])
    return alike
