"""Laws of ``linen.with_policy`` and ``nnx.with_policy``: every model of the tables under every kind of policy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import linen_models, nnx_models
from support.comparisons import slow_but_for
from support.jaxprs import contractions, shape_of

import jmp_lite as jmp

pytestmark = pytest.mark.usefixtures("standard_promotion")

#: Policies, each with the dtype of the matmuls in the body of a model and in its head.
POLICIES = {
    "mixed_bfloat16": ("bfloat16", "bfloat16"),
    "p=f32,c=f16,o=bf16": ("float16", "float16"),
    "bf16-true": ("bfloat16", "bfloat16"),
    "full": ("float32", "float32"),
    jmp.PolicyMap({"head": "full"}, "mixed_bfloat16"): ("bfloat16", "float32"),
    jmp.PolicyMap({"body": "p=f16,c=f16,o=f16"}, "mixed_bfloat16"): ("float16", "bfloat16"),
}
every_policy = pytest.mark.parametrize(("policy", "products"), POLICIES.items(), ids=map(str, POLICIES))


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(2, 16)), jnp.float32)


@functools.cache
def linen_model(name):
    """A model, its statistics, and its parameters before any policy."""
    model = linen_models.MODELS[name]()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 16)))
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    return model, {key: value for key, value in variables.items() if key != "params"}, variables["params"]


@functools.cache
def nnx_model(name):
    """A model taken apart: making one is slower than everything else here."""
    return nnx.split(nnx_models.MODELS[name](nnx.Rngs(0)), nnx.Param, ...)


def linen_forwards(name, policy, x):
    """The parameters as the policy stores them, and functions of them: with the policy, and with autocast."""
    model, statistics, params = linen_model(name)

    def forward(wrap):
        apply = wrap(model.apply, policy)
        return lambda params: apply({**statistics, "params": params}, x, mutable=["batch_stats"])

    return jmp.get_policy(policy).cast_to_param(params), forward(jmp.linen.with_policy), forward(jmp.linen.autocast)


def nnx_forwards(name, policy, x):
    """The same for NNX; what is not a parameter is returned as the statistics are."""
    graphdef, params, rest = nnx_model(name)

    def forward(wrap):
        def run(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            output = wrap(nnx_models.forward, policy)(model, x)
            return output, nnx.split(model, nnx.Param, ...)[2]

        return run

    return jmp.get_policy(policy).cast_to_param(params), forward(jmp.nnx.with_policy), forward(jmp.nnx.autocast)


def cases(library, forwards, names):
    """Parameters of a test, with the marks that the table gives them."""
    marked = [pytest.param(name) if isinstance(name, str) else name for name in names]
    return [pytest.param(forwards, *p.values, marks=p.marks, id=f"{library}-{p.values[0]}") for p in marked]


every_model = pytest.mark.parametrize(
    ("forwards", "name"),
    cases("linen", linen_forwards, linen_models.EVERY_MODEL) + cases("nnx", nnx_forwards, nnx_models.EVERY_MODEL),
)
#: Models of which the forward matmuls alone are looked at: one that has no reverse mode, and one whose second matmul
#: has two terms and so, in the backward pass, the dtype in which its operands are stored.
FORWARD_ONLY = ("while", "lora")


def program(fun, *args):
    """A program as text, without the addresses of functions."""
    return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(fun)(*args)))


@pytest.mark.parametrize("policy", slow_but_for(tuple(POLICIES)[5:], POLICIES), ids=str)
@every_model
def test_with_policy_is_autocast_and_a_cast_of_the_results(forwards, name, policy, x):
    """The program is the same, state included; results have the output dtype, gradients that of the parameters."""
    params, with_policy, autocast = forwards(name, policy, x)
    default = policy.default if isinstance(policy, jmp.PolicyMap) else jmp.get_policy(policy)

    def cast(params):
        output, state = autocast(params)
        return default.cast_to_output(output), state

    assert program(with_policy, params) == program(cast, params)
    output, state = shape_of(with_policy, params)
    assert (set(jax.tree.leaves(output)), state) == ({default.output_dtype}, shape_of(autocast, params)[1])
    if name != "while":
        grad = jax.grad(lambda params: with_policy(params)[0].astype(jnp.float32).sum())
        assert shape_of(grad, params) == jax.tree.map(jnp.result_type, params)
    found = contractions(with_policy if name in FORWARD_ONLY else grad, params)
    for part, dtype in zip(("body", "head"), POLICIES[policy], strict=True):
        kinds = [kinds for scope, kinds in found if part in scope]
        assert kinds
        assert all(kind == {dtype} for kind in kinds)
