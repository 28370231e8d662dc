"""Policies for functions of NNX modules, at the boundary and at each module, with every update of state kept."""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from jmp_lite._policy import Policy, PolicyMap, get_policy
from jmp_lite._tree import keep_carry, keep_dtypes, undo_cast
from jmp_lite.nnx._modules import change_class, derived_class, is_leaf, is_node, objects, original_class, unbound


class _Caller(NamedTuple):
    """Who calls a module: its policy, and the loops that it runs in."""

    policy: Policy
    loops: tuple[int, ...]


_CALLER: contextvars.ContextVar[_Caller | None] = contextvars.ContextVar("jmp_lite_nnx_caller", default=None)
#: How NNX calls the transformations whose carry must keep its dtype.
_LOOPS = ("scan", "while_loop", "fori_loop")


def with_policy(fn: Callable[..., Any], policy: str | Policy | PolicyMap) -> Callable[..., Any]:
    """Wraps a function of NNX modules: computes in the policy's dtypes, keeps all other state as it is.

    The function is given copies of the modules among its arguments, whose ``nnx.Param`` variables are cast to the
    compute dtype by path. All other variables (``BatchStat``, ``RngState``, ``Cache``, ...) are those of the modules
    themselves: they keep their dtypes, and updates of them stay, as does every other change to a module. Modules,
    variables and ``nnx.Rngs`` may stand anywhere in the arguments, and be shared between them.

    Floating arguments are cast to the compute dtype and results to the output dtype. The same happens at every module,
    because layers such as ``nnx.BatchNorm`` and ``nnx.Embed`` would go back to float32 by themselves: each public
    method casts its floating inputs to the compute dtype of its module, and its outputs to the module's output dtype
    where the policy differs from the caller's. Layers whose ``dtype`` is ``None`` return the compute dtype; one that
    was given a ``dtype`` keeps it. Recurrent cells take their carry as it is, and the carry of ``nnx.scan`` and the
    other NNX loops keeps its dtype.

    Gradients taken through the wrapper have the dtype of the parameters. What the function itself computes after the
    last layer, such as a loss, it computes in the compute dtype: wrap the forward pass alone, or cast there.

    Args:
        fn: A function of modules and any other arguments, usually ``fn(model, *args)``; a module, a bound method of one
            or a ``functools.partial`` stands for the function that is left when the module is given.
        policy: A policy, a policy string or a map. Paths of a map are those inside the module that is passed, such as
            ``layers/0/kernel``; the default policy is that of the function itself.

    Returns:
        A function with the signature of ``fn``. It can be given to ``nnx.jit``, ``nnx.value_and_grad`` and the like.

    Raises:
        UnknownDtypeError: If the policy string cannot be parsed.
        AmbiguousPolicyError: When called, if two patterns of a map contradict each other.

    Example:
        >>> from flax import nnx
        >>> class Model(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.body, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        ...
        ...     def __call__(self, x):
        ...         return self.norm(self.body(x))
        >>> forward = jmp.nnx.with_policy(lambda model, x: model(x), "mixed_bfloat16")
        >>> model, x = Model(nnx.Rngs(0)), jnp.ones((2, 3))
        >>> grads = nnx.grad(lambda model, x: jnp.mean((forward(model, x) - 1) ** 2))(model, x)
        >>> forward(model, x).dtype, grads.body.kernel.dtype, model.norm.mean.dtype
        (dtype('float32'), dtype('float32'), dtype('float32'))

    References:
        Policies of whole modules are those of Haiku's ``mixed_precision`` (github.com/google-deepmind/dm-haiku).
    """
    function, first = unbound(fn)
    if first:
        return functools.partial(with_policy(function, policy), *first)
    resolved = get_policy(policy)
    policies = resolved if isinstance(resolved, PolicyMap) else PolicyMap({}, resolved)
    boundary = policies.default

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_leaf)
        copy = _WorkingCopy([leaf for leaf in leaves if is_node(leaf)], policies)
        nodes = iter(copy.nodes)
        cast = [next(nodes) if is_node(leaf) else boundary.cast_to_compute(leaf) for leaf in leaves]
        cast_args, cast_kwargs = jax.tree.unflatten(treedef, cast)
        token = _CALLER.set(_Caller(boundary, _active_loops()))
        try:
            output = fn(*cast_args, **cast_kwargs)
        finally:
            _CALLER.reset(token)
        copy.write_back()
        return _map_arrays(boundary.cast_to_output, output, copy.original)

    return wrapped


