"""``nnx.with_policy``: what becomes of state, and what calls take and give back."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.comparisons import assert_identical, slow_but_for
from support.jaxprs import contractions, dtypes
from support.nnx_models import MODELS, Model, forward, linear

import jmp_lite as jmp
from jmp_lite.nnx import with_policy

HALF = "mixed_bfloat16"
LOW_OUTPUT = "p=f32,c=bf16,o=bf16"
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(2, 16)), jnp.float32)


# --- State ---


class Everything(nnx.Module):
    """Statistics, dropout, tied layers, a static flag, and what may be added later."""

    def __init__(self, rngs):
        self.first = linear(rngs)
        self.tied = self.first
        self.layers = nnx.List([linear(rngs), linear(rngs)])
        self.norm, self.drop = nnx.BatchNorm(16, momentum=0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.calls, self.counts = 0, False

    def __call__(self, x):
        if self.counts:
            self.calls += 1
        for layer in (self.first, self.tied, *self.layers):
            x = layer(x)
        return self.drop(self.norm(x))


@pytest.fixture
def everything():
    return Everything(nnx.Rngs(0))


POLICIES = {"Policy": HALF, "PolicyMap": jmp.PolicyMap({"norm": "full", "layers/0": "p=f32,c=f16,o=f16"}, HALF)}


@pytest.fixture(params=slow_but_for(("PolicyMap",), POLICIES))
def policy(request):
    return POLICIES[request.param]


def values_of(model, *filters):
    """The values of the variables of a model by path; keys as numbers."""
    flat = nnx.to_flat_state(nnx.state(model, *filters))
    values = {path: variable.get_value() for path, variable in flat}
    return {p: jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v for p, v in values.items()}


@pytest.mark.parametrize("under", ["eager", "nnx.jit", "value_and_grad", "remat", "split and merge"])
def test_state_is_updated_as_without_a_policy(under, x):
    """Statistics, counters of random streams and plain attributes advance; parameters and all dtypes stay."""
    policy = POLICIES["PolicyMap"]
    plain, model = Everything(nnx.Rngs(0)), Everything(nnx.Rngs(0))
    model.counts = True
    before, wrapped = values_of(model), with_policy(forward, policy)
    plain(x)
    if under == "eager":
        wrapped(model, x)
    elif under == "nnx.jit":
        nnx.jit(wrapped)(model, x)
    elif under == "value_and_grad":
        nnx.value_and_grad(lambda model, x: wrapped(model, x).sum())(model, x)
    elif under == "remat":
        nnx.remat(wrapped)(model, x)
    else:

        @jax.jit
        def step(graphdef, state):
            merged = nnx.merge(graphdef, state)
            wrapped(merged, x)
            return nnx.state(merged)

        nnx.update(model, step(*nnx.split(model)))
    after, expected = values_of(model), values_of(plain)
    assert {path: value.dtype for path, value in after.items()} == {p: value.dtype for p, value in before.items()}
    for path, value in after.items():
        if path[-1] in ("kernel", "bias", "scale"):
            np.testing.assert_array_equal(value, before[path])
        else:
            np.testing.assert_allclose(value, expected[path], rtol=0.05, atol=0.05, err_msg=str(path))
    assert model.calls == (0 if under == "split and merge" else 1)


def test_the_module_itself_is_left_alone(policy, everything, x):
    """Types, identities and sharing are those from before; only a copy is ever changed."""
    nodes = [node for _, node in nnx.iter_graph(everything) if isinstance(node, (nnx.Module, nnx.Variable))]
    kinds = [type(node) for node in nodes]
    with_policy(forward, policy)(everything, x)
    after = [node for _, node in nnx.iter_graph(everything) if isinstance(node, (nnx.Module, nnx.Variable))]
    assert all(a is b for a, b in zip(nodes, after, strict=True))
    assert [type(node) for node in after] == kinds
    assert everything.tied is everything.first


def test_the_function_sees_modules_of_the_same_kind(policy, everything, x):
    """Inside the function isinstance holds, tied layers are tied, and variables have the dtypes that are stored."""

    def look(model, x):
        assert isinstance(model, Everything)
        assert isinstance(model.norm, nnx.BatchNorm)
        assert model.tied is model.first
        assert model is not everything
        assert dtypes(nnx.state(model)) == {"float32"}
        return model(x)

    assert with_policy(look, policy)(everything, x).dtype == jnp.float32


def test_changes_of_any_kind_reach_the_module(policy, everything, x):
    """What the function writes, adds, replaces or deletes is written, added, replaced or deleted in the module."""
    kernels = [layer.kernel.get_value() for layer in (everything.first, everything.layers[0])]

    def change(model, x):
        model.first.kernel[...] = model.first.kernel[...].at[0, 0].set(7)
        model.layers[1].kernel = nnx.Param(model.layers[1].kernel[...].astype(jnp.bfloat16))
        model.norm.mean.set_value(jnp.full(16, 5.0))
        model.seen = nnx.Intermediate(model.layers[0](x))
        model.pair = nnx.data((model.first, model.norm))
        model.label = "changed"
        del model.drop
        return model, model.first, model.first.kernel

    model, first, variable = with_policy(change, jmp.PolicyMap({}, LOW_OUTPUT))(everything, x)
    assert (model, first, variable) == (everything, everything.first, everything.first.kernel)
    assert_identical(everything.first.kernel[...], kernels[0].at[0, 0].set(7))
    assert_identical(everything.layers[0].kernel[...], kernels[1])
    assert_identical(everything.norm.mean[...], jnp.full(16, 5.0))
    assert everything.layers[1].kernel[...].dtype == jnp.bfloat16
    assert everything.seen.get_value().dtype == jnp.float32
    assert everything.pair == (everything.first, everything.norm)
    assert everything.label == "changed"
    assert not hasattr(everything, "drop")
    assert type(everything.pair[1]) is nnx.BatchNorm


def test_variables_in_mutable_arrays_are_refused(x):
    """Their updates would be lost; the message says what to give instead."""
    with nnx.var_defaults(ref=True):
        model = nnx.BatchNorm(16, momentum=0.5, rngs=nnx.Rngs(0))
    with pytest.raises(jmp.errors.InvalidFunctionError, match="'bias' lives in a mutable array"):
        with_policy(forward, HALF)(model, x)
    model = nnx.with_vars(model, ref=False)
    with_policy(forward, HALF)(model, x)
    np.testing.assert_allclose(model.mean[...], x.mean(0) / 2, atol=0.01)


def test_nothing_is_written_when_the_function_fails(everything, x):
    """An exception leaves parameters and attributes as they were."""
    before = values_of(everything, nnx.Param)

    def fail(model, x):
        model.label = "changed"
        model.first.kernel[...] = model.first.kernel[...] * 0
        raise RuntimeError

    with pytest.raises(RuntimeError):
        with_policy(fail, HALF)(everything, x)
    assert not hasattr(everything, "label")
    assert all(value is before[path] for path, value in values_of(everything, nnx.Param).items())


def test_lifted_transformations_do_not_round_parameters(x):
    """A scan hands back copies of all variables; those of parameters do not replace the stored values."""
    model = MODELS["lstm"](nnx.Rngs(0))
    before = values_of(model, nnx.Param)
    with_policy(forward, HALF)(model, x)
    for path, value in values_of(model, nnx.Param).items():
        np.testing.assert_array_equal(value, before[path])


# --- Calls ---


def test_dropout_draws_what_it_draws_without_a_policy(policy, x):
    """The same stream drops the same units."""
    plain, model = Everything(nnx.Rngs(0)), Everything(nnx.Rngs(0))
    dropped = with_policy(forward, policy)(model, x) == 0
    np.testing.assert_array_equal(dropped, plain(x) == 0)
    assert 0 < dropped.sum() < dropped.size


def test_modules_and_bound_methods_are_functions_too(x):
    """A module, or a method of one, is wrapped like the function that takes it."""
    model = MODELS["block"](nnx.Rngs(0))
    expected = with_policy(forward, HALF)(model, x)
    assert dtypes(with_policy(model, HALF)(x)) == {"float32"}
    np.testing.assert_array_equal(with_policy(model, HALF)(x), expected)
    np.testing.assert_array_equal(with_policy(model.__call__, HALF)(x), expected)
    assert with_policy(model.run, HALF)(x).shape == x.shape


def test_the_innermost_policy_counts(x):
    """A wrapped function inside a wrapped function follows its own policy."""
    model, inner = MODELS["linear"](nnx.Rngs(0)), with_policy(forward, "mixed_float16")
    graphdef, state = nnx.split(model)
    products = contractions(lambda state: with_policy(inner, HALF)(nnx.merge(graphdef, state), x), state)
    assert [dtype for _, dtype in products] == [{"float16"}, {"float16"}]


@pytest.mark.parametrize("policy", [HALF, jmp.PolicyMap({"head": "full"}, HALF)], ids=["Policy", "PolicyMap"])
def test_modules_are_found_anywhere_in_the_arguments(policy, x):
    """Several modules, in containers and keywords, sharing layers and random streams, keep what they share."""
    encoder, rngs = linear(nnx.Rngs(0)), nnx.Rngs(dropout=0)
    decoder = Model(encoder)

    def run(parts, x, *, rngs, drop):
        assert parts["decoder"].body is parts["encoder"]
        return parts["decoder"](drop(parts["encoder"](x), rngs=rngs))

    output = with_policy(run, policy)({"encoder": encoder, "decoder": decoder}, x, rngs=rngs, drop=nnx.Dropout(0.5))
    assert output.dtype == jnp.float32
    assert int(rngs.dropout.count.get_value()) == 1


def test_only_floating_results_are_cast():
    """Integers, keys, None, strings, numbers, loss scales and variables come through as they are."""
    kept = jnp.int32(1), jax.random.key(0), None, "text", 1.5, jmp.DynamicLossScale(2.0**20)
    variables = nnx.BatchStat(jnp.ones(2)), nnx.Param(jnp.ones(2))
    found, found_variables, rounded = with_policy(lambda *args: args, LOW_OUTPUT)(kept, variables, np.float32(1 / 3))
    assert_identical((found, rounded), (kept, jnp.bfloat16(1 / 3)))
    assert found_variables == variables
    assert dtypes(variables) == {"float32"}


@pytest.mark.parametrize("name", ["linear", "block", "list", "attention"])
def test_a_model_can_be_captured_by_jit(name, x):
    """Inference with a model from outside needs no state to be written."""
    model = MODELS[name](nnx.Rngs(0))
    output = jax.jit(lambda x: with_policy(forward, HALF)(model, x))(x)
    np.testing.assert_allclose(output, with_policy(forward, HALF)(model, x), atol=0.05)


def test_a_change_of_a_captured_model_is_an_error(x):
    """NNX forbids to change a model from outside a trace; so it is not lost without a word."""
    counting = Everything(nnx.Rngs(0))
    with pytest.raises(flax.errors.TraceContextError, match="trace level"):
        jax.jit(lambda x: with_policy(forward, HALF)(counting, x))(x)


def test_attention_decodes_with_its_cache(rng):
    """Step by step decoding gives what attention over the whole sequence gives."""
    x = jnp.asarray(rng.normal(size=(1, 3, 16)), jnp.float32)
    model = nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0))
    expected = model(x, mask=nnx.make_causal_mask(x[..., 0]))
    model.init_cache(x.shape, jnp.float32)
    decode = nnx.jit(with_policy(lambda model, x: model(x, decode=True), HALF))
    outputs = [decode(model, x[:, step : step + 1]) for step in range(3)]
    assert model.cached_key.get_value().dtype == jnp.float32
    assert int(model.cache_index.get_value()) == 3
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), expected, atol=0.05)


def test_intermediates_can_be_captured(x):
    """nnx.capture around the wrapped function sees what the modules sow."""

    class Sowing(nnx.Module):
        def __init__(self):
            self.layer = linear(nnx.Rngs(0))

        def __call__(self, x):
            self.sow(nnx.Intermediate, "seen", y := self.layer(x))
            return y

    output, captured = nnx.capture(with_policy(forward, HALF), nnx.Intermediate)(Sowing(), x)
    (seen,) = captured["seen"].get_value()
    np.testing.assert_array_equal(output, seen)


def test_a_step_is_traced_once(everything, x):
    """A step under nnx.jit is traced once, although every call gives the modules classes again."""
    traces = []

    def traced(model, x):
        traces.append(x)
        return nnx.jit(lambda layer, x: layer(x))(model.layers[0], model(x))

    step = nnx.jit(with_policy(traced, POLICIES["PolicyMap"]))
    for _ in range(3):
        step(everything, x)
    assert len(traces) == 1


def test_a_contradictory_map_is_reported(everything, x):
    """Two patterns that both match a module with different policies are an error that names both."""
    with pytest.raises(jmp.errors.InvalidPolicyError, match=r"'fir.\*' .* 'first.\*'"):
        with_policy(forward, jmp.PolicyMap({"fir.*": "full", "first.*": "half"}, HALF))(everything, x)


def test_an_optimizer_trains_the_stored_parameters(policy, everything, rng):
    """A training step of NNX needs nothing but the wrapped function."""
    optimizer, wrapped = nnx.Optimizer(everything, optax.adam(0.03), wrt=nnx.Param), with_policy(forward, policy)
    x, y = (jnp.asarray(rng.normal(size=(16, 16)), jnp.float32) for _ in range(2))

    @nnx.jit
    def train_step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((wrapped(model, x) - y) ** 2))(model)
        optimizer.update(model, grads)
        return loss, grads

    everything.drop = nnx.Dropout(0.0)
    losses = [train_step(everything, optimizer) for _ in range(20)]
    assert dtypes(losses[0][1]) == dtypes(nnx.state(everything, nnx.Param)) == {"float32"}
    assert losses[-1][0] < losses[0][0]
