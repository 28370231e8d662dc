"""Linen models under policies: the dtype of every matrix product, and of what crosses a border between policies."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.jaxprs import contractions, dtypes, shape_of
from support.linen_models import (
    EVERY_MODEL,
    MODELS,
    Border,
    Denoiser,
    Looped,
    Remembering,
    Replacing,
    Setup,
    Unrolled,
    random_variables,
)

import jmp_lite as jmp
from jmp_lite.linen import with_policy

HALF = "mixed_bfloat16"


@pytest.fixture(params=EVERY_MODEL)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(2, 16)), jnp.float32)


def products_by_part(model, policy, x, rng):
    """The dtypes of the matrix products of a model, forward and backward, by the part that they belong to."""
    apply = with_policy(functools.partial(model.apply, mutable=["batch_stats"]), policy)
    variables = random_variables(model, x, rng)

    def loss(params):
        return sum(output.sum() for output in jax.tree.leaves(apply({**variables, "params": params}, x)[0]))

    reversible = not isinstance(model, Looped)
    products = contractions(jax.grad(loss) if reversible else loss, variables["params"])
    return {part: [dtype for scope, dtype in products if part in scope] for part in ("body", "head", "")}


@contextlib.contextmanager
def outputs_of_modules():
    """Collects, for every call of a module, its name and the dtypes of what it returns."""
    found = []

    def spy(method, args, kwargs, context):
        output = method(*args, **kwargs)
        found.append((context.module.name, *(str(leaf.dtype) for leaf in jax.tree.leaves(output))))
        return output

    with nn.intercept_methods(spy):
        yield found


# --- Which dtype every product has ---


@pytest.mark.usefixtures("standard_promotion")
def test_every_product_is_in_half_precision(model, x, rng):
    """Under a map without patterns all products, forward and backward, are in the compute dtype."""
    products = products_by_part(model, jmp.PolicyMap({}, HALF), x, rng)
    assert all(products.values())
    assert all(dtype == {"bfloat16"} for dtype in products[""])


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("full", "other"), [("head", "body"), ("body", "head")])
def test_each_part_follows_its_own_policy(model, full, other, x, rng):
    """A map changes the products of the part that it names, and of no other."""
    products = products_by_part(model, jmp.PolicyMap({full: "full"}, HALF), x, rng)
    assert all(products.values())
    assert all(dtype == {"float32"} for dtype in products[full])
    assert all(dtype == {"bfloat16"} for dtype in products[other])


@pytest.mark.usefixtures("standard_promotion")
def test_dtypes_of_outputs_and_gradients(model, x, rng):
    """Outputs have the output dtype, gradients the dtype and structure of the parameters."""
    variables = random_variables(model, x, rng)
    apply = with_policy(model.apply, HALF)
    assert jax.eval_shape(lambda v: apply(v, x, mutable=["batch_stats"])[0], variables).dtype == jnp.float32
    if not isinstance(model, Looped):
        grad = jax.grad(lambda v: apply(v, x, mutable=["batch_stats"])[0].sum())
        assert shape_of(grad, variables) == jax.tree.map(jnp.result_type, variables)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ["image", "attention", "scan of remat", "scan of a method", "lstm", "share_scope"])
def test_values_are_near_those_of_float32(name, x, rng):
    """A policy changes precision, not meaning."""
    model = MODELS[name]()
    variables = random_variables(model, x, rng)

    def outputs(variables):
        policies = ["full", jmp.PolicyMap({"norm": "full"}, HALF)]
        return [with_policy(model.apply, policy)(variables, x, mutable=["batch_stats"])[0] for policy in policies]

    expected, output = jax.jit(outputs)(variables)
    assert 0 < jnp.linalg.norm(output - expected) < 0.05 * jnp.linalg.norm(expected) + 0.05


def test_layers_agree_under_strict_promotion(x, rng):
    """No layer is ever handed operands of two precisions: the suite's strict promotion would forbid it."""
    policy = jmp.PolicyMap({"body": "p=f32,c=f16,o=f16", "head": "full"}, HALF)
    products = products_by_part(Setup(), policy, x, rng)
    assert (products["body"][0], products["head"][0]) == ({"float16"}, {"float32"})


