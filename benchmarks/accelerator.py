"""Training steps of GPT-2 small and ResNet-50 on one GPU in every precision, in less than ten minutes.

    pip install -e '.[bench]' 'jax[cuda12]'
    python -m benchmarks.accelerator           # replaces its section of RESULTS.md
    python -m benchmarks.accelerator --tiny    # tiny models, on a CPU too; shows that everything runs

Beside them `torch.compile` under `torch.autocast`, where torch finds a GPU. The same programs compiled for an H100
without one: `benchmarks.aot.accelerator`. A smaller comparison that is installed with the library: `jmp-lite bench`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import _command, _report, _training_sizes, _training_turns, autocast
from jmp_lite._compat import QUICK_COMPILATION
from jmp_lite.cli._bench_measure import Run, baseline_of
from jmp_lite.cli._bench_variants import VARIANTS

MODULE = "benchmarks.accelerator"
#: Of everything; torch may take the part named below.
SECONDS, TORCH_SECONDS = 600.0, 150.0
STEPS, ROUNDS = 40, 5
TINY_STEPS, TINY_ROUNDS = 6, 2
TORCH = "torch.autocast bf16, torch.compile"
#: Bytes from which a device holds eight texts of GPT-2 in float32, and how many texts there are in a batch.
MEMORY, TEXTS, FEW_TEXTS = 25e9, 8, 4
HEADER = ("variant", "per second", "spread", "/ float32", "memory GB", "/ float32", "compile s", "loss", "/ float32")
LEGEND = """One step: loss, gradient, AdamW. `bf16 by hand` is Flax with `dtype=bfloat16`; the autocast rows are the
float32 model. `master weights` is `optim.stored(params="split16")`.

- **per second**: tokens or images, median over the rounds; variants take turns in an order that rotates. The first step
  of a turn is not timed. **spread**: the fastest round less the slowest, over the median. **/ float32**: median of the
  ratios within a round; of torch, which trains in its own process, the ratio of the medians.
- **memory**: arguments, outputs and scratch memory of the compiled step, arrays that are written in place counted once
  (`memory_analysis`); of torch, what its allocator counted (`max_memory_allocated`).
- **compile**: to trace, lower and compile the step; of torch, its first step.
- **loss**: mean of the last {last} of {steps} steps. The GPT reads characters of Python's standard library, the ResNet
  tells 100 patterns apart under noise. torch begins with other parameters."""


def sizes_for(device: jax.Device, *, is_tiny: bool) -> dict[str, _training_sizes.Sizes]:
    """What the device holds in float32."""
    if is_tiny:
        return _training_sizes.TINY
    limit = (device.memory_stats() or {}).get("bytes_limit", math.inf)
    return _training_sizes.full(TEXTS if limit >= MEMORY else FEW_TEXTS)


def torch_runs(workloads: Sequence[_training_turns.Workload], arguments: Sequence[str]) -> tuple[list[Run], str]:
    """Trains the same models in torch, in its own process; without CUDA, the reason why not.

    Args:
      workloads: the models.
      arguments: of `benchmarks._torch_training`.
    """
    if importlib.util.find_spec("torch") is None:
        return [], "torch is not installed"
    command = [sys.executable, "-m", "benchmarks._torch_training", *arguments]
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run(command, cwd=root, timeout=TORCH_SECONDS, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        return [], f"torch took more than {TORCH_SECONDS:g} s"
    if done.returncode:
        return [], (done.stderr.strip().splitlines() or [f"torch ended with status {done.returncode}"])[-1]
    figures: Mapping[str, Mapping[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return [Run(work, TORCH, **figures[work.name]) for work in workloads], ""


def cells(run: Run, base: Run) -> list[str]:
    """The row as text, in the order of `HEADER`; a variant that did not run says whether memory was the reason."""
    if run.error:
        reason = "does not fit" if is_out_of_memory(run) else "failed"
        return [run.variant, reason, *["-"] * (len(HEADER) - 2)]
    number = _report.number
    ratio = run.rate / base.rate if run.variant == TORCH else run.ratio_to(base)
    memory = run.peak_bytes or math.nan
    return [
        run.variant,
        f"{run.rate:,.0f}",
        f"{run.spread:.1%}",
        number(ratio),
        number(memory / 1e9),
        number(memory / (base.peak_bytes or math.nan)),
        number(run.compile_seconds, 1),
        number(run.loss, 4),
        number(run.loss / base.loss, 4),
    ]


def is_out_of_memory(run: Run) -> bool:
    """Whether the device had too little memory for a variant."""
    return "RESOURCE_EXHAUSTED" in run.error or "OutOfMemoryError" in run.error


def table(work: _training_turns.Workload, runs: Sequence[Run]) -> str:
    """All variants of one model, and what went wrong with those that did not run."""
    own = [run for run in runs if run.model is work]
    rows = [cells(run, baseline_of(own, run)) for run in own]
    failures = [f"- {run.variant}: {run.error}" for run in own if run.error]
    header = [HEADER[0], work.unit, *HEADER[2:]]
    parts = [f"### {work.name}: {work.sizes}", _report.table(header, rows), "\n".join(failures)]
    return "\n\n".join(filter(None, parts))


def driver() -> str:
    """Card, driver and memory as `nvidia-smi` gives them."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return "; ".join(done.stdout.strip().splitlines()) or done.stderr.strip()


