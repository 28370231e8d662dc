"""Recipes: how to quantize the operands of a matmul and of its gradient. Each replaces ``dot_general``."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jmp_lite._messages import quote
from jmp_lite.errors import InvalidRecipeError
from jmp_lite.products._matmul import RoundsOperands
from jmp_lite.quant._dot import scaled_dot
from jmp_lite.quant._emulated import quantized_conv, quantized_ragged_dot
from jmp_lite.quant._spec import Specs
from jmp_lite.quant._tiles import has_kernel


@dataclasses.dataclass(frozen=True)
class DotRecipe(Specs, RoundsOperands):
    """How to quantize a matmul and the two matmuls of its gradient; also the function that does it.

    It has the signature of ``lax.dot_general`` and works wherever that does: ``jmp.autocast(loss, policy, dot=FP8)``,
    ``jmp.Rule("mlp", dot=FP8)``, ``nn.Dense(dot_general=FP8)``, ``nnx.Linear(dot_general=FP8)``, ``jnp.einsum(...,
    _dot_general=FP8)``. ``scaled_dot_general`` describes what it computes.

    Under ``autocast`` a matmul of one weight and one activation quantizes the weight as ``rhs``, or as the only spec of
    the recipe, wherever it stands; all other matmuls go by sides.

    Args:
        lhs: How to quantize the left operand, as a ``QuantSpec`` or its text; ``None``: not at all.
        rhs: The same for the right operand, which in layers of Flax is the kernel.
        grad: The same for the cotangent in the backward matmuls. ``None``: these matmuls are not quantized, and ignore
            the rounding of the operands (straight-through).
        axis_name: Mapped axes (``pmap``, ``shard_map``) whose devices agree on per-array scales. Under ``jit`` they
            always agree.
        products: Which matmuls ``autocast`` quantizes: ``"weights"``, those with an argument or a constant of the
            function, possibly cast, moved or sliced; or ``"all"``, also those of two activations, such as attention
            scores.
        sites: Recipes for single name scopes under ``autocast``, from ``calibrate``.

    Raises:
        InvalidRecipeError: If no device supports this pair of formats, or the fields contradict each other.

    Example:
        >>> recipe = jmp.quant.DotRecipe("e4m3:pow2", "e4m3:pow2", "e5m2:pow2")
        >>> recipe == jmp.quant.FP8
        True
        >>> print(jnp.einsum("ij,jk->ik", jnp.ones((1, 3)), jnp.full((3, 1), 1.03), _dot_general=recipe))
        [[3.]]

    References:
        Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433; NVIDIA TransformerEngine; Google qwix.
    """

    products: str = dataclasses.field(default="weights", kw_only=True)
    sites: tuple[tuple[str, "DotRecipe"], ...] = dataclasses.field(default=(), kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.products not in ("weights", "all"):
            raise InvalidRecipeError(f"products must be 'weights' or 'all', got {self.products!r}.")

    def __str__(self) -> str:
        text = super().__str__() + f",products={self.products}" * (self.products != "weights")
        return text + (f",sites={json.dumps({scope: str(own) for scope, own in self.sites})}" if self.sites else "")

    @property
    def depends_on_scope(self) -> bool:
        """Whether it has been calibrated."""
        return bool(self.sites)

    @property
    def scopes(self) -> frozenset[str]:
        """Those that it was calibrated in."""
        return frozenset(scope for scope, _ in self.sites)

    def takes(self, *, has_weight: bool) -> bool:
        """Whether it replaces a matmul with, or without, a weight among its operands."""
        return has_weight or self.products == "all"

    def turned(self, are_weights: Sequence[bool]) -> "DotRecipe":
        """Returns the recipe for a matmul with these weights: ``rhs``, or the only spec, is for a weight alone."""
        of_weight = 1 if self.rhs else 0
        is_other = sum(are_weights) == 1 and not are_weights[of_weight]
        return dataclasses.replace(self, lhs=self.rhs, rhs=self.lhs) if is_other else self

    def replace(self, **changes: Any) -> "DotRecipe":
        """Returns the recipe with other fields, in all its sites too, such as ``FP8.replace(products="all")``."""
        sites = tuple((scope, own.replace(**changes)) for scope, own in self.sites)
        return dataclasses.replace(self, **{"sites": sites, **changes})

    def at(self, scope: str) -> "DotRecipe":
        """Returns the recipe for a name scope; without calibration, the one that computes its scales at run time."""
        return dict(self.sites).get(scope) or (dataclasses.replace(self, sites=()) if self.sites else self)

    def static(self, *, lhs: float | None = None, rhs: float | None = None, grad: float | None = None) -> "DotRecipe":
        """Fixes scales, so quantizing needs no pass over the operands to find them.

        Args:
            lhs: The largest magnitude of the left operand; ``None``: unchanged.
            rhs: The same for the right operand.
            grad: The same for the cotangent.

        Returns:
            Another recipe. Numbers above the range become NaN in float8, so that a loss scale sees them, and the
            largest number in int8.

        Raises:
            InvalidRecipeError: If such an operand is not quantized, or has per-channel or per-tile scales.

        Example:
            >>> recipe = jmp.quant.FP8.static(lhs=8.0, rhs=2.0)
            >>> print(recipe)
            lhs=e4m3:pow2:amax8.0,rhs=e4m3:pow2:amax2.0,grad=e5m2:pow2
            >>> print(recipe(jnp.array([1.0, 20.0]), jnp.ones(2), (((0,), (0,)), ((), ()))))
            nan
        """
        given = {side: amax for side, amax in (("lhs", lhs), ("rhs", rhs), ("grad", grad)) if amax is not None}
        missing = next((side for side in given if getattr(self, side) is None), None)
        if missing:
            raise InvalidRecipeError(f"{missing}={given[missing]!r} was given, and recipe {self} does not quantize it.")
        specs = {side: dataclasses.replace(getattr(self, side), amax=amax) for side, amax in given.items()}
        return dataclasses.replace(self, **specs, sites=())

    def __call__(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Multiplies two arrays; see ``scaled_dot_general``."""
        return scaled_dot(
            lhs,
            rhs,
            dimension_numbers,
            self.at(""),
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )

    def conv(self, lhs: Any, rhs: Any, window_strides: Any, padding: Any, **params: Any) -> jax.Array:
        """Convolves two arrays, with the parameters of ``lax.conv_general_dilated``; see ``scaled_conv``."""
        return quantized_conv(lhs, rhs, self.at(""), window_strides=window_strides, padding=padding, **params)

    def ragged_dot(
        self, lhs: Any, rhs: Any, group_sizes: Any, ragged_dot_dimension_numbers: Any, **params: Any
    ) -> jax.Array:
        """Multiplies ragged groups, with the parameters of ``lax.ragged_dot_general``.

        As for ``scaled_conv``, the result has the accuracy of the recipe, at the speed of its dtype. Each group of the
        right operand, the weight of one expert, has its own scales. Per-channel scales are per row of ``lhs``, per
        output channel of an expert, and per output channel of cotangents.
        """
        return quantized_ragged_dot(
            lhs, rhs, group_sizes, self.at(""), ragged_dot_dimension_numbers=ragged_dot_dimension_numbers, **params
        )

    def instead_of(self, primitive: str) -> Callable[..., Any] | None:
        """Returns the replacement of a primitive, with its parameters; tiles are for matmuls only."""
        if self.is_tiled:
            return super().instead_of(primitive)
        others: Any = {"conv_general_dilated": self.conv, "ragged_dot_general": self.ragged_dot}
        return others.get(primitive) or super().instead_of(primitive)

    def speed(self, primitive: str) -> str:
        """Returns a note on the speed of the replacement of a primitive."""
        if primitive != "dot_general" or not self.is_tiled:
            return super().speed(primitive)
        return ", at the speed of the compute dtype" + ", but on NVIDIA Blackwell" * has_kernel(*self.operands)


