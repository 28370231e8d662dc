"""Saving and restoring a train state: jmp_lite, with header and digests, against plain Orbax in one interleaved run.

python -m benchmarks.checkpoint            # 84 MB and 500 MB; replaces its section of RESULTS.md
python -m benchmarks.checkpoint --quick    # 8 MB, in a minute
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import jmp_lite as jmp
from benchmarks import _command, _measure, _report
from jmp_lite.checkpoint._state import describe

MODULE = "benchmarks.checkpoint"
BASELINE = "plain Orbax"
OURS = "jmp_lite"
LEAVES = 4
#: Megabytes; smaller states have more rounds, because single calls of theirs differ more.
LARGEST = 500
POLICY = "mixed_bfloat16"
HEADER = ("call", "first ms", "best ms", "median ms", "worst ms", "best / Orbax", "median / Orbax", "worst / Orbax")

_NOTES = f"""Float32 arrays, {LEAVES} of one size, on a local disk behind the page cache. Weights of a model are like
random numbers; constants compress to nothing, so that Orbax has little to do and the digests weigh most. `/ Orbax` is a
call over plain Orbax in the same round; **first** is the first call in the process, which compiles the digests. The
limits are held against the medians."""


class Row(NamedTuple):
    """Seconds of one call in all rounds, and over the baseline."""

    name: str
    first: float
    seconds: list[float]
    ratios: list[float]

    def cells(self) -> list[str]:
        """The row as text, in the order of `HEADER`."""
        times = (self.first, min(self.seconds), statistics.median(self.seconds), max(self.seconds))
        ratios = (min(self.ratios), statistics.median(self.ratios), max(self.ratios))
        return [
            self.name,
            *(_report.number(seconds * 1e3, 0) for seconds in times),
            *map(_report.number, ratios),
        ]


def make_state(megabytes: int, kind: str) -> dict[str, jax.Array]:
    """Arrays on no particular device."""
    size = megabytes * 10**6 // (4 * LEAVES)
    generator = np.random.default_rng(0)

    def leaf(index: int) -> jax.Array:
        if kind == "constants":
            return jnp.full((size,), float(index))
        return jnp.asarray(generator.standard_normal(size, dtype=np.float32))

    return {f"w{index}": leaf(index) for index in range(LEAVES)}


def saves(folder: Path, state: Any) -> dict[str, Callable[[], Any]]:
    """Both ways to save, each to a directory of its name, which must not exist, and what the second does more."""

    def plain() -> None:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(folder / BASELINE, args=ocp.args.StandardSave(state))

    def ours() -> None:
        jmp.checkpoint.save(folder / OURS, state, policy=POLICY)

    return {BASELINE: plain, OURS: ours, "header and digests alone": lambda: describe(state, POLICY)}


def restores(folder: Path, state: Any) -> dict[str, Callable[[], Any]]:
    """Plain Orbax, and templates of all kinds: values are there from `saves`."""
    fresh = jax.tree.map(jnp.zeros_like, state)
    templates = {
        "fresh arrays": fresh,
        "ShapeDtypeStruct": jax.eval_shape(lambda: state),
        "arrays on a device": jax.device_put(fresh, jax.devices()[0]),
        "NumPy arrays": jax.tree.map(np.asarray, fresh),
    }

    def plain() -> Any:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            return checkpointer.restore(folder / BASELINE, args=ocp.args.StandardRestore(fresh))

    def ours(template: Any) -> Callable[[], Any]:
        return lambda: jmp.checkpoint.restore(folder / OURS, template, policy=POLICY)

    return {BASELINE: plain, **{f"{OURS}, {name}": ours(template) for name, template in templates.items()}}


def seconds(call: Callable[[], Any], output: Path | None = None) -> float:
    """Wall time until the result is there; what the last call wrote is removed before."""
    if output:
        shutil.rmtree(output, ignore_errors=True)
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def measure(calls: Mapping[str, Callable[[], Any]], rounds: int, outputs: Path | None = None) -> list[Row]:
    """Times all calls in turns, in an order that rotates."""
    folders = {name: outputs and outputs / name for name in calls}
    first = {name: seconds(call, folders[name]) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for names in _measure.rotated(list(calls), rounds):
        for name in names:
            taken[name].append(seconds(calls[name], folders[name]))
    base = taken[BASELINE]
    return [Row(name, first[name], own, [a / b for a, b in zip(own, base, strict=True)]) for name, own in taken.items()]


def targets(saved: list[Row], restored: list[Row]) -> list[_report.Target]:
    """The limits that jmp_lite sets itself."""

    def medians(rows: list[Row], *names: str) -> list[float]:
        return [statistics.median(row.ratios) for row in rows if row.name in names]

    fresh = (f"{OURS}, fresh arrays", f"{OURS}, ShapeDtypeStruct")
    return [
        _report.Target("save / Orbax", 1.2, medians(saved, OURS)),
        _report.Target("restore into a fresh template / Orbax", 1.3, medians(restored, *fresh)),
    ]


def section(megabytes: int, kind: str, rounds: int) -> str:
    """The tables of one size."""
    sys.stderr.write(f"{megabytes} MB of {kind} ...\n")
    state = make_state(megabytes, kind)
    with tempfile.TemporaryDirectory() as folder:
        saved = measure(saves(Path(folder), state), rounds, Path(folder))
        restored = measure(restores(Path(folder), state), rounds)
    parts = [f"### {megabytes} MB of {kind}"]
    for title, rows in (("save", saved), ("restore", restored)):
        parts.append(_report.table((title, *HEADER[1:]), [row.cells() for row in rows]))
    parts.append("\n".join(target.line() for target in targets(saved, restored)))
    return _command.show("\n\n".join(parts))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark, prints its tables and writes its section."""
    parser = _command.parser(MODULE, __doc__, quick="8 MB", baseline=BASELINE)
    parser.add_argument("--rounds", type=int, help="rounds at 500 MB; smaller states get more (default: 15)")
    options = parser.parse_args(argv)
    _command.fill_in_results_file(options)
    rounds = options.rounds or (1 if options.quick else 15)
    cases = [(8, "random numbers")] if options.quick else [
        (84, "random numbers"),
        (LARGEST, "random numbers"),
        (84, "constants"),
    ]  # fmt: skip
    body = "\n\n".join(
        [_NOTES, *(section(megabytes, kind, rounds * LARGEST // megabytes) for megabytes, kind in cases)]
    )
    if options.out:
        device = jax.devices()[0]
        facts = {
            "command": f"`{_report.command(MODULE)}`",
            "versions": _report.versions(["orbax-checkpoint"]),
            "hardware": f"{device.device_kind}; {_report.hardware()}",
            "run": f"{rounds} rounds at {LARGEST} MB, and as many more of smaller states as they are smaller",
        }
        name = f"checkpoint, {device.platform}, jax {jax.__version__}"
        title = f"Checkpoints on {device.platform.upper()}, jax {jax.__version__}"
        _report.write_section(options.out, name, title, facts, body)


if __name__ == "__main__":
    main()
