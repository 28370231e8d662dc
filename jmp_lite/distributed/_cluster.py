"""Joining the processes of a job: ``jax.distributed.initialize`` with errors that say what to check.

JAX alone aborts the process (SIGABRT) on a timeout, and crashes (SIGSEGV) if the port of process 0 is in use. Here both
raise exceptions.
"""

import os
import re
import socket
import threading
from typing import Any

import jax

from jmp_lite.errors import ClusterError

_THREAD = "jmp_lite.distributed.initialize"
#: JAX's own deadline, which aborts the process, must not strike before ours; seconds.
_LATER = 24 * 3600
_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300,
) -> bool:
    """Connects the processes of a job, so that ``jax.devices()`` lists the devices of all of them.

    A thin layer over ``jax.distributed.initialize``. Call it once in every process, before anything asks JAX for its
    devices. Without arguments, JAX detects the job: SLURM, Open MPI, one or several Cloud TPU slices, and Kubernetes
    (``Job`` or ``JobSet``). A process outside a cluster runs alone.

    Args:
        coordinator_address: ``"host:port"`` of process 0, the same text in every process. Process 0 opens the port.
        num_processes: How many processes the job has.
        process_id: The index of this process, from 0 to ``num_processes - 1``.
        timeout: Seconds to wait for all processes.

    Returns:
        True if the process has joined a job, now or before. False if it runs alone; then nothing has changed.

    Raises:
        ClusterError: If only some of the three arguments are given or one is malformed, if JAX already started its
            devices (alone or not, so that the mistake shows on a laptop), if the port of process 0 is in use, if not
            all processes connected within ``timeout`` seconds, or if the process already belongs to another job. After
            a timeout, exit: JAX keeps waiting in the background.

    Note:
        Two mistakes still abort the process with a message from JAX's runtime: two processes with the same index, and
        processes that disagree about ``num_processes``.

        A single task in SLURM or Open MPI runs alone, because JAX would give it only one of its GPUs. With several
        tasks, each gets the GPU of its local rank unless the environment sets ``JAX_LOCAL_DEVICE_IDS``.

    Example:
        >>> jmp.distributed.initialize("10.0.0.1", num_processes=2, process_id=0)
        Traceback (most recent call last):
        jmp_lite.errors.ClusterError: coordinator_address must be 'host:port', got '10.0.0.1'...
        >>> jmp.distributed.initialize()  # doctest: +SKIP
        True
        >>> jax.process_index(), jax.process_count(), jax.device_count()  # doctest: +SKIP
        (0, 2, 16)

    References:
        JAX documentation, "Introduction to multi-controller JAX": https://docs.jax.dev/en/latest/multi_process.html
    """
    job = _checked(coordinator_address, num_processes, process_id)
    if not timeout > 0:
        raise ClusterError(f"timeout must be a positive number of seconds, got {timeout!r}. The default is 300.")
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        raise ClusterError(
            "An earlier call of initialize is still waiting for the job. End this process and start it again."
        )
    if jax.distributed.is_initialized():
        _check_same(job)
        return True
    if job is None and _only_task():
        return False
    if job is not None and job["process_id"] == 0:
        _check_port_is_free(job)
    return _join(job, timeout)


def _checked(coordinator_address: Any, num_processes: Any, process_id: Any) -> dict[str, Any] | None:
    """Returns the three arguments by name, or None without arguments."""
    job = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in job.items() if value is None]
    if len(missing) == len(job):
        return None
    if missing:
        given = ", ".join(f"{name}={value!r}" for name, value in job.items() if value is not None)
        raise ClusterError(
            f"{given} given without {' and '.join(missing)}. Give all three, or none to have the cluster detected."
        )
    address = _ADDRESS.fullmatch(coordinator_address) if isinstance(coordinator_address, str) else None
    if address is None or not 0 < int(address["port"]) < 2**16:
        raise ClusterError(
            f"coordinator_address must be 'host:port', got {coordinator_address!r}. Name the host of process 0 and a "
            "port that is free there, such as '10.0.0.1:1234'."
        )
    for name in ("num_processes", "process_id"):
        if not isinstance(job[name], int):
            raise ClusterError(f"{name} must be an int, got {job[name]!r} of type {type(job[name]).__name__}.")
    if not 0 <= process_id < num_processes:
        raise ClusterError(
            f"process_id must be from 0 to num_processes - 1, got process_id={process_id} and "
            f"num_processes={num_processes}. Number the processes 0, 1, 2 and so on, each number once."
        )
    return job


def _check_same(job: dict[str, Any] | None) -> None:
    """Raises if the process joined a job other than the given one."""
    if job is not None and (jax.process_index(), jax.process_count()) != (job["process_id"], job["num_processes"]):
        raise ClusterError(
            f"This process is already process {jax.process_index()} of {jax.process_count()} and cannot become "
            f"process {job['process_id']} of {job['num_processes']}. Call initialize once, or with the same arguments."
        )


def _only_task() -> bool:
    """Whether a launcher started this process and no other."""
    tasks = {os.environ.get(name) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")} - {None}
    return tasks == {"1"}


def _check_port_is_free(job: dict[str, Any]) -> None:
    """Raises where JAX would crash."""
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return
    address = job["coordinator_address"]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(address.rpartition(":")[2])))
        except OSError as error:
            raise ClusterError(
                f"Process 0 cannot open the port of coordinator_address={address!r}: {error.strerror}. Choose a port "
                "that is free on its host, and end what is left of an earlier run there."
            ) from None


def _join(job: dict[str, Any] | None, timeout: float) -> bool:
    """Calls JAX in a thread that can be abandoned; False if JAX detects no cluster."""
    errors: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(**(job or {}), initialization_timeout=int(timeout) + _LATER)
        except Exception as error:  # noqa: BLE001 - raised in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=join, name=_THREAD, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise ClusterError(_why_not(job, timeout))
    if not errors:
        return True
    [error] = errors
    if job is None and isinstance(error, ValueError) and "coordinator_address" in str(error):
        return False
    if isinstance(error, RuntimeError) and "must be called before" in str(error):
        raise ClusterError(
            "initialize was called after JAX started its devices. Call it first: before any computation and before "
            "jax.devices(), jax.device_put and their like."
        ) from None
    raise ClusterError(
        f"JAX could not join the job: {error} Check what the launcher put into the environment."
    ) from error


def _why_not(job: dict[str, Any] | None, timeout: float) -> str:
    """The reasons why the processes of a job did not connect."""
    if job is None:
        return (
            f"The job that JAX detected did not come together within {timeout:g} s. Check that every process of it was "
            "started and calls initialize, and that the hosts reach each other. JAX_COORDINATOR_PORT changes the port."
        )
    address, num_processes, process_id = job.values()
    waited = f"Process {process_id} of {num_processes} waited {timeout:g} s for the job at {address!r}"
    if process_id == 0:
        return (
            f"{waited}, but not all of the {num_processes} processes came. Start all of them with this "
            "address and num_processes, and let the other hosts reach its port."
        )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return (
            f"{waited}, where nothing answers ({error.strerror or error}). Check that process 0 is running on that "
            "host, that every process has the same address, and that the port is open to this host."
        )
    return (
        f"{waited}, which answers, but not all of the {num_processes} processes came. Start all of them with this "
        "address and num_processes; unset http_proxy and its like if they are set."
    )
