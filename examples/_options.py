"""Options that several examples have."""

import argparse
from typing import Any

import jax
import numpy as np
import optax

import jmp_lite as jmp

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


#: How the optimizer keeps parameters and its state; all but the first leave the model parameters in bfloat16.
STATES = {
    "float32": None,
    "master": ("split16", "float32"),
    "bfloat16": ("stochastic", "bfloat16"),
    "8bit": ("split8", "8bit"),
}


def add_state(options: argparse.ArgumentParser) -> None:
    """Adds the option of how parameters and optimizer state are kept."""
    options.add_argument(
        "--state",
        choices=STATES,
        default="float32",
        help="how the optimizer keeps parameters and its state between steps, with optim.stored; default: %(default)s",
    )


def kept(inner: optax.GradientTransformation, state: str) -> optax.GradientTransformation:
    """An optimizer that keeps parameters and its state as asked for."""
    formats = STATES[state]
    return inner if formats is None else jmp.optim.stored(inner, params=formats[0], state=formats[1])


def start(tx: optax.GradientTransformation, params: Any, state: str) -> tuple[Any, Any]:
    """Parameters as the model sees them, and the state of the optimizer."""
    return (params, tx.init(params)) if STATES[state] is None else jmp.optim.from_full_precision(tx, params)


def positive(text: str) -> int:
    """Parses a number that must be at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def policy(text: str) -> str:
    """Checks a policy string; returns it as it is."""
    if text == "all":
        return text
    try:
        parsed = jmp.get_policy(text)
    except jmp.errors.JmpLiteError as error:
        raise argparse.ArgumentTypeError(f"{error} Or 'all': {', '.join(POLICIES)}.") from None
    dtypes = (parsed.param_dtype, parsed.compute_dtype, parsed.output_dtype)
    if any(dtype.itemsize < 2 for dtype in dtypes):
        raise argparse.ArgumentTypeError(
            f"policy {text!r} has a format of 8 bits or fewer in it, in which this model cannot compute"
        )
    if np.dtype(np.float64) in dtypes and not jax.config.jax_enable_x64:
        raise argparse.ArgumentTypeError(
            f"policy {text!r} has float64 in it, which JAX takes for float32 unless the environment "
            "sets JAX_ENABLE_X64=1"
        )
    return text