#: e4m3 forward, e5m2 for gradients, one scale per tensor, which is a power of two.
FP8 = DotRecipe("e4m3:pow2", "e4m3:pow2", "e5m2:pow2")
#: e4m3 throughout, one scale per row of activations, per output channel of kernels.
FP8_ROWWISE = DotRecipe(*["e4m3:channel:pow2"] * 3)
#: int8 forward, as in the deployed model; gradients of the compute dtype.
INT8_QAT = DotRecipe("int8:channel", "int8:channel")
#: int8 forward and backward; gradients are rounded stochastically.
INT8_TRAIN = DotRecipe("int8:channel", "int8:channel", "int8:channel:stochastic")
#: int8 kernels; matmuls of the compute dtype.
W8A16 = DotRecipe(None, "int8:channel")
#: int8 kernels and activations: ``INT8_QAT`` under the name that deployments use.
W8A8 = INT8_QAT
#: The same with one scale for all activations of a matmul, which ``calibrate`` fixes.
W8A8_STATIC = DotRecipe("int8", "int8:channel")
#: int4 kernels, one scale for 128 neighbors of what is added up; matmuls of the compute dtype.
W4A16 = DotRecipe(None, "int4:tile128")
#: The microscaling format of float8: e4m3, 32 neighbors share a power of two; multiplied as it is on Blackwell.
MXFP8 = DotRecipe(*["e4m3:tile32:pow2"] * 3)
#: NVIDIA's format of 4 bits: e2m1, 16 neighbors share a scale in e4m3; multiplied as it is on Blackwell.
NVFP4 = DotRecipe(*["e2m1:tile16:scale_e4m3"] * 3)

