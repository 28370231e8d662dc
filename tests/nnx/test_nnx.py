"""NNX functions under policies: the dtype of every matrix product, and of what crosses a border between policies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.jaxprs import contractions
from support.nnx_models import EVERY_MODEL, MODELS, Custom, Model, forward, linear

import jmp_lite as jmp
from jmp_lite.nnx import with_policy

HALF = "mixed_bfloat16"
pytestmark = pytest.mark.usefixtures("standard_promotion")


@functools.cache
def parts_of(name):
    """A model of the table, taken apart: making one is slower than everything else here."""
    return nnx.split(MODELS[name](nnx.Rngs(0)))


@pytest.fixture(params=EVERY_MODEL)
def model(request):
    return nnx.merge(*parts_of(request.param), copy=True)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(2, 16)), jnp.float32)


def products_by_part(model, policy, x):
    """The dtypes of the matrix products of a model, forward and backward, by the part that they belong to."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    wrapped = with_policy(forward, policy)

    def loss(params):
        return wrapped(nnx.merge(graphdef, params, rest, copy=True), x).sum()

    # jax.nn.dot_product_attention computes its logits in float32, and therefore the gradient of them.
    of_logits = "transpose(jvp(body))/vmap(BTNH,BSNH->BNTS)"
    products = [(scope, dtype) for scope, dtype in contractions(jax.grad(loss), params) if scope != of_logits]
    return {part: [dtype for scope, dtype in products if part in scope] for part in ("body", "head", "")}


# --- Which dtype every product has ---


def test_every_product_is_in_half_precision(model, x):
    """All products, forward and backward, are in the compute dtype, whatever the layers promote by themselves."""
    products = products_by_part(model, HALF, x)
    assert all(products.values())
    assert all(dtype == {"bfloat16"} for dtype in products[""])


@pytest.mark.parametrize(("full", "other"), [("head", "body"), ("body", "head")])
def test_each_part_follows_its_own_policy(model, full, other, x):
    """A map changes the products of the part that it names, and of no other."""
    products = products_by_part(model, jmp.PolicyMap({full: "full"}, HALF), x)
    assert all(products.values())
    assert all(dtype == {"float32"} for dtype in products[full])
    assert all(dtype == {"bfloat16"} for dtype in products[other])


def test_layers_agree_under_strict_promotion(x):
    """No layer is ever handed operands of two precisions: strict promotion would forbid it."""
    with jax.numpy_dtype_promotion("strict"):
        policy = jmp.PolicyMap({"body": "p=f32,c=f16,o=f16", "head": "full"}, HALF)
        products = products_by_part(Model(linear(nnx.Rngs(0))), policy, x)
    assert (products["body"][0], products["head"][0]) == ({"float16"}, {"float32"})


@pytest.mark.parametrize("name", ["image", "tokens", "attention", "scan", "decorated", "lstm"])
def test_values_are_near_those_of_float32(name, x):
    """A policy changes precision, not meaning; outputs have the output dtype."""
    graphdef, state = parts_of(name)

    def outputs(state):
        policies = ["full", jmp.PolicyMap({"norm": "full"}, HALF)]
        return [with_policy(forward, policy)(nnx.merge(graphdef, state), x) for policy in policies]

    expected, output = jax.jit(outputs)(state)
    assert output.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(output - expected) < 0.05 * jnp.linalg.norm(expected) + 0.05


# --- What happens at the borders between policies ---


class Border(nnx.Module):
    """Returns what a submodule returned."""

    def __init__(self):
        self.body = Custom(nnx.Rngs(0))

    def __call__(self, x):
        return x, str(self.body(x).dtype)


@pytest.mark.parametrize(
    ("policies", "seen"),
    [
        ({}, "float32"),  # as the module computed it: the constant in Custom is float32
        ({"body": "p=f32,c=bf16,o=f32"}, "float32"),
        ({"body": "p=f32,c=f16,o=bf16"}, "bfloat16"),
        ({"body": "p=f32,c=f32,o=f16"}, "float16"),
        ({".*": "full"}, "float32"),
    ],
)
def test_outputs_are_cast_where_the_policy_changes(policies, seen, x):
    """The output dtype of a submodule counts where its policy differs from its caller's."""
    output, found = with_policy(forward, jmp.PolicyMap(policies, HALF))(Border(), x)
    assert (found, output.dtype) == (seen, jnp.float32)


@pytest.mark.parametrize("layer", ["BatchNorm", "LayerNorm", "Embed", "explicit"])
def test_layers_return_the_compute_dtype_unless_told_otherwise(layer, x):
    """Layers without a dtype follow the policy, even where Flax would promote; one with a dtype keeps it."""
    make = {
        "BatchNorm": lambda rngs: nnx.BatchNorm(16, rngs=rngs),
        "LayerNorm": lambda rngs: nnx.LayerNorm(16, rngs=rngs),
        "Embed": lambda rngs: nnx.Embed(16, 16, rngs=rngs),
        "explicit": lambda rngs: linear(rngs, dtype=jnp.float32),
    }
    model = nnx.List([make[layer](nnx.Rngs(0))])
    x = jnp.array([[1, 2]]) if layer == "Embed" else x
    found = with_policy(lambda model, x: str(model[0](x).dtype), HALF)(model, x)
    assert found == ("float32" if layer == "explicit" else "bfloat16")


@pytest.mark.parametrize("make", [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell])
@pytest.mark.parametrize(("policy", "output"), [(HALF, "bfloat16"), ("mixed_float16", "float32")])
def test_carries_of_cells_are_float32_and_their_outputs_are_not(make, policy, output, x):
    """What a cell carries from step to step is not rounded; what it hands on has the dtype of its policy."""
    model = nnx.Dict(cell=make(16, 16, rngs=nnx.Rngs(0)))

    def steps(model, x):
        carry = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.cell.initialize_carry(x.shape, nnx.Rngs(0)))
        for _ in range(2):
            carry, y = model.cell(carry, x)
        memory = jax.tree.leaves(carry)[0]
        return str(memory.dtype), str(y.dtype), jnp.any(memory != memory.astype(jnp.float16).astype(jnp.float32))

    assert with_policy(steps, jmp.PolicyMap({"cell": policy}, HALF))(model, x) == ("float32", output, True)


class Remembering(nnx.Module):
    """Replaces a variable, carried by a scan, by something in half precision."""

    def __init__(self):
        self.layer, self.state = linear(nnx.Rngs(0)), nnx.BatchStat(jnp.zeros((2, 16)))

    def __call__(self, x):
        self.state.set_value(self.layer(x))
        return x


def test_variables_carried_by_a_scan_keep_their_dtype(x):
    """The scan sees the dtype that the variable had, and so does the caller."""

    @nnx.scan(in_axes=(nnx.StateAxes({...: nnx.Carry}), nnx.Carry), out_axes=nnx.Carry, length=2)
    def step(model, x):
        return model(x)

    model = Remembering()
    with_policy(step, HALF)(model, x)
    assert model.state.get_value().dtype == jnp.float32
    np.testing.assert_allclose(model.state.get_value(), model.layer(x), rtol=0.05, atol=0.05)
