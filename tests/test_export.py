"""Frozen models: the same bits in another process, and not a bit other than those that were written."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import textwrap

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import linen as nn
from flax import nnx, struct
from support import assert_close, assert_identical, raw

import jmp_lite as jmp
from jmp_lite import export, quant
from jmp_lite.export import _file
from jmp_lite.quant._array import dequantize_tree, is_quantized, quantize_tree

FREE = jax.export.symbolic_shape("batch, 32")

#: What a model may be frozen under: policy and recipe.
PRECISIONS = {
    "float32": (None, None),
    "bf16": ("mixed_bfloat16", None),
    "f16": ("mixed_float16", None),
    "W8A16": ("mixed_bfloat16", "w8a16"),
    "W8 in float32": (None, "w8a16"),
    "W8A8": ("mixed_bfloat16", "w8a8"),
    "W8A8 in float32": (None, "w8a8"),
    "W8A8 static": ("mixed_bfloat16", "w8a8_static"),
    "fp8": ("mixed_bfloat16", "fp8"),
    "fp8 by row": ("mixed_float16", "fp8_rowwise"),
}


class MLP(nn.Module):
    """Two layers and a softmax, of which autocast does something different each."""

    @nn.compact
    def __call__(self, x):
        return nn.softmax(nn.Dense(8)(nn.LayerNorm()(nn.relu(nn.Dense(64)(x)))))


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def histories_of(policy, recipe, params, x):
    """Calibration with the very data, for recipes that need it."""
    if recipe is None or not quant.get_recipe(recipe).history:
        return None
    return quant.calibrate(
        quant.delayed(jmp.autocast(MLP().apply, policy, dot=quant.get_recipe(recipe))), [(params, x)]
    )


def training_function(policy, recipe, histories):
    """What the training program would call for inference: a jitted function of (quantised) parameters."""
    recipe = None if recipe is None else quant.get_recipe(recipe)
    dot = recipe if recipe is not None and recipe.lhs is not None else None
    fun = MLP().apply if policy is None and dot is None else jmp.autocast(MLP().apply, policy or "full", dot=dot)
    fun = fun if histories is None else functools.partial(quant.delayed(fun), histories)
    return jax.jit(lambda params, x: fun(dequantize_tree(params), x))


@pytest.fixture
def mlp(rng, key):
    """Parameters of the model, and inputs."""
    x = normal(rng, 5, 32)
    return MLP().init(key, x), x


# --- The same bits --------------------------------------------------------------------------------

SERVER = """
    import json, pickle, sys, _pickle

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("flax", "haiku", "equinox", "orbax", "test_export"):
                raise ImportError(name)

    sys.meta_path.insert(0, Absent())
    for module in (pickle, _pickle):
        module.load = module.loads = module.Unpickler = refuse

    import numpy as np
    from jmp_lite import export

    for path in sys.argv[2:]:
        x = np.load(sys.argv[1])
        served = export.load(path)
        np.save(path + ".npy", np.asarray(served(x)))
        free = not isinstance(served.in_avals[0].shape[0], int)
        np.save(path + ".one.npy", np.asarray(served(x[:1])) if free else np.zeros(0))
    assert not {"flax", "haiku", "equinox"} & set(sys.modules)
