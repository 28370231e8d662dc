"""Policies at the boundary of a Linen model, or at each of its modules."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import jax

from jmp_lite._policy import Policy, PolicyMap, get_policy
from jmp_lite._tree import combine, is_array, keep_carry, keep_dtypes, map_leaves, partition, undo_cast

_INITS = ("init", "init_with_output", "lazy_init")
#: Keywords of ``apply`` that Flax takes for itself; all others go to the module.
_CONTROLS = ("rngs", "mutable", "method", "capture_intermediates")
#: How Flax marks, in the debugging path of a scope, the lifted transformations whose carry must keep its dtype.
_LOOPS = ("scan(", "while_loop(")


def with_policy(apply: Callable[..., Any], policy: str | Policy | PolicyMap) -> Callable[..., Any]:
    """Wraps ``model.apply`` or ``model.init``: computes in the policy's dtypes, keeps statistics as they are.

    Under ``apply`` the ``params`` collection and the floating inputs are cast to the compute dtype, the outputs to the
    output dtype. All other collections (``batch_stats``, ``cache``, ...) keep their dtypes, in and out; parameters that
    come back in an updated collection have their stored values and the parameter dtype. Gradients taken through the
    wrapper have the dtype of the parameters.

    Under ``init`` the model runs on the inputs as they are, and parameters are cast to the parameter dtype. The
    ``cache`` collection gets the dtypes that the model would give it under the policy: a decoder must be initialized
    under the policy that it runs under.

    A ``Policy`` is applied at the boundary of the model: float32 constants inside it promote what they meet, as
    everywhere in JAX. A ``PolicyMap`` acts at every module: parameters are cast by path, floating inputs of each
    public method to the compute dtype of its module, and outputs to the module's output dtype where its policy differs
    from that of the module that called it. ``PolicyMap({}, default=policy)`` therefore keeps the whole inside of a
    model in one precision. Recurrent cells take their carry as it is. Under both, the carry of ``nn.scan`` and
    ``nn.while_loop`` keeps its dtype.

    Args:
        apply: ``model.apply``, ``model.init``, ``model.init_with_output``, or a function with the signature of
            ``apply``; also as a ``functools.partial``, which is where ``mutable`` may be fixed in advance.
        policy: A policy, a policy string or a map. Paths of a map are those inside ``params``, such as
            ``encoder/Dense_0``; the default policy is that of the model itself.

    Returns:
        A function with the signature of ``apply``.

    Raises:
        UnknownDtypeError: If the policy string cannot be parsed.
        AmbiguousPolicyError: When called, if two patterns of a map contradict each other.

    Example:
        >>> import flax.linen as nn
        >>> class Model(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.Dense(1, name="head")(nn.relu(nn.Dense(4, name="body")(x)))
        >>> model, x = Model(), jnp.ones((2, 3))
        >>> variables = jmp.linen.with_policy(model.init, "mixed_bfloat16")(jax.random.key(0), x)
        >>> apply = jmp.linen.with_policy(model.apply, "mixed_bfloat16")
        >>> apply(variables, x).dtype, jax.grad(lambda v: apply(v, x).sum())(variables)["params"]["head"]["bias"].dtype
        (dtype('float32'), dtype('float32'))
        >>> policies = jmp.PolicyMap({"head": "full"}, default="mixed_bfloat16")
        >>> jaxpr = jax.make_jaxpr(jmp.linen.with_policy(model.apply, policies))(variables, x)
        >>> [str(eqn.outvars[0].aval.dtype) for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
        ['bfloat16', 'float32']

    References:
        Policies of whole modules are those of Haiku's ``mixed_precision`` (github.com/google-deepmind/dm-haiku).
    """
    resolved = get_policy(policy)
    function, args, kwargs = apply, (), {}
    if isinstance(apply, functools.partial):
        function, args, kwargs = apply.func, apply.args, apply.keywords
    wrap = _init_with_policy if getattr(function, "__name__", None) in _INITS else _apply_with_policy
    run = functools.partial(wrap(function, resolved), *args, **kwargs)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    return wrapped


def _replace(variables: Any, collection: str, cast: Callable[[Any], Any]) -> Any:
    """Casts one collection; what is not a dict of collections is left for Flax to complain about."""
    if not isinstance(variables, (dict, flax.core.FrozenDict)) or collection not in variables:
        return variables
    return flax.core.copy(variables, {collection: cast(variables[collection])})


def _init_with_policy(init: Any, policy: Any) -> Callable[..., Any]:
    def run(rngs: Any, *args: Any, **kwargs: Any) -> Any:
        result = init(rngs, *args, **kwargs)
        with_output = init.__name__ == "init_with_output"
        output, variables = result if with_output else (None, result)
        variables = _replace(variables, "params", policy.cast_to_param)
        if "cache" in variables:
            dtypes = _dtypes_of_cache(init.__self__.apply, policy, variables, args, {**kwargs, "rngs": rngs})
            cast = functools.partial(map_leaves, lambda path, leaf: leaf.astype(dtypes.get(path, leaf.dtype)))
            variables = _replace(variables, "cache", cast)
        return (policy.cast_to_output(output), variables) if with_output else variables

    return run


def _dtypes_of_cache(apply: Any, policy: Any, variables: Any, args: Any, kwargs: Any) -> dict[Any, Any]:
    """Finds the dtypes that the model gives its cache under the policy: only it knows what may be in half precision."""
    controls = {"mutable": True, "method": kwargs.get("method")}
    kwargs = {name: value for name, value in kwargs.items() if name == "rngs" or name not in _CONTROLS}
    rest = {name: collection for name, collection in variables.items() if name != "cache"}
    arrays, others, layout = partition(
        (rest, args, kwargs), lambda leaf: is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
    )

    def cache_of(arrays: list[Any]) -> Any:
        rest, args, kwargs = combine(arrays, others, layout)
        return _apply_with_policy(apply, policy)(rest, *args, **kwargs, **controls)[1]["cache"]

    shapes = jax.eval_shape(cache_of, arrays)
    return {path: shape.dtype for path, shape in _by_path(shapes).items()}


def _apply_with_policy(apply: Callable[..., Any], policy: Any) -> Callable[..., Any]:
    def run(variables: Any, *args: Any, **kwargs: Any) -> Any:
        controls = {name: kwargs.pop(name) for name in _CONTROLS if name in kwargs}
        cast = _replace(variables, "params", policy.cast_to_compute)
        if isinstance(policy, Policy):
            args, kwargs = policy.cast_to_compute((args, kwargs))
        with nn.intercept_methods(_Interceptor(policy)):
            result = apply(cast, *args, **kwargs, **controls)
        if controls.get("mutable", False) is False and not controls.get("capture_intermediates"):
            return policy.cast_to_output(result)
        output, updated = result
        updated = _replace(_restore(updated, variables, cast), "params", policy.cast_to_param)
        return policy.cast_to_output(output), updated

    return run


def _by_path(tree: Any) -> dict[Any, Any]:
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def _restore(updated: Any, variables: Any, cast: Any) -> Any:
    """Undoes the cast of what the model left alone, and gives the rest the dtype in which it came in."""
    stored, given = _by_path(variables), _by_path(cast)

    def restored(path: Any, leaf: Any) -> Any:
        return undo_cast(leaf, given[path], stored[path]) if path in stored else leaf

    return map_leaves(restored, updated)


class _Caller(NamedTuple):
    """Who calls a module: its policy, and the root of its scope, which every lifted transformation replaces."""

    policy: Policy
    root: Any


class _Interceptor:
    """Casts at the method calls of one ``apply``; Flax calls it around each of them."""

    def __init__(self, policies: Policy | PolicyMap) -> None:
        self.policies = policies
        self.default = policies if isinstance(policies, Policy) else policies.default
        self.callers = [_Caller(self.default, None)]

    def __call__(self, method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, name, caller = context.module, context.method_name, self.callers[-1]
        if module.scope is None or name == "setup":
            return method(*args, **kwargs)
        if hasattr(type(module), name):
            path = "/".join(module.scope.path)
            policy = self.policies.policy_for(path) if path else self.default
        else:  # a lifted function, which Flax passes off as a method of its first argument
            policy = caller.policy
        is_public = hasattr(type(module), name) and (name == "__call__" or not name.startswith("_"))
        if is_public and isinstance(self.policies, PolicyMap):
            is_cell = isinstance(module, nn.RNNCellBase) and name == "__call__"
            method = functools.partial(_call_cell if is_cell else _call_module, method, module, policy, caller.policy)
        self.callers.append(_Caller(policy, module.scope.root))
        try:
            if _is_loop_body(module.scope.root, caller.root):
                return _call_loop_body(method, module.scope, args, kwargs)
            return method(*args, **kwargs)
        finally:
            self.callers.pop()


def _call_module(
    method: Callable[..., Any], module: nn.Module, policy: Policy, outer: Policy, /, *args: Any, **kwargs: Any
) -> Any:
    del module
    args, kwargs = policy.cast_to_compute((args, kwargs))
    output = method(*args, **kwargs)
    return output if policy == outer else policy.cast_to_output(output)


def _call_cell(
    method: Callable[..., Any], cell: nn.Module, policy: Policy, outer: Policy, /, carry: Any, *args: Any, **kwargs: Any
) -> Any:
    """Calls a recurrent cell, whose carry stays as it is: long sums must not be rounded at each step."""
    given = carry
    if isinstance(cell, nn.OptimizedLSTMCell):  # multiplies h itself, without a submodule that would cast it
        given = carry[0], policy.cast_to_compute(carry[1])
    args, kwargs = policy.cast_to_compute((args, kwargs))
    new_carry, output = method(given, *args, **kwargs)
    output = policy.cast_to_compute(output)
    return keep_dtypes(new_carry, carry), output if policy == outer else policy.cast_to_output(output)


def _is_loop_body(root: Any, outer_root: Any) -> bool:
    """Whether a call is the body of a lifted loop, not one made by a module or function running in it."""
    return root != outer_root and bool(root.debug_path) and any(loop in root.debug_path[-1] for loop in _LOOPS)


def _call_loop_body(method: Callable[..., Any], scope: Any, args: Any, kwargs: Any) -> Any:
    """Calls a method so that its first argument, the carry, and the variables of its scope keep their dtypes."""
    before = jax.tree.map(lambda leaf: leaf, scope.mutable_variables())
    result = method(*args, **kwargs)
    for collection, variables in scope.mutable_variables().items():
        old = before.get(collection, {})
        for name, value in _restore(variables, old, old).items():
            scope.put_variable(collection, name, value)
    return keep_carry(result, args[0] if args else None)
