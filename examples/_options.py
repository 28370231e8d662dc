"""Options that several examples have."""

import argparse

import jax
import numpy as np

import jmp_lite as jmp

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


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
