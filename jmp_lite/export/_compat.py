"""The part of JAX that ``export`` needs beyond its public functions: programs in MLIR."""

import dataclasses
import re
from typing import Any

from jax.interpreters import mlir


def parse_program(exported: Any) -> Any:
    """Parses the program of an artifact; JAX does so only on the first call.

    Returns:
        The module, valid in the current context.

    Raises:
        ValueError: Or another error, if it is not a program.
    """
    return exported.mlir_module(serialized=False)


def without_source_lines(exported: Any) -> Any:
    """Removes the files and lines of the traced code, which JAX records in a program.

    JAX has a setting for it, but only for all threads at once.
    """
    from jax.extend.mlir import passmanager  # noqa: TID251
    from jax.extend.mlir.dialects import stablehlo  # noqa: TID251

    serialized: bytes = exported.mlir_module_serialized
    version = re.search(rb"StableHLO_v(\d+\.\d+\.\d+)", serialized[:64])
    if version is None:
        raise NotImplementedError(f"programs of this JAX begin with {serialized[:64]!r}")
    with mlir.make_ir_context():
        module = parse_program(exported)
        passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(module.operation)
        stripped = stablehlo.serialize_portable_artifact(module, version[1].decode(), allow_other_dialects=True)
    return dataclasses.replace(exported, mlir_module_serialized=stripped)
