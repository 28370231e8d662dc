"""The AdamW step for every way to keep parameters and state, in one common form."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jmp_lite as jmp
from benchmarks import _designs

BARE = "optax.adamw, float32"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way to keep parameters and state.

    Attributes:
      params: format of the parameters; `None` for bare Optax with float32 parameters.
      state: format of the moments.
      mu_dtype: of the first moment in bare Optax.
      loss_scaled: whether the step is checked and may be skipped.
    """

    params: str | None = None
    state: str = "float32"
    mu_dtype: str | None = None
    loss_scaled: bool = False

    @property
    def is_narrow(self) -> bool:
        """Whether the model sees bfloat16."""
        return self.params is not None

    def around(self, inner: optax.GradientTransformation, seed: int = 0) -> optax.GradientTransformation:
        """An optimizer as this scheme keeps it."""
        if self.params is not None:
            inner = jmp.optim.stored(inner, params=self.params, state=self.state, seed=seed)
        return jmp.loss_scaled(inner) if self.loss_scaled else inner

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW as this scheme keeps it."""
        return self.around(optax.adamw(1e-3, weight_decay=1e-4, mu_dtype=self.mu_dtype))

    def step(self, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        """One step, as a user writes it."""
        tx = self.optimizer()
        if self.loss_scaled:
            applied: tuple[Any, Any] = jmp.apply_gradients(tx, grads, state, params)
            return applied
        if not self.is_narrow:
            grads = _designs.to_float32(grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state


SCHEMES = {
    BARE: Scheme(),
    "optax.adamw, mu_dtype bfloat16": Scheme(mu_dtype="bfloat16"),
    "master_weights": Scheme("split16"),
    "split8": Scheme("split8"),
    "stochastic": Scheme("stochastic"),
    "nearest": Scheme("nearest"),
    "stochastic, bfloat16 moments": Scheme("stochastic", "bfloat16"),
    "split8, 8bit": Scheme("split8", "8bit"),
    "stochastic, 8bit": Scheme("stochastic", "8bit"),
}
LOSS_SCALED = {
    f"{name}, loss_scaled": dataclasses.replace(SCHEMES[name], loss_scaled=True)
    for name in (BARE, "master_weights", "split8, 8bit", "stochastic, 8bit")
}


def abstract(scheme: Scheme, tree: str) -> tuple[Any, Any, Any]:
    """Shapes of parameters, state and gradients: gradients of the parameters' dtype, as the model makes them."""
    dtype = jnp.bfloat16 if scheme.is_narrow else jnp.float32
    params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in _designs.shapes(tree).items()}
    return params, jax.eval_shape(scheme.optimizer().init, params), params


def nbytes(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
