"""Calls of JAX's functions of numbers, of its densities and of its random numbers."""

import importlib

import jax
import jax.numpy as jnp

from support.library_calls_common import (
    PROBABILITIES,
    ROWS,
    A,
    Call,
    N,
    U,
    V,
    array,
    key,
    named,
    number,
    of,
    stiff,
    unit,
)

SPECIAL = {
    "bernoulli": of(N),
    "bessel_jn": stiff(U, v=3),
    "betainc": stiff(U, U, U),
    "comb": of(array([9.0, 8.0]), array([3.0, 2.0])),
    "erfcinv": of(U),
    "expn": of(2, U),
    "factorial": of(U),
    "log_softmax": of(V),
    "logsumexp": of(V),
    "multigammaln": of(array([4.5, 5.5]), 3),
    "polygamma": of(2, U),
    "softmax": of(V),
    "sph_harm_y": of(unit(1), unit(1), through=lambda f, x, y: f(jnp.array([2]), jnp.array([1]), x, y, n_max=3)),
    "wofz": of(U),
    "zeta": of(array([2.5, 3.5]), number(1.5)),
}
_NUMBER_OF_ARGUMENTS = {
    1: """dawsn digamma entr erf erfc erfcx erfinv exp1 expi expit fresnel gamma gammaln gammasgn i0 i0e i1 i1e log_ndtr
    loggamma logit ndtr ndtri sici spence""",
    2: """beta betaln boxcox boxcox1p gammainc gammaincc kl_div owens_t poch rel_entr xlog1py xlogy""",
    3: "hyp1f1",
    4: "hyp2f1",
}
SPECIAL |= {name: of(*[U] * n) for n, names in _NUMBER_OF_ARGUMENTS.items() for name in names.split()}

DISTRIBUTIONS = {
    "bernoulli": (array([0, 1, 1]), unit(3)),
    "beta": (U, U, U),
    "betabinom": (array([1, 2, 3]), 5, unit(3), unit(3)),
    "binom": (array([1, 2, 3]), 5, unit(3)),
    "cauchy": (U, V, U),
    "chi2": (U, array([3])),
    "dirichlet": (PROBABILITIES, U),
    "expon": (U,),
    "gamma": (U, U),
    "gennorm": (U, U),
    "geom": (array([1, 2, 3]), unit(3)),
    "gumbel_l": (U, V, U),
    "gumbel_r": (U, V, U),
    "laplace": (U, V, U),
    "logistic": (U,),
    "multinomial": (
        lambda rng: jnp.arange(N, dtype=jnp.int32),
        lambda rng: jnp.int32(36),
        PROBABILITIES,
    ),
    "multivariate_normal": (V, V, A),
    "nbinom": (array([1, 2, 3]), number(5), unit(3)),
    "norm": (U, V, U),
    "pareto": (U, U, number(0), number(0.05)),
    "poisson": (lambda rng: jnp.asarray([1, 2, 3]), unit(3)),
    "t": (V, array([3])),
    "truncnorm": (U, number(-1), number(2)),
    "uniform": (U,),
    "vonmises": (U, U),
    "wrapcauchy": (U, U),
}

#: What JAX cannot differentiate, in the parameters or at all.
WITHOUT_GRADIENT = {("beta", function) for function in ("cdf", "logcdf", "sf", "logsf")}
WITHOUT_GRADIENT |= {(f"gumbel_{side}", function) for side in "lr" for function in ("logpdf", "pdf", "ppf")}

# --- Random numbers ---

SHAPE = (N,)
RANDOM = {
    "ball": of(key, N),
    "bernoulli": stiff(key, U),
    "beta": of(key, U, U),
    "binomial": stiff(key, number(9), U),
    "bits": stiff(key, SHAPE),
    "categorical": stiff(key, V),
    "chisquare": of(key, U),
    "choice": stiff(key, V, SHAPE, through=lambda f, k, v, s: f(k, v, s, p=jax.nn.softmax(v))),
    "dirichlet": of(key, U),
    "double_sided_maxwell": of(key, number(0.5), number(2), SHAPE),
    "f": of(key, U, U),
    "gamma": of(key, U),
    "generalized_normal": of(key, 1.5, SHAPE),
    "geometric": stiff(key, U),
    "lognormal": of(key, U),
    "loggamma": of(key, U),
    "multinomial": stiff(key, number(9), PROBABILITIES),
    "multivariate_normal": of(key, V, A),
    "multivariate_normal, svd": of(key, V, A, method="svd"),
    "multivariate_normal, eigh": of(key, V, A, method="eigh"),
    "multivariate_normal, many": of(key, V, A, (ROWS,)),
    "orthogonal": of(key, N),
    "pareto": of(key, U),
    "permutation": of(key, V),
    "poisson": stiff(key, U),
    "randint": stiff(key, SHAPE, 0, 9),
    "rayleigh": of(key, U),
    "t": of(key, U),
    "triangular": of(key, number(0), number(1), number(2), SHAPE),
    "truncated_normal": of(key, number(-1), number(2), SHAPE),
    "wald": of(key, U),
    "weibull_min": of(key, number(1), number(2), SHAPE),
}
RANDOM |= {
    name: of(key, SHAPE)
    for name in ["cauchy", "exponential", "gumbel", "laplace", "logistic", "maxwell", "normal", "rademacher", "uniform"]
}

NUMBERS = named("jax.scipy.special", SPECIAL) | named("jax.random", RANDOM)
NUMBERS |= {
    f"jax.scipy.stats.{name}.{function}": Call(args, has_gradient=(name, function) not in WITHOUT_GRADIENT)
    for name, args in DISTRIBUTIONS.items()
    for function in dir(importlib.import_module(f"jax.scipy.stats.{name}"))
    if not function.startswith("_")
}
