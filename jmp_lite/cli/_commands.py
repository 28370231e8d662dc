"""Every command, a row each: its name, what help says, its arguments, and the function that returns its text."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jmp_lite.cli._analysis import analyze, audit, estimate
from jmp_lite.cli._bench import bench
from jmp_lite.cli._devices import devices
from jmp_lite.cli._explain import explain
from jmp_lite.cli._outcome import Outcome
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
        run: Takes the arguments by name and returns what is printed, with a status where that is not always 0.
        arguments: What it takes.
        more: What ``--help`` of the command says beyond the line.
    """

    name: str
    help: str
    run: Callable[..., str | Outcome]
    arguments: tuple[Argument, ...] = ()
    more: str = ""


_TARGET = _argument("target", help="module:function, a function that returns (fun, *args)")
_STATUS = "The status is 1 if an error or a warning is found, and 0 if nothing or notes are; whatever goes wrong is 2."

COMMANDS: tuple[Command, ...] = (
    Command("formats", "names, range and precision of every floating format", formats),
    Command(
        "devices",
        "local devices, and formats that are slow on them",
        devices,
        (_argument("--measure", action="store_true", help="time matmuls of each dtype, and a copy"),),
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
            _TARGET,
            _argument("--policy", default="mixed_bfloat16", dest="spec", help="default: %(default)s"),
            _argument("--grad", action="store_true", help="explain the gradient"),
        ),
    ),
    Command(
        "audit",
        "what runs in which precision, and what is wrong with it, before it runs",
        audit,
        (
            _TARGET,
            _argument("--policy", dest="spec", help="as autocast runs it; default: as it is written"),
            _argument("--json", metavar="PATH", help="write everything to this file"),
        ),
        f"Nothing is computed: arguments may be jax.ShapeDtypeStruct. {_STATUS}",
    ),
    Command(
        "analyze",
        "what a policy does to the numbers of a function",
        analyze,
        (
            _TARGET,
            _argument("--policy", default="mixed_bfloat16", dest="spec", help="default: %(default)s"),
            _argument("--html", metavar="PATH", help="write one page; needs pip install 'jmp-lite[analysis]'"),
            _argument("--json", metavar="PATH", help="write everything to this file"),
            _argument("--png", metavar="FOLDER", help="draw it; needs pip install 'jmp-lite[analysis]'"),
        ),
        "Audits the function, runs it, counts its numbers, and compares results and gradients with those in float32; "
        f"if something is not finite, names the equation that made it. {_STATUS}",
    ),
    Command(
        "estimate",
        "what a training step costs on a device that is not there",
        estimate,
        (
            _TARGET,
            _argument("--device", default="h100", help="default: %(default)s"),
            _argument("--compiled", action="store_true", help="compile for it; needs pip install 'jmp-lite[aot]'"),
        ),
        "The function is a loss in float32. Without --compiled, bytes are by a model of what the compiler joins.",
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
        "float16 with a loss scale, with FP8 matmuls, and with parameters and optimizer state in fewer bytes. On a "
        "GPU they have the sizes of GPT-2 (124 M parameters) and ResNet-18, on a CPU they are small; it takes about "
        "five minutes. Variants take turns, so that a machine that slows down slows all of them.",
    ),
)
