"""What programs that tests start are given: an environment without a launcher, a free port, a cache of compilations."""

import os
import socket

_OF_LAUNCHERS = ("SLURM", "OMPI", "JAX_", "TPU_", "MEGASCALE", "KUBERNETES", "XLA_")


def free_port():
    """A port of this machine that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**variables):
    """The environment of a program on the CPU that no launcher has started, nor flags of XLA and JAX prepared."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
    return {**kept, "JAX_PLATFORMS": "cpu", **variables}


def caching(folder):
    """Variables with which programs share what is compiled, which is most of their time."""
    return {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
