"""Jobs of several real processes, each with simulated devices, on one machine."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from support.processes import free_port

TRAIN = pathlib.Path(__file__).with_name("train.py")
#: Seconds after which a job counts as hung. Two cores may be shared by many.
TIMEOUT = 240
_INHERITED = ("PATH", "HOME", "TMPDIR", "LANG", "SYSTEMROOT", "LD_LIBRARY_PATH", "JMP_LITE_SEED")


def environment():
    """What a process needs and nothing else: flags of XLA and of JAX that the caller has set stay behind."""
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    kept |= {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    if importlib.metadata.version("jaxlib").startswith(("0.11.", "0.12.")):  # see conftest.py
        kept["XLA_FLAGS"] = "--xla_cpu_experimental_ynn_fusion_type="
    return {**kept, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


class Job:
    """Processes of one program, which find each other through ``jax.distributed``.

    The program gets one argument, a JSON object: the ``settings`` together with ``coordinator`` (None for a job of one
    process), ``processes``, ``process`` and ``devices``. On leaving the ``with`` block no process is left.
    """

    def __init__(self, folder, processes, devices, program=TRAIN, **settings):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True)
        coordinator = f"127.0.0.1:{free_port()}" if processes > 1 else None
        cluster = {"coordinator": coordinator, "processes": processes, "devices": devices}
        self._running = []
        for process in range(processes):
            given = json.dumps({**cluster, "process": process, "output": str(self.folder), **settings})
            with self._log(process).open("wb") as log:
                command = [sys.executable, str(program), given]
                self._running.append(
                    subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(), cwd=self.folder)
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def _log(self, process):
        return self.folder / f"process_{process}.log"

    @property
    def pids(self):
        """Ids of the processes."""
        return [process.pid for process in self._running]

    def output(self, process):
        """What a process has printed so far."""
        return self._log(process).read_text(errors="replace")

    def report(self):
        """The ends of all logs, for a failure."""
        return "\n".join(f"--- process {i}\n{self.output(i)[-4000:]}" for i in range(len(self._running)))

    def wait_for(self, process, line, timeout=TIMEOUT):
        """Waits until a process has printed a line; fails if it ends before or takes too long."""
        end = time.monotonic() + timeout
        while f"{line}\n" not in self.output(process):
            if self._running[process].poll() is not None and f"{line}\n" not in self.output(process):
                raise AssertionError(f"process {process} ended before it printed {line!r}\n{self.report()}")
            if time.monotonic() > end:
                raise TimeoutError(f"process {process} did not print {line!r} in {timeout} s\n{self.report()}")
            time.sleep(0.002)

    def kill(self, process):
        """``kill -9`` of one process: it has no chance to say goodbye."""
        os.kill(self.pids[process], signal.SIGKILL)

    def stop(self):
        """Kills what still runs, as a scheduler does when one process of a job is gone."""
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for process in self._running:
            process.wait()

    def succeed(self, timeout=TIMEOUT):
        """Waits until all processes have ended well; otherwise stops them and fails with what they printed."""
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in self._running):
            failed = [process.returncode for process in self._running if process.poll() not in (None, 0)]
            if failed or time.monotonic() > end:
                self.stop()
                raise AssertionError(f"{'a process failed' if failed else f'no end in {timeout} s'}\n{self.report()}")
            time.sleep(0.01)
        assert [process.returncode for process in self._running] == [0] * len(self._running), self.report()
        return self
