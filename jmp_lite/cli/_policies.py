"""What the library knows of formats and policies: ``formats``, ``policy``."""

from typing import Any

import jax.numpy as jnp

from jmp_lite._dtypes import dtype_to_names
from jmp_lite._policy import get_policy
from jmp_lite._text import table


def formats() -> str:
    """Describes every floating format: names, range and precision."""
    rows = []
    for scalar_type, names in dtype_to_names.items():
        info: Any = jnp.finfo(scalar_type)  # type: ignore[no-untyped-call]
        limits = [f"{float(x):.6g}" for x in (info.max, info.smallest_normal, info.smallest_subnormal)]
        rows.append([names[0], ", ".join(names[1:]), str(info.bits), *limits, f"2**-{info.nmant}"])
    return table(["name", "also", "bits", "max", "smallest normal", "smallest", "spacing at 1"], rows)


def policy(spec: str) -> str:
    """Says what a policy string stands for."""
    parsed = get_policy(spec)
    fields = ("param_dtype", "compute_dtype", "output_dtype", "reduce_dtype")
    rows = [[field, str(getattr(parsed, field) or "float32 (default)")] for field in fields]
    return table(["field", "dtype"], rows)
