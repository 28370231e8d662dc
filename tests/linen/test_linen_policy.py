"""``linen.with_policy``: what calls and initialization take and give back, every collection included."""

import functools

import flax
import flax.linen as nn
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparisons import assert_identical
from support.jaxprs import dtypes, shape_of
from support.linen_models import MODELS, Compact, Everything, Remembering, SelfNormalizing, Typed, random_variables

import jmp_lite as jmp
from jmp_lite.linen import with_policy

HALF = "mixed_bfloat16"
LOW_OUTPUT = "p=f32,c=bf16,o=bf16"


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(2, 16)), jnp.float32)


# --- Collections ---


MODEL = Everything()
POLICIES = {"Policy": HALF, "PolicyMap": jmp.PolicyMap({"norm": "full"}, HALF)}


@pytest.fixture
def variables(x, rng):
    return random_variables(MODEL, x, rng)


@pytest.fixture(params=POLICIES)
def policy(request):
    return POLICIES[request.param]


@pytest.mark.covering(2)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("frozen", [False, True], ids=["dict", "FrozenDict"])
@pytest.mark.parametrize(
    "mutable",
    [
        False,
        True,
        [],
        (),
        "batch_stats",
        ["batch_stats", "cache"],
        ["nothing"],
        nn.DenyList("params"),
        {"cache"},
    ],
    ids=str,
)
def test_mutable_means_what_it_means_to_flax(mutable, frozen, policy, variables, x):
    """The result has the structure that Flax gives it, and every collection the dtypes of the model."""
    variables = flax.core.freeze(variables) if frozen else variables
    expected = shape_of(lambda v: MODEL.apply(v, x, mutable=mutable), variables)
    preset = functools.partial(MODEL.apply, mutable=mutable)
    assert shape_of(lambda v: with_policy(MODEL.apply, policy)(v, x, mutable=mutable), variables) == expected
    assert shape_of(lambda v: with_policy(preset, policy)(v, x), variables) == expected


@pytest.mark.usefixtures("standard_promotion")
def test_statistics_are_updated_in_float32(policy, variables, x):
    """Batch statistics are those of float32 but for the rounding of the activations."""
    _, expected = MODEL.apply(variables, x, mutable=["batch_stats"])
    _, updated = with_policy(MODEL.apply, policy)(variables, x, mutable=["batch_stats"])
    assert dtypes(updated) == {"float32"}
    for a, b in zip(*map(jax.tree.leaves, (updated, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=0.05)
        assert jnp.any(a != 1)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ["compact", "scan", "vmap"])
def test_parameters_that_come_back_have_lost_no_digits(name, x, rng):
    """With mutable=True parameters pass through the model and come back as they were stored."""
    model = MODELS[name]()
    variables = random_variables(model, x, rng)
    _, updated = with_policy(model.apply, HALF)(variables, x, mutable=True)
    assert_identical(updated["params"], variables["params"])


def test_parameters_that_a_module_changes_are_changed(rng):
    """What a module writes arrives as it was written, whatever the output dtype."""
    params = {name: jnp.asarray(rng.normal(size=3), jnp.float32) for name in "wb"}
    apply = with_policy(SelfNormalizing().apply, LOW_OUTPUT)
    output, updated = apply({"params": params}, jnp.ones(3), mutable=["params"])
    assert output.dtype == jnp.bfloat16
    expected = {"w": params["w"] * 2, "new": params["w"], "b": params["b"].at[0].set(0)}
    assert_identical(updated["params"], expected)


@pytest.mark.usefixtures("standard_promotion")
def test_intermediates_are_those_of_the_model(variables, x):
    """Captured and sown values have the dtypes that they have without a policy; the output alone is cast."""
    apply = with_policy(MODEL.apply, LOW_OUTPUT)
    options = {"capture_intermediates": True, "mutable": ["batch_stats"]}
    output, captured = shape_of(lambda v: apply(v, x, **options), variables)
    assert (output, captured) == (jnp.bfloat16, shape_of(lambda v: MODEL.apply(v, x, **options), variables)[1])


@pytest.mark.parametrize("policy", [HALF, jmp.PolicyMap({"body": "full"}, HALF)], ids=["Policy", "PolicyMap"])
def test_variables_carried_by_a_scan_keep_their_dtype(policy, x, rng):
    """A module may replace a carried float32 variable by a matmul in half precision."""
    step = nn.scan(Remembering, variable_broadcast="params", variable_carry="state", split_rngs={"params": False})()
    params = random_variables(nn.Dense(16), x, rng)["params"]
    variables = {"params": {"body": params}, "state": {"h": jnp.zeros(x.shape)}}
    (_, outputs), updated = with_policy(step.apply, policy)(variables, None, jnp.stack([x, x]), mutable="state")
    assert dtypes((outputs, updated)) == {"float32"}
    np.testing.assert_allclose(updated["state"]["h"], outputs[-1], rtol=0.01, atol=0.01)


# --- Calls ---


@pytest.mark.usefixtures("standard_promotion")
def test_rngs_are_those_of_the_caller(policy, variables, x):
    """The same key drops the same units as without a policy."""
    settings = {"train": True, "rngs": {"dropout": jax.random.key(3)}}
    dropped = with_policy(MODEL.apply, policy)(variables, x, **settings) == 0
    np.testing.assert_array_equal(dropped, MODEL.apply(variables, x, **settings) == 0)
    assert 0 < dropped.sum() < dropped.size


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "method", ["encode", Everything.encode, MODEL.encode, lambda model, x, scale=2: model(x) * scale]
)
def test_method_selects_what_it_selects_in_flax(method, policy, variables, x):
    """A name, a function, a bound method and a function of the model are all taken."""
    apply = with_policy(MODEL.apply, policy)
    np.testing.assert_array_equal(apply(variables, x, method=method), 2 * apply(variables, x))
    np.testing.assert_array_equal(apply(variables, x, scale=4, method=method), 4 * apply(variables, x))


