"""``examples/lowbit.py``: what it prints and writes, and its parts."""

import importlib.util
import os
import pathlib
import re
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import processes
from support.comparisons import assert_identical, slow_but_for

import jmp_lite as jmp

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
VARIANTS = ("fp32", "bf16", "fp8", "int8_qat", "w8a16", "w8a8", "sparse_80", "sparse_2_4")


@pytest.fixture
def example(monkeypatch):
    """Imports a file of the examples into this process."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # put back what parsing a command line sets
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield __import__


@pytest.fixture
def program(example):
    """The program as a module; by its path, for its name is short."""
    spec = importlib.util.spec_from_file_location("lowbit_program", EXAMPLES / "lowbit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def params(rng):
    """A kernel, a bias and an embedding, float32."""
    shapes = {"dense": {"kernel": (256, 32), "bias": (32,)}, "embed": {"embedding": (97, 64)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def rows(output):
    """The cells of the final tables, in order."""
    cells = r"^ (\w+) +\S.*?  +([\d.]+)%? +(?:([+-][\d.]+)(?:%| pts))? +([\d.]+) +([\d.]+) +([\d.]+)%"
    return re.findall(cells, output, re.MULTILINE)


def assert_is_a_picture(file):
    data = file.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG")
    assert min(width, height) > 600
    assert len(data) > 20_000  # what an empty canvas of this size does not reach


# --- The program ------------------------------------------------------------------------------------------------------


def test_a_few_steps_report_and_write_their_files(program, capsys, tmp_path):
    arguments = ["--model", "digits", "--variant", "w8a8", "sparse_2_4", "--steps", "4", "--output", str(tmp_path)]
    assert program.main(arguments) == 0
    table = rows(capsys.readouterr().out)
    assert [name for name, *_ in table] == ["fp32", "w8a8", "sparse_2_4"]
    for name, _, _, kib, *_ in table:
        written = (tmp_path / "digits" / f"{name}.msgpack").stat().st_size
        assert float(kib) == pytest.approx(written / 1024, abs=0.05)
    assert_is_a_picture(tmp_path / "lowbit.png")


@pytest.mark.soak
def test_all_variants_of_both_models_report(tmp_path):
    """A few steps: all variants that are not pruned start from the same weights and stay near one another."""
    command = [sys.executable, str(EXAMPLES / "lowbit.py"), "--steps", "3", "--output", "out"]
    environment = processes.environment(COLUMNS="100")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(done.stdout)
    assert [name for name, *_ in table] == [*VARIANTS, *VARIANTS]
    losses = [float(loss) for _, loss, *_ in table[len(VARIANTS) :]]
    np.testing.assert_allclose(losses[:6], losses[0], rtol=0.02)
    assert_is_a_picture(tmp_path / "out" / "lowbit.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "fp4"], "invalid choice: 'fp4' .*fp32.*sparse_2_4"),
        (["--model", "resnet"], "invalid choice: 'resnet' .*digits.*gpt"),
        (["--steps", "0"], "whole number of at least 1, got '0'"),
        (["--seed", "-1"], "--seed -1: expected a whole number of at least 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_explained(program, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        program.parse(arguments)
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_the_reference_is_always_there_and_first(program):
    assert program.parse(["--variant", "w8a8", "fp8"]).variant == ["fp32", "fp8", "w8a8"]
    assert program.parse([]).variant == list(VARIANTS)
    assert program.parse([]).model == ["digits", "gpt"]


# --- Its files --------------------------------------------------------------------------------------------------------


def rounded(params, recipe):
    return jmp.quant.dequantize_tree(jmp.quant.quantize_tree(params, recipe.rhs))


EXPECTED = {
    "fp32": lambda params: params,
    "bf16": lambda params: jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), params),
    "fp8": lambda params: rounded(params, jmp.quant.FP8),
    "int8_qat": lambda params: rounded(params, jmp.quant.INT8_QAT),
    "w8a16": lambda params: rounded(params, jmp.quant.W8A16),
    "w8a8": lambda params: rounded(params, jmp.quant.W8A8),
    "sparse_80": lambda params: params,
    "sparse_2_4": lambda params: params,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_files_hold_what_is_multiplied(example, tmp_path, params, name):
    """Bit for bit: with kernels as the recipe of the variant rounds them."""
    files, variants = example("_lowbit_files"), example("_lowbit_variants").VARIANTS
    assert tuple(variants) == VARIANTS
    packed = variants[name].pack(params)
    num_bytes = files.save(packed, tmp_path / "weights")
    read = files.to_dense(files.load(packed, tmp_path / "weights"), params)
    assert num_bytes == (tmp_path / "weights").stat().st_size
    assert_identical(read, EXPECTED[name](params))


@pytest.mark.parametrize("zeros", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_sparse_arrays_take_a_bit_per_weight_and_the_rest(example, tmp_path, rng, zeros):
    files = example("_lowbit_files")
    values = rng.normal(size=(37, 11)).astype(np.float32)
    values.flat[: round(zeros * values.size)] = 0
    packed = files.to_sparse({"kernel": values})
    files.save(packed, tmp_path / "weights")
    read = files.to_dense(files.load(packed, tmp_path / "weights"), {"kernel": values})
    np.testing.assert_array_equal(read["kernel"], values)
    alive = np.count_nonzero(values)
    is_sparse = zeros > files.FEWEST_ZEROS
    expected = -(-values.size // 8) + 4 * alive if is_sparse else values.nbytes
    assert sum(x.nbytes for x in jax.tree.leaves(packed)) == expected
    assert files.zeros(read) == pytest.approx(1 - alive / values.size)


# --- Its pruning ------------------------------------------------------------------------------------------------------


@pytest.fixture
def attention(rng):
    """Kernels of an attention layer and of a small layer, float32."""
    shapes = {"query": (64, 4, 16), "out": (4, 16, 64), "small": (8, 16)}
    return {name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)} for name, shape in shapes.items()}


def after_training(transforms, params, steps):
    """Parameters after so many steps in which nothing but the transformations changes them."""
    tx = optax.chain(*transforms)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, params)


def test_2_of_4_inputs_of_every_output_are_left(example, attention):
    """Whichever axis of a kernel is that of the inputs."""
    pruned = after_training(example("_lowbit_variants").prune_2_of_4(6, attention), attention, steps=6)
    query, out = pruned["query"]["kernel"], pruned["out"]["kernel"]
    assert (np.count_nonzero(query.reshape(16, 4, 64), axis=1) == 2).all()
    assert (np.count_nonzero(out.reshape(16, 4, 64), axis=1) == 2).all()
    np.testing.assert_array_equal(pruned["small"]["kernel"], attention["small"]["kernel"])


@pytest.mark.parametrize("steps", slow_but_for([3, 10], [2, 3, 10, 40]))
def test_four_fifths_of_every_kernel_are_zero_at_the_end(example, attention, steps):
    pruned = after_training(example("_lowbit_variants").prune_gradually(steps, attention), attention, steps)
    for name in ("query", "out"):
        assert np.sum(pruned[name]["kernel"] == 0) == round(0.8 * 4096)
    np.testing.assert_array_equal(pruned["small"]["kernel"], attention["small"]["kernel"])
