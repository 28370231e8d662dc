"""What is measured of a model: the dtypes of its matmuls, and how far its gradients are from float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import jmp_lite as jmp

from .model import Model, fast_jit

BF16, FP16 = "mixed_bfloat16", "mixed_float16"
SCALE = jmp.DynamicLossScale(2.0**15)
LOW = ("bfloat16", "float16")


class Product(NamedTuple):
    """A matmul or convolution: where it stands, over how many values it sums, and its operands."""

    scope: str
    primitive: str
    summed: int
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    is_asked_for: bool
    """Whether its author asked for more than 16 bits, as Diffrax does for the sums of its tableaus."""

    @property
    def is_low(self) -> bool:
        return all(dtype in LOW for dtype in self.dtypes)

    @property
    def counts(self) -> bool:
        """Whether it is worth 16 bits: not an outer product or the like, nor of integers."""
        return self.summed > 4 and all(dtype in (*LOW, "float32") for dtype in self.dtypes)


def _jaxprs(value: Any) -> Iterator[Any]:
    for item in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(item, "jaxpr", item)
        if hasattr(inner, "eqns"):
            yield inner


def _summed(equation: Any) -> int:
    """Number of terms in a sum of a dot_general; those of vectors count as none, matmuls of other kinds as large."""
    if equation.primitive.name != "dot_general":
        return 10**9
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    if all(operand.aval.ndim == len(contracted) + len(batch) for operand in equation.invars):
        return 0
    return int(np.prod([equation.invars[0].aval.shape[i] for i in contracted], dtype=int))


def _walk(jaxpr: Any, scope: tuple[str, ...]) -> Iterator[Product]:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        here = (*scope, *filter(None, [str(equation.source_info.name_stack)]))
        if name in {"dot_general", "conv_general_dilated", "ragged_dot_general"}:
            operands = [operand.aval for operand in equation.invars[:2]]
            dtypes, shapes = (tuple(f(operand) for operand in operands) for f in (_dtype, np.shape))
            is_asked_for = "HIGHEST" in str(equation.params["precision"])
            yield Product("/".join(here), name, _summed(equation), dtypes, shapes, is_asked_for)
        for inner in (inner for value in equation.params.values() for inner in _jaxprs(value)):
            yield from _walk(inner, (*here, name))


def _dtype(operand: Any) -> str:
    return str(operand.dtype)


def products(fun: Callable[..., Any], *args: Any) -> list[Product]:
    """The matmuls of a traced function that are worth 16 bits, those in loops and calls included."""
    return [product for product in _walk(jax.make_jaxpr(fun)(*args).jaxpr, ()) if product.counts]


def left_in_float32(found: list[Product], allowed: dict[str, str]) -> list[Product]:
    """The matmuls that are not low, but for those in a scope of which that is known to be right."""
    suspects = [p for p in found if not p.is_low and not p.is_asked_for]
    return [p for p in suspects if not any(scope in p.scope.split("/") for scope in allowed)]


def gradients(model: Model) -> dict[str, Callable[..., Any]]:
    """(params, batch) -> the gradient: in float32, with autocast, and with the model's own means."""
    scaled = jmp.scaled_value_and_grad(jmp.autocast(model.loss, FP16), max_retries=15, loss_scale=SCALE)

    def unscaled(params: Any, batch: Any) -> Any:
        _, grads, scale = scaled(params, batch)
        return scale.unscale(grads)

    return {
        "float32": jax.grad(model.loss),
        "own": jax.grad(model.own),
        BF16: jax.grad(jmp.autocast(model.loss, BF16)),
        FP16: unscaled,
    }


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def _geometric_mean(values: list[Any]) -> float:
    """Zero if one of them is zero, and not finite if one of them is not."""
    return 0.0 if 0 in values else float(np.exp(np.mean(np.log(values))))


def errors(model: Model) -> dict[str, float]:
    """Distance of each gradient from float32's, relative to its length.

    It is the geometric mean over draws. Rounding moves a value of some of them across a kink, with an error ten times
    as large; a few such draws would decide the mean.
    """
    draws = [model.draw(seed) for seed in range(model.draws)]
    found = {}
    for name, gradient in gradients(model).items():
        compiled = fast_jit(gradient)
        found[name] = [_flat(compiled(*draw)) for draw in draws]
    exact = found.pop("float32")
    lengths = [np.linalg.norm(gradient) for gradient in exact]
    return {
        name: _geometric_mean([np.linalg.norm(a - b) / n for a, b, n in zip(each, exact, lengths, strict=True)])
        for name, each in found.items()
    }
