"""Delayed scaling for functions of NNX modules."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx

from jmp_lite.nnx._modules import unbound
from jmp_lite.nnx._pure import call_pure
from jmp_lite.quant import Delayed as DelayedFunction
from jmp_lite.quant import delayed as delayed_function


def delayed(fn: Callable[..., Any]) -> "Delayed":
    """Gives a function of modules amax histories as its first argument; ``quant.delayed`` for NNX.

    Whatever the function does to the modules stays: running statistics, random counters, caches.

    Args:
        fn: A function of modules and any other arguments, such as
            ``jmp.nnx.autocast(loss, policy, dot=quant.FP8_DELAYED)``; modules, methods and partials as there.

    Returns:
        A function of ``(histories, *args, **kwargs)`` with the method ``init``.

    Raises:
        InvalidRecipeError: When called with histories of other products.

    Example:
        >>> from flax import nnx
        >>> def loss(model, x):
        ...     return jnp.mean((model(x) - 1) ** 2)
        >>> model, x = nnx.Linear(8, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 8))
        >>> loss = jmp.nnx.delayed(jmp.nnx.autocast(loss, "mixed_bfloat16", dot=jmp.quant.FP8_DELAYED))
        >>> histories = loss.init(model, x)
        >>> observed, grads = nnx.grad(loss, argnums=(0, 1))(histories, model, x)
        >>> histories = jmp.quant.update_histories(histories, observed)
        >>> grads["kernel"][...].shape, [history.shape for history in histories.values()]
        ((8, 3), [(3, 1024)])
    """
    return Delayed(*unbound(fn, "nnx.delayed"))


@dataclasses.dataclass(frozen=True)
class Delayed:
    """What ``delayed`` returns: a function of amax histories, modules and other arguments."""

    fn: Callable[..., Any]
    first: tuple[Any, ...] = ()

    def init(self, *args: Any, loss_scale: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Makes histories that hold what is seen in one step; the modules are left as they are.

        Args:
            *args: Arguments of the function.
            loss_scale: As for ``quant.delayed``.
            **kwargs: Keyword arguments of the function.
        """
        found: dict[str, Any] = {}

        def observe(pure: Callable[..., Any]) -> Callable[..., Any]:
            def run(modules: Any, others: Any) -> Any:
                function = delayed_function(pure)
                found.update(function.init(modules, others, loss_scale=loss_scale))
                return function(found, modules, others)

            return run

        call_pure(self.fn, observe, *nnx.clone(((*self.first, *args), kwargs)), around=contextlib.nullcontext)
        return found

    def __call__(self, histories: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the function with scales from these histories."""

        def with_histories(pure: Callable[..., Any]) -> Callable[..., Any]:
            function: DelayedFunction = delayed_function(pure)
            return lambda modules, others: function(histories, modules, others)

        return call_pure(self.fn, with_histories, (*self.first, *args), kwargs, around=contextlib.nullcontext)
