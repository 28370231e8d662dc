"""One equation with its operands, as a file that any process can run."""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import Equation, bind, is_literal
from jmp_lite._messages import naming_extra, quote
from jmp_lite.errors import CorruptArtifactError

_PROGRAM, _ABOUT = "program", "about"


class Replayed(NamedTuple):
    """An equation that was run again.

    Attributes:
        report: The report from when it was saved.
        operands: Its operands.
        results: Its results on this machine.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jmp.analysis.first_nonfinite(jnp.log)(jnp.zeros(2)).save(f"{folder}/log.npz")
        ...     print(jmp.analysis.replay(f"{folder}/log.npz").operands[0])
        [0. 0.]
    """

    report: str
    operands: tuple[np.ndarray[Any, Any], ...]
    results: tuple[np.ndarray[Any, Any], ...]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An equation and its variable operands, except random keys."""

    eqn: Equation
    operands: tuple[np.ndarray[Any, Any], ...]

    def save(self, path: Any, report: str) -> None:
        """Writes it to a file."""
        with naming_extra("NonFinite.save", "export"):
            import flatbuffers as _  # type: ignore[import-untyped]  # noqa: F401  # what jax.export serializes with
        from jax import export

        eqn = self.eqn

        def run(*operands: Any) -> list[Any]:
            return bind(
                eqn, [v.val if is_literal(v) else x for v, x in zip(eqn.invars, operands, strict=True)], eqn.params
            )

        avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.operands]
        program = export.export(jax.jit(run), platforms=("cpu", "cuda", "tpu"))(*avals).serialize()
        about = json.dumps({"report": report, "dtypes": [x.dtype.name for x in self.operands]}).encode()
        arrays = {_PROGRAM: np.frombuffer(program, np.uint8), _ABOUT: np.frombuffer(about, np.uint8)}
        for i, x in enumerate(self.operands):
            arrays[f"operand_{i}"] = np.frombuffer(x.tobytes(), np.uint8)
            arrays[f"shape_{i}"] = np.array(x.shape, np.int64)
        with pathlib.Path(path).open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)


def replay(path: Any) -> Replayed:
    """Runs the equation that ``NonFinite.save`` wrote to a file.

    Args:
        path: Path of the file.

    Returns:
        The report, and operands and results as NumPy arrays.

    Raises:
        CorruptArtifactError: If the file is not such a bundle.
        FileNotFoundError: If the file does not exist.
        ModuleNotFoundError: Without the ``export`` extra.

    Example:
        >>> import tempfile
        >>> found = jmp.analysis.first_nonfinite(jnp.log)(jnp.zeros(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found.save(f"{folder}/log.npz")
        ...     print(jmp.analysis.replay(f"{folder}/log.npz").results[0])
        [-inf -inf]
    """
    with naming_extra("analysis.replay", "export"):
        import flatbuffers as _  # noqa: F401
    from jax import export

    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(bytes(file[_ABOUT]))
            program = export.deserialize(bytearray(file[_PROGRAM].tobytes()))
            operands = tuple(
                np.frombuffer(file[f"operand_{i}"].tobytes(), jnp.dtype(dtype)).reshape(file[f"shape_{i}"])
                for i, dtype in enumerate(about["dtypes"])
            )
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CorruptArtifactError(
            f"{quote(str(path))} holds no equation that NonFinite.save wrote: {error}"
        ) from error
    results = jax.jit(program.call)(*operands)
    return Replayed(about["report"], operands, tuple(map(np.asarray, results)))
