"""Evaluates a program with a dtype and a tag per value: the loop of ``jax.core.eval_jaxpr``, with a decision inside.

The program is a jaxpr. Every variable that is float32 there may be held in a compute dtype here; each equation runs as
``_decide`` says. ``_control_flow`` and ``_custom_rules`` handle equations that hold programs themselves and come back
here through ``retype``.
"""

import dataclasses
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import (
    Atom,
    Equation,
    Jaxpr,
    Var,
    as_traced,
    bind,
    is_literal,
    program,
    scope_names,
    with_weak_type,
)
from jmp_lite._dtypes import FLOAT32, DType
from jmp_lite._tree import cast
from jmp_lite.autocast import _regions
from jmp_lite.autocast._apply import apply
from jmp_lite.autocast._decide import decide, decide_activation
from jmp_lite.autocast._decision import Decision
from jmp_lite.autocast._demand import EITHER, HIGH, TESTED, Demands, Want, Wants, is_float32, joined
from jmp_lite.autocast._ops import PRODUCTS, OpClass, classify, is_activation
from jmp_lite.autocast._record import Record, as_count, records_of
from jmp_lite.autocast._requests import Requests
from jmp_lite.autocast._rules import Precision, Settings
from jmp_lite.autocast._values import INPUT, Known, Origin, Tag, Value, as_dtype, is_eligible

Handler = Callable[["Interpreter", "Call"], list[Value]]


class Retyped(NamedTuple):
    """A program traced again at other dtypes: the jaxpr, what is known of its results, and the decisions in it."""

    jaxpr: Jaxpr
    results: tuple[Known, ...]
    records: tuple[Record, ...]
    requests: Requests

    @property
    def dtypes(self) -> list[Any]:
        """The dtypes of the results; ``None`` for a result without one."""
        return [getattr(aval, "dtype", None) for aval in self.jaxpr.out_avals]


