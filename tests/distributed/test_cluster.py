"""Joining a job: who joins, who stays alone, and what is said when it does not work. All of it on this machine."""

import re
import socket
import subprocess
import sys
import time

import jax
import pytest
from support import processes
from support.comparisons import slow_but_for

import jmp_lite as jmp

ADDRESS = "10.0.0.1:1234"
#: Puts the outcome into one line.
PROGRAM = """
import sys, jax, jmp_lite as jmp
def call(*args, **kwargs):
    try:
        return jmp.distributed.initialize(*args, **kwargs)
    except jmp.errors.ClusterError as error:
        return f"ClusterError: {error}"
"""


@pytest.fixture
def port():
    """A port of this machine that nobody uses at the moment."""
    return processes.free_port()


@pytest.fixture
def start():
    """Starts a program in a process without a launcher around it; none is left at the end."""
    started = []

    def start(code, **variables):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM + code],
            env=processes.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def lines(process):
    """What a program has printed, once it has ended without an error."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors
    return [line for line in output.splitlines() if "[Gloo]" not in line]


def slurm(process, port):
    """What ``srun`` tells one of two processes."""
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "JAX_COORDINATOR_PORT": port}
    return {**job, "SLURM_PROCID": process, "SLURM_LOCALID": process}


# --- Before anything is asked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (ADDRESS,),
            r"coordinator_address='10.0.0.1:1234' given without num_processes and process_id\. Give all three",
        ),
        ((ADDRESS, 2), r"num_processes=2 given without process_id\."),
        ((None, 2, 0), r"num_processes=2, process_id=0 given without coordinator_address\."),
        (("10.0.0.1", 2, 0), r"must be 'host:port', got '10.0.0.1'\."),
        (("10.0.0.1:http", 2, 0), r"must be 'host:port', got '10.0.0.1:http'\."),
        (("http://10.0.0.1:80", 2, 0), r"must be 'host:port', got 'http://10.0.0.1:80'\."),
        (("10.0.0.1:65536", 2, 0), r"must be 'host:port', got '10.0.0.1:65536'\."),
        (("10.0.0.1:0", 2, 0), r"must be 'host:port', got '10.0.0.1:0'\."),
        (("::1:1234", 2, 0), r"must be 'host:port', got '::1:1234'\."),
        ((1234, 2, 0), r"must be 'host:port', got 1234\."),
        ((ADDRESS, 2, 2), r"from 0 to num_processes - 1, got process_id=2 and num_processes=2\. Number the processes"),
        ((ADDRESS, 2, -1), r"got process_id=-1 and num_processes=2\."),
        ((ADDRESS, 0, 0), r"got process_id=0 and num_processes=0\."),
        ((ADDRESS, "2", 0), r"num_processes must be an int, got '2' of type str\."),
        ((ADDRESS, 2, 1.0), r"process_id must be an int, got 1.0 of type float\."),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    """Quoted, before JAX or the network is asked."""
    with pytest.raises(jmp.errors.ClusterError, match=message) as caught:
        jmp.distributed.initialize(*arguments)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_timeout_must_be_positive(timeout):
    with pytest.raises(jmp.errors.ClusterError, match=f"positive number of seconds, got {timeout}"):
        jmp.distributed.initialize(timeout=timeout)


def test_devices_that_have_started_cannot_join():
    """Also in a process that would stay alone: the mistake shows on a laptop."""
    jax.devices()
    for arguments in [(), ("127.0.0.1:9", 2, 1)]:
        with pytest.raises(jmp.errors.ClusterError, match=r"after JAX started its devices\. Call it first"):
            jmp.distributed.initialize(*arguments)
    assert not jax.distributed.is_initialized()


def test_port_that_is_taken(port):
    """JAX would crash."""
    message = rf"cannot open the port of .*'127\.0\.0\.1:{port}'.*Choose a port"
    with socket.create_server(("127.0.0.1", port)), pytest.raises(jmp.errors.ClusterError, match=message):
        jmp.distributed.initialize(f"127.0.0.1:{port}", 2, 0)


@pytest.mark.parametrize("variable", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_only_task_is_alone(monkeypatch, variable):
    """Joined to a job of one, it would lose all GPUs but one."""
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "1")
    assert jmp.distributed.initialize() is False


# --- Processes that find nobody ---------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_process_in_no_cluster_stays_alone(start):
    process = start("print(call(), call(), jax.distributed.is_initialized(), jax.process_count())")
    assert lines(process) == ["False False False 1"]


@pytest.mark.multiprocess
def test_half_a_cluster_is_explained(start):
    process = start("print(call())", JAX_COORDINATOR_ADDRESS=ADDRESS)
    [message] = lines(process)
    assert re.match(r"ClusterError: JAX could not join the job: .*processes.* Check what the launcher put", message)


@pytest.mark.multiprocess
def test_waiting_ends_with_what_to_check(start, port):
    """In time, by an exception: JAX alone would abort. The process is of no use afterwards, and says so."""
    absent = f"127.0.0.1:{port}"
    timed = "import time; began = time.monotonic(); print(call(*{}, timeout=1.5)); print(time.monotonic() - began)"
    again = "; print(call())"
    nobody = start(timed.format((absent, 2, 1)) + again)
    nowhere = start(timed.format(("no-such-host.invalid:1234", 3, 2)))
    detected = start(timed.format(()), **slurm("1", str(port)))
    message, seconds, second = lines(nobody)
    assert re.match(
        rf"ClusterError: Process 1 of 2 waited 1\.5 s for the job at '{absent}', where nothing answers \(.*refused\)\. "
        "Check that process 0 is running on that host, that every process has the same address, and that the port is",
        message,
    )
    assert "An earlier call of initialize is still waiting" in second
    assert 1.5 <= float(seconds) < 60
    message, _ = lines(nowhere)
    assert "Process 2 of 3 waited 1.5 s for the job at 'no-such-host.invalid:1234', where nothing answers" in message
    message, _ = lines(detected)
    assert "ClusterError: The job that JAX detected did not come together within 1.5 s." in message


@pytest.mark.multiprocess
def test_fewer_processes_than_expected(start, port):
    """Two of three: the first learns that some are missing, the other one that it was not its address."""
    first = start(f"print(call('127.0.0.1:{port}', 3, 0, timeout=4), flush=True); import time; time.sleep(100)")
    second = start(f"print(call('127.0.0.1:{port}', 3, 1, timeout=4))")
    [message] = lines(second)
    assert re.match(
        rf"ClusterError: Process 1 of 3 waited 4 s for the job at '127\.0\.0\.1:{port}', which answers, but not all of "
        "the 3 processes came",
        message,
    )
    assert re.match(
        rf"ClusterError: Process 0 of 3 waited 4 s for the job at '127\.0\.0\.1:{port}', but not all of the 3 "
        "processes came",
        first.stdout.readline(),
    )


# --- Processes that find each other -----------------------------------------------------------------------------------


@pytest.mark.multiprocess
@pytest.mark.parametrize("launcher", slow_but_for(("slurm",), ["by hand", "slurm"]))
def test_processes_join(start, port, launcher):
    """Once or twice; JAX then has the devices of both. Another job is refused."""
    code = "args = {}; print(call(*args), call(*args), call(), jax.process_index(), jax.process_count()); "
    other = f"print(call('127.0.0.1:{port}', 3, 2))"
    began = time.monotonic()
    if launcher == "slurm":
        processes = [start(code.format("()") + other, **slurm(str(i), str(port))) for i in range(2)]
    else:
        processes = [start(code.format((f"127.0.0.1:{port}", 2, i)) + other) for i in range(2)]
    for i, process in enumerate(processes):
        joined, refused = lines(process)
        assert joined == f"True True True {i} 2"
        assert f"already process {i} of 2 and cannot become process 2 of 3. Call initialize once" in refused
    assert time.monotonic() - began < 100
