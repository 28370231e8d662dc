"""``autocast``: any function in mixed precision."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np

from jmp_lite._dtypes import FLOAT32, dtype_or_none, warn_if_slow
from jmp_lite._functions import check_function, refuse_modules, without_captured_modules
from jmp_lite._policy import Policy, PolicyMap
from jmp_lite._tree import combine, is_array, partition
from jmp_lite.autocast import _control_flow, _custom_rules
from jmp_lite.autocast._interpreter import Interpreter
from jmp_lite.autocast._ops import Op, checked_ops
from jmp_lite.autocast._residuals import saves_low
from jmp_lite.autocast._rules import Rule, Settings, checked_dot, checked_settings
from jmp_lite.errors import InvalidRuleError

P = ParamSpec("P")
R = TypeVar("R")

HANDLERS = {**_control_flow.HANDLERS, **_custom_rules.HANDLERS}


def autocast(
    fun: Callable[P, R],
    policy: str | Policy | PolicyMap = None,  # type: ignore[assignment]  # to answer "with autocast(policy)"
    *,
    rules: Rule | Sequence[Rule] = (),
    ops: Mapping[str, Op] | None = None,
    dot: Callable[..., Any] | None = None,
    accumulation_dtype: Any = None,
    residuals: str = "all",
) -> Callable[P, R]:
    """Runs a function in mixed precision: matmuls in the compute dtype, fragile operations in float32.

    ``fun`` can be any function that ``jax.jit`` accepts: Flax, Haiku, Equinox or bare JAX, written for float32. Its
    matmuls and convolutions run in the compute dtype, forward and backward; exponentials, logarithms, roots and sums,
    and therefore norms, softmax and losses, run in float32; the rest follows its operands. This holds inside ``jit``,
    ``scan``, ``while_loop``, ``cond``, ``checkpoint``, ``shard_map``, ``pmap`` and functions with custom rules.
    Linear algebra, random numbers, callbacks, kernels, integers, complex numbers and float64 stay as written.

    Arguments, results and gradients keep the dtypes that they have without ``autocast``. Array arguments are traced;
    Python numbers, strings and other leaves stay as they are.

    Apply it to the loss, not to the whole training step: optimizers need float32.

    Args:
        fun: The function.
        policy: Required: a policy, a policy string, or a ``PolicyMap`` whose patterns match name scopes. Only
            ``compute_dtype`` matters: 16 bits, or float32 to leave everything as written.
        rules: Precisions for scopes and primitives, tried in order before the policy.
        ops: Maps names of primitives to an ``OpClass``, or to a function ``op(*operands, **params)`` that replaces the
            primitive; for this function only (see ``register_op``).
        dot: Replaces ``lax.dot_general`` for matmuls in the compute dtype, even float32, and has the same signature.
            Recipes of ``jmp.quant`` are such functions.
        accumulation_dtype: ``jnp.float32`` asks for float32 accumulation in matmuls (which accelerators do anyway)
            before the result is rounded to the compute dtype. ``None`` leaves the choice to the compiler.
        residuals: ``"all"`` keeps all residuals; ``"low"`` keeps no large float32 array and recomputes the inside of
            norms and softmax, in a scan separately for each iteration.

    Returns:
        A function with the signature of ``fun``.

    Raises:
        InvalidPolicyError: If the compute dtype has fewer than 16 bits.
        InvalidRuleError: If a rule or a setting is invalid.
        InvalidOpError: If something in ``ops`` is neither a class nor a function.
        UnknownDtypeError: If the policy string cannot be parsed.

    Warns:
        SlowDtypeWarning: On the first call, if the device has no fast units for the compute dtype.

    Example:
        >>> def loss(w, x):
        ...     return jnp.mean(jax.nn.softmax(x @ w)[:, 0])
        >>> w, x = jnp.ones((8, 16)), jnp.ones((32, 8))
        >>> value, grad = jax.value_and_grad(jmp.autocast(loss, "mixed_bfloat16"))(w, x)
        >>> value.dtype, grad.dtype
        (dtype('float32'), dtype('float32'))
        >>> for decision in jmp.explain(jax.grad(loss), "mixed_bfloat16")(w, x):
        ...     if decision.primitive == "dot_general":
        ...         print(decision.in_dtypes)
        ('bfloat16', 'bfloat16')
        ('bfloat16', 'bfloat16')

    References:
        ``torch.autocast``; TensorFlow's ``auto_mixed_precision``. Micikevicius et al., "Mixed Precision Training",
        arXiv:1710.03740.
    """
    check_function(fun, "autocast")
    run = wrap(
        fun, settings_from(policy, rules=rules, ops=ops, dot=dot, accumulation_dtype=accumulation_dtype), residuals
    )

    @functools.wraps(fun)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        refuse_modules(fun, args, kwargs, "autocast")
        return run(*args, **kwargs)

    return wrapped


def settings_from(
    policy: str | Policy | PolicyMap,
    *,
    rules: Rule | Sequence[Rule],
    ops: Mapping[str, Op] | None,
    dot: Callable[..., Any] | None,
    accumulation_dtype: Any,
    root: str = "",
) -> Settings:
    """Checks the settings that the user gave."""
    if accumulation_dtype is not None and dot is not None:
        raise InvalidRuleError("dot and accumulation_dtype both replace the matmul: give one of them.")
    if accumulation_dtype is not None and dtype_or_none(accumulation_dtype) != FLOAT32:
        raise InvalidRuleError(f"accumulation_dtype must be float32 or None, got {accumulation_dtype!r}.")
    accumulates = accumulation_dtype is not None
    return checked_settings(policy, rules, checked_ops(ops), dot=checked_dot(dot), accumulates=accumulates, root=root)


@functools.lru_cache(maxsize=128)
def _interpreter(settings: Settings) -> Interpreter:
    """One interpreter per settings, so a function wrapped again at every step reuses the retyped programs."""
    return Interpreter(settings, HANDLERS)


def wrap(fun: Callable[P, R], settings: Settings, residuals: str) -> Callable[P, R]:
    """Wraps a function under checked settings."""
    if residuals not in ("all", "low"):
        raise InvalidRuleError(f"residuals must be 'all' or 'low', got {residuals!r}.")
    settings = dataclasses.replace(settings, residuals=residuals)

    @functools.wraps(fun)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        for dtype in settings.dtypes:
            warn_if_slow(dtype)
        traced = trace(fun, args, kwargs)
        run: Callable[..., Any] = functools.partial(_interpreter(settings).run, traced.jaxpr)
        if residuals == "low":
            run = jax.checkpoint(run, policy=saves_low)
        return traced.output(run(traced.arrays))  # type: ignore[no-any-return]

    return wrapped


class Traced(NamedTuple):
    """A function call as a program, with its array arguments."""

    jaxpr: Any
    arrays: list[Any]
    output: Callable[[list[Any]], Any]
    """Puts the results into the tree that the function returned."""


def is_traced(leaf: Any) -> bool:
    """Whether a leaf of the arguments is an array that JAX can trace."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.dtype.kind not in "OSUmM" and leaf.dtype.names is None
    return is_array(leaf) or hasattr(leaf, "aval")


def is_array_or_shape(leaf: Any) -> bool:
    """Whether a leaf is such an array, or a shape in its place, for analyses that compute nothing."""
    return is_traced(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def trace(
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    is_traced: Callable[[Any], bool] = is_traced,
) -> Traced:
    """Traces a call. Arguments and results that are not arrays stay out of the program."""
    arrays, others, layout = partition((args, kwargs), is_traced)
    rest: list[Any] = []

    def on_arrays(*arrays: Any) -> list[Any]:
        call_args, call_kwargs = combine(arrays, others, layout)
        with without_captured_modules():
            output = fun(*call_args, **call_kwargs)
        results, constants, layout_of_results = partition(output, lambda leaf: isinstance(leaf, jax.Array))
        rest[:] = constants, layout_of_results
        return results

    jaxpr = jax.make_jaxpr(on_arrays)(*arrays)
    return Traced(jaxpr, [_as_jax(array) for array in arrays], lambda results: combine(results, *rest))


def _as_jax(array: Any) -> Any:
    return jax.numpy.asarray(array) if isinstance(array, (np.ndarray, np.generic)) else array
