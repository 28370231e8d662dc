"""Finds the contracted axes of each weight in the program.

The search follows a weight through casts, moves, and any other operation on weights only, until a matmul uses it. Each
axis on the way is a list of atoms: pieces of the weight's axes, which reshapes merge and split.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from jmp_lite._compat import Equation, Jaxpr, is_literal, program, scan_counts
from jmp_lite._functions import check_function
from jmp_lite.autocast._api import is_array_or_shape, trace
from jmp_lite.autocast._programs import Programs, programs_of
from jmp_lite.products._dimensions import dimensions

T = TypeVar("T")


class Atom(NamedTuple):
    """A piece of an axis: of which axes of the weight, and how many elements."""

    axes: frozenset[int]
    size: int


#: The axes of an array, each as atoms.
Dims = tuple[tuple[Atom, ...], ...]
#: What an array was made of, if it was made of weights alone: by number of the weight, its axes.
Sources = Mapping[int, Dims]


def contracted_axes(fun: Callable[..., Any]) -> Callable[..., Any]:
    """Finds the axes of each parameter that the matmuls of a function contract.

    It finds matmuls, expert matmuls (``ragged_dot``) and convolutions, inside loops, branches and custom derivative
    rules, even if weights are cast, transposed, reshaped, sliced, stacked, scaled or summed first. A lookup does not
    contract a weight; a weight that is looked up and multiplied, such as tied embeddings, counts as in its matmul. A
    weight in several matmuls is contracted over the axes of all of them.

    Args:
        fun: Function of parameters and other arguments, such as ``model.apply``.

    Returns:
        A function of the same arguments, which may be ``jax.ShapeDtypeStruct``. It computes nothing, and returns a tree
        like the first argument: for each array the numbers of these axes, or ``None`` if no matmul uses it. Pass it to
        ``quantize_tree(axes=)`` and ``optim.prune(nm=, axes=)``.

    Raises:
        InvalidFunctionError: If ``fun`` is not a function.

    Example:
        >>> def apply(params, x):
        ...     return jnp.einsum("bd,dhk->bhk", x, params["query"]) @ params["out"].T + params["bias"]
        >>> params = {"query": jnp.ones((4, 2, 3)), "out": jnp.ones((5, 3)), "bias": jnp.ones((1, 1, 5))}
        >>> jmp.quant.contracted_axes(apply)(params, jnp.ones((7, 4)))
        {'bias': None, 'out': (1,), 'query': (0,)}
    """
    check_function(fun, "contracted_axes")

    def find(params: T, *args: Any, **kwargs: Any) -> T:
        traced = trace(fun, (params, *args), kwargs, is_traced=is_array_or_shape)
        leaves, treedef = jax.tree.flatten(params)
        numbers = [number for number, leaf in enumerate(leaves) if is_array_or_shape(leaf)]
        inputs: list[Sources | None] = [{number: whole(leaves[number].shape)} for number in numbers]
        found: dict[int, set[int]] = {}
        inputs += [None] * (len(program(traced.jaxpr)[0].invars) - len(inputs))
        Search(found).run(traced.jaxpr, inputs)
        axes = [tuple(sorted(found[number])) if number in found else None for number in range(len(leaves))]
        result: T = jax.tree.unflatten(treedef, axes)
        return result

    return find


# --- Axes -----------------------------------------------------------------------------------------


def whole(shape: Sequence[int]) -> Dims:
    return tuple((Atom(frozenset({axis}), size),) for axis, size in enumerate(shape))


def _new(size: int) -> tuple[Atom, ...]:
    return (Atom(frozenset(), size),)


def _axes(dims: Sequence[Sequence[Atom]]) -> frozenset[int]:
    return frozenset[int]().union(*(atom.axes for dim in dims for atom in dim))


def _resized(dims: Dims, shape: Sequence[int]) -> Dims:
    """The same axes, of which some were cut or padded."""
    return tuple(
        dim if math.prod(atom.size for atom in dim) == size else (Atom(_axes([dim]), size),)
        for dim, size in zip(dims, shape, strict=True)
    )


def _merged(first: Dims, second: Dims) -> Dims:
    """The axes of an array that a weight entered on two ways, such as a weight less its mean."""
    return tuple(map(_both, first, second))


def _both(dim: tuple[Atom, ...], other: tuple[Atom, ...]) -> tuple[Atom, ...]:
    if dim == other or not _axes([other]):
        return dim
    return (Atom(_axes([dim, other]), math.prod(atom.size for atom in dim)),) if _axes([dim]) else other


def _reshaped(dims: Dims, shape: Sequence[int]) -> Dims:
    atoms = [atom for dim in dims for atom in dim if atom.size != 1]
    result = []
    for size in shape:
        missing, taken = size, []
        while missing > 1:
            axes, held = atoms.pop(0)
            piece = math.gcd(missing, held)
            if piece not in (missing, held):  # an axis of the result begins inside of one and ends inside of another
                return tuple((Atom(_axes(dims), size),) for size in shape)
            taken.append(Atom(axes, piece))
            atoms[:0] = [Atom(axes, held // piece)] if held > piece else []
            missing //= piece
        result.append(tuple(taken))
    return tuple(result)


# --- Moves: what becomes of the axes of one operand ---


def _without(dims: Dims, axes: Sequence[int]) -> Dims:
    return tuple(dim for axis, dim in enumerate(dims) if axis not in axes)


def _broadcast(dims: Dims, eqn: Equation) -> Dims:
    places, shape = eqn.params["broadcast_dimensions"], eqn.outvars[0].aval.shape
    result = list(map(_new, shape))
    for dim, place, size in zip(dims, places, eqn.invars[0].aval.shape, strict=True):
        if size == shape[place]:
            result[place] = dim
    return tuple(result)


def _stack(dims: Dims, eqn: Equation) -> Dims:
    axis = eqn.params["axis"]
    return (*dims[:axis], _new(len(eqn.invars)), *dims[axis:])


_MOVES: Mapping[str, Callable[[Dims, Equation], Dims]] = {
    "transpose": lambda dims, eqn: tuple(dims[axis] for axis in eqn.params["permutation"]),
    "reshape": lambda dims, eqn: _reshaped(dims, eqn.outvars[0].aval.shape),
    "squeeze": lambda dims, eqn: _without(dims, eqn.params["dimensions"]),
    "broadcast_in_dim": _broadcast,
    "stack": _stack,
    "unstack": lambda dims, eqn: _without(dims, [eqn.params["axis"]]),
}


# --- Matmuls: which axes of each operand are added up over ---


PRODUCTS: Mapping[str, Callable[[Equation], Sequence[Sequence[int]]]] = {
    "dot_general": lambda eqn: dimensions(eqn.params["dimension_numbers"]).contracted,
    "ragged_dot_general": lambda eqn: eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0],
    "conv_general_dilated": lambda eqn: ((), eqn.params["dimension_numbers"].rhs_spec[1:]),
}


# --- The search -----------------------------------------------------------------------------------


class Search:
    """Follows weights through programs, and records the axes that matmuls contract."""

    def __init__(self, found: dict[int, set[int]]) -> None:
        self.found = found

    def run(self, jaxpr: Jaxpr, inputs: Sequence[Sources | None]) -> list[Sources | None]:
        """Returns what the results of a program are made of."""
        inner, _ = program(jaxpr)
        held: dict[Any, Sources | None] = {v: {} for v in inner.constvars}
        held.update(zip(inner.invars, inputs, strict=True))

        def read(atom: Any) -> Sources | None:
            return {} if is_literal(atom) else held[atom]

        for eqn in inner.eqns:
            held.update(zip(eqn.outvars, self.equation(eqn, list(map(read, eqn.invars))), strict=True))
        return list(map(read, inner.outvars))

    def equation(self, eqn: Equation, operands: Sequence[Sources | None]) -> list[Sources | None]:
        name = eqn.primitive.name
        programs = programs_of(eqn)
        if programs.bodies:
            return self._inside(eqn, programs, operands)
        if name in PRODUCTS:
            for sources, axes in zip(operands, PRODUCTS[name](eqn), strict=False):
                for number, dims in (sources or {}).items():
                    self.found.setdefault(number, set()).update(_axes([dims[axis] for axis in axes]))
            return [None if None in operands else {}]
        indices = operands[1:] if name == "dynamic_slice" else ()
        if operands and None in operands[: len(operands) - len(indices)]:
            return [None] * len(eqn.outvars)
        return [self._moved(eqn, v.aval, operands) for v in eqn.outvars]

    def _moved(self, eqn: Equation, result: Any, operands: Sequence[Sources | None]) -> Sources | None:
        """What is made of weights alone; ``None`` where their axes are lost."""
        made: dict[int, Dims] = {}
        for v, sources in zip(eqn.invars, operands, strict=True):
            for number, dims in (sources or {}).items():
                if eqn.primitive.name in _MOVES:
                    moved = _MOVES[eqn.primitive.name](dims, eqn)
                elif eqn.primitive.name.startswith("reduce_") and "axes" in eqn.params:
                    moved = _without(dims, eqn.params["axes"])
                elif v.aval.ndim == getattr(result, "ndim", None):
                    moved = _resized(dims, result.shape)
                else:
                    return None
                made[number] = _merged(made[number], moved) if number in made else moved
        return made

    def _inside(self, eqn: Equation, programs: Programs, operands: Sequence[Sources | None]) -> list[Sources | None]:
        bodies, carried = programs.bodies, programs.carried
        stacked = range(sum(scan_counts(eqn.params)), len(operands)) if eqn.primitive.name == "scan" else ()
        results: list[list[Sources | None]] = []
        for body in bodies:
            invars = program(body.jaxpr)[0].invars
            self.lost([operands[at] for at in body.operands if at in carried])
            taken = [
                _entering(None if at in carried else operands[at], v.aval, is_stacked=at in stacked)
                for v, at in zip(invars, body.operands, strict=True)
            ]
            results.append(self.run(body.jaxpr, taken))
        if len(bodies) > 1 or carried or stacked or not bodies[0].results:
            for lost in results:
                self.lost(lost)
            return [None] * len(eqn.outvars)
        return results[0]

    def lost(self, results: Sequence[Sources | None]) -> None:
        """Is told of weights that are not followed any further."""


def _entering(sources: Sources | None, aval: Any, *, is_stacked: bool) -> Sources | None:
    """What an input of a program is made of: of a loop it is a slice, of a ``shard_map`` a part."""
    if sources is None:
        return None
    shape = getattr(aval, "shape", ())
    return {number: _resized(dims[1:] if is_stacked else dims, shape) for number, dims in sources.items()}
