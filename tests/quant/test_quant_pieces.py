"""What quantized matmuls are made of: axes that are followed, rows of sites, scales of results, mapped operands."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.comparisons import slow_but_for
from support.jaxprs import equations
from support.lowbit import EXACT, MATMUL, PRODUCTS, normal, relative

from jmp_lite import quant
from jmp_lite.products._dimensions import dimensions, transposed
from jmp_lite.quant import _axes, _emulated, _linear, _operands, _product, _smooth, _tiles
from jmp_lite.quant._product import Call
from jmp_lite.quant._sites import Site, _placed
from jmp_lite.quant._spec import parse_spec

# --- Axes that are followed -----------------------------------------------------------------------


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


# --- Sites ----------------------------------------------------------------------------------------

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


# --- What mapping makes of them -------------------------------------------------------------------

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


#: Products with axes of every kind, in another order on each side.
LAYERED = ("batched, second axis", "two contracted, two batched")

# --- Scales of results ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", slow_but_for(LAYERED, PRODUCTS))
def test_scales_lie_along_the_axes_of_the_result(case, rng):
    """Those of an operand with a scale per channel, in every layout; and along the axes that a cotangent shares."""
    lhs_shape, rhs_shape, dimension_numbers = PRODUCTS[case]
    dims = dimensions(dimension_numbers)
    exact = functools.partial(lax.dot_general, dimension_numbers=dimension_numbers)
    arrays = [rng.integers(-3, 4, shape).astype(np.float32) for shape in (lhs_shape, rhs_shape)]
    out = exact(*arrays)
    for side, x in enumerate(arrays):
        shape = [1 if axis in dims.contracted[side] else n for axis, n in enumerate(x.shape)]
        scale = np.float32(2.0 ** rng.integers(-3, 4, shape))
        scaled = [x * scale if i == side else arrays[i] for i in (0, 1)]
        along = _product._along_result(jnp.asarray(scale), out.ndim, dims, side)
        np.testing.assert_array_equal(out * along, exact(*scaled))


@pytest.mark.parametrize("case", slow_but_for(LAYERED, PRODUCTS))
@pytest.mark.parametrize("side", [0, 1])
def test_scales_along_what_is_added_up_go_to_the_cotangent(case, side, rng):
    """As to the other operand: of a matmul of whole numbers, nothing is rounded."""
    shapes, dims = PRODUCTS[case][:2], dimensions(PRODUCTS[case][2])
    out = jax.eval_shape(functools.partial(lax.dot_general, dimension_numbers=dims), *map(np.zeros, shapes))
    found = transposed(dims, tuple(map(len, shapes)), side)
    shape = shapes[1 - side]
    scale = 2.0 ** rng.integers(-3, 4, [1 if axis in dims.contracted[1 - side] else n for axis, n in enumerate(shape)])
    other, cotangent, scale = (
        jnp.asarray(x, jnp.float32) for x in (rng.integers(-3, 4, shape), rng.integers(-3, 4, out.shape), scale)
    )
    product = functools.partial(lax.dot_general, dimension_numbers=found.dims)
    folded = product(*found.ordered(_product.folded(cotangent, scale, found), other))
    np.testing.assert_array_equal(folded, product(*found.ordered(cotangent, other * scale)))


#: Recipe, precision that is asked for; those of the matmuls forward and backward.
HIGHEST = lax.Precision.HIGHEST
PRECISIONS = {
    "quantized": ("fp8", HIGHEST, {None}, {HIGHEST}),
    "quantized, none asked for": ("fp8", None, {None}, {HIGHEST}),
    "a weight alone": ("w8a16", HIGHEST, {HIGHEST}, {HIGHEST}),
    "a weight alone, none asked for": ("w8a16", None, {None}, {None}),
    "straight-through": ("w8a8", HIGHEST, {None}, {HIGHEST}),
    "tiles": ("mxfp8", HIGHEST, {HIGHEST}, {None}),
    "tiles of a weight": ("w4a16", HIGHEST, {HIGHEST}, {HIGHEST}),
}


@pytest.mark.parametrize("case", PRECISIONS)
def test_precisions_are_for_what_is_not_quantized(case):
    recipe, asked, forward, backward = PRECISIONS[case]
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 128), (128, 3)))
    dot = functools.partial(quant.get_recipe(recipe), dimension_numbers=MATMUL, precision=asked)

    def precisions(fun, *args):
        given = [eqn.params["precision"] for eqn in equations("dot_general", fun, *args)]
        return [precision[0] if isinstance(precision, tuple) else precision for precision in given]

    assert set(precisions(dot, x, w)) == forward
    both = precisions(lambda x, w, g: jax.vjp(dot, x, w)[1](g), x, w, jax.ShapeDtypeStruct((4, 3), jnp.float32))
    assert set(both[1:]) == backward


#: Text of a spec, and how often it looks for NaN.
LOOKS = {"e4m3": 0, "e5m2:channel": 0, "e4m3:tile32": 0, "int8": 1, "int8:channel": 1, "int4:tile32": 1}


@pytest.mark.parametrize("text", LOOKS)
def test_only_numbers_that_cannot_show_nan_are_searched_for_it(text):
    """Floats of 8 bits show it themselves, and save a pass over memory, in matmuls and in arrays that are held."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 64), (64, 3)))
    recipe = quant.get_recipe(f"lhs={text},rhs=none")
    assert len(equations("reduce_or", functools.partial(recipe, dimension_numbers=MATMUL), x, w)) == LOOKS[text]
    held = functools.partial(quant.quantize_array, dtype=text if ":" in text else f"{text}:tensor", axes=[1])
    assert len(equations("reduce_or", held, x)) == LOOKS[text]


