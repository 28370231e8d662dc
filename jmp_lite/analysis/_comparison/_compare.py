"""``compare``: how far a policy moves results and gradients from float32, equation by equation."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import run
from jmp_lite._dtypes import is_floating
from jmp_lite._functions import check_function
from jmp_lite._policy import Policy, PolicyMap
from jmp_lite._text import table
from jmp_lite._tree import path_string
from jmp_lite.analysis._comparison._perturb import ratio
from jmp_lite.analysis._comparison._shadow import evaluated
from jmp_lite.analysis._finding import Finding, ordered
from jmp_lite.analysis._programs import is_loss, traced_with_gradient
from jmp_lite.analysis._sites import Site, flat, steps_of, traced_on_host
from jmp_lite.autocast._api import Traced, autocast
from jmp_lite.errors import InvalidFunctionError

Variant = str | Policy | PolicyMap | Callable[..., Any]

#: A gradient that has turned further than this from that in float32 is said to have.
_LEAST_COSINE = 0.99
#: Results that are further from float32 than this, and so many times further than the operands, are said to be.
_LARGE_ERROR, _AMPLIFIED = 0.1, 8
#: From this error of the float32 value itself on, nothing is said about the distance from it.
_OWN_ERROR = 0.01


class EquationError(NamedTuple):
    """The error that an equation adds, takes and carries, each as a root mean square relative to the exact values.

    Attributes:
        site: Where it is in the program.
        added: Error that its rounding would add to exact operands.
        taken: Distance of its operands from float32; the largest one.
        carried: Distance of its results from float32.

    Example:
        >>> w, x = jnp.linspace(0, 1, 64).reshape(16, 4), jnp.linspace(-1, 2, 64).reshape(4, 16)
        >>> errors = jmp.analysis.compare(jnp.matmul)(x, w)["mixed_bfloat16"]
        >>> sorted({error.site.primitive for error in errors.equations})
        ['convert_element_type', 'dot_general']
    """

    site: Site
    added: float
    taken: float
    carried: float


class ResultError(NamedTuple):
    """The distance of a result, or of the gradient of a parameter, from float32.

    Attributes:
        path: Path of the result or parameter; ``loss`` for a loss. NaN and infinities that float32 makes too count as
            equal.
        cosine: Cosine of the angle between both vectors; 1 if both are zero, 0 if one is zero or not finite.
        norm_ratio: Norm over the norm in float32; 1 if both are zero.
        error: Norm of the difference over the norm in float32: 1 for a result that became zero, infinite for one that
            is not finite or is zero only in float32.

    Example:
        >>> w, x = jnp.linspace(0, 1, 64).reshape(16, 4), jnp.linspace(-1, 2, 64).reshape(4, 16)
        >>> [result] = jmp.analysis.compare(jnp.matmul)(x, w)["mixed_bfloat16"].results
        >>> 0 < result.error < 0.01 < 0.99 < result.cosine
        True
    """

    path: str
    cosine: float
    norm_ratio: float
    error: float


@dataclasses.dataclass(frozen=True)
class PolicyErrors:
    """The errors of one policy.

    Attributes:
        results: The loss and the gradients, or the results; furthest from float32 first.
        equations: The equations; those that add most error first.

    Example:
        >>> w, x = jnp.linspace(0, 1, 64).reshape(16, 4), jnp.linspace(-1, 2, 64).reshape(4, 16)
        >>> jmp.analysis.compare(jnp.matmul, "float32")(x, w)["float32"].error < 1e-6
        True
    """

    results: tuple[ResultError, ...]
    equations: tuple[EquationError, ...]

    @property
    def error(self) -> float:
        """The largest error of a result or a gradient."""
        return max((result.error for result in self.results), default=0.0)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The errors of several policies on a function, compared with float32.

    Attributes:
        policies: Errors by name, in the order given.
        findings: Worst first. Of values that are only rounding errors in float32 too, such as the gradient of a bias
            that a softmax cancels, there are none.

    Example:
        >>> w, x = jnp.linspace(0, 1, 64).reshape(16, 4), jnp.linspace(-1, 2, 64).reshape(4, 16)
        >>> comparison = jmp.analysis.compare(jnp.matmul, ["mixed_bfloat16", "mixed_float16"])(x, w)
        >>> list(comparison.policies), comparison["mixed_float16"].error < comparison["mixed_bfloat16"].error
        (['mixed_bfloat16', 'mixed_float16'], True)
    """

    policies: Mapping[str, PolicyErrors]
    findings: tuple[Finding, ...]

    def __getitem__(self, name: str) -> PolicyErrors:
        return self.policies[name]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as dictionaries, lists, strings and numbers, as JSON has them."""
        pairs = self.policies.items()
        results = [{"policy": name, **result._asdict()} for name, errors in pairs for result in errors.results]
        equations = [{"policy": name, **_plain(one)} for name, errors in pairs for one in errors.equations]
        findings = [finding._asdict() for finding in self.findings]
        return {"results": results, "equations": equations, "findings": findings}

    def table(self, limit: int = 8) -> str:
        """Returns the errors as text, the largest first.

        Args:
            limit: How many results and equations to print for each policy.
        """
        parts = []
        for name, errors in self.policies.items():
            results = [(r.path, f"{r.error:.2e}", f"{r.cosine:.6f}", f"{r.norm_ratio:.4f}") for r in errors.results]
            parts += [f"{name}: results and gradients", table(("of", "error", "cosine", "norm"), results[:limit])]
            equations = [
                (f"{e.added:.2e}", f"{e.taken:.2e}", f"{e.carried:.2e}", str(e.site)) for e in errors.equations[:limit]
            ]
            parts += [f"{name}: equations", table(("added", "taken", "carried", "where"), equations)]
        return "\n".join(parts)

    def __str__(self) -> str:
        return "\n".join([self.table(), *map(str, self.findings)])

    __repr__ = __str__


def _plain(equation: EquationError) -> dict[str, Any]:
    """Returns an equation and its errors in one row."""
    site = {name: getattr(equation.site, name) for name in ("primitive", "scope", "source", "is_backward")}
    return {**site, "added": equation.added, "taken": equation.taken, "carried": equation.carried}


def compare(
    fun: Callable[..., Any], policies: Variant | Sequence[Variant] | Mapping[str, Variant] = "mixed_bfloat16"
) -> Callable[..., Comparison]:
    """Compares a function under policies with float32: results, gradients, every equation.

    For a function that returns one floating scalar it compares the value and, if JAX has one, the gradient in the
    floating arrays of the first argument; for any other function, the results. It also evaluates every value without
    any rounding, which shows how much error each equation adds and how much it received. Matmuls quantized through
    integers count as exact from there on; results and gradients are always compared with a run of the plain function.

    It runs equation by equation, compiles only loops, branches and maps, and takes three times the memory.

    Args:
        fun: The function, written for float32.
        policies: Policies for ``autocast``, or functions to compare with ``fun``, such as
            ``{"fp8": jmp.autocast(loss, "mixed_bfloat16", dot=jmp.quant.FP8)}``; one, a list, or by name. If two
            share a name, the second gets a number.

    Returns:
        A function with the arguments of ``fun`` that returns a ``Comparison``.

    Raises:
        InvalidAnalysisError: When called, if the arguments are traced, as inside ``jax.jit``.
        InvalidFunctionError: If one of the functions cannot be called, or its results are not like those of ``fun``.

    Example:
        >>> def loss(w, x):
        ...     return jnp.mean(jax.nn.softmax(x @ w)[:, 0])
        >>> w, x = jnp.arange(32.0).reshape(8, 4) / 32, jnp.linspace(-1, 1, 16).reshape(2, 8)
        >>> comparison = jmp.analysis.compare(loss, ["mixed_bfloat16", "mixed_float16"])(w, x)
        >>> [errors.error < 0.02 for errors in comparison.policies.values()]
        [True, True]

    References:
        PyTorch's numeric suite compares two models layer by layer; shadow values are those of Benz et al., "A dynamic
        program analysis to find floating-point accuracy problems", PLDI 2012.
    """
    check_function(fun, "compare")
    variants = _named(fun, policies)

    def comparing(*args: Any, **kwargs: Any) -> Comparison:
        with jax.default_matmul_precision("highest"):
            plain = _Call.of(fun, args, kwargs)
        calls = {name: _Call.of(variant, args, kwargs) for name, variant in variants.items()}
        reasons = [call.no_gradient for call in (plain, *calls.values()) if call.no_gradient]
        programs = {name: _checked(name, call.program(reasons), plain.program(reasons)) for name, call in calls.items()}
        exact, paths = plain.program(reasons)
        with jax.default_matmul_precision("highest"):
            reference = jax.jit(lambda arrays: run(exact.jaxpr, *arrays))(exact.arrays)
        found = {name: _errors(program, paths, reference) for name, program in programs.items()}
        findings = [finding for name, errors in found.items() for finding in _findings(name, errors)]
        said = [f"JAX has no gradient of this function, so only its value is compared: {reasons[0]}"] if reasons else []
        return Comparison(found, ordered([*findings, *(Finding("no-gradient", message) for message in said)]))

    return comparing


def _named(fun: Callable[..., Any], policies: Any) -> dict[str, Callable[..., Any]]:
    if not isinstance(policies, Mapping):
        several = list(policies) if isinstance(policies, Sequence) and not isinstance(policies, str) else [policies]
        policies = {}
        for one in several:
            name = getattr(one, "__name__", None) or str(one)
            policies[f"{name} ({len(policies) + 1})" if name in policies else name] = one
        for one in policies.values():
            if not isinstance(one, (str, Policy, PolicyMap)):
                check_function(one, "compare")
    return {
        name: autocast(fun, one) if isinstance(one, (str, Policy, PolicyMap)) else one for name, one in policies.items()
    }


class _Call(NamedTuple):
    """A function as programs, each with the paths of its results.

    Attributes:
        value: The function alone.
        gradient: A loss with its gradient; ``None`` if it is not a loss, or JAX has no gradient of it.
        no_gradient: Why JAX has none.
    """

    value: tuple[Traced, list[str]]
    gradient: tuple[Traced, list[str]] | None = None
    no_gradient: str = ""

    @classmethod
    def of(cls, fun: Callable[..., Any], args: Any, kwargs: Any) -> "_Call":
        check_function(fun, "compare")
        plain = traced_on_host(fun, args, kwargs, "compare")
        shapes = plain.output(plain.jaxpr.out_avals)
        pairs = jax.tree_util.tree_leaves_with_path(shapes)
        value = plain, [path_string(path) for path, leaf in pairs if hasattr(leaf, "dtype")]
        if not is_loss(plain, args):
            return cls(value)
        found = traced_with_gradient(fun, args, kwargs)
        if isinstance(found, str):
            return cls((plain, ["loss"]), no_gradient=found)
        leaves = jax.tree_util.tree_leaves_with_path(args[0])
        return cls(value, (found, ["loss", *(path_string(path) for path, leaf in leaves if is_floating(leaf))]))

    def program(self, reasons: Sequence[str]) -> tuple[Traced, list[str]]:
        """Returns the gradient of a loss, unless there are reasons against it."""
        return self.value if reasons or self.gradient is None else self.gradient


def _checked(name: str, variant: tuple[Traced, list[str]], wanted: tuple[Traced, list[str]]) -> Traced:
    (call, own_paths), (_, paths) = variant, wanted
    if own_paths != paths:
        raise InvalidFunctionError(
            f"{name!r} returns {len(own_paths)} arrays, {own_paths[:5]}, and the function {len(paths)}, {paths[:5]}. "
            "Give functions that return the same."
        )
    return call


def _errors(call: Traced, paths: Sequence[str], reference: Sequence[Any]) -> PolicyErrors:
    steps = steps_of(call.jaxpr)
    values, errors = evaluated(call.jaxpr, steps, call.arrays)
    pairs = zip(paths, values, reference, strict=True)
    results = [_result(path, value.array, wanted) for path, value, wanted in pairs if is_floating(wanted)]
    sites = {step.site.number: step.site for step in flat(steps)}
    equations = [
        EquationError(sites[index], *(math.sqrt(float(total) / float(one.runs)) for total in one[:3]))
        for index, one in errors.items()
        if one.runs
    ]
    return PolicyErrors(
        tuple(sorted(results, key=lambda result: -result.error)),
        tuple(sorted(equations, key=lambda equation: -equation.added)),
    )


def _result(path: str, found: Any, wanted: Any) -> ResultError:
    a, b = (np.asarray(x, np.float64).ravel() for x in (found, wanted))
    is_same = ~np.isfinite(b) & ((a == b) | (np.isnan(a) & np.isnan(b)))
    a, b = (np.where(is_same, 0, x) for x in (a, b))
    if not np.all(np.isfinite([a, b])):
        return ResultError(path, 0.0, math.inf, math.inf)
    norm, wanted_norm, difference = (float(np.linalg.norm(x)) for x in (a, b, a - b))
    cosine = float(np.dot(a / norm, b / wanted_norm)) if norm and wanted_norm else float(norm == wanted_norm)
    return ResultError(path, cosine, ratio(norm, wanted_norm, 1.0), ratio(difference, wanted_norm))


def _findings(name: str, errors: PolicyErrors) -> list[Finding]:
    found, certain = [], _largest_certain(errors)
    for result in errors.results:
        if not result.cosine >= _LEAST_COSINE and not certain < result.error < math.inf:
            message = f"Under {name}, {result.path} has cosine {result.cosine:.4f} with float32, and its norm "
            message += f"is {result.norm_ratio:.3g} times as large."
            found.append(Finding("gradient-turned", message, "", result.path, 1 - result.cosine))
    for e in errors.equations:
        if _LARGE_ERROR < e.carried < certain and e.carried > _AMPLIFIED * max(e.taken, 2**-12):
            message = f"Under {name}, {e.site.primitive} amplifies the error of its operands from "
            message += f"{e.taken:.1%} to {e.carried:.1%}."
            found.append(Finding("error-amplified", message, e.site.source, e.site.scope, e.carried))
    return found


def _largest_certain(errors: PolicyErrors) -> float:
    """Returns the error from which on the float32 value has too large an error itself.

    Rounding errors in float32 are smaller by the ratio of the spacings of both formats, and they are the whole value of
    a gradient that is zero in exact arithmetic, such as that of a bias that a softmax cancels.
    """
    dtypes = {jnp.dtype(name) for e in errors.equations for name in e.site.out_dtypes if "float" in name}
    spacings = [float(jnp.finfo(dtype).eps) for dtype in dtypes]  # type: ignore[no-untyped-call]
    return _OWN_ERROR * max(spacings, default=0.0) / float(jnp.finfo(jnp.float32).eps)  # type: ignore[no-untyped-call]
