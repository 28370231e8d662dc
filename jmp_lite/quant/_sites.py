"""Finds matmuls of an activation and a weight without other uses in a program, to inspect the activation."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import Equation, Jaxpr, as_traced, bind, is_literal, program
from jmp_lite._dtypes import FLOAT32
from jmp_lite._tree import path_string
from jmp_lite.autocast._api import Traced, is_traced, trace
from jmp_lite.autocast._programs import PROGRAMS, programs_of, rebuilt
from jmp_lite.errors import InvalidRecipeError
from jmp_lite.quant._axes import PRODUCTS, Search, Sources, whole

_PRODUCTS = frozenset({"dot_general", "ragged_dot_general"})

#: What a weight goes through on the way to its matmuls while each number stays in its channel.
_MOVES = frozenset(
    {
        *("convert_element_type", "copy", "transpose", "reshape", "squeeze", "broadcast_in_dim"),
        *("slice", "dynamic_slice", "sharding_constraint", "name"),
    }
)


class Site(NamedTuple):
    """A matmul of an activation and a weight."""

    weight: str
    """Its path among the parameters."""
    shape: tuple[int, ...]
    """Of the weight."""
    order: tuple[int, ...]
    """Axes of the weight, in the order in which the activation has them."""
    side: int
    """Of the activation among the operands."""
    axes: tuple[int, ...]
    """Axes of the activation that are added up over, as the matmul lists them."""

    @property
    def contracted(self) -> tuple[int, ...]:
        """Axes of the weight, from the first on."""
        return tuple(sorted(self.order))

    def rows(self, x: Any) -> Any:
        """The activation as ``float32[rows, channels]``, channels as the weight has them."""
        last = jnp.moveaxis(x, self.axes, range(-len(self.axes), 0))
        kept = last.shape[: x.ndim - len(self.axes)]
        apart = last.reshape(*kept, *(self.shape[axis] for axis in self.order))
        ascending = [len(kept) + self.order.index(axis) for axis in self.contracted]
        channels = math.prod(self.shape[axis] for axis in self.order)
        return apart.transpose(*range(len(kept)), *ascending).reshape(math.prod(kept), channels).astype(FLOAT32)

    def in_weight(self, channels: Any) -> Any:
        """Numbers of channels as an array that broadcasts with the weight."""
        return _placed(channels, self.contracted, self.shape)

    def in_activation(self, in_weight: Any, shape: tuple[int, ...]) -> Any:
        """The same numbers as an array that broadcasts with an activation."""
        others = [axis for axis in range(len(self.shape)) if axis not in self.order]
        return _placed(np.transpose(in_weight, [*self.order, *others]), self.axes, shape)


def _placed(channels: Any, axes: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """Reshapes to these axes of an array, in this order, with size 1 along all others."""
    listed = np.reshape(channels, [*(shape[axis] for axis in axes), *[1] * (len(shape) - len(axes))])
    return np.moveaxis(listed, range(len(axes)), axes)


#: Where a matmul stands: the equations that hold it, and its own, by their identity.
Path = tuple[int, ...]
Look = Callable[[Site, Any], Any]


class _Sites(Search):
    """Finds the matmuls of weights without other uses."""

    def __init__(self, paths: Sequence[str], shapes: Mapping[int, tuple[int, ...]]) -> None:
        super().__init__({})
        self.paths, self.shapes = paths, shapes
        self.path: Path = ()
        self.sites: dict[Path, Site] = {}
        self.spoiled: set[str] = set()

    def equation(self, eqn: Equation, operands: Sequence[Sources | None]) -> list[Sources | None]:
        name, outer = eqn.primitive.name, self.path
        is_followed = PROGRAMS[name].rebuild is not None if name in PROGRAMS else _moves(eqn)
        sites = [self._site(eqn, operands, side) for side in (0, 1)] if name in _PRODUCTS else []
        self.path += (id(eqn),)
        self.sites.update((self.path, site) for site in sites if site)
        if is_followed:
            results = super().equation(eqn, operands)
        else:
            results = [None] * len(eqn.outvars)
            self.lost(() if any(sites) else operands)
        self.path = outer
        return results

    def _site(self, eqn: Equation, operands: Sequence[Sources | None], side: int) -> Site | None:
        """The site of a matmul, if the operand on the other side is a whole weight."""
        axes, (sources, others) = PRODUCTS[eqn.primitive.name](eqn), (operands[1 - side], operands[side])
        if others or not sources or len(sources) != 1:
            return None
        [(number, dims)] = sources.items()
        shape = self.shapes[number]
        atoms = [atom for axis in axes[1 - side] for atom in dims[axis] if atom.size != 1]
        is_whole = all(len(atom.axes) == 1 and atom.size == shape[min(atom.axes)] for atom in atoms)
        order = tuple(min(atom.axes) for atom in atoms) if is_whole else ()
        if not order or len({*order}) < len(order):
            return None
        return Site(self.paths[number], shape, order, side, tuple(axes[side]))

    def lost(self, results: Sequence[Sources | None]) -> None:
        """Records weights whose channels can no longer be followed."""
        self.spoiled.update(self.paths[number] for sources in results for number in sources or {})


def _moves(eqn: Equation) -> bool:
    is_floating = jnp.issubdtype(getattr(eqn.outvars[0].aval, "dtype", np.void), jnp.floating)
    return eqn.primitive.name in _MOVES and bool(is_floating)


class Call(NamedTuple):
    """A call of a function, and the matmuls of weights and activations in its program."""

    traced: Traced
    places: Mapping[Path, Site | None]
    """The matmuls whose weights have no other use, and ``None`` for the equations that hold such matmuls."""
    contracted: Mapping[str, tuple[int, ...]]
    """The axes that each of these weights is added up over."""
    refused: frozenset[str]
    """Weights that have other uses, or are added up over several axes."""

    def run(self, look: Look) -> Any:
        """Calls the function with each such activation replaced by the result of ``look``."""
        return self.traced.output(_evaluated(self.traced.jaxpr, self.traced.arrays, self.places, look))

    def watch(self, measured: Callable[[Any], tuple[Any, ...]], note: Callable[..., None]) -> None:
        """Calls the function, and ``note`` with what is measured of the rows of each activation."""

        def look(site: Site, x: Any) -> Any:
            jax.debug.callback(functools.partial(note, site), *measured(site.rows(x)))
            return x

        self.run(look)
        jax.effects_barrier()


def call(fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Traces a call of a function of parameters and other arguments."""
    traced = trace(fun, args, kwargs)
    leaves = jax.tree_util.tree_leaves_with_path(args[0])
    numbered = [(path_string(path), leaf) for path, leaf in leaves if is_traced(leaf)]
    shapes = {n: np.shape(leaf) for n, (_, leaf) in enumerate(numbered) if _is_weight(leaf)}
    inputs: list[Sources | None] = [{n: whole(shapes[n])} if n in shapes else None for n in range(len(numbered))]
    inputs += [None] * (len(traced.arrays) - len(inputs))
    search = _Sites([path for path, _ in numbered], shapes)
    search.lost(search.run(traced.jaxpr, inputs))
    axes: dict[str, set[tuple[int, ...]]] = {}
    for site in search.sites.values():
        axes.setdefault(site.weight, set()).add(site.contracted)
    refused = search.spoiled | {weight for weight, found in axes.items() if len(found) > 1}
    contracted = {weight: min(found) for weight, found in axes.items() if weight not in refused}
    sites = {path: site for path, site in search.sites.items() if site.weight in contracted}
    holders = {path[:depth] for path in sites for depth in range(1, len(path))}
    return Call(traced, {**dict.fromkeys(holders), **sites}, contracted, frozenset(refused))


