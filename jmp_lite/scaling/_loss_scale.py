"""Loss scales: pure automata that multiply a loss, divide gradients and react to one verdict per step.

Every scale is an immutable pytree with ``scale``, ``unscale`` and ``adjust(grads_finite)``. ``DynamicLossScale`` keeps
a strong float32, in ``[max(min_loss_scale, 2**-126), max_loss_scale]``: it can become neither zero nor infinite.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import register_flax_serialization
from jmp_lite._messages import quote
from jmp_lite._tree import (
    Opaque,
    cast_to_at_least_float32,
    is_array,
    is_inexact,
    map_leaves,
    scalar_predicate,
)
from jmp_lite.errors import InvalidLossScaleError

T = TypeVar("T")

#: Between these bounds a float32 scale and its reciprocal are both normal numbers: XLA flushes subnormals to zero.
SMALLEST_SCALE = 2.0**-126
LARGEST_SCALE = 2.0**126


def _multiply(tree: T, factor: Any) -> T:
    """Multiplies the inexact leaves of a tree by a float32 scalar, in float32 or wider."""

    def leaf_product(_: Any, leaf: Any) -> Any:
        if not is_inexact(leaf):
            return leaf
        wide = cast_to_at_least_float32(leaf)
        return wide * jnp.asarray(factor, wide.dtype)

    return map_leaves(leaf_product, tree)


@dataclasses.dataclass(frozen=True)
class NoOpLossScale(Opaque):
    """The loss scale 1 that leaves trees alone, so that float32 and bfloat16 runs use the same code.

    Example:
        >>> grads = {"w": jnp.ones(2)}
        >>> jmp.NoOpLossScale().unscale(grads) is grads
        True
    """

    def __post_init__(self) -> None:
        register_serialization()

    @property
    def loss_scale(self) -> int:
        """Always 1."""
        return 1

    def scale(self, tree: T) -> T:
        """Returns the tree itself."""
        return tree

    def unscale(self, tree: T) -> T:
        """Returns the tree itself."""
        return tree

    def adjust(self, grads_finite: Any) -> "NoOpLossScale":
        """Returns the same scale, whatever the verdict."""
        del grads_finite
        return self


@dataclasses.dataclass(frozen=True)
class StaticLossScale(Opaque):
    """A constant loss scale without leaves: its value is part of the tree structure, so a new value causes a new trace.

    For a constant that is data, use ``DynamicLossScale(value, factor=1)``, which never changes.

    Args:
        loss_scale: A Python number, or a concrete scalar array. Powers of two scale exactly.

    Raises:
        InvalidLossScaleError: If the value is traced.

    Example:
        >>> scale = jmp.StaticLossScale(2.0**10)
        >>> print(scale.unscale(scale.scale(jnp.float16(3.0))))
        3.0
    """

    loss_scale: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_scale", float(_python_number("StaticLossScale", self.loss_scale)))
        register_serialization()

    def _checked(self) -> float:
        if not SMALLEST_SCALE <= self.loss_scale <= LARGEST_SCALE:
            raise InvalidLossScaleError(
                f"loss_scale must be in [2**-126, 2**126], got {self.loss_scale}. Try StaticLossScale(2.0**15)."
            )
        return self.loss_scale

    def scale(self, tree: T) -> T:
        """Multiplies the inexact leaves, in float32 or wider; other leaves pass through."""
        return _multiply(tree, self._checked())

    def unscale(self, tree: T) -> T:
        """Divides the inexact leaves, in float32 or wider; other leaves pass through."""
        return _multiply(tree, 1 / self._checked())

    def adjust(self, grads_finite: Any) -> "StaticLossScale":
        """Returns the same scale, whatever the verdict."""
        del grads_finite
        return self


def _python_number(owner: str, value: Any) -> Any:
    if isinstance(value, jax.core.Tracer):
        raise InvalidLossScaleError(
            f"{owner} needs a Python number, got a traced value {value}. Build it outside jit, or use "
            "DynamicLossScale(value, factor=1), whose value is data."
        )
    number = value.item() if is_array(value) and value.size == 1 else value
    if not isinstance(number, (int, float)):
        raise InvalidLossScaleError(f"{owner} must be a number, got {quote(value)}.")
    return number


def _warn_if_not_floating(name: str, value: Any) -> None:
    if is_array(value) and not jnp.issubdtype(value.dtype, jnp.floating):
        warnings.warn(f"Expected floating type for {name}, got {value.dtype}", stacklevel=4)


def strong_scalar(value: Any, dtype: Any) -> Any:
    """Converts a number to a strongly typed array; placeholders (specs, shapes) pass through."""
    if isinstance(value, jax.Array):
        if value.dtype == dtype and not jax.typeof(value).weak_type:
            return value
        return jax.lax.convert_element_type(value, dtype)
    return np.asarray(value, dtype) if isinstance(value, (int, float, np.generic, np.ndarray)) else value


@dataclasses.dataclass(frozen=True)
class DynamicLossScale(Opaque):
    """A loss scale that grows while gradients stay finite and backs off when they do not.

    Each call of ``adjust`` is one step of the automaton: after ``period`` finite steps in a row the scale is multiplied
    by ``factor`` (unless that would exceed ``max_loss_scale``), after a non-finite step by ``backoff_factor`` (but not
    below ``min_loss_scale``). The growth happens on exactly the ``period``-th finite step.

    Args:
        loss_scale: Initial scale, ``float32[]``; a number or array of any real dtype is converted. A power of two
            scales exactly.
        counter: Finite steps since the last change, ``int32[]``.
        period: Finite steps between growths.
        factor: Growth factor, at least 1; with 1 the scale never changes, unless ``backoff_factor`` lowers it.
        min_loss_scale: Lowest scale; may be below 1. ``0`` means ``2**-126``.
        backoff_factor: Multiplier after a non-finite step, in (0, 1]; ``None`` means ``1 / factor``.
        max_loss_scale: Highest scale that growth may reach, at most ``2**126``.
        hysteresis: Non-finite steps tolerated per growth period, the last of which backs off (Megatron, DeepSpeed).
        consecutive_hysteresis: Whether one finite step restores the tolerance, rather than only the next growth.
        grace_steps: Finite steps after a non-finite one (and at the start, through ``counter``) that do not count
            toward growth. DeepSpeed has one.
        hysteresis_left: Non-finite steps left before backing off, ``int32[]``; filled in when ``hysteresis > 1``.

    Raises:
        InvalidLossScaleError: If a setting is out of range.

    Example:
        >>> scale = jmp.DynamicLossScale(2.0**15, period=2)
        >>> for finite in [True, True, False]:
        ...     scale = scale.adjust(finite)
        ...     print(scale.loss_scale, scale.counter)
        32768.0 1
        65536.0 0
        32768.0 0

    References:
        Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740; jmp has the same interface.
    """

    loss_scale: Any = 2.0**15
    counter: Any = 0
    period: int = 2000
    factor: float = 2
    min_loss_scale: float = 1.0
    _: dataclasses.KW_ONLY
    backoff_factor: float | None = None
    max_loss_scale: float = 2.0**24
    hysteresis: int = 1
    consecutive_hysteresis: bool = False
    grace_steps: int = 0
    hysteresis_left: Any = None

    def __post_init__(self) -> None:
        _warn_if_not_floating("loss_scale", self.loss_scale)
        _warn_if_not_floating("min_loss_scale", self.min_loss_scale)
        numbers = [name for name in _SETTINGS if name != "backoff_factor" or self.backoff_factor is not None]
        converted = {name: _python_number(name, getattr(self, name)) for name in numbers}
        left = converted["hysteresis"] if converted["hysteresis"] > 1 else None
        converted |= {
            "min_loss_scale": float(converted["min_loss_scale"]),
            "loss_scale": strong_scalar(self.loss_scale, np.float32),
            "counter": strong_scalar(self.counter, np.int32),
            "hysteresis_left": strong_scalar(left if self.hysteresis_left is None else self.hysteresis_left, np.int32),
        }
        for name, value in converted.items():
            object.__setattr__(self, name, value)
        _check_settings(self)
        register_serialization()

    @classmethod
    def like(cls, system: str, **overrides: Any) -> "DynamicLossScale":
        """Returns a scale that reproduces another system's trajectory, within jmp_lite's bounds.

        It does not reproduce their bugs: the scale stays within ``[2**-126, 2**126]`` where theirs becomes 0 or
        infinite.

        Args:
            system: ``"torch"``, ``"flax"``, ``"keras"``, ``"megatron"``, ``"deepspeed"`` or ``"jmp"``.
            **overrides: Any fields of this class. Flax grows one step late: its ``growth_interval`` is one less
                than ``period``.

        Returns:
            The scale with that system's defaults.

        Raises:
            InvalidLossScaleError: If the system is unknown.

        Example:
            >>> jmp.DynamicLossScale.like("megatron", period=500).hysteresis
            2

        References:
            torch.amp.GradScaler 2.13, flax.training.dynamic_scale 0.12, keras LossScaleOptimizer 3.15, Megatron-LM
            DynamicGradScaler, DeepSpeed DynamicLossScaler, jmp 0.0.4.
        """
        if system not in _SYSTEMS:
            raise InvalidLossScaleError(f"Unknown system {system!r}. Accepted: {', '.join(_SYSTEMS)}.")
        return cls(**{**_SYSTEMS[system], **overrides})

    def scale(self, tree: T) -> T:
        """Multiplies the inexact leaves, in float32 or wider; other leaves pass through."""
        return _multiply(tree, self.loss_scale)

    def unscale(self, tree: T) -> T:
        """Divides the inexact leaves, in float32 or wider; other leaves pass through."""
        return _multiply(tree, 1 / jnp.asarray(self.loss_scale))

    def adjust(self, grads_finite: Any) -> "DynamicLossScale":
        """Returns the scale of the next step.

        Args:
            grads_finite: ``bool[]``, the verdict of this step. It must be the same on every replica.

        Raises:
            InvalidSelectionError: If the verdict is not one boolean.
        """
        finite = scalar_predicate(grads_finite)
        grow = finite & (self.counter >= self.period - 1)
        grown = self.loss_scale * np.float32(self.factor)
        raised = jnp.where(grow & (grown <= np.float32(self.max_loss_scale)), grown, self.loss_scale)
        left, exhausted = self._next_hysteresis(finite, grow)
        lowered = jnp.where(exhausted, self._lowered_scale(), self.loss_scale)
        restart = np.int32(-self.grace_steps)
        counter = jnp.where(finite, jnp.where(grow, np.int32(0), self.counter + np.int32(1)), restart)
        return dataclasses.replace(
            self, loss_scale=jnp.where(finite, raised, lowered), counter=counter, hysteresis_left=left
        )

    def _next_hysteresis(self, finite: jax.Array, grow: jax.Array) -> tuple[Any, Any]:
        """Returns the remaining tolerance after this step, and whether it was already used up."""
        if self.hysteresis_left is None:
            return None, True
        full = np.int32(self.hysteresis)
        refill = finite if self.consecutive_hysteresis else grow
        used = jnp.maximum(self.hysteresis_left - np.int32(1), np.int32(1))
        left = jnp.where(refill, full, jnp.where(finite, self.hysteresis_left, used))
        return left, self.hysteresis_left <= 1

    def _lowered_scale(self) -> Any:
        if not can_shrink(self):
            return self.loss_scale
        backoff = 1 / self.factor if self.backoff_factor is None else self.backoff_factor
        # A product, also for 1 / factor: XLA turns division by a constant into one, and eager must give the same bits.
        lowered = self.loss_scale * np.float32(backoff)
        lowest = np.float32(max(self.min_loss_scale, SMALLEST_SCALE))
        # fmax, so that a scale that was made NaN from outside recovers as well.
        return jnp.fmin(jnp.fmax(lowered, lowest), np.float32(self.max_loss_scale))

    def back_off(self) -> "DynamicLossScale":
        """Returns the scale lowered once, whatever the hysteresis, with its counter restarted."""
        return dataclasses.replace(
            self, loss_scale=self._lowered_scale(), counter=jnp.full((), -self.grace_steps, jnp.int32)
        )


def can_shrink(scale: DynamicLossScale) -> bool:
    """Whether the scale backs off at all; one with ``factor=1`` is a constant."""
    return scale.factor > 1 if scale.backoff_factor is None else scale.backoff_factor < 1


def _check_settings(scale: DynamicLossScale) -> None:
    """Raises ``InvalidLossScaleError`` for the first setting that is out of range."""
    lowest, highest, backoff = scale.min_loss_scale, scale.max_loss_scale, scale.backoff_factor
    initial, patience, grace = scale.loss_scale, scale.hysteresis, scale.grace_steps
    known = np.asarray(initial if is_array(initial) and not isinstance(initial, jax.core.Tracer) else 1.0)
    rules = [
        ("loss_scale", initial, "a number", not isinstance(initial, _NO_NUMBERS)),
        ("counter", scale.counter, "a whole number", not isinstance(scale.counter, _NO_NUMBERS)),
        ("loss_scale", initial, "positive and finite", bool(np.all(np.isfinite(known) & (known > 0)))),
        ("loss_scale", initial, "at least 2**-126", np.min(known) >= SMALLEST_SCALE),
        ("loss_scale", initial, "at most 2**126", np.max(known) <= LARGEST_SCALE),
        ("period", scale.period, "a whole number, at least 1", scale.period >= 1 and scale.period % 1 == 0),
        ("factor", scale.factor, "at least 1 and finite", 1 <= scale.factor < math.inf),
        ("backoff_factor", backoff, "in (0, 1]", backoff is None or 0 < backoff <= 1),
        ("min_loss_scale", lowest, "at least 0 and finite", 0 <= lowest < math.inf),
        ("max_loss_scale", highest, f"in [min_loss_scale={lowest}, 2**126]", lowest <= highest <= LARGEST_SCALE),
        ("hysteresis", patience, "a whole number, at least 1", patience >= 1 and patience % 1 == 0),
        ("grace_steps", grace, "a whole number, at least 0", grace >= 0 and grace % 1 == 0),
    ]
    for name, value, requirement, holds in rules:
        if not holds:
            given = quote(value) if isinstance(value, _NO_NUMBERS) else value
            raise InvalidLossScaleError(f"{name} must be {requirement}, got {given}.")


#: Anything else may stand for a number in a tree of placeholders.
_NO_NUMBERS = (str, bytes, bool, list, tuple, dict, type(None))
_UNBOUNDED = {"min_loss_scale": 0.0, "max_loss_scale": LARGEST_SCALE}
_SYSTEMS: Mapping[str, Mapping[str, Any]] = {
    "torch": {"loss_scale": 2.0**16, **_UNBOUNDED},
    "flax": {"loss_scale": 2.0**16, "period": 2001, **_UNBOUNDED},
    "keras": {"loss_scale": 2.0**15, **_UNBOUNDED},
    "jmp": {"loss_scale": 2.0**15, "max_loss_scale": LARGEST_SCALE},
    "megatron": {"loss_scale": 2.0**32, "period": 1000, "hysteresis": 2, "max_loss_scale": LARGEST_SCALE},
    "deepspeed": {
        "loss_scale": 2.0**16,
        "counter": -1,
        "period": 1000,
        "hysteresis": 2,
        "grace_steps": 1,
        "max_loss_scale": LARGEST_SCALE,
    },
}

LossScale = NoOpLossScale | StaticLossScale | DynamicLossScale


# --- Pytree registration: every field is either data or structure, none can be forgotten ---

_DATA = ("loss_scale", "counter", "hysteresis_left")
_SETTINGS = tuple(field.name for field in dataclasses.fields(DynamicLossScale) if field.name not in _DATA)


def _flatten(scale: DynamicLossScale) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return tuple(getattr(scale, name) for name in _DATA), tuple(getattr(scale, name) for name in _SETTINGS)


def _flatten_with_keys(scale: DynamicLossScale) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    data, settings = _flatten(scale)
    return tuple((jax.tree_util.GetAttrKey(name), value) for name, value in zip(_DATA, data, strict=True)), settings


def _unflatten(settings: tuple[Any, ...], data: Iterable[Any]) -> DynamicLossScale:
    """Rebuilds without ``__init__``: JAX and its users also fill trees with placeholders."""
    scale = object.__new__(DynamicLossScale)
    for name, value in zip(_DATA + _SETTINGS, (*data, *settings), strict=True):
        object.__setattr__(scale, name, value)
    return scale


jax.tree_util.register_static(NoOpLossScale)
jax.tree_util.register_static(StaticLossScale)
jax.tree_util.register_pytree_with_keys(DynamicLossScale, _flatten_with_keys, _unflatten, _flatten)


# --- Serialization with Flax: the data only; settings come from the program, as with every optimizer ---


def register_serialization() -> None:
    """Teaches Flax, if it is loaded, to serialize loss scales."""
    classes: tuple[type[Any], ...] = (NoOpLossScale, StaticLossScale, DynamicLossScale)
    for cls in classes:
        register_flax_serialization(cls, _state_dict, _from_state_dict)


def _state_dict(scale: LossScale) -> dict[str, Any]:
    if not isinstance(scale, DynamicLossScale):
        return {}
    return {name: getattr(scale, name) for name in _DATA if getattr(scale, name) is not None}


def _from_state_dict(scale: Any, state: dict[str, Any]) -> Any:
    expected = _state_dict(scale)
    if set(state) != set(expected):
        raise InvalidLossScaleError(
            f"The saved loss scale has the fields {sorted(state)}, but {type(scale).__name__} here has "
            f"{sorted(expected)}. Restore with the kind of loss scale it was saved with."
        )
    return dataclasses.replace(scale, **state) if state else scale
