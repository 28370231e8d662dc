"""The command line: ``jmp-lite formats``, ``jmp-lite devices``, ``jmp-lite policy``, ``jmp-lite explain``."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._dtypes import dtype_name, dtype_to_names, faster_dtype
from jmp_lite._functions import check_function
from jmp_lite._messages import described
from jmp_lite._policy import get_policy
from jmp_lite.autocast import explain as explain_autocast
from jmp_lite.errors import JmpLiteError


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


def explain(target: str, spec: str, *, grad: bool) -> str:
    """Says what autocast does to every equation of a call.

    Args:
        target: ``module:function``, a function without parameters that returns ``(fun, *args)``; modules are looked for
            in the working directory as well.
        spec: A policy string.
        grad: Whether to explain the gradient with respect to the first argument.

    Raises:
        JmpLiteError: If there is no such function, or anything goes wrong in it.
    """
    resolved = get_policy(spec)
    module, _, name = target.partition(":")
    path = list(sys.path)
    sys.path.insert(0, "")
    try:
        fun, *args = getattr(importlib.import_module(module), name)()
        check_function(fun, "explain")
        return str(explain_autocast(jax.grad(fun) if grad else fun, resolved)(*args))
    except (Exception, SystemExit) as error:
        raise JmpLiteError(
            f"Cannot explain {target!r}: {described(error)} Write 'module:function', a function without parameters "
            "that returns (fun, *args)."
        ) from error
    finally:
        sys.path[:] = path


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"jmp-lite: {message}. Run {self.prog} --help.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Args:
        argv: Arguments without the program's name; ``None`` takes them from the process.

    Returns:
        0. Whatever goes wrong ends the process with one line and status 2.

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
    parser = _Parser(prog="jmp-lite", description="Mixed precision for JAX.")
    version = importlib.import_module("jmp_lite").__version__
    parser.add_argument("--version", action="version", version=f"%(prog)s {version} with jax {jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("formats", help="names, range and precision of every floating format")
    commands.add_parser("devices", help="local devices, and formats that are slow on them")
    show = commands.add_parser("policy", help="what a policy string stands for")
    show.add_argument("spec", help="such as mixed_bfloat16 or p=f32,c=bf16")
    decisions = commands.add_parser("explain", help="what autocast does to every equation of a function, and why")
    decisions.add_argument("target", help="module:function, a function that returns (fun, *args)")
    decisions.add_argument("--policy", default="mixed_bfloat16", dest="spec", help="default: %(default)s")
    decisions.add_argument("--grad", action="store_true", help="explain the gradient")
    arguments = parser.parse_args(argv)
    texts: dict[str, Callable[[], str]] = {
        "formats": formats,
        "devices": devices,
        "policy": lambda: policy(arguments.spec),
        "explain": lambda: explain(arguments.target, arguments.spec, grad=arguments.grad),
    }
    try:
        print(texts[arguments.command](), flush=True)
    except BrokenPipeError:  # of a reader such as head, which has seen enough
        _write_nowhere()
    except Exception as error:  # noqa: BLE001  # no device, a policy with a typing error: people need no traceback
        if isinstance(error, OSError):
            _write_nowhere()
        parser.exit(2, f"jmp-lite: {described(error)}\n")
    return 0


def _write_nowhere() -> None:
    """Python would try to write what it has not written, and fail again, when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