def _map_arrays(cast: Callable[[Any], Any], tree: Any, node: Callable[[Any], Any] = lambda node: node) -> Any:
    return jax.tree.map(lambda leaf: node(leaf) if is_node(leaf) else cast(leaf), tree, is_leaf=is_leaf)


class _WorkingCopy:
    """Copies of modules that share all their variables with the originals but those that are cast."""

    def __init__(self, originals: list[Any], policies: PolicyMap) -> None:
        self.policies = policies
        self.casts: list[tuple[Any, Any, Any]] = []
        self.shared: list[tuple[Any, Any]] = []
        found = list(objects(originals))
        self.inputs = [not isinstance(original, nnx.Module) for original in originals]
        self.activations = {id(v) for _, node in found for v in _cached_activations(node)}
        graphdef, state = nnx.split(originals, graph=True)
        self.nodes = nnx.merge(graphdef, nnx.map_state(self._cast, state))
        copies = [copy for _, copy in objects(self.nodes)]
        for (path, _), copy in zip(found, copies, strict=True):
            _make_casting(copy, policies, self._policy_of(path))
        self.objects = [(original, copy, dict(vars(copy))) for (_, original), copy in zip(found, copies, strict=True)]
        self.originals = {id(copy): original for original, copy, _ in [*self.casts, *self.objects]}

    def _policy_of(self, path: tuple[Any, ...]) -> Policy:
        """Returns the policy at a path whose first segment counts the arguments."""
        inner = "/".join(map(str, path[1:]))
        return self.policies.policy_for(inner) if inner else self.policies.default

    def _cast(self, path: tuple[Any, ...], leaf: Any) -> Any:
        cast_to_compute = self._policy_of(path).cast_to_compute
        if not isinstance(leaf, nnx.Variable):
            return cast_to_compute(leaf) if self.inputs[path[0]] else leaf
        stored = _read(leaf)
        castable = isinstance(leaf, nnx.Param) or id(leaf) in self.activations
        value = cast_to_compute(stored) if castable else stored
        if value is stored:
            self.shared.append((leaf, leaf.get_raw_value()))
            return leaf
        cast = leaf.copy(value)
        self.casts.append((leaf, cast, _read(cast)))
        return cast

    def original(self, node: Any) -> Any:
        """Returns the module or variable that a copy was made of; what is new is its own original."""
        return self.originals.get(id(node), node)

    def write_back(self) -> None:
        """Carries to the originals whatever happened to the copies."""
        for original, cast, given in self.casts:
            value = _read(cast)
            if value is not given:
                _write(original, jax.tree.map(undo_cast, value, given, _read(original)))
        for variable, before in self.shared:
            _keep_dtype(variable, before)
        for original, copy, before in self.objects:
            now = vars(copy)
            for name, value in now.items():
                if value is not before.get(name) and not name.startswith("_pytree__"):
                    self._write_attribute(original, name, _map_arrays(lambda leaf: leaf, value, self.original))
            for name in before.keys() - now.keys():
                delattr(original, name)

    @staticmethod
    def _write_attribute(original: Any, name: str, value: Any) -> None:
        replaced = vars(original).get(name)
        if isinstance(value, nnx.Variable) and isinstance(replaced, nnx.Variable):
            _keep_dtype(value, replaced.get_raw_value())
        setattr(original, name, nnx.data(value) if nnx.has_data(value) else value)


def _read(variable: Any) -> Any:
    """Returns the value of a variable, which may live in a mutable array."""
    value = variable.get_raw_value()
    return value[...] if variable.ref else value


