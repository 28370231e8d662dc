"""Formats: their names, which of them a platform runs fast, and that asking costs no device."""
# ruff: noqa: SIM300 - the expected value comes first

import os
import pathlib
import re
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import strategies

import jmp_lite as jmp
from jmp_lite import _dtypes

NAMES = {
    "bfloat16": ["bf16", "bfloat16"],
    "float16": ["f16", "float16", "fp16"],
    "float32": ["full", "f32", "float32", "fp32"],
    "float64": ["f64", "float64", "fp64"],
    "float8_e4m3fn": ["f8_e4m3fn", "float8_e4m3fn", "f8e4m3fn", "e4m3"],
    "float8_e5m2": ["f8_e5m2", "float8_e5m2", "f8e5m2", "e5m2"],
    "float8_e3m4": ["float8_e3m4"],
    "float8_e4m3": ["float8_e4m3"],
    "float8_e4m3b11fnuz": ["float8_e4m3b11fnuz"],
    "float8_e4m3fnuz": ["float8_e4m3fnuz"],
    "float8_e5m2fnuz": ["float8_e5m2fnuz"],
    "float4_e2m1fn": ["float4_e2m1fn"],
}
ACCEPTED = ", ".join(["half", *(name for names in NAMES.values() for name in names)])

CPU, TPU, GPU = "cpu", "tpu", "gpu"
V100, T4, A100, L4, H100, B200 = "7.0", "7.5", "8.0", "8.9", "9.0", "10.0"
MI300X = "gfx942"


@pytest.fixture
def on_device(monkeypatch):
    """Makes the first local device look like another one; forgets what was warned about."""

    def pretend(platform, kind="a device", **attributes):
        device = types.SimpleNamespace(platform=platform, device_kind=kind, **attributes)
        monkeypatch.setattr(jax, "local_devices", lambda: [device])

    _dtypes.warn_if_slow.cache_clear()
    yield pretend
    _dtypes.warn_if_slow.cache_clear()


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "name"), [(d, n) for d, names in NAMES.items() for n in names])
def test_every_name_is_parsed(dtype, name):
    """Case and surrounding white space do not matter in a name."""
    expected = np.dtype(getattr(jnp, dtype))
    for spelling in (name, name.upper(), name.title(), f"  {name}\t"):
        parsed = jmp.parse_dtype(spelling)
        assert expected == parsed
        assert isinstance(parsed, np.dtype)


def test_tables_of_names_are_inverse():
    """``dtype_to_names`` and ``name_to_dtype`` hold the same pairs, and no name stands for two formats."""
    pairs = [(name, dtype) for dtype, names in jmp.dtype_to_names.items() for name in names]
    assert dict(pairs) == jmp.name_to_dtype
    assert len(pairs) == len(jmp.name_to_dtype)
    assert {dtype: list(names) for dtype, names in NAMES.items()} == {
        np.dtype(dtype).name: list(names) for dtype, names in jmp.dtype_to_names.items()
    }


def test_names_of_jmp_are_kept():
    """The keys are scalar types and the leading names are those that jmp prints."""
    leading = {jnp.bfloat16: "bf16", jnp.float16: "f16", jnp.float32: "full", jnp.float64: "f64"}
    assert leading == {dtype: jmp.dtype_to_names[dtype][0] for dtype in leading}
    assert "f16" == jmp.dtype_to_names[np.float16][0]


EIGHT_BITS = (
    " Only matmuls run in 8 bits, by a recipe beside the policy: write autocast(fun, 'mixed_bfloat16', "
    "dot=jmp_lite.quant.{})."
)


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        *((value, "") for value in ("f", "", " ", "complex64")),
        ("float", " Did you mean 'float16'?"),
        ("b f16", " Did you mean 'bf16'?"),
        ("i32", " Did you mean 'f32'?"),
        *((value, EIGHT_BITS.format("FP8")) for value in ("fp8", "f8", "float8")),
        ("int8", EIGHT_BITS.format("INT8_TRAIN")),
    ],
)
def test_unknown_name_is_quoted(value, advice):
    """An unknown name is quoted, the nearest one is offered, and every accepted one is listed last."""
    message = f"Unknown dtype {value!r}.{advice} Accepted: {ACCEPTED}."
    with pytest.raises(jmp.errors.UnknownDtypeError, match=f"^{re.escape(message)}$"):
        jmp.parse_dtype(value)


@pytest.mark.parametrize("value", [5, None, jnp.float16, b"f16", ["f16"]], ids=repr)
def test_what_is_no_name_is_quoted(value):
    """Only strings are names."""
    with pytest.raises(
        jmp.errors.UnknownDtypeError, match=f"^{re.escape(f'Unknown dtype {value!r}. Accepted: half, bf16')}"
    ):
        jmp.parse_dtype(value)