"""


def serve_elsewhere(tmp_path, x, paths):
    """Runs artefacts in a fresh process that has neither the model's code nor any framework nor pickle."""
    script = tmp_path / "server.py"
    script.write_text(textwrap.dedent(SERVER))
    np.save(tmp_path / "x.npy", x)
    subprocess.run([sys.executable, str(script), str(tmp_path / "x.npy"), *map(str, paths)], check=True, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("names", [list(PRECISIONS)], ids=len)
def test_another_process_computes_the_same_bits(mlp, names, tmp_path):
    """Every precision, with a fixed and a free batch: what the jitted function of the training process computes."""
    params, x = mlp
    expected = {}
    for number, (policy, recipe) in enumerate(PRECISIONS[name] for name in names):
        histories = histories_of(policy, recipe, params, x)
        held = params if recipe is None else quantize_tree(params, quant.get_recipe(recipe).rhs)
        fun = training_function(policy, recipe, histories)
        for kind, example in (("fixed", x), ("free", jax.ShapeDtypeStruct(FREE, jnp.float32))):
            path = str(tmp_path / f"{number}.{kind}.safetensors")
            export.freeze(MLP().apply, params, example, path=path, policy=policy, recipe=recipe, histories=histories)
            expected[path] = fun(held, x)
            assert_identical(export.load(path)(x), expected[path])
            if kind == "free":
                expected[f"{path}.one"] = fun(held, x[:1])
    serve_elsewhere(tmp_path, x, [path for path in expected if not path.endswith(".one")])
    for path, result in expected.items():
        assert raw(np.load(f"{path}.npy")) == raw(result), path


@pytest.mark.parametrize(
    "recipe", ["w8a8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp8", "fp8_rowwise"))]
)
def test_quantised_products_are_those_of_training(mlp, recipe, tmp_path):
    """The recipe finds the stored numbers again: what it computes from float32 kernels, up to a step of bfloat16."""
    params, x = mlp
    export.freeze(MLP().apply, params, x, path=tmp_path / "m", policy="mixed_bfloat16", recipe=recipe)
    trained = jax.jit(jmp.autocast(MLP().apply, "mixed_bfloat16", dot=quant.get_recipe(recipe)))(params, x)
    np.testing.assert_allclose(export.load(tmp_path / "m")(x), trained, rtol=2**-5)


def test_freezing_twice_gives_the_same_file(mlp, tmp_path):
    """The digest is one of the model, not of when and where it was frozen: no names of source files are in it."""
    params, x = mlp
    one = export.freeze(MLP().apply, params, x, path=tmp_path / "one", policy="mixed_bfloat16", recipe="w8a8")
    two = export.freeze(lambda p, x: MLP().apply(p, x), params, x, path=tmp_path / "two", policy="bf16", recipe="w8a8")
    again = export.freeze(MLP().apply, params, x, path=tmp_path / "two", policy="mixed_bfloat16", recipe="w8a8")
    assert one == again != two
    data = (tmp_path / "one").read_bytes()
    assert data == (tmp_path / "two").read_bytes()
    assert not any(text in data for text in (b".py", b"test_export", str(pathlib.Path.home()).encode()))


# --- The file -------------------------------------------------------------------------------------


def test_weights_are_small_and_open(mlp, tmp_path):
    """Any reader of safetensors finds the weights under their paths; in int8 they take 3.5 times fewer bytes."""
    params, x = mlp
    export.freeze(MLP().apply, params, x, path=tmp_path / "wide")
    export.freeze(MLP().apply, params, x, path=tmp_path / "narrow", policy="mixed_bfloat16", recipe="w8a16")
    with safetensors.safe_open(tmp_path / "narrow", framework="np") as file:
        narrow = file.get_tensors()
    with safetensors.safe_open(tmp_path / "wide", framework="np") as file:
        wide = file.get_tensors()
    assert_identical(jnp.asarray(wide["params/Dense_0/kernel"]), params["params"]["Dense_0"]["kernel"])
    expected = quantize_tree(params)["params"]["Dense_1"]["kernel"]
    assert raw(narrow["params/Dense_1/kernel/values"]) == raw(expected.values)
    assert raw(narrow["params/Dense_1/kernel/scale"]) == raw(expected.scale)
    kernels = [sum(v.nbytes for k, v in file.items() if "kernel" in k) for file in (wide, narrow)]
    assert kernels[0] / kernels[1] > 3.5
    assert narrow["__program__"].dtype == np.uint8


DTYPES = [
    "bool",
    "int8",
    "uint16",
    "int32",
    "float16",
    "bfloat16",
    "float32",
    "float8_e4m3fn",
    "float8_e5m2",
    "complex64",
]


