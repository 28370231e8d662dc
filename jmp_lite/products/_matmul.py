"""Matmuls of 16-bit operands whose weight gradient leaves the matmul in float32.

Under ``jit`` XLA adds up the gradient of a weight over devices right behind the matmul that makes it, in the dtype of
that matmul; a cast that comes later is too late. So a float32 weight goes into the matmul as it is and is rounded
inside, and its gradient comes out in float32. The operands of all three matmuls are rounded to 16 bits.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding, PartitionSpec

from jmp_lite._compat import INLINE, bilinear_primitive, mesh_is_explicit, sharding_in_type
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite._tree import cast
from jmp_lite.products._dimensions import dimensions, mapped, transposed

#: Parameters of ``dot_general``, but for the dtype of the result.
Params = tuple[tuple[str, Any], ...]


class RoundsOperands:
    """Base of what takes the place of ``lax.dot_general`` and rounds its operands itself.

    Weights reach it as they are, so that they are rounded once and their gradients are not.
    """

    @property
    def depends_on_scope(self) -> bool:
        """Whether ``at`` gives other matmuls in other name scopes."""
        return False

    @property
    def scopes(self) -> frozenset[str]:
        """The name scopes that ``at`` knows, if they come from another run of the program."""
        return frozenset()

    def instead_of(self, primitive: str) -> Callable[..., Any] | None:
        """Returns what takes the place of a primitive, with its parameters; ``None`` if nothing does."""
        product: Any = self
        return product if primitive == "dot_general" else None

    def takes(self, *, has_weight: bool) -> bool:
        """Whether it takes the place of a matmul with a weight among its operands, or without."""
        del has_weight
        return True

    def turned(self, are_weights: Sequence[bool]) -> "RoundsOperands":
        """Returns what multiplies operands of which these are weights, as it stands or with its sides swapped."""
        del are_weights
        return self

    def speed(self, primitive: str) -> str:
        """Returns what there is to say about the speed of what takes the place of a primitive; empty if nothing."""
        return "" if primitive == "dot_general" else ", at the speed of the compute dtype"

    def at(self, scope: str) -> "RoundsOperands":
        """Returns what takes the place of matmuls in a name scope."""
        del scope
        return self


def product_of(dot: Any, primitive: str) -> Callable[..., Any] | None:
    """Returns what takes the place of a primitive where ``dot`` takes that of matmuls, ``None`` if nothing does."""
    if isinstance(dot, RoundsOperands):
        return dot.instead_of(primitive)
    return dot if primitive == "dot_general" else None


class Matmul(NamedTuple):
    """What kind of a matmul of two arrays is wanted."""

    compute_dtype: DType
    """A 16-bit dtype, that of the operands of all three matmuls."""
    params: Params
    result_dtype: DType
    """The compute dtype or float32."""
    accumulates: bool = False
    """Whether to ask for a float32 sum that is rounded to the compute dtype afterwards."""


@functools.partial(jax.jit, static_argnums=2, inline=INLINE)  # JAX remembers the derivative of what is jitted
def matmul(lhs: Any, rhs: Any, kind: Matmul) -> Any:
    """Multiplies two arrays, rounded to a compute dtype; gradients have the dtypes that the arrays were given in.

    All three matmuls have operands of the compute dtype, whatever the dtype of the result: asking ``lax.dot_general``
    for a float32 result makes its backward matmuls those of float32 cotangents (github.com/jax-ml/jax/issues/34330).

    Args:
        lhs: Left operand, of the compute dtype or float32.
        rhs: Right operand.
        kind: Dtypes and parameters.
    """
    return _matmul(lhs, rhs, kind)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _matmul(lhs: Any, rhs: Any, kind: Matmul) -> Any:
    return _multiplied(cast(lhs, kind.compute_dtype), cast(rhs, kind.compute_dtype), kind)


def _multiplied(lhs: Any, rhs: Any, kind: Matmul) -> Any:
    if kind.result_dtype == kind.compute_dtype and not kind.accumulates:
        return _plain_dot(lhs, rhs, kind.compute_dtype, kind.params)
    return cast(product(lhs, rhs, kind.compute_dtype, kind.params, FLOAT32), kind.result_dtype)


def _matmul_jvp(kind: Matmul, primals: Any, tangents: Any) -> tuple[Any, Any]:
    dtype, params = kind.compute_dtype, kind.params
    lhs, rhs = (cast(x, dtype) for x in primals)

    def linear(lhs: Any, rhs: Any, tangent: Any) -> Any:
        if tangent.dtype == dtype:
            return _plain_dot(lhs, rhs, dtype, params)
        return product(lhs, rhs, dtype, params, dtype)  # transposed, it returns the dtype of the tangent

    tangent = add_terms(tangents, lambda t: linear(t, rhs, t), lambda t: linear(lhs, t, t))
    return _multiplied(lhs, rhs, kind), cast(tangent, kind.result_dtype)


_matmul.defjvp(_matmul_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def float32_result(multiply: Callable[..., Any], lhs: Any, rhs: Any, *others: Any) -> Any:
    """Returns a bilinear function of two 16-bit arrays, such as a convolution, in float32; its derivative is 16 bits.

    Args:
        multiply: A hashable function ``multiply(lhs, rhs, *others, preferred_element_type)``.
        lhs: Left operand.
        rhs: Right operand.
        *others: Integers that it takes, such as sizes of groups.
    """
    return multiply(lhs, rhs, *others, FLOAT32)


def _float32_result_jvp(multiply: Callable[..., Any], primals: Any, tangents: Any) -> tuple[Any, Any]:
    lhs, rhs, *others = primals

    def term(lhs: Any, rhs: Any) -> Any:
        return multiply(lhs, rhs, *others, lhs.dtype)

    tangent = add_terms(tangents[:2], lambda t: term(t, rhs), lambda t: term(lhs, t))
    return multiply(*primals, FLOAT32), cast(tangent, FLOAT32)


float32_result.defjvp(_float32_result_jvp, symbolic_zeros=True)


@jax.custom_jvp
def rounded_scale(x: Any, scale: Any) -> Any:
    """Multiplies a 16-bit array by a float32 one that is repeated along it; the gradient of that is float32.

    The gradient is a sum along the repeated axes. It comes before the cast back, and what is kept for it is ``x``.
    """
    return lax.mul(x, cast(scale, x.dtype))


def _scale_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    x, scale = primals
    rounded = cast(scale, x.dtype)

    def of_scale(tangent: Any) -> Any:
        return lax.mul(x, cast(repeat(tangent, jax.typeof(x)), x.dtype))

    return lax.mul(x, rounded), add_terms(tangents, lambda t: lax.mul(t, rounded), of_scale)


rounded_scale.defjvp(_scale_jvp, symbolic_zeros=True)


def repeat(array: Any, aval: Any) -> Any:
    """Repeats an array along the axes where it has one element and another, of the same rank, has more."""
    return lax.broadcast_in_dim(array, aval.shape, tuple(range(aval.ndim)), out_sharding=sharding_in_type(aval))


def add_terms(tangents: Any, *terms: Callable[[Any], Any]) -> Any:
    """Adds up what each tangent contributes; at least one of them is there."""
    found = [term(t) for t, term in zip(tangents, terms, strict=True) if not isinstance(t, SymbolicZero)]
    return functools.reduce(lax.add, found)


def _plain_dot(lhs: Any, rhs: Any, compute_dtype: DType, params: Params) -> Any:
    return lax.dot_general(lhs, rhs, **{**dict(params), "preferred_element_type": compute_dtype})


def product(lhs: Any, rhs: Any, compute_dtype: DType, params: Params, result_dtype: DType) -> Any:
    """Multiplies two arrays, rounded to a compute dtype, into a result of a dtype that may be wider."""
    static = {"out_sharding": None, "precision": None, **dict(params)}
    return _primitive().bind(lhs, rhs, **static, preferred_element_type=result_dtype, compute_dtype=compute_dtype)


@functools.cache
def _primitive() -> Any:
    """It has the name and the parameters of the matmul that it is, for whoever reads a jaxpr.

    XLA on the CPU (jaxlib 0.10 to 0.12) stops at run time on some matmuls of bfloat16 that return float32. There the
    operands are cast up first, which changes no digit: matmuls of 16-bit numbers are exact in float32.
    """
    return bilinear_primitive("dot_general", _product, _transpose, _batch, {"cpu": _product_on_cpu})


def as_primitive_of_jax(primitive: Any) -> Any:
    """Returns ``lax.dot_general_p`` for the primitive of ``product``, and any other as it is."""
    return lax.dot_general_p if primitive is _primitive() else primitive


def _product(lhs: Any, rhs: Any, *, compute_dtype: DType, **params: Any) -> Any:
    return lax.dot_general(cast(lhs, compute_dtype), cast(rhs, compute_dtype), **params)


def _product_on_cpu(lhs: Any, rhs: Any, *, preferred_element_type: DType, compute_dtype: DType, **params: Any) -> Any:
    operands = [cast(x, compute_dtype) for x in (lhs, rhs)]
    operands = [cast(x, preferred_element_type) for x in operands]
    return lax.dot_general(*operands, **{**params, "preferred_element_type": preferred_element_type})


def _transpose(cotangent: Any, lhs: Any, rhs: Any, *, dimension_numbers: Any, **params: Any) -> Any:
    """The cotangent of the operand that is given as an abstract value, in its dtype."""
    side = 0 if isinstance(lhs, jax.core.ShapedArray) else 1
    wanted, other = (lhs, rhs) if side == 0 else (rhs, lhs)
    found = transposed(dimensions(dimension_numbers), (lhs.ndim, rhs.ndim), side)
    result = {"preferred_element_type": wanted.dtype, "out_sharding": permuted_sharding(wanted, found.axes)}
    operands = found.ordered(cotangent, other)
    of_wanted = _primitive().bind(*operands, dimension_numbers=found.dims, **{**params, **result})
    return lax.transpose(of_wanted, found.permutation)


def permuted_sharding(aval: Any, axes: Sequence[int]) -> NamedSharding | None:
    """The sharding in the type of an array, with its axes permuted."""
    sharding = sharding_in_type(aval)
    permuted = sharding and PartitionSpec(*(sharding.spec[axis] for axis in axes))
    return sharding and NamedSharding(sharding.mesh, permuted)


def _batch(operands: Any, positions: Any, *, dimension_numbers: Any, **params: Any) -> tuple[Any, int]:
    """Two batched operands have one more batch dimension; one alone has one more free dimension."""
    if mesh_is_explicit():  # JAX knows how the mapped axis is sharded, and does not say
        narrow = {**params, "preferred_element_type": params["compute_dtype"]}
        one = functools.partial(_product, dimension_numbers=dimension_numbers, **narrow)
        return cast(jax.vmap(one, in_axes=tuple(positions))(*operands), params["preferred_element_type"]), 0
    is_mapped = [position is not None for position in positions]
    lhs, rhs = (
        x if position is None else jnp.moveaxis(x, position, 0) for x, position in zip(operands, positions, strict=True)
    )
    dims, axis = mapped(dimensions(dimension_numbers), lhs.ndim, is_mapped)
    return _primitive().bind(lhs, rhs, dimension_numbers=dims, **params), axis
