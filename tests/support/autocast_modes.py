"""The modes that a case of autocast runs in, and ways to run, lower and trace functions of arrays and other things."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jmp_lite as jmp
from support import jaxprs
from support.autocast_cases_common import GRAD_OF, JIT, OF_GRAD
from support.comparisons import raw

# --- Arguments that are arrays and those that are not ---


def is_array(x):
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


def is_float(x):
    return is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)


def split(args, kwargs):
    """The arrays among arguments, and what is left of the arguments without them."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    return [x for x in leaves if is_array(x)], (structure, tuple(jax.Array if is_array(x) else x for x in leaves))


def joined(arrays, rest):
    structure, leaves = rest
    arrays = iter(arrays)
    return jax.tree.unflatten(structure, [next(arrays) if x is jax.Array else x for x in leaves])


def of_arrays(transform):
    """A transformation such as jit for functions whose arguments are not all arrays."""

    def transformed(fun):
        @functools.cache
        def of_rest(rest):
            def run(arrays):
                args, kwargs = joined(arrays, rest)
                return fun(*args, **kwargs)

            return transform(run)

        def call(*args, **kwargs):
            arrays, rest = split(args, kwargs)
            return of_rest(rest)(arrays)

        return call

    return transformed


# Which instructions LLVM picks is not at issue; whether autocast picks the right programs is.
jitted = of_arrays(functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0}))
traces = of_arrays(lambda run: jax.jit(run).trace)


def equations(trace):
    """The equations of a traced program, those inside loops and calls included."""
    return [eqn for _, eqn in jaxprs._equations(trace.jaxpr.jaxpr, "")]


def written(trace):
    """A traced program as text, and the arrays that it and the programs in it close over."""
    values = jax.tree.leaves([[*eqn.params.values()] for eqn in equations(trace)], is_leaf=jaxprs._is_jaxpr)
    return str(trace.jaxpr), [raw(x) for one in (trace.jaxpr, *values) for x in getattr(one, "consts", ())]


def replayed(trace):
    """A traced program as a function of its arguments that nothing traces again."""

    def run(*args, **kwargs):
        arrays, _ = split(args, kwargs)
        results = jax.core.eval_jaxpr(trace.jaxpr.jaxpr, trace.jaxpr.consts, *arrays)
        return jax.tree.unflatten(jax.tree.structure(trace.out_info), results)

    return run


def weighed(out):
    """A number that depends on every float of a tree, each with its own weight."""
    total = jnp.float32(0)
    for x in filter(lambda x: is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact), jax.tree.leaves(out)):
        parts = [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
        for part in parts:
            weights = jnp.cos(1 + jnp.arange(part.size, dtype=jnp.float32)).astype(part.dtype)
            total += jnp.sum(part * weights.reshape(part.shape)).astype(jnp.float32)
    return total


def gradient(fun):
    """The gradients of the weighed output with respect to every float among the arguments."""

    def run(*args, **kwargs):
        leaves, structure = jax.tree.flatten((args, kwargs))
        places = [i for i, x in enumerate(leaves) if is_float(x)]

        def loss(floats):
            new = list(leaves)
            for i, x in zip(places, floats, strict=True):
                new[i] = x
            args, kwargs = jax.tree.unflatten(structure, new)
            return weighed(fun(*args, **kwargs))

        return jax.grad(loss)([leaves[i] for i in places])

    return run


def in_modes(case, cast):
    """The value of a case and its gradient, cast inside and outside of grad: those that the case has."""
    low = cast(case.fun)
    modes = {JIT: low, GRAD_OF: gradient(low), OF_GRAD: cast(gradient(case.fun))}
    return {mode: fun for mode, fun in modes.items() if mode in case.modes}


def together(functions):
    """Several functions of the same arguments as one, for one compilation."""
    return lambda *args, **kwargs: {mode: fun(*args, **kwargs) for mode, fun in functions.items()}


def unchanged(fun):
    return fun


def to(policy):
    return lambda fun: jmp.autocast(fun, policy)
