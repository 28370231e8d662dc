"""Functions of JAX that are made of matmuls, though none was asked for, run as they were written."""

import functools
import importlib
import itertools
import pkgutil
import types

import jax
import jax.numpy as jnp
import jax.scipy.optimize
import numpy as np
import pytest
from jax import lax
from support import jaxprs
from support.comparisons import assert_identical, slow_but_for
from support.library_calls import ARRAYS, CALLS, LEFT_OUT
from support.library_calls_common import N, spread

import jmp_lite as jmp
from jmp_lite.autocast._library import library_of

POLICIES = ("mixed_bfloat16", "mixed_float16")
ULP = 2.0**-8  # of bfloat16


@pytest.fixture(autouse=True)
def _promotion():
    """JAX's own functions do not keep to strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# --- The table ---


def public(module):
    """The whole names of what a module offers to be called."""
    names = [name for name in dir(module) if not name.startswith("_")]
    return {f"{module.__name__}.{name}" for name in names if callable(getattr(module, name))}


def modules():
    """The modules whose functions are all in the table or left out."""
    names = [module.name for module in pkgutil.walk_packages(jax.scipy.__path__, "jax.scipy.")]
    names += ["jax.scipy", "jax.image", "jax.random", "jax.numpy.linalg", "jax.lax.linalg"]
    return [importlib.import_module(name) for name in names]


PUBLIC = frozenset().union(*map(public, modules()), public(jnp))
TABLE = frozenset(name.split(",")[0] for name in CALLS)
REASONS = frozenset(" ".join(LEFT_OUT.values()).split())
IN_SOME_VERSIONS = {"jax.random.Key", "jax.scipy.special.erfcinv"}
HERE = [name for name in CALLS if name.split(",")[0] in PUBLIC]


def test_every_function_is_in_the_table_or_left_out_for_a_reason():
    assert not TABLE & REASONS
    assert frozenset().union(*map(public, modules())) <= TABLE | REASONS
    assert TABLE | REASONS <= PUBLIC | IN_SOME_VERSIONS


def has_product(function, args):
    """Whether a function can be called with these arguments, and has a matmul or convolution inside."""
    try:
        eqns = [eqn for name in jaxprs.CONTRACTIONS for eqn in jaxprs.equations(name, function, *args)]
    except Exception:
        return False
    return any(eqn.primitive.name != "dot_general" or _summed(eqn) > 1 for eqn in eqns)


def _summed(eqn):
    (axes, _), _ = eqn.params["dimension_numbers"]
    return np.prod([eqn.invars[0].aval.shape[axis] for axis in axes])


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_every_function_of_numpy_with_a_product_is_in_the_table():
    """Whatever of jax.numpy can be called with a few vectors or matrices and has a matmul is known."""
    v, m = np.linspace(0.1, 0.9, 9, dtype=np.float32), np.linspace(0.1, 0.9, 81, dtype=np.float32).reshape(9, 9)
    tries = [(v,), (m,), (v, v), (m, m), (m, v), (v, v, v), (m, m, m)]
    functions = {name: getattr(jnp, name.rpartition(".")[2]) for name in public(jnp)}
    found = {name for name, function in functions.items() if any(has_product(function, args) for args in tries)}
    assert found <= TABLE | REASONS
    assert {"jax.numpy.cov", "jax.numpy.convolve", "jax.numpy.matmul"} <= found


# --- Places ---

#: Frames, the innermost first, and whether their matmul is a library's, and whether that is linear algebra.
JAX, SITE = "/site/jax/_src/", "/site/"
ALGEBRA = [
    *(
        f"{JAX}{path}"
        for path in ("numpy/linalg.py", "numpy/polynomial.py", "scipy/linalg.py", "scipy/sparse/linalg.py")
    ),
    *(f"{JAX}{path}" for path in ("scipy/optimize/bfgs.py", "third_party/scipy/linalg.py", "lax/linalg.py")),
    *(f"{JAX}{path}" for path in ("tpu/linalg/eigh.py",)),
    *(f"{SITE}{path}" for path in ("flax/linen/normalization.py", "flax/nnx/nn/normalization.py")),
    *(f"{SITE}{path}" for path in ("haiku/_src/spectral_norm.py", "equinox/nn/_spectral_norm.py")),
]
DATA = [
    *(f"{JAX}{path}" for path in ("scipy/signal.py", "scipy/stats/kde.py", "third_party/scipy/betaln.py")),
    *(f"{JAX}{path}" for path in ("image/scale.py", "random.py", "random/core.py")),
    f"{SITE}optax/losses/_classification.py",
]
USER = ("/home/model.py", "layer")


def found(*frames):
    """The library of an equation with such frames; ``None`` for no traceback."""
    named = [types.SimpleNamespace(file_name=file, function_name=name) for file, name in frames]
    traceback = types.SimpleNamespace(frames=named) if frames else None
    library = library_of(types.SimpleNamespace(source_info=types.SimpleNamespace(traceback=traceback)))
    return library and ("algebra" if library.is_algebra else "data")


@pytest.mark.parametrize(
    ("file", "kind"), [*((file, "algebra") for file in ALGEBRA), *((file, "data") for file in DATA)]
)
def test_the_place_of_a_matmul_says_whose_it_is(file, kind):
    """Behind what else JAX has, on every system; a request for a matmul is the user's."""
    tensordot = (f"{JAX}numpy/tensor_contractions.py", "tensordot")
    assert found((file, "f"), USER) == found(tensordot, (file, "a.<locals>.f"), USER) == kind
    assert found((file.replace("/", "\\"), "f")) == kind
    assert found((file, "matmul"), USER) is found((file, "A.multi_dot"), USER) is None
    assert found((file, "matmul"), (file, "f"), USER) == (kind if "/jax/" in file else None)
    assert found(USER, (file, "f")) is None


