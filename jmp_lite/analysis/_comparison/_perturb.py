"""``perturb``: how much a loss and its gradient change when the operands of some matmuls change a little."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import bind
from jmp_lite._dtypes import is_floating
from jmp_lite._functions import check_function
from jmp_lite._rounding import counted_bits, key_at, step_key
from jmp_lite._text import table
from jmp_lite.analysis._comparison._groups import group_of, groups_of
from jmp_lite.analysis._evaluate import Analysis, Evaluator, State, Value
from jmp_lite.analysis._programs import differentiated
from jmp_lite.analysis._sites import Step, steps_of
from jmp_lite.autocast._ops import PRODUCTS
from jmp_lite.errors import InvalidAnalysisError


class Sensitivity(NamedTuple):
    """How much errors in the operands of matmuls matter.

    Attributes:
        loss: Relative change of the loss, divided by the relative change of the operands.
        gradient: Relative change of the gradient, in norm, divided by the relative change of the operands.

    Example:
        >>> w, x = jnp.ones((8, 4)), jnp.ones((2, 8))
        >>> sensitivity = jmp.analysis.perturb(lambda w, x: jnp.mean(jnp.square(x @ w)))(w, x)[""]
        >>> sensitivity.loss > 0 and sensitivity.gradient > 0
        True
    """

    loss: float
    gradient: float


@dataclasses.dataclass(frozen=True)
class Sensitivities(Mapping[str, Sensitivity]):
    """Sensitivities by the name scope of the matmuls, the largest first.

    Attributes:
        by_scope: The sensitivity of each scope.

    Example:
        >>> w, x = jnp.ones((8, 4)), jnp.ones((2, 8))
        >>> def loss(w, x):
        ...     with jax.named_scope("layer"):
        ...         return jnp.mean(jnp.square(x @ w))
        >>> list(jmp.analysis.perturb(loss)(w, x))
        ['layer']
    """

    by_scope: Mapping[str, Sensitivity]

    def __getitem__(self, scope: str) -> Sensitivity:
        return self.by_scope[scope]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_scope)

    def __len__(self) -> int:
        return len(self.by_scope)

    def table(self) -> str:
        """Returns the sensitivities as text."""
        rows = [(f"{s.gradient:.3g}", f"{s.loss:.3g}", scope or "(no scope)") for scope, s in self.items()]
        return table(("gradient", "loss", "products in"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers by name."""
        return {scope: one._asdict() for scope, one in self.items()}

    def __str__(self) -> str:
        return self.table()

    __repr__ = __str__


class _Perturbing(Analysis):
    """Changes the operands of the matmuls in one group; the state is the number of the group and a key."""

    def __init__(self, groups: Sequence[str], scale: float) -> None:
        self.groups = groups
        self.scale = scale

    def equation(
        self, step: Step, operands: list[Value], results: list[Any], state: State
    ) -> tuple[list[Value], State]:
        group = group_of(step.site, self.groups) if step.site.primitive in PRODUCTS else None
        if group is None:
            return list(map(Value, results)), state
        wanted, key = state
        size = jnp.where(wanted == self.groups.index(group), self.scale, 0)
        changed = [
            _changed(value.array, size, key_at(key, f"{step.site.number}/{side}")) if side < 2 else value.array
            for side, value in enumerate(operands)
        ]
        return list(map(Value, bind(step.eqn, changed, step.eqn.params))), state

    def left(self, before: State, after: State, axes: tuple[Any, ...]) -> State:
        del after, axes
        return before


def _changed(array: Any, size: Any, key: Any) -> Any:
    if not is_floating(array):
        return array
    sign = jnp.where(counted_bits(key, array.shape) & jnp.uint32(1) == 0, size, -size)
    return array * (1 + sign).astype(array.dtype)


def perturb(
    fun: Callable[..., Any], *, scale: float = 2.0**-8, depth: int | None = None
) -> Callable[..., Sensitivities]:
    """Measures how sensitive a loss and its gradient are to errors in the operands of matmuls, by name scope.

    It scales each element of the operands of the matmuls in a scope up or down at random by the same relative amount,
    forward and backward, and compares the loss and the gradient in the floating arrays of the first argument with
    the unperturbed ones. It needs no reference of higher precision, and one program serves all scopes: it is compiled
    once and runs once more for each scope.

    Args:
        fun: A loss: it returns one floating scalar.
        scale: Relative size of the change.
        depth: How many name scopes, from the outermost, to group matmuls by; ``None`` for all.

    Returns:
        A function with the arguments of ``fun`` that returns ``Sensitivities``.

    Raises:
        InvalidAnalysisError: If the scale is not positive, or the arguments are traced, as inside ``jax.jit``.
        InvalidFunctionError: If ``fun`` is not a loss of floating arrays that JAX can differentiate.

    Example:
        >>> def loss(w, x):
        ...     with jax.named_scope("scores"):
        ...         scores = x @ w
        ...     with jax.named_scope("difference"):
        ...         return jnp.sum(jnp.array([1.0, -0.999]) @ scores)
        >>> found = jmp.analysis.perturb(loss)(jnp.ones((8, 4)), jnp.ones((2, 8)))
        >>> sorted(found), found["difference"].loss > 100
        (['difference', 'scores'], True)

    References:
        MindStudio's msProbe perturbs inputs likewise in its check without a reference.
    """
    check_function(fun, "perturb")
    if not scale > 0:
        raise InvalidAnalysisError(f"scale must be positive, got {scale!r}. It is relative, such as 2**-8.")

    def perturbing(*args: Any, **kwargs: Any) -> Sensitivities:
        _, call = differentiated(fun, args, kwargs, "perturb")
        steps = steps_of(call.jaxpr)
        groups = groups_of(steps, depth)

        @jax.jit
        def run(group: Any, arrays: Sequence[Any]) -> list[Any]:
            state = (group, step_key(0, jnp.int32(0)))
            values, _ = Evaluator(_Perturbing(groups, scale)).run(call.jaxpr, steps, list(map(Value, arrays)), state)
            return [value.array for value in values]

        exact = run(jnp.int32(-1), call.arrays)
        found = {
            scope: _sensitivity(run(jnp.int32(number), call.arrays), exact, scale)
            for number, scope in enumerate(groups)
        }
        return Sensitivities(dict(sorted(found.items(), key=lambda pair: -pair[1].gradient)))

    return perturbing


def _sensitivity(found: Sequence[Any], exact: Sequence[Any], scale: float) -> Sensitivity:
    return Sensitivity(distance(found[:1], exact[:1]) / scale, distance(found[1:], exact[1:]) / scale)


def distance(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Returns the norm of a difference over the norm of the reference, over all arrays together."""
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(found, wanted, strict=True)]
    norm = np.sqrt(sum(np.sum(b**2) for _, b in pairs))
    with np.errstate(invalid="ignore"):  # of infinities, whose distance is NaN
        error = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs))
    return ratio(float(error), float(norm))


def ratio(part: float, whole: float, of_zeros: float = 0.0) -> float:
    """Returns a norm over another: infinite over zero, ``of_zeros`` if both are zero."""
    if whole:
        return part / whole
    return math.inf if part else of_zeros
