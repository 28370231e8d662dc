"""What XLA's partitioner sends under ``jit``: gathers in the compute dtype, sums of matrices in ``reduce_dtype``."""

import json
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parents[1]
N_MATRICES, VECTORS = 2, {"32", "16"}


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory):
    """The collectives of every mode and dtype."""
    command = [sys.executable, "-m", "support.partitioned", str(tmp_path_factory.mktemp("hlo"))]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("reduce", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_sharded", [False, True], ids=["copied", "FSDP"])
@pytest.mark.parametrize("form", ["jit", "explicit"])
def test_each_matrix_is_sent_once_in_its_dtype(partitioned, form, is_sharded, reduce):
    """One gather in bfloat16 where matrices are split, one sum in the dtype asked for, nothing else of that size."""
    found = partitioned[f"{form}{' FSDP' if is_sharded else ''}, {reduce}"]
    summed = {"float32": "f32", "bfloat16": "bf16"}[reduce]
    expected = [("all-reduce", summed, "16,32")] * 2 + [("all-gather", "bf16", "16,32")] * 2 * is_sharded
    matrices = [item for item in found if item[2] not in {*VECTORS, ""}]
    # A sum may come before the transposition of what is summed.
    assert sorted((kind, dtype, ",".join(sorted(shape.split(",")))) for kind, dtype, shape in matrices) == sorted(
        expected
    )


@pytest.mark.parametrize("is_sharded", [False, True], ids=["copied", "FSDP"])
@pytest.mark.parametrize("form", ["jit", "explicit"])
def test_gradients_of_biases_and_scales_are_float32(partitioned, form, is_sharded):
    """Sums over a batch are sums over devices too, and come before the gradient is rounded."""
    found = partitioned[f"{form}{' FSDP' if is_sharded else ''}, float32"]
    assert sorted(tuple(item) for item in found if item[2] in VECTORS) == [
        ("all-reduce", "f32", "16"),
        *[("all-reduce", "f32", "32")] * 2,
    ]


@pytest.mark.parametrize("form", ["jit", "explicit"])
def test_the_verdict_sends_one_boolean_per_sharded_leaf_at_most(partitioned, form):
    """Replicated gradients are judged on the spot; XLA combines the booleans of sharded ones later."""
    assert not [item for item in partitioned[f"{form}, float32"] if item[1] == "pred"]
    assert len([item for item in partitioned[f"{form} FSDP, float32"] if item[1] == "pred"]) <= N_MATRICES