def test_of_some_files_only_some_functions_are_a_library():
    file = f"{JAX}numpy/lax_numpy.py"
    for name in ("cov", "corrcoef", "convolve", "correlate", "_conv"):
        assert found((file, name), USER) == "data"
    for name in ("where", "covs", "matmul"):
        assert found((file, name), USER) is None
    assert found((file, "where"), (f"{JAX}scipy/linalg.py", "expm"), USER) == "algebra"
    assert found() is found((f"{JAX}lax/lax.py", "dot")) is found(USER) is None


# --- Values ---


def lowered(function, args):
    """A program as it goes to the compiler."""
    return jax.jit(function).lower(*args)


def result(program, args):
    """What a program computes, where the compiler keeps the order of sums."""
    return program.compile(compiler_options={"xla_backend_optimization_level": 0})(*args)


def quick_slow_or_soak(quick, slow, cases):
    """Pairs of a name and a policy: by default quick names run, in bfloat16; others are slow, or soak tests."""

    def marks(name, policy):
        if policy != "mixed_bfloat16" or name not in quick | slow:
            return pytest.mark.soak
        return () if name in quick else pytest.mark.slow

    return [pytest.param(name, policy, marks=marks(name, policy)) for name, policy in cases]


OF_NUMBERS_WITH_PRODUCTS = {
    "jax.random.multivariate_normal",
    "jax.scipy.special.owens_t",
    "jax.scipy.stats.multivariate_normal.logpdf",
}


QUICK = OF_NUMBERS_WITH_PRODUCTS | {
    "jax.scipy.linalg.toeplitz",
    *(f"jax.numpy.{name}" for name in ("convolve", "corrcoef", "correlate", "cov", "polyfit")),
    *(f"jax.numpy.linalg.{name}" for name in ("cholesky", "eigh", "inv", "lstsq", "matrix_power", "pinv", "qr", "svd")),
    *("jax.scipy.signal.convolve", "jax.scipy.signal.correlate2d", "jax.image.resize"),
}
SLOW = {
    *("jax.scipy.linalg.expm", "jax.scipy.stats.gaussian_kde"),
    *("jax.scipy.signal.detrend", "jax.image.scale_and_translate"),
}


