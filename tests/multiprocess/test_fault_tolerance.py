"""Jobs of several processes lose one of them, a checkpoint or a number, and continue as if nothing had happened."""

import json
import os
import shutil
import time
import zlib

import jax
import numpy as np
import pytest
from support import train
from support.harness import Job

import jmp_lite as jmp

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

SEED = zlib.crc32(f"{os.environ['JMP_LITE_SEED']} multiprocess".encode())
STEPS, EVERY = 40, 5
RUN = {"seed": SEED, "steps": STEPS, "every": EVERY, "fault_rate": 0.1}
#: The hosts and devices per host on which a run continues, four devices each time.
RESUMED = [(2, 2), (1, 4), (4, 1)]


def records(job, processes):
    """What each process has noted."""
    return [json.loads((job.folder / f"process_{i}.json").read_text()) for i in range(processes)]


def final_state(job, processes):
    """The arrays at the end, put together; what several devices hold must have the same bits on all."""
    blocks = {}
    for process in range(processes):
        for name, block in np.load(job.folder / f"process_{process}.npz").items():
            assert blocks.setdefault(name, block).tobytes() == block.tobytes(), f"{name} differs in process {process}"
    rows = {}
    for name, block in blocks.items():
        path, row = name.rsplit(" ", 1)
        rows.setdefault(path, {})[int(row)] = block
    return {
        path: np.concatenate([found[row] for row in sorted(found)]) if len(found) > 1 else found[0]
        for path, found in rows.items()
    }


def assert_same_bits(actual, expected):
    """Asserts that two states have the same arrays."""
    assert actual.keys() == expected.keys()
    assert [path for path in expected if actual[path].tobytes() != expected[path].tobytes()] == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of two processes with two devices each: its final state, losses and checkpoints."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with Job(folder / "job", 2, 2, **RUN, directory=str(folder / "checkpoints")) as job:
        job.succeed()
    return final_state(job, 2), records(job, 2)[0]["losses"], folder / "checkpoints"


def assert_resumes(uninterrupted, folder, processes, devices, **settings):
    """Runs to the end from the checkpoints of a folder and compares; returns the step it began from and the logs."""
    expected, losses, _ = uninterrupted
    with Job(folder / "resumed", processes, devices, **{**RUN, **settings}) as job:
        job.succeed()
    assert_same_bits(final_state(job, processes), expected)
    (first,) = {record["first"] for record in records(job, processes)}
    for record in records(job, processes):
        assert record["losses"] == {step: loss for step, loss in losses.items() if int(step) > first}
    return first, [job.output(process) for process in range(processes)]


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, 10))])
def test_run_killed_at_any_step_ends_as_if_it_had_not_been(number, uninterrupted, tmp_path):
    """``kill -9`` of one process at a random step, restart: the final state has the same bits, on any hosts."""
    rng = np.random.default_rng([SEED, number])
    step, victim = int(rng.integers(1, STEPS)), int(rng.integers(2))
    directory = str(tmp_path / "checkpoints")
    print(f"seed {SEED}: process {victim} is killed at step {step}")
    with Job(tmp_path / "killed", 2, 2, **RUN, directory=directory, pause=0.02) as job:
        job.wait_for(victim, f"step {step}")
        job.kill(victim)
    first, _ = assert_resumes(uninterrupted, tmp_path, *RESUMED[number % len(RESUMED)], directory=directory)
    assert first % EVERY == 0
    assert step - 2 * EVERY < first <= STEPS


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, 6))])
def test_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(number, tmp_path):
    """An unfinished checkpoint is not used, and the finished one before it is: only the steps since are lost."""
    rng = np.random.default_rng([SEED, 100 + number])
    delay, victim = rng.uniform(0, 0.15), int(rng.integers(2))
    directory = tmp_path / "checkpoints"
    settings = {**RUN, "steps": 3 * EVERY, "directory": str(directory), "ballast": 32}
    print(f"seed {SEED}: process {victim} is killed {delay:.3f} s after step {2 * EVERY}, which it saves meanwhile")
    with Job(tmp_path / "killed", 2, 2, **settings) as job:
        job.wait_for(victim, f"step {2 * EVERY}")
        time.sleep(delay)
        job.kill(victim)
    names = {path.name for path in directory.iterdir()}
    unfinished = {name for name in names if not name.isdigit()}
    with Job(tmp_path / "resumed", 2, 2, **settings) as job:
        job.succeed()
    assert {record["first"] for record in records(job, 2)} == {max(int(name) for name in names - unfinished)}
    for process in range(2):
        warned = f"CorruptCheckpointWarning: Step {2 * EVERY} cannot be restored" in job.output(process)
        assert warned == bool(unfinished)
    assert {path.name for path in directory.iterdir()} == {str(step * EVERY) for step in (1, 2, 3)}


def test_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(uninterrupted, tmp_path):
    """All processes restore the same step, and all say why."""
    shutil.copytree(uninterrupted[2], tmp_path / "checkpoints")
    directory = str(tmp_path / "checkpoints")
    first, logs = assert_resumes(uninterrupted, tmp_path, 2, 2, directory=directory, hidden=STEPS)
    assert first == STEPS - EVERY
    for log in logs:
        assert "stale file handle (seen by process 1)" in log
        assert f"CorruptCheckpointWarning: Step {STEPS} cannot be restored, going back to step {STEPS - EVERY}" in log


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_checkpoint_of_two_processes_is_restored_in_one(devices, uninterrupted):
    """On one, two or four devices of one process, every array has the bits that two processes saved."""
    expected, _, directory = uninterrupted
    mesh = jax.make_mesh((devices,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
    settings = train.Settings(None, 1, 0, devices, "", **RUN)
    arrays = train.place(train.initial_arrays(settings, train.optimizer(), 4), mesh, train.state_spec())
    with jmp.checkpoint.CheckpointManager(directory, policy=train.POLICY) as manager:
        step, state = manager.restore({"arrays": arrays, "step": 0, "position": 0, "local": jax.random.key(0)})
    assert (step, state["step"]) == (STEPS, STEPS)
    assert state["position"] == train.START + STEPS * 4 * train.ROWS_PER_DEVICE
    restored = jax.tree_util.tree_leaves_with_path(state["arrays"])
    for path, leaf in restored:
        data = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        assert np.asarray(data).tobytes() == expected[jax.tree_util.keystr(path)].tobytes()
        assert leaf.sharding.device_set == set(mesh.devices.flat)
    assert len(restored) == len(expected) - 1  # which has the position, too


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_infinity_on_one_device_of_one_host_skips_the_step_on_all(processes, tmp_path):
    """500 steps with random faults: the same bits on all devices, and the losses of one process with as many."""
    settings = {"seed": SEED, "steps": 500, "fault_rate": 0.05}
    print(f"seed {SEED}")
    with Job(tmp_path / "many", processes, 2, **settings) as many:
        many.succeed()
    with Job(tmp_path / "one", 1, 2 * processes, **settings) as one:
        one.succeed()
    final_state(many, processes)  # compares what the devices hold
    first, *others = records(many, processes)
    assert others == [first] * (processes - 1)
    (alone,) = records(one, 1)
    faults = [step for step in range(1, 501) if train.has_fault(SEED, settings["fault_rate"], step, 2 * processes)]
    skipped = {int(step) for step, finite in first["finite"].items() if not finite}
    assert faults
    assert skipped >= set(faults)  # the scale, as it grows, makes some more
    assert len(skipped) < 250
    assert first["finite"] == alone["finite"]
    np.testing.assert_allclose(list(first["losses"].values()), list(alone["losses"].values()), rtol=0, atol=1e-6)
