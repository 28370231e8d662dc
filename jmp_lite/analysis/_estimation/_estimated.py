"""The result of an estimate: figures of every precision, a table, and a verdict."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jmp_lite._text import table as laid_out
from jmp_lite.analysis._estimation._devices import Device

_EIGHT = ("float8", "int8")
_COLUMNS = ("precision", "ms", "speed-up", "by memory", "MB", "launches", "TFLOP")
#: Of what launches do, in the order in which they are told.
_PARTS = ("matmuls", "quantize", "casts", "loops", "other")


class Part(NamedTuple):
    """The cost of the launches of one purpose.

    Attributes:
        bytes: Bytes read and written.
        seconds: Time by the roofline.
    """

    bytes: int
    seconds: float


class Configuration(NamedTuple):
    """The cost of a step in one precision.

    Attributes:
        name: Name of the precision.
        bytes: Bytes read and written by all launches.
        flops: FLOPs of matmuls and convolutions, by the units they run on: ``float8``, ``bfloat16``, ``precise``, ...
        launches: Number of launches.
        seconds: Time by the roofline.
        memory_bound: Share of the time in memory-bound launches.
        speedup: Speed-up over the first precision.
        parts: Cost by purpose: ``matmuls`` with their fusions; ``quantize``, passes that find scales, round
            to 8 bits and copy for matmuls; ``casts`` of whole arrays; ``loops``, arrays that scans stack; ``other``.

    Example:
        >>> x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
        >>> found = jmp.analysis.estimate(jnp.matmul, device="a100", policies=None, compiled=False)(x, x)
        >>> [(row.flops, row.launches, row.speedup) for row in found]
        [({'float32': 268435456}, 1, 1.0)]
    """

    name: str
    bytes: int
    flops: Mapping[str, int]
    launches: int
    seconds: float
    memory_bound: float
    speedup: float
    parts: Mapping[str, Part]

    def over(self, base: "Configuration") -> "Configuration":
        """Returns a copy with the speed-up over another."""
        return self._replace(speedup=base.seconds / self.seconds if self.seconds else 1.0)

    @property
    def is_narrow(self) -> bool:
        """Whether there are matmuls in 8 bits."""
        return any(kind in self.flops for kind in _EIGHT)

    def cost_of(self, part: str) -> Part:
        """Returns the cost of a part."""
        return self.parts.get(part, Part(0, 0.0))


@dataclasses.dataclass(frozen=True, repr=False)
class Estimate:
    """The cost of a step on a device, in several precisions.

    Attributes:
        device: The figures of the device.
        rows: One per precision, in the order given.
        is_compiled: Whether bytes and launches come from compiled programs or from the model.

    Example:
        >>> w, x = (jax.ShapeDtypeStruct((512, 512), jnp.float32) for _ in range(2))
        >>> run = jmp.analysis.estimate(lambda w, x: jnp.sum(x @ w), device="tpu_v5e", policies=["float32", "bf16"])
        >>> print(str(run(w, x)).splitlines()[0])
        On TPU v5e, by the model: bf16 does not pay, 0.94x over float32: matmuls 0.00904 to 0.00603 ms...
    """

    device: Device
    rows: tuple[Configuration, ...]
    is_compiled: bool

    def __iter__(self) -> Iterator[Configuration]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> Configuration:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} was not estimated; {[row.name for row in self.rows]} were.")

    @property
    def verdict(self) -> tuple[str, ...]:
        """Sentences on every precision but the first, and on formats without units."""
        kinds = dict.fromkeys(kind for row in self.rows for kind in row.flops)
        lacking = [kind for kind in kinds if kind != "precise" and kind not in self.device.peak]
        return (
            *(self._said(at) for at in range(1, len(self.rows))),
            *(_without_units(self.device, kind) for kind in lacking),
        )

    def _said(self, at: int) -> str:
        row = self.rows[at]
        before = self.rows[:at]
        wide = [other for other in before if not other.is_narrow] or before
        base = min(wide, key=lambda other: other.seconds) if row.is_narrow else before[0]
        gain = base.seconds / row.seconds if row.seconds else 1.0
        pays = "pays" if gain >= 1 else "does not pay,"
        least = base.seconds / 50
        parts = [_changed(part, row.cost_of(part), base.cost_of(part), least) for part in _PARTS]
        return f"{row.name} {pays} {gain:.2f}x over {base.name}: {', '.join(filter(None, parts)) or 'nothing changes'}."

    def table(self) -> str:
        """Returns the figures as text, one precision per line."""
        return laid_out(_COLUMNS, [_cells(row) for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures as numbers and strings, for JSON."""
        rows = [
            row._asdict() | {"flops": dict(row.flops), "parts": {name: p._asdict() for name, p in row.parts.items()}}
            for row in self.rows
        ]
        return {
            "device": self.device.title,
            "is_compiled": self.is_compiled,
            "rows": rows,
            "verdict": list(self.verdict),
        }

    def __str__(self) -> str:
        how = "compiled for it" if self.is_compiled else "by the model"
        lines = self.verdict or (f"{self.rows[0].name} takes {_ms(self.rows[0].seconds)} ms.",)
        return f"On {self.device.title}, {how}: " + "\n".join(lines) + f"\n\n{self.table()}"

    __repr__ = __str__


def _without_units(device: Device, kind: str) -> str:
    wider = "bfloat16" if kind in _EIGHT else "float32"
    return f"{device.title} has no units for {kind}: such matmuls run as {wider}."


def _changed(part: str, now: Part, before: Part, least: float) -> str:
    """Describes the change of a part, if it is large enough."""
    if abs(now.seconds - before.seconds) < least:
        return ""
    was = f"{_ms(before.seconds)} to " if before.seconds else ""
    return f"{part} {was}{_ms(now.seconds)} ms ({now.bytes / 1e6:.0f} MB)"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _cells(row: Configuration) -> tuple[str, ...]:
    work = ", ".join(f"{count / 1e12:.3g} {kind}" for kind, count in row.flops.items()) or "none"
    return (
        row.name,
        _ms(row.seconds),
        f"{row.speedup:.2f}",
        f"{row.memory_bound:.0%}",
        f"{row.bytes / 1e6:.0f}",
        str(row.launches),
        work,
    )
