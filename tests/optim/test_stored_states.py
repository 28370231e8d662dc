"""The state of `stored`: other code maps over it and holds it, and what does not belong to it is refused."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from support.comparisons import apply_updates, assert_identical, slow_but_for, standard
from support.storage import KEPT, SHAPES, adam, gradients, weights

import jmp_lite as jmp
from jmp_lite.optim import stored

# --- optax.tree.map_params ---

LABELS = {"kernel": "trained", "bias": "frozen", "gain": "trained"}
MATRICES = {"kernel": True, "bias": False, "gain": False}
INNER = {
    "adam": adam(),
    "chain": standard(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2, momentum=0.9))),
    "frozen": standard(optax.multi_transform({"trained": optax.adam(1e-2), "frozen": optax.set_to_zero()}, LABELS)),
    "hyperparameters": standard(optax.inject_hyperparams(optax.adam)(1e-2)),
    "decay": standard(optax.chain(optax.masked(optax.add_decayed_weights(0.1), MATRICES), optax.lion(1e-2))),
}
AROUND = {
    "alone": lambda tx: tx,
    "loss_scaled": jmp.loss_scaled,
    "chain": lambda tx: optax.chain(optax.identity(), tx),
}


class Pair(NamedTuple):
    shape: tuple
    name: str


def is_masked(node):
    return isinstance(node, optax.MaskedNode)


def with_norms_in_float32(full):
    return jmp.PolicyMap({"bias|gain": "float32"}, default="bfloat16").cast_to_param(full)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("params", ["split8", "stochastic"])
@pytest.mark.parametrize("inner", slow_but_for(("adam", "frozen"), INNER))
def test_specs_of_parameters_become_those_of_the_state(inner, params, around, rng):
    """Of every moment and of low bits, in the structure of the state, so that both map together."""
    tx = AROUND[around](stored(INNER[inner], params=params, state="8bit"))
    leaves = with_norms_in_float32(weights(rng, jnp.float32))
    state = jax.eval_shape(tx.init, leaves)
    specs = optax.tree.map_params(
        tx,
        lambda leaf, name: leaf if is_masked(leaf) else name,
        state,
        {name: name for name in leaves},
        transform_non_params=lambda _: "one for all",
        is_leaf=is_masked,
    )
    pairs = jax.tree.map(lambda leaf, name: Pair(leaf.shape, name), state, specs)
    named = jax.tree.leaves(pairs, is_leaf=lambda node: isinstance(node, Pair))
    shapes = {name: leaf.shape for name, leaf in leaves.items()} | {"one for all": ()}
    assert all(shapes[name] == shape for shape, name in named)
    assert {"kernel", "one for all"} <= {name for _, name in named}


def test_a_state_that_was_mapped_without_its_formats_is_refused(rng):
    tx = stored(adam(), **KEPT)
    leaves = weights(rng)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, tx.init(leaves))
    with pytest.raises(jmp.errors.InvalidStorageError, match=r"made by optax\.tree\.map_params.*jax\.tree\.map"):
        tx.update(gradients(rng), mapped, leaves)


def test_a_group_without_parameters_is_no_mistake(rng):
    groups = {name: stored(adam(), params="split16") for name in ("used", "empty")}
    tx = optax.multi_transform(groups, dict.fromkeys(weights(rng), "used"))
    leaves = weights(rng)
    updates, _ = tx.update(gradients(rng), tx.init(leaves), leaves)
    assert (updates["kernel"] != 0).any()


# --- Paths ---


def test_bits_depend_on_the_path_and_not_on_how_it_prints():
    params = {"a/b": jnp.ones((64, 8), jnp.bfloat16), "a": {"b": jnp.ones((64, 8), jnp.bfloat16)}}
    tx = stored(optax.sgd(1e-3, momentum=0.9), params="stochastic", state="8bit")
    updates, state = tx.update(jax.tree.map(lambda x: jnp.full(x.shape, 0.9), params), tx.init(params), params)
    for tree in (updates, state.inner_state[0].trace):
        assert not np.array_equal(tree["a/b"], tree["a"]["b"])
    assert len(jmp.optim.saturated(state)) == 1


@pytest.mark.parametrize("params", ["split8", "stochastic"])
@pytest.mark.parametrize("around", ["alone", "loss_scaled"])
def test_nnx_optimizer_stores_what_the_plain_step_stores(around, params, rng):
    """It passes variables to `init`, and the arrays in them to `update`: their paths differ."""
    tx = AROUND[around](stored(adam(), params=params, state="8bit"))
    model = nnx.Linear(*SHAPES["kernel"], rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    leaves = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer, opt_state = nnx.Optimizer(model, tx, wrt=nnx.Param), tx.init(leaves)
    for _ in range(3):
        grads = {
            name: jnp.asarray(rng.standard_normal(leaf.shape) * 2**15, jnp.float32) for name, leaf in leaves.items()
        }
        of_model = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(of_model, grads)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, of_model)
        updates, opt_state = tx.update(grads, opt_state, leaves)
        leaves = apply_updates(leaves, updates)
    held = nnx.state(model, nnx.Param)
    assert_identical(nnx.to_pure_dict(held), leaves)
    full = jmp.optim.full_precision_params(optimizer.opt_state, held)
    assert_identical(nnx.to_pure_dict(full), jmp.optim.full_precision_params(opt_state, leaves))
    assert leaves["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("checked", [True, False], ids=["check_vma", "unchecked"])
def test_specs_may_be_a_prefix(checked, rng):
    shapes = dict.fromkeys("ab", (16, 4))
    leaves, grads = weights(rng, shapes=shapes), gradients(rng, shapes=shapes)
    whole = stored(optax.sgd(2.0**-7), params="stochastic")
    expected, _ = whole.update(grads, whole.init(leaves), leaves)
    tx = stored(optax.sgd(2.0**-7), params="stochastic", specs=P("x"))
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",), axis_types=(AxisType.Auto,))
    update = jax.shard_map(
        tx.update, mesh=mesh, in_specs=(P("x"), P(), P("x")), out_specs=(P("x"), P()), check_vma=checked
    )
    updates, _ = jax.jit(update)(grads, tx.init(leaves), leaves)
    assert_identical(updates, expected)


# --- What it costs to choose formats ---


@pytest.mark.parametrize("inner", ["adam", "chain", "frozen"])
def test_an_optimizer_is_tried_on_one_parameter(inner):
    """However many there are."""
    sizes = []

    def init(params):
        sizes.append(len(jax.tree.leaves(params)))
        return INNER[inner].init(params)

    recorded = optax.GradientTransformationExtraArgs(init, INNER[inner].update)
    leaves = {name: jnp.ones((2, 2), jnp.bfloat16) for name in LABELS}
    state = stored(recorded, **KEPT).init(leaves)
    assert sizes[0] == 3
    assert set(sizes[1:]) <= {1}
    alone = stored(INNER[inner], **KEPT).init(leaves)
    assert jax.tree.structure(state) == jax.tree.structure(alone)


# --- What is refused ---

LEAVES = {"w": jnp.ones(3, jnp.bfloat16)}
GRADS = {"w": jnp.ones(3)}
TX = stored(adam(), params="split8")
STATE = TX.init(LEAVES)
EIGHT_BIT = stored(adam(), **KEPT).init(LEAVES)
WRONG = {
    "gradients and state swapped": (lambda: TX.update(STATE, GRADS, LEAVES), "must be a StoredState, got dict"),
    "state of the bare optimizer": (lambda: TX.update(GRADS, adam().init(LEAVES), LEAVES), "StoredState, got tuple"),
    "no state": (lambda: TX.update(GRADS, None, LEAVES), "StoredState, got NoneType"),
    "another tree": (lambda: TX.update({"v": jnp.ones(3)}, STATE, LEAVES), "different trees.*update.updates, state"),
    "another shape": (lambda: TX.update({"w": jnp.ones(4)}, STATE, LEAVES), r"'w' is float32\[4\], but the parameter"),
    "whole numbers": (lambda: TX.update({"w": jnp.ones(3, jnp.int32)}, STATE, LEAVES), r"'w' is int32\[3\]"),
    "parameters of 32 bits": (
        lambda: TX.update(GRADS, STATE, GRADS),
        r"\['w'\] was bfloat16 and is not one.*optax\.apply_updates, which keeps dtypes",
    ),
    "moments in float32": (
        lambda: TX.update(GRADS, optax.tree.set(EIGHT_BIT, mu=GRADS), LEAVES),
        r"moment \[0\]\.mu\['w'\] of the state is float32\[3\].*Ratio.*opt_state=",
    ),
    "low bits of another format": (
        lambda: TX.update(GRADS, stored(adam(), params="split16").init(LEAVES), LEAVES),
        r"low bits in int16\[3\].*params='split8' keeps int8.*from_full_precision\(tx, full_precision_params",
    ),
    "no low bits": (
        lambda: TX.update(GRADS, stored(adam(), params="stochastic").init(LEAVES), LEAVES),
        "has no low bits of parameters, and params='split8' keeps int8",
    ),
    "low bits for nothing": (
        lambda: stored(adam(), params="stochastic").update(GRADS, STATE, LEAVES),
        r"low bits in int8\[3\] of parameters, and params='stochastic' keeps none",
    ),
    "a moment less": (
        lambda: TX.update(GRADS, optax.tree.set(EIGHT_BIT, mu={"w": None}), LEAVES),
        r"no moment \[0\]\.mu\['w'\] any more",
    ),
    "of another dtype": (
        lambda: TX.update(GRADS, STATE, {"w": jnp.ones(3, jnp.float16)}),
        r"\['w'\] was bfloat16 and is float16",
    ),
    "specs without a leaf": (
        lambda: stored(adam(), params="split8", specs={}).init(LEAVES),
        "specs has nothing for 'w'",
    ),
    "specs of text": (lambda: stored(adam(), params="split8", specs={"w": "x"}).init(LEAVES), "'x' for 'w'"),
    "a seed that is a truth": (lambda: stored(adam(), seed=True), "seed must be .* got True"),
    "an optimizer in the wrong place": (lambda: jmp.optim.from_full_precision(LEAVES, TX), "takes an Optax optimizer"),
    "saturated parameters": (lambda: jmp.optim.saturated(LEAVES), "of type dict"),
    "weights of another model": (
        lambda: jmp.optim.full_precision_params(STATE, {"v": GRADS["w"]}),
        r"low bits of \['w'\]",
    ),
    "weights of another shape": (
        lambda: jmp.optim.full_precision_params(STATE, {"w": jnp.ones(4, jnp.bfloat16)}),
        r"low bits of \['w'\], which the parameters do not have in that shape",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_belong_together_is_refused(call, message):
    with pytest.raises(jmp.errors.JmpLiteError, match=message):
        call()


def test_seeds_may_be_integers_of_any_kind():
    updates = [stored(optax.sgd(1e-3), params="stochastic", seed=seed).update for seed in (3, np.int64(3))]
    state = stored(optax.sgd(1e-3), params="stochastic").init(LEAVES)
    assert_identical(*(update(GRADS, state, LEAVES) for update in updates))


# --- Optimizers whose parameters are another tree than gradients ---


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "two calls"])
@pytest.mark.parametrize("kept", [True, False], ids=["stored", "float32"])
def test_lookahead(kept, fused):
    """Fast and slow weights; a skipped step leaves both, -0.0 too."""
    inner = standard(optax.lookahead(optax.sgd(0.5), 2, 0.5))
    tx = jmp.loss_scaled(stored(inner, params="split16") if kept else inner, jmp.StaticLossScale(4.0))
    start = {"w": jnp.array([-0.0, 1.0, 2.0], jnp.bfloat16 if kept else jnp.float32)}
    params, wanted = (
        optax.LookaheadParams.init_synced(jax.tree.map(cast, start)) for cast in (lambda x: x, jnp.float32)
    )
    opt_state, inner_state = tx.init(params), inner.init(wanted)

    def two_calls(grads, opt_state, params):
        updates, opt_state = tx.update(grads, opt_state, params)
        return apply_updates(params, updates), opt_state

    step = jax.jit(functools.partial(jmp.apply_gradients, tx) if fused else two_calls)
    skipped, _ = step({"w": jnp.full(3, jnp.nan)}, opt_state, params)
    assert_identical(skipped, params)
    for _ in range(3):
        params, opt_state = step({"w": jnp.full(3, 4.0)}, opt_state, params)
        updates, inner_state = inner.update({"w": jnp.ones(3)}, inner_state, wanted)
        wanted = apply_updates(wanted, updates)
    full = jmp.optim.full_precision_params(opt_state, params) if kept else params
    assert_identical(full, wanted)
