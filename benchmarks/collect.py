"""What it costs to collect ranges in a training step: never, at every step, and at one of a hundred.

python -m benchmarks.collect             # replaces its section of RESULTS.md
python -m benchmarks.collect --quick     # a tiny model, written nowhere
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jmp_lite as jmp
from benchmarks import _measure, _models, _report

EVERY, LIMIT = 100, 1.03
TASK = _models.Task(
    "GPT: 2 layers of width 256, 8 heads, vocabulary 4096, 8 texts of 128",
    functools.partial(_models.GPT, layers=2, width=256, heads=8, vocabulary=4096),
    ((8, 128), np.int32),
    ((8, 128), 4096),
)
#: Named as in the table; the number is that of the step, which `when` looks at.
BARE, ALWAYS, RESTING, LOOKING = "bare", "collect", "collect(when=), resting", "collect(when=), looking"


def step_of(task: _models.Task, collect: Callable[..., Any]) -> Callable[..., Any]:
    """A loss-scaled AdamW step under autocast whose gradient function goes through `collect`."""
    tx = jmp.loss_scaled(optax.adamw(1e-4))
    loss = jmp.autocast(task.loss(), "mixed_bfloat16")

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, statistics: Any, batch: Any, number: Any) -> Any:
        gradient = jmp.scaled_value_and_grad(loss, has_aux=True, loss_scale=opt_state)
        (_, grads), ranges = collect(lambda params, number: gradient(params, statistics, batch))(params, number)
        params, opt_state = jmp.apply_gradients(tx, grads, opt_state, params)
        return params, opt_state, ranges

    return step


def collects() -> dict[str, tuple[Callable[..., Any], int]]:
    """What stands around the gradient function, and the number of the step, by variant."""

    def every(fun: Callable[..., Any]) -> Callable[..., Any]:
        return jmp.analysis.collect(fun, when=lambda _, number: number % EVERY == 0)

    def never(fun: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (fun(*args), None)

    return {BARE: (never, 1), ALWAYS: (jmp.analysis.collect, 1), RESTING: (every, 1), LOOKING: (every, EVERY)}


def calls(task: _models.Task) -> dict[str, Callable[[], Any]]:
    """Compiled steps with their own states, by variant."""
    params, statistics, batch = task.arguments()
    made: dict[str, Callable[[], Any]] = {}
    for name, (collect, number) in collects().items():
        step = step_of(task, collect)
        state = [jax.tree.map(jnp.copy, params), jmp.loss_scaled(optax.adamw(1e-4)).init(params)]

        def call(step: Any = step, state: list[Any] = state, number: int = number) -> Any:
            *state[:], ranges = step(*state, statistics, batch, jnp.int32(number))
            return state, ranges

        jax.block_until_ready(call())
        made[name] = call
    return made


def main() -> None:
    """Times all variants in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, written nowhere")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the interleaved run (default: 15)")
    options = parser.parse_args()
    task = _models.TASKS["tiny-gpt"] if options.quick else TASK
    found = _measure.interleaved(calls(task), BARE, rounds=options.rounds, steps=2)
    rows = [[name, f"{1e3 * seconds:.1f}", f"{ratio:.3f}"] for name, (seconds, ratio) in found.items()]
    amortized = {
        kind: ((EVERY - 1) * found[resting][1] + found[looking][1]) / EVERY
        for kind, resting, looking in (("a second step", BARE, ALWAYS), ("when=", RESTING, LOOKING))
    }
    rows += [[f"one step of {EVERY}, by {kind}", "", f"{ratio:.3f}"] for kind, ratio in amortized.items()]
    table = _report.table(["step", "ms", "/ bare"], rows)
    print(table)
    if not options.quick:
        device = jax.devices()[0]
        facts = {
            "command": f"`{_report.command('benchmarks.collect')}`",
            "versions": _report.versions(),
            "hardware": f"{device.device_kind}; {_report.hardware()}",
            "run": f"{options.rounds} rounds of 2 steps each, in turns",
        }
        note = f"""{task.title}, under `autocast(loss, "mixed_bfloat16")` and `loss_scaled(adamw)`; `collect`
is around the gradient function. By a second step: a loop in Python calls a step with `collect` in place of the
bare one. A program with `when=` holds the step twice, with counting and without, for loops inside of a program; it is
timed at a step that counts nothing and at one that does. The last rows are {EVERY - 1} of the one and one of the
other. Ratios are medians of the ratios within a round."""
        targets = [
            _report.Target(f"one step of {EVERY}, by {kind} / bare", LIMIT, [ratio]).line()
            for kind, ratio in amortized.items()
        ]
        target = "\n".join(targets)
        name = f"collect, {device.platform}"
        title = f"Collecting ranges in a training step on {device.platform.upper()}"
        _report.write_section(_report.RESULTS, name, title, facts, f"{note}\n\n{table}\n\n{target}")


if __name__ == "__main__":
    main()
