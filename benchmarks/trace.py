"""Time to trace the gradient of a GPT of some depth: by hand in bfloat16 and under autocast.

python -m benchmarks.trace             # replaces its section of RESULTS.md
python -m benchmarks.trace --quick     # two depths, written nowhere
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jmp_lite as jmp
from benchmarks import _models, _report

DEPTHS, ROUNDS, LIMIT = (6, 12, 24, 48), 4, 1.2
SIZES = {"width": 64, "heads": 4, "vocabulary": 128}


def seconds(make: Callable[[], Callable[..., Any]], shapes: Any) -> float:
    """The least processor time of some traces, each of a new function, since JAX remembers those that it knows."""
    found = []
    for _ in range(ROUNDS):
        gradient = jax.grad(make(), has_aux=True)
        gc.collect()
        start = time.process_time()
        jax.make_jaxpr(gradient)(*shapes)
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    """Measures every depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two depths, written nowhere")
    quick = parser.parse_args().quick
    rows, ratios = [], []
    for layers in DEPTHS[:2] if quick else DEPTHS:
        network = functools.partial(_models.GPT, layers=layers, **SIZES)
        task = _models.Task("GPT", network, ((2, 32), jnp.int32), ((2, 32), 128))
        shapes = task.shapes()
        plain = seconds(task.loss, shapes)
        hand = seconds(lambda task=task: task.loss(jnp.bfloat16), shapes)
        ours = seconds(lambda task=task: jmp.autocast(task.loss(), "mixed_bfloat16"), shapes)
        ratios.append(ours / hand)
        rows.append([str(layers), f"{plain:.2f}", f"{hand:.2f}", f"{ours:.2f}", f"{ours / hand:.2f}"])
        print(*rows[-1], flush=True)
    if not quick:
        header = ["layers", "float32, s", "by hand, s", "autocast, s", "autocast / by hand"]
        target = _report.Target("trace / hand", LIMIT, ratios).line()
        facts = {
            "command": _report.command("benchmarks.trace"),
            "versions": _report.versions(),
            "hardware": _report.hardware(),
        }
        body = f"{_report.table(header, rows)}\n\n{target}"
        _report.write_section(_report.RESULTS, "trace", "Time to trace a gradient, by depth", facts, body)


if __name__ == "__main__":
    main()
