"""How to quantize one operand, and the three matmuls of a matmul and its gradient."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jmp_lite._dtypes import OF_4_BITS
from jmp_lite.errors import InvalidRecipeError
from jmp_lite.quant._scale import FORMATS, SMALLEST_NORMAL, checked_format, is_integer

#: The operands of a matmul, and the cotangent of its result.
SIDES = ("lhs", "rhs", "grad")
_NAMES = {dtype: name for name, dtype in FORMATS.items()}
#: Beyond it a scale of ordinary numbers is not a float32.
_LARGEST_MARGIN = 64


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How to quantize one operand of a matmul.

    Args:
        dtype: ``float8_e4m3fn``, ``float8_e5m2`` or ``int8``, or ``"e4m3"``, ``"e5m2"``, ``"int8"``; with a tile also
            ``int4`` and ``float4_e2m1fn`` (``"e2m1"``).
        granularity: Which elements share a scale. ``"tensor"``: the whole array; ``"channel"``: the elements along the
            contracted axes, such as one row of activations or one output channel of a kernel.
        tile: Number of neighbors along the contracted axes that share a scale, instead of a whole channel. In matmuls
            the last tile may be shorter.
        margin: Leaves room for values ``2**margin`` times as large as the largest magnitude.
        pow2: Rounds scales up to powers of two.
        scale_dtype: ``"e4m3"`` stores the scales of tiles in that format, relative to one scale of the whole array;
            ``None``: float32.
        stochastic: Rounds stochastically, without bias; the random bits are a hash of the array, so the same array
            gives the same result.
        amax: A fixed largest magnitude for the scale, from ``calibrate`` or known, instead of the max of the array.
            Larger numbers become NaN in float8, and the largest number in int8.

    Raises:
        InvalidRecipeError: If a setting is invalid.

    Example:
        >>> print(jmp.quant.QuantSpec("e4m3", pow2=True))
        e4m3:pow2
        >>> print(jmp.quant.QuantSpec("int4", tile=128))
        int4:tile128
    """

    dtype: Any
    granularity: str = "tensor"
    tile: int | None = dataclasses.field(default=None, kw_only=True)
    margin: int = dataclasses.field(default=0, kw_only=True)
    pow2: bool = dataclasses.field(default=False, kw_only=True)
    scale_dtype: Any = dataclasses.field(default=None, kw_only=True)
    stochastic: bool = dataclasses.field(default=False, kw_only=True)
    amax: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", checked_format(self.dtype))
        if self.tile is not None:
            object.__setattr__(self, "granularity", "channel")
        if self.scale_dtype is not None:
            object.__setattr__(self, "scale_dtype", checked_format(self.scale_dtype))
        problem = next((message for is_wrong, message in self._problems() if is_wrong), None)
        if problem:
            raise InvalidRecipeError(f"{problem}.")
        if self.amax is not None:
            object.__setattr__(self, "amax", float(self.amax))

    def _problems(self) -> list[tuple[bool, str]]:
        name, granularity = _NAMES[self.dtype], self._granularity()
        return [
            (
                self.granularity not in ("tensor", "channel"),
                f"granularity must be 'tensor' or 'channel', got {self.granularity!r}; parts of a channel are tile=",
            ),
            (
                self.tile is not None and (type(self.tile) is not int or self.tile < 1),
                f"tile must be a number of neighbors such as 128, got {self.tile!r}",
            ),
            (
                self.tile is None and self.dtype in OF_4_BITS,
                f"{name} has too few numbers for one scale per {self.granularity}: write QuantSpec({name!r}, tile=128)",
            ),
            (
                self.scale_dtype is not None
                and (self.scale_dtype != FORMATS["e4m3"] or self.tile is None or self.pow2),
                f"scale_dtype={_NAMES.get(self.scale_dtype)!r} must be 'e4m3', with a tile and without pow2",
            ),
            (
                type(self.margin) is not int or abs(self.margin) > _LARGEST_MARGIN,
                f"margin must be a whole number of powers of two, at most {_LARGEST_MARGIN}, got {self.margin!r}",
            ),
            (
                self.amax is not None and not _is_positive_number(self.amax),
                f"amax must be, in float32, a positive number, got {self.amax!r}",
            ),
            (
                self.amax is not None and self.granularity != "tensor",
                f"amax={self.amax!r} is one number, and {granularity!r} asks for several: leave out one of the two",
            ),
        ]

    def observe(self, x: Any) -> None:
        """Receives every array that this spec quantizes; ``calibrate`` overrides it."""

    def _granularity(self) -> str:
        return self.granularity if self.tile is None else f"tile{self.tile}"

    def __str__(self) -> str:
        parts = [_NAMES[self.dtype]]
        parts += [self._granularity()] * (self.granularity != "tensor")
        parts += [f"margin{self.margin}"] * bool(self.margin)
        parts += ["pow2"] * self.pow2 + ["stochastic"] * self.stochastic
        parts += [] if self.scale_dtype is None else [f"scale_{_NAMES[self.scale_dtype]}"]
        parts += [] if self.amax is None else [f"amax{self.amax!r}"]
        return ":".join(parts)


