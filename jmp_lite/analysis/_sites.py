"""The equations of a program as a tree, each with its scope, its source line and its direction."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jmp_lite._compat import Equation, Jaxpr, is_transposed, program, scope_names, source_line
from jmp_lite._functions import refuse_modules, require_numbers
from jmp_lite.autocast._api import Traced, is_array_or_shape, trace
from jmp_lite.autocast._programs import programs_of

#: Frames of this library are not the user's source lines.
_OWN = ("/jmp_lite/autocast/", "/jmp_lite/analysis/")


class Site(NamedTuple):
    """An equation and its place in a program.

    Attributes:
        number: Its number, in program order; the equations inside a loop or a call follow it.
        primitive: Name of the primitive.
        scope: Name scopes, joined by slashes.
        source: The user's file, line, and function.
        is_backward: Whether it belongs to a backward pass, recomputation included.
        in_dtypes: Dtypes of the operands.
        out_dtypes: Dtypes of the results.
        shape: Shape of the first result.
        trips: How often it runs: the product of the lengths of the scans around it. A while loop counts once.

    Example:
        >>> found = jmp.analysis.first_nonfinite(jnp.log)(jnp.zeros(2))
        >>> found.site.primitive, found.site.in_dtypes, found.site.shape, found.site.trips
        ('log', ('float32',), (2,), 1)
    """

    number: int
    primitive: str
    scope: str
    source: str
    is_backward: bool
    in_dtypes: tuple[str, ...]
    out_dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    trips: int

    def __str__(self) -> str:
        where = " in ".join(filter(None, (self.source, self.scope))) or "an unknown line"
        return f"{self.primitive} ({where})"


class Step(NamedTuple):
    """A site with its equation, and the steps of the programs that the equation holds."""

    site: Site
    eqn: Equation
    bodies: tuple[tuple["Step", ...], ...]


def traced(fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    """Traces a call; shapes may replace arrays if nothing is computed."""
    return trace(fun, args, kwargs, is_array_or_shape)


def traced_on_host(fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], caller: str) -> Traced:
    """Traces a call whose numbers are read on the host; refuses traced arrays, those that it closes over too.

    Args:
        fun: A pure function.
        args: Its arguments.
        kwargs: The same, by keyword.
        caller: Public name of the analysis.

    Raises:
        InvalidAnalysisError: If an array is traced, as inside ``jax.jit``, or is only a shape.
        InvalidFunctionError: If there is an NNX module.
    """
    refuse_modules(fun, args, kwargs, caller, twin=False)
    require_numbers((args, kwargs, jnp.zeros(())), caller)  # zeros are traced inside jax.jit
    call = traced(fun, args, kwargs)
    require_numbers(program(call.jaxpr)[1], caller)
    return call


def steps_of(jaxpr: Jaxpr) -> tuple[Step, ...]:
    """Returns the steps of a program, numbered from 0."""
    return _steps(jaxpr, Site(-1, "", "", "", False, (), (), (), 1), iter(range(2**62)))


def flat(steps: Sequence[Step]) -> Iterator[Step]:
    """Yields steps and the steps inside them, in numeric order."""
    for step in steps:
        yield step
        for body in step.bodies:
            yield from flat(body)


def way_to(steps: Sequence[Step], number: int) -> list[Sequence[Step]]:
    """Returns the programs around a step, from the outermost; each ends with the step that holds the next."""
    at = next(i for i, step in enumerate(steps) if number <= max(inner.site.number for inner in flat([step])))
    here = steps[: at + 1]
    for body in steps[at].bodies:
        if any(inner.site.number == number for inner in flat(body)):
            return [here, *way_to(body, number)]
    return [here]


def _steps(jaxpr: Jaxpr, outer: Site, numbers: Iterator[int]) -> tuple[Step, ...]:
    return tuple(_step(eqn, outer, numbers) for eqn in program(jaxpr)[0].eqns)


def _step(eqn: Equation, outer: Site, numbers: Iterator[int]) -> Step:
    stack = eqn.source_info.name_stack
    length = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
    results = [v.aval for v in eqn.outvars]
    site = Site(
        next(numbers),
        eqn.primitive.name,
        "/".join(filter(None, (outer.scope, scope_names(stack)))),
        _source(eqn) or outer.source,
        outer.is_backward or is_transposed(stack),
        _dtypes([v.aval for v in eqn.invars]),
        _dtypes(results),
        tuple(getattr(results[0], "shape", ())) if results else (),
        outer.trips,
    )
    inside = site._replace(trips=site.trips * (length if isinstance(length, int) else 1))
    bodies = tuple(_steps(body.jaxpr, inside, numbers) for body in programs_of(eqn).bodies)
    return Step(site, eqn, bodies)


def _source(eqn: Equation) -> str:
    line = source_line(eqn)
    return "" if any(part in line.replace("\\", "/") for part in _OWN) else line


def _dtypes(avals: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(getattr(aval, "dtype", type(aval).__name__)) for aval in avals)
