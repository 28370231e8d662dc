"""Products and both gradients beside the definition, in NumPy: every recipe, dimension numbers and kind of numbers.

The reference rounds as the recipe says, number by number, and multiplies in float64. What is left is the float32 sum of
the library: half an ulp of the sum of magnitudes for each term, and for each factor that the sum is multiplied by; and
the smallest normal number for each, below which XLA takes numbers for zero.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparisons import slow_but_for
from support.lowbit import FORMATS, RECIPES, UNTILED

#: Axes of the operands and of the result, as einsum names them, and their sizes.
SIZES = {"a": 4, "b": 6, "c": 5, "i": 16, "j": 3}
PRODUCTS = {
    "ai,ib->ab": "matrices",
    "ia,ib->ab": "left transposed",
    "ai,bi->ab": "right transposed",
    "ia,bi->ab": "both transposed",
    "cai,ib->cab": "sequences",
    "bci,ai->bca": "sequences, right transposed",
    "caij,ijb->cab": "two contracted",
    "caij,jib->cab": "two contracted, in another order",
    "iaj,jbi->ab": "contracted apart",
    "cai,cib->cab": "batched",
    "bci,ica->cba": "batched, in the middle",
    "aic,bic->cab": "batched, last",
    "cjai,jcib->cjab": "two batched",
    "cai,bcij->cabj": "batched, two kept",
    "i,ib->b": "vector on the left",
    "ai,i->a": "vector on the right",
    "i,i->": "vectors",
    "a,b->ab": "outer",
    "ca,cb->cab": "outer, batched",
}
quick = pytest.mark.parametrize("product", slow_but_for(("ai,ib->ab", "iaj,jbi->ab"), PRODUCTS))
KINDS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "constant": lambda rng, shape: np.full(shape, rng.uniform(0.5, 3)),
    "zeros": lambda rng, shape: np.zeros(shape),
    "sparse": lambda rng, shape: rng.standard_normal(shape) * (rng.uniform(size=shape) < 0.2),
    "powers of two": lambda rng, shape: np.exp2(rng.integers(-6, 7, shape)) * rng.choice([-1, 1], shape),
    "decades": lambda rng, shape: rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 4, shape),
    "one outlier": lambda rng, shape: np.where(
        np.arange(np.prod(shape)).reshape(shape) == 1, 1e4, rng.uniform(size=shape)
    ),
    "tiny": lambda rng, shape: rng.standard_normal(shape) * 1e-18,
    "huge": lambda rng, shape: rng.standard_normal(shape) * 1e12,
}


def axes_of(names, among):
    return tuple(among.index(name) for name in names)


def dimension_numbers(left, right, result):
    contracted = [name for name in left if name in right and name not in result]
    batched = [name for name in left if name in right and name in result]
    return tuple((axes_of(names, left), axes_of(names, right)) for names in (contracted, batched))


def scale_of(x, spec, contracted):
    """float32, of the rank of ``x``."""
    axes = None if spec.granularity == "tensor" else contracted
    name = next(name for name, (dtype, _, _) in FORMATS.items() if dtype == spec.dtype)
    limit = FORMATS[name][1]
    scale = np.max(np.abs(x), axis=axes, keepdims=True, initial=0).astype(np.float32) * np.float32(1 / limit)
    if spec.pow2:
        mantissa, exponent = np.frexp(scale)
        scale = np.ldexp(np.float32(1), np.where(mantissa == 0.5, exponent - 1, exponent)) * (scale > 0)
    scale = np.where(scale < 2.0**-126, 1, scale).astype(np.float32)
    is_small = spec.granularity == "tensor" and spec.dtype != np.int8
    return np.maximum(scale, np.float32(2.0**-63)) if is_small else scale, limit


def rounded(x, spec, contracted):
    """Numbers of the format and the scale; and by how much each may be off, which is nothing if it is to nearest."""
    scale, limit = scale_of(x, spec, contracted)
    scaled = np.asarray(x, np.float32) / scale
    if spec.dtype == np.int8:
        values = np.clip(np.rint(scaled), -limit, limit)
    else:
        values = np.clip(scaled, -limit, limit).astype(spec.dtype)
    return values.astype(np.float64), scale.astype(np.float64), 1.0 if spec.stochastic else 0.0


def as_it_is(x, spec, contracted):
    return (np.asarray(x, np.float64), 1.0, 0.0) if spec is None else rounded(x, spec, contracted)


def multiplied(expression, left, right):
    """The product of numbers with scales, and how far a float32 sum of it may be off."""
    (x, x_scale, x_off), (y, y_scale, y_off) = left, right
    exact = np.einsum(expression, x * x_scale, y * y_scale)
    magnitudes = np.einsum(expression, np.abs(x) * x_scale, np.abs(y) * y_scale)
    terms = np.prod([SIZES[name] for name in SIZES if name in expression.split("->")[0]]) / max(exact.size, 1)
    off = np.einsum(expression, np.full_like(x, x_off) * x_scale, np.abs(y) * y_scale)
    off += np.einsum(expression, np.abs(x) * x_scale, np.full_like(y, y_off) * y_scale)
    return exact, (terms + 6) * 2.0**-24 * (magnitudes + off) + off + (terms + 1) * 2.0**-126


def gradient(names, recipe, own, cotangent, other):
    """The cotangent of one operand: its axes, and of the others the axes and what they are."""
    (of_cotangent, of_other), (values, scale, off) = names, other
    contracted = tuple(axis for axis, name in enumerate(of_cotangent) if name not in own)
    expression = f"{of_cotangent},{of_other}->{own}"
    if recipe.grad is None:
        return multiplied(expression, (cotangent, 1.0, 0.0), other)
    if np.size(scale) > 1 or recipe.lhs.granularity == "channel":
        shared = np.einsum(
            f"{of_other}->{''.join(n for n in of_cotangent if n in of_other)}", scale * np.ones_like(values)
        )
        repeats = np.prod([SIZES[n] for n in of_other if n not in of_cotangent])
        order = [SIZES[n] if n in of_other else 1 for n in of_cotangent]
        cotangent = (cotangent * (shared / repeats).astype(np.float32).reshape(order)).astype(np.float32)
        scale = 1.0
    return multiplied(expression, rounded(cotangent, recipe.grad, contracted), (values, scale, off))


@functools.cache
def compiled(name, product):
    recipe, (operands, result) = RECIPES[name], product.split("->")
    numbers = dimension_numbers(*operands.split(","), result)

    def run(x, y, cotangent):
        value, pullback = jax.vjp(lambda x, y: recipe(x, y, numbers), x, y)
        return value, *pullback(cotangent)

    return jax.jit(run)


@quick
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UNTILED)
def test_products_and_gradients_are_those_of_the_definition(name, kind, product, rng):
    recipe, (operands, result) = RECIPES[name], product.split("->")
    left, right = operands.split(",")
    if result != "".join(n for n in left if n in right and n in result) + "".join(
        n for n in left + right if n in result and not (n in left and n in right)
    ):
        pytest.fail(f"{product} is not in the order of dot_general")
    shapes = [[SIZES[n] for n in names] for names in (left, right, result)]
    x, y, cotangent = (np.asarray(KINDS[kind](rng, tuple(shape)), np.float32) for shape in shapes)
    contracted = [tuple(axis for axis, n in enumerate(names) if n not in result) for names in (left, right)]
    lhs, rhs = as_it_is(x, recipe.lhs, contracted[0]), as_it_is(y, recipe.rhs, contracted[1])
    expected = [
        multiplied(product, lhs, rhs),
        gradient((result, right), recipe, left, cotangent, rhs),
        gradient((result, left), recipe, right, cotangent, lhs),
    ]
    found = compiled(name, product)(*map(jnp.asarray, (x, y, cotangent)))
    for value, (exact, bound) in zip(found, expected, strict=True):
        assert np.all(np.abs(np.asarray(value, np.float64) - exact) <= bound)
