"""Files with a right digest and anything in them, memory while loading, and freezing in threads."""

import hashlib
import json
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparisons import assert_identical

import jmp_lite as jmp
from jmp_lite import export
from jmp_lite.export import _file


@pytest.fixture
def parts(tmp_path):
    """The layout, the header and the arrays of a sound artifact."""

    def apply(p, x):
        return x @ p["a"] + p["b"][None]

    params = {"a": jnp.eye(4), "b": jnp.ones(4)}
    export.freeze(apply, params, jnp.ones((2, 4)), path=tmp_path / "m", policy="bf16", recipe="w8a16")
    data = (tmp_path / "m").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    layout = json.loads(data[8:end])
    return layout, json.loads(layout.pop("__metadata__")["jmp_lite"][len("sha256:") + 64 :]), data[end:]


def seal(layout, header, body):
    """A file with these parts whose digest is right; a header that is text stays as it is."""
    text = header if isinstance(header, str) else json.dumps(header)
    described = {"__metadata__": {"jmp_lite": f"sha256:{'0' * 64} {text}"}}
    start = json.dumps(described | layout if isinstance(layout, dict) else layout, separators=(",", ":")).encode()
    data = bytearray(len(start).to_bytes(8, "little") + start + body)
    if (at := data.find(_file._MARK) + len(_file._MARK)) >= len(_file._MARK):
        data[at : at + 64] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)


def outcome(path, data):
    """``"loaded"`` or the name of the error."""
    path.write_bytes(data)
    try:
        repr(export.load(path))
    except jmp.errors.JmpLiteError as error:
        return type(error).__name__
    return "loaded"


JUNK = [None, True, -1, 1.5, 2**70, "", "O", "U4", "key<fry>", [], {}, [None], [[1]], {"a": 1}, float("nan"), "\ud800"]


def mutate(tree, rng):
    """The tree with one thing left out, renamed, added, or replaced by something of another kind."""

    def pick(items):
        return list(items)[rng.integers(len(items))]

    if not isinstance(tree, (dict, list)) or not tree or rng.random() < 0.2:
        return pick(JUNK)
    keys = tree if isinstance(tree, dict) else range(len(tree))
    key, changed = pick(keys), tree.copy()
    action = rng.integers(5)
    if action == 0:
        del changed[key]
    elif action == 1 and isinstance(tree, dict):
        changed[pick(["x", "__program__", "a/values"])] = changed.pop(key)
    else:
        changed[key] = mutate(changed[key], rng)
    return changed


def test_headers_of_any_kind_are_loaded_or_refused(parts, rng, tmp_path):
    """Nothing is raised that is not ours."""
    layout, header, body = parts
    assert outcome(tmp_path / "q", seal(layout, header, body)) == "loaded"
    found = {outcome(tmp_path / "q", seal(mutate(layout, rng), header, body)) for _ in range(150)}
    found |= {outcome(tmp_path / "q", seal(layout, mutate(header, rng), body)) for _ in range(150)}
    assert "CorruptArtifactError" in found
    assert found <= {"loaded", "CorruptArtifactError", "PlatformMismatchError"}


