"""Checkpoints of a running job: what is restored is what was saved, or the last good one, or an error that says why."""
# ruff: noqa: SIM300 - the expected value comes first

import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.checkpoints import POLICY, manage, sharding
from support.comparisons import assert_identical

import jmp_lite as jmp
from jmp_lite import checkpoint

POSITION = 2**40 + 3  # in the data: no int32 holds it


def place(state, devices):
    """The state on so many devices: rows sharded where they divide, the rest replicated."""

    def put(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        rows = leaf.ndim and leaf.shape[0] % devices == 0
        return jax.device_put(leaf, sharding(devices, *(("data",) if rows else ())))

    return jax.tree.map(put, state)


def make_state(key, scale=None, dtype=jnp.float32, step=0):
    """Parameters, an optimizer with momentum and a loss scale, a key, and two counters."""
    params = {"w": jax.random.normal(key, (16, 5), dtype), "b": jnp.zeros(5, dtype), "frozen": None}
    tx = jmp.loss_scaled(optax.sgd(0.1, momentum=0.9), jmp.DynamicLossScale(2.0**10) if scale is None else scale)
    opt_state = jax.tree.map(lambda x: x + x.dtype.type(step), tx.init(params))
    return {
        "params": params,
        "opt_state": opt_state,
        "rng": jax.random.fold_in(key, step),
        "step": step,
        "position": POSITION + step,
        "shuffle": np.arange(7) + step,
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of three steps from eight devices, and the states."""
    directory = tmp_path_factory.mktemp("saved")
    states = {step: place(make_state(jax.random.key(step), step=step), 8) for step in (1, 2, 3)}
    with manage(directory) as manager:
        assert [manager.save(step, state) for step, state in states.items()] == [True] * 3
    return directory, states


@pytest.fixture
def copied(saved, tmp_path):
    """The same, to be damaged."""
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run", saved[1]


# --- The same bits --------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("abstract", [False, True], ids=["arrays", "ShapeDtypeStruct"])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_checkpoint_of_eight_devices_is_exact_on_fewer(saved, key, devices, abstract):
    """Values come from the checkpoint, places from the template, which may have no values."""
    directory, states = saved
    template = place(make_state(key), devices)
    if abstract:
        given = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x,
            template,
        )
    with manage(directory) as manager:
        step, state = manager.restore(given if abstract else template)
    assert 3 == step
    assert_identical(state, states[3])
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(template), strict=True):
        assert type(leaf) is type(like)
        assert not isinstance(leaf, jax.Array) or leaf.sharding == like.sharding


@pytest.mark.parametrize("mesh", [{"a": 8}, {"a": 2, "b": 4}], ids=str)
@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=str)
def test_state_on_any_mesh_survives(mesh, axis_type, rng, tmp_path):
    """Two axes, explicit sharding, and the mesh set as the current one."""
    mesh = jax.make_mesh(tuple(mesh.values()), tuple(mesh), (axis_type,) * len(mesh))
    with jax.set_mesh(mesh):
        w = jax.device_put(rng.standard_normal((16, 8), np.float32), jax.sharding.NamedSharding(mesh, jax.P("a")))
        with manage(tmp_path) as manager:
            manager.save(1, {"w": w})
            _, state = manager.restore({"w": jnp.zeros_like(w)})
    assert_identical(state, {"w": w})
    assert state["w"].sharding == w.sharding


def test_state_may_be_donated_and_changed_at_once(rng, tmp_path):
    """What the program does to its arrays after ``save`` does not reach the checkpoint."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    shuffle = np.zeros(5, np.int64)
    for spec in ((), ("data",)):
        x = jax.device_put(jnp.zeros((64, 1024)), sharding(8, *spec))
        with manage(tmp_path / str(len(spec)), max_to_keep=5) as manager:
            for step in range(5):
                shuffle[:] = step
                manager.save(step, {"x": x, "shuffle": shuffle})
                x = add(x)
                shuffle[:] = -1
            manager.wait()
            for step in range(5):
                _, state = manager.restore({"x": x, "shuffle": shuffle}, step=step)
                assert_identical(state, {"x": jnp.full((64, 1024), float(step)), "shuffle": np.full(5, step)})


def test_number_and_scalar_array_stand_for_each_other(tmp_path):
    """A step counted in Python is restored into an array and the other way round, if it fits."""
    with manage(tmp_path) as manager:
        manager.save(1, {"python": 3, "array": jnp.int32(4), "position": POSITION})
        _, state = manager.restore({"python": jnp.int32(0), "array": 0, "position": 0})
        assert {"python": 3, "array": 4, "position": POSITION} == state
        assert [jax.Array, int] == [jax.Array if isinstance(state["python"], jax.Array) else 0, type(state["array"])]
        with pytest.raises(jmp.errors.CheckpointMismatchError, match=rf"number {POSITION}, which int32 cannot hold"):
            manager.restore({"python": 0, "array": 0, "position": jnp.int32(0)})


# --- Which steps ----------------------------------------------------------------------------------


def test_interval_and_max_to_keep_choose_the_steps(tmp_path):
    """Multiples of ``save_interval_steps`` are saved, the newest are kept, and a step is saved once."""
    with manage(tmp_path, save_interval_steps=5, max_to_keep=2) as manager:
        assert manager.latest_step() is None
        assert [5, 10, 15, 20] == [step for step in range(1, 24) if manager.save(step, {"w": jnp.ones(2)})]
        assert not manager.save(20, {"w": jnp.ones(2)})
        assert 20 == manager.latest_step()
    assert {"15", "20"} == {path.name for path in tmp_path.iterdir()}


def test_run_that_did_not_start_from_the_directory_is_refused(copied, key):
    """Otherwise its checkpoints would be dropped, because there are later ones."""
    with (
        manage(copied[0]) as manager,
        pytest.raises(jmp.errors.CheckpointMismatchError, match=r"Step 2 .* has step 3 already"),
    ):
        manager.save(2, make_state(key))


# --- Damage ---------------------------------------------------------------------------------------

# Orbax 0.12 (November 2026) leaves reads under way when one fails, and their event loop closes before they end.
damages = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def flip(data, rng):
    """The bytes with one bit changed."""
    changed = bytearray(data)
    changed[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


DAMAGE = {
    "deleted": lambda data, rng: None,
    "emptied": lambda data, rng: b"",
    "truncated": lambda data, rng: data[: rng.integers(1, len(data))],
    "flipped": flip,
    "zeroed": lambda data, rng: bytes(len(data)),
}


@damages
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_to_any_file_never_gives_wrong_numbers(damage, copied, rng, key):
    """The step is restored exactly, where the file was not needed, or the one before it, with a warning."""
    directory, states = copied
    template, outcomes = make_state(key), {}
    for file in sorted(path for path in (directory / "3").rglob("*") if path.is_file()):
        data = file.read_bytes()
        damaged = damage(data, rng)
        file.unlink() if damaged is None else file.write_bytes(damaged)
        with manage(directory) as manager, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            step, state = manager.restore(template)
        outcomes[str(file.relative_to(directory / "3"))] = step
        assert_identical(state, states[step])
        assert [jmp.errors.CorruptCheckpointWarning] * (3 - step) == [warning.category for warning in warned]
        file.write_bytes(data)
    assert set(outcomes.values()) <= {2, 3}
    assert 2 == outcomes["header/metadata"] == outcomes["state/manifest.ocdbt"]


@damages
def test_changed_values_are_noticed(rng, tmp_path):
    """One bit of an array that lies as it is in a file: Orbax gives it back, the digest does not match."""
    states = {step: {"w": rng.integers(0, 256, 5000).astype(np.uint8)} for step in (1, 2)}
    raw = states[2]["w"][1000:1100].tobytes()  # random bytes cannot be compressed
    with manage(tmp_path) as manager:
        for step, state in states.items():
            manager.save(step, state)
    files = [path for path in (tmp_path / "2" / "state").rglob("*") if path.is_file() and raw in path.read_bytes()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes().replace(raw, flip(raw, rng)))
    with manage(tmp_path) as manager, pytest.warns(jmp.errors.CorruptCheckpointWarning) as warned:
        step, state = manager.restore({"w": np.zeros(5000, np.uint8)})
    assert 1 == step
    assert_identical(state, states[1])
    message = str(warned[0].message)
    assert message.startswith("Step 2 cannot be restored, going back to step 1. ")
    assert str(tmp_path / "2") in message
    assert "The values of 'w' are not those that were saved" in message


@damages
def test_values_of_another_checkpoint_are_noticed(rng, tmp_path):
    """Each is sound by itself; with the values of the other neither is what was saved."""
    state = {"w": rng.integers(0, 256, 5000).astype(np.uint8)}
    for name, values in (("a", state), ("b", {"w": 255 - state["w"]})):
        jmp.checkpoint.save(tmp_path / name, values, policy="full")
    (tmp_path / "a" / "state").rename(tmp_path / "of_a")
    (tmp_path / "b" / "state").rename(tmp_path / "a" / "state")
    (tmp_path / "of_a").rename(tmp_path / "b" / "state")
    for name in ("a", "b"):
        with pytest.raises(jmp.errors.CorruptCheckpointError, match="The values of 'w' are not those that were saved"):
            jmp.checkpoint.restore(tmp_path / name, state, policy="full")


@damages
def test_damaged_checkpoint_makes_room_for_the_next(copied, key):
    """After falling back, the run resumes from there: steps follow, and what was damaged is kept apart."""
    directory, states = copied
    shutil.rmtree(directory / "3" / "state" / "d")
    (directory / "4.orbax-checkpoint-tmp").mkdir()
    for of_an_earlier_run in ("3.corrupt", "3.corrupt.1"):
        (directory / of_an_earlier_run).mkdir()
    with manage(directory) as manager:
        with pytest.warns(jmp.errors.CorruptCheckpointWarning) as warned:
            step, _ = manager.restore(make_state(key))
        assert 2 == step == manager.latest_step()
        assert ["Step 4 ", "Step 3 "] == [str(w.message)[:7] for w in warned]
        assert manager.save(3, states[3])
        assert 3 == manager.latest_step()
        assert_identical(manager.restore(make_state(key)), (3, states[3]))
    assert {"1", "2", "3", "3.corrupt", "3.corrupt.1", "3.corrupt.2"} == {path.name for path in directory.iterdir()}


@damages
def test_chosen_step_is_restored_or_nothing(copied, key):
    """With ``step=`` there is no falling back."""
    directory, states = copied
    with manage(directory) as manager:
        step, state = manager.restore(make_state(key), step=2)
        assert 2 == step
        assert_identical(state, states[2])
        with pytest.raises(jmp.errors.CheckpointNotFoundError, match=r"no checkpoint in .*/7"):
            manager.restore(make_state(key), step=7)
        shutil.rmtree(directory / "2" / "state")
        with pytest.raises(jmp.errors.CorruptCheckpointError, match=r"checkpoint in .*/2 is damaged"):
            manager.restore(make_state(key), step=2)


@damages
def test_no_good_checkpoint_is_an_error_that_lists_what_was_tried(copied, key):
    """A run does not silently begin again where there was something to resume from."""
    directory, _ = copied
    for step in (1, 2, 3):
        (directory / str(step) / "header" / "metadata").write_text("{}")
    with manage(directory) as manager:
        with pytest.raises(jmp.errors.CorruptCheckpointError) as error:
            manager.restore(make_state(key))
        with pytest.raises(jmp.errors.CorruptCheckpointError, match=r"No checkpoint in .* can be restored"):
            manager.restore(make_state(key))  # tries again
        with pytest.raises(jmp.errors.CheckpointMismatchError, match="has step 3 already"):
            manager.save(1, make_state(key))
    for step in (1, 2, 3):
        assert f"step {step}: The checkpoint in {directory / str(step)} is damaged. ValueError: its header" in str(
            error.value
        )


def test_first_checkpoint_left_unfinished_is_a_fresh_start(tmp_path, key):
    """Nothing was lost, but it is said."""
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    with manage(tmp_path) as manager:
        with (
            pytest.warns(jmp.errors.CorruptCheckpointWarning, match="Step 5 .* to the beginning"),
            pytest.raises(jmp.errors.CheckpointNotFoundError, match="no checkpoint in"),
        ):
            manager.restore(make_state(key))
        assert manager.save(5, make_state(key))


# --- Another program ------------------------------------------------------------------------------

SCALES = {
    "static": jmp.StaticLossScale(8.0),
    "noop": jmp.NoOpLossScale(),
    "megatron": jmp.DynamicLossScale(hysteresis=2),
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("back", [False, True], ids=["to", "from"])
def test_changed_loss_scale_is_an_error_or_migrates(scale, back, key, tmp_path):
    """The message names both classes; a migration continues with the template's own scale."""
    old, new = make_state(key, step=3), make_state(jax.random.fold_in(key, 1), scale)
    old, new = (new, old) if back else (old, new)
    names = [type(state["opt_state"].loss_scale).__name__ for state in (old, new)]
    with manage(tmp_path) as manager:
        manager.save(1, old)
        with pytest.raises(
            jmp.errors.InvalidLossScaleError, match=rf"'opt_state/loss_scale' is a {names[0]}\(.*, but a {names[1]}\("
        ):
            manager.restore(new)
        _, state = manager.restore(new, migrate=True)
    assert_identical(state["opt_state"].loss_scale, new["opt_state"].loss_scale)
    assert_identical(
        {**state, "opt_state": state["opt_state"]._replace(loss_scale=None)},
        {**old, "opt_state": old["opt_state"]._replace(loss_scale=None)},
    )


@pytest.mark.filterwarnings("ignore:Parameters of 16 bits")
def test_changed_policy_is_an_error_or_migrates(key, tmp_path):
    """Arrays are cast to the dtypes of the template; integers, keys and numbers stay."""
    old, new = make_state(key, step=3), place(make_state(key, dtype=jnp.bfloat16), 4)
    with manage(tmp_path) as manager:
        manager.save(1, old)
    with manage(tmp_path, policy="bf16") as manager:
        with pytest.raises(jmp.errors.PolicyMismatchError, match=r"'p=full,c=f16,o=full', but .* or pass migrate=True"):
            manager.restore(new)
        _, state = manager.restore(new, migrate=True)
    assert_identical(state["params"], jax.tree.map(lambda x: x.astype(jnp.bfloat16), old["params"]))
    assert_identical(state["rng"], old["rng"])
    assert POSITION + 3 == state["position"]
    assert state["params"]["w"].sharding == new["params"]["w"].sharding
    checkpoint.save(tmp_path / "alone", old, policy=POLICY)
    assert_identical(checkpoint.restore(tmp_path / "alone", new, policy="bf16", migrate=True), state)


MISFITS = {
    "only the checkpoint has 'params/b'": lambda s: {**s, "params": {"w": s["params"]["w"]}},
    "only the template has 'a', 'c', 'd' and 1 more": lambda s: {**s, **dict.fromkeys("acde", 0)},
    r"'params/w' is float32\[16,5\] in the checkpoint and bfloat16\[16,5\] in the template. .*migrate=True": lambda s: {
        **s,
        "params": {**s["params"], "w": s["params"]["w"].astype(jnp.bfloat16)},
    },
    r"'params/b' is float32\[5\] in the checkpoint and float32\[6\] in the template": lambda s: {
        **s,
        "params": {**s["params"], "b": jnp.zeros(6)},
    },
    r"'rng' is key<fry>\[\] in the checkpoint and key<rbg>\[\]": lambda s: {**s, "rng": jax.random.key(0, impl="rbg")},
    r"'step' is a Python number \(int64\) .* float32\[\] in the template": lambda s: {**s, "step": jnp.float32(0)},
}


@pytest.mark.parametrize("message", MISFITS)
def test_template_that_does_not_fit_is_an_error_that_names_the_paths(message, saved, key):
    """No step is passed over for it: the program is wrong, not the checkpoint."""
    template = MISFITS[message](make_state(key))
    for migrate in {False, "bfloat16" not in message}:
        with (
            manage(saved[0]) as manager,
            pytest.raises(jmp.errors.CheckpointMismatchError, match=message.split(" .*mig")[0]),
        ):
            manager.restore(template, migrate=migrate)


def test_paths_that_become_one_on_disk_are_refused(tmp_path):
    """Orbax would write one over the other."""
    state = {"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}
    with (
        manage(tmp_path) as manager,
        pytest.raises(jmp.errors.CheckpointMismatchError, match="would be stored under one name"),
    ):
        manager.save(1, state)
