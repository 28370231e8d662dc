"""The JAX that every test and doctest meets: eight CPU devices, strict promotion, one seed."""

import importlib.metadata
import os
import random
from collections.abc import Iterator

# On the CPU unless asked otherwise: `-n auto` would have many workers fight for one accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Workers of pytest-xdist inherit the environment and with it the seed of the run.
SEED = int(os.environ.setdefault("JMP_LITE_SEED", str(random.SystemRandom().getrandbits(32))))

# XLA on CPU in jaxlib 0.11 and 0.12 miscompiles bfloat16: a residual block that ends in a mean gives NaN unless this
# fusion is off. Later versions may have lost the flag, and XLA aborts on flags that it does not know.
_flag, _flags = "--xla_cpu_experimental_ynn_fusion_type=", os.environ.get("XLA_FLAGS", "")
if importlib.metadata.version("jaxlib").startswith(("0.11.", "0.12.")) and _flag not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} {_flag}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Lets one seed rule the order of the tests as well."""
    if getattr(config.option, "randomly_seed", None) == "default":
        config.option.randomly_seed = SEED


def pytest_report_header() -> str:
    """Names the seed that repeats this run."""
    return f"JMP_LITE_SEED={SEED} (set it to repeat this run), jax {jax.__version__}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Names the seed beside every failure."""
    report = yield
    if report.failed:
        report.sections.append(("seed", f"JMP_LITE_SEED={SEED} pytest '{item.nodeid}'"))
    return report


def pytest_xdist_auto_num_workers() -> int | None:
    """Stops `-n auto` at eight workers: each of them holds a JAX with eight devices."""
    return min(8, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests that need an accelerator which this run does not have."""
    for item in items:
        for platform in ("gpu", "tpu"):
            if item.get_closest_marker(platform) and jax.default_backend() != platform:
                item.add_marker(pytest.mark.skip(reason=f"needs a {platform.upper()}"))


@pytest.fixture(autouse=True, scope="session")
def _names_in_doctests(doctest_namespace: dict[str, object]) -> None:
    import jax.numpy as jnp
    import numpy as np
    import optax

    import jmp_lite as jmp

    doctest_namespace.update(jax=jax, jnp=jnp, np=np, optax=optax, jmp=jmp)


@pytest.fixture(autouse=True)
def _promotion_of_doctests(request: pytest.FixtureRequest) -> Iterator[None]:
    """Doctests run as at the reader's prompt; strict promotion also forbids optax.adam."""
    if isinstance(request.node, pytest.DoctestItem):
        with jax.numpy_dtype_promotion("standard"):
            yield
    else:
        yield
