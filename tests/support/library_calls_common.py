"""What the tables of calls of JAX's own functions are made of: calls and their arguments."""

import dataclasses
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

N, ROWS = 9, 12


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of a function, in its order.

    Attributes:
        args: What makes an argument from a NumPy generator; anything else is passed as it is.
        kwargs: Settings.
        through: What calls the function, where that takes more than arguments: ``through(function, *arrays)``.
        has_gradient: Whether JAX differentiates it, in reverse.
    """

    args: tuple
    kwargs: dict = dataclasses.field(default_factory=dict)
    through: Callable | None = None
    has_gradient: bool = True

    def function_and_arrays(self, name, rng):
        """The function of this name as a function of arrays, and these arrays."""
        module, _, attribute = name.split(",")[0].rpartition(".")
        function = getattr(importlib.import_module(module), attribute)
        made = [arg(rng) if callable(arg) else arg for arg in self.args]
        places = [i for i, arg in enumerate(self.args) if callable(arg)]

        def call(*arrays):
            args = list(made)
            for place, array in zip(places, arrays, strict=True):
                args[place] = array
            if self.through is not None:
                return self.through(function, *args)
            return function(*args, **self.kwargs)

        return call, [made[i] for i in places]


def of(*args, through=None, has_gradient=True, **kwargs):
    """A call with these arguments."""
    return Call(args, kwargs, through, has_gradient)


def stiff(*args, **kwargs):
    """A call that has no gradient: integers, steps, loops whose length is not known, rules that JAX does not have."""
    return of(*args, has_gradient=False, **kwargs)


# --- Arguments ---


def normal(*shape):
    """Normal deviates."""
    return lambda rng: jnp.asarray(rng.standard_normal(shape), jnp.float32)


def unit(*shape):
    """Numbers between 0.1 and 0.9."""
    return lambda rng: jnp.asarray(rng.uniform(0.1, 0.9, shape), jnp.float32)


def count(*shape):
    """Small integers."""
    return lambda rng: jnp.asarray(rng.integers(1, 4, shape), jnp.int32)


def spread(m, n=None):
    """A matrix whose singular values lie between 1 and 2, apart from each other."""

    def make(rng):
        k = n or m
        left, right = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (m, k))
        return jnp.asarray((left * np.linspace(1, 2, k)) @ right.T, jnp.float32)

    return make


def positive(n):
    """A symmetric matrix whose eigenvalues lie between 1 and 2, apart from each other."""

    def make(rng):
        q = np.linalg.qr(rng.standard_normal((n, n)))[0]
        return jnp.asarray((q * np.linspace(1, 2, n)) @ q.T, jnp.float32)

    return make


def number(value):
    """A number, as an array."""
    return lambda rng: jnp.float32(value)


def array(value):
    """An array that is the same in every run."""
    return lambda rng: jnp.asarray(value, jnp.float32)


def key(rng):
    """A random key."""
    return jax.random.key(int(rng.integers(2**31)))


def signal(n=64):
    """A sum of waves and noise."""
    return lambda rng: jnp.asarray(np.sin(np.arange(n) / 3) + 0.1 * rng.standard_normal(n), jnp.float32)


V, U, M, A, TALL = normal(N), unit(N), normal(N, N), positive(N), spread(ROWS, N)
GENERAL, TALLS, IMAGE = spread(N), normal(3, ROWS, N), normal(N, N, 3)
PROBABILITIES = array(np.arange(1, 10) / 45)
QUATERNIONS = normal(ROWS, 4)


def named(prefix, calls):
    """The table with whole names."""
    return {f"{prefix}.{name}": call for name, call in calls.items()}
