"""Trains a CNN and a character GPT in 32, 16 and 8 bits and with pruned weights, and compares what they are worth.

python examples/lowbit.py                          # both models, everything: about two minutes on two cores
python examples/lowbit.py --model digits --variant fp8 w8a8
"""

import argparse
import sys
from pathlib import Path

import _devices
import _lowbit_report
from _lowbit_models import MODELS, Model
from _lowbit_training import Result, Run
from _lowbit_variants import VARIANTS
from _options import positive
from _progress import progress_bar
from rich.console import Console
from rich.progress import Progress

import jmp_lite as jmp

REFERENCE = "fp32"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line; readies the CPU for bfloat16."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    about = f"of {', '.join(VARIANTS)}; all is the default; {REFERENCE} is always there to compare with"
    add("--model", choices=(*MODELS, "all"), default="all", help="default: %(default)s")
    add("--variant", choices=(*VARIANTS, "all"), nargs="+", default=["all"], metavar="VARIANT", help=about)
    add("--steps", type=positive, default=300, help="of each training; default: %(default)s")
    add("--seed", type=int, default=0, help="of the split, the batches and the parameters; default: %(default)s")
    add("--output", type=Path, default=Path("runs/lowbit"), metavar="DIR", help="default: %(default)s")
    parsed = options.parse_args(arguments)
    if parsed.seed < 0:
        options.error(f"--seed {parsed.seed}: expected a whole number of at least 0")
    parsed.model = list(MODELS) if parsed.model == "all" else [parsed.model]
    parsed.variant = [name for name in VARIANTS if {name, "all"} & {*parsed.variant, REFERENCE}]
    _devices.avoid_wrong_code()
    return parsed


def compare(model: Model, options: argparse.Namespace, folder: Path, progress: Progress) -> list[Result]:
    """Trains and measures one model in all variants, the reference first."""
    data, trained, results = model.load(options.seed), {}, []
    for name in options.variant:
        run, losses = Run(model, name, options.steps), []
        source = run.variant.trained_as or name
        if source == name:
            task = progress.add_task(f"{folder.name} {name}", total=options.steps, status="compiling")
            for params, losses in run.train(data, options.seed):
                trained[name] = params
                progress.update(task, completed=len(losses), status=f"loss {losses[-1]:.3f}")
        results.append(run.measure(trained[source], losses, data, folder))
        if losses:
            progress.update(task, status=_lowbit_report.score(model, results[-1]))
    return results


def main(arguments: list[str] | None = None) -> int:
    """Trains what the command line asks for, and reports."""
    options = parse(arguments)
    console = Console()
    compared = []
    try:
        with progress_bar(console) as progress:
            for name in options.model:
                results = compare(MODELS[name], options, options.output / name, progress)
                compared.append((MODELS[name], results))
    except jmp.errors.JmpLiteError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    length = f"{options.steps} steps, seed {options.seed}"
    for model, results in compared:
        console.print(f"\n{model.title}, {length}", style="bold", highlight=False, soft_wrap=True)
        console.print(_lowbit_report.table(model, results))
    picture = options.output / "lowbit.png"
    _lowbit_report.draw(compared, f"Fewer bits, fewer weights: {length}", picture)
    console.print(f"Weights: {options.output}/*/*.msgpack   Picture: {picture}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
