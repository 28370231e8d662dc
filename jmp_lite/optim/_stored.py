"""An optimizer that computes in float32 and stores parameters and state in fewer bytes between steps."""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmp_lite._compat import register_flax_serialization, varying_axes
from jmp_lite._dtypes import FLOAT32
from jmp_lite._messages import nearest, quote
from jmp_lite._rounding import counted_bits, key_at, step_key
from jmp_lite._tree import cast_to_full, is_array, is_inexact, is_narrow, leaf_key, path_string
from jmp_lite.errors import InvalidStorageError, MissingAxisError
from jmp_lite.optim._moments import StateFormat
from jmp_lite.optim._slots import Formats, Layout, check_formats, choose
from jmp_lite.optim._weights import WEIGHT_FORMATS, WeightFormat
from jmp_lite.scaling._in_state import is_stored, nodes
from jmp_lite.scaling._loss_scaled import check_optimizer, check_step, check_trees

#: The step for whose bits state is made; no step has this number.
_BEFORE = 2**32 - 1


class StoredState(NamedTuple):
    """State of ``stored``.

    Attributes:
        inner_state: State of the wrapped optimizer, with encoded moments.
        low: Low bits of the parameters, which the model does not see: a tree like the parameters, of ``int8`` or
            ``int16``, with ``optax.MaskedNode`` for leaves without low bits; ``None`` if the format has none.
            (Pass ``optax.tree.map_params`` an ``is_leaf`` that recognizes ``MaskedNode``.)
        step: ``uint32[]``, steps taken; seeds the random bits together with ``seed``.
        layout: How each moment is stored; no array.

    Example:
        >>> params = {"w": jnp.zeros(3, jnp.bfloat16)}
        >>> state = jmp.optim.stored(optax.rmsprop(1e-3), params="split8", state="8bit").init(params)
        >>> state.low["w"].dtype, state.inner_state[0].nu["w"].dtype
        (dtype('int8'), dtype('uint8'))
    """

    inner_state: Any
    low: Any
    step: jax.Array
    layout: Layout

    @property
    def params_in_float32(self) -> frozenset[str]:
        """For ``loss_scaled``: paths of the 16-bit parameters that it need not handle."""
        return frozenset(path for path, _ in self.layout.params)


@dataclasses.dataclass(frozen=True)
class _Bits:
    """Random bits for the arrays of one step."""

    key: jax.Array
    specs: dict[str, Any]

    def of(self, name: str, param: str) -> tuple[jax.Array, Any]:
        """The key of an array, and how it is sharded. Names are made by ``leaf_key``."""
        return key_at(self.key, name), self.specs.get(param)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _encoded_weight(weights: WeightFormat, full: jax.Array, key: jax.Array, spec: Any, dtype: Any) -> Any:
    """Traced once per shape, as the next two."""
    return weights.encode(full, counted_bits(key, full.shape, spec), dtype)


