"""What the header of a checkpoint says, and which template it fits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from support.comparisons import assert_identical
from support.storage import adam

import jmp_lite as jmp
from jmp_lite import checkpoint
from jmp_lite.checkpoint import _state
from jmp_lite.checkpoint._formats import formats_of

STATE = {
    "params": {"w": jnp.arange(3.0)},
    "scale": jmp.DynamicLossScale(8.0),
    "static": jmp.StaticLossScale(8.0),
    "key": jax.random.key(0, impl="threefry2x32"),
    "step": 7,
}
HEADER = {
    "policy": "p=full,c=f16,o=full",
    "loss_scales": {
        "scale": {"class": "DynamicLossScale", "fields": ["loss_scale", "counter"]},
        "static": {"class": "StaticLossScale", "fields": []},
    },
    "leaves": {
        "key": {"digest": "6d523710f1a85082", "dtype": "key<fry>", "number": False, "shape": []},
        "params/w": {"digest": "f71eeed5923bbe0d", "dtype": "float32", "number": False, "shape": [3]},
        "scale/counter": {"digest": "0000000000000000", "dtype": "int32", "number": False, "shape": []},
        "scale/loss_scale": {"digest": "7d38df387d38df38", "dtype": "float32", "number": False, "shape": []},
        "step": {"digest": "01ddd8f68633f268", "dtype": "int64", "number": True, "shape": []},
    },
    "formats": {},
}
LOW = {"opt/low/w": {"format": "low bits of bfloat16", "other": None}}
NU, MU = "opt/inner_state/0/nu/w", "opt/inner_state/0/mu/w"
WRITTEN = {
    "8bit": (
        "8bit",
        {
            NU: {"format": "Log(highest=7)", "other": None},
            MU: {"format": "Ratio(bound=8.0, relative_to='nu')", "other": NU},
        },
    ),
    "by themselves": (
        {"nu": jmp.optim.Log(3), "mu": jmp.optim.SignedLog(2)},
        {
            NU: {"format": "Log(highest=3)", "other": None},
            MU: {"format": "SignedLog(highest=2)", "other": None},
        },
    ),
    "bfloat16": ("bfloat16", {}),
}


def test_a_header_is_as_earlier_versions_wrote_it():
    """What they saved is restored: no name, digest or checksum changes."""
    header = serialization.msgpack_restore(checkpoint.to_bytes(STATE, policy="mixed_float16"))["header"]
    checksum = "4a39e9543174b32864d768ccb687bad8717eb5bc9cffcacd8c26bd24d14a5c3f"
    assert header == {**HEADER, "checksum": checksum}
    assert _state.check_header(header) == HEADER
    in_another_order = dict(reversed(header.items()))
    assert _state.check_header(in_another_order) == HEADER


@pytest.mark.parametrize("case", WRITTEN)
def test_formats_are_written_as_by_earlier_versions(case):
    """Those of moments that are relative to others name these."""
    formats, found = WRITTEN[case]
    tx = jmp.optim.stored(adam(), params="split8", state=formats)
    params = {"w": jax.ShapeDtypeStruct((4, 3), jnp.bfloat16)}
    assert formats_of({"opt": jax.eval_shape(tx.init, params)}) == LOW | found


# --- What fits into what ---


def like(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


KEY, OTHER_KEY = (jax.eval_shape(lambda i=i: jax.random.key(0, impl=i)) for i in ("threefry2x32", "rbg"))
#: What was saved, and the template; whether one fits into the other, and whether it does with ``migrate``.
FITS = [
    (like("float32", 2), like("float32", 2), True, True),
    (like("float32", 2), like("bfloat16", 2), False, True),
    (like("bfloat16", 2), like("float16", 2), False, True),
    (like("float8_e4m3fn", 2), like("float32", 2), False, True),
    (like("float32", 2), like("float32", 3), False, False),
    (like("float32", 2), like("bfloat16", 2, 1), False, False),
    (like("complex64", 2), np.zeros(2, np.complex128), False, True),
    (like("float32", 2), like("complex64", 2), False, False),
    (like("int32", 2), np.zeros(2, np.int64), False, False),
    (like("int32", 2), like("float32", 2), False, False),
    (like("bool", 2), like("int8", 2), False, False),
    (3, 4, True, True),
    (3, like("int8"), True, True),
    (like("uint8"), 3, True, True),
    (3.0, like("bfloat16"), True, True),
    (like("float16"), 3.0, True, True),
    (True, like("bool"), True, True),
    (1j, 2j, True, True),
    (3, 4.0, False, False),
    (True, 1, False, False),
    (3, like("float32"), False, False),
    (3, like("int32", 1), False, False),
    (np.float64(1), np.float64(2), True, True),
    (np.float64(1), np.float32(2), False, True),
    (KEY, KEY, True, True),
    (KEY, OTHER_KEY, False, False),
    (KEY, like("uint32", 2), False, False),
    (like("uint32", 2), KEY, False, False),
]


@pytest.mark.parametrize(("saved", "wanted", "fits", "fits_migrating"), FITS, ids=str)
def test_what_fits_into_a_template(saved, wanted, fits, fits_migrating):
    entry = _state._type_of(saved)
    assert _state._fits(entry, wanted, migrate=False) == fits
    assert _state._fits(entry, wanted, migrate=True) == fits_migrating


MISFITS = {
    "both sides": (
        {"a": 1, "b": 2},
        {"b": 2, "c": 3},
        "only the checkpoint has 'a'; only the template has 'c'. Restore into a state made by the same program.$",
    ),
    "a cast": (
        {"a": jnp.zeros(2)},
        {"a": jnp.zeros(2, jnp.float16)},
        "is float32.2. in the checkpoint and float16.2. in .*; migrate=True casts from one floating dtype to another.$",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_misfit_is_named_with_what_to_do(case):
    saved, template, message = MISFITS[case]
    with pytest.raises(jmp.errors.CheckpointMismatchError, match=message):
        checkpoint.from_bytes(template, checkpoint.to_bytes(saved, policy="full"), policy="full")


def test_a_cast_that_migrate_does_not_do_is_not_offered():
    data = checkpoint.to_bytes({"a": jnp.zeros(2)}, policy="full")
    with pytest.raises(jmp.errors.CheckpointMismatchError, match=r"same shapes and dtypes\.$"):
        checkpoint.from_bytes({"a": jnp.zeros(3)}, data, policy="full", migrate=True)


SAME_NAME = {
    "a dot": {"a.b": 1, "a": {"b": 2}},
    "a slash": {"a/b": 1, "a": {"b": 2}},
    "an attribute": {"s": optax.ScaleState(), "a.count": 1, "a": optax.ScaleByScheduleState(count=2)},
}


@pytest.mark.parametrize("case", SAME_NAME)
def test_two_leaves_of_one_name_are_refused(case):
    with pytest.raises(jmp.errors.CheckpointMismatchError, match="would be stored under one name"):
        checkpoint.to_bytes(SAME_NAME[case], policy="full")


BAD_HALVES = {
    "another shape": lambda state: state | {"w": state["w"].reshape(2, 3)},
    "another dtype of the same bits": lambda state: state | {"w": state["w"].view(np.uint32)},
    "other values": lambda state: state | {"w": state["w"] + 1},
    "no array": lambda state: state | {"w": "text"},
    "a missing array": lambda state: {"b": state["b"]},
}


@pytest.mark.parametrize("case", BAD_HALVES)
def test_arrays_are_those_of_the_header(case):
    """Bytes with another shape or dtype, whose digest is the same, are damaged too."""
    state = {"w": np.arange(6, dtype=np.int32), "b": np.ones(2)}
    parts = serialization.msgpack_restore(checkpoint.to_bytes(state, policy="full"))
    data = serialization.msgpack_serialize({**parts, "state": BAD_HALVES[case](parts["state"])})
    with pytest.raises(jmp.errors.CorruptCheckpointError, match="The bytes are damaged"):
        checkpoint.from_bytes(state, data, policy="full")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_kind_of_bytes_is_read(kind):
    state = {"w": np.arange(6)}
    data = kind(checkpoint.to_bytes(state, policy="full"))
    assert_identical(checkpoint.from_bytes(state, data, policy="full"), state)
