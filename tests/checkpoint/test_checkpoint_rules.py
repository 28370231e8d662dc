"""What of a state is written and read how, which parameters get low bits, and which paths and steps hold it."""

import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.experimental import multihost_utils
from support.checkpoints import manage, sharding
from support.comparisons import assert_identical, raw

import jmp_lite as jmp
from jmp_lite import checkpoint
from jmp_lite.checkpoint import _manager, _state
from jmp_lite.checkpoint._directory import absolute


def like(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


# --- What is written, and what is read how ---


def test_what_the_program_may_change_is_copied():
    """Arrays of the host; numbers and arrays of JAX stay as they are, and keys are written as their data."""
    state = {
        "array": np.arange(3),
        "scalar": np.float32(2),
        "number": 3,
        "jax": jnp.ones(2),
        "key": jax.random.key(1),
    }
    stored = _state.to_store(state)
    assert not np.shares_memory(stored["array"], state["array"])
    assert raw(stored["array"]) == raw(state["array"])
    assert isinstance(stored["scalar"], np.ndarray)
    assert stored["number"] is state["number"]
    assert stored["jax"] is state["jax"]
    assert raw(stored["key"]) == raw(jax.random.key_data(state["key"]))


PLACED = sharding(1)
#: Template, saved dtype, whether a Python number was saved; whether Orbax reads an array with a sharding, and which.
TARGETS = {
    "placed": (jax.device_put(jnp.ones(3), PLACED), "float32", False, PLACED),
    "a placed shape": (jax.ShapeDtypeStruct((3,), jnp.float32, sharding=PLACED), "bfloat16", False, PLACED),
    "a placed number": (jax.device_put(jnp.ones(()), PLACED), "float64", True, None),
    "anywhere": (jnp.ones(3), "float32", False, None),
    "of NumPy": (np.ones(_state._LARGE), "float32", False, None),
    "a number": (3, "int64", True, None),
    "large": (like("float32", _state._LARGE // 4), "float32", False, "device"),
    "not large": (like("float32", _state._LARGE // 4 - 1), "float32", False, None),
    "large as it was saved": (like("bfloat16", _state._LARGE // 4), "float32", False, "device"),
    "small as it was saved": (like("float32", _state._LARGE // 4), "bfloat16", False, None),
    "a dtype that JAX has not": (like("float32", _state._LARGE), "float64", False, None),
}


@pytest.mark.parametrize("case", TARGETS)
def test_what_a_leaf_is_read_into(case):
    """The saved dtype, in the place of the template; large ones where NumPy sees them without a copy."""
    leaf, dtype, is_number, place = TARGETS[case]
    found = _state.target({"dtype": dtype, "number": is_number}, leaf)
    assert found.dtype == dtype
    assert found.shape == np.shape(leaf)
    if place is None:
        assert isinstance(found, np.ndarray)
    else:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        assert found.sharding == (first if place == "device" else place)


#: Template, value as it was read, what is made of it.
FILLED = {
    "array of NumPy": (np.zeros(2, np.float32), np.float32([1, 2]), np.float32([1, 2])),
    "scalar of NumPy": (np.float32(0), np.float32(3)[...], np.float32(3)),
    "int": (0, np.int64(3)[...], 3),
    "float": (0.0, np.float32(3.5)[...], 3.5),
    "bool": (False, np.bool_(True)[...], True),
    "complex": (0j, np.complex128(1j)[...], 1j),
    "cast": (np.zeros(2, np.float16), np.float32([1, 2]), np.float16([1, 2])),
    "array of JAX": (jnp.zeros(2), np.float32([1, 2]), jnp.float32([1, 2])),
    "cast array of JAX": (jnp.zeros(2, jnp.bfloat16), np.float32([1, 2]), jnp.bfloat16([1, 2])),
    "shape": (like("float32", 2), np.float32([1, 2]), jnp.float32([1, 2])),
}


@pytest.mark.parametrize("case", FILLED)
def test_what_was_read_becomes_what_the_template_has(case):
    """The kind and dtype of the template; without a place there, one that is tied to no device."""
    leaf, value, expected = FILLED[case]
    found = _state.fill(leaf, value)
    assert type(found) is type(expected)
    assert raw(found) == raw(expected)
    assert not getattr(found, "committed", False)


@pytest.mark.parametrize("value", [np.float32([1, 2]), jnp.float32([1, 2])], ids=["NumPy", "JAX"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_was_read_goes_where_the_template_is(value, dtype):
    leaf = jax.device_put(jnp.zeros(2, dtype), jax.devices()[3])
    found = _state.fill(leaf, jax.device_put(value, jax.devices()[3]) if isinstance(value, jax.Array) else value)
    assert raw(found) == raw(np.asarray([1, 2], dtype))
    assert found.sharding == leaf.sharding
    assert found.committed


FACTORS = {np.int8: (127, 128), np.uint8: (255, -1), np.int32: (2**31 - 1, 2**31)}


@pytest.mark.parametrize("dtype", FACTORS)
def test_an_integer_keeps_its_value_or_is_refused(dtype):
    fits, too_large = FACTORS[dtype]
    assert _state.fill(np.zeros((), dtype), np.int64(fits)[...]) == fits
    with pytest.raises(jmp.errors.CheckpointMismatchError, match=f"has the number {too_large}, which u?int.* cannot"):
        _state.fill(np.zeros((), dtype), np.int64(too_large)[...])


STAND_INS = {
    (): jmp.NoOpLossScale(),
    ("loss_scale", "counter"): jmp.DynamicLossScale(),
    ("loss_scale", "counter", "hysteresis_left"): jmp.DynamicLossScale(hysteresis=2),
    ("of", "another", "version"): jmp.NoOpLossScale(),
}


@pytest.mark.parametrize("fields", STAND_INS, ids=str)
def test_a_loss_scale_that_was_saved_is_read_by_its_fields(fields):
    assert jax.tree.structure(_state._stand_in(list(fields))) == jax.tree.structure(STAND_INS[fields])


# --- Parameters that get low bits ---


def new_run(params):
    """The state of a run that stores its parameters in 24 bits, made from float32 ones."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx = jmp.optim.stored(optax.sgd(0.1, momentum=0.9), params="split8", state="float32")
    return {"params": params, "opt": tx.init(params)}


def test_low_bits_find_their_parameter_by_path_and_shape():
    """Other leaves of 16 bits, of the same name or of the same shape, are none."""
    params = {"a": {"w": jnp.full(3, 1.001)}, "w": jnp.full((2, 2), 1.001)}
    old = {"params": params, "opt": optax.sgd(0.1, momentum=0.9).init(params)}
    others = {"z": {"w": jnp.ones(4, jnp.bfloat16)}, "other": jnp.ones(3, jnp.bfloat16)}
    data = checkpoint.to_bytes({**old, "more": others}, policy="full")
    template = {**new_run(params), "more": jax.tree.map(jnp.zeros_like, others)}
    found = checkpoint.from_bytes(template, data, policy="full", migrate=True)
    assert_identical(found["more"], others)
    assert_identical(found["params"], jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    whole = jmp.optim.full_precision_params(found["opt"], found["params"])
    assert all(np.abs(np.asarray(leaf) - 1.001).max() < 1e-4 for leaf in jax.tree.leaves(whole))


def test_low_bits_without_a_parameter_are_told():
    params = {"w": jnp.ones(3)}
    data = checkpoint.to_bytes({"opt": optax.sgd(0.1, momentum=0.9).init(params)}, policy="full")
    with pytest.raises(jmp.errors.CheckpointMismatchError, match=r"parameter 'w' .*, and there are: none"):
        checkpoint.from_bytes({"opt": new_run(params)["opt"]}, data, policy="full", migrate=True)


# --- Paths and steps ---

PATHS = {
    "gs://bucket/run": "gs://bucket/run",
    "/abs/run": "/abs/run",
    "run": f"{pathlib.Path.cwd()}/run",
    pathlib.Path("run"): f"{pathlib.Path.cwd()}/run",
    epath.Path("gs://bucket/run"): "gs://bucket/run",
}


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_paths_are_absolute_and_addresses_stay(path):
    assert str(absolute(path)) == PATHS[path]


SMALL = {"w": jnp.ones(2)}


def test_a_step_that_is_passed_is_refused_only_where_it_would_be_saved(tmp_path):
    """Between multiples of the interval nothing is saved, whatever is there already."""
    with manage(tmp_path, save_interval_steps=2) as manager:
        assert [manager.save(step, SMALL) for step in (0, 1, 2, 3, 4)] == [True, False, True, False, True]
        assert [manager.save(step, SMALL) for step in (4, 3, 1, 5)] == [False] * 4
        for step in (2, 0):
            with pytest.raises(jmp.errors.CheckpointMismatchError, match=f"Step {step} is to be saved, .* has step 4"):
                manager.save(step, SMALL)
        assert manager.save(6, SMALL)


def test_a_coming_preemption_saves_between_multiples(tmp_path, monkeypatch):
    coming = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step in coming)
    with manage(tmp_path, save_interval_steps=10) as manager:
        assert [manager.save(step, SMALL) for step in (10, 11)] == [True, False]
        coming.append(12)
        assert manager.save(12, SMALL)
        assert manager.restore(SMALL)[0] == 12


def test_a_chosen_step_migrates_too(tmp_path):
    with manage(tmp_path) as manager:
        manager.save(1, SMALL)
        template = {"w": jnp.zeros(2, jnp.bfloat16)}
        assert_identical(manager.restore(template, step=1, migrate=True), (1, {"w": jnp.ones(2, jnp.bfloat16)}))
        with pytest.raises(jmp.errors.CheckpointMismatchError, match="bfloat16"):
            manager.restore(template, step=1)


def test_skipped_steps_are_named_and_others_are_not(tmp_path, recwarn):
    """Later ones that were left unfinished or have gone since are; earlier ones, and what was saved again, are not."""
    with manage(tmp_path, max_to_keep=None) as manager:
        for step in (2, 4):
            manager.save(step, SMALL)
    for name in ("1.orbax-checkpoint-tmp-0", "4.orbax-checkpoint-tmp-0", "notes", "5.corrupt"):
        (tmp_path / name).mkdir()
    with manage(tmp_path) as manager:
        assert manager.restore(SMALL)[0] == 4
        assert not recwarn.list
        (tmp_path / "6.orbax-checkpoint-tmp-0").mkdir()
        steps = manager._steps
        manager._steps = lambda: steps() | {5}
        assert manager.restore(SMALL)[0] == 4
    told = [str(warning.message) for warning in recwarn.list]
    assert [text.partition(",")[0] for text in told] == [f"Step {step} cannot be restored" for step in (6, 5)]
    assert all("going back to step 4." in text for text in told)
    assert "The job stopped while writing it, or another job is writing it now." in told[0]
    assert "There is no checkpoint in" in told[1]


def test_what_was_tried_and_what_was_left_unfinished_is_listed(tmp_path):
    for name in ("3", "7.orbax-checkpoint-tmp-0"):
        (tmp_path / name).mkdir()
    with (
        manage(tmp_path) as manager,
        pytest.raises(
            jmp.errors.CorruptCheckpointError, match=r"(?s)\n  step 7: .* is incomplete.*\n  step 3: .*\nRep"
        ),
    ):
        manager.restore(SMALL)


def test_unfinished_steps_go_when_the_job_first_saves(tmp_path):
    """Not before: another job may be writing them."""
    with manage(tmp_path) as manager:
        (tmp_path / "3.orbax-checkpoint-tmp-0").mkdir()
        with pytest.raises(jmp.errors.CheckpointNotFoundError), pytest.warns(jmp.errors.CorruptCheckpointWarning):
            manager.restore(SMALL)
        assert [path.name for path in tmp_path.iterdir()] == ["3.orbax-checkpoint-tmp-0"]
        manager.save(4, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["4"]


def test_a_step_damaged_after_a_save_makes_room_too(tmp_path, monkeypatch):
    """The manager that falls back has saved before; without damage, saves after the first agree on nothing."""
    agreed, in_first_process = [], _manager.in_first_process
    monkeypatch.setattr(_manager, "in_first_process", lambda *a, **k: agreed.append(a) or in_first_process(*a, **k))
    with manage(tmp_path) as manager:
        assert [manager.save(step, SMALL) for step in (1, 2, 3)] == [True] * 3
        assert len(agreed) == 2  # on the lock, and on what to remove
        manager.wait()
        shutil.rmtree(tmp_path / "3" / "state")
        with pytest.warns(jmp.errors.CorruptCheckpointWarning, match="Step 3"):
            assert manager.restore(SMALL)[0] == 2
        assert manager.latest_step() == 2
        assert manager.save(3, SMALL)
        assert manager.latest_step() == 3
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "3", "3.corrupt"}


@pytest.mark.parametrize(
    ("there", "free"),
    [
        ([], "a"),
        (["a"], "a.1"),
        (["a", "a.1"], "a.2"),
        (["a", "a.2"], "a.1"),
        (["a.1"], "a"),
        (["a", "a.1", "a.2"], "a.3"),
    ],
)
def test_damaged_steps_are_numbered(there, free, tmp_path):
    """From 1 on, and none over another."""
    for name in there:
        (tmp_path / name).mkdir()
    assert _manager._free(tmp_path, "a") == tmp_path / free


def test_an_error_in_the_background_is_raised_by_the_next_save(tmp_path):
    broken = RuntimeError("no space left")

    def fail():
        raise broken

    manager = manage(tmp_path)
    manager.save(1, SMALL)
    manager.wait()
    manager._manager.check_for_errors = fail
    with pytest.raises(RuntimeError, match="no space left"):
        manager.save(2, SMALL)
    manager._manager.close = fail
    with pytest.raises(RuntimeError, match="no space left"):
        manager.close()
    with manage(tmp_path) as other:  # the lock was given back
        assert other.save(2, SMALL)
    with pytest.raises(jmp.errors.InvalidCheckpointError, match="is closed"):
        manager.save(3, SMALL)


ADVICE = {
    "max_to_keep": "max_to_keep must be an int >= 1, or None to keep all; got 0.",
    "save_interval_steps": "save_interval_steps must be an int >= 1; got 0.",
}


@pytest.mark.parametrize("name", ADVICE)
def test_a_bad_count_says_what_may_stand_there(name, tmp_path):
    with pytest.raises(jmp.errors.InvalidCheckpointError, match=f"^{re.escape(ADVICE[name])}$"):
        manage(tmp_path, **{name: 0})


def test_a_bad_step_says_what_a_step_is(tmp_path):
    with (
        manage(tmp_path) as manager,
        pytest.raises(jmp.errors.InvalidCheckpointError, match="number of steps taken so"),
    ):
        manager.save(-1, SMALL)


def test_a_checkpoint_of_ours_without_its_header_is_damaged(tmp_path):
    """It is no plain one of Orbax, though nothing says so but its state."""
    checkpoint.save(tmp_path / "one", SMALL, policy="full")
    shutil.rmtree(tmp_path / "one" / "header")
    with pytest.raises(jmp.errors.CorruptCheckpointError, match="is damaged"):
        checkpoint.restore(tmp_path / "one", SMALL, policy="full")
    (tmp_path / "one" / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(jmp.errors.CorruptCheckpointError, match="is damaged"):
        checkpoint.restore(tmp_path / "one", SMALL, policy="full")