@pytest.mark.usefixtures("standard_promotion")
def test_arguments_of_any_kind_reach_the_model(policy, variables, x):
    """None, keywords, bound arguments and keyword variables work as they do in Flax."""
    apply = with_policy(MODEL.apply, policy)
    expected = apply(variables, x)
    np.testing.assert_array_equal(apply(variables, x, None), expected)
    np.testing.assert_array_equal(apply(variables=variables, x=x), expected)
    np.testing.assert_array_equal(with_policy(functools.partial(MODEL.apply, variables), policy)(x), expected)
    assert apply(variables, x, bias=jnp.ones(x.shape)).dtype == jnp.float32


@pytest.mark.parametrize("policy", [LOW_OUTPUT, jmp.PolicyMap({}, LOW_OUTPUT)], ids=["Policy", "PolicyMap"])
def test_only_floating_results_are_cast(policy):
    """Integers, booleans, complex numbers, keys, None, strings and Python numbers come through as they are."""
    args = jnp.int32(1), jnp.array([True]), jnp.complex64(1j), jax.random.key(0), None, "text", 1.5
    same, kwargs = with_policy(Typed().apply, policy)({}, *args, key=args[3], value=np.float32(1 / 3))
    assert_identical((same, kwargs["key"]), (args, args[3]))
    assert_identical(kwargs["value"], jnp.bfloat16(1 / 3))


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({"body": {"kernel": np.ones((16, 16))}}, flax.errors.ScopeCollectionNotFound),
        ({"params": {"params": {}}}, flax.errors.ApplyScopeInvalidVariablesStructureError),
        ([1.0], AttributeError),
        ({"params": {"body": {"kernel": np.ones((5, 16), np.float32)}}}, flax.errors.ScopeParamShapeError),
    ],
    ids=["no params", "params twice", "a list", "wrong shape"],
)
def test_mistakes_are_reported_by_flax(variables, error, policy, x):
    """A mistake raises the same error as without a policy."""
    with pytest.raises(error) as expected:
        MODEL.apply(variables, x)
    with pytest.raises(error) as actual:
        with_policy(MODEL.apply, policy)(variables, x)
    assert str(actual.value) == str(expected.value)


def test_a_contradictory_map_is_reported(variables, x):
    """Two patterns that both match a module with different policies are an error that names both."""
    policies = jmp.PolicyMap({"bo.*": "full", ".*dy": "half"}, HALF)
    with pytest.raises(jmp.errors.InvalidPolicyError, match=r"'\.\*dy' .* 'bo\.\*'"):
        with_policy(MODEL.apply, policies)(variables, x)


TRANSFORMS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "vmap": lambda f: lambda params, x: jax.vmap(lambda row: f(params, row[None])[0])(x),
    "scan": lambda f: lambda params, x: jax.lax.scan(lambda carry, x: (carry, f(params, x)), 0, x[None])[1][0],
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transformations_of_jax_apply(transform, policy, variables, x):
    """Values and gradients are those without the transformation, but for the order of sums."""
    rest = {name: collection for name, collection in variables.items() if name != "params"}

    def run(params, x):
        return with_policy(MODEL.apply, policy)({"params": params, **rest}, x)

    def value_and_grad(f):
        return jax.value_and_grad(lambda params: (f(params, x) ** 2).mean())(variables["params"])

    found, expected = value_and_grad(transform(run)), value_and_grad(run)
    assert shape_of(lambda tree: tree, found) == shape_of(lambda tree: tree, expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0.05, atol=0.05), found, expected)