def test_weights_of_every_dtype(tmp_path):
    """Every bit comes back, those of float8 and NaN too; scalars and empty arrays as well."""
    params = {
        name: jnp.asarray(
            np.arange(256, dtype=np.uint8).view(np.uint8).astype(bool)
            if name == "bool"
            else np.arange(256, dtype=np.uint8).view(jnp.dtype(name))
        )
        for name in DTYPES
    }
    params |= {"scalar": jnp.float32(1.5), "empty": jnp.zeros((0, 3)), "numpy": np.arange(3.0, dtype=np.float32)}
    export.freeze(lambda p, x: (x, p["scalar"]), params, jnp.ones(2), path=tmp_path / "m")
    served = export.load(tmp_path / "m")
    assert {name: raw(value) for name, value in served.params.items()} == {name: raw(v) for name, v in params.items()}


@pytest.fixture
def artefact(rng, tmp_path):
    """A small artefact with all there is in one."""
    path = tmp_path / "small"
    export.freeze(lambda w, x: x @ w, normal(rng, 4, 4), jnp.ones((2, 4)), path=path, policy="bf16", recipe="w8a16")
    return path


def test_no_byte_can_change(rng, artefact):
    """Header, metadata, weights, program, digest: a flip of any bit of any byte is refused, never served."""
    data = bytearray(artefact.read_bytes())
    for at in range(len(data)):
        flip = int(1 << rng.integers(8))
        data[at] ^= flip
        artefact.write_bytes(data)
        with pytest.raises(jmp.CorruptArtefactError):
            export.load(artefact)
        data[at] ^= flip
    artefact.write_bytes(data)
    export.load(artefact)


def test_no_byte_can_go_or_come(rng, artefact):
    """Truncated at any place, prolonged, or with a part swapped."""
    data = artefact.read_bytes()
    cuts = [data[:at] for at in rng.integers(len(data), size=200)]
    a, b = sorted(rng.integers(len(data) // 2, len(data), size=2))
    swapped = data[:a] + data[b:] + data[a:b]
    for bad in [*cuts, b"", data + b"\0", b"\0" + data, data * 2, *([swapped] if swapped != data else [])]:
        artefact.write_bytes(bad)
        with pytest.raises(jmp.CorruptArtefactError):
            export.load(artefact)


def test_foreign_files_are_refused(tmp_path):
    """A file of weights by another program, a pickle, a text."""
    path = tmp_path / "m"
    safetensors.numpy.save_file({"w": np.ones(2)}, path, {"format": "pt"})
    for data in (path.read_bytes(), b"\x80\x04N.", b"not a model" * 9):
        path.write_bytes(data)
        with pytest.raises(jmp.CorruptArtefactError, match=r"'.*m' is no artefact of jmp_lite.export"):
            export.load(path)
    with pytest.raises(FileNotFoundError):
        export.load(tmp_path / "none")


HEADER = {"jax": "0", "platforms": ["cpu"], "policy": None, "quantized": {}, "recipe": None}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": 2}, jmp.CorruptArtefactError, "has format 2, this version of jmp_lite reads 1"),
        ({"dtypes": {}}, jmp.CorruptArtefactError, "not written as artefacts are"),
        ({"dtypes": {"w": "float32"}}, jmp.CorruptArtefactError, "not written as artefacts are"),
        ({"platforms": ["mars"]}, jmp.PlatformMismatchError, "was frozen for mars, but this process runs on "),
    ],
)
def test_wrong_headers_with_right_digests(tmp_path, change, error, message):
    """Files that were made to look right are no reason to crash."""
    _file.write(tmp_path / "m", {"w": np.ones(2), "__program__": np.zeros(9, np.uint8)}, HEADER | change)
    with pytest.raises(error, match=message):
        export.load(tmp_path / "m")


def test_digest_pins_one_artefact(mlp, tmp_path):
    """Another one, however sound, is refused by both digests."""
    params, x = mlp
    digest = export.freeze(MLP().apply, params, x, path=tmp_path / "m")
    assert export.load(tmp_path / "m", digest=digest).digest == digest
    export.load(tmp_path / "m", digest=f"SHA256:{digest.upper()}")
    other = export.freeze(MLP().apply, jax.tree.map(lambda leaf: leaf + 1, params), x, path=tmp_path / "m")
    with pytest.raises(jmp.CorruptArtefactError, match=rf"digest='{digest}' was asked for, it has '{other}'"):
        export.load(tmp_path / "m", digest=digest)


