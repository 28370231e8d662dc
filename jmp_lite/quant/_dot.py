"""``lax.dot_general`` on 8-bit operands, with gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jmp_lite._compat import varying_axes
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite._tree import cast
from jmp_lite.products._dimensions import dimensions
from jmp_lite.quant._linear import tangent_product
from jmp_lite.quant._operands import Quantized, prepared, result_dtype, unscaled
from jmp_lite.quant._product import Call, scaled_product
from jmp_lite.quant._spec import QuantSpec, Specs
from jmp_lite.quant._tiles import both_rounded, tiled_product


def scaled_dot(
    lhs: Any,
    rhs: Any,
    dimension_numbers: Any,
    specs: Specs,
    *,
    precision: Any,
    preferred_element_type: Any,
    out_sharding: Any,
) -> jax.Array:
    """Multiplies two arrays as ``scaled_dot_general`` documents."""
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    dims = dimensions(dimension_numbers)
    is_floating = jnp.issubdtype(preferred_element_type or lhs.dtype, jnp.floating)
    if not (is_floating and _is_quantizable(lhs) and _is_quantizable(rhs)):
        return lax.dot_general(lhs, rhs, dims, precision, preferred_element_type, out_sharding=out_sharding)
    dtype = result_dtype(lhs, rhs, preferred_element_type)
    lhs, rhs = (_as_wide(x, spec, dtype) for x, spec in zip((lhs, rhs), specs.operands, strict=True))
    narrowest = min(lhs.dtype, rhs.dtype, dtype, key=lambda dtype: dtype.itemsize)
    call = Call(dims, specs, dtype, narrowest, precision, out_sharding)
    return _scaled_dot(*_varying_alike(lhs, rhs), call)  # type: ignore[no-any-return]


def _is_quantizable(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating)) and 2 <= x.dtype.itemsize <= FLOAT32.itemsize


def _as_wide(x: Any, spec: QuantSpec | None, dtype: DType) -> Any:
    """Casts an operand that is not quantized to the dtype of the result, if that is narrower."""
    return cast(x, dtype) if spec is None and dtype.itemsize < x.dtype.itemsize else x


def _varying_alike(*arrays: Any) -> list[Any]:
    """Makes arrays vary along the same axes of a ``shard_map``, so that gradients of replicas are summed outside."""
    axes = frozenset[Any]().union(*map(varying_axes, arrays))
    missing = [tuple(sorted(axes - varying_axes(x))) for x in arrays]
    return [lax.pcast(x, m, to="varying") if m else x for x, m in zip(arrays, missing, strict=True)]


def _multiply(lhs: Any, rhs: Any, call: Call) -> tuple[Any, Quantized, Quantized]:
    """The result, and the operands as residuals of its derivative."""
    specs = call.specs.operands
    if call.specs.is_tiled:
        return _multiply_tiles(lhs, rhs, call)
    left, right = (
        prepared(x, spec, contracted, call.specs.axis_name)
        for x, spec, contracted in zip((lhs, rhs), specs, call.dims.contracted, strict=True)
    )
    call = call if None in specs else call._replace(precision=None)
    return scaled_product(left, right, call, specs), left, right


def _multiply_tiles(lhs: Any, rhs: Any, call: Call) -> tuple[Any, Quantized, Quantized]:
    """The tiles of a backward matmul lie along other axes, so it uses the unquantized operands."""
    specs = call.specs.operands
    if call.specs.of_gradients is None:
        lhs, rhs = both_rounded(lhs, rhs, call, specs)
        specs = None, None
    return tiled_product(lhs, rhs, call, specs), unscaled(lhs), unscaled(rhs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _scaled_dot(lhs: Any, rhs: Any, call: Call) -> Any:
    return _multiply(lhs, rhs, call)[0]


@functools.partial(_scaled_dot.defjvp, symbolic_zeros=True)
def _scaled_dot_jvp(call: Call, primals: Any, tangents: Any) -> tuple[Any, Any]:
    lhs, rhs = primals
    result, left, right = _multiply(lhs, rhs, call)
    terms = [
        tangent_product(tangent, other, side, call)
        for side, (tangent, other) in enumerate(zip(tangents, (right, left), strict=True))
        if not isinstance(tangent, SymbolicZero)
    ]
    return result, functools.reduce(lax.add, terms) if terms else jnp.zeros_like(result)
