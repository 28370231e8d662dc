"""Moments in 8 bits: their bytes mean nothing without their format, so a checkpoint holds that too."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from support.comparisons import assert_identical, standard
from support.storage import gradients, moment_bound, weights

import jmp_lite as jmp
from jmp_lite import checkpoint
from jmp_lite.checkpoint import _state
from jmp_lite.optim import Log, Ratio, SignedLog
from jmp_lite.optim._stored import decoded


@dataclasses.dataclass(frozen=True)
class Own(Log):
    """A format of somebody else."""


FORMATS = {
    "8bit": "8bit",
    "another range": {"nu": Log(20), "mu": "ratio"},
    "another bound": {"nu": "log", "mu": Ratio(bound=12)},
    "signed": {"nu": Log(3), "mu": SignedLog(2)},
    "bfloat16": "bfloat16",
    "float32": "float32",
}


def optimizer(formats, params="split8"):
    return jmp.loss_scaled(jmp.optim.stored(standard(optax.adam(1e-2)), params=params, state=formats))


@functools.cache
def compiled(formats):
    """An optimizer and its step, for a name or for pairs of a pattern and a format."""
    tx = optimizer(formats if isinstance(formats, str) else dict(formats))
    return tx, jax.jit(functools.partial(jmp.apply_gradients, tx))


def trained(formats, rng, steps=2):
    tx, step = compiled(formats if isinstance(formats, str) else (*formats.items(),))
    params = weights(rng)
    opt_state = tx.init(params)
    for _ in range(steps):
        params, opt_state = step(gradients(rng, 2.0**15), opt_state, params)
    return {"params": params, "opt": opt_state, "step": steps}


def moments(state):
    return decoded(state["opt"].inner_state.inner_state, state["opt"].inner_state.layout)[0]


def through_bytes(state, tmp_path):
    data = checkpoint.to_bytes(state, policy="bf16")
    return lambda template, **options: checkpoint.from_bytes(template, data, policy="bf16", **options)


def through_a_directory(state, tmp_path):
    checkpoint.save(tmp_path / "one", state, policy="bf16")
    return lambda template, **options: checkpoint.restore(tmp_path / "one", template, policy="bf16", **options)


@pytest.mark.parametrize("trip", [through_bytes, pytest.param(through_a_directory, marks=pytest.mark.slow)])
@pytest.mark.parametrize("here", FORMATS)
@pytest.mark.parametrize("there", FORMATS)
def test_another_format_is_refused_or_converted(there, here, trip, rng, tmp_path):
    """Converted, a moment is a neighbor of what it was; what is stored as before is the same to the bit."""
    saved, template = trained(FORMATS[there], rng), trained(FORMATS[here], rng, steps=0)
    restore = trip(saved, tmp_path)
    if there == here:
        assert_identical(restore(template), saved)
    else:
        with pytest.raises(jmp.errors.CheckpointMismatchError, match="migrate=True"):
            restore(template)
    found = restore(template, migrate=True)
    assert jax.tree.structure(found) == jax.tree.structure(template)
    assert_identical(found["params"], saved["params"])
    assert_identical(found["opt"].inner_state.low, saved["opt"].inner_state.low)
    assert_identical(found["opt"].inner_state.step, saved["opt"].inner_state.step)
    assert_identical(moments(found).count, moments(saved).count)
    for kept in found["opt"].inner_state.layout.kept:
        field, name = ("nu" if ".nu" in kept.key else "mu"), kept.param[2:-2]
        was, now = (getattr(moments(state), field)[name] for state in (saved, found))
        bound = moment_bound(kept.format, was, moments(found).nu[name] if field == "mu" else None)
        assert (np.abs(np.float64(now) - np.float64(was)) <= bound).all(), kept.key
    assert_identical(restore(jax.eval_shape(lambda: template) | {"step": 0}, migrate=True), found)


def test_the_refusal_names_both_formats(rng):
    restore = through_bytes(trained("8bit", rng), None)
    with pytest.raises(
        jmp.errors.CheckpointMismatchError,
        match=r"'opt/inner_state/inner_state/0/nu/bias' is stored as Log\(highest=7\) in .* Log\(highest=20\) in",
    ):
        restore(trained(FORMATS["another range"], rng, steps=0))


def test_a_format_of_somebody_else_stays_as_it_is(rng):
    saved = trained({"nu": Own()}, rng)
    restore = through_bytes(saved, None)
    assert_identical(restore(trained({"nu": Own()}, rng, steps=0)), saved)
    for migrate, message in ((False, "Own in the checkpoint and as Log"), (True, "Own in .* cannot convert it")):
        with pytest.raises(jmp.errors.CheckpointMismatchError, match=message):
            restore(trained({"nu": "log"}, rng, steps=0), migrate=migrate)


@pytest.mark.parametrize("migrate", [False, True])
def test_low_bits_complete_numbers_of_one_dtype(migrate, rng):
    """Those of bfloat16 are other fractions in float16."""
    restore = through_bytes(trained("float32", rng), None)
    tx, params = optimizer("float32"), weights(rng, jnp.float16)
    with pytest.raises(jmp.errors.CheckpointMismatchError, match=r"low bits of bfloat16 in .* low bits of float16 in"):
        restore({"params": params, "opt": tx.init(params), "step": 0}, migrate=migrate)


@pytest.mark.parametrize("migrate", [False, True])
@pytest.mark.parametrize("params", ["split16", "stochastic"])
def test_another_format_of_parameters_has_a_way(params, migrate, rng):
    """From there `from_full_precision` changes it."""
    restore = through_bytes(trained("8bit", rng), None)
    tx, seen = optimizer("8bit", params), weights(rng)
    with pytest.raises(jmp.errors.CheckpointMismatchError, match=r"in this one and call optim\.from_full_precision"):
        restore({"params": seen, "opt": tx.init(seen), "step": 0}, migrate=migrate)


def other_header(data, edit):
    parts = serialization.msgpack_restore(data)
    header = {name: value for name, value in parts["header"].items() if name != "checksum"}
    edit(header)
    header["checksum"] = _state._checksum(header)
    return serialization.msgpack_serialize({"header": header, "state": parts["state"]})


EDITS = {
    "without formats": lambda header: header.pop("formats"),
    "without a policy": lambda header: header.pop("policy"),
    "without loss scales": lambda header: header.pop("loss_scales"),
    "with more": lambda header: header.update(layout="rows"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("migrate", [False, True])
def test_a_header_of_another_version_is_called_that(edit, migrate):
    state = {"w": jnp.ones(3)}
    data = other_header(checkpoint.to_bytes(state, policy="full"), EDITS[edit])
    with pytest.raises(jmp.errors.CorruptCheckpointError, match="another version of jmp_lite wrote it"):
        checkpoint.from_bytes(state, data, policy="full", migrate=migrate)


def test_a_format_with_other_settings_is_not_guessed(rng):
    saved = trained("8bit", rng)

    def edit(header):
        for entry in header["formats"].values():
            entry["format"] = entry["format"].replace("highest", "lowest")

    data = other_header(checkpoint.to_bytes(saved, policy="bf16"), edit)
    with pytest.raises(jmp.errors.CheckpointMismatchError, match=r"Log\(lowest=7\) in the checkpoint, which is not a"):
        checkpoint.from_bytes(saved, data, policy="bf16", migrate=True)


def in_jit(save):
    return jax.jit(lambda w: save({"w": w}))(jnp.ones(2))


MISUSE = {
    "a number for a path": (lambda path: checkpoint.save(3, {"w": jnp.ones(2)}, policy="full"), "string or a .* got 3"),
    "no path": (lambda path: checkpoint.CheckpointManager(None, policy="full"), "got None"),
    "a file for a directory": (lambda path: checkpoint.CheckpointManager(path / "file", policy="full"), "is a file"),
    "bytes under jit": (
        lambda path: jax.jit(lambda w: checkpoint.to_bytes({"w": w}, policy="full"))(1.0),
        "'w' is traced",
    ),
    "a directory under jit": (
        lambda path: jax.jit(lambda w: checkpoint.save(path / "one", {"w": w}, policy="full"))(1.0),
        "'w' is traced",
    ),
}


@pytest.mark.parametrize(("call", "message"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_quoted(call, message, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(jmp.errors.InvalidCheckpointError, match=message):
        call(tmp_path)
