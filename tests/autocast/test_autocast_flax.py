"""Autocast of Flax models: state, statistics, random bits and identities survive; paths of modules steer."""

import collections
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import jaxprs, linen_models, nnx_models
from support.comparisons import assert_identical, compilations, raw, slow_but_for, structure_and_dtypes

import jmp_lite as jmp

LOW = "mixed_bfloat16"
BF16, F32 = "bfloat16", "float32"
PARTS = ("body", "head")


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((8, 16)), jnp.float32)


def near(actual, expected, error=0.03):
    """Asserts that trees have the same structure and dtypes, and floats that are near."""
    assert structure_and_dtypes(actual) == structure_and_dtypes(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(np.max(np.abs(b)))) if b.size else 1.0
        np.testing.assert_allclose(a, b, atol=error * scale)


def by_part(found):
    """Counts matmuls by the part of the model that they are in, and by the dtypes of their operands."""
    return collections.Counter((part, *sorted(kinds)) for scope, kinds in found for part in PARTS if part in scope)


def expected_by_part(plain, full_part):
    """What is expected of the matmuls of a float32 model if one part is in full precision."""
    return {(part, F32 if part == full_part else BF16): plain[part, F32] for part in PARTS}


# --- Linen ---


@pytest.mark.parametrize("part", slow_but_for(("body",), PARTS))
@pytest.mark.parametrize("name", linen_models.EVERY_MODEL)
def test_paths_of_linen_modules(name, part, x, rng):
    """An exact path inside the model holds for every matmul of the module, forward and backward, and for no other."""
    model = linen_models.MODELS[name]()
    variables = linen_models.random_variables(model, x, rng)
    policy = jmp.PolicyMap({part: "full"}, default=LOW)

    def programs(apply):
        def loss(params):
            out = apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]
            return jnp.mean(out**2)

        return [loss] if name == "while" else [loss, jax.grad(loss)]

    for plain, cast in zip(programs(model.apply), programs(jmp.linen.autocast(model.apply, policy)), strict=True):
        before = by_part(jaxprs.contractions(plain, variables["params"]))
        assert by_part(jaxprs.contractions(cast, variables["params"])) == expected_by_part(before, part)


def test_everything_that_apply_returns(x, key):
    """Collections, statistics, sown values, methods and random bits are those of the model, in their dtypes."""
    model = linen_models.Everything()
    variables = model.init(jax.random.key(0), x)
    rngs = {"dropout": key}
    apply = jmp.linen.autocast(model.apply, LOW)
    for options in (
        {},
        {"mutable": ["batch_stats"]},
        {"mutable": ["batch_stats", "cache", "intermediates"]},
        {"mutable": True, "train": True, "rngs": rngs},
        {"mutable": ["intermediates"], "train": True, "rngs": rngs, "bias": 2 * x},
        {"method": "encode"},
        {"method": linen_models.Everything.encode, "scale": 3},
        {"capture_intermediates": True},
    ):
        found, expected = apply(variables, x, **options), model.apply(variables, x, **options)
        near(found, expected)
        near(functools.partial(apply, variables)(x, **options), expected)
    trained = functools.partial(model.apply, train=True, rngs=rngs, mutable=["batch_stats"])
    near(jmp.linen.autocast(trained, LOW)(variables, x), trained(variables, x))
    state = jmp.linen.autocast(trained, LOW)(variables, x)[1]["batch_stats"]["norm"]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
    assert bool(jnp.any(state["mean"] != 0))


def test_dropout_of_linen_takes_the_same_bits(x, key):
    """The elements dropped are the same, though the values are rounded."""
    model = nn.Sequential([nn.Dense(64), nn.Dropout(0.5, deterministic=False)])
    variables = model.init({"params": jax.random.key(0), "dropout": key}, x)
    run = lambda apply: apply(variables, x, rngs={"dropout": key}) == 0  # noqa: E731
    assert_identical(run(jmp.linen.autocast(model.apply, LOW)), run(model.apply))


def test_init_under_autocast(x, key):
    """Parameters are drawn from the same bits, whatever the model computes on the way."""
    model = linen_models.Image()
    plain = jax.jit(model.init_with_output)(key, x)
    assert_identical(jax.jit(jmp.linen.autocast(model.init, LOW))(key, x)["params"], plain[1]["params"])
    near(jax.jit(jmp.linen.autocast(model.init_with_output, LOW))(key, x), plain)


@pytest.mark.parametrize("name", [None, "net"])
def test_names_of_the_model_are_not_part_of_paths(name, x):
    """An exact key with the name of the model in it matches nothing; rules see whole scopes."""

    class Net(linen_models.Compact):
        pass

    model = Net(name=name)
    variables = model.init(jax.random.key(0), x)

    def kinds(policy, rules=()):
        apply = jmp.linen.autocast(model.apply, policy, rules=rules)
        return [tuple(found) for _, found in jaxprs.contractions(apply, variables, x)]

    root = name or "Net"
    assert kinds(jmp.PolicyMap({"body": "full"}, default=LOW)) == [(F32,), (BF16,)]
    assert kinds(LOW, jmp.Rule(f"{root}/body", precision="full")) == [(F32,), (BF16,)]
    assert kinds(LOW, jmp.Rule(root, precision="full")) == [(F32,), (F32,)]