def _is_weight(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating)) and math.prod(np.shape(leaf)) > 0


def not_finite(shape: tuple[int, ...]) -> InvalidRecipeError:
    """The error for a non-finite activation, by the shape of its weight."""
    return InvalidRecipeError(
        f"An activation on a weight of shape {shape} is not finite. Use data that the function computes finite numbers "
        "of."
    )


def _evaluated(
    jaxpr: Jaxpr, arrays: Sequence[Any], places: Mapping[Path, Site | None], look: Look, path: Path = ()
) -> list[Any]:
    inner, consts = program(jaxpr)
    held = dict(zip(inner.constvars, consts, strict=True)) | dict(zip(inner.invars, arrays, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if is_literal(atom) else held[atom]

    for eqn in inner.eqns:
        operands, place = list(map(read, eqn.invars)), (*path, id(eqn))
        site = places.get(place)
        with as_traced(eqn):
            if site:
                operands[site.side] = look(site, operands[site.side])
            if place in places and not site:
                bodies = [_rewritten(body.jaxpr, places, look, place) for body in programs_of(eqn).bodies]
                results = rebuilt(eqn, operands, bodies)
            else:
                results = bind(eqn, operands, eqn.params)
        held.update(zip(eqn.outvars, results, strict=True))
    return list(map(read, inner.outvars))


def _rewritten(jaxpr: Jaxpr, places: Mapping[Path, Site | None], look: Look, path: Path) -> Jaxpr:
    avals = [v.aval for v in program(jaxpr)[0].invars]
    return jax.make_jaxpr(lambda *arrays: _evaluated(jaxpr, arrays, places, look, path))(*avals)
