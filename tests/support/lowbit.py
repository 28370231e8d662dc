"""Products that every recipe is measured on, how far it may be off, and numbers with which it is exact."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import AxisType

from jmp_lite import quant

#: Shapes of the operands and dimension numbers.
PRODUCTS = {
    "matrices": ((8, 64), (64, 32), (((1,), (0,)), ((), ()))),
    "sequences": ((4, 8, 64), (64, 32), (((2,), (0,)), ((), ()))),
    "batched": ((2, 8, 64), (2, 64, 32), (((2,), (1,)), ((0,), (0,)))),
    "batched, second axis": ((8, 2, 64), (64, 2, 16), (((2,), (0,)), ((1,), (1,)))),
    "two contracted, two batched": ((2, 3, 8, 4, 16), (16, 3, 4, 5, 2), (((3, 4), (2, 0)), ((0, 1), (4, 1)))),
    "vector": ((64,), (64, 7), (((0,), (0,)), ((), ()))),
    "outer": ((5, 6), (7,), (((), ()), ((), ()))),
}
MATMUL = PRODUCTS["matrices"][2]

#: Recipes, and the largest relative error of a matmul and of its gradients, for normal numbers.
BOUNDS = {
    "fp8": 0.08,
    "fp8_rowwise": 0.07,
    "int8_qat": 0.015,
    "int8_train": 0.015,
    "w8a16": 0.012,
    "w8a8_static": 0.015,
    "w4a16": 0.15,
    "mxfp8": 0.06,
    "nvfp4": 0.16,
}
RECIPES = {name: quant.get_recipe(name) for name in BOUNDS}
#: Those whose gradient is straight-through.
STRAIGHT = ("int8_qat", "w8a16", "w8a8_static", "w4a16")
#: Those with scales of tiles; and the others.
TILED = ("w4a16", "mxfp8", "nvfp4")
UNTILED = tuple(name for name in BOUNDS if name not in TILED)

#: Where the order of a float32 sum may differ.
EXACT = 1e-6
#: The same for a sum of thousands of squares.
SUMMED = 1e-5

#: Formats: dtype, largest magnitude, smallest positive number.
FORMATS = {
    "e4m3": (ml_dtypes.float8_e4m3fn, 448.0, 2.0**-9),
    "e5m2": (ml_dtypes.float8_e5m2, 57344.0, 2.0**-16),
    "int8": (np.int8, 127.0, 1.0),
}


def relative(found, expected):
    """The relative Frobenius error."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def normal(rng, *shape, dtype=jnp.float32):
    """Standard normal numbers."""
    return jnp.asarray(rng.standard_normal(shape).astype(np.float32).astype(dtype))


def amax(x):
    """The largest magnitude."""
    return float(np.max(np.abs(np.asarray(x))))


def whole(rng, name, *shape):
    """Whole numbers with more bits than any float8 has, and a first index whose scales are powers of two.

    So sums are exact, in any order, and nothing is rounded the other way.
    """
    largest = 112 if "fp8" in name else 127
    return rng.integers(-largest, largest + 1, shape).astype(np.float32), largest


def grid(name):
    """All numbers of a format that are used, sorted, in float64."""
    dtype, largest, _ = FORMATS[name]
    with np.errstate(invalid="ignore"):
        values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    return np.unique(values[np.abs(values) <= largest] + 0.0)  # -0 + 0 is 0


def stablehlo(fun, *args, platform="cuda"):
    """A function as the compiler of a platform gets it."""
    return jax.jit(fun).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def products(text):
    """The matmuls of a StableHLO program: (dtype of lhs, of rhs, of the result, precision)."""
    pattern = re.compile(r"stablehlo\.dot_general .*: \((\S+), (\S+)\) -> (\S+)")
    precision = re.compile(r"precision = \[(\w+), (\w+)\]")
    found = []
    for line in text.splitlines():
        if match := pattern.search(line):
            dtypes = [re.search(r"(?:\d+x)*(\w+)>", text).group(1) for text in match.groups()]
            named = precision.search(line)
            found.append((*dtypes, named.group(1) if named else "DEFAULT"))
    return found


def products_of_8_bits(text):
    """Those with two operands of 8 bits."""
    return [found for found in products(text) if all(re.fullmatch(r"f8\w+|i8", dtype) for dtype in found[:2])]


def value_and_gradients(fun):
    """A value and its gradients with respect to both operands."""
    return jax.value_and_grad(fun, argnums=(0, 1))


def assert_same(found, expected, tolerance=EXACT):
    """Compares trees; errors are relative to the length of the arrays."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.shape == y.shape
        assert relative(x, y) <= (tolerance if x.ndim else max(tolerance, SUMMED))


def mesh(kind=AxisType.Auto):
    """The eight simulated devices along one axis."""
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))
