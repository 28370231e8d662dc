"""Frozen models: the same bits in another process, in the precision that was asked for."""

import dataclasses
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparisons import assert_identical, raw
from support.frozen import MLP

import jmp_lite as jmp
from jmp_lite import export, quant
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


def calibrated(policy, recipe, params, x):
    """The recipe, calibrated with the very data where it is static."""
    if recipe != "w8a8_static":
        return None if recipe is None else quant.get_recipe(recipe)
    return quant.calibrate(lambda dot: jmp.autocast(MLP().apply, policy, dot=dot), recipe, [(params, x)])


def training_function(policy, recipe):
    """What the training program would call for inference: a jitted function of (quantized) parameters."""
    dot = recipe if recipe is not None and recipe.lhs is not None else None
    fun = MLP().apply if policy is None and dot is None else jmp.autocast(MLP().apply, policy or "full", dot=dot)
    return jax.jit(lambda params, x: fun(dequantize_tree(params), x))


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
    """Runs artifacts in a fresh process that has neither the model's code nor any framework nor pickle."""
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
    for number, (policy, spec) in enumerate(PRECISIONS[name] for name in names):
        recipe = calibrated(policy, spec, params, x)
        held = params if recipe is None else quantize_tree(params, recipe.rhs)
        fun = training_function(policy, recipe)
        for kind, example in (("fixed", x), ("free", jax.ShapeDtypeStruct(FREE, jnp.float32))):
            path = str(tmp_path / f"{number}.{kind}.safetensors")
            export.freeze(MLP().apply, params, example, path=path, policy=policy, recipe=recipe)
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
def test_quantized_products_are_those_of_training(mlp, recipe, tmp_path):
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
    fun = jax.named_call(jnp.dot, name="a")
    export.freeze(fun, jnp.ones((8, 8)), jnp.ones((8, 8)), path=tmp_path / "m", **frozen)
    with pytest.raises(jmp.errors.PolicyMismatchError, match=message):
        export.load(tmp_path / "m", **asked)
    served = export.load(tmp_path / "m", **frozen)
    assert served.policy == (str(jmp.get_policy(frozen["policy"])) if "policy" in frozen else None)


def test_own_choice_of_leaves_is_kept(mlp, tmp_path):
    """Parameters that are quantized in part are stored as they are, whatever the recipe."""
    params, x = mlp
    held = quantize_tree(params, "e5m2", where=lambda path, _: path.endswith("Dense_1/kernel"))
    export.freeze(MLP().apply, held, x, path=tmp_path / "m", policy="mixed_bfloat16", recipe="w8a16")
    served = export.load(tmp_path / "m")
    assert [name for name, leaf in served.params.items() if is_quantized(leaf)] == ["params/Dense_1/kernel"]
    assert_identical(served.params["params/Dense_1/kernel"], held["params"]["Dense_1"]["kernel"])
    assert_identical(served(x), training_function("mixed_bfloat16", quant.W8A16)(held, x))


def test_error_of_a_quantized_artifact(mlp, tmp_path):
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
        assert_identical(served(x), training_function(policy, recipe and quant.get_recipe(recipe))(held, x))
    export.freeze(MLP().apply, params, x, path=tmp_path / "m", platforms="tpu")
    with pytest.raises(
        jmp.errors.PlatformMismatchError, match=r"frozen for tpu, but .* platforms=\['tpu', '(cpu|cuda)'\]"
    ):
        export.load(tmp_path / "m")


def test_served_describes_itself(mlp, tmp_path):
    """What there is to know is in the repr and in attributes; inside of jit it is a function like any other."""
    params, x = mlp
    any_batch = jax.ShapeDtypeStruct(FREE, jnp.float32)
    export.freeze(MLP().apply, params, any_batch, path=tmp_path / "m", policy="mixed_bfloat16")
    served = export.load(tmp_path / "m")
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
