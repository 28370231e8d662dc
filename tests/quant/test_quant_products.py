"""Scales of results and cotangents, convolutions, ragged matmuls and matmuls of tiles."""

import functools

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
from jmp_lite.quant import _emulated, _product, _tiles
from jmp_lite.quant._product import Call
from jmp_lite.quant._spec import parse_spec

#: Products with axes of every kind, in another order on each side.
LAYERED = ("batched, second axis", "two contracted, two batched")


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


# --- Convolutions and ragged matmuls ---

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


# --- JAX's matmul of tiles ---


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
