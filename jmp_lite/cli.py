"""The command line: ``jmp-lite formats``, ``jmp-lite devices``, ``jmp-lite policy``."""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._dtypes import dtype_name, dtype_to_names, faster_dtype
from jmp_lite._errors import JmpLiteError
from jmp_lite._policy import get_policy


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out text in left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def formats() -> str:
    """Describes every floating format: names, range and precision."""
    rows = []
    for scalar_type, names in dtype_to_names.items():
        info: Any = jnp.finfo(scalar_type)  # type: ignore[no-untyped-call]
        limits = [f"{float(x):.6g}" for x in (info.max, info.smallest_normal, info.smallest_subnormal)]
        rows.append([names[0], ", ".join(names[1:]), str(info.bits), *limits, f"2**-{info.nmant}"])
    return _table(["name", "also", "bits", "max", "smallest normal", "smallest", "spacing at 1"], rows)


def devices() -> str:
    """Describes the local devices: for each format whether it is fast there, or what to use instead."""
    rows = []
    for device in jax.local_devices():
        capability = getattr(device, "compute_capability", None)
        verdicts = []
        for scalar_type in dtype_to_names:
            dtype = np.dtype(scalar_type)
            better = faster_dtype(dtype, device.platform, capability)
            if better:
                verdicts.append(f"{dtype_name(dtype)} is slow (use {better})")
        rows.append(
            [
                str(device.id),
                device.platform,
                device.device_kind,
                "; ".join(verdicts) or "nothing known against any format",
            ]
        )
    return _table(["id", "platform", "kind", "formats"], rows)


def policy(spec: str) -> str:
    """Says what a policy string stands for."""
    parsed = get_policy(spec)
    fields = ("param_dtype", "compute_dtype", "output_dtype", "reduce_dtype")
    rows = [[field, str(getattr(parsed, field) or "float32 (default)")] for field in fields]
    return _table(["field", "dtype"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Args:
        argv: Arguments without the program's name; ``None`` takes them from the process.

    Returns:
        0, or 2 if a policy cannot be parsed.

    Example:
        >>> from jmp_lite import cli
        >>> cli.main(["policy", "mixed_float16"])
        field          dtype
        -------------  -----------------
        param_dtype    float32
        compute_dtype  float16
        output_dtype   float32
        reduce_dtype   float32 (default)
        0
    """
    parser = argparse.ArgumentParser(prog="jmp-lite", description="Mixed precision for JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("formats", help="names, range and precision of every floating format")
    commands.add_parser("devices", help="local devices, and formats that are slow on them")
    show = commands.add_parser("policy", help="what a policy string stands for")
    show.add_argument("spec", help="such as mixed_bfloat16 or p=f32,c=bf16")
    arguments = parser.parse_args(argv)
    try:
        text = {"formats": formats, "devices": devices}.get(arguments.command, lambda: policy(arguments.spec))()
    except JmpLiteError as error:
        parser.exit(2, f"jmp-lite: {error}\n")
    print(text)
    return 0