def test_a_step_traces_the_model_once_and_leaks_nothing(x, key):
    """Nothing is traced again from step to step, and no tracer stays behind."""
    traces = []

    class Traced(Compact):
        def __call__(self, x):
            traces.append(x.shape)
            return super().__call__(x)

    params = Compact().init(key, x)
    step = jax.jit(jax.grad(lambda params: with_policy(Traced().apply, HALF)(params, x).sum()))
    with jax.checking_leaks():
        for _ in range(3):
            params = step(params)
    assert traces == [x.shape]


def test_wrapping_keeps_name_and_documentation():
    """The wrapped function is documented as Flax documents it."""
    wrapped = with_policy(MODEL.apply, HALF)
    assert (wrapped.__name__, wrapped.__doc__) == (MODEL.apply.__name__, MODEL.apply.__doc__)


# --- Initialization ---


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "policy", ["bf16-true", jmp.PolicyMap({"norm": "full"}, "bf16-true")], ids=["Policy", "PolicyMap"]
)
@pytest.mark.parametrize("init", [MODEL.init, functools.partial(MODEL.init, train=True), MODEL.lazy_init])
def test_init_casts_parameters_only(init, policy, x, key):
    """Values are those of Flax; parameters have the parameter dtype, all else what the model makes it."""
    rngs = {"params": key, "dropout": key}
    expected, variables = MODEL.init(rngs, x), with_policy(init, policy)(rngs, x)
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    assert {name: dtypes(collection) for name, collection in variables.items()} == {
        "params": {"bfloat16"} if policy == "bf16-true" else {"bfloat16", "float32"},
        "batch_stats": {"float32"},
        "cache": {"float32"},
    }
    kernel = expected["params"]["body"]["kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(variables["params"]["body"]["kernel"], kernel)


def test_init_with_output_casts_the_output_too(x, key):
    """The output that comes with new variables has the output dtype."""
    output, variables = with_policy(Compact().init_with_output, "p=f32,c=bf16,o=f16")(key, x)
    assert (output.dtype, dtypes(variables)) == (jnp.float16, {"float32"})


def test_init_of_a_model_without_parameters(x, key):
    """A model that has no parameters has none afterwards."""
    assert with_policy(Typed().init, HALF)(key, x) == {}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("policies", [HALF, "bf16-true", jmp.PolicyMap({"query": "full"}, HALF)], ids=str)
def test_attention_decodes_with_the_cache_of_the_model(policies, rng, key):
    """Step by step decoding gives what attention over the whole sequence gives."""
    x = jnp.asarray(rng.normal(size=(1, 3, 16)), jnp.float32)
    model = nn.MultiHeadDotProductAttention(2, decode=True)
    variables = jax.jit(with_policy(model.init, policies))(key, x)
    apply = jax.jit(with_policy(functools.partial(model.apply, mutable=["cache"]), policies))
    outputs = []
    for step in range(3):
        output, updated = apply(variables, x[:, step : step + 1])
        variables = {**variables, **updated}
        outputs.append(output)
    assert dtypes(variables["cache"]) == {"float32"}
    whole = nn.MultiHeadDotProductAttention(2)
    expected = jax.jit(lambda params, x: whole.apply({"params": params}, x, mask=nn.make_causal_mask(x[..., 0])))
    np.testing.assert_allclose(np.concatenate(outputs, 1), expected(variables["params"], x), atol=0.05)


def test_a_train_state_takes_the_wrapped_apply(x, rng):
    """Flax's TrainState needs nothing but the wrapped function."""
    model = Compact()
    params = random_variables(model, x, rng)["params"]
    tx = jmp.loss_scaled(optax.sgd(0.01))
    state = flax.training.train_state.TrainState.create(apply_fn=with_policy(model.apply, HALF), params=params, tx=tx)

    def loss_fn(params):
        return jnp.mean((state.apply_fn({"params": params}, x) - 1) ** 2)

    @jax.jit
    def step(state):
        loss, grads = jmp.scaled_value_and_grad(loss_fn, loss_scale=state.opt_state)(state.params)
        return loss, state.apply_gradients(grads=grads)

    loss, state = step(state)
    assert jax.jit(loss_fn)(state.params) < loss
    assert dtypes(state.params) == {"float32"}
