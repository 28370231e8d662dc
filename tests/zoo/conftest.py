"""Third-party models meet the JAX of their users: the usual promotion, and warnings that are only shown."""

import importlib.util

import jax
import pytest

# Helper modules hold no tests, and without the extra `zoo` there is nothing to run.
collect_ignore_glob = ["[!t]*.py", "table.py"] if importlib.util.find_spec("transformers") else ["*.py"]


@pytest.fixture(autouse=True)
def _promotion_as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
