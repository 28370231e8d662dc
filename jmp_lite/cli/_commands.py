"""Every command, a row each: its name, what help says, its arguments, and the function that returns its text."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jmp_lite.cli._bench import bench
from jmp_lite.cli._devices import devices
from jmp_lite.cli._explain import explain
from jmp_lite.cli._policies import formats, policy


class Argument(NamedTuple):
    """An argument, as ``argparse`` takes it."""

    names: tuple[str, ...]
    settings: Mapping[str, Any]

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Teaches it to a parser."""
        parser.add_argument(*self.names, **self.settings)


def _argument(*names: str, **settings: Any) -> Argument:
    return Argument(names, settings)


class Command(NamedTuple):
    """One command.

    Attributes:
        name: What people type.
        help: A line for ``jmp-lite --help``.
        run: Takes the arguments by name and returns what is printed.
        arguments: What it takes.
        more: What ``--help`` of the command says beyond the line.
    """

    name: str
    help: str
    run: Callable[..., str]
    arguments: tuple[Argument, ...] = ()
    more: str = ""


COMMANDS: tuple[Command, ...] = (
    Command("formats", "names, range and precision of every floating format", formats),
    Command(
        "devices",
        "local devices, and formats that are slow on them",
        devices,
        (_argument("--measure", action="store_true", help="time matrix products of each dtype, and a copy"),),
        "With --measure, one device of each kind multiplies square matrices that keep it busy for about 20 ms, and "
        "copies an array; the best of several runs counts. It takes a few seconds.",
    ),
    Command(
        "policy",
        "what a policy string stands for",
        policy,
        (_argument("spec", help="such as mixed_bfloat16 or p=f32,c=bf16"),),
    ),
    Command(
        "explain",
        "what autocast does to every equation of a function, and why",
        explain,
        (
            _argument("target", help="module:function, a function that returns (fun, *args)"),
            _argument("--policy", default="mixed_bfloat16", dest="spec", help="default: %(default)s"),
            _argument("--grad", action="store_true", help="explain the gradient"),
        ),
    ),
    Command(
        "bench",
        "speed, memory and loss of mixed precision on this machine",
        bench,
        (
            _argument("--tiny", action="store_true", help="models that only show that everything runs; under a minute"),
            _argument("--json", metavar="PATH", help="write all figures to this file"),
            _argument("--png", metavar="PATH", help="draw them; needs pip install 'jmp-lite[analysis]'"),
        ),
        "Trains a GPT and a ResNet on random data: in float32, in bfloat16 by hand, under autocast in bfloat16 and in "
        "float16 with a loss scale, with FP8 products, and with parameters and optimizer state in fewer bytes. On a "
        "GPU they have the sizes of GPT-2 (124 M parameters) and ResNet-18, on a CPU they are small; it takes about "
        "five minutes. Variants take turns, so that a machine that slows down slows all of them.",
    ),
)
