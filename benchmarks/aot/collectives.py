"""What travels between the devices of a training step, compiled for 8, 64 and 256 H100 or TPU v5e that are not there.

    pip install 'jmp_lite[aot]'
    python -m benchmarks.aot.collectives            # replaces its sections of RESULTS.md
    python -m benchmarks.aot.collectives --quick    # 8 devices alone

Dtypes and bytes of the collectives in the optimized program are exact; nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jmp_lite.analysis._estimation._compiled import _targets

_targets.configure()

import jax  # noqa: E402

# With one device JAX would take every array for a local one.
jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import AxisType, Mesh  # noqa: E402

import jmp_lite as jmp  # noqa: E402
from benchmarks import _collectives, _command, _report, _wire_designs  # noqa: E402
from benchmarks._wire_designs import AXIS, MODES, PARAMETERS, Mode  # noqa: E402
from jmp_lite.analysis._estimation._compiled import _hlo  # noqa: E402

MODULE = "benchmarks.aot.collectives"
COMPILERS = {"h100": ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"), "tpu": ("libtpu",)}
REDUCE = {"f32": jnp.float32, "bf16": jnp.bfloat16}
BYTES = {"f32": 4, "bf16": 2}

LEGEND = f"""One step of {_wire_designs.LAYERS} float32 weights of {_wire_designs.WIDTH} x {_wire_designs.WIDTH} in
mixed bfloat16, split over devices (FSDP) or copied to each. `gathers`, `sums`, `others`: bytes per parameter of the
arrays that are gathered, added up over devices, or moved otherwise, with their dtypes; each array counts with its whole
size. Ideal is one gather in bfloat16 where parameters are split, and one sum in the dtype asked for. The peers have no
such setting: one sum in either dtype counts as ideal. On 64 and more TPUs XLA turns gathers of matrices this small into
sums of the same bytes; those of 8192 x 8192 stay gathers."""


class Traffic(NamedTuple):
    """What the collectives of a step carry, in bytes per parameter, and how many of them are scalars."""

    gathers: dict[str, float]
    sums: dict[str, float]
    others: dict[str, float]
    scalars: int


_KINDS = {"all-gather": "gathers", "all-reduce": "sums", "reduce-scatter": "sums"}


def traffic(step: _wire_designs.Step, devices: int) -> Traffic:
    """Compiles a step and reads its collectives."""
    fun, arguments = step
    module = _hlo.parse(fun.lower(*arguments).compile().as_text())
    found = Traffic({}, {}, {}, 0)
    for collective in _collectives.collectives(module, devices):
        if collective.elements < _hlo.LARGE_ELEMENTS:
            found = found._replace(scalars=found.scalars + 1)
            continue
        held = getattr(found, _KINDS.get(collective.opcode, "others"))
        held[collective.dtype] = held.get(collective.dtype, 0.0) + collective.bytes / PARAMETERS
    return found


def cell(held: dict[str, float]) -> str:
    """Bytes per parameter by dtype, as text."""
    return ", ".join(f"{dtype} {_report.number(size)}" for dtype, size in sorted(held.items())) or "-"


def cells(found: Traffic) -> list[str]:
    """Gathers, sums and others, as text."""
    return [cell(held) for held in found[:3]]


def yes(condition: bool) -> str:
    """An answer for a table."""
    return "yes" if condition else "no"


def mesh_of(target: str, count: int) -> Mesh:
    """So many devices of a target along one axis."""
    return Mesh(np.array(_targets.devices(target, count)), (AXIS,), axis_types=(AxisType.Auto,))


def policy_with(reduce: str) -> jmp.Policy:
    """Mixed bfloat16 whose gradients are added up in a dtype."""
    return jmp.Policy(jnp.float32, jnp.bfloat16, jnp.float32, reduce_dtype=REDUCE[reduce])


# --- Dtypes ---


def ideal(mode: Mode, reduce: str) -> Traffic:
    """One gather in bfloat16 where there is something to gather, one sum."""
    return Traffic({"bf16": 2.0} if mode.is_sharded else {}, {reduce: float(BYTES[reduce])}, {}, 0)


def dtypes_table(target: str, skip_peers: bool) -> tuple[str, list[_report.Target]]:
    """One row per mode and design, on 8 devices."""
    mesh, tx, rows, distances = mesh_of(target, 8), optax.sgd(0.1), [], []
    for mode in MODES:
        for reduce in REDUCE:
            policy = policy_with(reduce)
            found = traffic(_wire_designs.spread(bind(_wire_designs.ours, policy, mode), mode, mesh, tx), 8)
            wanted = ideal(mode, reduce)
            distances.append(float(found[:3] != wanted[:3]))
            rows.append([mode.title, f"jmp_lite, reduce {reduce}", *cells(found), yes(found[:3] == wanted[:3])])
        for name in () if skip_peers else ("jmp", "mpx"):
            found = traffic(_wire_designs.spread(bind(_wire_designs.peer, name, mode), mode, mesh, tx), 8)
            is_ideal = found[:3] in [ideal(mode, reduce)[:3] for reduce in REDUCE]
            rows.append([mode.title, name, *cells(found), yes(is_ideal)])
    header = ("mode", "design", "gathers", "sums", "others", "ideal")
    return _report.table(header, rows), [_report.Target("collectives that differ from the ideal", 0, distances)]


def bind(make: Callable[..., Any], *arguments: Any) -> Callable[[Any], Any]:
    """Leaves the sharding open, which comes last."""
    return lambda sharding: make(*arguments, sharding)


# --- The verdict ---


def verdict_table(target: str, counts: Sequence[int]) -> tuple[str, list[_report.Target]]:
    """What the check of `loss_scaled` adds to a step, by the number of devices."""
    rows, more = [], []
    for mode in MODES:
        axis_name = AXIS if mode.form != "jit" and mode.is_sharded else None
        optimizers = [optax.adamw(1e-3), jmp.loss_scaled(optax.adamw(1e-3), axis_name=axis_name)]
        for count in counts:
            mesh, gradient = mesh_of(target, count), bind(_wire_designs.ours, policy_with("f32"), mode)
            bare, checked = (traffic(_wire_designs.spread(gradient, mode, mesh, tx), count) for tx in optimizers)
            more.append(checked.scalars - bare.scalars)
            same = "same" if bare[:3] == checked[:3] else "differ"
            rows.append([mode.title, str(count), *cells(checked), str(bare.scalars), str(checked.scalars), same])
    header = ("mode", "devices", "gathers", "sums", "others", "scalars, bare", "scalars, checked", "rest")
    return _report.table(header, rows), [_report.Target("collectives of the verdict", 1, more)]


# --- Report ---


def report(target: str, options: argparse.Namespace) -> None:
    """Compiles everything for one target, prints its tables and writes its section.

    Raises:
      TargetUnavailableError: the wheels of the target's compiler are absent.
    """
    counts = (8,) if options.quick else (8, 64, 256)
    facts = {
        "command": f"`{_report.command(MODULE)}`",
        "versions": _report.versions(COMPILERS[target]),
        "compiled for": f"{_targets.TARGETS[target]}, without one; kernel autotuning off",
    }
    sys.stdout.write(f"## {_targets.TARGETS[target]}\n\n")
    parts = [LEGEND]
    for title, (table, limits) in (
        ("Dtypes on the wire, 8 devices", dtypes_table(target, options.skip_peers)),
        ("With AdamW and the check, 8 to 256 devices", verdict_table(target, counts)),
    ):
        held = "\n".join(limit.line() for limit in limits)
        parts.append(_command.show(f"### {title}\n\n{table}\n\n{held}"))
    if options.out:
        section = f"collectives, {target} without a device, jax {jax.__version__}"
        title = f"Collectives compiled for {_targets.TARGETS[target]}, jax {jax.__version__}"
        _report.write_section(options.out, section, title, facts, "\n\n".join(parts))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark for each target asked for; exits with a message if a compiler is absent."""
    parser = _command.parser(MODULE, __doc__, quick="8 devices alone", baseline="nothing")
    parser.add_argument("--targets", nargs="+", choices=_targets.TARGETS, default=list(_targets.TARGETS))
    options = parser.parse_args(argv)
    _command.fill_in_results_file(options)
    _targets.for_each(options.targets, lambda target: report(target, options))


if __name__ == "__main__":
    main()
