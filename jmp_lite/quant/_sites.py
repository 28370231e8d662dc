"""Products of an activation and a weight that has no other use: found in the program, for a look at the activation."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import Equation, Jaxpr, as_traced, bind, is_literal, program
from jmp_lite._dtypes import FLOAT32
from jmp_lite.autocast._api import is_traced, trace
from jmp_lite.autocast._programs import PROGRAMS, programs_of, rebuilt
from jmp_lite.quant._axes import PRODUCTS, Search, Sources, whole

_PRODUCTS = frozenset({"dot_general", "ragged_dot_general"})

#: What a weight goes through on the way to its products while each number stays in its channel.
_MOVES = frozenset(
    {
        *("convert_element_type", "copy", "transpose", "reshape", "squeeze", "broadcast_in_dim"),
        *("slice", "dynamic_slice", "sharding_constraint", "name"),
    }
)


class Site(NamedTuple):
    """A product of an activation and a weight."""

    number: int
    """Of the weight among the leaves of the parameters."""
    shape: tuple[int, ...]
    """Of the weight."""
    order: tuple[int, ...]
    """Axes of the weight, in the order in which the activation has them."""
    side: int
    """Of the activation among the operands."""
    axes: tuple[int, ...]
    """Axes of the activation that are added up over, as the product lists them."""

    def rows(self, x: Any) -> Any:
        """The activation as ``float32[rows, channels]``, channels in the order of ``order``."""
        n = math.prod(self.shape[axis] for axis in self.order)
        return jnp.moveaxis(x, self.axes, range(-len(self.axes), 0)).reshape(-1, n).astype(FLOAT32)

    def in_weight(self, channels: Any) -> Any:
        """Numbers of channels as an array that broadcasts with the weight."""
        return _placed(channels, self.order, self.shape)

    def in_activation(self, in_weight: Any, shape: tuple[int, ...]) -> Any:
        """The same numbers as an array that broadcasts with an activation."""
        others = [axis for axis in range(len(self.shape)) if axis not in self.order]
        return _placed(np.transpose(in_weight, [*self.order, *others]), self.axes, shape)


def _placed(channels: Any, axes: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """Reshapes to these axes of an array, in this order, with the size 1 along all others."""
    listed = np.reshape(channels, [*(shape[axis] for axis in axes), *[1] * (len(shape) - len(axes))])
    return np.moveaxis(listed, range(len(axes)), axes)


#: Where a product stands: the equations that hold it, and its own, by their identity.
Path = tuple[int, ...]
Look = Callable[[Site, Any], Any]


class _Sites(Search):
    """Finds the products of weights that do nothing else."""

    def __init__(self, shapes: Mapping[int, tuple[int, ...]]) -> None:
        super().__init__({})
        self.shapes = shapes
        self.path: Path = ()
        self.sites: dict[Path, Site] = {}
        self.spoiled: set[int] = set()

    def equation(self, eqn: Equation, operands: Sequence[Sources | None]) -> list[Sources | None]:
        name, outer = eqn.primitive.name, self.path
        is_followed = PROGRAMS[name].rebuild is not None if name in PROGRAMS else name in _MOVES
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
        """What the product is, if the operand on the other side is a weight as a whole."""
        axes, (sources, others) = PRODUCTS[eqn.primitive.name](eqn), (operands[1 - side], operands[side])
        if others is not None or not sources or len(sources) != 1:
            return None
        [(number, dims)] = sources.items()
        shape = self.shapes[number]
        atoms = [atom for axis in axes[1 - side] for atom in dims[axis] if atom.size != 1]
        is_whole = all(len(atom.axes) == 1 and atom.size == shape[min(atom.axes)] for atom in atoms)
        order = tuple(min(atom.axes) for atom in atoms) if is_whole else ()
        return Site(number, shape, order, side, tuple(axes[side])) if len({*order}) == len(order) > 0 else None

    def lost(self, results: Sequence[Sources | None]) -> None:
        """Notes weights that go where their channels are not followed."""
        self.spoiled.update(number for sources in results for number in sources or {})

    def agreed(self) -> dict[Path, Site]:
        """The products whose weights have no other use."""
        axes: dict[int, set[frozenset[int]]] = {}
        for site in self.sites.values():
            axes.setdefault(site.number, set()).add(frozenset(site.order))
        alike = {number for number, sets in axes.items() if len(sets) == 1} - self.spoiled
        return {path: site for path, site in self.sites.items() if site.number in alike}


def call_with(fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], look: Look) -> Any:
    """Calls a function of parameters and others with what ``look`` returns in the place of each such activation."""
    traced = trace(fun, args, kwargs)
    numbered = [(number, leaf) for number, leaf in enumerate(jax.tree.leaves(args[0])) if is_traced(leaf)]
    shapes = {number: np.shape(leaf) for number, leaf in numbered if jnp.issubdtype(leaf.dtype, jnp.floating)}
    inputs: list[Sources | None] = [{n: whole(shapes[n])} if n in shapes else None for n, _ in numbered]
    inputs += [None] * (len(traced.arrays) - len(inputs))
    sites = _Sites(shapes)
    sites.lost(sites.run(traced.jaxpr, inputs))
    return traced.output(_evaluated(traced.jaxpr, traced.arrays, sites.agreed(), look))


def _evaluated(
    jaxpr: Jaxpr, arrays: Sequence[Any], sites: Mapping[Path, Site], look: Look, path: Path = ()
) -> list[Any]:
    inner, consts = program(jaxpr)
    held = dict(zip(inner.constvars, consts, strict=True)) | dict(zip(inner.invars, arrays, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if is_literal(atom) else held[atom]

    for eqn in inner.eqns:
        operands, place = list(map(read, eqn.invars)), (*path, id(eqn))
        with as_traced(eqn):
            if place in sites:
                site = sites[place]
                operands[site.side] = look(site, operands[site.side])
            if any(other[: len(place)] == place and other != place for other in sites):
                bodies = [_rewritten(body.jaxpr, sites, look, place) for body in programs_of(eqn).bodies]
                results = rebuilt(eqn, operands, bodies)
            else:
                results = bind(eqn, operands, eqn.params)
        held.update(zip(eqn.outvars, results, strict=True))
    return list(map(read, inner.outvars))


def _rewritten(jaxpr: Jaxpr, sites: Mapping[Path, Site], look: Look, path: Path) -> Jaxpr:
    avals = [v.aval for v in program(jaxpr)[0].invars]
    return jax.make_jaxpr(lambda *arrays: _evaluated(jaxpr, arrays, sites, look, path))(*avals)