_NAMED = {name.lower(): recipe for name, recipe in globals().items() if isinstance(recipe, DotRecipe)}


def get_recipe(spec: str | DotRecipe) -> DotRecipe:
    """Returns the recipe for a name, or for the text of ``str(recipe)``.

    Args:
        spec: The name of a recipe of this chapter, such as ``"fp8"`` or ``"w8a16"``, in any case; or a text; or a
            recipe, which is returned unchanged.

    Raises:
        InvalidRecipeError: If it is none of these.

    Example:
        >>> print(jmp.quant.get_recipe("fp8"))
        lhs=e4m3:pow2,rhs=e4m3:pow2,grad=e5m2:pow2
        >>> jmp.quant.get_recipe("lhs=none,rhs=int8:channel") == jmp.quant.W8A16
        True
    """
    if isinstance(spec, DotRecipe):
        return spec
    text = spec.strip().lower() if isinstance(spec, str) else ""
    if text in _NAMED:
        return _NAMED[text]
    recipe = _parse(spec) if text else None
    if recipe is None:
        raise InvalidRecipeError(
            f"Unknown recipe {quote(spec)}. Accepted: {', '.join(_NAMED)}, or a text such as "
            "'lhs=e4m3:pow2,rhs=e4m3:pow2,grad=e5m2:pow2'."
        )
    return recipe


def _parse(text: str) -> DotRecipe | None:
    """Reads what ``str(recipe)`` wrote."""
    text, _, calibrated = text.partition(",sites=")
    try:
        found = json.loads(calibrated or "{}")
    except ValueError:
        return None
    parts = [part.partition("=") for part in text.split(",")]
    fields: dict[str, Any] = {name.strip(): value.strip() for name, _, value in parts}
    is_known = {"lhs", "rhs"} <= set(fields) <= {"lhs", "rhs", "grad", "axis_name", "products"}
    is_known = is_known and isinstance(found, dict)
    if not is_known or len(fields) < len(parts) or "" in fields.values():
        return None
    if "+" in fields.get("axis_name", ""):
        fields["axis_name"] = tuple(fields["axis_name"].split("+"))
    return DotRecipe(**fields, sites=tuple((scope, get_recipe(own)) for scope, own in found.items()))


