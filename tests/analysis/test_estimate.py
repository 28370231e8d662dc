"""What a step costs, beside counts by hand, and what is said about it."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support.comparisons import slow_but_for

import jmp_lite as jmp
from jmp_lite.analysis import estimate, estimate_storage
from jmp_lite.analysis._estimation._compiled import _child
from jmp_lite.analysis._estimation._devices import DEVICES, kind_of
from jmp_lite.errors import InvalidAnalysisError, InvalidFunctionError, UnknownDtypeError

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # benchmarks are not installed

from benchmarks import _zoo

ROWS, WIDTH, HIDDEN, STEPS = 256, 512, 1024, 5


def f32(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


PARAMS = {"up": f32(WIDTH, HIDDEN), "bias": f32(HIDDEN), "down": f32(HIDDEN, WIDTH)}
X = f32(ROWS, WIDTH)
#: Two matmuls forward; by both weights and by what is between them backward.
FLOPS = 5 * 2 * ROWS * WIDTH * HIDDEN


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["up"] + params["bias"][None])
    return jnp.square(hidden @ params["down"]).mean()


def traced(fun=mlp, **options):
    return estimate(fun, compiled=False, **options)


# --- FLOPs ---

FORMATS = {
    "float32": {"float32": FLOPS},
    "mixed_bfloat16": {"bfloat16": FLOPS},
    "mixed_float16": {"float16": FLOPS},
    "fp8": {"float8": FLOPS},
    "int8_train": {"int8": FLOPS},
}


def test_flops_are_counted_by_what_they_run_as():
    found = traced(policies=list(FORMATS))(PARAMS, X)
    assert {row.name: row.flops for row in found} == FORMATS


def conv(kernel, x):
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


STEPPED = [
    (lambda w, x: lax.scan(lambda x, _: (x @ w, None), x, length=STEPS)[0], f32(WIDTH, WIDTH), STEPS * WIDTH * WIDTH),
    (lambda w, x: lax.fori_loop(0, STEPS, lambda _, x: x @ w, x), f32(WIDTH, WIDTH), STEPS * WIDTH * WIDTH),
    (lambda w, x: x @ w + (x @ w), f32(WIDTH, HIDDEN), WIDTH * HIDDEN),
]


@pytest.mark.parametrize(("fun", "weight", "per_row"), STEPPED, ids=["scan", "fori_loop", "twice the same"])
def test_a_step_is_taken_as_it_is(fun, weight, per_row):
    [row] = traced(fun, policies=None)(weight, X)
    assert row.flops == {"float32": 2 * ROWS * per_row}


def test_flops_of_a_convolution():
    [row] = traced(conv, policies=None)(f32(3, 3, 8, 16), f32(2, 10, 10, 8))
    assert row.flops == {"float32": 2 * (2 * 8 * 8 * 16) * (3 * 3 * 8)}


def test_products_that_ask_for_it_are_precise():
    [row] = traced(lambda w, x: jnp.dot(x, w, precision="highest"), policies=None)(f32(WIDTH, WIDTH), X)
    assert list(row.flops) == ["precise"]


# --- Time ---


@pytest.mark.parametrize("name", DEVICES)
def test_a_product_takes_as_long_as_the_datasheet_says(name):
    size, device = 16384, DEVICES[name]
    [row] = traced(lambda w, x: x @ w, policies=None, device=name)(f32(size, size), f32(size, size))
    assert row.seconds == pytest.approx(2 * size**3 / (0.7 * device.peak["float32"]))
    assert row.memory_bound == 0


@pytest.mark.parametrize("name", DEVICES)
def test_a_copy_takes_as_long_as_the_bandwidth_says(name):
    [row] = traced(jnp.negative, policies=None, device=name)(f32(1 << 20))
    assert row.seconds == pytest.approx(2 * 4 * (1 << 20) / (0.85 * DEVICES[name].bandwidth))
    assert (row.memory_bound, row.launches, row.flops) == (1, 1, {})


def test_devices_are_no_slower_in_fewer_bits():
    for device in DEVICES.values():
        assert device.precise < device.peak["float32"] <= device.peak["bfloat16"] < device.peak["int8"]
        assert device.peak.get("float8", device.peak["int8"]) == device.peak["int8"]


KINDS = {
    ("float32", "float32"): "float32",
    ("float64", "float64"): "precise",
    ("bfloat16", "float8_e4m3fn"): "bfloat16",
    ("float8_e5m2", "float8_e4m3fn"): "float8",
    ("int8", "int8"): "int8",
}


@pytest.mark.parametrize("dtypes", KINDS)
def test_a_product_runs_as_its_wider_operand(dtypes):
    assert kind_of(dtypes) == KINDS[dtypes]


@pytest.mark.parametrize("name", slow_but_for(("GPT", "MoE"), ["GPT", "LLaMA", "MoE"]))
def test_models_are_ordered_as_compiled_ones_are(name):
    """Bytes fall and rise again with the passes that quantize; time falls (benchmarks/RESULTS.md, "Estimates")."""
    model = _zoo.MODELS[name]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        found = traced(lambda p, b: model.loss(p, b, jnp.float32))(model.params, model.batch)
    wide, half, eight = found
    assert wide.seconds > half.seconds > eight.seconds
    assert wide.bytes > eight.bytes > half.bytes
    assert eight.parts["quantize"].bytes > 0
    assert eight.parts["matmuls"].seconds < half.parts["matmuls"].seconds < wide.parts["matmuls"].seconds


# --- What is said ---


def test_the_same_call_gives_the_same_figures():
    run = traced()
    assert run(PARAMS, X) == run(PARAMS, X) == traced()(PARAMS, X)


def test_arrays_and_shapes_give_the_same_figures():
    arrays = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), (PARAMS, X))
    assert traced()(*arrays) == traced()(PARAMS, X)


def test_parts_add_up_to_the_whole():
    for row in traced()(PARAMS, X):
        assert row.bytes == sum(part.bytes for part in row.parts.values())
        assert row.seconds == pytest.approx(sum(part.seconds for part in row.parts.values()))


@pytest.mark.parametrize(("device", "lacks"), [("h100", None), ("a100", "float8"), ("tpu-v5e", "float8")])
def test_a_format_without_units_is_named(device, lacks):
    found = traced(device=device)(PARAMS, X)
    said = [line for line in found.verdict if "has no units for" in line]
    assert said == ([f"{found.device.title} has no units for {lacks}: such matmuls run as bfloat16."] if lacks else [])


def test_a_verdict_holds_the_terms():
    wide = {name: f32(*(8 * size for size in leaf.shape)) for name, leaf in PARAMS.items()}
    found = traced()(wide, f32(16 * ROWS, 8 * WIDTH))
    assert found.verdict[0].startswith(f"mixed_bfloat16 pays {found['mixed_bfloat16'].speedup:.2f}x over float32: ")
    assert "fp8 pays" in found.verdict[1]
    assert "over mixed_bfloat16: matmuls" in found.verdict[1]
    assert "quantize" in found.verdict[1]
    assert "by the model" in str(found)
    assert len(found.table().splitlines()) == 4


def test_figures_are_json():
    found = traced()(PARAMS, X)
    held = json.loads(json.dumps(found.to_dict()))
    assert [row["bytes"] for row in held["rows"]] == [row.bytes for row in found]
    assert held["verdict"] == list(found.verdict)


def test_policies_may_have_names_and_be_anything_that_is_a_precision():
    policies = {
        "none": "float32",
        "map": jmp.PolicyMap({"nowhere": "float32"}, default="mixed_bfloat16"),
        "recipe": jmp.quant.FP8,
        "by hand": lambda p, x: mlp(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p), x.astype(jnp.bfloat16)),
    }
    with pytest.warns(jmp.errors.UnmatchedRuleWarning):
        found = traced(policies=policies)(PARAMS, X)
    assert [list(row.flops) for row in found] == [["float32"], ["bfloat16"], ["float8"], ["bfloat16"]]
    with pytest.raises(KeyError, match="'fp8' was not estimated"):
        found["fp8"]


def test_nothing_is_compiled(monkeypatch):
    """Neither here nor in its own process."""

    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(_child, "compiled_text", refuse)
    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    assert traced()(PARAMS, X)["fp8"].launches > 0


# --- Mistakes ---

MISTAKES = [
    (lambda: estimate(mlp, device="h10"), InvalidAnalysisError, "Unknown device 'h10'. Did you mean 'h100'?"),
    (lambda: estimate(mlp, device=100), InvalidAnalysisError, "Unknown device 100. There are 'a100', "),
    (lambda: estimate(mlp, policies=[]), InvalidAnalysisError, r"policies=\[\] is nothing to compare"),
    (lambda: estimate(mlp, policies="fp8"), InvalidAnalysisError, "policies='fp8' is nothing to compare"),
    (lambda: estimate(mlp, policies=["mixed_bf"]), UnknownDtypeError, "mixed_bf"),
    (lambda: estimate(3), InvalidFunctionError, "estimate takes a function, got 3"),
    (
        lambda: estimate(mlp, device="l4", compiled=True),
        InvalidAnalysisError,
        "There is no compiler for 'l4' here, only for 'h100', 'h200'",
    ),
    (lambda: estimate_storage({"n": jnp.arange(3)}), InvalidAnalysisError, "found none"),
    (lambda: estimate_storage(PARAMS, device="h10"), InvalidAnalysisError, "Did you mean 'h100'?"),
]


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES)
def test_mistakes_are_told_at_once(call, error, message):
    with pytest.raises(error, match=message.replace("?", r"\?")):
        call()


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(_child, "is_available", lambda _: False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jmp-lite\[aot\]'"):
        estimate(mlp, compiled=True)
    assert not estimate(mlp)(PARAMS, X).is_compiled


# --- Compiled ---


@pytest.mark.slow
def test_a_compiled_program_and_the_model_agree():
    """Bytes of a loss of matmuls, and its FLOPs; where the compiler for H100 is installed."""
    if not _child.is_available("h100"):
        pytest.skip("needs jmp-lite[aot]")
    found = estimate(mlp, compiled=True)(PARAMS, X)
    model = traced()(PARAMS, X)
    assert found.is_compiled
    for row in found:
        assert row.flops == model[row.name].flops
        assert model[row.name].bytes == pytest.approx(row.bytes, rel=0.2)


# --- Storage ---

BYTES = {
    "float32": (12, 28),
    "split16": (12, 26),
    "split8": (11, 24),
    "stochastic": (10, 22),
    "stochastic, bfloat16": (6, 14),
    "split8, 8bit": (5, 12),
    "stochastic, 8bit": (4, 10),
}


@pytest.mark.parametrize("name", BYTES)
def test_storage_takes_the_bytes_that_its_formats_say(name):
    found = estimate_storage({"w": f32(1024, 1024), "ids": jax.ShapeDtypeStruct((3,), jnp.int32)})
    row = found[name]
    assert (round(row.resident / found.parameters, 3), round(row.moved / found.parameters, 3)) == BYTES[name]
    assert row.seconds == pytest.approx(row.moved / (0.85 * 3.35e12))
    assert name in str(found)
    assert json.dumps(found.to_dict())


def test_integers_among_the_parameters_have_no_gradient():
    params = {"w": jnp.ones((8, 4)), "step": jnp.int32(0)}
    found = jmp.analysis.estimate(lambda params, x: jnp.sum(x @ params["w"]), compiled=False)(params, jnp.ones((2, 8)))
    assert found.rows[0].bytes > 0
