"""The axes along which the devices of a map hold copies of the same numbers."""

from collections.abc import Sequence
from typing import Any

from jmp_lite._compat import Equation, Jaxpr, is_literal, manual_axes, program
from jmp_lite.analysis._sites import Step
from jmp_lite.autocast._programs import programs_of

Axes = frozenset[Any]
_NONE: Axes = frozenset()

#: Collectives that leave the same numbers on all devices along their axes.
_AGREE = frozenset({"psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant"})
#: What gives each device different data.
_DIFFER = frozenset({"axis_index", "reduce_scatter", "all_to_all", "ppermute"})


class Copies:
    """Finds for each step of a program, by number, the axes along which its operands and results are copies."""

    def __init__(self, jaxpr: Jaxpr, steps: Sequence[Step]) -> None:
        self.operands: dict[int, list[Axes]] = {}
        self.results: dict[int, list[Axes]] = {}
        self._run(jaxpr, steps, [_NONE] * len(program(jaxpr)[0].invars), _NONE)

    def _run(self, jaxpr: Jaxpr, steps: Sequence[Step], operands: Sequence[Axes], manual: Axes) -> list[Axes]:
        """Follows the axes along which values differ; ``manual`` are those of the maps around."""
        inner, _ = program(jaxpr)
        known: dict[Any, Axes] = dict(zip(inner.invars, operands, strict=True))

        def read(atoms: Sequence[Any]) -> list[Axes]:
            return [_NONE if is_literal(v) else known.get(v, _NONE) for v in atoms]

        for step in steps:
            taken = read(step.eqn.invars)
            made = (
                self._bodies(step, taken, manual) if step.bodies else [_made(step.eqn, taken)] * len(step.eqn.outvars)
            )
            self.operands[step.site.number] = [manual - axes for axes in taken]
            self.results[step.site.number] = [manual - axes for axes in made]
            known.update(zip(step.eqn.outvars, made, strict=True))
        return read(inner.outvars)

    def _bodies(self, step: Step, operands: list[Axes], manual: Axes) -> list[Axes]:
        programs, results = programs_of(step.eqn), [_NONE] * len(step.eqn.outvars)
        if step.site.primitive == "shard_map":
            return self._map(step, operands, manual)
        chosen = _NONE if programs.choice is None else operands[programs.choice]
        while True:
            for body, steps in zip(programs.bodies, step.bodies, strict=True):
                made = self._run(body.jaxpr, steps, [operands[i] for i in body.operands], manual)
                for index, axes in zip(body.results or (), made, strict=False):
                    results[index] |= axes | chosen
            grown = [
                axes | results[programs.carried[i]] if i in programs.carried else axes
                for i, axes in enumerate(operands)
            ]
            if grown == operands:
                return results
            operands = grown

    def _map(self, step: Step, operands: list[Axes], manual: Axes) -> list[Axes]:
        params, [body] = step.eqn.params, programs_of(step.eqn).bodies
        own: Axes = frozenset(manual_axes(params))
        inside = [axes | own & _named(spec) for axes, spec in zip(operands, params["in_specs"], strict=True)]
        made = self._run(body.jaxpr, step.bodies[0], inside, manual | own)
        return [axes - own for axes in made]


def _made(eqn: Equation, operands: Sequence[Axes]) -> Axes:
    axes = _NONE.union(*operands)
    own = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    own = frozenset(own if isinstance(own, (tuple, list, set, frozenset)) else [own])
    if eqn.primitive.name in _AGREE:
        return axes if eqn.params.get("axis_index_groups") else axes - own
    return axes | own if eqn.primitive.name in _DIFFER else axes


def _named(spec: Any) -> Axes:
    """Returns the mesh axes in a ``PartitionSpec``."""
    return frozenset(
        name for part in spec if part is not None for name in (part if isinstance(part, tuple) else (part,))
    )
