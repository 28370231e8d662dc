"""The residuals that may be kept: activations in 16 bits, but not the float32 inside of norms and softmax."""

import contextlib
import math
from typing import Any

import numpy as np

from jmp_lite._dtypes import FLOAT32

#: Float32 results that are expensive to recompute, or small: they are saved.
_WORTH_SAVING = frozenset(
    {"dot_general", "conv_general_dilated", "ragged_dot_general", "scaled_dot", "reduce_sum", "reduce_max"}
)
#: Arrays below this size cost nothing to keep.
_SMALL = 4096


def saves_low(primitive: Any, *operands: Any, **params: Any) -> bool:
    """A policy of ``jax.checkpoint``: says whether the result of a primitive may be saved for the backward pass.

    Casts to 16 bits or fewer may be saved. Other results may be saved unless they are large and computed from float32;
    these are recomputed.
    """
    if primitive.name == "convert_element_type":
        return bool(params["new_dtype"].itemsize < FLOAT32.itemsize)
    if primitive.name in _WORTH_SAVING:
        return True
    dtypes = {aval.dtype for aval in operands if hasattr(aval, "dtype")}
    shapes = [getattr(aval, "shape", ()) for aval in operands]
    shapes.append(params.get("shape") or ())  # of what a broadcast makes of a small operand
    with contextlib.suppress(ValueError):  # arithmetic repeats what has a dimension of 1
        shapes.append(np.broadcast_shapes(*shapes))
    return FLOAT32 not in dtypes or max(map(math.prod, shapes)) < _SMALL