TEXTS = [
    "[" * 200_000,
    '{"a":' * 100_000,
    "",
    "null",
    "NaN",
    "\0",
    "9" * 5000,
    '{"format":1}',
    '{"format":true}',
    "[1]",
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_texts_that_are_no_header(text, parts, tmp_path):
    """Deep, empty, of another kind."""
    assert outcome(tmp_path / "q", seal(parts[0], text, parts[2])) == "CorruptArtifactError"


CHANGES = {
    "format": 2, "jax": 5, "platforms": 5, "policy": 5, "recipe": ["w8a16"], "quantized": {"none": "float32"},
    "dtypes": {}, "program": "0" * 64,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_every_entry_is_needed_and_checked(name, parts, tmp_path):
    """Without it, and with something else in its place."""
    layout, header, body = parts
    without = {key: value for key, value in header.items() if key != name}
    assert outcome(tmp_path / "q", seal(layout, without, body)) == "CorruptArtifactError"
    assert outcome(tmp_path / "q", seal(layout, {**header, name: CHANGES[name]}, body)) == "CorruptArtifactError"


@pytest.mark.parametrize("text", ["01f4", "(,)f4", "f4,f4", ">f4", "float32 ", "object", "int32[", ""])
def test_dtypes_are_looked_up_and_not_parsed(text, parts, tmp_path):
    """NumPy evaluates some texts that it is asked for a dtype of."""
    layout, header, body = parts
    for name in header["dtypes"]:
        changed = {**header, "dtypes": {**header["dtypes"], name: text}}
        assert outcome(tmp_path / "q", seal(layout, changed, body)) == "CorruptArtifactError"


@pytest.mark.parametrize("value", [[], 0, {}, False])
@pytest.mark.parametrize("name", ["policy", "recipe"])
def test_what_is_not_named_is_null(name, value, parts, tmp_path):
    layout, header, body = parts
    assert outcome(tmp_path / "q", seal(layout, {**header, name: value}, body)) == "CorruptArtifactError"


PROGRAMS = {
    "cut": lambda program: program[:40],
    "cut at the end": lambda program: program[:-40],
    "half": lambda program: program[: len(program) // 2],
    "zeros": lambda program: bytes(64),
    "ones": lambda program: b"\xff" * 64,
    "empty": lambda program: b"",
}


@pytest.mark.parametrize("described", [False, True], ids=["of another header", "of this header"])
@pytest.mark.parametrize("damage", PROGRAMS)
def test_programs_that_are_none(damage, described, parts, tmp_path):
    """They are refused when they are loaded, whether or not the header says that they are right."""
    layout, header, body = parts
    begin, end = layout["__program__"]["data_offsets"]
    assert end == len(body)
    program = PROGRAMS[damage](body[begin:])
    slot = {"dtype": "U8", "shape": [len(program)], "data_offsets": [begin, begin + len(program)]}
    if described:
        header = {**header, "program": hashlib.sha256(program).hexdigest()}
    data = seal({**layout, "__program__": slot}, header, body[:begin] + program)
    assert outcome(tmp_path / "q", data) == "CorruptArtifactError"


def test_flipped_program_is_refused_before_jax_reads_it(parts, rng, tmp_path):
    """Parsers of MLIR may abort the process on such bytes."""
    layout, header, body = parts
    begin, end = layout["__program__"]["data_offsets"]
    for at in rng.integers(begin, end, size=50):
        changed = bytearray(body)
        changed[at] ^= 1 << int(rng.integers(8))
        assert outcome(tmp_path / "q", seal(layout, header, bytes(changed))) == "CorruptArtifactError"


def test_program_of_another_model_is_refused(parts, tmp_path):
    """It takes weights that this file does not have."""
    layout, header, body = parts
    export.freeze(lambda p, x: x @ p["other"], {"other": jnp.eye(4)}, jnp.ones((2, 4)), path=tmp_path / "other")
    program = _file.read(tmp_path / "other", None)[0]["__program__"].tobytes()
    begin = layout["__program__"]["data_offsets"][0]
    slot = {"dtype": "U8", "shape": [len(program)], "data_offsets": [begin, begin + len(program)]}
    header = {**header, "program": hashlib.sha256(program).hexdigest()}
    (tmp_path / "q").write_bytes(seal({**layout, "__program__": slot}, header, body[:begin] + program))
    with pytest.raises(jmp.errors.CorruptArtifactError, match="it takes other weights than the file has"):
        export.load(tmp_path / "q")


# --- Memory ---------------------------------------------------------------------------------------

LOADER = """
    import pathlib, sys
    import jax.numpy as jnp
    from jmp_lite import export

    def peak():
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))

    small, large = sys.argv[1:]
    export.load(small)(jnp.ones((1, 8)))  # whatever is loaded once
    before = peak()
    served = export.load(large)
    print(peak() - before, served.params["w"].nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_loading_takes_little_more_memory_than_the_file(tmp_path):
    """Each byte goes to where the program reads it: 1.5 of the file at most, at the peak."""
    for name, size in (("small", 8), ("large", 2**20)):
        params = {"w": np.ones((8, size), np.float32)}
        export.freeze(lambda p, x: (x @ p["w"]).sum(), params, jnp.ones((1, 8)), path=tmp_path / name)
    script = tmp_path / "loader.py"
    script.write_text(textwrap.dedent(LOADER))
    command = [sys.executable, str(script), str(tmp_path / "small"), str(tmp_path / "large")]
    more, weights = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert weights == 32 * 2**20
    assert more <= 1.5 * (tmp_path / "large").stat().st_size


def test_weights_lie_as_the_processor_wants_them(tmp_path):
    """Otherwise JAX would copy them."""
    params = {"a": np.ones(3, np.int8), "b": np.ones((5, 7), np.float32), "c": np.ones(9, np.float16)}
    export.freeze(lambda p, x: x, params, jnp.ones(2), path=tmp_path / "m")
    arrays, _, _ = _file.read(tmp_path / "m", None)
    assert {array.ctypes.data % 64 for array in arrays.values()} == {0}


# --- Threads --------------------------------------------------------------------------------------


def test_freezing_in_threads(tmp_path):
    """All write the same file, which is whole at any time, and no setting of JAX changes, not for a moment."""
    name = "jax_traceback_in_locations_limit"
    before, seen, results = jax.config.values[name], set(), []

    def work():
        for _ in range(4):
            fun = lambda w, x: seen.add(jax.config.values[name]) or x @ w  # noqa: E731
            results.append(export.freeze(fun, jnp.eye(8), jnp.ones((2, 8)), path=tmp_path / "m"))
            assert_identical(export.load(tmp_path / "m")(jnp.ones((2, 8))), jnp.ones((2, 8)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16
    assert len(set(results)) == 1
    assert {before} == seen == {jax.config.values[name]}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("platforms", [None, ("cpu", "tpu")])
def test_sharded_program_has_no_source_lines_either(platforms, tmp_path):
    """Constraints of shardings are operations of another dialect."""
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    free = jax.ShapeDtypeStruct(jax.export.symbolic_shape("rows, 4"), jnp.float32)
    export.freeze(
        lambda w, x: jax.lax.with_sharding_constraint(x @ w, rows), jnp.eye(4), free, path=tmp_path / "m",
        platforms=platforms,
    )  # fmt: skip
    assert b"test_export" not in (tmp_path / "m").read_bytes()
    assert_identical(export.load(tmp_path / "m")(jnp.ones((3, 4))), jnp.ones((3, 4)))