def test_failed_freeze_leaves_the_old_file(mlp, tmp_path, monkeypatch):
    """Whoever serves from a path never meets half a file."""
    params, x = mlp
    digest = export.freeze(MLP().apply, params, x, path=tmp_path / "m")

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        export.freeze(MLP().apply, params, x, path=tmp_path / "m", policy="bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    export.load(tmp_path / "m", digest=digest)


# --- Precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frozen", "asked", "message"),
    [
        ({"policy": "bf16"}, {"policy": "f16"}, "with policy 'p=bf16,c=bf16,o=bf16', but is expected to have 'p=f16"),
        ({}, {"policy": "f16"}, "without a policy, but is expected to have 'p=f16,c=f16,o=f16'"),
        ({"recipe": "w8a16"}, {"recipe": "w8a8"}, "'lhs=none,rhs=int8:channel,grad=none', but is expected"),
        (
            {"policy": "bf16"},
            {"policy": "bf16", "recipe": "fp8"},
            "without a recipe, but is expected to have 'lhs=e4m3",
        ),
        (
            {"policy": jmp.PolicyMap({"a": "f16"}, "bf16")},
            {"policy": jmp.PolicyMap({"a": "f32"}, "bf16")},
            "a: p=f16",
        ),
    ],
)
def test_train_and_serve_agree(tmp_path, frozen, asked, message):
    """What is loaded under another policy or recipe is refused, with both quoted; under its own it is not."""
    export.freeze(jnp.dot, jnp.ones((2, 2)), jnp.ones((2, 2)), path=tmp_path / "m", **frozen)
    with pytest.raises(jmp.PolicyMismatchError, match=message):
        export.load(tmp_path / "m", **asked)
    served = export.load(tmp_path / "m", **frozen)
    assert served.policy == (str(jmp.get_policy(frozen["policy"])) if "policy" in frozen else None)


def test_own_choice_of_leaves_is_kept(mlp, tmp_path):
    """Parameters that are quantised in part are stored as they are, whatever the recipe."""
    params, x = mlp
    held = quantize_tree(params, "e5m2", where=lambda path, _: path.endswith("Dense_1/kernel"))
    export.freeze(MLP().apply, held, x, path=tmp_path / "m", policy="mixed_bfloat16", recipe="w8a16")
    served = export.load(tmp_path / "m")
    assert [name for name, leaf in served.params.items() if is_quantized(leaf)] == ["params/Dense_1/kernel"]
    assert_identical(served.params["params/Dense_1/kernel"], held["params"]["Dense_1"]["kernel"])
    assert_identical(served(x), training_function("mixed_bfloat16", "w8a16", None)(held, x))


def test_error_of_a_quantised_artefact(mlp, tmp_path):
    """W8A16 in float32 changes probabilities by less than one in a hundred."""
    params, x = mlp
    export.freeze(MLP().apply, params, x, path=tmp_path / "m", recipe="w8a16")
    served, expected = export.load(tmp_path / "m")(x), MLP().apply(params, x)
    assert jnp.linalg.norm(served - expected) < 0.012 * jnp.linalg.norm(expected)
    assert raw(served) != raw(expected)


@pytest.mark.slow
def test_platforms(mlp, tmp_path):
    """One program serves several; one that has no code for this one says which it has."""
    params, x = mlp
    everywhere = ("cpu", "cuda", "tpu")
    for policy, recipe in (PRECISIONS["bf16"], PRECISIONS["W8A8"], PRECISIONS["fp8"]):
        export.freeze(MLP().apply, params, x, path=tmp_path / "m", policy=policy, recipe=recipe, platforms=everywhere)
        served = export.load(tmp_path / "m")
        assert served.platforms == everywhere
        held = params if recipe is None else quantize_tree(params, quant.get_recipe(recipe).rhs)
        assert_identical(served(x), training_function(policy, recipe, None)(held, x))
    export.freeze(MLP().apply, params, x, path=tmp_path / "m", platforms="tpu")
    with pytest.raises(jmp.PlatformMismatchError, match=r"frozen for tpu, but .* platforms=\['tpu', '(cpu|cuda)'\]"):
        export.load(tmp_path / "m")


