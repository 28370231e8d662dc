"""``examples/pod.py``: three modes, the rows of each host, and runs that are stopped and continue."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import processes as programs

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
MODES = ("pmap", "shard_map", "jit")


@pytest.fixture
def example(monkeypatch):
    """Imports a file of the examples into this process."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # put back what the examples set
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield __import__


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment of the programs: they share what is compiled, and no launcher is around them."""
    return programs.environment(**programs.caching(tmp_path_factory.mktemp("compiled")))


@pytest.fixture
def start(environment, tmp_path):
    """Starts the example in some processes; none is left at the end."""
    started = []

    def start(*arguments, processes=1):
        coordinator = f"127.0.0.1:{programs.free_port()}"
        job = []
        for process in range(processes):
            command = [sys.executable, str(EXAMPLES / "pod.py"), *map(str, arguments)]
            if processes > 1:
                command += ["--coordinator", coordinator, "--num-processes", str(processes)]
                command += ["--process-id", str(process), "--timeout", "100"]
            log = (tmp_path / f"{len(started)}.log").open("w+")
            job.append(
                (subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT), log)
            )
            started.append(job[-1])
        return job

    yield start
    for process, log in started:
        process.kill()
        process.wait()
        log.close()


def outcome(job):
    """The exit statuses of the processes, and what they have printed."""
    statuses = [process.wait(timeout=400) for process, _ in job]
    return statuses, [pathlib.Path(log.name).read_text() for _, log in job]


def finished(job):
    """What process 0 has printed, once all have ended well."""
    statuses, outputs = outcome(job)
    assert statuses == [0] * len(job), "\n".join(outputs)
    return outputs[0]


def checksum(output):
    """Of the final state, once the program has found its copies equal."""
    [(equal, bits)] = re.findall(r"all replicas bit-identical: (\w+) \(checksum (\w+)\)", output)
    assert equal == "True"
    return bits


# --- One process, eight devices ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_resumed_run_ends_with_the_same_bits(example, capsys, tmp_path, mode):
    """Stopped in the middle of an epoch, after which the loss scale grows."""
    pod, checkpoints = example("pod"), example("_pod_checkpoints")
    training = pod.Training(pod.parse(["--mode", mode, "--logdir", str(tmp_path / "events")]))

    def run(total, folder):
        training.total = total
        with checkpoints.Checkpoints(folder, 10, training.settings()) as saved:
            assert training.run(saved) == 0
        return capsys.readouterr().out

    whole = run(30, None)
    stopped = run(23, str(tmp_path / "saved"))
    resumed = run(30, str(tmp_path / "saved"))

    assert "loss scale 32768 " in stopped
    assert "loss scale 65536 " in resumed
    assert "going on after step 23" in resumed
    assert checksum(whole) == checksum(resumed) != checksum(stopped)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["20", "23", "30", "run.json"]
    events = [file.read_bytes() for file in (tmp_path / "events").iterdir()]
    assert all(tag in file for tag in (b"train/loss", b"train/loss_scale", b"test/accuracy") for file in events)


def test_parameters_and_optimizer_of_mode_jit_are_in_shards(example):
    pod = example("pod")
    training = pod.Training(pod.parse(["--mode", "jit"]))
    params, statistics, opt_state = training.initial_state()
    for tree in (params, opt_state):
        leaves = [x for x in jax.tree.leaves(tree) if x.size > 8]
        mine = sum(x.addressable_shards[0].data.nbytes for x in leaves)
        assert mine < 1.1 * sum(x.nbytes for x in leaves) / 8
    assert all(x.is_fully_replicated for x in jax.tree.leaves(statistics))


@pytest.mark.parametrize(
    ("shape", "devices", "spec"),
    [
        ((), 8, P()),
        ((10,), 8, P()),
        ((16,), 8, P("batch")),
        ((3, 3, 16, 32), 8, P(None, None, None, "batch")),
        ((32, 16), 8, P("batch")),
        ((16, 16), 8, P("batch")),
        ((32, 10), 8, P("batch")),
        ((100, 8), 8, P(None, "batch")),
        ((16, 32), 1, P()),
    ],
)
def test_longest_axis_that_divides_is_sharded(example, shape, devices, spec):
    assert example("_pod_modes").fsdp_spec(shape, devices) == spec


def test_copies_that_differ_are_noticed(example):
    """A check that the program prints must be able to fail."""
    modes = example("_pod_modes")
    mesh = modes.make_mesh()
    layout = jax.NamedSharding(mesh, P())
    shards = [jax.device_put(np.float32(device.id == 5), device) for device in mesh.devices]
    different = jax.make_array_from_single_device_arrays((), layout, shards)
    assert modes.copies_agree([modes.put(np.float32(1), layout)])
    assert not modes.copies_agree([different])


def test_other_settings_are_refused(example, tmp_path):
    checkpoints = example("_pod_checkpoints")
    settings = {"policy": "mixed_float16", "seed": 0}
    for _ in range(2):
        with checkpoints.Checkpoints(str(tmp_path), 10, settings) as saved:
            assert saved.restore("initial") == (0, "initial")
    with pytest.raises(checkpoints.ResumeError, match=r"seed was 0 and is now 1\. Give the options of that run"):
        checkpoints.Checkpoints(str(tmp_path), 10, {**settings, "seed": 1})


def test_bad_arguments_are_explained(example, capsys):
    parse = example("pod").parse
    for arguments, message in [
        (["--coordinator", "localhost:1234"], "--coordinator, --num-processes and --process-id go together"),
        (["--policy", "all"], "choose one here"),
        (["--mode", "pjit"], "invalid choice: 'pjit'"),
        (["--checkpoint-every", "0"], "whole number of at least 1, got '0'"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            parse(arguments)
        assert message in capsys.readouterr().err


def test_cluster_error_is_printed_without_a_traceback(start):
    statuses, [output] = outcome(start("--coordinator", "10.0.0.1", "--num-processes", 2, "--process-id", 0))
    assert statuses == [1]
    assert output.startswith("error: coordinator_address must be 'host:port', got '10.0.0.1'.")


@pytest.mark.soak
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_the_digits(start, mode, policy):
    output = finished(start("--mode", mode, "--policy", policy, "--epochs", 8))
    assert f"{policy} with {mode} on 8 CPU devices of 1 host(s), 8 images each per step" in output
    accuracy = [float(value) for value in re.findall(r"test accuracy ([\d.]+)%", output)]
    assert len(accuracy) == 8
    assert accuracy[-1] > 95
    checksum(output)


# --- The rows of each host --------------------------------------------------------------------------------------------


class Rows:
    """An array that notes which rows are read."""

    def __init__(self, array):
        self.array, self.read = array, []

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        self.read.extend(index)
        return self.array[index]


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_share_the_batch_and_read_their_own_rows(example, monkeypatch, seed, hosts):
    """However many hosts there are, they read the rows that one would have read, each row on one host."""
    data = example("_pod_data")
    numbers = np.arange(1347)
    whole = data.batch_rows(len(numbers), size=64, step=5, seed=seed)
    read = []
    for host in range(hosts):
        monkeypatch.setattr(jax, "process_count", lambda: hosts)
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        images, labels = Rows(numbers[:, None]), Rows(numbers)
        batch = data.my_batch(images, labels, size=64, step=5, seed=seed)
        assert images.read == labels.read == batch[1].tolist() == batch[0][:, 0].tolist()
        assert len(labels.read) == 64 // hosts
        read += labels.read
    assert read == whole.tolist()


def test_epochs_are_shuffled_and_have_every_row_once(example, seed):
    data = example("_pod_data")
    epochs = [[data.batch_rows(100, size=32, step=3 * epoch + i, seed=seed) for i in range(3)] for epoch in range(2)]
    for batches in epochs:
        assert len(set(np.concatenate(batches))) == 96
    assert np.concatenate(epochs[0]).tolist() != np.concatenate(epochs[1]).tolist()


def test_padding_is_never_right(example):
    images, labels = example("_pod_data").padded(np.ones((450, 8, 8, 1)), np.arange(450) % 10, 8)
    assert images.shape == (456, 8, 8, 1)
    assert labels.tolist() == [*(np.arange(450) % 10), *[-1] * 6]


# --- Several processes ------------------------------------------------------------------------------------------------


def wait_for_step(job, folder, step):
    """Waits until there is a checkpoint of this step or a later one, or a process has ended."""
    end = time.monotonic() + 300
    while all(process.poll() is None for process, _ in job):
        if folder.exists() and any(path.name.isdecimal() and int(path.name) >= step for path in folder.iterdir()):
            return
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.soak
@pytest.mark.multiprocess
@pytest.mark.parametrize("mode", MODES)
def test_job_that_loses_a_process_ends_with_the_same_bits(start, tmp_path, rng, mode):
    """SIGTERM to one of two processes, as before a preemption; then ``kill -9``, as when a host dies."""
    arguments = ("--mode", mode, "--simulate", 1, "--batch-size", 32, "--steps", 40, "--checkpoint-every", 5)
    saved = (*arguments, "--checkpoint-dir", tmp_path / "saved", "--logdir", tmp_path / "events")
    whole = finished(start(*arguments, processes=2))
    assert f"with {mode} on 2 CPU devices of 2 host(s)" in whole

    job = start(*saved, processes=2)
    wait_for_step(job, tmp_path / "saved", 10)
    job[rng.integers(2)][0].send_signal(signal.SIGTERM)
    statuses, outputs = outcome(job)
    assert statuses == [143, 143], "\n".join(outputs)
    [step] = re.findall(r"preempted after step (\d+)", outputs[0])
    assert (tmp_path / "saved" / step).exists()

    job = start(*saved, processes=2)
    wait_for_step(job, tmp_path / "saved", int(step) + 6)
    victim = rng.integers(2)
    job[victim][0].kill()
    job[1 - victim][0].kill()  # a launcher does so; left alone, JAX ends it when the heartbeat of the other is missed
    outcome(job)
    resumed = finished(start(*saved, processes=2))
    assert re.search(r"going on after step \d+", resumed)
    assert checksum(resumed) == checksum(whole)
    assert len(list((tmp_path / "events").iterdir())) == 3  # process 0 of each start, nobody else
