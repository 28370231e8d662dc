"""The rules of formats and of arrays that are held in them: what numbers round to, which scales fit, what is chosen."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support.comparisons import DEVICES, assert_identical, mesh, raw

from jmp_lite import errors, quant
from jmp_lite.quant import DotRecipe, QuantSpec, _array, _operands, _scale, _tiles
from jmp_lite.quant._spec import parse_spec

W = np.ones((4, 3), np.float32)

# --- Formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _scale.FORMATS)
def test_every_number_goes_through_bits(name):
    """To the bit, but for signs of zeros and NaN payloads."""
    dtype = _scale.FORMATS[name]
    width = 4 if dtype.name in ("int4", "float4_e2m1fn") else 8
    values = np.arange(2**width, dtype=np.uint8).view(dtype)
    bits = _scale.as_bits(jnp.asarray(values))
    assert bits.dtype == (dtype if name in ("int8", "int4") else jnp.int8)
    back = _scale.from_bits(bits, dtype)
    assert back.dtype == dtype
    np.testing.assert_array_equal(np.asarray(back).astype(np.float32), values.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_wide_numbers_are_their_own_bits(dtype):
    x = jnp.ones(3, dtype)
    assert _scale.as_bits(x) is x
    assert _scale.from_bits(x, x.dtype) is x


#: The largest number of each format, and what it rounds some numbers to.
EDGES = {
    "e4m3": (448.0, {449.0: 448, 2.0**-10: 0, 1.5 * 2.0**-9: 2.0**-8, 1.0625: 1, 1.1: 1.125}),
    "e5m2": (57344.0, {60000.0: 57344, 1.1: 1, 1.13: 1.25}),
    "int8": (127.0, {127.4: 127, 128.0: 127, -128.0: -127, 0.5: 0, 1.5: 2}),
    "e2m1": (6.0, {7.0: 6, 0.2: 0, 0.25: 0, 0.3: 0.5, 5.1: 6, 5.0: 4, -2.6: -3}),
    "int4": (7.0, {7.4: 7, 8.0: 7, -8.0: -7, 2.5: 2}),
}


@pytest.mark.parametrize("name", EDGES)
def test_what_formats_round_to(name):
    limit, rounded = EDGES[name]
    assert _scale.largest(_scale.FORMATS[name]) == limit
    found = quant.quantize(jnp.asarray(list(rounded), jnp.float32), name, jnp.float32(1))
    np.testing.assert_array_equal(np.asarray(found).astype(np.float32), np.float32(list(rounded.values())))


REPEATED = {
    "a scalar": ((), (4, 6), ()),
    "channels": ((1, 6), (4, 6), (1, 6)),
    "each number": ((4, 6), (4, 6), (4, 6)),
    "tiles": ((2, 6), (4, 6), (4, 6)),
    "tiles of the last axis": ((1, 3), (4, 6), (1, 6)),
    "tiles of two axes": ((2, 2), (4, 6), (4, 6)),
    "another rank": ((6,), (4, 6), (6,)),
}


@pytest.mark.parametrize("case", REPEATED)
def test_scales_are_repeated_for_the_numbers_of_a_tile(case):
    of_scale, shape, expected = REPEATED[case]
    scale = np.arange(math.prod(of_scale), dtype=np.float32).reshape(of_scale)
    found = _scale.repeated(scale, shape)
    assert np.shape(found) == expected
    for axis, (tiles, size) in enumerate(zip(of_scale, expected, strict=True)):
        scale = np.repeat(scale, size // tiles, axis)
    np.testing.assert_array_equal(found, scale)


#: Shape, axes that share a scale, tile; how many neighbors share one along each axis.
LENGTHS = [
    ((8, 4), (0,), None, (8, 1)),
    ((8, 4), (0,), 8, (8, 1)),
    ((8, 4), (0,), 16, (8, 1)),
    ((8, 4), (0,), 4, (4, 1)),
    ((8, 4), (0,), 3, None),
    ((8, 4), (0, 1), None, (8, 4)),
    ((8, 4), (0, 1), 4, (1, 4)),
    ((8, 4), (0, 1), 2, (1, 2)),
    ((8, 4), (0, 1), 8, (2, 4)),
    ((8, 4), (1, 0), 8, (2, 4)),
    ((8, 4), (0, 1), 6, None),
    ((8, 4), (0, 1), 12, None),
    ((8, 4), (), 4, (1, 1)),
    ((8, 4), (), None, (1, 1)),
    ((0, 4), (0,), 4, (1, 1)),
    ((), (), None, ()),
]


@pytest.mark.parametrize(("shape", "shared", "tile", "lengths"), LENGTHS)
def test_how_many_neighbors_share_a_scale(shape, shared, tile, lengths):
    assert _tiles.tile_lengths(shape, shared, tile) == lengths
    if lengths is not None:
        amax = jax.eval_shape(lambda x: _tiles.amax_of_tiles(x, lengths, np.dtype("int8")), np.zeros(shape))
        assert amax.shape == tuple(-(-n // length) or 1 for n, length in zip(shape, lengths, strict=True))


@pytest.mark.parametrize(
    ("text", "amax", "scale"),
    [
        ("e4m3", 448 * 2.0**-70, 2.0**-63),
        ("e4m3", 448 * 2.0**-62, 2.0**-62),
        ("e4m3:channel", 448 * 2.0**-70, 2.0**-70),
        ("int8", 127 * 2.0**-70, 2.0**-70),
    ],
)
def test_the_least_scale_of_a_whole_float8_array(text, amax, scale):
    """Two of them are multiplied, and the product is to be a normal number."""
    found = _operands.prepared(jnp.full((1, 2), amax, jnp.float32), parse_spec(text), (0, 1), None)
    np.testing.assert_array_equal(np.ravel(found.scale), scale)


FIXED = {
    "int8": ("int8:amax2", [1.0, 3.0], 2.0),
    "int8, not finite": ("int8:amax2", [1.0, np.inf], np.nan),
    "float8": ("e4m3:amax2", [1.0, 3.0], 2.0),
    "float8, not finite": ("e4m3:amax2", [1.0, np.nan], 2.0),
}


@pytest.mark.parametrize("case", FIXED)
def test_a_fixed_magnitude_hides_nothing(case):
    """Integers cannot show what is not finite."""
    text, x, expected = FIXED[case]
    np.testing.assert_array_equal(_operands._amax(jnp.float32(x), parse_spec(text), (0,), None), np.float32(expected))


# --- Fake quantization ----------------------------------------------------------------------------

SCALES = {(): True, (1, 4): True, (8, 1): True, (8, 4): True, (1, 1): True}
NO_SCALES = {(4,): False, (2, 4): False, (8, 2): False, (1, 8, 4): False, (4, 8): False}


@pytest.mark.parametrize("shape", SCALES | NO_SCALES, ids=str)
def test_which_scales_fit_an_array(shape):
    call = functools.partial(jax.eval_shape, quant.fake_quant, np.ones((8, 4), np.float32), np.ones(shape, np.float32))
    if (SCALES | NO_SCALES)[shape]:
        assert call().shape == (8, 4)
        return
    message = f"size 1 along shared axes: got float32{list(shape)} for an array [8, 4]."
    with pytest.raises(errors.InvalidRecipeError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(("shape", "of_scale"), [((0, 4), ()), ((0, 4), (1, 4)), ((0, 4), (0, 1))], ids=str)
def test_arrays_without_elements_have_gradients(shape, of_scale):
    """Of the scale zero: nothing was rounded."""
    x, scale = jnp.zeros(shape), jnp.ones(of_scale)
    of_x, of_s = jax.grad(lambda x, s: jnp.sum(quant.fake_quant(x, s)), (0, 1))(x, scale)
    assert (of_x.shape, of_s.shape) == (shape, of_scale)
    assert not np.any(of_s)


def test_gradients_of_a_scale_are_added_up_over_devices():
    """Under the checks of `shard_map`, an array varies over devices and its scale does not."""
    x, scale = np.linspace(-80, 90, 4 * DEVICES, dtype=np.float32), jnp.float32(0.5)

    def total(x, scale):
        return jnp.sum(quant.fake_quant(x, scale)[None])

    def each(x, scale):
        return jax.lax.psum(total(x, scale), "batch")

    mapped = jax.shard_map(each, mesh=mesh(), in_specs=(P("batch"), P()), out_specs=P())
    found = jax.jit(jax.grad(lambda s: mapped(x, s)))(scale)
    # Each device divides by the root of its own number of elements.
    np.testing.assert_allclose(found, jax.grad(total, 1)(x, scale) * np.sqrt(DEVICES), rtol=1e-5)


# --- Arrays ---------------------------------------------------------------------------------------

HELD = quant.quantize_array(jnp.asarray(np.arange(12.0, dtype=np.float32).reshape(4, 3) + 1), axes=[0])


@pytest.mark.parametrize("name", _array._OPERATORS)
def test_operators_are_those_of_the_array_it_stands_for(name):
    full = HELD.dequantize()
    others = {"getitem": (1,), "matmul": (full.T,), "rmatmul": (full.T,)}.get(name, (2.0,))
    others = () if name in ("iter", "neg", "pos", "abs") else others
    found, expected = (getattr(array, f"__{name}__")(*others) for array in (HELD, full))
    found, expected = (list(found), list(expected)) if name == "iter" else (found, expected)
    assert jax.tree.map(raw, found) == jax.tree.map(raw, expected)


@pytest.mark.parametrize("name", sorted(_array._OF_ARRAYS))
def test_attributes_are_those_of_the_array_it_stands_for(name):
    found, expected = (getattr(array, name) for array in (HELD, HELD.dequantize()))
    assert type(found) is type(expected)


def test_it_becomes_an_array_of_any_dtype():
    full = HELD.dequantize()
    assert raw(np.asarray(HELD)) == raw(np.asarray(full))
    assert raw(np.asarray(HELD, np.float64)) == raw(np.asarray(full, np.float64))
    assert raw(np.array(HELD, copy=True)) == raw(np.asarray(full))
    assert raw(HELD.astype("bfloat16")) == raw(full.astype("bfloat16"))
    half = dataclasses.replace(HELD, dtype="bfloat16")
    assert half.dtype == jnp.bfloat16
    assert raw(half.dequantize()) == raw(full.astype("bfloat16"))
    assert raw(half.dequantize(jnp.float32)) == raw(full)
    assert (HELD.shape, HELD.ndim, HELD.size, HELD.nbytes, len(HELD)) == ((4, 3), 2, 12, 24, 4)


SIZES = [("int4", (3,), 2), ("uint4", (3, 3), 5), ("float4_e2m1fn", (2,), 1), ("int8", (3,), 3), ("float32", (3,), 12)]


@pytest.mark.parametrize(("dtype", "shape", "size"), [*SIZES, ("int4", (0,), 0), ("float64", (), 8)])
def test_bytes_of_arrays_and_of_shapes(dtype, shape, size):
    """Two numbers of 4 bits in a byte."""
    assert quant.nbytes({"a": jax.ShapeDtypeStruct(shape, dtype), "b": 3}) == {"a": size, "b": None}


PATHS = {
    "dense/kernel": True,
    "kernel": True,
    "": True,
    "bias": False,
    "dense/Bias": False,
    "dense/b": False,
    "norm/scale": False,
    "norm/OFFSET": False,
    "bias/kernel": True,
    "scale_kernel": True,
    "Embed_0/table": False,
    "posEMBEDding": False,
}


@pytest.mark.parametrize("path", PATHS)
def test_which_paths_are_those_of_kernels(path):
    assert _array._is_kernel(path, W) == PATHS[path]
    assert not _array._is_kernel(path, W[0])
    assert not _array._is_kernel(path, W.astype(int))
    assert not _array._is_kernel(path, "text")
    assert _array._is_kernel(path, HELD) == PATHS[path]
    assert [_array.kernels_of(axes)(path, W) for axes in (None, (0,), ())] == [False, PATHS[path], PATHS[path]]


@pytest.mark.parametrize(("ndim", "axes"), [(1, ()), (2, (0,)), (3, (1,)), (4, (1, 2)), (5, (1, 2, 3))])
def test_which_axes_share_a_scale_by_default(ndim, axes):
    assert _array._inner("kernel", np.ones((2,) * ndim)) == axes


SHARED = {
    "all": (None, (0, 1, 2)),
    "none": ([], ()),
    "from the end": ([-1, 0], (2, 0)),
    "of NumPy": (np.array([1, 2]), (1, 2)),
    "too large": ([3], None),
    "too small": ([-4], None),
    "twice": ([1, 1], None),
    "twice, from both ends": ([0, -3], None),
    "a number": (1, None),
    "floats": ([0.0], None),
    "texts": (["0"], None),
}


@pytest.mark.parametrize("case", SHARED)
def test_axes_are_numbers_of_axes(case):
    axes, expected = SHARED[case]
    if expected is not None:
        assert _array._shared_axes(axes, 3, "x") == expected
        return
    with pytest.raises(errors.InvalidRecipeError, match=f"^axes={re.escape(repr(axes))} of x with 3 axes must be"):
        _array._shared_axes(axes, 3, "x")


AXES = {
    "a list": ([0], {"a": (1, 3), "c": (1, 3)}),
    "numbers of NumPy": ([np.int64(0)], {"a": (1, 3), "c": (1, 3)}),
    "nothing": ([], {"a": (4, 3), "c": (4, 3)}),
    "None": (None, {"a": (1, 1), "c": (1, 1)}),
    "a function": (lambda path, leaf: [0] if path == "a" else None, {"a": (1, 3), "c": (1, 1)}),
    "a tree": ({"a": (1,), "c": None}, {"a": (4, 1), "c": None}),
    "a tree of nothing": ({"a": (), "c": (0, 1)}, {"a": (4, 3), "c": (1, 1)}),
}


@pytest.mark.parametrize("case", AXES)
def test_axes_of_a_tree(case):
    axes, expected = AXES[case]
    held = quant.quantize_tree({"a": W, "c": W}, axes=axes)
    assert {name: node.scale.shape if node is not W else None for name, node in held.items()} == expected


def test_a_spec_of_one_scale_takes_the_axes_that_are_given():
    assert quant.quantize_tree(W, "int8:tensor").scale.shape == (1, 1)
    assert quant.quantize_tree(W, "int8:tensor", axes=[0]).scale.shape == (1, 3)
    assert quant.quantize_tree(W, "int8").scale.shape == (1, 3)


def test_a_tree_of_which_nothing_is_chosen():
    """An empty one, and one without parameters, hold nothing to choose."""
    assert quant.quantize_tree({}) == {}
    with pytest.raises(errors.InvalidRecipeError, match=r"^Nothing of a, b, c and 1 more is quantized"):
        quant.quantize_tree(dict.fromkeys("abcd", W[0]))
    with pytest.raises(errors.InvalidRecipeError, match=r"^Nothing of the array is quantized"):
        quant.quantize_tree(W[0])


SPECS = {
    "a format": ("e5m2", "e5m2:channel"),
    "a text": ("e5m2:pow2", "e5m2:pow2"),
    "a spec": (QuantSpec("int4", tile=8), "int4:tile8"),
    "a recipe": (quant.W8A8_STATIC, "int8:channel"),
    "a recipe of the left alone": (DotRecipe("e5m2:pow2", None), "e5m2:pow2"),
}


@pytest.mark.parametrize("case", SPECS)
def test_what_stands_for_the_spec_of_an_array(case):
    given, text = SPECS[case]
    assert str(_array._checked_spec(given)) == text


@pytest.mark.parametrize("given", ["int8:channel:stochastic", DotRecipe("int8", "int8:stochastic")], ids=str)
def test_arrays_are_not_rounded_at_random(given):
    with pytest.raises(errors.InvalidRecipeError, match="held rounded to nearest, got int8:"):
        quant.quantize_array(W, given)


STATES = {
    "the same": ({"values": HELD.values, "scale": HELD.scale}, True),
    "other numbers": ({"values": HELD.values.astype(jnp.float8_e5m2), "scale": HELD.scale}, False),
    "values alone": ({"values": HELD.values}, False),
    "more": ({"values": HELD.values, "scale": HELD.scale, "zero": 0}, False),
    "an array": (HELD.values, False),
}


@pytest.mark.parametrize("case", STATES)
def test_what_is_restored_into_a_quantized_array(case):
    state, fits = STATES[case]
    if fits:
        assert_identical(_array._from_state_dict(HELD, state), HELD)
        assert _array._state_dict(HELD) == state
        return
    with pytest.raises(errors.InvalidRecipeError, match=r"^The template has QuantizedArray\(int8.*was saved\. Quant"):
        _array._from_state_dict(HELD, state)