# --- Models of all kinds --------------------------------------------------------------------------


def frozen(path, apply, params, *args, **settings):
    export.freeze(apply, params, *args, path=path, **settings)
    return export.load(path)


@pytest.mark.slow
def test_frameworks(rng, key, seed, tmp_path):
    """Linen is above; NNX by split, Equinox by partition or whole, Haiku, a bare function with closures."""
    path, x = tmp_path / "m", normal(rng, 3, 16)
    recipe = {"recipe": "w8a16"}

    graph, state = nnx.split(nnx.Linear(16, 5, rngs=nnx.Rngs(seed % 2**31)))
    served = frozen(path, lambda state, x: nnx.merge(graph, state)(x), state, x, **recipe)
    assert is_quantized(served.params["kernel/value"])
    assert_close(served(x), nnx.merge(graph, quantize_tree(state))(x), ulps=16)

    model = eqx.nn.MLP(16, 5, 8, 2, key=key)
    arrays, static = eqx.partition(model, eqx.is_array)
    held = quantize_tree(arrays, axes=lambda path, leaf: range(1, leaf.ndim))
    served = frozen(path, lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x), held, x)
    assert served.params["layers/0/weight"].scale.shape == (8, 1)
    assert_close(served(x), jax.vmap(eqx.combine(dequantize_tree(held), static))(x), ulps=64)
    assert_close(frozen(path, lambda model, x: jax.vmap(model)(x), model, x)(x), jax.vmap(model)(x), ulps=64)

    net = hk.without_apply_rng(hk.transform(lambda x: jnp.tanh(hk.Linear(5)(x))))
    params = net.init(key, x)
    assert_close(frozen(path, net.apply, params, x, **recipe)(x), net.apply(quantize_tree(params), x), ulps=64)

    table = normal(rng, 16)
    served = frozen(path, lambda w, x: {"y": (x * table[None] + w, None), "n": 3}, 2.0, {"a": x}["a"])
    assert_close(served(x)["y"][0], x * table[None] + 2.0, ulps=4)
    assert served.params == {}


def test_trees_of_arguments(rng, tmp_path):
    """Dicts, tuples, None, integers and keys go in; the free size may be shared."""
    b = jax.export.symbolic_shape("b")[0]
    batch = {
        "x": jax.ShapeDtypeStruct((b, 4), jnp.bfloat16),
        "ids": (jax.ShapeDtypeStruct((b,), jnp.int32), None),
    }

    def apply(w, batch, key):
        noise = jax.random.normal(key, (4,), jnp.bfloat16)
        return (batch["x"] + noise[None]) @ w, batch["ids"][0] + 1

    w = normal(rng, 4, 3, dtype=jnp.bfloat16)
    served = frozen(tmp_path / "m", apply, w, batch, jax.random.key(0))
    given = {"x": normal(rng, 7, 4, dtype=jnp.bfloat16), "ids": (jnp.arange(7, dtype=jnp.int32), None)}
    assert_identical(served(given, jax.random.key(1)), jax.jit(apply)(w, given, jax.random.key(1)))
    assert str(served.in_avals[0]["x"].shape) == "(b, 4)"
    given["ids"] = (jnp.arange(6, dtype=jnp.int32), None)
    with pytest.raises(ValueError, match=r"args\[0\]\['(x|ids)'\]"):
        served(given, jax.random.key(1))


def test_served_describes_itself(mlp, tmp_path):
    """What there is to know is in the repr and in attributes; inside of jit it is a function like any other."""
    params, x = mlp
    served = frozen(
        tmp_path / "m", MLP().apply, params, jax.ShapeDtypeStruct(FREE, jnp.float32), policy="mixed_bfloat16"
    )
    assert repr(served) == (
        "Served((float32[batch,32]) -> float32[batch,8], policy='p=full,c=bf16,o=full', recipe=None, "
        f"platforms=['cpu'], {sum(leaf.nbytes for leaf in jax.tree.leaves(params))} bytes of weights)"
    )
    assert served.jax_version == jax.__version__
    assert_identical(jax.jit(served)(x), served(x))
    with pytest.raises(ValueError, match=r"args\[0\].shape\[1\].*expected \(batch, 32\) and called with \(5, 31\)"):
        served(x[:, 1:])
    with pytest.raises(dataclasses.FrozenInstanceError):
        served.policy = "bf16"


