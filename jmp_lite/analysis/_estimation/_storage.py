"""``estimate_storage``: the memory of parameters and optimizer state, and the bytes that a step on them moves."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmp_lite._dtypes import FLOAT32
from jmp_lite._text import table as laid_out
from jmp_lite._tree import is_array
from jmp_lite.analysis._estimation._devices import Device, device_of
from jmp_lite.errors import InvalidAnalysisError, UncompressedStateWarning
from jmp_lite.optim._stored import stored

#: Format of the parameters and of the moments, by what it is called; ``None``: Optax in float32 without ``stored``.
FORMATS: Mapping[str, tuple[str, str] | None] = {
    "float32": None,
    "split16": ("split16", "float32"),
    "split8": ("split8", "float32"),
    "stochastic": ("stochastic", "float32"),
    "stochastic, bfloat16": ("stochastic", "bfloat16"),
    "split8, 8bit": ("split8", "8bit"),
    "stochastic, 8bit": ("stochastic", "8bit"),
}
_COLUMNS = ("params, state", "GB", "B/param", "moved B/param", "ms", "speed-up")


class StorageRow(NamedTuple):
    """One way to store parameters and optimizer state.

    Attributes:
        name: Format of parameters and state, as ``optim.stored`` takes them.
        resident: Bytes of both between steps.
        moved: Least bytes that a step reads and writes: both in and out, and the gradients once.
        seconds: Time of a step at the bandwidth that large kernels reach.
    """

    name: str
    resident: int
    moved: int
    seconds: float


@dataclasses.dataclass(frozen=True, repr=False)
class StorageEstimate:
    """The cost of several ways to store parameters and optimizer state; it prints as a table.

    Attributes:
        device: The figures of the device.
        parameters: Number of parameters.
        rows: One per way.

    Example:
        >>> found = jmp.analysis.estimate_storage(jax.ShapeDtypeStruct((1024, 1024), jnp.float32))
        >>> found.parameters, round(found["split8, 8bit"].resident / found.parameters)
        (1048576, 5)
    """

    device: Device
    parameters: int
    rows: tuple[StorageRow, ...]

    def __getitem__(self, name: str) -> StorageRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} was not estimated; {[row.name for row in self.rows]} were.")

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures as numbers and strings, for JSON."""
        rows = [row._asdict() for row in self.rows]
        return {"device": self.device.title, "parameters": self.parameters, "rows": rows}

    def __str__(self) -> str:
        base = self.rows[0]
        cells = [
            (
                row.name,
                f"{row.resident / 1e9:.3g}",
                f"{row.resident / self.parameters:.3g}",
                f"{row.moved / self.parameters:.3g}",
                f"{row.seconds * 1e3:.3g}",
                f"{base.seconds / row.seconds:.2f}",
            )
            for row in self.rows
        ]
        return f"{self.parameters} parameters on {self.device.title}:\n\n{laid_out(_COLUMNS, cells)}"

    __repr__ = __str__


def estimate_storage(
    params: Any, optimizer: optax.GradientTransformation | None = None, *, device: str = "h100"
) -> StorageEstimate:
    """Estimates what the formats of ``optim.stored`` save: bytes between steps, and bytes and time of a step.

    Args:
        params: Parameters, or shapes in their place; floating ones count as float32.
        optimizer: The optimizer whose state is stored; AdamW by default.
        device: As for ``estimate``.

    Returns:
        A ``StorageEstimate``. Its bytes per step are a lower bound. Programs that XLA compiles for H100 move at most
        0.1 % more for large arrays (benchmarks/RESULTS.md, "Parameters and AdamW's state compiled for NVIDIA H100").

    Raises:
        InvalidAnalysisError: If the device is unknown, or there are no parameters.

    Example:
        >>> found = jmp.analysis.estimate_storage({"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)})
        >>> [round(found[name].moved / found.parameters) for name in ("float32", "split16", "stochastic, 8bit")]
        [28, 26, 10]
    """
    chosen = device_of(device)
    leaves = [leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype")]
    floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    count = sum(math.prod(leaf.shape) for leaf in floats)
    if not count:
        raise InvalidAnalysisError("estimate_storage takes parameters that hold floating-point arrays, and found none.")
    inner = optax.adamw(1e-3) if optimizer is None else optimizer
    rows = []
    for name, formats in FORMATS.items():
        dtype = FLOAT32 if formats is None else jnp.dtype(jnp.bfloat16)
        kept = [jax.ShapeDtypeStruct(leaf.shape, dtype) for leaf in floats]
        tx = inner if formats is None else stored(inner, params=formats[0], state=formats[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UncompressedStateWarning)  # the table says it
            state = jax.eval_shape(tx.init, kept)
        resident = _nbytes((kept, state))
        moved = 2 * resident + _nbytes(kept)
        seconds, _ = chosen.seconds(moved, 0, "float32")
        rows.append(StorageRow(name, resident, moved, seconds))
    return StorageEstimate(chosen, count, tuple(rows))


def _nbytes(tree: Any) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
