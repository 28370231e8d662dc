"""The JAX that every test and doctest meets: eight CPU devices, strict promotion, one seed, bounded memory."""

import contextlib
import ctypes
import gc
import importlib.metadata
import itertools
import os
import pathlib
import random
from collections.abc import Iterator

# On the CPU unless asked otherwise: `-n auto` would have many workers fight for one accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The same numbers in every run, so that no change fails by a draw that it did not cause; `nox -s nightly` draws anew.
# Workers of pytest-xdist inherit the environment and with it the seed of the run.
if os.environ.setdefault("JMP_LITE_SEED", "20260401") == "random":
    os.environ["JMP_LITE_SEED"] = str(random.SystemRandom().getrandbits(32))
SEED = int(os.environ["JMP_LITE_SEED"])

# XLA on CPU in jaxlib 0.11 and 0.12 miscompiles bfloat16: a residual block that ends in a mean gives NaN unless this
# fusion is off. XLA aborts on flags that it does not know, so each is for the versions that have it.
_no_fusion = "--xla_cpu_experimental_ynn_fusion_type="
_flags = {"0.11.": [_no_fusion], "0.12.": [_no_fusion]}
# Compiles in half of the time, in one part rather than 32 to run at once; `nox -s nightly` runs all tests as users
# compile.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true") == "true":
    _flags["0.10."] = ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
for _version, _of_version in _flags.items():
    for _flag in _of_version if importlib.metadata.version("jaxlib").startswith(_version) else ():
        if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

# Without a cache on disk, JAX would still make a key of each program that it compiles.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

# JAX makes many objects that live long; looking through them every 700 new ones takes a twentieth of the time.
gc.set_threshold(20_000, 10, 10)

import jax  # noqa: E402
import pytest  # noqa: E402

# Where a plugin of pytest imported JAX before, it has not seen the variable.
jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "true")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Lets one seed rule the order of the tests as well, and the examples that Hypothesis draws."""
    if getattr(config.option, "randomly_seed", None) == "default":
        config.option.randomly_seed = SEED
    if getattr(config.option, "hypothesis_seed", 0) is None:
        config.option.hypothesis_seed = str(SEED)


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


#: Bytes above which a worker lets go of what JAX has compiled, for shapes that no later test has. One test takes
#: less than 100 MB, so it stays below 2 GB; to stop at 1.25 GB would cost a fifth more time.
ENOUGH_MEMORY = 1.85 * 2**30
_finished = itertools.count(1)


def _is_full() -> bool:
    """Whether this process holds much memory; where the system does not say, it is taken to every 200 tests."""
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > ENOUGH_MEMORY
    return next(_finished) % 200 == 0


def pytest_runtest_logfinish() -> None:
    """Keeps a worker below 2 GB."""
    if _is_full():
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # the C library keeps what was freed, unless told
            ctypes.CDLL("libc.so.6").malloc_trim(0)


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