@struct.dataclass
class Own:
    """A container that no other program knows."""

    x: jax.Array


W = jnp.eye(2)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (lambda f: f(jnp.dot, {"k": jax.random.key(0)}, W), r"Leaf 'k' is key<fry>\[\], which no safetensors"),
        (lambda f: f(jnp.dot, {"a/b": W, "a": {"b": W}}, W), "Two things would be stored as 'a/b'"),
        (lambda f: f(jnp.dot, {"__program__": W}, W), "Two things would be stored as '__program__'"),
        (lambda f: f(lambda w, x: x, {"w": W.astype(jnp.int4)}, W), "int4"),
        (lambda f: f(lambda w, x: Own(x), W, W), "containers that only this program knows.*Own"),
        (lambda f: f(lambda w, own: own.x, W, Own(W)), "containers that only this program knows.*Own"),
        (lambda f: f(jnp.dot, W, W, platforms=["gpu"]), r"platforms=\['gpu'\]: 'gpu' is no platform. Accepted: cpu"),
        (lambda f: f(jnp.dot, W, W, platforms=[]), "nothing is no platform"),
        (lambda f: f(jnp.dot, W, W, recipe="w8a8_static", policy="bf16"), r"Pass histories=quant.calibrate"),
        (lambda f: f(jnp.dot, W, W, recipe="w8a8", policy="bf16", histories={}), "Leave them out"),
        (lambda f: f(jnp.dot, W, W, recipe="fp8_block128", policy="bf16"), "has scales for blocks"),
    ],
)
def test_refusals_say_what_to_do(tmp_path, freeze, message):
    """What cannot be frozen leaves no file."""
    with pytest.raises(jmp.InvalidExportError, match=message):
        freeze(functools.partial(export.freeze, path=tmp_path / "m"))
    assert not list(tmp_path.iterdir())


def test_float64_needs_to_be_enabled(tmp_path):
    """Weights that this process would round are not rounded."""
    with jax.enable_x64(True):
        export.freeze(jnp.dot, jnp.ones((2, 2), jnp.float64), jnp.ones((2, 2), jnp.float64), path=tmp_path / "m")
        assert export.load(tmp_path / "m")(jnp.ones((2, 2), jnp.float64)).dtype == jnp.float64
    with pytest.raises(jmp.PlatformMismatchError, match="needs float64 for 'params'"):
        export.load(tmp_path / "m")


LAYOUTS = {
    "Fortran": np.asfortranarray,
    "flipped": lambda w: w[:, ::-1],
    "transposed": lambda w: np.ascontiguousarray(w.T).T,
    "other bytes": lambda w: w.astype(w.dtype.newbyteorder(">")),
    "scattered": lambda w: np.repeat(w, 2, axis=1)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_may_lie_in_memory_as_they_like(layout, rng, tmp_path):
    """What is stored are the numbers of an array, not its buffer."""
    w, x = rng.standard_normal((16, 8), np.float32), normal(rng, 4, 16)
    export.freeze(lambda w, x: x @ w, LAYOUTS[layout](w), x, path=tmp_path / "m")
    expected = LAYOUTS[layout](w).astype(np.float32)
    np.testing.assert_array_equal(export.load(tmp_path / "m").params["params"], expected)


def test_header_is_json(artefact):
    """The header can be read without this library."""
    data = artefact.read_bytes()
    text = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["jmp_lite"]
    digest, _, header = text.partition(" ")
    assert digest == f"sha256:{export.load(artefact).digest}"
    assert json.loads(header)["policy"] == "p=bf16,c=bf16,o=bf16"
    assert json.loads(header)["quantized"] == {"": "float32"}
