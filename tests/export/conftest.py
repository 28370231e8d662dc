"""The model of the tests with its parameters."""

import pytest
from support.frozen import MLP
from support.lowbit import normal


@pytest.fixture
def mlp(rng, key):
    """Parameters of the model, and inputs."""
    x = normal(rng, 5, 32)
    return MLP().init(key, x), x
