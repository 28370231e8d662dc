"""Finds the moments in an optimizer state and chooses a format for each."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmp_lite._messages import described, first_few, nearest, quote, warn
from jmp_lite._patterns import compile_pattern, matches
from jmp_lite._tree import Path, is_array, is_inexact, leaf_key, path_string
from jmp_lite.errors import InvalidStorageError, UncompressedStateWarning
from jmp_lite.optim._moments import FORMATS, Float, Log, Ratio, SignedLog, StateFormat

Formats: TypeAlias = "str | Mapping[str, str | StateFormat]"

#: The moments of each class of state in Optax that training does not miss the last bits of. What is not listed stays in
#: float32: copies of parameters, single gradients, sums, maxima, and moments that others are subtracted from.
EIGHT_BIT: dict[str, dict[str, StateFormat]] = {
    "EmaState": {"ema": SignedLog()},
    "FactoredState": {"v": Log()},
    "MuonState": {"mu": Float()},  # orthogonal in the end, so noise counts in all directions
    "ScaleByAdamState": {"mu": Ratio(), "nu": Log()},
    "ScaleByAdanState": {"m": SignedLog(), "v": SignedLog(), "n": Log()},
    "ScaleByAdemamixState": {"m1": SignedLog(), "m2": Float(), "nu": Log()},  # m2 moves by a ten-thousandth a step
    "ScaleByAmsgradState": {"mu": Ratio()},
    "ScaleByBeliefState": {"nu": Log()},
    "ScaleByLionState": {"mu": Float()},  # of which only signs are used
    "ScaleByNovogradState": {"mu": SignedLog()},
    "ScaleByRmsState": {"nu": Log()},
    "ScaleByRmsWithCountState": {"nu": Log()},
    "ScaleBySM3State": {"nu": SignedLog()},
    "SophiaState": {"mu": SignedLog(), "nu": Log()},
    "TraceState": {"trace": SignedLog(highest=8)},  # a sum, 10 to 100 times as large as gradients
}
_ATTRIBUTES = ("encode", "decode", "dtype", "relative_to", "largest")
#: Formats that ``stored`` takes for all moments.
PRESETS = ("8bit", "bfloat16", "float32")
#: The format that holds any moment, by format for all moments.
_ANY_MOMENT = {"8bit": "slog", "bfloat16": "bfloat16"}
#: Of a parameter on which an optimizer is tried, the most numbers.
_SAMPLE = 2**16
#: Steps that it is tried for: ``optax.MultiSteps`` inside takes the first one late.
_TRIES = 8
#: A power of the gradient that is not zero.
_LEAST_POWER = 2.0**-10
_NO_LOSS = np.zeros((), np.float32)


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
    def param(self) -> Path:
        """Keys of the parameter."""
        return self.path[self.field + 1 :]

    def neighbor(self, field: str) -> Path:
        """Path of the leaf for the same parameter under another field of the same state."""
        return (*self.path[: self.field], jax.tree_util.GetAttrKey(field), *self.path[self.field + 1 :])


@dataclasses.dataclass(frozen=True)
class Kept:
    """How one leaf of a state is stored.

    Attributes:
        leaf: Which one of all leaves it is.
        key: Its path, as ``leaf_key`` writes it.
        param: Path of its parameter, likewise.
        format: What encodes and decodes it.
        other: The leaf that it is stored relative to.
    """

    leaf: int
    key: str
    param: str
    format: StateFormat
    other: int | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """How each moment is stored; part of the tree structure of a state.

    A state without parameters, as ``optax.tree.map_params`` makes one to map over others, has a layout that equals all.

    Attributes:
        kept: Leaves of the state; reference moments come first. ``None``: of any parameters.
        params: Path and dtype of each 16-bit parameter, the path as ``leaf_key`` writes it.
    """

    kept: tuple[Kept, ...] | None
    params: frozenset[tuple[str, str]] = frozenset()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        return None in (self.kept, other.kept) or (self.kept, self.params) == (other.kept, other.params)

    def __hash__(self) -> int:
        return hash(Layout)


def slots(inner_state: Any, params: Any) -> dict[Path, Slot]:
    """Finds the floating leaves that belong to parameters: of the same shape, under the same keys behind a field.

    Returns:
        Slots by path.
    """
    shapes = {path: np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(inner_state):
        is_moment = is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        fields = [i for i, entry in enumerate(path) if _is_field(entry) and is_moment]
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
    """Raises for unknown formats, before ``init`` sees parameters."""
    if isinstance(formats, str):
        if formats not in PRESETS:
            meant = nearest(formats, PRESETS, 3)
            hint = f" Did you mean {meant[0]!r}?" if meant else ""
            one = f" For one moment write state={{'mu': {formats!r}}}." if formats in FORMATS else ""
            raise InvalidStorageError(
                f"state={formats!r} is not a format of all moments.{hint}{one} "
                f"There are {', '.join(map(repr, PRESETS))}."
            )
        return
    if not isinstance(formats, Mapping):
        raise InvalidStorageError(
            f"state must be one of {', '.join(map(repr, PRESETS))}, or formats by pattern, such as "
            f"{{'mu': 'ratio', 'nu': 'log'}}, got {quote(formats)}."
        )
    for key, value in formats.items():
        if not isinstance(key, str):
            raise InvalidStorageError(f"Keys of state are patterns, such as 'mu', got {quote(key)}.")
        compile_pattern(key)
        _format(key, value)


def _format(key: str, value: Any) -> StateFormat:
    found = FORMATS.get(value) if isinstance(value, str) else value
    if not isinstance(found, type) and all(hasattr(found, name) for name in _ATTRIBUTES):
        try:
            hash(found)
        except TypeError as error:
            raise InvalidStorageError(
                f"The format {quote(found)} of {key!r} has no hash, by which steps are compiled once: "
                f"{described(error)} Make its class a dataclass with frozen=True, of fields that have one."
            ) from error
        made: StateFormat = found  # type: ignore[assignment]
        return made
    meant = nearest(value, FORMATS, 3) if isinstance(value, str) else []
    hint = f" Did you mean {meant[0]!r}?" if meant else ""
    raise InvalidStorageError(
        f"state={{{key!r}: {quote(value)}}} is not a format of a moment.{hint} "
        f"There are {', '.join(map(repr, FORMATS))}, and what has the attributes of optim.StateFormat."
    )


def choose(inner: Any, inner_state: Any, params: Any, formats: Formats) -> tuple[Kept, ...]:
    """Chooses formats for the state of an optimizer, initialized from float32 parameters.

    Returns:
        How each moment is stored; reference moments come first.

    Raises:
        InvalidStorageError: If a pattern matches nothing, or two contradict each other, or a relative moment has no
            reference moment.
    """
    found = slots(inner_state, params)
    if not isinstance(formats, str):
        return _kept(_by_pattern(formats, found), inner_state)
    chosen = [] if formats == "float32" else _preset(formats, found, inner, params)
    if formats != "float32":
        _warn_of_the_rest(formats, chosen, set(found), inner_state, params)
    return _kept(chosen, inner_state)


def _kept(chosen: list[tuple[Slot, StateFormat]], inner_state: Any) -> tuple[Kept, ...]:
    leaves = {path: i for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(inner_state))}
    relative = {slot.path for slot, one in chosen if one.relative_to is not None}
    kept = []
    for slot, one in sorted(chosen, key=lambda pair: pair[0].path in relative):
        other = None if one.relative_to is None else slot.neighbor(one.relative_to)
        if other is not None and (other not in leaves or other in relative):
            raise InvalidStorageError(
                f"{slot.name!r} is to be kept relative to {path_string(other)!r}, which is not a moment of "
                f"{slot.owner} that is kept on its own. Use 'slog' for it."
            )
        kept.append(
            Kept(leaves[slot.path], leaf_key(slot.path), leaf_key(slot.param), one, leaves[other] if other else None)
        )
    return tuple(kept)


def _preset(name: str, found: Mapping[Path, Slot], inner: Any, params: Any) -> list[tuple[Slot, StateFormat]]:
    moments = [(slot, EIGHT_BIT.get(slot.owner, {}).get(slot.kind)) for slot in found.values()]
    chosen = [(slot, one) for slot, one in moments if one is not None]
    adams = [slot for slot, _ in chosen if slot.owner == "ScaleByAdamState"]
    if adams:
        sizes = {path: np.size(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        # Of each state the smallest parameter is the last; one number alone cannot be normalized.
        adams.sort(key=lambda slot: sizes[slot.param] if sizes[slot.param] > 1 else math.inf, reverse=True)
        own = _powers(inner, params, {slot.path[: slot.field]: slot.param for slot in adams})
        fitting = [(slot, _adams(slot, one, own.get(slot.path[: slot.field]))) for slot, one in chosen]
        chosen = [(slot, one) for slot, one in fitting if one is not None]
    return chosen if name == "8bit" else [(slot, FORMATS[name]) for slot, _ in chosen]


def _adams(slot: Slot, one: StateFormat, powers: tuple[float, float] | None) -> StateFormat | None:
    """The format of a moment in the state class that Adam shares with related optimizers.

    Args:
        slot: The moment.
        one: The format that it has in Adam.
        powers: Of the gradient, which ``mu`` and ``nu`` grow as; ``None``: unknown.
    """
    if slot.owner != "ScaleByAdamState":
        return one
    of_mu, of_nu = powers or (0.0, 2.0)
    is_square = abs(of_mu) > _LEAST_POWER and abs(of_nu / of_mu - 2) < 1 / 8
    if slot.kind == "nu":
        return one if is_square or abs(of_nu - 2) < 1 / 8 else None  # a maximum in Adamax, not only squares in Yogi
    return one if is_square else FORMATS["slog"]  # of normalized gradients in ADOPT


def _warn_of_the_rest(
    name: str, chosen: list[tuple[Slot, StateFormat]], moments: set[Path], inner_state: Any, params: Any
) -> None:
    """Warns about state that stays in float32, if it is large enough to matter."""
    paths = {slot.path for slot, _ in chosen}
    rest = [
        (path, leaf.size)
        for path, leaf in jax.tree_util.tree_leaves_with_path(inner_state)
        if is_inexact(leaf) and path not in paths
    ]
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(params) if is_inexact(leaf))
    if sum(size for _, size in rest) * 8 > size:
        largest = max(rest, key=lambda pair: pair[1])[0]
        fields = [path for path in itertools.accumulate((entry,) for entry in largest) if _is_field(path[-1])]
        field = fields[-1] if fields else largest
        node = type(_node_at(inner_state, field[:-1])).__name__
        named = {slot.kind: one for slot, one in chosen} | {path_string(field[-1:]): FORMATS[_ANY_MOMENT[name]]}
        formats = ", ".join(f"{kind!r}: {_say(one)}" for kind, one in named.items())
        remedy = (
            f"If it would, name all formats: state={{{formats}}}."
            if largest in moments
            else "Formats are for state in the shape of its parameter."
        )
        warn(
            f"state={name!r} leaves {path_string(field)!r} of {node} as the optimizer made it: no moment of Optax that "
            f"would train as well in fewer bits. {remedy}",
            UncompressedStateWarning,
        )


def _say(one: StateFormat) -> str:
    """How to write a format."""
    return next((repr(name) for name, known in FORMATS.items() if known == one), f"optim.{one!r}")


def _is_field(entry: Any) -> bool:
    return isinstance(entry, jax.tree_util.GetAttrKey)


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


def _powers(inner: Any, params: Any, nodes: Mapping[Path, Path]) -> dict[Path, tuple[float, float]]:
    """Tries an optimizer on a few numbers for one parameter of each state, to see how moments grow with gradients.

    Of two tries one number of the gradient is twice as large and the others are not, so that the optimizer may center
    gradients or normalize them first.

    Args:
        inner: The optimizer.
        params: Its parameters.
        nodes: Paths of its states, and of a parameter that each has moments of. The others are masked, unless the
            optimizer cannot do without them.

    Returns:
        By path of a state, the powers of the gradient that ``mu`` and ``nu`` grow as, where that can be tried.
    """
    tried_on = set(nodes.values())
    paths = [(*node, jax.tree_util.GetAttrKey(kind), *param) for node, param in nodes.items() for kind in ("mu", "nu")]

    def small(path: Path, x: Any, others: bool) -> Any:
        return np.full(_sample(np.shape(x)), 2.0**-6, np.float32) if others or path in tried_on else optax.MaskedNode()

    def tried(params: Any, first: float, as_in_searches: bool) -> np.ndarray:
        def grad(x: Any) -> Any:
            sizes = np.linspace(1.0, 2.0, x.size, dtype=np.float32)
            return np.float32(np.where(np.arange(x.size) == 0, first, sizes) * 2.0**-10).reshape(x.shape)

        grads, state = jax.tree.map(grad, params), inner.init(params)
        extra_args = {"value": _NO_LOSS, "grad": grads, "value_fn": lambda _: _NO_LOSS} if as_in_searches else {}
        for _ in range(_TRIES):
            _, state = inner.update(grads, state, params, **extra_args)
            leaves = dict(jax.tree_util.tree_leaves_with_path(state))
            found = np.array([float(np.ravel(leaves[path])[0]) for path in paths])
            if found.all():
                break
        return found

    for others, extra in itertools.product((False, True), (True, False)):
        sample = jax.tree_util.tree_map_with_path(functools.partial(small, others=others), params)
        try:
            with (
                jax.ensure_compile_time_eval(),
                jax.numpy_dtype_promotion("standard"),
                jax.transfer_guard("allow"),
                jax.debug_nans(False),
                np.errstate(all="ignore"),
            ):
                powers = np.log2(np.abs(tried(sample, 2.0, extra) / tried(sample, 1.0, extra)))
        except Exception:  # noqa: BLE001, S112 (in code that is not ours)
            continue
        pairs = zip(nodes, powers.reshape(-1, 2).tolist(), strict=True)
        return {node: (mu, nu) for node, (mu, nu) in pairs if np.isfinite(mu + nu)}
    return {}


def _sample(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape, cut to ``_SAMPLE`` numbers."""
    most = int(_SAMPLE ** (1 / max(len(shape), 1)))
    return tuple(min(n, most) or 1 for n in shape)