@pytest.mark.parametrize(
    ("name", "policy"), quick_slow_or_soak(QUICK, ARRAYS.keys(), itertools.product(HERE, POLICIES))
)
def test_values_are_the_same_bits(name, policy, rng):
    function, args = CALLS[name].function_and_arrays(name, rng)
    found, expected = lowered(jmp.autocast(function, policy), args), lowered(function, args)
    if found.as_text() != expected.as_text():
        assert_identical(result(found, args), result(expected, args))


# --- What comes after them ---

OF_DATA = ("image.", "random.", "scipy.signal.", "scipy.ndimage.", "numpy.convolve", "numpy.correlate", "numpy.cov")
OF_ALGEBRA = ("numpy.linalg.matrix_power", "numpy.linalg.inv", "numpy.linalg.pinv", "numpy.linalg.qr")


def dtypes_of_the_next_product(name, rng):
    """The dtypes of the operands of a matmul of what a function returns, if that is many float32s, and a weight."""
    function, args = CALLS[name].function_and_arrays(name, rng)

    def after(weight, *args):
        first = jax.tree.leaves(function(*args))[0]
        return first.reshape(1, first.size) @ weight

    first = jax.tree.leaves(jax.eval_shape(function, *args))[0]
    if first.dtype != jnp.float32 or first.size < N:
        return set()
    weight = jnp.ones((first.size, 16))
    *_, last = (r for r in jmp.explain(after, "mixed_bfloat16")(weight, *args) if r.primitive == "dot_general")
    return set(last.in_dtypes)


@pytest.mark.parametrize("module", OF_DATA)
def test_images_signals_and_samples_are_data_for_the_next_matmul(module, rng):
    names = [name for name in HERE if name.startswith(f"jax.{module}") and name != "jax.random.orthogonal"]  # by QR
    found = {name: dtypes_of_the_next_product(name, rng) for name in names}
    assert {name for name, dtypes in found.items() if dtypes not in ({"bfloat16"}, set())} == set()
    assert {"bfloat16"} in found.values()


@pytest.mark.parametrize("function", OF_ALGEBRA)
def test_solutions_are_solutions_for_the_next_matmul(function, rng):
    assert dtypes_of_the_next_product(f"jax.{function}", rng) == {"float32"}


# --- Gradients ---


def weighed(function):
    """A number from all that a function returns."""

    def loss(*args):
        arrays = [x for x in jax.tree.leaves(function(*args)) if jnp.issubdtype(x.dtype, jnp.inexact)]
        parts = [part for x in arrays for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
        return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)) for x in parts)

    return loss


def length(arrays):
    return np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in arrays))


