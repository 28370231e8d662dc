"""``estimate``: the cost of a step on a device that you need not have, in several precisions."""

import collections
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from jmp_lite._compat import run
from jmp_lite._functions import check_function
from jmp_lite._messages import described, quote
from jmp_lite._policy import Policy, PolicyMap
from jmp_lite._tree import combine, partition
from jmp_lite.analysis._estimation._compiled import _child, _hlo, _roofline
from jmp_lite.analysis._estimation._dataflow import dataflow
from jmp_lite.analysis._estimation._devices import DEVICES, Device, device_of, kind_of
from jmp_lite.analysis._estimation._estimated import Configuration, Estimate, Part
from jmp_lite.analysis._estimation._launches import Launch, launches
from jmp_lite.analysis._sites import traced
from jmp_lite.autocast._api import Traced, autocast, is_traced
from jmp_lite.errors import InvalidAnalysisError, InvalidFunctionError, InvalidRecipeError
from jmp_lite.quant._recipes import DotRecipe, get_recipe

#: What can stand for a precision.
Precision = str | Policy | PolicyMap | DotRecipe | Callable[..., Any]
DEFAULT = ("float32", "mixed_bfloat16", "fp8")
AS_WRITTEN = "as written"


def estimate(
    fun: Callable[..., Any],
    *,
    device: str = "h100",
    policies: Sequence[str | Policy | PolicyMap | DotRecipe] | Mapping[str, Precision] | None = DEFAULT,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    compiled: bool | None = None,
) -> Callable[..., Estimate]:
    """Estimates the cost of a training step on a device that you need not have: will 16 or 8 bits pay?

    FLOPs are exact. Bytes come from the program that the device's compiler makes or from a model of its fusions: mostly
    within 10 % of what XLA compiles for H100, up to a fifth less for a UNet with group norms (benchmarks/RESULTS.md,
    "Estimates"). Matmuls whose sizes the matrix units do not divide are filled up, as XLA does. The time is a roofline:
    every launch takes as long as its bytes at 0.85 of the bandwidth or its FLOPs at 0.7 of the peak, whichever is
    longer. Launch overhead, collectives and the inside of kernels do not count; a ``while`` loop counts once, a
    ``cond`` as its most expensive branch, a ``shard_map`` as one device.

    Args:
        fun: A loss in float32: a function of parameters and other arguments that returns a scalar.
        device: ``"a100"``, ``"l4"``, ``"h100"``, ``"h200"``, ``"b200"``, ``"tpu_v5e"``, ``"tpu_v5p"`` or ``"tpu_v6e"``.
        policies: Precisions to compare; the first is the baseline. Policies as for ``autocast``, and recipes of
            ``jmp.quant`` or their names, which mean mixed bfloat16 with matmuls by the recipe. A dict of your own names
            may also hold losses with their own casts. ``None`` if ``fun`` is not a loss but a whole step, which is
            estimated unchanged.
        argnums: Which arguments to differentiate with respect to.
        has_aux: Whether ``fun`` returns the loss and auxiliary output.
        compiled: Whether to compile for H100 or H200, without the device, in a separate process. It takes some seconds
            per precision and needs ``pip install 'jmp-lite[aot]'``. ``None`` compiles if that is installed.

    Returns:
        A function with the arguments of ``fun`` (arrays, or ``jax.ShapeDtypeStruct`` in their place) that returns an
        ``Estimate``, which prints as a verdict and a table.

    Raises:
        InvalidAnalysisError: If the device is unknown, there is nothing to compare, or ``compiled`` is true for a
            device that has no compiler here.
        InvalidFunctionError: If ``fun`` is not a function, or a loss without a gradient.
        UnknownDtypeError: If a policy cannot be parsed.
        ModuleNotFoundError: If ``compiled`` is true and the compiler is not installed.

    Example:
        >>> def loss(w, x):
        ...     return jnp.mean(jnp.square(jnp.tanh(x @ w)))
        >>> w, x = (jax.ShapeDtypeStruct((4096, 4096), jnp.float32) for _ in range(2))
        >>> found = jmp.analysis.estimate(loss, device="h100", compiled=False)(w, x)
        >>> found["mixed_bfloat16"].flops
        {'bfloat16': 274877906944}
        >>> [round(row.speedup, 1) for row in found]
        [1.0, 1.7, 2.3]

    References:
        Williams, Waterman and Patterson, "Roofline", Communications of the ACM 52, 2009. Device figures are from
        datasheets.
    """
    check_function(fun, "estimate")
    chosen = device_of(device)
    compiles = _compiles(device, chosen, compiled)
    programs = _programs(fun, policies, argnums, has_aux)

    def estimated(*args: Any, **kwargs: Any) -> Estimate:
        rows = []
        for name, program in programs.items():
            found = _traced(program, args, kwargs)
            costs = _compiled(found, chosen.compiler) if compiles else launches(dataflow(found.jaxpr))
            rows.append(configuration(name, costs, chosen))
        return Estimate(chosen, tuple(row.over(rows[0]) for row in rows), is_compiled=compiles)

    return estimated


