"""``first_nonfinite``: the equation that made the first NaN or infinity that reaches a result."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import is_literal
from jmp_lite._functions import check_function
from jmp_lite._tree import path_string
from jmp_lite.analysis._finding import Finding
from jmp_lite.analysis._nonfinite._bundle import Bundle
from jmp_lite.analysis._nonfinite._culprits import NEVER, WRITTEN, captured, codes_of_results, step_at
from jmp_lite.analysis._ranges._range import Range, range_of
from jmp_lite.analysis._ranges._tally import tally
from jmp_lite.analysis._sites import Site, Step, flat, steps_of, traced_on_host, way_to
from jmp_lite.autocast._api import Traced
from jmp_lite.scaling._in_state import is_loss_scale, nodes

#: How many producers of the operands are named.
_PRODUCERS = 8
_FIGURES = ("count", "nan", "inf", "zero", "largest", "smallest")


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """The origin of the first NaN or infinity.

    Attributes:
        site: The equation that made it; ``None`` if an argument already had it.
        argument: The path of that argument, otherwise empty.
        run: How often the equation had run before, as in a loop.
        device: Index along each mesh axis of the first device that made it; empty outside of maps.
        operands: Ranges of the equation's floating operands.
        made: Range of its result, or of the argument.
        producers: The equations that made its operands, the last first.
        results: Paths of the results that it reached.
        loss_scales: Loss scales among the arguments, by path.

    Example:
        >>> found = jmp.analysis.first_nonfinite(lambda x: jnp.sum(1 / x))(jnp.array([1.0, 0.0]))
        >>> found.site.primitive, found.made.inf
        ('div', 1)
        >>> jmp.analysis.first_nonfinite(jnp.sin)(jnp.array([jnp.nan])).argument
        '0'
    """

    site: Site | None
    argument: str
    run: int
    device: Mapping[Any, int]
    operands: tuple[Range, ...]
    made: Range
    producers: tuple[Site, ...]
    results: tuple[str, ...]
    loss_scales: Mapping[str, float]
    bundle: Bundle | None = dataclasses.field(default=None, repr=False, compare=False)

    def save(self, path: Any) -> None:
        """Writes the equation and its operands to a file, which ``replay`` runs in any process.

        Args:
            path: Path of the file, usually ending in ``.npz``.

        Raises:
            ValueError: If there is no equation, because an argument was not finite, or if it takes a random key.
            ModuleNotFoundError: Without the ``export`` extra.
        """
        if self.bundle is None:
            raise ValueError(
                f"There is no equation to save: argument {self.argument or '0'} was not finite already."
                if self.site is None
                else f"{self.site} takes a random key, which a file does not hold."
            )
        self.bundle.save(path, str(self))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """One finding, of kind ``nan`` or ``overflow``."""
        kind = "nan" if self.made.nan else "overflow"
        share = (self.made.nan + self.made.inf) / max(self.made.count, 1)
        where = (self.site.source, self.site.scope) if self.site else ("", self.argument)
        return (Finding(kind, str(self).splitlines()[0], *where, share=share),)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data: the equation, its result, its operands and their producers."""
        return {
            "site": str(self.site) if self.site else None,
            "argument": self.argument,
            "run": self.run,
            "device": {str(axis): index for axis, index in self.device.items()},
            "results": list(self.results),
            "loss_scales": dict(self.loss_scales),
            "arrays": [
                {"role": role, **{name: getattr(found, name) for name in _FIGURES}}
                for role, found in (("made", self.made), *(("took", one) for one in self.operands))
            ],
            "producers": [{"before": str(site)} for site in self.producers],
        }

    def __str__(self) -> str:
        kind = "NaN" if self.made.nan else "infinity"
        if self.site is None:
            lines = [f"Argument {self.argument or '0'} has a {kind} already: {_described(self.made)}."]
        else:
            again = f", run {self.run} (from 0)" if self.run else ""
            where = f" on device {dict(self.device)}" if self.device else ""
            lines = [f"{self.site} made the first {kind}{again}{where}: {_described(self.made)}."]
        lines += [f"  It took {_described(operand)}." for operand in self.operands]
        lines += [f"  Before it: {site}" for site in self.producers]
        lines += [f"  The loss scale {path or 'among the arguments'} is {x:g}." for path, x in self.loss_scales.items()]
        return "\n".join([*lines, f"  Results that it reached: {', '.join(filter(None, self.results)) or 'all'}."])


def _described(found: Range) -> str:
    counts = [f"{n} {name}" for name, n in (("NaN", found.nan), ("infinite", found.inf), ("zero", found.zero)) if n]
    others = [f"magnitudes from {found.smallest:.3g} to {found.largest:.3g}"] if found.largest else []
    return ", ".join([f"{found.count} numbers", *counts, *others])


