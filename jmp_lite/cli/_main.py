"""From arguments to text and an exit status."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax

from jmp_lite._messages import described
from jmp_lite.cli._commands import COMMANDS
from jmp_lite.cli._outcome import Outcome

#: What shells call the end by Ctrl-C.
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"jmp-lite: {message}. Run {self.prog} --help.\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="jmp-lite",
        description="Mixed precision for JAX.",
        epilog="jmp-lite command --help says more. Whatever goes wrong is one line, and status 2; Ctrl-C is 130.",
    )
    version = importlib.import_module("jmp_lite").__version__
    parser.add_argument("--version", action="version", version=f"%(prog)s {version} with jax {jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, title="commands", metavar="command")
    for command in COMMANDS:
        about = f"{command.help[0].upper()}{command.help[1:]}. {command.more}".strip()
        one = commands.add_parser(command.name, help=command.help, description=about)
        for argument in command.arguments:
            argument.add_to(one)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Args:
        argv: Arguments without the program's name; ``None`` takes them from the process.

    Returns:
        0, or 1 if ``audit`` or ``analyze`` found an error or a warning. Whatever goes wrong ends the process with one
        line and status 2; Ctrl-C ends it with 130.

    Example:
        >>> from jmp_lite import cli
        >>> cli.main(["policy", "mixed_float16"])
        field          dtype
        param_dtype    float32
        compute_dtype  float16
        output_dtype   float32
        reduce_dtype   float32 (default)
        0
    """
    parser = _parser()
    arguments = vars(parser.parse_args(argv))
    run = {command.name: command.run for command in COMMANDS}[arguments.pop("command")]
    try:
        found = run(**arguments)
        outcome = Outcome(found) if isinstance(found, str) else found
        print(outcome.text, flush=True)
    except BrokenPipeError:  # of a reader such as head, which has seen enough
        _write_nowhere()
        return 0
    except KeyboardInterrupt:
        parser.exit(INTERRUPTED, "\njmp-lite: interrupted.\n")
    except Exception as error:  # noqa: BLE001  # no device, a policy with a typing error: people need no traceback
        if isinstance(error, OSError):
            _write_nowhere()
        parser.exit(2, f"jmp-lite: {described(error)}\n")
    if outcome.complaint:
        parser.exit(outcome.status, f"jmp-lite: {outcome.complaint}\n")
    return outcome.status


def _write_nowhere() -> None:
    """Python would try to write what it has not written, and fail again, when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