@given(st.text())
def test_any_text_is_a_format_or_an_unknown_dtype(text):
    """No text makes ``parse_dtype`` fail in any other way."""
    parsed = strategies.result_or_error(jmp.parse_dtype, text)
    assert isinstance(parsed, np.dtype) or _dtypes.quote(text) in str(parsed)


# --- Canonical dtypes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", [*strategies.FORMATS, "complex64", "int8", "bool"])
def test_canonical_dtype_is_that_of_a_jax_array(name, x64):
    """The canonical dtype is the one JAX gives to the array, native and idempotent."""
    with jax.enable_x64(x64):
        dtype = strategies.dtype_named(name)
        expected = jnp.asarray(np.ones(1, dtype)).dtype
        assert expected == _dtypes.canonical(dtype)
        assert expected == _dtypes.canonical(_dtypes.canonical(dtype))
        assert expected == _dtypes.canonical(dtype.newbyteorder(">"))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    ("name", "expected", "expected_x64"),
    [
        *((name, "float32", "float32") for name in strategies.FORMATS if name != "float64"),
        ("float64", "float32", "float64"),
        ("complex64", "complex64", "complex64"),
        ("complex128", "complex64", "complex128"),
    ],
)
def test_at_least_float32(name, expected, expected_x64, x64):
    """Scaled losses and unscaled gradients are float32, float64 or complex."""
    with jax.enable_x64(x64):
        assert (expected_x64 if x64 else expected) == _dtypes.at_least_float32(strategies.dtype_named(name))


# --- Platforms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "platform"),
    [("bfloat16", "tpu"), ("float16", "cpu"), ("float16", "gpu"), ("float16", "cuda"), ("float16", "METAL")],
)
def test_half_dtype_of_platform(expected, platform, on_device):
    """Half is bfloat16 on TPU and float16 elsewhere, in names, policies and casts."""
    on_device(platform)
    assert expected == jmp.half_dtype() == jmp.parse_dtype(" HALF ")
    assert jmp.get_policy(f"c={expected}") == jmp.get_policy("c=half")
    assert jmp.get_policy(expected) == jmp.get_policy("half")
    assert expected == jmp.cast_to_half(np.ones(1, np.float32)).dtype


@pytest.mark.parametrize(
    ("expected", "name", "platform", "capability"),
    [
        ("bfloat16", "float16", TPU, None),
        (None, "bfloat16", TPU, None),
        (None, "float32", TPU, None),
        (None, "float16", CPU, None),
        (None, "bfloat16", CPU, None),
        (None, "float8_e4m3fn", CPU, None),
        ("float16", "bfloat16", GPU, V100),
        ("float16", "bfloat16", GPU, T4),
        ("float16", "bfloat16", "cuda", T4),
        (None, "bfloat16", GPU, A100),
        (None, "bfloat16", GPU, B200),
        (None, "float16", GPU, V100),
        (None, "float16", GPU, H100),
        (None, "float32", GPU, V100),
        (None, "float64", GPU, V100),
        ("float16", "float8_e4m3fn", GPU, T4),
        ("bfloat16", "float8_e4m3fn", GPU, A100),
        ("bfloat16", "float8_e5m2", GPU, "8.6"),
        (None, "float8_e4m3fn", GPU, L4),
        (None, "float8_e5m2", GPU, H100),
        (None, "float8_e5m2", GPU, B200),
        (None, "float8_e5m2", GPU, "12.1"),
        *((None, name, GPU, MI300X) for name in ("bfloat16", "float16", "float8_e4m3fnuz")),
        (None, "bfloat16", "rocm", "gfx90a"),
        (None, "bfloat16", GPU, None),
        (None, "bfloat16", GPU, "7"),
        (None, "bfloat16", GPU, "7.x"),
        (None, "bfloat16", "METAL", None),
    ],
)
def test_faster_dtype(expected, name, platform, capability):
    """The better format is named where the hardware is known to lack units, and nowhere else."""
    assert expected == _dtypes.faster_dtype(strategies.dtype_named(name), platform, capability)


def test_better_choice_is_itself_fast():
    """Following the advice ends the warnings."""
    for name in strategies.FORMATS:
        for platform, capability in [(TPU, None), (GPU, V100), (GPU, T4), (GPU, A100), (GPU, L4), (GPU, H100)]:
            better = _dtypes.faster_dtype(strategies.dtype_named(name), platform, capability)
            if better is not None:
                assert _dtypes.faster_dtype(jmp.parse_dtype(better), platform, capability) is None


CASTS = {
    "policy": jmp.get_policy("mixed_bfloat16"),
    "map": jmp.PolicyMap({"head": "mixed_bfloat16"}, default="float32"),
    "map_default": jmp.PolicyMap({"head": "float32"}, default="mixed_bfloat16"),
}