def _write(variable: Any, value: Any) -> None:
    if variable.ref:
        variable.get_raw_value()[...] = value
    else:
        variable.set_raw_value(value)


def _keep_dtype(variable: Any, before: Any) -> None:
    value = variable.get_raw_value()
    if value is not before:
        variable.set_raw_value(keep_dtypes(value, before))


# --- Casting at every module ---


def _make_casting(module: Any, policies: PolicyMap, policy: Policy) -> None:
    """Turns a module of the working copy into one whose public methods cast."""
    change_class(module, functools.partial(_casting_class, original_class(module), policies, policy))
    if isinstance(module, nnx.Embed) and module.dtype == module.param_dtype:  # its way of saying None
        object.__setattr__(module, "dtype", policy.compute_dtype)


def _cached_activations(node: Any) -> list[Any]:
    """The variables of a module that hold nothing but its own earlier activations, and are updated in place."""
    is_attention = isinstance(node, nnx.MultiHeadAttention)
    return [v for v in vars(node).values() if isinstance(v, nnx.Cache)] if is_attention else []


@functools.cache
def _casting_class(cls: type, policies: PolicyMap, policy: Policy, names: tuple[str, ...], is_pytree: bool) -> type:
    """Derives a class whose methods cast. One per policy of a map: NNX caches traces by class."""
    del policies
    method = _cell_method if issubclass(cls, nnx.RNNCellBase) else _method
    methods = {name: method(inspect.getattr_static(cls, name), policy) for name in names}
    return derived_class(cls, methods, is_pytree=is_pytree)


def _method(function: Any, policy: Policy) -> Callable[..., Any]:
    @functools.wraps(function)
    def cast_method(self: Any, *args: Any, **kwargs: Any) -> Any:
        cast_args, cast_kwargs = _map_arrays(policy.cast_to_compute, (args, kwargs))
        output = _call_as(self, policy, function, cast_args, cast_kwargs)
        if getattr(self, "dtype", policy.compute_dtype) is None:
            output = _map_arrays(policy.cast_to_compute, output)
        caller = _CALLER.get()
        if caller is not None and policy != caller.policy:
            output = _map_arrays(policy.cast_to_output, output)
        entered_loop = caller is not None and any(loop not in caller.loops for loop in _active_loops())
        if entered_loop and args and not _has_nodes(args[0]):
            output = keep_carry(output, args[0])
        return output

    return cast_method


def _cell_method(function: Any, policy: Policy) -> Callable[..., Any]:
    """As ``_method``, for recurrent cells: their carry stays as it is, long sums must not be rounded at each step."""

    @functools.wraps(function)
    def cast_method(self: Any, carry: Any, *args: Any, **kwargs: Any) -> Any:
        cast_args, cast_kwargs = _map_arrays(policy.cast_to_compute, (args, kwargs))
        new_carry, output = _call_as(self, policy, function, (carry, *cast_args), cast_kwargs)
        output = _map_arrays(policy.cast_to_compute, output)
        caller = _CALLER.get()
        if caller is not None and policy != caller.policy:
            output = _map_arrays(policy.cast_to_output, output)
        return keep_dtypes(new_carry, carry), output

    return cast_method


def _call_as(module: Any, policy: Policy, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a method as the caller of whatever it calls; the variables of its module keep their dtypes."""
    variables = [(v, v.get_raw_value()) for v in vars(module).values() if isinstance(v, nnx.Variable)]
    token = _CALLER.set(_Caller(policy, _active_loops()))
    try:
        output = function.__get__(module, type(module))(*args, **kwargs)
    finally:
        _CALLER.reset(token)
    for variable, before in variables:
        _keep_dtype(variable, before)
    return output


def _has_nodes(tree: Any) -> bool:
    return any(map(is_node, jax.tree.leaves(tree, is_leaf=is_leaf)))


def _active_loops() -> tuple[int, ...]:
    """Names the NNX loops whose bodies are being traced."""
    loops = []
    for name in _LOOPS:
        with contextlib.suppress(ValueError):
            loops.append(id(nnx.current_update_context(name)))
    return tuple(loops)