# --- Convolutions and ragged matmuls --------------------------------------------------------------

#: Dimension numbers; axes that share a scale, of the left and of the right operand; the axis of features.
LAYOUTS = {
    "NCHW": (("NCHW", "OIHW", "NCHW"), ((1, 2, 3), (1, 2, 3)), 1),
    "NHWC": (("NHWC", "HWIO", "NHWC"), ((1, 2, 3), (0, 1, 2)), 3),
    "CNHW": (("CNHW", "IHWO", "HNWC"), ((0, 2, 3), (0, 1, 2)), 3),
}
#: Shapes of the operands, contracted axes, axes of groups; the shared axes, the axis of features, that of groups.
RAGGED = {
    "rows": ((8, 4), (3, 4, 5), ((1,), (1,)), ([0], [0]), ((1,), (1,)), 1, 0),
    "rows, groups in the middle": ((8, 4), (4, 3, 5), ((1,), (0,)), ([0], [1]), ((1,), (0,)), 1, 1),
    "what is added up": ((5, 8), (8, 4), ((1,), (0,)), ([1], []), ((1,), (0,)), 2, None),
    "batches": ((8, 2, 4), (8, 4, 5), ((2,), (1,)), ([0], []), ((2,), (1,)), 2, None, ((0,), (0,))),
    "rows of batches": ((2, 8, 4), (3, 2, 4, 5), ((2,), (2,)), ([1], [0]), ((2,), (2,)), 2, 0, ((0,), (1,))),
}


@pytest.fixture
def calls(monkeypatch):
    """The calls of what is quantized, which are not made."""
    made = []
    monkeypatch.setattr(_emulated, "_emulated", lambda lhs, rhs, sizes, call: made.append(call) or lhs)
    return made


@pytest.mark.parametrize("case", LAYOUTS)
def test_axes_of_convolutions_that_share_a_scale(case, calls):
    """One scale per sample, per output feature of the kernel, and per feature of cotangents."""
    layout, shared, features = LAYOUTS[case]
    x, w = np.ones((4,) * 4, np.float32), np.ones((4,) * 4, np.float32)
    quant.FP8_ROWWISE.conv(x, w, (1, 1), "SAME", dimension_numbers=layout)
    [call] = calls
    assert (call.shared, call.features, call.group, call.dtype) == (shared, features, None, jnp.float32)


@pytest.mark.parametrize("case", RAGGED)
def test_axes_of_ragged_matmuls_that_share_a_scale(case, calls):
    """Per row, and per output channel of each group."""
    lhs, rhs, contracted, (ragged, groups), shared, features, group, *batched = RAGGED[case]
    dims = lax.RaggedDotDimensionNumbers((contracted, *(batched or [((), ())])), ragged, groups)
    quant.FP8_ROWWISE.ragged_dot(np.ones(lhs, np.float32), np.ones(rhs, np.float32), np.array([3, 4, 1]), dims)
    [call] = calls
    assert (call.shared, call.features, call.group) == (shared, features, group)
    out = jax.eval_shape(call.multiply, *map(jnp.ones, (lhs, rhs)), jnp.array([3, 4, 1]))
    assert out.ndim == call.features + 1


def test_parameters_that_are_not_given_are_not_passed_on():
    """JAX versions have different ones."""
    passed = _emulated._with_params(dict, precision=None, padding="SAME", group_offset=None, stride=0)
    assert passed() == {"padding": "SAME", "stride": 0}


#: Dtypes of both operands and of the result, and whether they are quantized.
EMULATED = [
    ("float32", "float32", None, True),
    ("bfloat16", "float16", None, True),
    ("bfloat16", "bfloat16", "float32", True),
    ("float64", "float64", None, False),
    ("int32", "int32", None, False),
    ("float32", "float32", "float64", False),
]


@pytest.mark.parametrize(("lhs", "rhs", "dtype", "is_quantized"), EMULATED)
def test_which_convolutions_are_quantized(lhs, rhs, dtype, is_quantized, calls):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x, w = jnp.ones((1, 1, 4, 4), lhs), jnp.ones((1, 1, 2, 2), rhs)
        convolve = functools.partial(quant.FP8.conv, preferred_element_type=dtype)
        jax.eval_shape(lambda x, w: convolve(x, w, (1, 1), "SAME"), x, w)
    assert len(calls) == is_quantized


# --- JAX's matmul of tiles ------------------------------------------------------------------------


