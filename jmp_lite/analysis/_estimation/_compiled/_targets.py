"""Accelerators to compile for on a machine that has none."""

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies

TARGETS = {"h100": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5e"}
"""Name of each target on the command line, and the device compiled for."""

_TPU_SLICES = {4: "v5e:2x2", 8: "v5e:2x4", 64: "v5e:8x8", 256: "v5e:16x16"}
_MODULES = {"h100": ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc"), "tpu": ("libtpu",)}
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

# The published properties of an H100 SXM5, as the text form of XLA's GpuTargetConfigProto.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


class TargetUnavailableError(RuntimeError):
    """The wheels that compile for a target are not installed."""


def configure(*more: str) -> None:
    """Sets the environment for compiling without a device, with extra XLA flags; call before the first use of jax."""
    os.environ.update(_ENVIRONMENT)
    for flag in ("--xla_gpu_autotune_level=0", *more):
        flags = os.environ.get("XLA_FLAGS", "")
        if flag not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def absent(target: str) -> list[str]:
    """Returns the modules that a target's compiler needs but that are not installed."""
    return [module for module in _MODULES[target] if not _installed(module)]


def devices(target: str, count: int = 1) -> list[Any]:
    """Devices to compile for: ``count`` of one ``target``, none of which need exist.

    Args:
        target: A key of ``TARGETS``.
        count: Number of devices: up to 8 of one host, or 64 or 256 of several.

    Raises:
        TargetUnavailableError: The compiler's wheels are absent; the text says how to get them.
        ValueError: An unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: expected one of {sorted(TARGETS)}")
    if missing := absent(target):
        raise TargetUnavailableError(
            f"compiling for {TARGETS[target]} needs {', '.join(missing)}; "
            "install the compilers with: pip install 'jmp_lite[aot]'"
        )
    if target == "h100":
        shape = f"1x{math.ceil(count / 8)}x{min(count, 8)}"
        topology = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology=shape)
    else:
        name = next(name for size, name in _TPU_SLICES.items() if count <= size)
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    return list(topology.devices[:count])


def compiled(
    function: Callable[..., Any], shapes: Any, device: Any, *, donate: tuple[int, ...] = (), **options: Any
) -> Any:
    """Compiles a function of arrays of these shapes for a device that need not exist, with XLA options.

    Args:
        function: What to compile.
        shapes: Shapes of its arguments.
        device: See ``devices``.
        donate: Positions of donated arguments.
        **options: Compiler options.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.jit(function, donate_argnums=donate).lower(*jax.tree.map(abstract, shapes)).compile(options)


def for_each(targets: Sequence[str], report: Callable[[str], None]) -> None:
    """Reports on the targets whose compilers are installed; then exits with a message if some are missing."""
    unavailable: list[str] = []
    for target in targets:
        try:
            report(target)
        except TargetUnavailableError as error:
            unavailable.append(str(error))
    if unavailable:
        sys.exit("\n".join(unavailable))
