"""Command line of ``digits.py``."""

import argparse
from pathlib import Path
from typing import Any

import _devices
from _digits_data import NUM_TRAIN
from _options import POLICIES, add_state, policy, positive


def factor(text: str) -> float:
    """Parses a positive number such as ``0.5`` or ``2**-20``."""
    base, power, exponent = text.partition("**")
    try:
        value = float(base) ** float(exponent) if power else float(base)
    except (ValueError, OverflowError, ZeroDivisionError):
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number or power, got {text!r}")
    return value


def parser(description: str) -> argparse.ArgumentParser:
    """The options, with their defaults."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    add(
        "--policy",
        type=policy,
        nargs="+",
        default=["all"],
        metavar="POLICY",
        help=f"any policies, e.g. mixed_float16, bf16 or p=f32,c=f16,o=f32; all (the default): {', '.join(POLICIES)}",
    )
    add("--framework", choices=("linen", "nnx"), default="linen", help="which Flax API the model is written in")
    add(
        "--devices",
        type=positive,
        default=1,
        metavar="N",
        help="train on N devices with pmap; simulated on the CPU where the machine has fewer",
    )
    add("--epochs", type=positive, default=12, help="default: %(default)s")
    add("--steps", type=positive, help="stop after so many steps, whatever --epochs says")
    add("--batch-size", type=positive, default=64, help="over all devices together; default: %(default)s")
    add("--seed", type=int, default=0, help="of the split, the batches and the parameters; default: %(default)s")
    add(
        "--loss-scale",
        choices=("auto", "none", "static", "dynamic"),
        default="auto",
        help="auto: dynamic where a policy computes in float16, none elsewhere; static is 2**15",
    )
    add(
        "--loss-multiplier",
        type=factor,
        default=1.0,
        metavar="X",
        help="multiply the loss before differentiation, and the gradients by 1/X after they are unscaled: "
        "with 2**-20 float16 learns nothing without a loss scale",
    )
    add_state(options)
    add(
        "--output",
        type=Path,
        default=Path("runs/digits"),
        metavar="DIR",
        help="where the PNG and the checkpoints go; default: %(default)s",
    )
    add("--resume", action="store_true", help="resume from the checkpoints in --output")
    add("--logdir", type=Path, metavar="DIR", help="write TensorBoard event files there")
    return options


def parse(description: str, arguments: list[str] | None) -> argparse.Namespace:
    """Parses and checks the command line; readies the CPU for what it asks."""
    options = parser(description)
    parsed = options.parse_args(arguments)
    names = [name for text in parsed.policy for name in (POLICIES if text == "all" else (text,))]
    parsed.policy = list(dict.fromkeys(names))
    if parsed.batch_size > NUM_TRAIN:
        options.error(f"--batch-size {parsed.batch_size}: there are {NUM_TRAIN} training images")
    if parsed.batch_size % parsed.devices:
        options.error(f"--batch-size {parsed.batch_size} does not divide among --devices {parsed.devices}")
    _devices.avoid_wrong_code()
    if parsed.devices > 1:
        _devices.simulate(parsed.devices)
    return parsed


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a resumed run must share with the run it resumes from."""
    names = ("framework", "batch_size", "seed", "loss_scale", "loss_multiplier", "state")
    return {name: getattr(options, name) for name in names}
