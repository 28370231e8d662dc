"""``diagnose``: planted numbers are found by kind and place; healthy training steps raise no alarm."""

import functools

import jax
import jax.numpy as jnp
import pytest
from support import autocast_models
from support.audit_clean import as_loss
from support.audit_faults import as_users_have_it

import jmp_lite as jmp
from jmp_lite.analysis import collect, diagnose, ranges

# --- Healthy steps ---


def gradients(case, policy, scale, rng):
    """The ranges of a scaled loss and its gradients by all floating arrays of a case."""
    leaves, tree = jax.tree.flatten(case.args(rng))
    is_float = [hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    floats = [leaf for leaf, ok in zip(leaves, is_float, strict=True) if ok]

    def loss(floats):
        rest = iter(floats)
        filled = [next(rest) if ok else leaf for leaf, ok in zip(leaves, is_float, strict=True)]
        return as_loss(case.fun)(*jax.tree.unflatten(tree, filled)) * scale

    with as_users_have_it():
        return jax.jit(collect(jax.value_and_grad(jmp.autocast(loss, policy))))(floats)[1]


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "scale"), [("mixed_bfloat16", 1.0), ("mixed_float16", 2.0**8)])
@pytest.mark.parametrize("name", autocast_models.CASES)
def test_healthy_step_raises_no_alarm(name, policy, scale, rng):
    found = gradients(autocast_models.CASES[name], policy, scale, rng)
    assert any(row.site and row.site.is_backward for row in found.rows)
    for held in ("bfloat16", "float16"):
        assert [str(f) for f in diagnose(found, format=held)] == []


def mlp(params, x):
    for index, w in enumerate(params):
        with jax.named_scope(f"layer_{index}"):
            x = jax.nn.relu(x @ w)
    return jnp.mean(jnp.square(x))


def weights(rng, *gains):
    return [jnp.asarray(rng.normal(size=(16, 16)) * gain / 4, jnp.float32) for gain in gains]


@functools.cache
def compiled_step(policy):
    fun = jmp.autocast(lambda params, x, scale: mlp(params, x) * scale, policy)
    return jax.jit(collect(jax.value_and_grad(fun)))


def step(params, x, policy="mixed_float16", scale=1.0):
    return compiled_step(policy)(params, x, jnp.float32(scale))[1]


@pytest.mark.parametrize(("policy", "scale"), [("mixed_bfloat16", 1.0), ("mixed_float16", 2.0**10), ("full", 1.0)])
def test_small_network_raises_no_alarm(policy, scale, rng):
    """With the exact zeros of its ReLUs, half of all numbers."""
    found = step(weights(rng, 1, 1, 1), jnp.asarray(rng.normal(size=(8, 16)), jnp.float32), policy, scale)
    assert any(r.zero > r.count // 4 for r in found.values())
    for held in ("bfloat16", "float16", "int8"):
        assert [str(f) for f in diagnose(found, format=held)] == []


# --- Planted numbers ---


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def nan_in_layer(rng):
    w = weights(rng, 1, 1, 1)
    w[1] = w[1].at[0, 0].set(jnp.nan)
    return step(w, normal(rng, 8, 16), "full")


def grown(rng, *gains, **how):
    return step(weights(rng, *gains), normal(rng, 8, 16), **{"policy": "full"} | how)


def positive(rng):
    """Sums in which nothing cancels."""
    return step([jnp.abs(w) for w in weights(rng, 1, 1e3, 1e3)], jnp.abs(normal(rng, 8, 16)))


def outlier(rng):
    return step(weights(rng, 1, 1, 1), normal(rng, 8, 16).at[0, 0].set(1e3), "full")


def dead(rng):
    return step([-jnp.abs(normal(rng, 16, 9)), normal(rng, 9, 16)], jnp.abs(normal(rng, 8, 16)), "full")


# What makes the ranges, the format, the kind of the finding and its scope.
FAULTS = {
    "a NaN": (nan_in_layer, "float16", "nan", "layer_1"),
    "beyond float16": (lambda rng: grown(rng, 1, 1e6, 1), "float16", "overflow", "layer_1"),
    "infinite in float16": (positive, "bfloat16", "overflow", "layer_2"),
    "tiny in float32": (lambda rng: grown(rng, 1, 1, 1, scale=1e-7), "float16", "gradient-underflow", "layer"),
    "tiny in float16": (
        lambda rng: grown(rng, 1, 1, 1, scale=1e-5, policy="mixed_float16"),
        *("float16", "gradient-underflow", "layer"),
    ),
    "named": (lambda rng: ranges({"w": normal(rng, 99) * 1e-7}, "grads"), "fp16", "gradient-underflow", "w"),
    "a layer that explodes": (lambda rng: grown(rng, 1, 1e3, 1), "bfloat16", "exploding", "layer_1"),
    "an outlier": (outlier, "int8", "lost-in-int8", "layer_0"),
    "a dead layer": (dead, "float16", "dead", "layer_1"),
    "no gradient": (lambda rng: ranges({"w": jnp.zeros(3)}, "gradient"), "bfloat16", "dead", "w"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_number_is_found(name, rng):
    make, held, kind, where = FAULTS[name]
    found = diagnose(make(rng), format=held)
    assert kind in {f.kind for f in found}
    assert any(where in f.scope and f.kind == kind and f.message.endswith(".") for f in found), found


@pytest.mark.parametrize(
    ("largest", "said"),
    [
        (2.0**-20, "a loss scale 2**24 = "),
        (2.0**-5, "a loss scale 2**19 = 524288 times"),
        (60000.0, "no loss scale helps"),
    ],
)
def test_scale_leaves_the_largest_gradient_another_doubling(largest, said):
    """65504 / 2**-5 is 2**20.99: twice the scale named would overflow after one doubling."""
    grads = jnp.asarray([largest, *[1e-9] * 9], jnp.float32)
    [found] = diagnose(ranges(grads, "gradient"))
    assert said in found.message


@pytest.mark.parametrize("kind", ["argument", "result", "parameter"])
def test_small_numbers_that_are_no_gradients_are_no_finding(kind):
    """Second moments of Adam among them."""
    assert diagnose(ranges({"nu": jnp.full(9, 1e-12)}, kind)) == ()


def test_weights_that_start_at_zero_are_not_dead(rng):
    found = step([*weights(rng, 1), jnp.zeros((16, 4))], normal(rng, 8, 16), "full")
    assert diagnose(found) == ()


def test_what_was_never_looked_at_has_no_finding(rng):
    fun = jax.jit(collect(lambda x: x @ x, when=lambda x: jnp.any(x > 1e30)))
    assert diagnose(fun(normal(rng, 4, 4))[1]) == ()


def test_an_array_without_a_name_is_called_the_array():
    [found] = diagnose(ranges(jnp.array([1.0, jnp.nan])))
    assert found.message == "1 of 2 numbers of the array are NaN."


def test_unknown_format_is_refused():
    with pytest.raises(jmp.errors.UnknownDtypeError, match="Unknown format 'float12'"):
        diagnose(ranges(jnp.ones(2)), format="float12")
