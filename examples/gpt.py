"""Trains a character GPT on Python's own sources in several precisions, with autocast, and compares them.

python examples/gpt.py                           # float32, bfloat16, float16: under two minutes on two cores
python examples/gpt.py --policy mixed_float16    # one of them, or any other policy
python examples/gpt.py --state 8bit              # 5 bytes per parameter and its state, instead of 12
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _devices
import _gpt_data
import _gpt_model
import _gpt_report
import _options
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _gpt_model import CONTEXT
from _history import History
from _progress import progress_bar
from rich.console import Console
from rich.progress import Progress

import jmp_lite as jmp

LEARNING_RATE = 5e-3
EVALUATE_EVERY = 50  # steps
HELD_OUT_EXCERPTS = 128
GROWTH_PERIOD = 100  # 2000 is usual; a short run shows more of the automaton with less
PROMPT = "\ndef "
TEMPERATURE = 0.8


def parser() -> argparse.ArgumentParser:
    """The options, with their defaults."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, positive, names = options.add_argument, _options.positive, ", ".join(_options.POLICIES)
    about = f"any policies, of which autocast takes the compute dtype; all (the default): {names}"
    add("--policy", type=_options.policy, nargs="+", default=["all"], metavar="POLICY", help=about)
    add("--steps", type=positive, default=1200, help="default: %(default)s")
    add("--batch-size", type=positive, default=16, help="excerpts in a step; default: %(default)s")
    add("--seed", type=int, default=0, help="of the batches, the parameters and the sample; default: %(default)s")
    add("--sample", type=positive, default=300, metavar="N", help="characters to sample; default: %(default)s")
    _options.add_state(options)
    add("--output", type=Path, default=Path("runs/gpt"), metavar="DIR", help="of the PNG; default: %(default)s")
    return options


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line; readies the CPU for bfloat16."""
    parsed = parser().parse_args(arguments)
    names = [name for text in parsed.policy for name in (_options.POLICIES if text == "all" else (text,))]
    parsed.policy = list(dict.fromkeys(names))
    _devices.avoid_wrong_code()
    return parsed


def make_optimizer(steps: int, policy: Any, state: str) -> optax.GradientTransformationExtraArgs:
    """AdamW with clipping; what is inside ``loss_scaled`` sees unscaled float32 gradients."""
    learning_rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup_steps=steps // 10, decay_steps=steps)
    inner = _options.kept(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate)), state)
    is_half = policy.compute_dtype == jnp.float16
    return jmp.loss_scaled(
        inner, jmp.DynamicLossScale(2.0**15, period=GROWTH_PERIOD) if is_half else jmp.NoOpLossScale()
    )


def make_train_step(loss: Callable[..., jax.Array], tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    """One step of training: ``(params, opt_state, text) -> (params, opt_state, metrics)``."""

    def train_step(params: Any, opt_state: Any, text: jax.Array) -> Any:
        value, grads = jmp.scaled_value_and_grad(loss, loss_scale=opt_state)(params, text)
        params, opt_state = jmp.apply_gradients(tx, grads, opt_state, params)
        return params, opt_state, jmp.metrics(opt_state) | {"loss": value}

    return jax.jit(train_step, donate_argnums=(0, 1))


def make_sampler(policy: Any, length: int) -> Callable[[Any, jax.Array], jax.Array]:
    """``(params, key) -> characters``, int32[length], that resume from the prompt."""
    next_logits = jmp.autocast(_gpt_model.next_logits, policy)
    prompt = _gpt_data.encode(PROMPT.encode().rjust(CONTEXT, b"\n"))

    def sample(params: Any, key: jax.Array) -> jax.Array:
        def one(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            code = jax.random.categorical(key, next_logits(params, window) / TEMPERATURE)
            return jnp.append(window[1:], code), code

        return jax.lax.scan(one, jnp.asarray(prompt), jax.random.split(key, length))[1]

    return jax.jit(sample)


def chunks(steps: int) -> Iterator[range]:
    """The steps between two evaluations; a short first chunk, so that the last ones are whole."""
    start = 0
    while start < steps:
        stop = start + ((steps - start - 1) % EVALUATE_EVERY + 1)
        yield range(start, stop)
        start = stop


def train(name: str, options: argparse.Namespace, text: _gpt_data.Text, progress: Progress) -> _gpt_report.Result:
    """Trains one policy and samples from what it learned."""
    policy = jmp.get_policy(name)
    loss = jmp.autocast(_gpt_model.loss, policy)
    tx = make_optimizer(options.steps, policy, options.state)
    train_step, held_out_loss = make_train_step(loss, tx), jax.jit(loss)
    excerpts = _gpt_data.excerpts(text.held_out, count=HELD_OUT_EXCERPTS, length=CONTEXT + 1)
    # The default generator, threefry, takes three times as long to compile.
    key = jax.random.key(options.seed, impl="rbg")
    params, opt_state = _options.start(tx, _gpt_model.init(key), options.state)

    def batch(step: int) -> np.ndarray:
        size, seed = options.batch_size, options.seed
        return _gpt_data.batch(text.train, size=size, length=CONTEXT + 1, step=step, seed=seed)

    task = progress.add_task(name, total=options.steps, status="compiling")
    began = time.perf_counter()
    train_step = train_step.lower(params, opt_state, batch(0)).compile()
    compile_seconds, seconds = time.perf_counter() - began, 0.0
    history, held_out = History(name, vars(options)), {}
    for steps in chunks(options.steps):
        began, metrics = time.perf_counter(), []
        for step in steps:
            params, opt_state, values = train_step(params, opt_state, batch(step))
            metrics.append(values)
        history.steps += [{key: float(value) for key, value in step.items()} for step in jax.device_get(metrics)]
        seconds += time.perf_counter() - began
        jmp.check_loss_scale(opt_state)
        held_out[steps.stop] = float(held_out_loss(params, excerpts))
        progress.update(task, completed=steps.stop, status=f"held-out loss {held_out[steps.stop]:.3f}")
    sample = _gpt_data.decode(np.asarray(make_sampler(policy, options.sample)(params, key)))
    return _gpt_report.Result(history, held_out, sample, compile_seconds, options.steps / seconds)


def main(arguments: list[str] | None = None) -> int:
    """Trains what the command line asks for, and reports."""
    options = parse(arguments)
    console = Console()
    text = _gpt_data.load()
    try:
        with progress_bar(console) as progress:
            results = [train(name, options, text, progress) for name in options.policy]
    except jmp.errors.JmpLiteError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    for result in results:
        console.print(f"\n{result.name} writes:", style="bold", highlight=False)
        console.print(PROMPT.lstrip() + result.sample, markup=False, highlight=False, soft_wrap=True)
    title = f"Character GPT on Python's sources, autocast, batch {options.batch_size}, seed {options.seed}"
    console.print(f"\n{title}", style="bold", highlight=False, soft_wrap=True)
    console.print(_gpt_report.table(results))
    options.output.mkdir(parents=True, exist_ok=True)
    picture = options.output / "gpt.png"
    _gpt_report.draw(results, math.log(len(_gpt_data.ALPHABET)), title, picture)
    console.print(f"Curves: {picture}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
