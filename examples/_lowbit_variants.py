"""What ``lowbit.py`` compares: in which precision a model computes, what is pruned, and what is kept of its weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import _lowbit_files
import jax
import jax.numpy as jnp
import optax

import jmp_lite as jmp

SMALLEST_KERNEL = 1024  # the first convolution and the last layer of the CNN stay dense
PRUNE_EVERY = 10  # steps
# Kernels of attention whose input axis is the third from the end.
PROJECTIONS = ("query/kernel", "key/kernel", "value/kernel")


def same(params: Any) -> Any:
    """Keeps the weights as they are."""
    return params


def everywhere(recipe: jmp.quant.DotRecipe) -> jmp.quant.DotRecipe:
    """The recipe for all matmuls, those of attention too."""
    return recipe.replace(products="all")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train a model and to serve it.

    ``trained_as`` names the variant whose training it takes over. ``pack`` makes of the trained parameters what is
    written to disk; ``prune`` makes of the number of steps and the shapes of the parameters the transformations that
    come last in the optimizer.
    """

    title: str
    policy: str = "float32"
    recipe: jmp.quant.DotRecipe | None = None
    trained_as: str | None = None
    pack: Callable[[Any], Any] = same
    prune: Callable[[int, Any], list[optax.GradientTransformation]] = lambda *_: []

    def cast(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """The function, computed in the precision of this variant."""
        return jmp.autocast(fun, self.policy, dot=self.recipe)


# --- Kernels to prune -------------------------------------------------------------------------------------------------


def is_kernel(path: str, leaf: Any) -> bool:
    """Whether a parameter is a kernel that is worth pruning."""
    return path.endswith("kernel") and leaf.size >= SMALLEST_KERNEL


def prune_gradually(steps: int, _params: Any) -> list[optax.GradientTransformation]:
    """80 % of every kernel, after Zhu & Gupta: from a quarter to three quarters of the training, fewer and fewer."""
    schedule = optax.polynomial_schedule(0.0, 0.8, power=3, transition_steps=steps // 2, transition_begin=steps // 4)
    return [jmp.optim.prune(schedule, where=is_kernel, every=min(PRUNE_EVERY, 1 + steps // 8))]


def prune_2_of_4(steps: int, params: Any) -> list[optax.GradientTransformation]:
    """2 of every 4 inputs of an output in every kernel, halfway through the training."""

    def inputs(path: tuple[Any, ...], _leaf: Any) -> tuple[int]:
        return (-3 if jax.tree_util.keystr(path, simple=True, separator="/").endswith(PROJECTIONS) else -2,)

    axes = jax.tree_util.tree_map_with_path(inputs, params)
    return [jmp.optim.prune(nm=(2, 4), where=is_kernel, axes=axes, begin=steps // 2)]


# --- Weights to keep --------------------------------------------------------------------------------------------------


def to_bfloat16(params: Any) -> Any:
    """Weights in the dtype in which they are multiplied."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


@jax.jit
def to_float8(params: Any) -> Any:
    """Kernels as ``quant.FP8`` rounds them in every step."""
    return jmp.quant.quantize_tree(params, jmp.quant.FP8.rhs)


def all_but_last(path: str, leaf: Any) -> range:
    """The axes of a kernel that share a scale: one per output."""
    del path
    return range(leaf.ndim - 1)


@jax.jit
def to_int8(params: Any) -> Any:
    """Kernels in 8 bits, with a scale for each output."""
    return jmp.quant.quantize_tree(params, axes=all_but_last)


VARIANTS = {
    "fp32": Variant("float32"),
    "bf16": Variant("bfloat16", "mixed_bfloat16", pack=to_bfloat16),
    "fp8": Variant("float8", "mixed_bfloat16", everywhere(jmp.quant.FP8), pack=to_float8),
    "int8_qat": Variant("int8, trained", "mixed_bfloat16", everywhere(jmp.quant.INT8_QAT), pack=to_int8),
    "w8a16": Variant("int8 weights", "mixed_bfloat16", trained_as="fp32", pack=to_int8),
    "w8a8": Variant("int8 products", "mixed_bfloat16", everywhere(jmp.quant.W8A8), trained_as="fp32", pack=to_int8),
    "sparse_80": Variant("80 % sparse", prune=prune_gradually, pack=_lowbit_files.to_sparse),
    "sparse_2_4": Variant("2:4 sparse", prune=prune_2_of_4, pack=_lowbit_files.to_sparse),
}
