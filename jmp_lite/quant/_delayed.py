"""Delayed scaling: scales made of the largest magnitudes of earlier steps, held by the caller as a pytree.

Every product of a recipe with a ``history`` leaves a place for one in the program (``_history``). Here a function is
traced, and evaluated with an array in each of these places. Gradients with respect to these arrays are what was seen in
this step: derivatives are how numbers leave a backward pass.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jmp_lite._compat import Equation, Jaxpr, as_traced, bind, is_literal, program, scan_counts, scope_names
from jmp_lite._dtypes import FLOAT32
from jmp_lite._functions import check_function
from jmp_lite._tree import combine, describe, is_inexact, partition
from jmp_lite.autocast._api import is_traced, trace
from jmp_lite.autocast._programs import PROGRAMS
from jmp_lite.errors import InvalidRecipeError
from jmp_lite.quant._history import PLACEHOLDER, Histories
from jmp_lite.quant._operands import amax_of_all
from jmp_lite.scaling._in_state import find_loss_scale
from jmp_lite.scaling._loss_scale import NoOpLossScale

#: Largest magnitudes of earlier steps, ``float32[3, steps]`` for each product: left, right, cotangent; latest first.
AmaxHistories = dict[str, jax.Array]
#: Where an equation stands: its number, and for those inside of others the number of the program there, and so on.
Position = tuple[int, ...]

#: Kinds of equations whose programs are searched: those that are evaluated here.
_KINDS = frozenset({"call", "branch", "loop"})


def delayed(fun: Callable[..., Any]) -> "Delayed":
    """Gives a function whose products have recipes with a ``history`` these histories as its first argument.

    The function is any that has such products in it: through ``autocast(..., dot=FP8_DELAYED)``, through layers made
    with ``dot_general=FP8_DELAYED``, or called by hand. Take the gradient with respect to the histories along with the
    others, and give it to ``update_histories``:

    A product inside a loop has one history for all iterations. Products inside of functions with derivative rules of
    their own, and of a ``shard_map`` or ``pmap`` that is called in ``fun``, look at their own numbers in every step
    (call ``delayed`` inside of these, with ``axis_name`` in the recipe, to have the devices agree).

    Args:
        fun: What ``jax.jit`` takes.

    Returns:
        A function of ``(histories, *args, **kwargs)`` with the method ``init``.

    Raises:
        InvalidFunctionError: If ``fun`` is no function.

    Example:
        >>> def loss(w, x):
        ...     return jnp.sum(x @ w)
        >>> loss = jmp.quant.delayed(jmp.autocast(loss, "mixed_bfloat16", dot=jmp.quant.FP8_DELAYED))
        >>> w, x = jnp.ones((8, 3)), jnp.full((2, 8), 0.5)
        >>> histories = loss.init(w, x)
        >>> jax.tree.map(jnp.shape, histories)
        {'dot': (3, 1024)}
        >>> for _ in range(2):
        ...     observed, grad = jax.grad(loss, argnums=(0, 1))(histories, w, x)
        ...     histories = jmp.quant.update_histories(histories, observed)
        >>> print(histories["dot"][:, :3])  # of x, of w, of the gradient
        [[0.5 0.5 0.5]
         [1.  1.  1. ]
         [1.  1.  1. ]]

    References:
        Delayed scaling of NVIDIA TransformerEngine; Micikevicius et al., "FP8 Formats for Deep Learning",
        arXiv:2209.05433.
    """
    check_function(fun, "delayed")
    return Delayed(fun)


@dataclasses.dataclass(frozen=True)
class Delayed:
    """What ``delayed`` returns: a function of amax histories and of what the wrapped function takes."""

    fun: Callable[..., Any]

    def init(self, *args: Any, loss_scale: Any = None, **kwargs: Any) -> AmaxHistories:
        """Makes histories that hold what is seen in one step with these arguments; nothing else is done.

        The first scalar that the function returns is taken for the loss; if there is none, the sum of all it returns.

        Args:
            *args: Arguments of the function. For shapes alone, ``jax.eval_shape(loss.init, *args)`` will do: histories
                of zeros are empty, and the first step has scales of 1.
            loss_scale: A loss scale, or a state that holds one, if gradients will be those of a scaled loss.
            **kwargs: Keyword arguments of the function.
        """
        scale = NoOpLossScale() if loss_scale is None else find_loss_scale(loss_scale)[1]
        traced = trace(self.fun, args, kwargs)
        sites = _sites(traced.jaxpr)
        empty = {name: jnp.zeros((3, steps), FLOAT32) for name, steps in sites.values()}

        def total(histories: AmaxHistories) -> jax.Array:
            filled = {at: Histories(histories[name], jnp.array(False)) for at, (name, _) in sites.items()}
            results, _ = _Evaluation(filled).run(traced.jaxpr, traced.arrays)
            numbers = [jnp.real(x).astype(FLOAT32) for x in results if is_inexact(x)]
            losses = [x for x in numbers if x.ndim == 0][:1] or numbers
            return scale.scale(sum(map(jnp.sum, losses), start=jnp.zeros((), FLOAT32)))

        return update_histories(empty, jax.grad(total)(empty))

    def __call__(self, histories: AmaxHistories, *args: Any, **kwargs: Any) -> Any:
        """Calls the function with scales from these histories.

        Raises:
            InvalidRecipeError: If the histories are not those of the products that the function has.
        """
        traced = trace(self.fun, args, kwargs)
        sites = _sites(traced.jaxpr)
        _check(histories, dict(sites.values()))
        filled = {at: Histories(histories[name], np.bool_(True)) for at, (name, _) in sites.items()}
        return traced.output(_Evaluation(filled).run(traced.jaxpr, traced.arrays)[0])


def update_histories(histories: AmaxHistories, observed: AmaxHistories) -> AmaxHistories:
    """Adds what was seen in a step to the histories, and forgets the oldest.

    What is not finite does not enter, nor what was not seen, such as in a branch not taken: the latest is repeated.

    Args:
        histories: What the step was taken with.
        observed: The gradient with respect to these. A product that ran several times, in a loop, has seen at most this
            much: the sum over its runs.

    Returns:
        New histories.

    Example:
        >>> histories = {"dot": jnp.zeros((3, 4))}
        >>> print(jmp.quant.update_histories(histories, {"dot": jnp.full((3, 4), 2.0)})["dot"][0])
        [2. 0. 0. 0.]
    """

    def update(history: Any, seen: Any) -> jax.Array:
        latest, seen = history[:, :1], seen[:, :1]
        return jnp.concatenate([jnp.where(jnp.isfinite(seen) & (seen > 0), seen, latest), history[:, :-1]], axis=1)

    updated: AmaxHistories = jax.tree.map(update, histories, observed)
    return updated


def calibrate(fun: Delayed, batches: Iterable[Sequence[Any]], **kwargs: Any) -> AmaxHistories:
    """Finds, for every product of a function, the largest magnitudes that its operands have on some data.

    Nothing is differentiated: loops of any kind will do, and count with the largest of their iterations.

    Args:
        fun: From ``delayed``; usually ``model.apply`` under ``autocast(..., dot=W8A8_STATIC)``.
        batches: Positional arguments of the function, such as ``(params, x)``, once per batch; what is no array must be
            hashable.
        **kwargs: Keyword arguments, the same for all batches.

    Returns:
        Histories to call the function with: ``functools.partial(fun, histories)`` is the calibrated model.

    Raises:
        InvalidRecipeError: If there are no batches.

    Example:
        >>> model = jmp.autocast(lambda w, x: x @ w, "mixed_bfloat16", dot=jmp.quant.W8A8_STATIC)
        >>> model = jmp.quant.delayed(model)
        >>> w, batches = jnp.ones((8, 3)), [jnp.full((1, 8), 0.5), jnp.full((1, 8), 2.0)]
        >>> histories = jmp.quant.calibrate(model, [(w, x) for x in batches])
        >>> print(histories["dot"][0])
        [2.]
        >>> print(model(histories, w, jnp.full((1, 8), 9.0)))  # more than was ever seen
        [[16. 16. 16.]]
    """
    found: AmaxHistories | None = None
    for args in batches:
        arrays, others, (treedef, chosen) = partition((tuple(args), kwargs), is_traced)
        seen = _observe(fun.fun, tuple(others), (treedef, tuple(chosen)), arrays)
        found = seen if found is None else jax.tree.map(jnp.maximum, found, seen)
    if found is None:
        raise InvalidRecipeError("calibrate was given no batches. Pass at least one tuple of arguments.")
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _observe(fun: Callable[..., Any], others: tuple[Any, ...], layout: Any, arrays: list[Any]) -> AmaxHistories:
    """Histories whose latest step is a call of the function, but for cotangents."""
    args, kwargs = combine(arrays, others, layout)
    traced = trace(fun, args, kwargs)
    sites = _sites(traced.jaxpr)
    empty = {at: jnp.zeros((3, steps), FLOAT32) for at, (_, steps) in sites.items()}
    filled = {at: Histories(history, jnp.array(False)) for at, history in empty.items()}
    _, seen = _Evaluation(filled, observes=True).run(traced.jaxpr, traced.arrays)
    return {name: empty[at].at[:2, 0].set(seen[at]) for at, (name, _) in sites.items()}


def _check(histories: Any, expected: Mapping[str, int]) -> None:
    is_dict = isinstance(histories, dict)
    shapes = {name: np.shape(x) for name, x in histories.items()} if is_dict else describe(histories)
    if shapes != {name: (3, steps) for name, steps in expected.items()}:
        wanted = ", ".join(f"{name!r}: float32[3, {steps}]" for name, steps in expected.items())
        raise InvalidRecipeError(
            f"The first argument must be the histories of the products of this function, {{{wanted}}}; got {shapes}. "
            "Make them with .init(*args)."
        )


# --- Places in a program --------------------------------------------------------------------------


def _sites(jaxpr: Jaxpr) -> dict[Position, tuple[str, int]]:
    """Finds the places for histories: their names, made of name scopes, and for how many steps."""
    found: dict[Position, tuple[str, int]] = {}
    used: dict[str, int] = {}
    for at, scope, steps in _search(jaxpr, "", ()):
        name = scope or "dot"
        used[name] = used.get(name, 0) + 1
        found[at] = (name if used[name] == 1 else f"{name}#{used[name]}", steps)
    return found


def _search(jaxpr: Jaxpr, scope: str, at: Position) -> Iterator[tuple[Position, str, int]]:
    for index, eqn in enumerate(program(jaxpr)[0].eqns):
        inner_scope = "/".join(filter(None, (scope, scope_names(eqn.source_info.name_stack))))
        if eqn.primitive.name == PLACEHOLDER:
            yield (*at, index), inner_scope, eqn.params["steps"]
        for number, inner in enumerate(_programs(eqn)):
            yield from _search(inner, inner_scope, (*at, index, number))


def _programs(eqn: Equation) -> list[Jaxpr]:
    row = PROGRAMS.get(eqn.primitive.name)
    return [body.jaxpr for body in row.programs(eqn).bodies] if row and row.kind in _KINDS else []


# --- Evaluation -----------------------------------------------------------------------------------

#: Largest magnitudes of the operands of products, ``float32[2]``, by where their histories stand.
Seen = dict[Position, jax.Array]
Evaluated = tuple[list[Any], Seen]


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """Evaluates a program with histories in their places; programs inside close over them."""

    filled: Mapping[Position, Histories]
    observes: bool = False
    """Whether to return what the operands of products are, besides the results."""

    def run(self, jaxpr: Jaxpr, arrays: Sequence[Any], at: Position = ()) -> Evaluated:
        inner, consts = program(jaxpr)
        values = dict(zip([*inner.constvars, *inner.invars], [*consts, *arrays], strict=True))
        places: dict[Any, Position] = {}
        seen: Seen = {}
        for index, eqn in enumerate(inner.eqns):
            operands = [v.val if is_literal(v) else values[v] for v in eqn.invars]
            for position, v in enumerate(eqn.invars):
                if self.observes and not is_literal(v) and v in places:
                    seen[places[v]] = jnp.stack([amax_of_all(x) for x in operands[position - 2 : position]])
            with as_traced(eqn):
                results, inside = self._equation(eqn, operands, (*at, index))
            if (*at, index) in self.filled:
                places[eqn.outvars[0]] = (*at, index)
            values.update(zip(eqn.outvars, results, strict=True))
            seen.update(inside)
        return [v.val if is_literal(v) else values[v] for v in inner.outvars], seen

    def _equation(self, eqn: Equation, operands: list[Any], at: Position) -> Evaluated:
        if at in self.filled:
            return list(self.filled[at]), {}
        nothing = {p: jnp.zeros(2, FLOAT32) for p in self.filled if p[: len(at)] == at}
        if not nothing:
            return bind(eqn, operands, eqn.params), {}
        nothing = nothing if self.observes else {}

        def function(jaxpr: Jaxpr, number: int) -> Callable[..., Evaluated]:
            def evaluated(*arrays: Any) -> Evaluated:
                results, seen = self.run(jaxpr, arrays, (*at, number))
                return results, {**nothing, **seen}

            return evaluated

        programs = [function(jaxpr, number) for number, jaxpr in enumerate(_programs(eqn))]
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return _scan(programs[0], operands, params)
        if name == "while":
            return _while(programs, operands, params, nothing)
        if name == "cond":
            return lax.switch(operands[0], programs, *operands[1:])  # type: ignore[no-any-return]
        if name in ("remat2", "checkpoint"):
            run = jax.checkpoint(programs[0], policy=params["policy"], prevent_cse=params["prevent_cse"])
            return run(*operands)  # type: ignore[no-any-return]
        return programs[0](*operands)


def _scan(body: Callable[..., Evaluated], operands: list[Any], params: dict[str, Any]) -> Evaluated:
    n_consts, n_carry = scan_counts(params)
    consts, carry, xs = operands[:n_consts], operands[n_consts:][:n_carry], operands[n_consts + n_carry :]

    def one(carry: list[Any], x: list[Any]) -> tuple[list[Any], tuple[list[Any], Seen]]:
        results, seen = body(*consts, *carry, *x)
        return results[:n_carry], (results[n_carry:], seen)

    settings = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, seen) = lax.scan(one, carry, xs, **settings)
    return [*carry, *ys], jax.tree.map(lambda x: jnp.max(x, axis=0, initial=0), seen)


def _while(
    programs: Sequence[Callable[..., Evaluated]], operands: list[Any], params: Mapping[str, Any], nothing: Seen
) -> Evaluated:
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    of_cond, of_body, start = operands[:n_cond], operands[n_cond:][:n_body], operands[n_cond + n_body :]

    def again(carry: Evaluated) -> Any:
        return programs[0](*of_cond, *carry[0])[0][0]

    def body(carry: Evaluated) -> Evaluated:
        results, seen = programs[1](*of_body, *carry[0])
        return results, jax.tree.map(jnp.maximum, carry[1], seen)

    return lax.while_loop(again, body, (start, nothing))
