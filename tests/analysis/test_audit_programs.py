"""``audit`` goes into programs inside the program: a mistake is the same wherever it stands."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support.audit_clean import audited, lines_of
from support.audit_faults import BF16, F32, FAULTS, X32, array

import jmp_lite as jmp
from jmp_lite import analysis


def custom(fun):
    """A function with its own derivative."""
    wrapped = jax.custom_jvp(fun)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(fun, primals, tangents))
    return wrapped


def checked(fun):
    """The body of a loop that is done after one round."""

    def looped(*args):
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(fun, *args))
        return lax.while_loop(lambda state: state[0] < 1, lambda state: (state[0] + 1, fun(*args)), (0, start))[1]

    return looped


PLACES = {
    "jit": jax.jit,
    "jit in jit": lambda fun: jax.jit(jax.jit(fun)),
    "checkpoint": jax.checkpoint,
    "custom_jvp": custom,
    "cond": lambda fun: lambda *args: lax.cond(args[0].ravel()[0] > 0, fun, fun, *args),
    "scan": lambda fun: lambda *args: lax.scan(lambda carry, _: (carry, fun(*args)), 0, None, length=1)[1],
    "while": checked,
}
MISTAKES = [
    *(
        "1e5 in float16",
        "mask of -1e9",
        "epsilon of zero",
        "bound of one",
        "positions",
        "softmax",
        "logsumexp",
        "variance",
    ),
    *("carried sum", "segment_sum", "router", "constant", "weight", "island", "scan", "accumulation", "kernel"),
]


@pytest.mark.covering(1)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_found_inside(name, place):
    fault = FAULTS[name]
    found = audited(dataclasses.replace(fault, fun=place(fault.fun), where=fault.fun))
    assert lines_of(found.findings, fault.kind) == {fault.line}


def test_value_is_followed_out_of_a_body_and_into_another():
    """Exponentials of one function, their sum in another, the division outside of both."""
    exponentials = jax.jit(jnp.exp)
    total = jax.jit(lambda e: e.sum(-1, keepdims=True))

    def fun(x):
        e = exponentials(x)
        return e / total(e)

    assert [f.kind for f in analysis.audit(fun)(array(BF16, 8, 64)).findings] == ["softmax-in-16-bits"]


def test_carry_of_layers_is_no_sum():
    """A residual stream adds what depends on it, as every network does."""

    def layer(x, w):
        return x + jnp.tanh(x @ w), None

    fun = lambda x, ws: lax.scan(layer, x, ws)[0]  # noqa: E731
    assert analysis.audit(fun)(array(BF16, 8, 16), array(BF16, 24, 16, 16)).findings == ()


def test_pattern_of_a_policy_map_that_matches_nothing_is_found():
    policy = jmp.PolicyMap({"decoder": "full"}, default="mixed_bfloat16")
    [found] = analysis.audit(lambda x: x @ x.T, policy)(X32).findings
    assert found.kind == "unmatched-rule"
    assert "'decoder'" in found.message


def test_other_warnings_are_passed_on():
    def fun(x):
        import warnings

        warnings.warn("of the user's own", UserWarning, stacklevel=1)
        return x

    with pytest.warns(UserWarning, match="of the user's own"):
        analysis.audit(fun)(array(F32, 3))


def test_what_has_its_gradient_is_not_differentiated_again():
    """A gradient, or a step, looks like a loss with auxiliary output."""
    w = jnp.ones((4, 4))
    gradient = jax.value_and_grad(lambda w: jnp.sum(jnp.tanh(w @ w)))
    for fun in (gradient, lambda w: (gradient(w)[0], w - 0.1 * gradient(w)[1])):
        assert not analysis.audit(fun)(w).is_loss
    assert analysis.audit(lambda w: (jnp.sum(jnp.tanh(w @ w)), {"n": 1}))(w).is_loss
