"""Analyses that read numbers say so where there are none, wherever the arrays without numbers come from."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jmp_lite import analysis
from jmp_lite.errors import InvalidAnalysisError, InvalidFunctionError

W = jnp.eye(4)


def loss(w):
    return jnp.sum(jnp.tanh(W @ w))


READERS = {
    "first_nonfinite": analysis.first_nonfinite,
    "compare": analysis.compare,
    "perturb": analysis.perturb,
    "recommend": lambda fun: lambda w: analysis.recommend(lambda w, _: fun(w), w, [(W,)] * 2),
}


@pytest.mark.parametrize("around", [jax.jit, jax.vmap, jax.grad], ids=["jit", "vmap", "grad"])
@pytest.mark.parametrize("name", READERS)
def test_traced_array_that_is_closed_over_is_refused(name, around):
    def inside(x):
        READERS[name](lambda w: loss(w) * x)(W)
        return x

    with pytest.raises(InvalidAnalysisError, match=f"{name} reads numbers on the host"):
        around(inside)(jnp.ones(2) if around is jax.vmap else jnp.float32(2))


@pytest.mark.parametrize("name", READERS)
def test_call_inside_jit_is_refused(name):
    """Its numbers are known, but what is computed from them is not."""

    def inside(x):
        READERS[name](loss)(W)
        return x

    with pytest.raises(InvalidAnalysisError, match=f"{name} reads numbers on the host"):
        jax.jit(inside)(1.0)


@pytest.mark.parametrize("name", [*READERS, "collect"])
def test_shape_is_refused(name):
    run = {**READERS, "collect": analysis.collect}[name]
    with pytest.raises(InvalidAnalysisError, match=r"ShapeDtypeStruct has none"):
        run(loss)(jax.ShapeDtypeStruct((4, 4), jnp.float32))


RESULTS = {
    "table": lambda x: analysis.ranges(x).table(),
    "by_scope": lambda x: analysis.ranges(x).by_scope(),
    "diagnose": lambda x: analysis.diagnose(analysis.ranges(x)),
    "report": lambda x: str(analysis.report(analysis.ranges(x))),
    "findings": lambda x: analysis.lost_updates(x, x).findings,
    "to_dict": lambda x: analysis.lost_updates(x, x).to_dict(),
    "diff": lambda x: analysis.diff({"w": x}, {"w": 1.0}),
}


@pytest.mark.parametrize("name", RESULTS)
def test_result_is_not_read_where_it_is_traced(name):
    with pytest.raises(InvalidAnalysisError, match="reads numbers on the host"):
        jax.jit(lambda x: (RESULTS[name](x), x)[1])(jnp.ones(3))


@pytest.mark.parametrize("name", ["first_nonfinite", "compare", "perturb", "collect"])
def test_module_is_to_be_split(name):
    """There are no twins of the analyses for modules to send people to."""
    with pytest.raises(InvalidFunctionError, match=r"nnx\.split\(module\)"):
        getattr(analysis, name)(lambda model, x: model(x).sum())(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), W)


# --- Losses without a gradient ---


def loop(w):
    return jnp.sum(jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, W))[1])


def called_back(w):
    return jnp.sum(jax.pure_callback(lambda w: w, jax.ShapeDtypeStruct((4, 4), jnp.float32), w) @ w)


@pytest.mark.parametrize("fun", [loop, called_back])
def test_compare_compares_the_value_alone(fun):
    found = analysis.compare(fun)(W / 3)
    assert [result.path for result in found["mixed_bfloat16"].results] == ["loss"]
    assert [finding.kind for finding in found.findings] == ["no-gradient"]
    assert found["mixed_bfloat16"].error < 0.1


@pytest.mark.parametrize("fun", [loop, called_back])
@pytest.mark.parametrize("name", ["perturb", "recommend", "estimate"])
def test_analysis_of_gradients_says_what_to_do(name, fun):
    run = {**READERS, "estimate": lambda fun: analysis.estimate(fun, compiled=False)}[name]
    with pytest.raises(InvalidFunctionError, match=r"JAX has no gradient of this .*lax\.scan"):
        run(fun)(W / 3)


# --- Arguments that hold more than arrays ---


def test_module_of_equinox_is_recommended_and_estimated():
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))

    def loss(model, x):
        return jnp.mean(jnp.square(jax.vmap(eqx.nn.Sequential([model, eqx.nn.Dropout(0.0)]))(x)))

    found = analysis.recommend(loss, model, [(W,), (2 * W,)])
    assert found.error < 0.1
    assert found.cost.rows[0].flops == analysis.estimate(loss, compiled=False)(model, W).rows[0].flops
