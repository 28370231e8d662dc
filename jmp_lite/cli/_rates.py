"""How fast a device multiplies matrices of each dtype, and copies."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

#: Seconds that one run takes where that can be arranged: long beside the launch of a kernel.
_SECONDS = 0.02
_RUNS = 5
_SMALLEST_MATRIX, _LARGEST_MATRIX = 128, 16384
_SMALLEST_COPY, _LARGEST_COPY = 2**24, 2**31

#: Dtype of the operands -> that of the result. Float8 is added up in float32 and int8 in int32, as ``quant`` does.
PRODUCTS: Mapping[str, str] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float8_e4m3fn": "float32",
    "int8": "int32",
}


class Rate(NamedTuple):
    """What was measured, and on what."""

    per_second: float
    """Floating-point (or integer) operations, or bytes."""
    size: int
    """Rows of the matrices, or bytes of the array."""


def product_flops_per_second(dtype: str, *, seconds: float = _SECONDS) -> Rate:
    """Times square matmuls on the default device.

    Args:
        dtype: One of ``PRODUCTS``.
        seconds: How long one matmul should take.

    Returns:
        The best of several runs, of ``2 n**3`` operations each.
    """

    def call_of(n: int) -> Callable[[], Any]:
        # Random: GPUs draw less power, and run faster, where bits do not change.
        values = jax.random.randint(jax.random.key(0), (2, n, n), -8, 8, jnp.int8).astype(jnp.float32)
        lhs, rhs = values.astype(dtype)
        multiply = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=np.dtype(PRODUCTS[dtype])))
        return lambda: multiply(lhs, rhs)

    n, best = _fitted(call_of, _SMALLEST_MATRIX, _LARGEST_MATRIX, 3, seconds)
    return Rate(2 * n**3 / best, n)


def copied_bytes_per_second(*, seconds: float = _SECONDS) -> Rate:
    """Times a pass over memory on the default device; a byte that is read and written counts twice."""

    def call_of(size: int) -> Callable[[], Any]:
        array = jnp.zeros(size // 4, jnp.float32)
        negate = jax.jit(jnp.negative)  # XLA would not copy what it can hand on
        return lambda: negate(array)

    size, best = _fitted(call_of, _SMALLEST_COPY, _LARGEST_COPY, 1, seconds)
    return Rate(2 * size / best, size)


def _fitted(
    call_of: Callable[[int], Callable[[], Any]], smallest: int, largest: int, power: int, seconds: float
) -> tuple[int, float]:
    """Finds a size at which a call takes about so long; returns it and the seconds of the best run.

    Args:
        call_of: Size -> what is timed.
        smallest: Where to begin.
        largest: Where to end.
        power: Of the size, that the time grows with.
        seconds: What is aimed at. A size at which a call takes half of it is large enough.
    """
    size = smallest
    while True:
        call = call_of(size)
        jax.block_until_ready(call())
        taken = min(_time(call) for _ in range(2))
        if taken >= seconds / 2 or size == largest:
            return size, min(taken, *(_time(call) for _ in range(_RUNS)))
        size = _larger(size, largest, (seconds / taken) ** (1 / power), smallest)


def _larger(size: int, largest: int, factor: float, step: int) -> int:
    """A multiple of a step, more than before and at most 8 times as much: short runs are slower than long ones."""
    wanted = round(size * min(factor, 8) / step) * step
    return min(max(wanted, size + step), largest)


def _time(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start
