"""A matmul and a Dense layer, in bfloat16 and in 8 bits, by jmp_lite and by Flax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jmp_lite as jmp
from benchmarks import _peers
from jmp_lite import quant

DIMS = (((1,), (0,)), ((), ()))
#: Shape of the input of a layer, features of its output.
Layer = tuple[tuple[int, ...], int]
BASELINE = "bfloat16"
Step = Callable[[Any, jax.Array, jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class Design:
    """One way to run a Dense layer.

    Attributes:
      formats: of the operands of the matmul alone.
      result: dtype of the matmul alone.
      step: (variables, x, cotangent) -> output of the layer and its gradients; x is bfloat16.
      variables: kernel, float32[inputs, features] -> what the step takes.
    """

    formats: tuple[Any, Any]
    result: Any
    step: Step
    variables: Callable[[jax.Array], Any] = lambda kernel: kernel

    def product(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """The matmul alone, of operands that are quantized already."""
        return lax.dot_general(lhs, rhs, DIMS, preferred_element_type=self.result)


def _dense(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) @ kernel).astype(x.dtype)


def _step(layer: Callable[[Any, jax.Array], jax.Array]) -> Step:
    """Output and gradients of a layer for a given cotangent: one matmul forward, two backward."""

    def step(variables: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        out, pullback = jax.vjp(layer, variables, x)
        return out, pullback(cotangent.astype(out.dtype))

    return step


def autocast(recipe: str | None, formats: tuple[Any, Any], result: Any) -> Callable[[], Design]:
    """jmp_lite in mixed bfloat16, with a recipe or without."""
    dot = None if recipe is None else quant.get_recipe(recipe)
    return lambda: Design(formats, result, _step(jmp.autocast(_dense, "mixed_bfloat16", dot=dot)))


def by_hand() -> Design:
    """Casts written by hand."""

    def layer(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return x @ kernel.astype(jnp.bfloat16)

    return Design((jnp.bfloat16, jnp.bfloat16), jnp.bfloat16, _step(layer))


def flax_fp8() -> Design:
    """Flax's float8 matmul, with delayed scaling."""
    import flax.linen as nn

    def model(features: int) -> nn.Dense:
        operation = nn.Fp8DirectDotGeneralOp
        return nn.Dense(features, use_bias=False, dtype=jnp.bfloat16, dot_general_cls=operation)

    def variables(kernel: jax.Array) -> Any:
        made = model(kernel.shape[1]).init(jax.random.key(0), jnp.zeros((1, kernel.shape[0]), jnp.bfloat16))
        return {**made, "params": {"kernel": kernel}}

    def layer(variables: Any, x: jax.Array) -> jax.Array:
        return model(variables["params"]["kernel"].shape[1]).apply(variables, x)

    return Design((jnp.float8_e4m3fn, jnp.float8_e4m3fn), jnp.bfloat16, _step(layer), variables)


_F8, _I8 = (jnp.float8_e4m3fn,) * 2, (jnp.int8,) * 2
OURS: Mapping[str, Callable[[], Design]] = {
    "jmp_lite fp8": autocast("fp8", _F8, jnp.bfloat16),
    "jmp_lite fp8_rowwise": autocast("fp8_rowwise", _F8, jnp.bfloat16),
    "jmp_lite int8_qat": autocast("int8_qat", _I8, jnp.int32),
    "jmp_lite int8_train": autocast("int8_train", _I8, jnp.int32),
}
PEERS: Mapping[str, Callable[[], Design]] = {"flax Fp8DirectDotGeneralOp": flax_fp8}


def available(skip_peers: bool = False) -> tuple[dict[str, Design], dict[str, str]]:
    """Designs by name, bfloat16 by hand first, and the reasons why others are missing."""
    return _peers.build({BASELINE: by_hand, **({} if skip_peers else PEERS), **OURS})


def square(n: int) -> Layer:
    """A layer of n features on n rows."""
    return (n, n), n


def shapes(design: Design, layer: Layer) -> tuple[Any, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes of what the step takes."""
    x, features = layer
    kernel = jax.ShapeDtypeStruct((x[-1], features), jnp.float32)
    outer = jax.ShapeDtypeStruct((*x[:-1], features), jnp.bfloat16)
    return jax.eval_shape(design.variables, kernel), jax.ShapeDtypeStruct(x, jnp.bfloat16), outer
