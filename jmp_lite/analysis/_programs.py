"""The program that an analysis examines: traced, under autocast if there is a policy, a loss with its gradient."""

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmp_lite._compat import is_literal, program
from jmp_lite._dtypes import is_floating
from jmp_lite._messages import described, first_few, quote
from jmp_lite._tree import combine, partition, path_string
from jmp_lite.analysis._sites import flat, steps_of, traced, traced_on_host
from jmp_lite.autocast._api import Traced, is_array_or_shape, wrap
from jmp_lite.autocast._explain import Explanation, explained
from jmp_lite.autocast._record import as_count
from jmp_lite.autocast._requests import CHANGES_NONE
from jmp_lite.autocast._rules import Settings
from jmp_lite.errors import InvalidFunctionError, SlowDtypeWarning, UnmatchedRuleWarning

#: What NumPy says of literals that JAX rounds to infinity: a finding, with its line.
_OVERFLOW = "overflow encountered in cast"


class Program(NamedTuple):
    """A traced call."""

    jaxpr: Any
    arguments: tuple[str, ...]
    """Names of the arrays among the arguments."""
    is_loss: bool = False
    """Whether it is a loss with its gradient."""
    residual_bytes: Mapping[str, int] = {}
    """Of a loss: what is kept for the backward pass, arguments not counted, by dtype."""
    explanation: Explanation | None = None
    """What autocast decided about it; ``None`` for a program as it is written."""
    said: tuple[warnings.WarningMessage, ...] = ()
    """Warnings that are worth a finding."""
    asks_16_bits: bool = False
    """Whether a policy or a rule asks for 16 bits."""
    no_gradient: str = ""
    """Why JAX has no gradient of what looks like a loss."""
    overflowed: frozenset[str] = frozenset()
    """Lines on which a number of the program became infinite in a narrower dtype, as file and number."""

    def overflows(self, source: str) -> bool:
        """Whether that happened on a line of the program."""
        return any(source.startswith(f"{line}:") for line in self.overflowed)


