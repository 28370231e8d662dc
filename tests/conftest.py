"""Randomness of the suite: one seed per run, its own stream for every test."""

import os
import zlib

import hypothesis
import jax
import numpy as np
import pytest

# Examples follow from JMP_LITE_SEED alone (see pytest_configure), so none are remembered from one run to the next.
hypothesis.settings.register_profile("jmp_lite", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("jmp_lite")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number that differs between tests; JMP_LITE_SEED changes it."""
    return zlib.crc32(f"{os.environ['JMP_LITE_SEED']} {request.node.name}".encode())


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A NumPy generator seeded for this test in this run."""
    return np.random.default_rng(seed)


@pytest.fixture
def key(seed: int) -> jax.Array:
    """A typed JAX key seeded for this test in this run."""
    return jax.random.key(seed)


@pytest.fixture
def standard_promotion():
    """Lifts strict dtype promotion for what is not ours: Adam of optax 0.2.8 computes 0.9**int32."""
    with jax.numpy_dtype_promotion("standard"):
        yield