def scaled_matmul(lhs, rhs, of_lhs, of_rhs, dtype):
    """What ``jax.nn.scaled_matmul`` promises: rows of ``rhs`` are columns of the result, scales are those of tiles."""
    wide = [
        x.astype(dtype) * jnp.repeat(scale.astype(dtype), x.shape[-1] // scale.shape[-1], -1)
        for x, scale in ((lhs, of_lhs), (rhs, of_rhs))
    ]
    return jnp.einsum("bmk,bnk->bmn", *wide)


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_the_matmul_of_tiles_gets_matrices_and_scales(name, rng, monkeypatch):
    """In any layout; scales are in the format that devices take."""
    given = []

    def record(*args):
        given.append(args)
        return scaled_matmul(*args)

    monkeypatch.setattr(jax.nn, "scaled_matmul", record)
    recipe = quant.get_recipe(name)
    cases = ("matrices", *LAYERED)
    arrays = [[normal(rng, *shape) for shape in PRODUCTS[case][:2]] for case in cases]

    @jax.jit
    def run(arrays):
        found = []
        for case, pair in zip(cases, arrays, strict=True):
            call = Call(dimensions(PRODUCTS[case][2]), recipe, np.dtype("float32"), np.dtype("float32"), None, None)
            by_kernel = _tiles.kernel_product(*pair, call, recipe.operands)
            found.append((by_kernel, recipe(*pair, PRODUCTS[case][2])))
        return found

    for by_kernel, by_recipe in run(arrays):
        assert by_kernel.shape == by_recipe.shape
        assert relative(by_kernel, by_recipe) < EXACT
    [lhs, rhs, of_lhs, of_rhs, dtype] = given[0]
    tile = recipe.lhs.tile
    assert (lhs.shape, rhs.shape, dtype) == ((1, 8, 64), (1, 32, 64), jnp.float32)
    assert (of_lhs.shape, of_rhs.shape) == ((1, 8, 64 // tile), (1, 32, 64 // tile))
    assert of_lhs.dtype == of_rhs.dtype == (jnp.float8_e8m0fnu if name == "mxfp8" else jnp.float8_e4m3fn)


def test_scales_in_e4m3_are_relative_to_one_of_all_devices(rng):
    amax = jnp.abs(normal(rng, 3, 4, 1))
    spec = parse_spec("e2m1:tile16:scale_e4m3")
    alone, together = (
        jax.vmap(functools.partial(_tiles.tile_scale, spec=spec, axis_name=name), axis_name="i")(amax)
        for name in (None, "i")
    )
    np.testing.assert_array_equal(together[1], np.full(3, alone[1].max()))
    assert len(set(alone[1].tolist())) == 3
    np.testing.assert_allclose(together[0] * together[1][:, None, None], amax / 6, rtol=2**-3)


def test_tiles_lie_on_one_device():
    """Along the axes of tiles an array is gathered, along others it stays."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        for spec, axes, expected in (
            (jax.P("a", "b"), (1,), jax.P("a", None)),
            (jax.P("a", "b"), (0,), jax.P(None, "b")),
            (jax.P("a", "b"), (0, 1), jax.P(None, None)),
            (jax.P("a", None), (1,), jax.P("a", None)),
        ):
            x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=jax.NamedSharding(mesh, spec))
            found = equations("reshard", lambda x, axes=axes: _tiles._gathered(x, axes), x)
            assert [eqn.outvars[0].aval.sharding.spec for eqn in found] == [expected] * (spec != expected)


def test_tiles_of_results_that_are_sharded_are_multiplied_as_what_they_stand_for(monkeypatch):
    """And so are those on explicit meshes, and in `shard_map`: JAX's matmul of them takes no sharding."""
    calls = []
    monkeypatch.setattr(_tiles, "has_units", lambda: True)
    monkeypatch.setattr(_tiles, "kernel_product", lambda lhs, rhs, call, specs: calls.append(call) or lhs @ rhs)
    x, w = jnp.ones((4, 32)), jnp.ones((32, 4))
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    none, shared = jax.sharding.Mesh(np.empty((), object), ()), jax.NamedSharding(mesh, jax.P())
    for recipe, own, sharding, expected in (
        (quant.MXFP8, none, None, 1),
        (quant.W4A16, none, None, 0),
        (quant.MXFP8, mesh, shared, 0),
        (quant.MXFP8, mesh, None, 0),
    ):
        calls.clear()
        with jax.set_mesh(own):
            jax.eval_shape(lambda x, w, r=recipe, s=sharding: r(x, w, MATMUL, out_sharding=s), x, w)
        assert len(calls) == expected
    auto = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    for specs, expected in (((jax.P("a"), jax.P()), 0), ((jax.P(), jax.P(None, "a")), 0), ((jax.P(), jax.P()), 1)):
        calls.clear()
        product = functools.partial(quant.MXFP8, dimension_numbers=MATMUL)
        out = jax.P("a") if specs[0] else jax.P(None, "a") if specs[1] else jax.P()
        jax.eval_shape(jax.shard_map(product, mesh=auto, in_specs=specs, out_specs=out), x, w)
        assert len(calls) == expected
