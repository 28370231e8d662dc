"""The harness itself: what its processes inherit, and that none of them is left."""

import os

import pytest
from support.harness import Job

pytestmark = pytest.mark.multiprocess

PROGRAMS = {
    "environment": "import os, sys; print(sys.argv[1], *sorted(os.environ))",
    "forever": "import time; print('ready'); time.sleep(1000)",
    "first fails": "import sys, time\nif '\"process\": 0' in sys.argv[1]: sys.exit('no luck')\ntime.sleep(1000)",
}


def start(name, folder, processes):
    """A job of one of the programs above, which know nothing of JAX."""
    program = folder / "program.py"
    program.write_text(PROGRAMS[name])
    return Job(folder / "job", processes, 1, program=program)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_processes_inherit_nothing_odd(tmp_path, monkeypatch):
    """Neither flags of XLA nor settings of JAX nor a scheduler's variables come through."""
    for name in ("JAX_ENABLE_X64", "XLA_PYTHON_CLIENT_PREALLOCATE", "SLURM_JOB_ID", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    with start("environment", tmp_path, 1) as job:
        job.succeed()
    words = set(job.output(0).split())
    assert {"JAX_PLATFORMS", "PATH"} <= words
    assert not words & {"JAX_ENABLE_X64", "XLA_PYTHON_CLIENT_PREALLOCATE", "SLURM_JOB_ID", "PYTHONPATH"}
    assert '"coordinator":null' in job.output(0).replace(" ", "")


@pytest.mark.parametrize("killed", [False, True])
def test_no_process_is_left(killed, tmp_path):
    """Neither after a kill nor when the test fails."""
    job = start("forever", tmp_path, 2)

    def fail():
        with job:
            for process in range(2):
                job.wait_for(process, "ready")
            assert all(is_alive(pid) for pid in job.pids)
            if killed:
                job.kill(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any(is_alive(pid) for pid in job.pids)


def test_failure_of_one_process_stops_the_others(tmp_path):
    """And its last words are quoted."""
    with start("first fails", tmp_path, 2) as job:
        with pytest.raises(AssertionError, match="no luck"):
            job.succeed()
        assert not any(is_alive(pid) for pid in job.pids)


def test_job_without_end_is_stopped(tmp_path):
    """A test cannot hang."""
    with start("forever", tmp_path, 1) as job:
        with pytest.raises(TimeoutError, match="did not print 'done'"):
            job.wait_for(0, "done", timeout=0.5)
        with pytest.raises(AssertionError, match=r"no end in 0.5 s"):
            job.succeed(timeout=0.5)
        assert not any(is_alive(pid) for pid in job.pids)