@dataclasses.dataclass(frozen=True)
class Call:
    """An equation that holds programs, with its operands as arrays, for its handler."""

    eqn: Equation
    operands: list[Value]
    scope: str
    wants: Wants

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the equation."""
        params: dict[str, Any] = self.eqn.params
        return params

    @property
    def arrays(self) -> list[Any]:
        """The operands as they are held."""
        return [value.array for value in self.operands]

    @property
    def originals(self) -> list[Any]:
        """The operands in their written dtypes."""
        pairs = zip(self.eqn.invars, self.arrays, strict=True)
        return [cast(array, FLOAT32) if is_eligible(v.aval) else array for v, array in pairs]

    def bind(self, arrays: Sequence[Any], **changed: Any) -> list[Any]:
        """Applies the primitive to other arrays, with some parameters changed."""
        return bind(self.eqn, arrays, {**self.params, **changed})


class Frame:
    """The variables of one program while it is evaluated."""

    def __init__(self, jaxpr: Jaxpr, operands: Sequence[Value], settings: Settings) -> None:
        self.jaxpr, consts = program(jaxpr)
        self.settings = settings
        self.values: dict[Var, Value] = {}
        self.casts: dict[tuple[Var, DType], Any] = {}
        for v, const in zip(self.jaxpr.constvars, consts, strict=True):
            self.values[v] = Value(const, Known(self._tag_of_constant(const), Origin.INPUT))
        self.values.update(zip(self.jaxpr.invars, operands, strict=True))
        results = {v for v in self.jaxpr.outvars if not is_literal(v)}
        last_use = {v: i for i, eqn in enumerate(self.jaxpr.eqns) for v in eqn.invars if not is_literal(v)}
        self.unused_after: dict[int, list[Var]] = {}
        for v, index in last_use.items():
            if v not in results:
                self.unused_after.setdefault(index, []).append(v)

    def _tag_of_constant(self, const: Any) -> Tag:
        """A number that a compute dtype cannot hold (a mask of -1e9 in float16) keeps its operation in float32."""
        if (
            not isinstance(const, (np.ndarray, np.generic, float))
            or np.result_type(const) != FLOAT32
            or np.size(const) == 0
        ):
            return Tag.NEUTRAL
        numbers = np.abs(np.asarray(const))
        largest = np.max(numbers, where=np.isfinite(numbers), initial=0)
        return Tag.NEUTRAL if self.settings.is_in_range(float(largest)) else Tag.HIGH

    def read(self, atom: Atom) -> Value:
        """Returns a variable as it is held, or the value of a literal."""
        if is_literal(atom):
            number = float(atom.val) if is_eligible(atom.aval) and not np.isnan(atom.val) else None
            return Value(atom.val, Known(self._tag_of_constant(atom.val), Origin.REPEATED, number))
        return self.values[atom]

    def array(self, atom: Atom, dtype: DType | None) -> Any:
        """Returns a variable cast to a dtype if it was float32 in the original program.

        Casts are made once, except for inputs: a weight used many times accumulates its gradient in float32.
        """
        if is_literal(atom):
            in_half = is_eligible(atom.aval) and dtype not in (None, FLOAT32)
            return as_dtype(atom.val, dtype) if in_half else atom.val
        held, known = self.values[atom]
        if dtype is None or not is_eligible(atom.aval) or held.dtype == dtype:
            return held
        if known.origin is Origin.INPUT:
            return cast(held, dtype)
        if (atom, dtype) not in self.casts:
            number = known.number
            self.casts[atom, dtype] = cast(held, dtype) if number is None else _full_like(held, number, dtype)
        return self.casts[atom, dtype]

    def weight_or_array(self, atom: Atom, dtype: DType | None) -> Any:
        """Returns a weight as it is held; anything else cast to a dtype."""
        is_weight = not is_literal(atom) and is_eligible(atom.aval) and self.values[atom].is_weight
        return self.values[atom].array if is_weight else self.array(atom, dtype)

    def write(self, eqn: Equation, values: Sequence[Value]) -> None:
        """Assigns the results of an equation."""
        self.values.update(zip(eqn.outvars, values, strict=True))

    def forget(self, index: int) -> None:
        """Drops variables that no later equation reads."""
        for v in self.unused_after.get(index, ()):
            del self.values[v]
            for dtype in (FLOAT32, *self.settings.dtypes):
                self.casts.pop((v, dtype), None)


class _Current(threading.local):
    """What the function that a thread evaluates has asked for."""

    def __init__(self, requests: Requests) -> None:
        self.requests = requests


class Interpreter:
    """Evaluates programs under fixed settings, and caches the programs that it retyped."""

    def __init__(self, settings: Settings, handlers: Mapping[str, Handler], *, keeps_records: bool = False) -> None:
        self.settings = settings
        self.handlers = handlers
        self.keeps_records = keeps_records
        self.records: list[Record] = []
        self.demands = Demands(settings.ops_by_name, self._is_low)
        self._current = _Current(self._no_requests())
        self._told: set[tuple[str, int]] = set()
        self._precisions: dict[tuple[str, str], Precision] = {}
        self._retyped: Any = weakref.WeakKeyDictionary()

    def run(self, jaxpr: Jaxpr, arrays: Sequence[Any]) -> list[Any]:
        """Evaluates a whole program and returns results in their written dtypes."""
        operands = [Value(array, INPUT) for array in arrays]
        results = program(jaxpr)[0].outvars
        outer, self._current.requests = self._current.requests, self._no_requests()
        try:
            values = self.evaluate(jaxpr, operands, scope="", wants=(HIGH,) * len(results))
            self._current.requests.warn(self._told)
        finally:
            self._current.requests = outer
        return [_restore(value.array, v.aval) for value, v in zip(values, results, strict=True)]

    def evaluate(self, jaxpr: Jaxpr, operands: Sequence[Value], scope: str, wants: Wants | None = None) -> list[Value]:
        """Evaluates a program: one decision per equation.

        Args:
            jaxpr: A program, closed or open.
            operands: Its inputs, as they are held.
            scope: Name scope that it is called in.
            wants: What the consumers of its results want; nothing in particular by default.
        """
        frame = Frame(jaxpr, operands, self.settings)
        demands = self.demands.of(frame.jaxpr, wants or (EITHER,) * len(frame.jaxpr.outvars), self._scope(scope))
        for index, eqn in enumerate(frame.jaxpr.eqns):
            with as_traced(eqn):
                frame.write(eqn, self._equation(frame, eqn, scope, tuple(demands.get(v, 0) for v in eqn.outvars)))
            frame.forget(index)
        return [frame.read(v) for v in frame.jaxpr.outvars]

    def retype(
        self,
        jaxpr: Jaxpr,
        operands: Sequence[Value],
        scope: str,
        wants: Wants | None = None,
        forced: tuple[DType | None, ...] | None = None,
    ) -> Retyped:
        """Traces a program again for operands as they are held; equal arguments return the same jaxpr.

        Args:
            jaxpr: A program, closed or open.
            operands: What it will be called with.
            scope: Name scope that it is called in.
            wants: What the consumers of its results want.
            forced: Dtypes that results must have; ``None`` for results that may have any.
        """
        inner, consts = program(jaxpr)
        scope = scope if self.keeps_records else self._scope(scope)
        dtypes = tuple(getattr(value.array, "dtype", None) for value in operands)
        known = tuple(value.known for value in operands)
        found = self._retyped.setdefault(jaxpr if consts else inner, {})
        key = (dtypes, known, scope, wants, forced)
        if key not in found:

            def evaluate(*arrays: Any) -> list[Value]:
                operands = list(map(Value, arrays, known))
                return self.evaluate(jaxpr, operands, scope, wants)

            avals = [_with_dtype(v.aval, dtype) for v, dtype in zip(inner.invars, dtypes, strict=True)]
            found[key] = self._trace(evaluate, avals, forced or (None,) * len(inner.outvars))
        retyped: Retyped = found[key]
        self._current.requests.include(retyped.requests)
        return retyped

    def _trace(self, evaluate: Callable[..., list[Value]], avals: Sequence[Any], forced: Sequence[Any]) -> Retyped:
        results: list[Known] = []

        def run(*arrays: Any) -> list[Any]:
            values = evaluate(*arrays)
            results[:] = [value.known for value in values]
            return [v.array if dtype is None else cast(v.array, dtype) for v, dtype in zip(values, forced, strict=True)]

        outer = self.records, self._current.requests
        self.records, self._current.requests = [], self._no_requests()
        try:
            return Retyped(jax.make_jaxpr(run)(*avals), tuple(results), tuple(self.records), self._current.requests)
        finally:
            self.records, self._current.requests = outer

    def _no_requests(self) -> Requests:
        return Requests(self.settings, is_explained=self.keeps_records)

    def _scope(self, scope: str) -> str:
        """Returns the part of a name scope that decisions depend on."""
        return scope if self.settings.depends_on_scope else _regions.innermost(scope) or ""

    def _is_low(self, scope: str, primitive: str) -> bool:
        precision = self.precision(scope, primitive)
        return precision.mode in ("auto", "low") and precision.dtype != FLOAT32

    def precision(self, scope: str, primitive: str) -> Precision:
        """Resolves the precision of a primitive in a name scope, once."""
        key = (scope, primitive if self.settings.rules else "")
        if key not in self._precisions:
            self._precisions[key] = self.settings.precision(scope, primitive)
        self._current.requests.resolved(scope, primitive)
        return self._precisions[key]

    def through(self, call: Call) -> tuple[list[Want], Wants]:
        """Returns the wants for the operands and results of an equation that holds programs."""
        return self.demands.through(call.eqn, call.wants, self._scope(call.scope))

    def is_search(self, call: Call) -> bool:
        """Whether a loop iterates until what matmuls make of its carries is good enough."""
        return self.demands.is_search(call.eqn, call.wants, self._scope(call.scope))

    def rounded(self, call: Call) -> list[Value]:
        """Returns the operands of a call, rounded where that loses nothing and no consumer inside wants float32.

        The residuals of the call and the gradient it returns are then held in the compute dtype.
        """
        wants, _ = self.through(call)
        dtype = self.precision(call.scope, call.eqn.primitive.name).dtype
        return [
            Value(cast(value.array, dtype), value.known._replace(tag=Tag.LOW))
            if value.tag is Tag.SOFT and not is_float32(want)
            else value
            for want, value in zip(wants, call.operands, strict=True)
        ]

    def results(self, retyped: Retyped, arrays: Sequence[Any], trips: int = 1) -> list[Value]:
        """Pairs the results of a retyped program with what is known of them, and keeps the record of its decisions."""
        self.records.extend(record._replace(trips=record.trips * as_count(trips)) for record in retyped.records)
        return list(map(Value, arrays, retyped.results))

    def _equation(self, frame: Frame, eqn: Equation, scope: str, wants: Wants) -> list[Value]:
        name = eqn.primitive.name
        scope = "/".join(filter(None, (scope, scope_names(eqn.source_info.name_stack))))
        precision = self.precision(scope, name)
        op, why = classify(eqn, self.settings.ops_by_name)
        operands = [frame.read(v) for v in eqn.invars]
        precision = precision.turned(operands) if name in PRODUCTS else precision
        takes_steps_again = name == "while" and any(value.known.origin is Origin.FOUND for value in operands)
        why = "takes the steps of a search again, and must take the same: as written" if takes_steps_again else why
        position = len(self.records)
        decision: Decision | None = None
        is_whole = precision.leaves_whole or takes_steps_again
        is_nested = op is OpClass.NESTED and name in self.handlers and not is_whole
        if is_nested and is_activation(eqn):
            decision = decide_activation(eqn, operands[0], precision, joined(wants))
        elif not is_nested:
            decision = decide(eqn, operands, (op, why), precision, wants)
        if decision is None:
            call = Call(eqn, [_as_array(v, value) for v, value in zip(eqn.invars, operands, strict=True)], scope, wants)
            arrays, values, reason = call.arrays, self.handlers[name](self, call), self._reason_of_call(call, why)
        else:
            self._current.requests.weigh(name, precision, decision)
            read = frame.weight_or_array if decision.takes_weights else frame.array
            arrays, reason = [read(v, decision.dtype) for v in eqn.invars], decision.reason
            results = apply(eqn, arrays, op, precision, decision)
            values = [Value(x, _checked_tag(x, known)) for x, known in zip(results, decision.results, strict=True)]
        if self.keeps_records:
            found: dict[str, Any] = {"operands": operands, "arrays": arrays, "values": values, "decision": decision}
            found |= {"reason": reason, "has_dot": precision.dot is not None, "inside": self.records[position:]}
            self.records[position:] = records_of(eqn, scope, op, **found)
        return values

    def _reason_of_call(self, call: Call, why: str) -> str:
        """Says for a loop that the floats its condition depends on run as written, if there are any."""
        if not self.keeps_records or call.eqn.primitive.name != "while":
            return why
        _, results = self.through(call)
        is_tested = any(
            want & TESTED and is_eligible(v.aval) for v, want in zip(call.eqn.outvars, results, strict=True)
        )
        return "a loop: floats that its condition depends on run as written" if is_tested else why


def _full_like(array: Any, number: float, dtype: DType) -> Any:
    """Fills a new array with one number: a cast of the old array would be kept for the backward pass."""
    value = as_dtype(number, dtype)
    return value if array.ndim == 0 else jax.lax.full_like(array, value, dtype)


def _checked_tag(array: Any, known: Known) -> Known:
    """A replacement may return float32 where the primitive would not."""
    return known._replace(tag=Tag.HIGH) if known.tag is Tag.LOW and array.dtype == FLOAT32 else known


def _as_array(atom: Atom, value: Value) -> Value:
    if is_literal(atom):
        return value._replace(array=np.asarray(atom.val, atom.aval.dtype))
    return value


def _with_dtype(aval: Any, dtype: Any) -> Any:
    is_changed = is_eligible(aval) and dtype != FLOAT32
    return aval.update(dtype=dtype, weak_type=False) if is_changed else aval


def _restore(array: Any, aval: Any) -> Any:
    """Restores the written dtype and weak type of a result."""
    is_number = isinstance(aval, jax.core.ShapedArray) and not jnp.issubdtype(aval.dtype, jax.dtypes.extended)
    return with_weak_type(array, aval) if is_number else array
