"""Arrays held in 8 bits: what they are worth, which leaves are held so, and that nothing happens to them on the way."""

import dataclasses
import functools

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from support.comparisons import assert_close, assert_identical, raw
from support.lowbit import normal, relative

import jmp_lite as jmp
from jmp_lite import quant
from jmp_lite.quant._array import QuantizedArray, dequantize_tree, is_quantized, quantize_array, quantize_tree

FORMATS = ["int8", "e4m3", "e5m2"]
DTYPES = {"int8": jnp.int8, "e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
#: Relative root mean square error of normal deviates. Uniform rounding to steps of amax/127 gives amax/127/sqrt(12);
#: m bits of mantissa give at most 2**-(m+1)/sqrt(3) times the number.
ERRORS = {"int8": 0.013, "e4m3": 0.03, "e5m2": 0.06}


def stacked(path, leaf):
    """A scale per layer and output channel."""
    return range(1, leaf.ndim - 1)


# --- One array ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_keeps_shape_dtype_and_digits(rng, name, dtype):
    """What comes back is the array, rounded to the format."""
    x = normal(rng, 256, 32, dtype=dtype)
    q = quantize_array(x, name, axes=[0])
    assert (q.shape, q.ndim, q.size, q.dtype) == (x.shape, 2, x.size, x.dtype)
    assert (q.values.dtype, q.scale.dtype, q.scale.shape) == (DTYPES[name], jnp.float32, (1, 32))
    assert q.nbytes == x.size + 4 * 32
    back = q.dequantize()
    assert (back.shape, back.dtype) == (x.shape, x.dtype)
    half_an_ulp = float(jnp.finfo(dtype).eps) / 2 if dtype != "float32" else 0.0
    assert relative(back, x) < ERRORS[name] + half_an_ulp
    assert q.dequantize("float32").dtype == q.astype(jnp.float32).dtype == jnp.float32


def test_int8_errs_by_half_a_step(rng):
    """No element is off by more than half of amax/127."""
    x = normal(rng, 64, 64)
    error = jnp.abs(quantize_array(x).dequantize() - x).max() / jnp.abs(x).max()
    assert error <= 0.5 / 127 * (1 + 1e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("axes", [None, (0,), (1,), (0, 1), ()])
def test_quantizing_again_finds_the_same_numbers(rng, name, axes):
    """Values are found again to the bit, scales up to the rounding of two matmuls in float32."""
    once = quantize_array(normal(rng, 24, 16), name, axes)
    again = quantize_array(once.dequantize(), name, axes)
    assert_identical(again.values, once.values)
    np.testing.assert_allclose(again.scale, once.scale, rtol=2**-22)


@pytest.mark.parametrize(
    ("shape", "axes", "scale"),
    [
        ((4, 3), None, (1, 1)),
        ((4, 3), [0], (1, 3)),
        ((4, 3), [-2], (1, 3)),
        ((4, 3), range(1, 2), (4, 1)),
        ((3, 3, 4, 5), (0, 1, 2), (1, 1, 1, 5)),
        ((6, 4, 5), [1], (6, 1, 5)),
        ((), None, ()),
        ((0, 3), [0], (1, 3)),
    ],
)
def test_axes_share_a_scale(rng, shape, axes, scale):
    """The scale has size 1 along the axes that share one."""
    q = jax.eval_shape(functools.partial(quantize_array, axes=axes), normal(rng, *shape))
    assert q.scale.shape == scale


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_stays_so(rng, name, value):
    """A channel that holds an infinity or NaN is not finite afterwards; the others are what they were."""
    x = normal(rng, 8, 4)
    bad = quantize_array(x.at[3, 2].set(value), name, [0]).dequantize()
    assert not np.isfinite(bad[:, 2]).all()
    good = quantize_array(x, name, [0]).dequantize()
    assert_identical(np.delete(bad, 2, axis=1), np.delete(good, 2, axis=1))


@pytest.mark.parametrize("spec", ["int8", "e4m3", quant.QuantSpec("int4", tile=2**15)], ids=str)
def test_a_large_array_hides_no_nan(spec):
    """XLA on CPU loses NaN in a maximum of that many."""
    quantize = jax.jit(lambda x: quantize_array(x, spec).dequantize())
    assert not np.isfinite(quantize(jnp.ones(2**15).at[77].set(np.nan))).all()


# --- As a pytree ----------------------------------------------------------------------------------


def test_children_have_names(rng):
    """Paths say which part an array is; the dtype belongs to the structure."""
    q = quantize_array(normal(rng, 4, 3), axes=[0])
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path({"w": q})]
    assert paths == ["w/values", "w/scale"]
    other = dataclasses.replace(q, dtype=jnp.bfloat16)
    assert jax.tree.structure(q) != jax.tree.structure(other)


def test_tree_map_and_unflatten_take_anything(rng):
    """Specs, shapes and None stand in the places of arrays."""
    q = quantize_array(normal(rng, 4, 3), axes=[0])
    specs = jax.tree.map(lambda leaf: jax.P(*[None] * leaf.ndim), q)
    assert (specs.values, specs.scale) == (jax.P(None, None), jax.P(None, None))
    assert jax.tree.map(lambda _: None, q).values is None
    assert repr(specs) == f"QuantizedArray({specs.values!r}, scale={specs.scale!r}, dtype=float32)"
    abstract = jax.eval_shape(lambda x: quantize_array(x, axes=[0]), jnp.zeros((4, 3)))
    assert (abstract.shape, abstract.values.dtype, abstract.scale.shape) == ((4, 3), jnp.int8, (1, 3))


def test_jit_takes_and_returns_it(rng):
    """Inside of jit it is what it is outside."""
    x = normal(rng, 8, 4)
    assert_identical(jax.jit(quantize_array, static_argnums=(1, 2))(x, "int8", (0,)), quantize_array(x, "int8", (0,)))
    q = quantize_array(x, axes=[0])
    assert_identical(jax.jit(lambda q: q.dequantize())(q), q.dequantize())


def test_scan_and_vmap_split_a_leading_axis(rng):
    """Stacked kernels need a scale per layer; each slice is then what the layer's kernel is alone."""
    kernels, x = normal(rng, 5, 8, 8), normal(rng, 3, 8)
    q = quantize_tree({"layers": kernels}, axes=stacked)["layers"]
    assert q.scale.shape == (5, 1, 8)
    expected = x
    for kernel in kernels:
        expected = jnp.tanh(expected @ quantize_array(kernel, axes=[0]).dequantize())

    def layer(carry, kernel):
        assert is_quantized(kernel)
        assert (kernel.shape, kernel.scale.shape) == ((8, 8), (1, 8))
        return jnp.tanh(carry @ kernel), None

    assert_close(jax.lax.scan(layer, x, q)[0], expected, ulps=16)
    each = jax.vmap(lambda x, kernel: x @ kernel, in_axes=(None, 0))(x, q)
    assert_close(each, jnp.einsum("bi,lij->lbj", x, q.dequantize()), ulps=16)


def test_sharded_like_any_array(rng):
    """Values and scales are placed each by its own spec, and multiply where they are."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, w = normal(rng, 8, 16), quantize_array(normal(rng, 16, 32), axes=[0])
    specs = dataclasses.replace(w, values=jax.P("a", "b"), scale=jax.P(None, "b"))
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)
    placed = jax.device_put(w, shardings)
    assert placed.values.sharding.shard_shape(placed.shape) == (8, 8)
    assert placed.scale.sharding.shard_shape((1, 32)) == (1, 8)
    assert_close(jax.jit(lambda x, w: x @ w)(x, placed), x @ w.dequantize(), ulps=16)


def test_stands_for_the_array_it_is(rng):
    """Functions of JAX and NumPy, matmuls and indices take the array it stands for."""
    q, x = quantize_array(normal(rng, 4, 3), axes=[0]), normal(rng, 2, 4)
    full = q.dequantize()
    pairs = [
        (x @ q, x @ full),
        (q * full, full * full),
        (jnp.max(q), jnp.max(full)),
        (jnp.einsum("ab,bc", x, q), jnp.einsum("ab,bc", x, full)),
        (jnp.asarray(q, jnp.bfloat16), full.astype(jnp.bfloat16)),
        (q[...], full),
        (q[1:, 0], full[1:, 0]),
        (list(q)[3], full[3]),
        (np.asarray(q), np.asarray(full)),
    ]
    for actual, expected in pairs:
        assert_identical(actual, expected)
    assert len(q) == 4


#: What model code does with a kernel by way of attributes.
METHODS = {
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "reshape": lambda w: w.reshape(8, 16),
    "transpose": lambda w: w.transpose(1, 0),
    "swapaxes": lambda w: w.swapaxes(0, 1),
    "ravel": lambda w: w.ravel(),
    "sum": lambda w: w.sum(0),
    "at": lambda w: w.at[0].set(1.0),
    "neg": lambda w: -w,
    "times a number": lambda w: 2 * w / 3 + 1 - w**2,
    "of NumPy": lambda w: np.ones((2, 16), np.float32) @ w,
    "compared": lambda w: (w == 0.0) | (w > 1.0) | (w != 0.5),
    "dot": lambda w: w.clip(-1, 1).dot(jnp.ones(8)),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_those_of_the_array_it_stands_for(method, rng):
    w = quantize_array(normal(rng, 16, 8), axes=[0])
    assert_identical(METHODS[method](w), METHODS[method](w.dequantize()))


@pytest.mark.parametrize(
    "given",
    ["int8", "int8:channel", quant.QuantSpec("int8", "channel"), quant.W8A16, quant.DotRecipe("int8:channel", None)],
    ids=str,
)
def test_a_format_is_a_name_a_spec_its_text_or_that_of_a_recipe(given, rng):
    w = normal(rng, 16, 8)
    assert_identical(quantize_array(w, given, axes=[0]), quantize_array(w, axes=[0]))


@pytest.mark.parametrize("name", ["int8", "e4m3"])
def test_a_fixed_magnitude_is_the_one_that_is_used(name):
    """Larger numbers saturate in int8 and are NaN in float8, and NaN stays visible in both, as in matmuls."""
    spec = quant.QuantSpec(name, amax=2.0)
    q = quantize_array(jnp.array([2.0, 1.0, 8.0]), spec)
    assert_identical(
        np.asarray(q), np.array([2.0, np.round(63.5) / 63.5, 2.0] if name == "int8" else [2.0, 1.0, np.nan], np.float32)
    )
    assert jnp.isnan(quantize_array(jnp.array([1.0, jnp.nan]), spec).dequantize()).any()


def test_other_attributes_name_the_remedy(rng):
    w = quantize_array(normal(rng, 16, 8))
    assert not hasattr(w, "aval")
    with pytest.raises(AttributeError, match=r"'devices' is not an attribute of a QuantizedArray.*dequantize_tree"):
        w.devices()


@pytest.mark.parametrize(("spec", "values"), [("int8", 128), ("e4m3", 128), (quant.QuantSpec("int4", tile=8), 64)])
def test_bytes_are_those_of_numbers_and_scales(spec, values, rng):
    tree = {"kernel": normal(rng, 16, 8), "bias": jnp.zeros(8), "rate": 0.1, "name": None}
    scales = 4 * 8 * (2 if values == 64 else 1)
    assert quant.nbytes(quantize_tree(tree, spec)) == {
        "kernel": values + scales,
        "bias": 32,
        "rate": None,
        "name": None,
    }


@pytest.mark.parametrize("policy", ["bf16", "f16", "p=f32,c=e4m3,o=e5m2", jmp.PolicyMap({"w": "bf16"}, "f16")])
def test_policies_leave_it_alone(rng, policy):
    """A cast touches neither values nor scales, whatever the policy names."""
    policy = jmp.get_policy(policy)
    for name in FORMATS:
        params = {"w": quantize_array(normal(rng, 4, 3), name)}
        for cast in (policy.cast_to_param, policy.cast_to_compute, policy.cast_to_output, jmp.cast_to_half):
            assert_identical(cast(params), params)


# --- Trees ----------------------------------------------------------------------------------------


def test_biases_of_attention_are_no_kernels(rng, key):
    """They have two axes, as kernels have."""
    params = nn.MultiHeadDotProductAttention(4).init(key, normal(rng, 2, 8, 16))
    query = quantize_tree(params)["params"]["query"]
    assert not is_quantized(query["bias"])
    assert is_quantized(query["kernel"])


def test_default_choice_is_kernels(rng):
    """Neither biases, scales and tables nor integers; everything else of two axes, by the last."""
    params = {
        "Dense_0": {"kernel": normal(rng, 4, 3), "bias": normal(rng, 3)},
        "Conv_0": {"kernel": normal(rng, 3, 3, 4, 5)},
        "LayerNorm_0": {"scale": normal(rng, 3)},
        "Embed_0": {"embedding": normal(rng, 9, 4)},
        "posEmbed": normal(rng, 9, 4),
        "steps": jnp.zeros((2, 2), jnp.int32),
        "name": "model",
        "none": None,
    }
    quantized = quantize_tree(params)
    nodes = jax.tree.leaves_with_path(quantized, is_leaf=is_quantized)
    chosen = {
        jax.tree_util.keystr(path, simple=True, separator="/"): node for path, node in nodes if is_quantized(node)
    }
    assert {path: node.scale.shape for path, node in chosen.items()} == {
        "Dense_0/kernel": (1, 3),
        "Conv_0/kernel": (3, 1, 1, 5),
    }
    assert quantized["Embed_0"]["embedding"] is params["Embed_0"]["embedding"]
    assert quantized["name"] == "model"


def test_experts_and_layers_have_their_own_scales(rng):
    """The first axis of a stack shares nothing."""
    assert quantize_tree(normal(rng, 5, 8, 3)).scale.shape == (5, 1, 3)


def test_choice_and_axes_by_path(rng):
    """Both may depend on path and leaf; a format may be a spec of a recipe."""
    params = {"embed": normal(rng, 9, 4), "head": normal(rng, 4, 3), "body": normal(rng, 4, 4)}
    tree = quantize_tree(params, where=lambda path, _: path == "embed", axes=[1])
    assert tree["embed"].scale.shape == (9, 1)
    assert tree["head"] is params["head"]
    tree = quantize_tree(tree, "e4m3", where=lambda path, _: path != "embed", axes=lambda path, leaf: [0])
    assert [tree[name].values.dtype.name for name in ("embed", "head")] == ["int8", "float8_e4m3fn"]
    by_tensor = quantize_tree(params, quant.FP8.rhs)["head"]
    assert by_tensor.scale.shape == (1, 1)
    assert np.frexp(np.asarray(by_tensor.scale))[0].item() == 0.5
    wide = quantize_tree(params, quant.QuantSpec("int8", "channel", margin=1))["head"]
    assert_identical(wide.scale, 2 * quantize_tree(params)["head"].scale)


@pytest.mark.parametrize(
    "kind", [FrozenDict, lambda tree: nnx.State({k: nnx.Param(v) for k, v in tree.items()}), tuple, lambda tree: [tree]]
)
def test_containers_stay(rng, kind):
    """Trees of any kind keep their structure, and come back as they were."""
    params = kind({"kernel": normal(rng, 8, 4), "bias": normal(rng, 4)})
    params = (normal(rng, 8, 4), normal(rng, 4)) if kind is tuple else params
    quantized = quantize_tree(params)
    assert any(map(is_quantized, jax.tree.leaves(quantized, is_leaf=is_quantized)))
    back = dequantize_tree(quantized)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for again, once in zip(jax.tree.leaves(quantize_tree(back)), jax.tree.leaves(quantized), strict=True):
        np.testing.assert_allclose(again, once, rtol=2**-22)
    halves = dequantize_tree(quantized, jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(halves) if leaf.ndim == 2} == {"bfloat16"}


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (lambda w: quantize_tree(quantize_tree({"a": w})), r"Leaf 'a' is quantized already: QuantizedArray\(int8"),
        (lambda w: quantize_array(quantize_array(w)), "x is quantized already"),
        (
            lambda w: quantize_tree({"a": {"n": jnp.ones((2, 2), jnp.int32)}}, where=lambda *_: True),
            r"Leaf 'a/n' is int32\[2, 2\]; only floating",
        ),
        (lambda w: quantize_tree({"s": "text"}, where=lambda *_: True), "Leaf 's' is 'text'; only floating"),
        (lambda w: quantize_tree({"a": w}, jnp.int4), "int4"),
        (lambda w: quantize_array(w, "float32"), "'float32'"),
        (lambda w: quantize_array(w, axes=[2]), r"axes=\[2\] of x with 2 axes"),
        (lambda w: quantize_array(w, axes=[0, -2]), r"axes=\[0, -2\]"),
        (lambda w: quantize_array(w, axes=1), "axes=1 of x"),
        (lambda w: quantize_tree({"a": w}, axes=[5]), "Leaf 'a' with 2 axes"),
        (lambda w: quantize_tree({"a": w}, "e4m3:tiles"), "'tiles' in 'e4m3:tiles' is not known"),
        (
            lambda w: quantize_tree({"a": w}, quant.QuantSpec("e4m3", tile=3)),
            r"Leaf 'a' is float32\[4, 3\]: tiles of 3 do not",
        ),
    ],
)
def test_refusals_name_the_leaf(rng, fail, message):
    """What cannot be quantized is named by its path, with what was asked of it."""
    with pytest.raises(jmp.errors.InvalidRecipeError, match=message):
        fail(normal(rng, 4, 3))


# --- On disk --------------------------------------------------------------------------------------


def tree_of(rng, name):
    """A state with a quantized leaf among others."""
    return {"w": quantize_tree({"kernel": normal(rng, 16, 8), "bias": normal(rng, 8)}, name), "step": jnp.int32(3)}


@pytest.mark.parametrize("name", FORMATS)
def test_flax_serializes_it(rng, name):
    """Bytes and state dicts come back bit for bit, with the template's dtype."""
    state, template = tree_of(rng, name), tree_of(rng, name)
    restored = flax.serialization.from_bytes(template, flax.serialization.to_bytes(state))
    assert_identical(jax.tree.map(jnp.asarray, restored), state)
    fields = flax.serialization.to_state_dict(state)["w"]["kernel"]
    assert list(fields) == ["values", "scale"]
    frozen = FrozenDict(state)
    assert_identical(flax.serialization.from_state_dict(frozen, flax.serialization.to_state_dict(frozen)), frozen)


def test_flax_refuses_what_was_quantized_otherwise(rng):
    """Another format, or no quantization at all, is not taken for this one."""
    state = flax.serialization.to_state_dict(quantize_array(normal(rng, 4, 3)))
    with pytest.raises(
        jmp.errors.InvalidRecipeError, match=r"QuantizedArray\(float8_e4m3fn\[4, 3\].* but int8\[4, 3\] was saved"
    ):
        flax.serialization.from_state_dict(quantize_array(normal(rng, 4, 3), "e4m3"), state)
    with pytest.raises(jmp.errors.InvalidRecipeError, match=r"but float32\[4, 3\] was saved"):
        flax.serialization.from_state_dict(quantize_array(normal(rng, 4, 3)), normal(rng, 4, 3))


@pytest.mark.parametrize("name", FORMATS)
def test_checkpoints_hold_it(rng, name, tmp_path):
    """Bytes, directories and managed directories give back every bit of every format."""
    state, template = tree_of(rng, name), tree_of(rng, name)
    data = jmp.checkpoint.to_bytes(state, policy="mixed_bfloat16")
    assert_identical(jmp.checkpoint.from_bytes(template, data, policy="mixed_bfloat16"), state)
    jmp.checkpoint.save(tmp_path / "one", state, policy="mixed_bfloat16")
    assert_identical(jmp.checkpoint.restore(tmp_path / "one", template, policy="mixed_bfloat16"), state)
    with jmp.checkpoint.CheckpointManager(tmp_path / "many", policy="mixed_bfloat16") as manager:
        manager.save(7, state)
        manager.wait()
        assert_identical(manager.restore(template), (7, state))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_every_float8_survives(name, tmp_path):
    """All 256 bit patterns, NaN payloads and signed zeros among them; a changed bit changes the digest."""
    dtype = DTYPES[name]
    values = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8).reshape(16, 16), dtype)
    state = {"w": QuantizedArray(values, jnp.ones((1, 16)))}
    blank = jax.tree.map(jnp.zeros_like, state)
    jmp.checkpoint.save(tmp_path / "one", state, policy="full")
    assert raw(jmp.checkpoint.restore(tmp_path / "one", blank, policy="full")["w"].values) == raw(values)
    assert np.asarray(values).view(np.uint8).tolist() == np.arange(256).reshape(16, 16).tolist()
    assert np.dtype(dtype) == np.dtype(getattr(ml_dtypes, np.dtype(dtype).name))