def traced_program(
    fun: Callable[..., Any], settings: Settings | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Program:
    """Traces a call of a function and computes nothing.

    Args:
        fun: A function.
        settings: Settings of autocast; ``None`` for the function as written.
        args: Arrays, or shapes in their place.
        kwargs: The same, by keyword.
    """
    with _caught() as (said, overflowed):
        explanation = explained(fun, settings, args, kwargs)[0] if settings else None
    runs = fun if settings is None else wrap(fun, settings, "all")
    with _caught() as (said_again, overflowed_again):
        plain = traced(runs, args, kwargs)
        found = Program(plain.jaxpr, _names(args, kwargs), explanation=explanation)
        found = found._replace(asks_16_bits=bool(settings and settings.dtypes))
        if is_loss(plain, args) or (is_loss(plain, args, aux=True) and not _has_gradient(plain)):
            found = _differentiated(found, runs, args, kwargs)
    return found._replace(said=tuple(said or said_again), overflowed=frozenset(overflowed | overflowed_again))


def _differentiated(plain: Program, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    found = traced_with_gradient(fun, args, kwargs)
    if isinstance(found, str):
        return plain._replace(no_gradient=found)
    return plain._replace(jaxpr=found.jaxpr, is_loss=True, residual_bytes=_residual_bytes(fun, args, kwargs))


def traced_with_gradient(fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced | str:
    """Traces a loss that JAX can trace, with its gradient; returns the reason if JAX has no gradient of it."""
    try:
        return traced(with_gradient(fun), args, kwargs)
    except (ValueError, TypeError, NotImplementedError) as error:
        return described(error)


def differentiated(
    fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], caller: str
) -> tuple[Traced, Traced]:
    """Traces a loss on the host, and the loss with its gradient.

    Raises:
        InvalidFunctionError: If the function is not a loss, or JAX has no gradient of it.
        InvalidAnalysisError: As ``traced_on_host``.
    """
    plain = traced_on_host(fun, args, kwargs, caller)
    if not is_loss(plain, args):
        raise InvalidFunctionError(
            f"{caller} takes a loss: a function that returns one floating scalar and whose first argument has "
            f"floating arrays. This one returns {first_few([aval.str_short() for aval in plain.jaxpr.out_avals])}."
        )
    found = traced_with_gradient(fun, args, kwargs)
    if isinstance(found, str):
        raise InvalidFunctionError(
            f"{caller} measures gradients, and JAX has no gradient of this loss: {found} Loops of lax.scan have one, "
            "and so have those of lax.fori_loop between Python numbers."
        )
    return plain, found


@contextlib.contextmanager
def _caught() -> Iterator[tuple[list[warnings.WarningMessage], set[str]]]:
    """Catches warnings that become findings or repeat one, and the lines where numbers overflowed; passes on others."""
    kept, others, lines = list[warnings.WarningMessage](), list[warnings.WarningMessage](), set[str]()

    def note(message: Any, category: Any, *where: Any) -> None:
        if _OVERFLOW in str(message):
            lines.update(f"{frame.f_code.co_filename}:{number}" for frame, number in traceback.walk_stack(None))
        elif not issubclass(category, SlowDtypeWarning) and f"dot= {CHANGES_NONE}" not in str(message):
            warning = warnings.WarningMessage(message, category, *where)
            (kept if issubclass(category, UnmatchedRuleWarning) else others).append(warning)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]  # its parameters are all positional
        yield kept, lines
    for warning in others:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def is_loss(plain: Traced, args: tuple[Any, ...], *, aux: bool = False) -> bool:
    """Whether a call returns one floating scalar and nothing else, and has floating arrays in its first argument.

    With ``aux`` it may also return a pair of that and auxiliary output.
    """
    avals = plain.jaxpr.out_avals
    output = plain.output(avals)
    loss = _loss(output) if aux else output
    is_scalar = any(loss is aval for aval in avals) and not loss.shape and jnp.issubdtype(loss.dtype, jnp.floating)
    return bool(is_scalar and _floats(args[:1])[0])


def _has_gradient(plain: Traced) -> bool:
    """Whether a call holds a backward pass already, as a training step does."""
    return any(step.site.is_backward for step in flat(steps_of(plain.jaxpr)))


def _loss(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and len(output) == 2 else output


def _floats(tree: Any) -> tuple[list[Any], list[Any], Any]:
    return partition(tree, lambda leaf: is_array_or_shape(leaf) and is_floating(leaf))


def _of_floats(fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Returns a function of only the floating arrays in the first argument, and these arrays.

    Each call reassembles the arguments, so modules among them may change inside it.
    """
    floats, others, layout = _floats(args[0])
    rest, layout_of_rest = jax.tree.flatten((args[1:], kwargs))

    def of_floats(floats: list[Any]) -> Any:
        more, named = jax.tree.unflatten(layout_of_rest, rest)
        return fun(combine(floats, others, layout), *more, **named)

    return of_floats, floats


def with_gradient(fun: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that returns what a loss does, and its gradient in the floating arrays of the first argument.

    The gradient is a list.
    """

    def value_and_grad(*args: Any, **kwargs: Any) -> Any:
        of_floats, floats = _of_floats(fun, args, kwargs)

        def with_output(floats: list[Any]) -> tuple[Any, Any]:
            output = of_floats(floats)
            return _loss(output), output

        (_, output), grads = jax.value_and_grad(with_output, has_aux=True)(floats)
        return output, grads

    return value_and_grad


def _residual_bytes(fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    def residuals(*args: Any, **kwargs: Any) -> list[Any]:
        of_floats, floats = _of_floats(fun, args, kwargs)
        _, pullback = jax.vjp(lambda floats: _loss(of_floats(floats)), floats)
        return list(jax.tree.leaves(pullback))

    inner, _ = program(traced(residuals, args, kwargs).jaxpr)
    arguments, kept = set(inner.invars), dict[str, int]()
    for v in {id(v): v for v in inner.outvars}.values():
        itemsize = getattr(v.aval.dtype, "itemsize", 0)
        if not is_literal(v) and v not in arguments and itemsize:
            kept[str(v.aval.dtype)] = kept.get(str(v.aval.dtype), 0) + as_count(v.aval.size) * itemsize
    return kept


def _names(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    leaves, _ = jax.tree.flatten_with_path((args, kwargs))
    named = [(path, leaf) for path, leaf in leaves if is_array_or_shape(leaf)]
    return tuple(quote(path_string(path[1:])) for path, _ in named)