def first_nonfinite(fun: Callable[..., Any]) -> Callable[..., NonFinite | None]:
    """Finds the equation that made the first NaN or infinity that reaches a result of a function.

    It searches loops, branches, recomputation, custom derivatives and ``shard_map``, inside autocast too. An infinity
    that reaches no result does not count, such as a mask of minus infinity under a softmax, or a logarithm of zero that
    ``jnp.where`` discards. Pass the gradient function, or the whole step, to search the backward pass.

    The function runs equation by equation, up to three times; only loops, branches and maps are compiled.

    Args:
        fun: The function.

    Returns:
        A function with the arguments of ``fun`` that returns a ``NonFinite``, or ``None`` if all results are finite.

    Raises:
        InvalidAnalysisError: When called, if the arguments are traced, as inside ``jax.jit``.
        InvalidFunctionError: If ``fun`` cannot be called, or takes an NNX module.

    Example:
        >>> def loss(x):
        ...     mask = jnp.where(x > 0, x, -jnp.inf)  # reaches no result
        ...     return jnp.sum(jax.nn.softmax(mask)) + jnp.sum(jnp.log(x - 1))
        >>> found = jmp.analysis.first_nonfinite(loss)(jnp.array([1.0, 2.0]))
        >>> found.site.primitive, found.made.inf, found.operands[0].zero
        ('log', 1, 1)

    References:
        ``jax_debug_nans`` runs equation by equation and stops at any NaN; Hugging Face's ``DebugUnderflowOverflow``.
    """
    check_function(fun, "first_nonfinite")

    @functools.wraps(fun)
    def find(*args: Any, **kwargs: Any) -> NonFinite | None:
        call = traced_on_host(fun, args, kwargs, "first_nonfinite")
        steps = steps_of(call.jaxpr)
        codes = codes_of_results(call.jaxpr, steps, call.arrays)
        first = min(codes, default=int(NEVER))
        if first == NEVER:
            return None
        results = tuple(path for path, code in zip(_paths(call, codes), codes, strict=True) if code != NEVER)
        scales = {path: float(np.max(scale.loss_scale)) for path, scale in nodes((args, kwargs), is_loss_scale)}
        time = first - WRITTEN if first >= WRITTEN - len(call.arrays) else first
        found = _argument(call, args, kwargs, time) if time < 0 else _equation(call, steps, time)
        return dataclasses.replace(found, results=results, loss_scales=scales)

    return find


def _paths(call: Traced, results: Sequence[Any]) -> list[str]:
    """Returns the paths of the results of a call."""
    tree = call.output([_Marked() for _ in results])
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, _Marked))
    return [path_string(path) for path, leaf in pairs if isinstance(leaf, _Marked)]


class _Marked:
    """Stands for a result."""


def _argument(call: Traced, args: Any, kwargs: Any, time: int) -> NonFinite:
    array = call.arrays[time + len(call.arrays)]
    leaves = jax.tree_util.tree_leaves_with_path((args, kwargs) if kwargs else args)
    path = next((path_string(path) for path, leaf in leaves if leaf is array), "")
    return NonFinite(None, path, 0, {}, (), _range(array), (), (), {})


def _equation(call: Traced, steps: Sequence[Step], time: int) -> NonFinite:
    step = step_at(call.jaxpr, steps, call.arrays, time)
    capture = captured(call.jaxpr, steps, call.arrays, step, time)
    operands = tuple(map(_range, filter(_has_range, capture.operands)))
    made = max(map(_range, filter(_has_range, capture.results)), key=lambda one: one.nan + one.inf)
    device = {axis: int(index) for axis, index in capture.device.items()}
    is_whole = len(capture.operands) == len(step.eqn.invars)
    bundle = Bundle(step.eqn, tuple(capture.operands)) if is_whole else None
    about = (step.site, "", int(capture.runs), device, operands, made, _producers(steps, step))
    return NonFinite(*about, (), {}, bundle)


def _has_range(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.inexact))


def _range(array: Any) -> Range:
    """Counts an array; for a complex one, the real and imaginary parts."""
    is_complex = jnp.issubdtype(array.dtype, jnp.complexfloating)
    return range_of(tally(jnp.stack([array.real, array.imag]) if is_complex else array))


def _producers(steps: Sequence[Step], wanted: Step) -> tuple[Site, ...]:
    """Returns the producers of a step's operands, and of their operands, within its program."""
    before = way_to(steps, wanted.site.number)[-1]
    makers = {v: step for step in before for v in step.eqn.outvars}
    found: dict[int, Site] = {}
    front = [wanted]
    while front and len(found) < _PRODUCERS:
        step = front.pop(0)
        for v in step.eqn.invars:
            maker = None if is_literal(v) else makers.get(v)
            if maker and maker.site.number not in found:
                inside = [step.site for step in flat([maker]) if not step.bodies]
                found |= {site.number: site for site in inside or [maker.site]}
                front.append(maker)
    return tuple(found[index] for index in sorted(found, reverse=True)[:_PRODUCERS])