# --- NNX ---


@pytest.mark.parametrize("part", slow_but_for(("body",), PARTS))
@pytest.mark.parametrize("name", nnx_models.EVERY_MODEL)
def test_paths_of_nnx_modules(name, part, x):
    """So it is for NNX, whose modules open no scopes; the model has its classes back afterwards."""
    model = nnx_models.MODELS[name](nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    policy = jmp.PolicyMap({part: "full"}, default=LOW)

    def programs(cast):
        def loss(state):
            merged = nnx.merge(graphdef, state)
            loss = cast(lambda model, x: jnp.mean(model(x) ** 2))(merged, x)
            assert nnx.graphdef(merged) == nnx.graphdef(nnx.merge(graphdef, state))
            return loss

        return loss, jax.grad(loss, allow_int=True)

    plain_programs, cast_programs = programs(lambda fun: fun), programs(lambda fun: jmp.nnx.autocast(fun, policy))
    for plain, cast in zip(plain_programs, cast_programs, strict=True):
        before = by_part(jaxprs.contractions(plain, state))
        assert by_part(jaxprs.contractions(cast, state)) == expected_by_part(before, part)


class Net(nnx.Module):
    """Statistics, dropout, a shared layer, a list of layers, and attributes that calls add and change."""

    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(16, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])
        self.shared = self.layers[0]
        self.calls = nnx.Variable(jnp.int32(0))

    def __call__(self, x):
        x = self.dropout(self.norm(self.first(x)))
        for layer in self.layers:
            x = jax.nn.gelu(layer(x))
        self.calls[...] += 1
        self.last = nnx.Intermediate(self.shared(x))
        return x


def loss_of(model, x):
    return jnp.mean(model(x) ** 2)


def test_what_a_call_does_to_a_module_stays(x):
    """Statistics, counters of random bits, new attributes: as without autocast, in the same dtypes."""
    model, plain = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    run = jmp.nnx.autocast(lambda model, x: model(x), LOW)
    for _ in range(2):
        near(run(model, x), plain(x), 0.06)
    assert type(model) is Net
    assert type(model.layers[0]) is nnx.Linear
    assert model.shared is model.layers[0]
    assert nnx.graphdef(model) == nnx.graphdef(plain)
    near(nnx.state(model, (nnx.BatchStat, nnx.Intermediate)), nnx.state(plain, (nnx.BatchStat, nnx.Intermediate)), 0.06)
    assert_identical(nnx.state(model, nnx.RngState), nnx.state(plain, nnx.RngState))
    assert raw(model.calls[...]) == raw(jnp.int32(2))
    assert_identical(nnx.state(model, nnx.Param), nnx.state(plain, nnx.Param))
    assert bool(jnp.any(model.norm.mean[...] != 0))


def test_dropout_of_nnx_takes_the_same_bits(x):
    rngs, plain = nnx.Rngs(7), nnx.Rngs(7)
    drop = lambda x, rngs: nnx.Dropout(0.5, rngs=rngs)(x @ jnp.ones((16, 64))) == 0  # noqa: E731
    positive = 1 + jnp.abs(x)  # no row of the matmul is 0 by itself, in float32 or in bfloat16
    for _ in range(2):
        assert_identical(jmp.nnx.autocast(drop, LOW)(positive, rngs), drop(positive, plain))
    assert_identical(nnx.state(rngs), nnx.state(plain))


HOW = {
    "nnx.jit": nnx.jit,
    "nnx.remat": nnx.remat,
    "nnx.jit of nnx.value_and_grad": lambda fun: nnx.jit(nnx.value_and_grad(fun)),
}


@pytest.mark.parametrize("transform", HOW.values(), ids=HOW)
@pytest.mark.parametrize("save", slow_but_for(("low",), ["all", "low"]))
def test_under_transformations_of_nnx(transform, save, x):
    """Values, gradients and the state left behind are near those of float32."""
    model, plain = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    found = transform(jmp.nnx.autocast(loss_of, LOW, residuals=save))(model, x)
    near(found, transform(loss_of)(plain, x), 0.06)
    near(nnx.state(model, nnx.BatchStat), nnx.state(plain, nnx.BatchStat))
    assert_identical(nnx.state(model, nnx.RngState), nnx.state(plain, nnx.RngState))
    assert nnx.graphdef(model) == nnx.graphdef(plain)


