"""Bytes are checked as directories are: no damage gives other values, and no other template is filled."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from support.comparisons import assert_identical, standard

import jmp_lite as jmp
from jmp_lite import checkpoint
from jmp_lite.checkpoint import _digest


def make_state(scale=None):
    """Leaves of every kind."""
    params = {"w": jnp.arange(6.0).reshape(2, 3) + 0.5, "h": jnp.ones(3, jnp.bfloat16), "none": jnp.zeros((0, 2))}
    inner = jmp.optim.stored(optax.sgd(0.1, momentum=0.9), params="split8", state="8bit")
    tx = jmp.loss_scaled(inner, jmp.DynamicLossScale(2.0**10) if scale is None else scale)
    return {
        "params": params,
        "opt": tx.init(params),
        "key": jax.random.key(3),
        "int": 7,
        "bool": True,
        "complex": 1 + 2j,
        "numpy": np.arange(3),
        "scalar": np.float32(2),
    }


STATE = make_state()
DATA = checkpoint.to_bytes(STATE, policy="full")


def outcome(data):
    """``"saved"`` if the bytes give what was saved, otherwise the name of the error."""
    try:
        restored = checkpoint.from_bytes(STATE, data, policy="full")
    except jmp.errors.JmpLiteError as error:
        return type(error).__name__
    assert_identical(restored, STATE)
    return "saved"


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_every_byte_counts(every, rng):
    """A bit of any byte is flipped: never other values, never an error of somebody else."""
    for at in range(rng.integers(every), len(DATA), every):
        changed = bytearray(DATA)
        changed[at] ^= 1 << int(rng.integers(8))
        assert outcome(bytes(changed)) in {"CorruptCheckpointError", "ForeignCheckpointError", "saved"}, at


def test_no_byte_can_go_or_come(rng):
    """Cut at either end, prolonged, doubled, empty."""
    cuts = rng.integers(1, len(DATA), size=50)
    bad = [b"", DATA + b"\0", DATA * 2, *(DATA[:at] for at in cuts), *(DATA[at:] for at in cuts)]
    assert {outcome(data) for data in bad} == {"CorruptCheckpointError"}


def test_arrays_of_another_checkpoint_are_refused():
    """Each half is sound by itself; together they are not what was saved."""
    other = jax.tree.map(lambda leaf: leaf, STATE) | {"numpy": np.arange(3) + 1}
    halves = [serialization.msgpack_restore(data) for data in (DATA, checkpoint.to_bytes(other, policy="full"))]
    mixed = serialization.msgpack_serialize({"header": halves[0]["header"], "state": halves[1]["state"]})
    with pytest.raises(jmp.errors.CorruptCheckpointError, match="The values of 'numpy' are not those that were saved"):
        checkpoint.from_bytes(STATE, mixed, policy="full")


MISFITS = {
    r"float32\[2,3\] in the checkpoint and float32\[6\] in the template": lambda s: s["params"] | {"w": jnp.zeros(6)},
    r"'params/h' is bfloat16\[3\] in the checkpoint and float16\[3\]": lambda s: (
        s["params"] | {"h": jnp.ones(3, jnp.float16)}
    ),
    "only the template has 'params/more'": lambda s: s["params"] | {"more": jnp.zeros(1)},
    "only the checkpoint has 'params/h', 'params/none', 'params/w'": lambda s: {},
}


@pytest.mark.parametrize("message", MISFITS)
def test_template_that_does_not_fit_is_refused(message):
    """Shape, dtype and structure, as in directories."""
    with pytest.raises(jmp.errors.CheckpointMismatchError, match=message):
        checkpoint.from_bytes({**STATE, "params": MISFITS[message](STATE)}, DATA, policy="full")


def test_policy_and_loss_scale_migrate_on_purpose():
    """As in directories: arrays are cast, the scale is the template's own."""
    template = make_state(jmp.NoOpLossScale())
    template["params"] = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.bfloat16), template["params"])
    with pytest.raises(jmp.errors.PolicyMismatchError, match="pass migrate=True"):
        checkpoint.from_bytes(template, DATA, policy="bf16")
    with pytest.raises(jmp.errors.InvalidLossScaleError, match="pass migrate=True"):
        checkpoint.from_bytes(template, DATA, policy="full")
    migrated = checkpoint.from_bytes(template, DATA, policy="bf16", migrate=True)
    assert_identical(migrated["params"]["w"], STATE["params"]["w"].astype(jnp.bfloat16))
    assert isinstance(migrated["opt"].loss_scale, jmp.NoOpLossScale)


def test_bytes_of_flax_are_called_that():
    """They are not damaged."""
    with pytest.raises(jmp.errors.ForeignCheckpointError, match=r"flax\.serialization\.from_bytes"):
        checkpoint.from_bytes({"w": jnp.zeros(2)}, serialization.to_bytes({"w": jnp.ones(2)}), policy="full")


@pytest.mark.parametrize("state", [{"header": {"a": 1}, "w": 2}, {"header": 1.0, "state": 2.0}, 3, [1, 2]], ids=str)
def test_bytes_of_flax_may_look_like_ours(state):
    with pytest.raises(jmp.errors.ForeignCheckpointError, match=r"flax\.serialization\.from_bytes"):
        checkpoint.from_bytes(state, serialization.to_bytes(state), policy="full")