@pytest.mark.parametrize("policy", CASTS.values(), ids=CASTS)
def test_slow_dtype_warns_once_with_the_better_choice(policy, on_device):
    """The first cast warns, at the line of the caller, and no later one does."""
    on_device(GPU, "Tesla V100-SXM2-16GB", compute_capability=V100)
    message = (
        "Tesla V100-SXM2-16GB has no fast units for compute dtype bfloat16; use float16 instead, for example "
        "jmp_lite.get_policy('mixed_float16')."
    )
    with pytest.warns(jmp.errors.SlowDtypeWarning, match=f"^{re.escape(message)}$") as caught:
        policy.cast_to_compute({"head": jnp.ones(1)})
    assert [__file__] == [warning.filename for warning in caught]
    for _ in range(2):
        policy.cast_to_compute({"head": jnp.ones(1)})


def test_slow_dtype_warns_again_for_another_dtype(on_device):
    """Each dtype has its own warning."""
    on_device(GPU, "Tesla T4", compute_capability=T4)
    for name in ("mixed_bfloat16", "c=float8_e4m3fn", "c=float8_e5m2"):
        with pytest.warns(jmp.errors.SlowDtypeWarning, match="^Tesla T4 has no fast units"):
            jmp.get_policy(name).cast_to_compute(jnp.ones(1))


def test_slow_dtype_warns_inside_jit_and_with_policy(on_device):
    """A function wrapped for a TPU in float16 warns when it is traced."""
    on_device(TPU, "TPU v5 lite")
    function = jax.jit(jmp.with_policy(jnp.sin, "mixed_float16"))
    with pytest.warns(
        jmp.errors.SlowDtypeWarning, match=r"^TPU v5 lite .* float16; use bfloat16 .*'mixed_bfloat16'\)\.$"
    ):
        function(jnp.ones(1))
    function(jnp.ones(2))


def test_warning_that_is_an_error_is_raised_every_time(on_device):
    """A warning turned into an exception is not swallowed the second time."""
    on_device(TPU, "TPU v4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(jmp.errors.SlowDtypeWarning):
                jmp.get_policy("mixed_float16").cast_to_compute(jnp.ones(1))


@pytest.mark.parametrize("name", ["mixed_float16", "float32", "c=float8_e4m3fn"])
def test_fast_or_unknown_hardware_does_not_warn(name, on_device):
    """Hopper, CPU and AMD pass in silence; so do parameters and outputs, which no unit multiplies."""
    for device in [(GPU, "H100", H100), (CPU, "cpu", None), (GPU, "MI300X", MI300X)]:
        on_device(device[0], device[1], compute_capability=device[2])
        jmp.get_policy(name).cast_to_compute(jnp.ones(1))
        _dtypes.warn_if_slow.cache_clear()
    on_device(TPU, "TPU v4")
    policy = jmp.get_policy("p=f16,c=f32,o=f16")
    policy.cast_to_output(policy.cast_to_compute(policy.cast_to_param(jnp.ones(1))))


def test_numpy_arrays_do_not_ask_for_a_device(on_device):
    """NumPy data may be cast in a process that never touches the accelerator."""
    on_device(TPU)
    assert "float16" == jmp.get_policy("mixed_float16").cast_to_compute({"x": np.ones(1), "n": "name"})["x"].dtype


# --- Devices are left alone -------------------------------------------------------------------------------------------

PROGRAM = """
import numpy as np
import jmp_lite as jmp
for name in ["mixed_float16", "mixed_bfloat16", "p=f32,c=f16,o=f32,r=f32", "bf16", "O2", "float8_e4m3fn"]:
    policy = jmp.get_policy(name)
    assert jmp.get_policy(str(policy)) == policy
    policy.cast_to_output(policy.cast_to_compute({"w": np.ones(2, np.float32), "n": 3}))
policies = jmp.PolicyMap({"head": "f32"}, default="mixed_float16")
policies.cast_to_compute({"head": np.ones(2, np.float32)})
jmp.with_policy(len, "mixed_float16")
jmp.StaticLossScale(2.0), jmp.DynamicLossScale(), jmp.NoOpLossScale()
print("no device touched")
try:
    jmp.half_dtype()
except RuntimeError:
    print("half_dtype needs one")
"""


def test_import_and_policies_initialize_no_device():
    """Everything but ``half`` works where JAX can start no backend at all."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "JAX_", "XLA_"))}
    environment |= {"JAX_PLATFORMS": "nowhere", "PYTHONPATH": str(pathlib.Path(jmp.__file__).parents[1])}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert ["no device touched", "half_dtype needs one"] == process.stdout.splitlines(), process.stderr
