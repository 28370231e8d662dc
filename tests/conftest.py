"""Randomness of the suite: one seed per run, its own stream for every test."""

import os
import zlib

import hypothesis
import jax
import numpy as np
import pytest
from support.covering import covering

# Examples follow from JMP_LITE_SEED alone (see pytest_configure), so none are remembered from one run to the next.
hypothesis.settings.register_profile("jmp_lite", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("jmp_lite")


def _cell(item: pytest.Item) -> tuple:
    """Where a test stands in its table: for each of its parametrizations, which values it has."""
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    axes = [one.replace(" ", "").split(",") if isinstance(one, str) else [*one] for one in names]
    of_marks = {name for axis in axes for name in axis}
    axes += [[name] for name in item.callspec.params if name not in of_marks]  # of fixtures
    return tuple(tuple(id(item.callspec.params[name]) for name in axis) for axis in axes)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves to the slow tests the cells of a table that its mark ``covering`` does without."""
    tables = {}
    for item in sorted(items, key=lambda item: item.nodeid):
        if item.get_closest_marker("covering") and not item.get_closest_marker("slow"):
            tables.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for table in tables.values():
        [strength] = table[0].get_closest_marker("covering").args
        chosen = covering([_cell(item) for item in table], strength)
        for i in set(range(len(table))).difference(chosen):
            table[i].add_marker(pytest.mark.slow)


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