# --- What happens at the borders between policies ---


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("policies", "seen"),
    [
        ({}, "bfloat16"),
        ({"body": "p=f32,c=bf16,o=f32"}, "bfloat16"),  # the same policy as around it: no border
        ({"body": "p=f32,c=f16,o=f32"}, "float32"),
        ({"body": "p=f32,c=f32,o=f16"}, "float16"),
        ({"": "full", ".*": "full"}, "float32"),
    ],
)
def test_outputs_are_cast_where_the_policy_changes(policies, seen, x, rng):
    """The output dtype of a submodule counts where its policy differs from its caller's."""
    model = Border()
    variables = random_variables(model, x, rng)
    with outputs_of_modules() as found:
        output = with_policy(model.apply, jmp.PolicyMap(policies, HALF))(variables, x)
    assert ("body", seen) in found
    assert dtypes(output) == {"float32"}


class Scan(nn.Module):
    """A border inside a scan."""

    def __call__(self, x):
        return self.step(x, None)[0]

    @functools.partial(nn.scan, variable_broadcast="params", split_rngs={"params": False}, length=2)
    @nn.compact
    def step(self, x, _):
        return x + nn.Dense(16, name="body")(x), None


@pytest.mark.usefixtures("standard_promotion")
def test_borders_inside_a_scan_are_borders(x, rng):
    """Only the carry itself is given back its dtype: what a submodule returns is what its policy says."""
    variables = random_variables(Scan(), x, rng)
    with outputs_of_modules() as found:
        with_policy(Scan().apply, jmp.PolicyMap({"body": "full"}, HALF))(variables, x)
    assert set(found) == {("body", "float32"), (None, "bfloat16")}


@pytest.mark.usefixtures("standard_promotion")
def test_constants_promote_inside_a_policy_but_not_past_a_module_of_a_map(x, rng):
    """A float32 constant makes the next product float32 under a Policy; a PolicyMap casts at each module."""
    assert products_by_part(Border(), HALF, x, rng)["head"][0] == {"float32"}
    assert products_by_part(Border(), jmp.PolicyMap({}, HALF), x, rng)["head"][0] == {"bfloat16"}


@pytest.mark.parametrize("lift", [nn.Dense, nn.remat(nn.Dense), nn.jit(nn.Dense)], ids=["plain", "remat", "jit"])
def test_float32_parts_are_not_rounded_on_their_way_out(lift, x, rng):
    """Only the carries of loops are given back the dtype of the input, not every output that looks like one."""
    model = Denoiser(lift)
    variables = random_variables(model, x, rng)
    output = with_policy(model.apply, jmp.PolicyMap({"head": "full"}, HALF))(variables, x)
    assert jnp.any(output != output.astype(jnp.bfloat16).astype(jnp.float32))


CELLS = {
    HALF: ("bfloat16", "bfloat16"),
    "p=f32,c=f16,o=f16": ("float16", "float16"),
    "mixed_float16": ("float16", "float32"),
}


@pytest.mark.parametrize("run", [functools.partial(nn.RNN, return_carry=True), Unrolled], ids=["RNN", "unrolled"])
@pytest.mark.parametrize("policy", CELLS)
def test_carries_of_cells_are_float32_and_their_outputs_are_not(run, policy, x, rng):
    """What a cell carries from step to step is not rounded; what it hands on has the dtype of its policy."""
    compute, output = CELLS[policy]
    seen, sequence = [], jnp.stack([x] * 3, 1)
    model = run(Replacing(seen.append, name="cell"))
    variables = random_variables(model, sequence, rng)
    seen.clear()
    with outputs_of_modules() as found:
        with_policy(model.apply, jmp.PolicyMap({"cell": policy}, HALF))(variables, sequence)
    assert set(seen) == {("float32", compute)}
    assert ("cell", "float32", output) in found


@pytest.mark.parametrize("policy", [HALF, jmp.PolicyMap({}, HALF)], ids=["Policy", "PolicyMap"])
def test_variables_carried_by_a_scan_keep_their_dtype(policy, x, rng):
    """A module may replace a carried float32 variable by something in half precision."""
    step = nn.scan(Remembering, variable_broadcast="params", variable_carry="state", split_rngs={"params": False})()
    params = random_variables(nn.Dense(16), x, rng)["params"]
    variables = {"params": {"body": params}, "state": {"h": jnp.zeros(x.shape)}}
    (_, outputs), updated = with_policy(step.apply, policy)(variables, None, jnp.stack([x, x]), mutable="state")
    assert dtypes((outputs, updated)) == {"float32"}
    np.testing.assert_allclose(updated["state"]["h"], outputs[-1], rtol=0.01, atol=0.01)
