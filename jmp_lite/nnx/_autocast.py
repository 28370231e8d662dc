"""Autocast for functions of NNX modules: state updates survive, and modules have scopes."""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jmp_lite._policy import Policy, PolicyMap
from jmp_lite._tree import combine, partition
from jmp_lite.autocast._api import settings_from, wrap
from jmp_lite.autocast._explain import Explanation, explained
from jmp_lite.autocast._ops import Op
from jmp_lite.autocast._rules import Rule
from jmp_lite.nnx._modules import change_class, derived_class, is_leaf, is_node, objects, unbound, wraps
from jmp_lite.nnx._pure import call_pure

#: Path of the module whose method is running.
_PATH: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("jmp_lite_nnx_path", default=())


def autocast(
    fn: Callable[..., Any],
    policy: str | Policy | PolicyMap,
    *,
    rules: Rule | Sequence[Rule] = (),
    ops: Mapping[str, Op] | None = None,
    dot: Callable[..., Any] | None = None,
    accumulation_dtype: Any = None,
    residuals: str = "all",
) -> Callable[..., Any]:
    """Runs a function of NNX modules in mixed precision; ``jmp_lite.autocast`` for arguments that are modules.

    Modules, variables and ``nnx.Rngs`` may appear anywhere in the arguments. Every change that the function makes to
    them survives: running statistics, random counters, caches, new attributes. Variables keep their dtypes, random bits
    do not change, layers need no ``dtype``.

    NNX opens no name scopes, so autocast runs each method of a module in one, named by its path in the passed module,
    such as ``layers/0/attention``. Rules and ``PolicyMap`` patterns match these scopes.

    Args:
        fn: A function of modules and any other arguments; a module, a bound method or a ``functools.partial`` works
            too, with the module already bound.
        policy: As for ``autocast``; patterns match module paths.
        rules: As for ``autocast``.
        ops: As for ``autocast``.
        dot: As for ``autocast``.
        accumulation_dtype: As for ``autocast``.
        residuals: As for ``autocast``.

    Returns:
        A function with the signature of ``fn``, for use in ``nnx.jit``, ``nnx.value_and_grad`` and the like.

    Raises:
        InvalidRuleError: As ``autocast``; other errors likewise.

    Example:
        >>> from flax import nnx
        >>> class Model(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.body, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        ...
        ...     def __call__(self, x):
        ...         return self.norm(self.body(x))
        >>> def loss(model, x):
        ...     return jnp.mean((model(x) - 1) ** 2)
        >>> model, x = Model(nnx.Rngs(0)), jnp.ones((2, 3))
        >>> value, grads = nnx.value_and_grad(jmp.nnx.autocast(loss, "mixed_bfloat16"))(model, x)
        >>> value.dtype, grads.body.kernel.dtype, model.norm.mean.dtype, bool(jnp.any(model.norm.mean[...] != 0))
        (dtype('float32'), dtype('float32'), dtype('float32'), True)

    References:
        ``torch.autocast``. State is passed as in ``nnx.jit``: flax.readthedocs.io, "NNX graph".
    """
    function, first = unbound(fn, "nnx.autocast")
    settings = settings_from(policy, rules=rules, ops=ops, dot=dot, accumulation_dtype=accumulation_dtype)

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return call_pure(function, lambda pure: wrap(pure, settings, residuals), args, kwargs, around=_scopes)

    return functools.partial(wrapped, *first) if first else wrapped


def explain(
    fn: Callable[..., Any],
    policy: str | Policy | PolicyMap,
    *,
    rules: Rule | Sequence[Rule] = (),
    ops: Mapping[str, Op] | None = None,
    dot: Callable[..., Any] | None = None,
    accumulation_dtype: Any = None,
) -> Callable[..., Explanation]:
    """Explains what ``nnx.autocast`` does to every equation of a function of modules: ``jmp.explain`` for NNX.

    Computes nothing and does not change the modules. Scopes are module paths.

    Args:
        fn: As for ``nnx.autocast``.
        policy: As for ``nnx.autocast``.
        rules: As for ``autocast``.
        ops: As for ``autocast``.
        dot: As for ``autocast``.
        accumulation_dtype: As for ``autocast``.

    Returns:
        A function with the arguments of ``fn`` that returns an ``Explanation``.

    Raises:
        InvalidRuleError: As ``autocast``; other errors likewise.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2)))
        >>> policies = jmp.PolicyMap({"layers/1": "full"}, default="mixed_bfloat16")
        >>> explanation = jmp.nnx.explain(lambda model, x: model(x), policies)(model, jnp.ones((2, 8)))
        >>> [(d.scope, d.in_dtypes[0]) for d in explanation if d.primitive == "dot_general"]
        [('layers/0', 'bfloat16'), ('layers/1', 'float32')]

    References:
        ``jmp_lite.explain``.
    """
    function, first = unbound(fn, "nnx.explain")
    settings = settings_from(policy, rules=rules, ops=ops, dot=dot, accumulation_dtype=accumulation_dtype)

    def explanation_of(*args: Any, **kwargs: Any) -> Explanation:
        found: list[Explanation] = []

        def instead(pure: Callable[..., Any]) -> Callable[..., Any]:
            def call(*pure_args: Any) -> Any:
                explanation, results = explained(pure, settings, pure_args, {})
                found.append(explanation)
                return results

            return call

        nodes, others, layout = partition(((*first, *args), kwargs), is_node, is_leaf)
        copied_args, copied_kwargs = combine(nnx.clone(nodes), others, layout)
        call_pure(function, instead, copied_args, copied_kwargs, around=_scopes)
        return found[0]

    return explanation_of


# --- Name scopes ---


@contextlib.contextmanager
def _scopes(nodes: list[Any]) -> Iterator[None]:
    """Gives the modules of a graph, for as long as the context lasts, methods that open a name scope."""
    modules: list[tuple[Any, Any, Any]] = [(path, module, type(module)) for path, module in objects(nodes)]
    for path, module, cls in modules:
        change_class(module, functools.partial(_scoped_class, cls, tuple(map(str, path[1:]))))
    try:
        yield
    finally:
        for _, module, cls in modules:
            object.__setattr__(module, "__class__", cls)


@functools.cache
def _scoped_class(cls: type, path: tuple[str, ...], names: tuple[str, ...], is_pytree: bool) -> type:
    """Derives a class whose methods open a name scope. One per path: NNX caches traces by class."""
    methods = {name: _in_scope(inspect.getattr_static(cls, name), path) for name in names}
    return derived_class(cls, methods, is_pytree=is_pytree)


def _in_scope(function: Any, path: tuple[str, ...]) -> Callable[..., Any]:
    @wraps(function)
    def scoped_method(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer = _PATH.get()
        inner = path[len(outer) :] if path[: len(outer)] == outer else path
        token = _PATH.set(path)
        try:
            with jax.named_scope("/".join(inner)) if inner else contextlib.nullcontext():
                return function.__get__(self, type(self))(*args, **kwargs)
        finally:
            _PATH.reset(token)

    return scoped_method