def _is_positive_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float, np.number, np.ndarray, jax.Array)) and np.ndim(value) == 0
    return is_number and SMALLEST_NORMAL <= float(value) <= float(np.finfo(np.float32).max)


def parse_spec(text: str) -> QuantSpec | None:
    """Reads what ``str(spec)`` wrote; ``none`` is not a spec.

    Raises:
        InvalidRecipeError: If it is not a spec.
    """
    if text == "none":
        return None
    name, *options = text.split(":")
    settings: dict[str, Any] = {}
    for option in options:
        try:
            settings |= _setting(option)
        except ValueError:
            raise InvalidRecipeError(
                f"{option!r} in {text!r} is not known. Write for example 'e4m3:pow2', 'int8:channel' or 'int4:tile128'."
            ) from None
    return QuantSpec(name, **settings)


def _setting(option: str) -> dict[str, Any]:
    if option in ("pow2", "stochastic"):
        return {option: True}
    if option in ("tensor", "channel"):
        return {"granularity": option}
    if option.startswith("scale_"):
        return {"scale_dtype": option.removeprefix("scale_")}
    for name, number in (("margin", int), ("tile", int), ("amax", float)):
        if option.startswith(name):
            return {name: number(option.removeprefix(name))}
    raise ValueError


@dataclasses.dataclass(frozen=True)
class Specs:
    """The fields of a recipe, checked; ``DotRecipe`` describes them."""

    lhs: QuantSpec | str | None
    rhs: QuantSpec | str | None
    grad: QuantSpec | str | None = None
    axis_name: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for side in SIDES:
            spec = getattr(self, side)
            spec = parse_spec(spec) if isinstance(spec, str) else spec
            if not (spec is None or isinstance(spec, QuantSpec)):
                raise InvalidRecipeError(f"{side} must be a QuantSpec, its text or None, got {spec!r}.")
            object.__setattr__(self, side, spec)
        problem = next((message for is_wrong, message in self._problems() if is_wrong), None)
        if problem:
            raise InvalidRecipeError(f"{problem}, got {self}.")

    @property
    def operands(self) -> tuple[QuantSpec | None, QuantSpec | None]:
        """The specs of the left and the right operand."""
        return self.lhs, self.rhs  # type: ignore[return-value]

    def spec(self, side: int) -> QuantSpec | None:
        """Returns the spec of the left (0) or the right (1) operand."""
        return self.operands[side]

    def kept(self, side: int) -> QuantSpec | None:
        """Returns the spec of the operand as a residual; with tiles, residuals are not quantized."""
        return None if self.is_tiled else self.spec(side)

    @property
    def of_gradients(self) -> QuantSpec | None:
        """The spec of cotangents."""
        return self.grad  # type: ignore[return-value]

    @property
    def is_tiled(self) -> bool:
        """Whether any scale is per tile, which is too fine to apply to the result of a matmul."""
        return any(spec is not None and spec.tile is not None for spec in (*self.operands, self.of_gradients))

    def _problems(self) -> list[tuple[bool, str]]:
        operands = [spec for spec in self.operands if spec is not None]
        grads = [spec for spec in (self.of_gradients,) if spec is not None]
        specs = operands + grads
        e5m2 = [sum(spec.dtype == FORMATS["e5m2"] for spec in group) for group in (operands, grads)]
        return [
            (not operands, "A recipe quantizes lhs, rhs or both"),
            (
                not self.is_tiled and len({is_integer(spec.dtype) for spec in specs}) > 1,
                "int8 and float8 cannot be multiplied",
            ),
            (e5m2[0] > 1 or all(e5m2), "No device multiplies e5m2 by e5m2: keep it for the gradients alone"),
            (
                len(operands) < 2 and bool(grads),
                "Gradients can be quantized only if both operands are: leave grad=None, which is straight-through",
            ),
        ]

    def __str__(self) -> str:
        parts = [f"{side}={getattr(self, side) or 'none'}" for side in SIDES]
        axes = self.axis_name if isinstance(self.axis_name, tuple) else (self.axis_name,)
        parts += [] if self.axis_name is None else [f"axis_name={'+'.join(map(str, axes))}"]
        return ",".join(parts)
