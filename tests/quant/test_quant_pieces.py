"""What quantized matmuls are made of: axes that are followed, sites, mapped operands."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.lowbit import EXACT, normal, relative

from jmp_lite import quant
from jmp_lite.products._dimensions import dimensions
from jmp_lite.quant import _axes, _emulated, _linear, _operands, _smooth
from jmp_lite.quant._product import Call
from jmp_lite.quant._sites import Site, _placed
from jmp_lite.quant._spec import parse_spec

# --- Axes that are followed ---


def numbers(dims):
    """The axes of the weight in each axis, and its size."""
    return [(sorted(_axes._axes([dim])), int(np.prod([atom.size for atom in dim]))) for dim in dims]


#: Shape of a weight, shapes that it is given one after the other, axes of the weight in each axis at the end.
RESHAPED = {
    "merged": ((2, 3, 4), [(6, 4)], [[0, 1], [2]]),
    "merged from the end": ((2, 3, 4), [(2, 12)], [[0], [1, 2]]),
    "flat": ((2, 3, 4), [(24,)], [[0, 1, 2]]),
    "split": ((6, 4), [(2, 3, 4)], [[0], [0], [1]]),
    "split and merged again": ((6, 4), [(2, 3, 4), (6, 4)], [[0], [1]]),
    "split and merged otherwise": ((6, 4), [(2, 3, 4), (2, 12)], [[0], [0, 1]]),
    "merged and split again": ((2, 3, 4), [(24,), (2, 3, 4)], [[0], [1], [2]]),
    "across": ((6, 4), [(4, 6)], [[0, 1], [0, 1]]),
    "across, in part": ((4, 6), [(2, 12)], [[0], [0, 1]]),
    "with axes of one": ((2, 3), [(2, 1, 3, 1)], [[0], [], [1], []]),
    "without axes of one": ((2, 1, 3), [(2, 3)], [[0], [2]]),
    "to axes of one": ((1, 1), [()], []),
}


@pytest.mark.parametrize("case", RESHAPED)
def test_what_becomes_of_axes_in_reshapes(case):
    shape, shapes, expected = RESHAPED[case]
    dims = _axes.whole(shape)
    for new in shapes:
        dims = _axes._reshaped(dims, new)
        assert [size for _, size in numbers(dims)] == list(new)
    assert [axes for axes, _ in numbers(dims)] == expected


def test_axes_that_are_cut_are_still_those_of_the_weight():
    """A cut axis of two pieces is one piece of both."""
    dims = _axes._reshaped(_axes.whole((2, 3, 4)), (6, 4))
    cut = _axes._resized(dims, (5, 4))
    assert numbers(cut) == [([0, 1], 5), ([2], 4)]
    assert [len(dim) for dim in cut] == [1, 1]
    assert cut[1] == dims[1]
    assert _axes._resized(dims, (6, 4)) == dims


def test_axes_of_two_ways_are_those_of_both():
    """Unless one of them has none, as a mean that is spread again."""
    whole, turned = _axes.whole((3, 4)), tuple(reversed(_axes.whole((4, 3))))
    none = tuple(map(_axes._new, (3, 4)))
    assert _axes._merged(whole, whole) == whole
    assert _axes._merged(whole, none) == whole
    assert _axes._merged(none, whole) == whole
    assert _axes._merged(none, none) == none
    assert numbers(_axes._merged(whole, turned)) == [([0, 1], 3), ([0, 1], 4)]


X = jnp.ones((2, 6, 16))
#: Functions of a weight and an input, the shape of the weight, the axes that are contracted.
FOLLOWED = {
    "stacked": (lambda w, x: x @ jnp.stack([w, 2 * w])[1], (16, 8), (0,)),
    "stacked at the end": (lambda w, x: x @ jnp.stack([w, 2 * w], -1)[..., 0], (16, 8), (0,)),
    "unstacked": (lambda w, x: x @ [*w][1], (3, 16, 8), (1,)),
    "the largest of a stack": (lambda w, x: x @ w.max(0), (3, 16, 8), (1,)),
    "the mean of two axes": (lambda w, x: x @ w.mean((0, 2)), (3, 16, 4, 8), (1,)),
    "with more axes": (lambda w, x: x @ w[None, :, :], (16, 8), (0,)),
    "an axis of one squeezed": (lambda w, x: x @ w[:, 0], (16, 1, 8), (0,)),
    "one row spread": (lambda w, x: x @ jnp.broadcast_to(w, (16, 8)), (1, 8), ()),
    "one column spread": (lambda w, x: x @ jnp.broadcast_to(w, (16, 8)), (16, 1), (0,)),
    "joined": (lambda w, x: x @ jnp.concatenate([w, w], 1), (16, 8), (0,)),
    "joined along what is contracted": (lambda w, x: x @ jnp.concatenate([w, w], 0), (8, 8), (0,)),
    "padded": (lambda w, x: x @ jnp.pad(w, ((0, 6), (0, 0))), (10, 8), (0,)),
    "reversed": (lambda w, x: x @ w[::-1], (16, 8), (0,)),
    "a diagonal": (lambda w, x: x @ jnp.diag(w), (16,), (0,)),
    "one of a stack by an index of data": (lambda w, x: x @ w[jnp.int32(x[0, 0, 0])].T, (3, 8, 16), (2,)),
    "rows by an index of the loop": (
        lambda w, x: lax.fori_loop(0, 2, lambda i, x: x + x @ lax.dynamic_slice(w, (i, 0, 0), (1, 16, 16))[0], x),
        (3, 16, 16),
        (1,),
    ),
    "times data": (lambda w, x: x @ (w * x[0, 0, :, None]), (16, 8), None),
    "the weight of weights": (lambda w, x: x @ (w @ w), (16, 16), (0, 1)),
    "a complex weight": (lambda w, x: x.astype(jnp.complex64) @ w, (16, 8), (0,)),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_axes_of_a_weight_on_its_way(case):
    fun, shape, expected = FOLLOWED[case]
    weight = jax.ShapeDtypeStruct(shape, jnp.complex64 if "complex" in case else jnp.float32)
    assert quant.contracted_axes(fun)(weight, X) == expected


def test_two_weights_in_one_matmul_are_contracted_each():
    """Over what they meet in; and parameters that are no arrays have no axes."""
    params = {"a": jnp.ones((4, 16)), "b": jnp.ones((8, 4)), "rate": 0.5, "none": None, "unused": jnp.ones((2, 2))}
    axes = quant.contracted_axes(lambda p, x: x @ (p["b"] @ p["a"]).T * p["rate"])(params, X)
    assert axes == {"a": (0,), "b": (1,), "rate": None, "none": None, "unused": None}


# --- Sites ---

#: An einsum of an activation and a weight whose first letters are their own, and the site of it.
SITES = {
    "ba,ac->bc": Site("w", (4, 3), (0,), 0, (1,)),
    "ab,ac->bc": Site("w", (4, 3), (0,), 0, (0,)),
    "ba,ca->bc": Site("w", (3, 4), (1,), 0, (1,)),
    "xaby,abc->xyc": Site("w", (4, 2, 3), (0, 1), 0, (1, 2)),
    "xbay,abc->xyc": Site("w", (4, 2, 3), (0, 1), 0, (2, 1)),
    "xaby,bca->xyc": Site("w", (2, 3, 4), (2, 0), 0, (1, 2)),
}


@pytest.mark.parametrize("einsum", SITES)
def test_rows_of_a_site_are_those_that_meet_its_channels(einsum, rng):
    """Each times the factor of its channel, and the weight divided by it, gives the same."""
    site = SITES[einsum]
    letters = einsum.split("->")[0].split(",")
    sizes = {**dict(zip(letters[1], site.shape, strict=True)), "x": 5, "y": 7}
    sizes = {"b": 6, **sizes}
    x = normal(rng, *(sizes[letter] for letter in letters[0]))
    w = normal(rng, *site.shape)
    expected = np.einsum(einsum, x, w)
    own = [axis for axis in range(w.ndim) if axis not in site.contracted]
    matrix = jnp.transpose(w, (*site.contracted, *own)).reshape(-1, site.shape[own[0]])
    rows = site.rows(x)
    assert rows.dtype == jnp.float32
    np.testing.assert_allclose(np.sort((rows @ matrix).ravel()), np.sort(expected.ravel()), rtol=1e-5, atol=1e-5)
    factors = np.float32(2.0 ** np.arange(rows.shape[1]))
    in_weight = site.in_weight(factors)
    assert in_weight.shape == tuple(n if axis in site.contracted else 1 for axis, n in enumerate(site.shape))
    in_activation = site.in_activation(in_weight, x.shape)
    assert in_activation.ndim == x.ndim
    np.testing.assert_allclose(np.einsum(einsum, x / in_activation, w * in_weight), expected, rtol=1e-4, atol=1e-4)


def test_channels_are_placed_along_their_axes():
    channels = np.arange(6)
    assert _placed(channels, (1,), (4, 6)).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert _placed(channels, (0,), (6, 4)).shape == (6, 1)
    assert _placed(channels, (2, 0), (3, 4, 2)).tolist() == [[[0, 3]], [[1, 4]], [[2, 5]]]


#: Largest magnitudes of the activations and of the weight in a channel, alpha, and the exponent of the factor.
FACTORS = [
    (64.0, 1.0, 0.5, 3),
    (1.0, 64.0, 0.5, -3),
    (64.0, 4.0, 0.0, -2),
    (64.0, 4.0, 1.0, 6),
    (64.0, 4.0, 0.25, 0),
    (2.0**100, 2.0**-100, 0.5, 40),
    (2.0**-100, 2.0**100, 0.5, -40),
    (0.0, 4.0, 0.5, 0),
    (64.0, 0.0, 0.5, 0),
    (2.0**1.4, 1.0, 1.0, 1),
    (2.0**1.6, 1.0, 1.0, 2),
]


@pytest.mark.parametrize(("of_x", "of_w", "alpha", "exponent"), FACTORS)
def test_factors_balance_a_channel(of_x, of_w, alpha, exponent):
    """By a power of two, and by none where there is nothing to balance."""
    weight = np.float32([[of_w, -of_w / 2], [1.0, 1.0]])
    factors = _smooth._factors(weight, np.float64([[of_x], [1.0]]), alpha)
    assert factors.dtype == np.float32
    np.testing.assert_array_equal(factors, [[2.0**exponent], [1.0]])


# --- What mapping makes of them ---

NUMBERS = (((1,), (0,)), ((), ()))
#: Which of tangent, numbers and scale are mapped.
MAPPED = [flags for flags in itertools.product((False, True), repeat=3) if any(flags)]


@pytest.mark.parametrize("side", [0, 1])
def test_a_mapped_tangent_meets_its_own_operand(side, rng):
    """Whatever of tangent, numbers and scale is mapped, and along which axis; forward and backward."""
    own, other = ((2, 5), (5, 4)) if side == 0 else ((5, 4), (2, 5))
    cases, inputs = [], []
    for flags, channels in itertools.product(MAPPED, (False, True)):
        spec = "e4m3:channel" if channels else "e4m3"
        recipe = quant.DotRecipe(spec, spec, spec)
        call = Call(dimensions(NUMBERS), recipe, np.dtype("float32"), np.dtype("float32"), None, None)
        of_scale = (1, 4) if side == 0 else (2, 1)
        shapes = own, other, of_scale if channels else ()
        arrays = [normal(rng, *((3, *shape) if flag else shape)) for flag, shape in zip(flags, shapes, strict=True)]
        arrays[1] = arrays[1].astype(jnp.float8_e4m3fn)
        arrays[2] = jnp.abs(arrays[2]) + 0.5
        cases.append((call, tuple(0 if flag else None for flag in flags)))
        inputs.append(arrays)

    def both(call, tangent, values, scale):
        product = functools.partial(_linear.tangent_product, side=side, call=call)
        out, pull = jax.vjp(lambda t: product(t, _operands.Quantized(values, scale)), tangent)
        return out, pull(jnp.ones_like(out))[0]

    @jax.jit
    def run(inputs):
        found, expected = [], []
        for (call, axes), arrays in zip(cases, inputs, strict=True):
            found.append(jax.vmap(functools.partial(both, call), axes)(*arrays))
            each = [
                both(call, *(x if axis is None else x[i] for x, axis in zip(arrays, axes, strict=True)))
                for i in range(3)
            ]
            expected.append(jax.tree.map(lambda *parts: jnp.stack(parts), *each))
        return found, expected

    for found, expected in zip(*run(inputs), strict=True):
        assert relative(found[0], expected[0]) < EXACT
        assert relative(found[1], expected[1]) < 0.1  # members share the scale of a cotangent


@pytest.mark.parametrize("positions", [(0, None), (None, 0), (0, 0), (2, 1), (1, None)], ids=str)
@pytest.mark.parametrize("text", ["int8:stochastic", "int8:channel:stochastic", "e4m3"])
def test_mapped_arrays_are_rounded_each_for_itself(positions, text, rng):
    """With the random bits that each would have alone."""
    spec = parse_spec(text)
    shape, of_scale = (4, 5), (1, 5) if spec.granularity == "channel" else ()
    x = normal(rng, *np.insert(shape, positions[0], 3)) if positions[0] is not None else normal(rng, *shape)
    at = None if positions[1] is None else min(positions[1], len(of_scale))
    scale = jnp.full(of_scale if at is None else (*of_scale[:at], 3, *of_scale[at:]), 0.01)
    rounded = functools.partial(_operands.to_format, spec=spec)

    def member(i):
        return rounded(
            x if positions[0] is None else jnp.take(x, i, positions[0]), scale if at is None else jnp.take(scale, i, at)
        )

    found = jax.vmap(rounded, (positions[0], at))(x, scale)
    expected = jnp.stack([member(i) for i in range(3)])
    np.testing.assert_array_equal(np.float32(found), np.float32(expected))


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("features", [0, 1])
def test_mapped_cotangents_are_rounded_each_for_itself(position, features, rng):
    """With a scale for each feature, in whatever axis that is."""
    specs = quant.DotRecipe("int8", "int8", "int8:channel")
    bind = functools.partial(_emulated._primitive().bind, specs=specs, features=features)

    def pulled(tangent, cotangent):
        out, pull = jax.vjp(bind, tangent)
        return out, pull(cotangent)[0]

    tangent, cotangent = (normal(rng, *np.insert((4, 5), position, 3)) for _ in range(2))
    found = jax.vmap(pulled, position)(tangent, cotangent)
    each = [pulled(*(jnp.take(x, i, position) for x in (tangent, cotangent))) for i in range(3)]
    np.testing.assert_array_equal(found[0], jnp.stack([out for out, _ in each]))
    np.testing.assert_array_equal(found[0], jnp.moveaxis(tangent, position, 0))
    amax = np.abs(cotangent).max(tuple(axis for axis in range(3) if axis != (features + (position <= features))))
    step = np.expand_dims(amax, 1 - features) / 127
    errors = np.abs(found[1] - jnp.moveaxis(cotangent, position, 0))
    assert np.all(errors <= step / 2 * (1 + 1e-5))
    assert np.any(errors > 0)


def test_shardings_of_mapped_results_have_an_axis_more():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    spec = jax.P("a", "b")
    assert _linear._with_axis(None, 0) is None
    for axis, expected in ((0, jax.P(None, "a", "b")), (1, jax.P("a", None, "b")), (2, jax.P("a", "b", None))):
        assert _linear._with_axis(spec, axis) == expected
        assert _linear._with_axis(jax.NamedSharding(mesh, spec), axis) == jax.NamedSharding(mesh, expected)
