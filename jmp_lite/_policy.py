"""Precision policies: the dtypes of parameters, computation and outputs.

A ``Policy`` is a triple of dtypes with three pure casts. A ``PolicyMap`` gives each module its own. Both answer
``policy_for(path)``, which is all that the rest of the library asks of them.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._dtypes import (
    ACCEPTED_NAMES,
    FLOAT32,
    DType,
    advice,
    canonical,
    dtype_name,
    dtype_to_names,
    parse_dtype,
    warn_if_slow,
)
from jmp_lite._messages import nearest, quote, warn
from jmp_lite._patterns import (
    compile_pattern,
    is_misspelt,
    is_plain,
    is_scattered,
    nearest_modules,
    searchable,
    without_numbers,
)
from jmp_lite._tree import Path, cast_floating, cast_leaf, is_array, map_leaves, path_string
from jmp_lite.errors import (
    InvalidPolicyError,
    UnknownDtypeError,
    UnmatchedRuleWarning,
)

T = TypeVar("T")


def _floating(field: str, value: Any) -> DType:
    """Converts a dtype field to a floating dtype, or raises with the reason."""
    if isinstance(value, str):
        try:
            return parse_dtype(value)
        except UnknownDtypeError:
            raise UnknownDtypeError(
                f"Unknown dtype {quote(value)} for {field}.{advice(value)} Accepted: {ACCEPTED_NAMES}."
            ) from None
    is_dtype = value is not None and not is_array(value)  # NumPy reads None as float64 and an array as its dtype
    dtype: DType | None = None
    with contextlib.suppress(TypeError, ValueError):
        dtype = np.dtype(value).newbyteorder("=") if is_dtype else None
    if dtype is None or dtype.type not in dtype_to_names:
        # Any class at all is "object" to NumPy.
        described = quote(value) if dtype is None or dtype.kind == "O" else str(dtype)
        recipe = advice("int8") if described == "int8" else ""
        raise InvalidPolicyError(
            f"{field} must be a floating-point dtype, got {described}.{recipe} Accepted names: {ACCEPTED_NAMES}."
        )
    return dtype


def _holds_jax_arrays(tree: Any) -> bool:
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Policy:
    """Dtypes of parameters, of computation and of outputs, with the casts between them.

    The casts touch arrays of float16, bfloat16, float32 and of any dtype named by the policy. Integers, booleans,
    complex numbers, PRNG keys, ``float0``, ``None``, Python scalars, strings and loss scales pass through untouched; so
    do float8 and (with x64 enabled) float64 arrays unless the policy names them.

    Args:
        param_dtype: Dtype in which parameters are stored and updated. Give dtypes as anything NumPy accepts or as a
            name such as ``"bf16"``.
        compute_dtype: Dtype of the arithmetic.
        output_dtype: Dtype of the results of the wrapped function.
        reduce_dtype: Dtype of gradient reductions across devices; ``None`` means float32.

    Raises:
        InvalidPolicyError: If a dtype is not floating-point.
        UnknownDtypeError: If a name is unknown.

    Example:
        >>> policy = jmp.Policy("float32", jnp.bfloat16, np.float32)
        >>> print(policy)
        p=full,c=bf16,o=full
        >>> policy.cast_to_compute({"w": jnp.ones(2), "step": jnp.int32(1)})["w"].dtype
        dtype(bfloat16)

    References:
        jmp (github.com/google-deepmind/jmp) defines the same triple. Micikevicius et al., "Mixed Precision Training",
        arXiv:1710.03740.
    """

    param_dtype: DType
    compute_dtype: DType
    output_dtype: DType
    reduce_dtype: DType | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for field in ("param_dtype", "compute_dtype", "output_dtype"):
            object.__setattr__(self, field, _floating(field, getattr(self, field)))
        if self.reduce_dtype is not None:
            object.__setattr__(self, "reduce_dtype", _floating("reduce_dtype", self.reduce_dtype))

    @property
    def named_dtypes(self) -> frozenset[DType]:
        """The dtypes of the three casts: arrays of these are cast even if the format is not a standard one."""
        return frozenset(map(canonical, (self.param_dtype, self.compute_dtype, self.output_dtype)))

    def cast_to_param(self, tree: T) -> T:
        """Casts the floating arrays of a tree to ``param_dtype``."""
        return cast_floating(tree, self.param_dtype, self.named_dtypes)

    def cast_to_compute(self, tree: T) -> T:
        """Casts the floating arrays of a tree to ``compute_dtype``.

        Warns:
            SlowDtypeWarning: Once, if the device has no fast units for that dtype.
        """
        if _holds_jax_arrays(tree):
            warn_if_slow(self.compute_dtype)
        return cast_floating(tree, self.compute_dtype, self.named_dtypes)

    def cast_to_output(self, tree: T) -> T:
        """Casts the floating arrays of a tree to ``output_dtype``."""
        return cast_floating(tree, self.output_dtype, self.named_dtypes)

    def with_output_dtype(self, output_dtype: Any) -> "Policy":
        """Returns the same policy with another output dtype."""
        return dataclasses.replace(self, output_dtype=output_dtype)

    def policy_for(self, path: str) -> "Policy":
        """Returns the policy of the module or parameter at a path: this one, for all of them."""
        return self.key_and_policy(path)[1]

    def key_and_policy(self, path: str) -> "tuple[str | None, Policy]":
        """Returns the same, after the key of a ``PolicyMap`` that chose it: here none did."""
        del path
        return None, self

    def all_policies(self) -> "list[Policy]":
        """Returns this one, where a ``PolicyMap`` returns all that it holds."""
        return [self]

    def __str__(self) -> str:
        fields = [("p", self.param_dtype), ("c", self.compute_dtype), ("o", self.output_dtype)]
        if self.reduce_dtype is not None:
            fields.append(("r", self.reduce_dtype))
        return ",".join(f"{key}={dtype_name(dtype)}" for key, dtype in fields)


_KEYS = {"p": "param", "params": "param", "param": "param"}
_KEYS |= {"c": "compute", "compute": "compute", "o": "output", "output": "output"}
_KEYS |= {"r": "reduce", "reduce": "reduce"}
_HOW_TO_WRITE_PARTS = (
    "Write parts as 'key=dtype', separated by single commas, with the keys params (p), compute (c), output (o), "
    "reduce (r)."
)


def _mixed(half: Any) -> Policy:
    return Policy(FLOAT32, half, FLOAT32)


def _uniform(dtype: Any) -> Policy:
    return Policy(dtype, dtype, dtype)


#: Names from other systems: Keras, Lightning, Apex (whose O1 and O2 store float32 and compute in float16).
ALIASES: Mapping[str, Policy] = {
    "mixed_float16": _mixed(jnp.float16),
    "mixed_bfloat16": _mixed(jnp.bfloat16),
    "16-mixed": _mixed(jnp.float16),
    "bf16-mixed": _mixed(jnp.bfloat16),
    "16-true": _uniform(jnp.float16),
    "bf16-true": _uniform(jnp.bfloat16),
    "32-true": _uniform(jnp.float32),
    "64-true": _uniform(np.float64),
    "o0": _uniform(jnp.float32),
    "o1": _mixed(jnp.float16),
    "o2": _mixed(jnp.float16),
    "o3": _uniform(jnp.float16),
}


def _dtype_in(spec: str, name: str) -> DType:
    try:
        return parse_dtype(name)
    except UnknownDtypeError:
        is_whole = "=" not in spec
        is_policy = " That is a whole policy: write it alone." if name.strip().lower() in ALIASES else ""
        raise UnknownDtypeError(
            f"Unknown dtype {quote(name.strip())} in policy {quote(spec)}."
            f"{is_policy or advice(name, ALIASES if is_whole else ())} Accepted dtypes: {ACCEPTED_NAMES}; accepted "
            f"policies: {', '.join(ALIASES)}, one dtype for everything, or 'p=...,c=...,o=...,r=...' with any of the "
            "parts."
        ) from None


def _parse_parts(spec: str) -> Policy:
    """Parses ``"p=f32,c=bf16"``: params default to float32, compute to params, output to compute."""
    dtypes: dict[str, DType] = {}
    for part in spec.split(","):
        key, _, name = part.partition("=")
        field = _KEYS.get(key.strip().lower())
        if part.count("=") != 1:
            raise UnknownDtypeError(
                f"Part {quote(part.strip())} of policy {quote(spec)} is not 'key=dtype'. {_HOW_TO_WRITE_PARTS}"
            )
        if field is None:
            near = "".join(
                f" Did you mean {known!r}?" for known in nearest(key.strip(), _KEYS, len(key.strip()) // 2)[:1]
            )
            raise UnknownDtypeError(
                f"Unknown key {quote(key.strip())} in part {quote(part.strip())} of policy {quote(spec)}.{near} "
                f"{_HOW_TO_WRITE_PARTS}"
            )
        if field in dtypes:
            raise UnknownDtypeError(f"Key {key.strip()!r} is given twice in policy {quote(spec)}. Keep one of them.")
        dtypes[field] = _dtype_in(spec, name)
    param = dtypes.get("param", FLOAT32)
    compute = dtypes.get("compute", param)
    return Policy(param, compute, dtypes.get("output", compute), reduce_dtype=dtypes.get("reduce"))


@overload
def get_policy(spec: "str | Policy") -> Policy: ...
@overload
def get_policy(spec: "PolicyMap") -> "PolicyMap": ...
@overload
def get_policy(spec: "PolicyLike") -> "Policy | PolicyMap": ...
def get_policy(spec: "PolicyLike") -> "Policy | PolicyMap":
    """Returns the policy for a string.

    Ignores case and spaces. Accepts

    - jmp's grammar, ``"params=float32,compute=bfloat16,output=float32"`` or ``"p=f32,c=bf16"``: parameters default to
      float32, compute to the parameters' dtype, output to compute's; ``reduce=`` (``r=``) is new;
    - one dtype for everything: ``"bf16"``, ``"float32"``, ``"half"``, ``"full"``;
    - ``"mixed_float16"``, ``"mixed_bfloat16"`` (Keras), ``"16-mixed"``, ``"bf16-mixed"``, ``"16-true"``,
      ``"bf16-true"``, ``"32-true"``, ``"64-true"`` (Lightning), ``"O0"`` to ``"O3"`` (Apex). The mixed ones keep
      parameters and outputs in float32. 16-bit parameters, as in ``"bf16-true"``, ``"16-true"`` and ``"O3"``, train
      only under ``optim.master_weights``, ``optim.stochastic_rounding`` or another form of ``optim.stored``.

    Args:
        spec: A string as above, or a policy, which is returned unchanged.

    Returns:
        A ``Policy`` (the ``PolicyMap`` itself if that was given). ``get_policy(str(policy)) == policy``.

    Raises:
        UnknownDtypeError: If the string cannot be parsed; a ``ValueError``.
        InvalidPolicyError: If ``spec`` is neither a string nor a policy; a ``TypeError``.

    Example:
        >>> print(jmp.get_policy("mixed_bfloat16"))
        p=full,c=bf16,o=full
        >>> print(jmp.get_policy("c=f16"))
        p=full,c=f16,o=f16
    """
    if isinstance(spec, (Policy, PolicyMap)):
        return spec
    if not isinstance(spec, str):
        raise InvalidPolicyError(
            f"A policy must be a string, a Policy or a PolicyMap, got {quote(spec)}. Write for example "
            + ("PolicyMap({...}, default='full')." if isinstance(spec, Mapping) else "get_policy('mixed_bfloat16').")
        )
    if "=" in spec:
        return _parse_parts(spec)
    alias = ALIASES.get(spec.strip().lower())
    return alias or _uniform(_dtype_in(spec, spec))


def _prefixes(path: str) -> Iterator[str]:
    """Yields a path and its ancestors, deepest first: ``a/b/c``, ``a/b``, ``a``."""
    yield path
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class PolicyMap:
    r"""A policy per module, chosen by path; used wherever a ``Policy`` is.

    A key is a regular expression over whole path segments. It applies to the module or parameter that it names,
    anywhere in the path, and to everything inside. A key that equals the path, or its deepest ancestor, beats every
    pattern. Two patterns that both match with different policies raise an error. Flags such as ``(?i)`` come first and
    apply to the whole pattern; ``^`` and ``$`` match the ends of a parameter's path, not of a module's.

    Plain names are looked up in a table, so a map can have many. Regular expressions search paths of up to 1000
    characters; one with catastrophic backtracking raises an error. Casting a tree warns about a key that matched
    nothing but differs only by a typo from a module that no other key names.

    Args:
        policies: Maps patterns to policies or policy strings.
        default: Policy, or policy string, for everything that no pattern matches, and for the model's inputs and
            outputs.

    Raises:
        InvalidPolicyError: If something is not a policy, or a policy is itself a ``PolicyMap``; on look-up, if patterns
            contradict each other.
        InvalidPatternError: If a pattern is not a regular expression; on look-up, if a path is too long for it.
        UnknownDtypeError: If a policy string cannot be parsed.

    Example:
        >>> policies = jmp.PolicyMap({r"norm_\d+": "full", "head": "p=f32,c=bf16,o=f32"}, default="mixed_float16")
        >>> print(policies.policy_for("decoder/norm_3/scale"))
        p=full,c=full,o=full
        >>> policies.cast_to_compute({"head": {"kernel": jnp.ones(2)}})["head"]["kernel"].dtype
        dtype(bfloat16)

    References:
        Keras' ``DTypePolicyMap`` has the same rules for exact keys and for contradictions.
    """

    policies: tuple[tuple[str, Policy], ...]
    default: Policy
    _exact: Mapping[str, Policy] = dataclasses.field(compare=False)
    _plain: Mapping[int, frozenset[str]] = dataclasses.field(compare=False)
    """The keys without special characters, by their number of segments."""
    _searches: tuple[tuple[str, Callable[[str], Any]], ...] = dataclasses.field(compare=False)
    _unmatched: set[str] = dataclasses.field(compare=False)
    """The keys that have matched nothing so far, and that no warning has named."""
    _seen: set[int] = dataclasses.field(compare=False)
    """Hashes of the paths of the trees that have been looked at for misspelt keys."""

    def __init__(self, policies: Mapping[str, str | Policy], default: str | Policy) -> None:
        if not isinstance(policies, Mapping):
            raise InvalidPolicyError(
                f"policies must map patterns to policies, got {quote(policies)}. Write {{pattern: policy}}."
            )
        for key, policy in [*policies.items(), ("default", default)]:
            if not isinstance(key, str):
                raise InvalidPolicyError(f"A pattern of a PolicyMap must be a string, got {quote(key)}.")
            if isinstance(policy, PolicyMap):
                raise InvalidPolicyError(f"The policy of {quote(key)} is itself a PolicyMap. Merge the two into one.")
        exact = {key: get_policy(policies[key]) for key in sorted(policies)}
        searches = {key: compile_pattern(key) for key in exact}
        plain = {key: key.count("/") + 1 for key in exact if is_plain(key)}
        fields = {
            "policies": tuple(exact.items()),
            "default": get_policy(default),
            "_exact": exact,
            "_plain": {n: frozenset(key for key in plain if plain[key] == n) for n in set(plain.values())},
            "_searches": tuple((key, search) for key, search in searches.items() if key not in plain),
            "_unmatched": set(exact),
            "_seen": set(),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def policy_for(self, path: str) -> Policy:
        """Returns the policy of the module or parameter at a path such as ``decoder/layers_3/kernel``."""
        return self.key_and_policy(path)[1]

    def key_and_policy(self, path: str) -> tuple[str | None, Policy]:
        """Returns the key, the first of several with one policy, that decides at a path, and the policy."""
        keys = self._keys_of(path)
        self._unmatched.difference_update(keys)
        if len(keys) > 1 and len({self._exact[key] for key in keys}) > 1:
            listed = " and ".join(f"{quote(key)} ({self._exact[key]})" for key in keys[:5])
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise InvalidPolicyError(
                f"Path {quote(path)} matches {listed}{more}. Make the patterns exclusive, or name the path itself."
            )
        return (keys[0], self._exact[keys[0]]) if keys else (None, self.default)

    def _keys_of(self, path: str) -> list[str]:
        """Returns the key that is the path or its deepest ancestor, or else all that match it."""
        for prefix in _prefixes(path):
            if prefix in self._exact:
                return [prefix]
        segments = path.split("/")
        found = [key for key, search in self._searches if search(searchable(path))]
        for n, keys in self._plain.items():
            parts = ("/".join(segments[i : i + n]) for i in range(len(segments) - n + 1))
            found += [part for part in parts if part in keys]
        return sorted(set(found))

    def all_policies(self) -> list[Policy]:
        """Returns the default policy and those of all patterns."""
        return [self.default, *(policy for _, policy in self.policies)]

    def _cast(self, tree: T, dtype_of: Callable[[Policy], DType]) -> T:
        paths: list[str] = []
        dtypes = {policy: (dtype_of(policy), policy.named_dtypes) for policy in self.all_policies()}

        def by_path(path: Path, leaf: Any) -> Any:
            paths.append(path_string(path))
            return cast_leaf(leaf, *dtypes[self.policy_for(paths[-1])])

        result = map_leaves(by_path, tree)
        self._warn_of_misspelt_keys(paths)
        return result

    def _warn_of_misspelt_keys(self, paths: list[str]) -> None:
        """Warns about keys that nearly name a module; keys far from all names may be meant for another tree."""
        trees = len(self._seen)
        self._seen.add(hash(tuple(paths)))
        if not self._unmatched or len(self._seen) == trees:
            return
        misspelt = self._misspelt_keys(paths)
        self._unmatched.difference_update(misspelt)
        if misspelt:
            listed = " and ".join(f"{quote(key)} (nearest: {module!r})" for key, module in [*misspelt.items()][:5])
            more = f" and {len(misspelt) - 5} more" if len(misspelt) > 5 else ""
            warn(
                f"No path matches {listed}{more} of the PolicyMap. Write keys as the segments of paths are written, "
                f"such as {paths[0]!r}.",
                UnmatchedRuleWarning,
            )

    def _misspelt_keys(self, paths: list[str]) -> dict[str, str]:
        """Returns the keys that are probably meant for this tree, and the modules that they may mean."""
        unmatched = sorted(self._unmatched)  # of this moment: another thread may cast too
        segments = {segment for path in paths for segment in path.split("/")}
        unlike = list({without_numbers(path): path for path in reversed(paths)}.values())[::-1]
        meant: dict[str, str] = {}
        for key in dict.fromkeys(map(without_numbers, unmatched)):
            near = nearest_modules(key, unlike, len(key) // 3)[:1]
            if near and is_misspelt(key, near[0]) and self._unmatched.issuperset(self._keys_of(near[0])):
                meant[key] = near[0]
        scattered = [key for key in unmatched if is_scattered(key, segments)]
        found = {key: nearest_modules(key.replace(".", "/").rpartition("/")[2], unlike)[0] for key in scattered}
        found |= {key: meant[without_numbers(key)] for key in unmatched if without_numbers(key) in meant}
        return dict(sorted(found.items()))

    def cast_to_param(self, tree: T) -> T:
        """Casts each floating array to the ``param_dtype`` of the policy at its path.

        Warns:
            UnmatchedRuleWarning: Once, if a key that has matched nothing so far is nearly the name of a module.
        """
        return self._cast(tree, lambda policy: policy.param_dtype)

    def cast_to_compute(self, tree: T) -> T:
        """Casts each floating array to the ``compute_dtype`` of the policy at its path.

        Warns:
            SlowDtypeWarning: Once, if the device has no fast units for a dtype that the map asks for.
            UnmatchedRuleWarning: As ``cast_to_param``.
        """
        if _holds_jax_arrays(tree):
            for dtype in {policy.compute_dtype for policy in self.all_policies()}:
                warn_if_slow(dtype)
        return self._cast(tree, lambda policy: policy.compute_dtype)

    def cast_to_output(self, tree: T) -> T:
        """Casts the model's outputs, which have no module path, to the ``output_dtype`` of the default policy."""
        named = frozenset[DType]().union(*(policy.named_dtypes for policy in self.all_policies()))
        return cast_floating(tree, self.default.output_dtype, named)

    def with_output_dtype(self, output_dtype: Any) -> "PolicyMap":
        """Returns the same map with another output dtype of the default policy."""
        return PolicyMap(dict(self.policies), self.default.with_output_dtype(output_dtype))

    def __str__(self) -> str:
        return "; ".join([*(f"{key}: {policy}" for key, policy in self.policies), f"default: {self.default}"])

    def __repr__(self) -> str:
        policies = {key: str(policy) for key, policy in self.policies}
        return f"PolicyMap({policies!r}, default={str(self.default)!r})"


PolicyLike = str | Policy | PolicyMap