def relative(actual, expected):
    """The length of the error relative to the length of what is expected, over all arrays."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    return length([np.float64(a) - np.float64(b) for a, b in zip(actual, expected, strict=True)]) / length(expected)


DIFFERENTIABLE = [
    (name, policy)
    for name, policy in itertools.product(HERE, POLICIES)
    if CALLS[name].has_gradient and (policy == "mixed_bfloat16" or name in {*ARRAYS, *OF_NUMBERS_WITH_PRODUCTS})
]


@pytest.mark.parametrize(("name", "policy"), quick_slow_or_soak(QUICK, SLOW, DIFFERENTIABLE))
def test_gradients_are_near_those_of_float32(name, policy, rng):
    """Of grad(autocast) and of autocast(grad)."""
    function, args = CALLS[name].function_and_arrays(name, rng)
    places = tuple(i for i, arg in enumerate(args) if arg.dtype == jnp.float32)
    if not places:
        return
    gradient = functools.partial(jax.grad, argnums=places)
    low = functools.partial(jmp.autocast, policy=policy)
    expected = lowered(gradient(weighed(function)), args)
    orders = {"grad(autocast)": gradient(weighed(low(function))), "autocast(grad)": low(gradient(weighed(function)))}
    programs = {order: lowered(grad, args) for order, grad in orders.items()}
    others = {order: program for order, program in programs.items() if program.as_text() != expected.as_text()}
    gradients = result(expected, args) if others else None
    for order, program in others.items():
        found = result(program, args)
        assert all(np.all(np.isfinite(x)) for x in gradients)
        assert length(found) == 0 if length(gradients) == 0 else relative(found, gradients) < 2 * ULP, order


# --- Of what matmuls return ---


def orthogonal(rng):
    return jnp.asarray(np.linalg.qr(rng.standard_normal((9, 9)))[0], jnp.float32)


OF_PRODUCTS = {
    "expm": jax.scipy.linalg.expm,
    "pinv": lambda h: jnp.linalg.pinv(jnp.tanh(h)),
    "inv": jnp.linalg.inv,
    "solve": lambda h: jnp.linalg.solve(h, jnp.ones((9, 2))),
    "lstsq": lambda h: jnp.linalg.lstsq(h[:, :4], h[:, 5])[0],
    "matrix_power": lambda h: jnp.linalg.matrix_power(h, 4),
    "cov": jnp.cov,
    "convolve2d": lambda h: jax.scipy.signal.convolve2d(h, h),
    "resize": lambda h: jax.image.resize(h, (17, 17), "cubic"),
    "logpdf": lambda h: jax.scipy.stats.multivariate_normal.logpdf(h, jnp.zeros(9), 2 * jnp.eye(9)),
}

PLACES = {
    "jit": lambda f: lambda x, w: jax.jit(f)(x @ w),
    "scan": lambda f: lambda x, w: lax.scan(lambda c, _: (c @ w, f(c @ w)), x, None, length=2)[1],
    "vmap": lambda f: lambda x, w: jax.vmap(lambda x: f(x @ w))(jnp.stack([x, -x])),
}


@pytest.mark.parametrize("place", slow_but_for({"jit"}, PLACES))
@pytest.mark.parametrize("name", OF_PRODUCTS)
def test_what_products_return_is_all_that_is_rounded(name, place, rng):
    """In what follows a matmul, nothing else is lost."""
    program = PLACES[place](OF_PRODUCTS[name])
    x, w = jnp.asarray(spread(9)(rng)), orthogonal(rng)
    found = result(lowered(jmp.autocast(program, "mixed_bfloat16"), (x, w)), (x, w))
    assert relative(found, result(lowered(program, (x, w)), (x, w))) < 0.02


# --- Requests ---


def of_users(name):
    """A user's function under jit, with a matmul and the name of one of JAX's functions."""

    def function(x, w):
        return x @ w

    function.__name__ = name
    return jax.jit(function)


REQUESTS = {
    "linalg.matmul": jnp.linalg.matmul,
    "linalg.multi_dot": lambda x, w: jnp.linalg.multi_dot([x, w]),
    "linalg.tensordot": lambda x, w: jnp.linalg.tensordot(x, w, axes=1),
    "attention": lambda x, w: jax.nn.dot_product_attention(x[:, None], w[:, None], w[:, None]),
    "in a solver": lambda x, w: jax.scipy.optimize.minimize(lambda v: jnp.sum((x @ v) ** 2), w[0], method="BFGS").x,
} | {f"of the user's, by name {name}": of_users(name) for name in ("solve", "inv", "norm", "convolve", "cov", "_lstsq")}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_for_products_are_served_in_the_compute_dtype(name):
    x = np.ones((9, 9), np.float32)
    products = jaxprs.contractions(jmp.autocast(REQUESTS[name], "mixed_bfloat16"), x, x)
    assert "bfloat16" in set().union(*(dtypes for _, dtypes in products))