@functools.partial(jax.jit, static_argnums=0)
def _decoded(one: Any, stored: jax.Array, beside: Any) -> jax.Array:
    return _returned(one, "decode", one.decode(stored, beside), stored.shape, FLOAT32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _encoded_moment(one: StateFormat, value: jax.Array, other: Any, key: jax.Array, spec: Any) -> jax.Array:
    made = one.encode(value, counted_bits(key, value.shape, spec), other)
    return _returned(one, "encode", made, value.shape, one.dtype)


def _returned(one: Any, method: str, array: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """What a format made, or an error if it is something else."""
    if (array.shape, array.dtype) != (shape, dtype):
        raise InvalidStorageError(
            f"{method} of the format {quote(one)} returned {quote(array)}, and must return {np.dtype(dtype)} of the "
            f"shape {list(shape)}, that of the moment."
        )
    return array


@dataclasses.dataclass(frozen=True)
class _Stored:
    """The two functions of ``stored``, and what they share."""

    inner: optax.GradientTransformationExtraArgs
    weights: WeightFormat
    name: str
    formats: Formats
    seed: int
    specs: Any

    def init(self, params: Any) -> StoredState:
        jax.tree_util.tree_map_with_path(self._check, params)
        _check_some_narrow(params, self.name)
        register_flax_serialization(Layout, lambda _: {}, lambda layout, _: layout)
        low_dtype = self.weights.low_dtype
        low = None if low_dtype is None else jax.tree.map(functools.partial(_no_low, low_dtype), params)
        full = self._full(params, low)
        inner_state = self.inner.init(full)
        kept = choose(self.inner, inner_state, full, self.formats) if jax.tree.leaves(params) else None
        self._bits(jnp.zeros((), jnp.uint32), params)
        layout = Layout(kept, _narrow(params))
        return StoredState(encoded_at_first(inner_state, layout), low, jnp.zeros((), jnp.uint32), layout)

    def update(
        self, updates: Any, state: StoredState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, StoredState]:
        _check_step(updates, state, params)
        self._check_low(state.low)
        bits = self._bits(state.step, params)
        _refuse_forgotten_specs(params, bits)
        full = self._full(params, state.low)
        grads = cast_to_full(updates)
        steps, inner_state = self.inner.update(grads, decoded(state.inner_state, state.layout), full, **extra_args)

        def stepped(path: Any, param: Any, wide: Any, step: Any, low: Any) -> Any:
            if not is_narrow(param) or not is_array(step):
                return step, low
            name = leaf_key(path)
            sum_ = wide + step.astype(FLOAT32)
            new, low = _encoded_weight(self.weights, sum_, *bits.of(name, name), param.dtype)
            change = new.astype(FLOAT32) - param.astype(FLOAT32)
            return jnp.where(change == 0, np.float32(-0.0), change), low  # 0 would make 0 of -0

        both = jax.tree_util.tree_map_with_path(stepped, params, full, steps, _each(params, state.low))
        changes, low = (jax.tree.map(lambda _, pair, i=i: pair[i], params, both) for i in (0, 1))
        low = None if state.low is None else low
        return changes, StoredState(encoded(inner_state, state.layout, bits), low, state.step + 1, state.layout)

    def _bits(self, step: jax.Array, params: Any) -> _Bits:
        key = step_key(self.seed, step)
        if self.specs is None:
            return _Bits(key, {})
        known = dict(jax.tree_util.tree_leaves_with_path(self.specs, is_leaf=lambda x: isinstance(x, jax.P)))
        specs = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            found = [known[path[:end]] for end in range(len(path) + 1) if path[:end] in known]
            if is_array(leaf) and not (found and isinstance(found[0], jax.P)):
                raise InvalidStorageError(
                    f"specs has {quote(found[0]) if found else 'nothing'} for {path_string(path)!r}, and takes the "
                    "PartitionSpec of each parameter, in a tree like the parameters or a prefix of one."
                )
            specs[leaf_key(path)] = found[0] if found else None
        return _Bits(key, specs)

    def _full(self, params: Any, low: Any) -> Any:
        return jax.tree.map(
            lambda param, low: _decoded(self.weights, param, low) if is_narrow(param) else param,
            params,
            _each(params, low),
        )

    def _check(self, path: Any, leaf: Any) -> None:
        if not is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return
        name = path_string(path)
        if self.name == "float32" and is_narrow(leaf):
            raise InvalidStorageError(
                f"Parameter {name!r} is {quote(leaf)}, and params='float32' takes what is float32: updates would be "
                "lost in its rounding. Choose params='split8', 'split16' or 'stochastic'."
            )
        if leaf.dtype.itemsize < 2:
            raise InvalidStorageError(
                f"Parameter {name!r} is {quote(leaf)}, and params={self.name!r} takes bfloat16, float16 and "
                "float32. Cast it, or keep it out with optax.masked."
            )

    def _check_low(self, low: Any) -> None:
        """Raises for the state of another format of parameters, of whose low bits this one would make other numbers."""
        wanted = self.weights.low_dtype
        others = [leaf for leaf in jax.tree.leaves(low) if leaf.dtype != wanted]
        if others or (low is None) != (wanted is None):
            raise InvalidStorageError(
                f"The state has {'no low bits' if low is None else f'low bits in {quote((others or [low])[0])}'} of "
                f"parameters, and params={self.name!r} keeps {wanted or 'none'}. Convert it: from_full_precision(tx, "
                "full_precision_params(opt_state, params), opt_state=opt_state)."
            )


def _refuse_forgotten_specs(params: Any, bits: _Bits) -> None:
    """Raises if parameters are sharded over axes that the step is not, and ``specs`` does not say how."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        axes = varying_axes(leaf) - varying_axes(bits.key) if is_array(leaf) else frozenset()
        if axes and leaf_key(path) not in bits.specs:
            raise MissingAxisError(
                f"Parameter {path_string(path)!r} is sharded over {' and '.join(map(repr, sorted(axes)))}, and its "
                "shards would all be rounded with the same random bits. Write stored(..., specs=...), with the "
                "PartitionSpecs that shard_map has for the parameters."
            )


def _no_low(low_dtype: Any, param: Any) -> Any:
    """The low bits of a parameter without a float32 original."""
    return jnp.zeros_like(param, dtype=low_dtype) if is_narrow(param) else optax.MaskedNode()


def _each(params: Any, low: Any) -> Any:
    """Low bits in the structure of the parameters."""
    return jax.tree.map(lambda _: None, params) if low is None else low


def _narrow(params: Any) -> frozenset[tuple[str, str]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return frozenset((leaf_key(path), str(leaf.dtype)) for path, leaf in leaves if is_narrow(leaf))


def _check_step(updates: Any, state: Any, params: Any) -> None:
    """Raises for arguments of ``update`` that do not belong together."""
    check_step(state, params, StoredState, "stored", InvalidStorageError)
    if state.layout.kept is None and jax.tree.leaves(params):
        raise InvalidStorageError(
            "The state was made by optax.tree.map_params, which does not know how moments are stored. Use what it "
            "returns for shardings and the like, and write jax.tree.map(fun, opt_state) for a state."
        )
    was, now = dict(state.layout.params), dict(_narrow(params))
    for path in sorted(path for path in was.keys() | now.keys() if was.get(path) != now.get(path)):
        raise InvalidStorageError(
            f"The 16-bit parameters are not those of init: {path} was {was.get(path, 'not one')} and is "
            f"{now.get(path, 'not one')}. Pass what the last step returned, from optax.apply_updates, which keeps "
            "dtypes, unlike equinox.apply_updates; or make a new state."
        )
    check_trees(updates, params, "update(updates, state, params)")


def _check_some_narrow(params: Any, name: str) -> None:
    leaves = [leaf for leaf in jax.tree.leaves(params) if is_inexact(leaf)]
    if name != "float32" and leaves and not any(map(is_narrow, leaves)):
        raise InvalidStorageError(
            f"params={name!r} keeps parameters of 16 bits, and these are all {quote(leaves[0])} or the like. Write "
            "params, opt_state = jmp_lite.optim.from_full_precision(tx, params)."
        )


def encoded(inner_state: Any, layout: Layout, bits: _Bits) -> Any:
    """Encodes the float32 moments of a state."""
    leaves, treedef = _flattened(inner_state, layout)
    all_kept = layout.kept or ()
    read_again, known = {kept.other for kept in all_kept}, dict(enumerate(leaves))
    for kept in all_kept:
        value = leaves[kept.leaf].astype(FLOAT32)
        beside = None if kept.other is None else known[kept.other].astype(FLOAT32)
        leaves[kept.leaf] = _encoded_moment(kept.format, value, beside, *bits.of(f"state{kept.key}", kept.param))
        if kept.leaf in read_again:
            known[kept.leaf] = _decoded(kept.format, leaves[kept.leaf], beside)
    return jax.tree.unflatten(treedef, leaves)


def _flattened(inner_state: Any, layout: Layout) -> tuple[list[Any], Any]:
    """Leaves and structure of a state that has its moments where ``init`` made them."""
    found, treedef = jax.tree_util.tree_flatten_with_path(inner_state)
    names = [leaf_key(path) for path, _ in found]
    moved = [kept.key for kept in layout.kept or () if names[kept.leaf : kept.leaf + 1] != [kept.key]]
    if moved:
        gone = [key for key in moved if key not in names] or moved
        raise InvalidStorageError(
            f"The state of the optimizer has no moment {gone[0]} any more, which init made. Pass gradients of all "
            "parameters, and the state that the last step returned."
        )
    return [leaf for _, leaf in found], treedef


def encoded_at_first(inner_state: Any, layout: Layout) -> Any:
    """The same where no step has been taken."""
    return encoded(inner_state, layout, _Bits(step_key(0, jnp.asarray(_BEFORE, jnp.uint32)), {}))


def saturated(opt_state: Any) -> dict[str, jax.Array]:
    """Returns the saturated share of each 8-bit moment: elements at the largest number of the format.

    It reads a byte per parameter, so call it when you log. If a share is not 0, clip gradients, or resume from a
    checkpoint with a higher range, such as ``{"nu": optim.Log(highest=20)}``, and ``migrate=True``, which converts: the
    same bytes mean different numbers in another range.

    Args:
        opt_state: State of an optimizer made by ``stored``, or any state that holds it.

    Returns:
        ``float32[]`` by path, the largest of moments whose paths read alike; moments of 16 or more bits are not listed.

    Raises:
        InvalidStorageError: If the state holds no state of ``stored``.

    Example:
        >>> tx = jmp.optim.stored(optax.adam(1e-3), params="split8", state="8bit")
        >>> params = {"w": jnp.zeros(4, jnp.bfloat16)}
        >>> _, state = tx.update({"w": jnp.array([1e4, 1.0, 0.0, 1e4])}, tx.init(params), params)
        >>> print(jmp.optim.saturated(state)["0/nu/w"])
        0.5
    """
    shares: dict[str, jax.Array] = {}
    for state in stored_states(opt_state):
        leaves = jax.tree_util.tree_leaves_with_path(state.inner_state)
        for kept in state.layout.kept or ():
            path, leaf = leaves[kept.leaf]
            if kept.format.largest and leaf.size:
                is_largest = [leaf == np.asarray(code, kept.format.dtype) for code in kept.format.largest]
                share, name = jnp.mean(functools.reduce(operator.or_, is_largest)), path_string(path)
                shares[name] = jnp.maximum(share, shares[name]) if name in shares else share
    return shares


def decoded(inner_state: Any, layout: Layout) -> Any:
    """Undoes ``encoded``."""
    leaves, treedef = _flattened(inner_state, layout)
    for kept in layout.kept or ():
        if leaves[kept.leaf].dtype != kept.format.dtype:
            raise InvalidStorageError(
                f"The moment {kept.key} of the state is {quote(leaves[kept.leaf])}, and is stored in the format "
                f"{quote(kept.format)}. Write float32 moments with from_full_precision(tx, weights, opt_state=...)."
            )
        beside = None if kept.other is None else leaves[kept.other].astype(FLOAT32)
        leaves[kept.leaf] = _decoded(kept.format, leaves[kept.leaf], beside)
    return jax.tree.unflatten(treedef, leaves)


def stored_states(opt_state: Any) -> list[StoredState]:
    """Returns every ``StoredState`` in a state, or raises if there is none."""
    found = [node for _, node in nodes(opt_state, is_stored)]
    if not found:
        raise InvalidStorageError(
            f"No state of jmp_lite.optim.stored in the state, which is of type {type(opt_state).__name__}. Pass the "
            "state of an optimizer wrapped in it."
        )
    return found


def stored(
    inner: optax.GradientTransformation,
    *,
    params: str = "float32",
    state: Formats = "float32",
    seed: int = 0,
    specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer to store each parameter and its state in 4 to 6 bytes, and train like float32.

    A step decodes both to float32, runs ``inner``, and encodes: elementwise, in one pass over memory. Random bits for
    rounding are a hash of the seed, the step, the path of a leaf and the position of an element, so they are the same
    on all devices, under every sharding, and after a restart.

    Args:
        inner: Any Optax transformation; it receives the extra arguments of ``update``.
        params: How to store ``bfloat16`` and ``float16`` parameters (float32 ones stay unchanged): ``"split16"``, 16
            more bits in the state, exact for bfloat16; ``"split8"``, 8 more bits; ``"stochastic"``, no more bits,
            unbiased; ``"nearest"``, no more bits, loses updates below half a unit; ``"float32"``: there are no 16-bit
            parameters.
        state: How to store moments: ``"8bit"``, ``"bfloat16"`` or ``"float32"`` for all, or a format for each path
            pattern, such as ``{"mu": "ratio", "nu": "log"}``; patterns as in ``PolicyMap``. Formats are the names
            ``"log"`` (nonnegative), ``"slog"`` (signed), ``"ratio"`` (relative to ``nu``), ``"bfloat16"``,
            ``"float16"``, both also with ``"-nearest"``, and ``"float32"``; or objects such as
            ``optim.Log(highest=20)``. ``"8bit"`` is ``"ratio"`` and ``"log"`` for Adam, ``"slog"`` for a momentum
            without ``nu``.
        seed: Of the random bits.
        specs: PartitionSpecs of the parameters, a tree like them or a prefix of one; required inside ``shard_map`` over
            sharded parameters.

    Returns:
        A transformation whose state is a ``StoredState``. ``optax.apply_updates`` gives exactly the stored parameters.
        Wrap ``chain``, ``masked`` and ``inject_hyperparams`` in it; wrap it in ``loss_scaled`` and ``MultiSteps``. What
        follows it in a chain must not change updates: parameters would no longer be those that it stores.

    Raises:
        InvalidStorageError: For an unknown format; in ``init`` for a pattern that matches nothing, and for parameters
            that the format cannot hold; in ``update`` without ``params``, or with others than the state was made for.
        InvalidStepError: In ``update``, if gradients and parameters are different trees.
        MissingAxisError: In ``update`` inside ``shard_map``, for sharded parameters without ``specs``.

    Warns:
        UncompressedStateWarning: In ``init``, for state that ``"8bit"`` or ``"bfloat16"`` leaves in float32.

    Example:
        >>> tx = jmp.optim.stored(optax.adam(1e-3), params="split8", state="8bit")
        >>> params, opt_state = jmp.optim.from_full_precision(tx, {"w": jnp.ones((4, 4))})
        >>> updates, opt_state = tx.update({"w": jnp.ones((4, 4))}, opt_state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> print(params["w"][0, 0], jmp.optim.full_precision_params(opt_state, params)["w"][0, 0])
        1 0.999008

    References:
        Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv:1502.02551 (stochastic rounding); Zamirai
        et al., "Revisiting BFloat16 Training", arXiv:2010.06192; Dettmers et al., "8-bit Optimizers via Block-wise
        Quantization", arXiv:2110.02861; FlashOptim, arXiv:2602.23349 (split parameters).
    """
    names = [*WEIGHT_FORMATS, "float32"]
    if params not in names:
        meant = nearest(params, names, 3) if isinstance(params, str) else []
        hint = f" Did you mean {meant[0]!r}?" if meant else ""
        raise InvalidStorageError(
            f"params={quote(params)} is not a format of parameters.{hint} There are {', '.join(map(repr, names))}."
        )
    check_optimizer(inner, "stored")
    check_formats(state)
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise InvalidStorageError(f"seed must be a whole number from 0 to 2**32 - 1, got {quote(seed)}.")
    weights = WEIGHT_FORMATS.get(params, WEIGHT_FORMATS["nearest"])
    made = _Stored(optax.with_extra_args_support(inner), weights, params, state, int(seed), specs)
    return optax.GradientTransformationExtraArgs(made.init, made.update)


def master_weights(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keeps float32 weights behind 16-bit parameters: ``stored(inner, params="split16")``.

    It stores two bytes per parameter besides the model's two, where a float32 copy would take four.

    Args:
        inner: Any Optax transformation.

    Returns:
        See ``stored``.

    Example:
        >>> tx = jmp.optim.master_weights(optax.sgd(1e-4))
        >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
        >>> updates, state = tx.update({"w": jnp.ones(2, jnp.bfloat16)}, tx.init(params), params)
        >>> print(jmp.optim.full_precision_params(state, params)["w"])
        [0.9999 0.9999]

    References:
        NVIDIA Apex, ``amp`` at ``O2``; Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740.
    """
    return stored(inner, params="split16")


def stochastic_rounding(inner: optax.GradientTransformation, seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """Rounds 16-bit parameters stochastically, without bias: ``stored(inner, params="stochastic")``.

    Args:
        inner: Any Optax transformation.
        seed: Of the random bits.

    Returns:
        See ``stored``.

    Example:
        >>> tx = jmp.optim.stochastic_rounding(optax.sgd(1e-3))
        >>> params = {"w": jnp.ones(10_000, jnp.bfloat16)}
        >>> updates, _ = tx.update({"w": jnp.ones(10_000)}, tx.init(params), params)
        >>> mean = optax.apply_updates(params, updates)["w"].astype(jnp.float32).mean()
        >>> bool(0.9985 < mean < 0.9995)
        True

    References:
        Zamirai et al., "Revisiting BFloat16 Training", arXiv:2010.06192.
    """
    return stored(inner, params="stochastic", seed=seed)
