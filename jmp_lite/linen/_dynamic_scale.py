"""Dynamic loss scaling with Flax's interface."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct

from jmp_lite._tree import all_finite, is_inexact
from jmp_lite.scaling._grad import scaled_value_and_grad
from jmp_lite.scaling._loss_scale import LARGEST_SCALE, SMALLEST_SCALE, DynamicLossScale, strong_scalar

#: How ``flax.struct`` marks a field that is not data.
_STATIC = {"pytree_node": False}


class DynamicScaleResult(NamedTuple):
    """Result of the function that ``DynamicScale.value_and_grad`` returns.

    Attributes:
        dynamic_scale: The scale of the next step.
        finite: ``bool[]``, whether all gradients are finite.
        aux: The loss, or ``(loss, aux)``; the loss is unscaled, ``float32[]``.
        grad: The gradients, unscaled, in float32 or wider.

    Example:
        >>> result = jmp.linen.DynamicScale().value_and_grad(lambda w: w**2)(3.0)
        >>> print(result.aux, result.grad)
        9.0 6.0
    """

    dynamic_scale: "DynamicScale"
    finite: jax.Array
    aux: Any
    grad: Any


class DynamicScale(struct.PyTreeNode):  # type: ignore[no-untyped-call]
    """Dynamic loss scaling with the interface of ``flax.training.dynamic_scale.DynamicScale``.

    It takes the same steps, including growth after ``growth_interval + 1`` finite ones, and stores the same state.
    Differences: it returns the true loss, even on a step that overflows; gradients of complex and float64 parameters
    keep their type, gradients of integers are ``float0``; keyword arguments reach the function; a training step is
    traced once; the scale stays within ``[2**-126, 2**126]``. In new code use ``loss_scaled``, which also skips the
    update.

    Args:
        growth_factor: Multiplier of the scale after ``growth_interval + 1`` finite steps in a row.
        backoff_factor: Multiplier of the scale after a step with a non-finite gradient.
        growth_interval: Finite steps between growths, minus one.
        fin_steps: Finite steps since the last change, ``int32[]``.
        scale: The current scale, ``float32[]``.
        minimum_scale: Lowest scale; ``None`` means ``2**-126``.

    Example:
        >>> def loss_fn(params, x):
        ...     return jnp.mean((params["w"].astype(jnp.float16) * x) ** 2)
        >>> params, x = {"w": jnp.ones(2)}, jnp.full(2, 3, jnp.float16)
        >>> dynamic_scale = jmp.linen.DynamicScale()
        >>> dynamic_scale, is_finite, loss, grads = dynamic_scale.value_and_grad(loss_fn)(params, x)
        >>> print(is_finite, loss, dynamic_scale.scale)
        False 9.0 32768.0

    References:
        flax.training.dynamic_scale 0.12. Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740.
    """

    growth_factor: float = dataclasses.field(metadata=_STATIC, default=2.0)
    backoff_factor: float = dataclasses.field(metadata=_STATIC, default=0.5)
    growth_interval: int = dataclasses.field(metadata=_STATIC, default=2000)
    fin_steps: Any = 0
    scale: Any = 65536.0
    minimum_scale: float | None = dataclasses.field(metadata=_STATIC, default=SMALLEST_SCALE)

    def __post_init__(self) -> None:
        """Gives the state the strong types that it has after a step, so a step is traced only once."""
        object.__setattr__(self, "fin_steps", strong_scalar(self.fin_steps, np.int32))
        object.__setattr__(self, "scale", strong_scalar(self.scale, np.float32))

    def value_and_grad(
        self,
        fun: Callable[..., Any],
        argnums: int | Sequence[int] = 0,
        has_aux: bool = False,
        axis_name: Any = None,
    ) -> Callable[..., DynamicScaleResult]:
        """Like ``jax.value_and_grad``, with the loss scaled while the gradients are computed.

        Args:
            fun: Returns a real floating-point scalar, or ``(scalar, aux)`` with ``has_aux``.
            argnums: Which positional arguments to differentiate.
            has_aux: Whether ``fun`` returns auxiliary output.
            axis_name: Mapped axes over which to average the gradients, before they are checked.

        Returns:
            A function with the arguments of ``fun`` that returns a ``DynamicScaleResult``.

        Raises:
            InvalidFunctionError: When called, if ``fun`` does not return what it should.
        """

        @functools.wraps(fun)
        def wrapped(*args: Any, **kwargs: Any) -> DynamicScaleResult:
            loss_scale = DynamicLossScale(
                self.scale,
                self.fin_steps,
                period=self.growth_interval + 1,
                factor=self.growth_factor,
                backoff_factor=self.backoff_factor,
                min_loss_scale=self.minimum_scale or 0.0,
                max_loss_scale=LARGEST_SCALE,
            )
            gradient = scaled_value_and_grad(fun, argnums, has_aux, loss_scale=loss_scale)
            value, grads = gradient(*args, **kwargs)
            grads = loss_scale.unscale(grads)
            if axis_name is not None:
                grads = jax.tree.map(lambda g: jax.lax.pmean(g, axis_name) if is_inexact(g) else g, grads)
            finite = all_finite(grads)
            adjusted = loss_scale.adjust(finite)
            dynamic_scale = self.replace(fin_steps=adjusted.counter, scale=adjusted.loss_scale)
            return DynamicScaleResult(dynamic_scale, finite, value, grads)

        return wrapped