def _traced(program: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    try:
        return traced(program, args, kwargs)
    except ValueError as error:
        if not re.search("Reverse-mode|JVP", str(error)):
            raise
        raise InvalidFunctionError(
            f"estimate differentiates a loss, and JAX has no gradient of this one: {described(error)} Loops of "
            "lax.scan have one; policies=None estimates a function as it is."
        ) from error


def configuration(name: str, costs: Iterable[Launch], device: Device) -> Configuration:
    """Adds up launches."""
    flops, moved = collections.Counter[str](), collections.Counter[str]()
    seconds = collections.defaultdict[str, float](float)
    count, waiting = 0, 0.0
    for launch in costs:
        kind = kind_of(launch.dtypes, exact=launch.exact) if launch.flops else ""
        took, is_memory = device.seconds(launch.bytes, launch.flops, kind)
        count += launch.trips
        moved[launch.part] += round(launch.bytes * launch.trips)
        seconds[launch.part] += took * launch.trips
        waiting += took * launch.trips * is_memory
        if kind:
            flops[kind] += launch.flops * launch.trips
    total = sum(seconds.values())
    parts = {part: Part(moved[part], seconds[part]) for part in sorted(moved)}
    share = waiting / total if total else 0.0
    return Configuration(name, sum(moved.values()), dict(sorted(flops.items())), count, total, share, 1.0, parts)


def _compiled(found: Any, target: str) -> Iterable[Launch]:
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in found.arrays]
    text = _child.compiled_text(functools.partial(run, found.jaxpr), shapes, target)
    return _roofline.launches(_hlo.parse(text))


def _compiles(name: str, device: Device, compiled: bool | None) -> bool:
    """Whether to compile; raises if the device or the compiler does not allow it."""
    if compiled is None:
        return bool(device.compiler) and _child.is_available(device.compiler)
    if compiled and not device.compiler:
        able = [quote(other) for other, row in DEVICES.items() if row.compiler]
        raise InvalidAnalysisError(
            f"There is no compiler for {name!r} here, only for {', '.join(able)}. Leave compiled=True out to "
            "estimate from the traced program."
        )
    if compiled and not _child.is_available(device.compiler):
        raise ModuleNotFoundError(
            f"compiled=True for {name!r} needs its compiler, which is not installed. Run pip install 'jmp-lite[aot]'."
        )
    return bool(compiled)


def _programs(
    fun: Callable[..., Any],
    policies: Sequence[Any] | Mapping[str, Any] | None,
    argnums: int | Sequence[int],
    has_aux: bool,
) -> dict[str, Callable[..., Any]]:
    """Returns the functions to estimate, by name."""
    if policies is None:
        return {AS_WRITTEN: fun}
    if isinstance(policies, (str, Policy, PolicyMap, DotRecipe)) or not policies:
        raise InvalidAnalysisError(
            f"policies={quote(policies)} is nothing to compare. Give a list, such as {list(DEFAULT)}, or a dict."
        )
    named = policies.items() if isinstance(policies, Mapping) else [(str(policy), policy) for policy in policies]
    return {name: _with_gradient(in_precision(fun, policy), argnums, has_aux=has_aux) for name, policy in named}


def _with_gradient(fun: Callable[..., Any], argnums: int | Sequence[int], *, has_aux: bool) -> Callable[..., Any]:
    """Returns a function that returns a loss and its gradient in the arrays of some arguments."""
    chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def run(*args: Any, **kwargs: Any) -> Any:
        arrays, others, layout = partition([args[number] for number in chosen], is_traced)

        def of_arrays(arrays: Any) -> Any:
            given = list(args)
            for number, argument in zip(chosen, combine(arrays, others, layout), strict=True):
                given[number] = argument
            return fun(*given, **kwargs)

        return jax.value_and_grad(of_arrays, has_aux=has_aux, allow_int=True)(arrays)

    return run


def in_precision(fun: Callable[..., Any], policy: Any) -> Callable[..., Any]:
    """Returns a loss in a precision."""
    recipe = policy
    if isinstance(policy, str):
        try:
            recipe = get_recipe(policy)
        except InvalidRecipeError:
            return autocast(fun, policy)
    if isinstance(recipe, DotRecipe):
        return autocast(fun, "mixed_bfloat16", dot=recipe)
    if isinstance(policy, (Policy, PolicyMap)) or not callable(policy):
        return autocast(fun, policy)
    loss: Callable[..., Any] = policy
    return loss
