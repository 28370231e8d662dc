"""What a step costs, beside counts by hand, and what is said about it."""

import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jmp_lite as jmp
from jmp_lite.analysis import estimate
from jmp_lite.analysis._devices import DEVICES, kind_of
from jmp_lite.errors import InvalidEstimateError, InvalidFunctionError, UnknownDtypeError
from support.errors import raised

ROWS, WIDTH, HIDDEN = 256, 512, 1024


def f32(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


PARAMS = {"up": f32(WIDTH, HIDDEN), "bias": f32(HIDDEN), "down": f32(HIDDEN, WIDTH)}
X = f32(ROWS, WIDTH)
#: Two products forward; by both weights and by what is between them backward.
FLOPS = 5 * 2 * ROWS * WIDTH * HIDDEN