def scaled_dot_general(
    lhs: Any,
    rhs: Any,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    recipe: str | DotRecipe,
    out_sharding: Any = None,
) -> jax.Array:
    """``lax.dot_general`` with 8-bit operands, forward and, depending on the recipe, backward.

    Each operand is divided by its scale, which maps its largest magnitude to the largest number of the format, and
    rounded. The matmul accumulates in float32 (int32 for int8), and the result is multiplied by the scales. The
    residuals are the 8-bit operands. The backward pass quantizes cotangents like operands; with per-channel scales,
    each of the two matmuls computes its own.

    On NVIDIA GPUs from compute capability 8.9 on, XLA compiles each float8 matmul to one cuBLASLt call, with fast
    accumulation forward and precise accumulation backward. Other devices compute the same numbers with wider matmuls.

    Infinities and NaN in an operand make results infinite or NaN, so that a loss scale sees them.

    Under ``vmap`` each member has its own scales, as if it were alone. Only the cotangents of a matmul that is
    differentiated after ``vmap`` share one.

    Args:
        lhs: Array. Operands that are not real floating arrays of 16 or 32 bits are multiplied as they are.
        rhs: Array.
        dimension_numbers: As for ``lax.dot_general``.
        precision: Of matmuls that are not quantized, such as those of the backward pass with ``grad=None``.
        preferred_element_type: Floating dtype of the result; by default the promoted dtype of the operands.
        recipe: A recipe or its name.
        out_sharding: As for ``lax.dot_general``.

    Returns:
        An array of the shape that ``lax.dot_general`` returns. First derivatives exist in both modes; gradients have
        the dtypes of the operands.

    Raises:
        InvalidRecipeError: If the name of the recipe is unknown.
        MissingAxisError: If an axis that the recipe names is not mapped.
        SecondDerivativeError: If it is differentiated twice.

    Example:
        >>> x, w = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[0.5], [0.25], [1.0]])
        >>> dims = (((1,), (0,)), ((), ()))
        >>> print(jmp.quant.scaled_dot_general(x, w, dims, recipe="fp8"))
        [[4.]]
        >>> print(jax.grad(lambda w: jmp.quant.scaled_dot_general(x, w, dims, recipe="fp8").sum())(w).T)
        [[1. 2. 3.]]

    References:
        Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433; XLA, ``gemm_rewriter.cc``; Google qwix,
        for per-channel scales in the backward pass.
    """
    return get_recipe(recipe)(lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding=out_sharding)


def scaled_conv(
    lhs: Any, rhs: Any, window_strides: Any, padding: Any, *, recipe: str | DotRecipe, **params: Any
) -> jax.Array:
    """``lax.conv_general_dilated`` of dequantized 8-bit operands.

    The operands are quantized, dequantized and convolved in their own dtype, and so are cotangents in the backward
    pass: the result has the accuracy of the recipe and 8-bit residuals, at the speed of the operands' dtype.
    Per-channel scales are per sample of ``lhs``, and per output feature of ``rhs`` and of cotangents.

    Args:
        lhs: Input, floating array.
        rhs: Kernel.
        window_strides: As for ``lax.conv_general_dilated``.
        padding: As for ``lax.conv_general_dilated``.
        recipe: A recipe or its name; ``recipe.conv`` is this function with the recipe filled in, for Flax and autocast:
            ``nn.Conv(conv_general_dilated=FP8.conv)``, ``ops={"conv_general_dilated": FP8.conv}``.
        **params: Its other parameters.

    Returns:
        An array of the shape that ``lax.conv_general_dilated`` returns.

    Raises:
        InvalidRecipeError: If the recipe is unknown, or has scales per tile.
        SecondDerivativeError: If it is differentiated twice.

    Example:
        >>> image, kernel = jnp.ones((1, 1, 4, 4)), jnp.full((1, 1, 2, 2), 1.03)
        >>> print(jmp.quant.scaled_conv(image, kernel, (2, 2), "VALID", recipe="fp8"))
        [[[[4. 4.]
           [4. 4.]]]]
    """
    return get_recipe(recipe).conv(lhs, rhs, window_strides, padding, **params)
