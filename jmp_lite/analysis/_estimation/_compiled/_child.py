"""Compiles for a device that need not exist, in a separate process whose environment is set before JAX starts.

A program goes in as ``jax.export`` bytes and comes back as optimized HLO text.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jmp_lite.analysis._estimation._compiled import _targets
from jmp_lite.errors import InvalidAnalysisError

#: All matmuls by cuBLAS, whose calls say what they do; LLVM's part changes no figure.
_FLAGS = (
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
_PLATFORMS = {"h100": "cuda", "tpu": "tpu"}


def is_available(target: str) -> bool:
    """Whether the wheels that compile for a target are installed."""
    return not _targets.absent(target) and importlib.util.find_spec("flatbuffers") is not None


def compiled_text(
    function: Callable[..., Any], shapes: Sequence[Any], target: str, donate: tuple[int, ...] = ()
) -> str:
    """Returns the optimized HLO text of a function for a target.

    Args:
        function: What to compile.
        shapes: Its arguments, or shapes in their place.
        target: A key of ``_targets.TARGETS``.
        donate: Positions of donated arguments.

    Raises:
        InvalidAnalysisError: If the compiler fails, with what it says.
    """
    from jax import export

    lowered = export.export(jax.jit(function), platforms=[_PLATFORMS[target]])(*shapes)
    paths = os.pathsep.join(filter(None, sys.path))
    with tempfile.TemporaryDirectory() as folder:
        program, text = pathlib.Path(folder, "program"), pathlib.Path(folder, "text")
        program.write_bytes(lowered.serialize())
        asked = [sys.executable, "-m", __name__, target, str(program), str(text), *map(str, donate)]
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        done = subprocess.run(  # noqa: S603  # this interpreter, on files of this function
            asked, env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise InvalidAnalysisError(f"Compiling for {_targets.TARGETS[target]} failed: {done.stderr[-2000:]}")
        return text.read_text()


def _main(target: str, program: str, text: str, *donate: str) -> None:
    _targets.configure(*_FLAGS)
    from jax import export

    held = export.deserialize(bytearray(pathlib.Path(program).read_bytes()))
    arguments, _ = jax.tree.unflatten(held.in_tree, held.in_avals)
    [device] = _targets.devices(target)
    done = _targets.compiled(held.call, arguments, device, donate=tuple(map(int, donate)))
    pathlib.Path(text).write_text(done.as_text())


if __name__ == "__main__":
    _main(*sys.argv[1:])