def peak(device: jax.Device) -> str:
    """What the device counted over the whole run."""
    counted = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return f"{counted / 1e9:.1f} GB counted by the device over all variants" if counted else "not counted by the device"


def body(options: argparse.Namespace, device: jax.Device) -> tuple[str, dict[str, str], list[Run]]:
    """Trains everything; returns the tables, the facts to go with them, and the figures."""
    clock = _training_turns.Clock(SECONDS)
    steps, rounds = (TINY_STEPS, TINY_ROUNDS) if options.quick else (STEPS, ROUNDS)
    workloads = [_training_turns.workload(*item) for item in sizes_for(device, is_tiny=options.quick).items()]
    of_torch, missing = [], "left out by --skip-peers"
    if not options.skip_peers:
        texts = [] if options.quick else ["--texts", str(workloads[0].sizes.batch)]
        more = ["--steps", str(steps), "--rounds", str(rounds), "--last", str(_training_turns.LAST)]
        of_torch, missing = torch_runs(workloads, [*texts, *more])
    if missing:
        sys.stdout.write(f"torch left out: {missing}\n\n")
    quick = QUICK_COMPILATION if options.quick and device.platform == "cpu" else None
    ours, done = _training_turns.train(workloads, VARIANTS, clock, steps=steps, rounds=rounds, options=quick)
    legend = LEGEND.format(last=min(_training_turns.LAST, steps * done), steps=steps * done)
    tables = [_command.show(table(work, [*ours, *of_torch])) for work in workloads]
    facts = {
        "run": f"{done} of {rounds} rounds of {steps} steps; {SECONDS - clock.left():.0f} s in all",
        "peak": peak(device),
        **({"torch left out": missing} if missing else {}),
    }
    return "\n\n".join([legend, *tables]), facts, [*ours, *of_torch]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark and writes its section; fails where a variant failed for another reason than memory."""
    made = _command.parser(MODULE, __doc__, quick="tiny models", baseline="Flax")
    options = made.parse_args(argv)
    _command.fill_in_results_file(options)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch trains on the same card
    autocast.avoid_wrong_code()
    device = jax.devices()[0]
    if device.platform == "cpu" and not options.quick:
        sys.exit(f"{MODULE} needs a GPU, and JAX finds none; --tiny runs small models on this CPU.")
    text, run_facts, runs = body(options, device)
    precision = jax.config.jax_default_matmul_precision or "default: TF32 on GPUs that have it"
    facts = {
        "command": f"`{_report.command(MODULE)}`",
        "versions": _report.versions(("torch",)),
        "hardware": f"{device.device_kind}; {_report.hardware()}",
        "driver": driver(),
        "float32 matmuls": precision,
        **run_facts,
    }
    if options.out:
        title = f"Training steps on {device.device_kind}, jax {jax.__version__}"
        _report.write_section(options.out, "accelerator", title, facts, text)
    failed = [
        f"{run.model.name}, {run.variant}: {run.error}" for run in runs if run.error and not is_out_of_memory(run)
    ]
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