def test_modules_and_methods_as_functions(x):
    """A module stands for its call, a bound method for itself, a partial function for the rest of one."""
    model, plain = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    near(jmp.nnx.autocast(model, LOW)(x), plain(x), 0.06)
    near(jmp.nnx.autocast(model.__call__, LOW)(x), plain(x), 0.06)
    part = functools.partial(functools.partial(lambda n, model, *, x: n * model(x), 2), model, x=x)
    near(jmp.nnx.autocast(jmp.nnx.autocast(part, LOW), LOW)(), 2 * plain(x), 0.06)
    linear = nnx.Linear(16, 3, rngs=nnx.Rngs(0))
    near(jmp.nnx.with_policy(functools.partial(nnx.Linear.__call__, linear), LOW)(x), linear(x))
    near(jmp.nnx.autocast(nnx_models.Attention(nnx.Rngs(0)), LOW)(x), nnx_models.Attention(nnx.Rngs(0))(x))
    assert int(model.calls[...]) == 3


def test_modules_among_arguments_and_results(x):
    """The same module given twice is one; returned modules are the ones that were given, or new ones."""
    model = Net(nnx.Rngs(0))

    def fun(pair, *, scale, name, new=nnx.Linear):
        first, second = pair["models"]
        assert first is second
        assert (scale, name) == (2, "text")
        return {"same": second, "new": new(4, 4, rngs=nnx.Rngs(1)), "part": first.norm, "text": name, "x": pair["x"]}

    out = jmp.nnx.autocast(fun, LOW)({"models": (model, model), "x": x}, scale=2, name="text")
    assert out["same"] is model
    assert out["part"] is model.norm
    assert out["text"] == "text"
    assert_identical(out["x"], x)
    assert_identical(nnx.state(out["new"]), nnx.state(nnx.Linear(4, 4, rngs=nnx.Rngs(1))))


@pytest.mark.parametrize("fails_in", ["first", "dropout"])
def test_after_an_error_a_module_is_what_it_was(fails_in, x):
    model = Net(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model))

    class Failing(nnx.Module):
        def __call__(self, *_):
            raise ZeroDivisionError("on purpose")

    good = getattr(model, fails_in)
    setattr(model, fails_in, Failing())
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        jmp.nnx.autocast(model, LOW)(x)
    setattr(model, fails_in, good)
    assert {type(node) for _, node in nnx.iter_graph(model)} == {type(n) for _, n in nnx.iter_graph(Net(nnx.Rngs(0)))}
    assert_identical(nnx.state(model), before)
    near(jmp.nnx.autocast(model, LOW)(x), Net(nnx.Rngs(0))(x), 0.06)


@pytest.mark.usefixtures("standard_promotion")
def test_an_optimizer_among_the_arguments(x):
    """A step with the gradient of an autocast loss; the optimizer may also be given to autocast itself."""
    losses = {}
    for name, cast in (("plain", lambda fun: fun), ("autocast", lambda fun: jmp.nnx.autocast(fun, LOW))):
        model = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x, cast=cast):
            loss, grads = nnx.value_and_grad(cast(loss_of))(model, x)
            optimizer.update(model, grads)
            return loss

        @nnx.jit
        @cast
        def whole_step(model, optimizer, x):
            loss, grads = nnx.value_and_grad(loss_of)(model, x)
            optimizer.update(model, grads)
            return loss

        losses[name] = jnp.stack([*(step(model, optimizer, x) for _ in range(2)), whole_step(model, optimizer, x)])
        assert int(optimizer.step[...]) == 3
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {F32}
    near(losses["autocast"], losses["plain"], 0.06)


PATHS = {
    "layers/0": ("PolicyMap", [0]),
    r"layers/[01]": ("PolicyMap", [0, 1]),
    "layers": ("PolicyMap", [0, 1, 2]),
    "layers/1": ("Rule", [1]),
    "1": ("Rule", [1]),
}


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.remat(lambda layer, x: jnp.tanh(layer(x)))(layer, x)
        return x


@pytest.mark.parametrize("path", PATHS)
def test_paths_with_indices(path, x):
    """Items of a list are named by index, forward and backward, within nnx.remat."""
    kind, full = PATHS[path]
    how = {"policy": jmp.PolicyMap({path: "full"}, default=LOW)}
    if kind == "Rule":
        how = {"policy": LOW, "rules": jmp.Rule(path, precision="full")}
    graphdef, state = nnx.split(Stack(nnx.Rngs(0)))
    loss = lambda state: jmp.nnx.autocast(loss_of, **how)(nnx.merge(graphdef, state), x)  # noqa: E731
    for fun in (loss, jax.grad(loss)):
        found = {(int(scope.split("layers/")[1][0]), *kinds) for scope, kinds in jaxprs.contractions(fun, state)}
        assert found == {(i, F32 if i in full else BF16) for i in range(3)}


def test_warm_calls_compile_nothing(x):
    """A function wrapped again for every call, called eagerly, with state: only the first calls compile."""
    model = Net(nnx.Rngs(0))
    run = lambda: jmp.nnx.autocast(loss_of, LOW)(model, x)  # noqa: E731
    run(), run()
    with compilations() as compiled:
        run()
    assert not compiled