def test_bytes_are_open_and_restored_arrays_are_the_callers():
    """Flax reads them; NumPy arrays may be changed, JAX arrays donated."""
    assert serialization.msgpack_restore(DATA)["state"]["params/w"].tolist() == STATE["params"]["w"].tolist()
    restored = checkpoint.from_bytes(STATE, DATA, policy="full")
    restored["numpy"][:] = -1
    doubled = jax.jit(lambda x: 2 * x, donate_argnums=0)(restored["params"]["w"])
    assert_identical(doubled, 2 * STATE["params"]["w"])
    assert outcome(DATA) == "saved"


NO_LEAVES = {
    "text": "text",
    "object": object(),
    "structure": jax.ShapeDtypeStruct((2,), jnp.float32),
    "byte order": np.ones(2, np.dtype(np.float32).newbyteorder()),
    "texts": np.array(["ab"]),
    "bytes": np.array([b"ab"]),
    "objects": np.array([None]),
    "records": np.zeros(2, [("a", "f4")]),
    "dates": np.array(["2026-01-01"], "datetime64[D]"),
    "integer of 70 bits": 2**70,
}


@pytest.mark.parametrize("leaf", NO_LEAVES.values(), ids=NO_LEAVES)
def test_leaf_that_is_no_array_is_refused(leaf, tmp_path):
    """In both forms, by name and dtype."""
    of_dtype = re.escape(f" of dtype {leaf.dtype!r}") if hasattr(leaf, "dtype") else ""
    for save in (checkpoint.to_bytes, lambda state, policy: checkpoint.save(tmp_path / "a", state, policy=policy)):
        with pytest.raises(jmp.errors.InvalidCheckpointError, match=rf"Leaf 'a/b' is .*{of_dtype}, and a"):
            save({"a": {"b": leaf}}, policy="full")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("large", [False, True], ids=["read by NumPy", "read in place"])
@pytest.mark.parametrize("abstract", [False, True], ids=["arrays", "ShapeDtypeStruct"])
def test_fresh_template_gives_arrays_that_may_go_anywhere(large, abstract, rng, tmp_path, monkeypatch):
    """Restored arrays are tied to no device, may be donated, and hold what was saved."""
    monkeypatch.setattr("jmp_lite.checkpoint._state._LARGE", 0 if large else 2**40)
    state = {"w": jnp.asarray(rng.standard_normal((300, 100), np.float32)), "n": jnp.arange(7)}
    template = jax.eval_shape(lambda: state) if abstract else jax.tree.map(jnp.zeros_like, state)
    checkpoint.save(tmp_path / "step", state, policy="full")
    restored = checkpoint.restore(tmp_path / "step", template, policy="full")
    assert_identical(restored, state)
    assert not any(leaf.committed for leaf in jax.tree.leaves(restored))
    assert_identical(jax.jit(lambda x: x + 1, donate_argnums=0)(restored["w"]), state["w"] + 1)
    assert restored["w"].is_deleted()


def test_fresh_template_is_not_hashed_element_by_element(monkeypatch, tmp_path):
    """NumPy, ten times as slow as XLA, hashes no more than the last few elements of an array."""
    hashed = []
    sums = _digest._line_sums
    monkeypatch.setattr(_digest, "_line_sums", lambda words, *rest: hashed.append(len(words)) or sums(words, *rest))
    state = {"w": jnp.ones((1 << 20) + 3), "numpy": np.ones((1 << 18) + 5)}
    checkpoint.save(tmp_path / "step", state, policy="full")
    checkpoint.restore(tmp_path / "step", jax.tree.map(lambda x: 0 * x, state), policy="full")
    assert max(hashed) < min(_digest._PIECES)


def test_a_run_in_float32_goes_on_in_fewer_bytes(rng):
    """Weights with their low bits, moments and step counts; the same as `from_full_precision` makes of them."""
    inner = standard(optax.adamw(1e-2))
    plain, tx = (jmp.loss_scaled(t) for t in (inner, jmp.optim.stored(inner, params="split8", state="8bit")))
    full = {"w": jnp.asarray(rng.standard_normal((4, 6)), jnp.float32), "norm": jnp.ones(6)}
    opt_state, step = plain.init(full), jax.jit(functools.partial(jmp.apply_gradients, plain))
    for _ in range(3):
        grads = {name: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32) for name, leaf in full.items()}
        full, opt_state = step(grads, opt_state, full)
    data = checkpoint.to_bytes({"params": full, "opt": opt_state, "step": 3}, policy="mixed_bfloat16")
    policy = jmp.PolicyMap({"norm": "float32"}, default="bf16")
    params, state = jmp.optim.from_full_precision(tx, full, policy)
    template = {"params": params, "opt": state, "step": 0}
    expected_params, expected = jmp.optim.from_full_precision(tx, full, policy, opt_state=opt_state)
    found = checkpoint.from_bytes(template, data, policy="bf16", migrate=True)
    assert_identical(found, {"params": expected_params, "opt": expected, "step": 3})
    abstract = {**jax.eval_shape(lambda: {"params": params, "opt": state}), "step": 0}
    assert_identical(checkpoint.from_bytes(abstract, data, policy="bf16", migrate=True), found)
    own = checkpoint.to_bytes(found, policy="bf16")
    assert_identical(checkpoint.from_bytes(template, own, policy="mixed_bfloat16", migrate=True), found)
    twice = {**template, "average": params}
    state = {"params": full, "opt": opt_state, "step": 3, "average": full}
    both = checkpoint.to_bytes(state, policy="mixed_bfloat16")
    with pytest.raises(jmp.errors.CheckpointMismatchError, match=r"parameter 'w' .* 'average/w', 'params/w'"):
        checkpoint.from_bytes(twice, both, policy="bf16", migrate=True)
