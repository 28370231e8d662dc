"""The file of a frozen model: open to every reader, and not a bit other than those that were written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from support.comparisons import assert_identical, raw
from support.frozen import MLP
from support.lowbit import normal

import jmp_lite as jmp
from jmp_lite import export
from jmp_lite.export import _file
from jmp_lite.quant._array import quantize_tree


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
def artifact(rng, tmp_path):
    """A small artifact with all there is in one."""
    path = tmp_path / "small"
    export.freeze(lambda w, x: x @ w, normal(rng, 4, 4), jnp.ones((2, 4)), path=path, policy="bf16", recipe="w8a16")
    return path


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_no_byte_can_change(every, rng, artifact):
    """Header, metadata, weights, program, digest: a flip of any bit of any byte is refused, never served."""
    data = bytearray(artifact.read_bytes())
    for at in range(rng.integers(every), len(data), every):
        flip = int(1 << rng.integers(8))
        data[at] ^= flip
        artifact.write_bytes(data)
        with pytest.raises(jmp.errors.CorruptArtifactError):
            export.load(artifact)
        data[at] ^= flip
    artifact.write_bytes(data)
    export.load(artifact)


def test_no_byte_can_go_or_come(rng, artifact):
    """Truncated at any place, prolonged, or with a part swapped."""
    data = artifact.read_bytes()
    cuts = [data[:at] for at in rng.integers(len(data), size=200)]
    a, b = sorted(rng.integers(len(data) // 2, len(data), size=2))
    swapped = data[:a] + data[b:] + data[a:b]
    for bad in [*cuts, b"", data + b"\0", b"\0" + data, data * 2, *([swapped] if swapped != data else [])]:
        artifact.write_bytes(bad)
        with pytest.raises(jmp.errors.CorruptArtifactError):
            export.load(artifact)


def test_foreign_files_are_refused(tmp_path):
    """A file of weights by another program, a pickle, a text."""
    path = tmp_path / "m"
    safetensors.numpy.save_file({"w": np.ones(2)}, path, {"format": "pt"})
    for data in (path.read_bytes(), b"\x80\x04N.", b"not a model" * 9):
        path.write_bytes(data)
        with pytest.raises(jmp.errors.CorruptArtifactError, match=r"'.*m' is not an artifact of jmp_lite.export"):
            export.load(path)
    with pytest.raises(FileNotFoundError):
        export.load(tmp_path / "none")


HEADER = {"jax": "0", "platforms": ["cpu"], "policy": None, "quantized": {}, "recipe": None}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": 2}, jmp.errors.CorruptArtifactError, "has format 2, this version of jmp_lite reads 1"),
        ({"dtypes": {}}, jmp.errors.CorruptArtifactError, "not written as artifacts are"),
        ({"dtypes": {"w": "float32"}}, jmp.errors.CorruptArtifactError, "not written as artifacts are"),
        ({"platforms": ["mars"]}, jmp.errors.PlatformMismatchError, "was frozen for mars, but this process runs on "),
    ],
)
def test_wrong_headers_with_right_digests(tmp_path, change, error, message):
    """Files that were made to look right are no reason to crash."""
    _file.write(tmp_path / "m", {"w": np.ones(2), "__program__": np.zeros(9, np.uint8)}, HEADER | change)
    with pytest.raises(error, match=message):
        export.load(tmp_path / "m")


def test_digest_pins_one_artifact(mlp, tmp_path):
    """Another one, however sound, is refused by both digests."""
    params, x = mlp
    digest = export.freeze(MLP().apply, params, x, path=tmp_path / "m")
    assert export.load(tmp_path / "m", digest=digest).digest == digest
    export.load(tmp_path / "m", digest=f"SHA256:{digest.upper()}")
    other = export.freeze(MLP().apply, jax.tree.map(lambda leaf: leaf + 1, params), x, path=tmp_path / "m")
    with pytest.raises(jmp.errors.CorruptArtifactError, match=rf"digest='{digest}' was asked for, it has '{other}'"):
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


def test_weights_of_numpy_are_those_that_jax_makes_of_them(tmp_path):
    """NumPy's defaults have 64 bits, which the program does not without ``jax_enable_x64``."""
    params = {"ids": np.arange(4), "w": np.ones(4), "swapped": np.ones(4, np.dtype(np.float32).newbyteorder())}

    def run(params, x):
        return x + params["w"][params["ids"]] + params["swapped"]

    export.freeze(run, params, jnp.ones(4), path=tmp_path / "model")
    np.testing.assert_array_equal(export.load(tmp_path / "model")(jnp.ones(4)), np.full(4, 3.0))
    with pytest.raises(jmp.errors.InvalidExportError, match=r"Leaf 'ids' is int64\[4\] with numbers that int32 cannot"):
        export.freeze(run, {**params, "ids": params["ids"] + 2**40}, jnp.ones(4), path=tmp_path / "other")


def test_header_is_json(artifact):
    """The header can be read without this library."""
    data = artifact.read_bytes()
    text = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["jmp_lite"]
    digest, _, header = text.partition(" ")
    assert digest == f"sha256:{export.load(artifact).digest}"
    assert json.loads(header)["policy"] == "p=bf16,c=bf16,o=bf16"
    assert json.loads(header)["quantized"] == {"": "float32"}
