"""Gradients of a scaled loss of NNX modules: those of `nnx.value_and_grad`, with every change of the modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.comparisons import assert_identical, slow_but_for

import jmp_lite as jmp
from jmp_lite import errors

SCALE = 2.0**7
KERNELS = nnx.PathContains("kernel")


class Net(nnx.Module):
    """Statistics, random counts, and parameters."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.dense, self.norm = nnx.Linear(8, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.dense(x)))


def of_model(model, x):
    return jnp.mean(model(x) ** 2)


def of_two(model, other, x):
    return jnp.mean(model(x) * other(x))


def of_weight(w, model, x):
    return jnp.mean(model(x * w) ** 2)


def with_aux(model, x):
    return of_model(model, x), {"rows": x[:, 0]}


# function, models, arrays in front of them, argnums, has_aux
CASES = {
    "a model": (of_model, 1, (), 0, False),
    "kernels alone": (of_model, 1, (), nnx.DiffState(0, KERNELS), False),
    "two models": (of_two, 2, (), (0, 1), False),
    "one of two models": (of_two, 2, (), 1, False),
    "one by parameters, one by kernels": (of_two, 2, (), (0, nnx.DiffState(1, KERNELS)), False),
    "a weight beside a model": (of_weight, 1, (jnp.full((1, 8), 0.5),), 0, False),
    "a weight and a model": (of_weight, 1, (jnp.full((1, 8), 0.5),), (0, 1), False),
    "auxiliary output": (with_aux, 1, (), 0, True),
}


def arguments(case, rng):
    fun, models, arrays, argnums, has_aux = case
    x = jnp.asarray(rng.standard_normal((12, 8)), jnp.float32)
    return fun, [*arrays, *map(Net, range(models))], x, argnums, has_aux


def numbers(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def states(args):
    return [numbers(leaf) for arg in args if isinstance(arg, Net) for leaf in jax.tree.leaves(nnx.state(arg))]


def assert_near(tree, expected):
    """Equal but for the order of sums of a dozen terms in two compilations; a bias before a norm has no gradient."""
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    leaves, others = (list(map(numbers, map(jnp.asarray, jax.tree.leaves(t)))) for t in (tree, expected))
    largest = max(np.abs(x).max() for x in others if x.dtype == np.float32)
    for leaf, other in zip(leaves, others, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=32 * np.finfo(np.float32).eps * largest)


def unscaled(grads):
    return jax.tree.map(lambda g: g / SCALE, grads)


RUNS = {name: (case, nnx.jit) for name, case in CASES.items()}
RUNS["eager"] = (CASES["a model"], lambda f: f)


@pytest.mark.parametrize("name", slow_but_for({"one by parameters, one by kernels", "auxiliary output", "eager"}, RUNS))
def test_it_is_value_and_grad_with_a_scale_that_is_a_power_of_two(name, rng):
    case, run = RUNS[name]
    fun, args, x, argnums, has_aux = arguments(case, rng)
    ours, plain = nnx.clone(args), nnx.clone(args)
    transforms = (
        jmp.nnx.scaled_value_and_grad(fun, argnums, has_aux, loss_scale=jmp.StaticLossScale(SCALE)),
        nnx.value_and_grad(fun, argnums=argnums, has_aux=has_aux),
    )
    (value, grads), (expected, true) = (
        run(transform)(*models, x) for transform, models in zip(transforms, (ours, plain), strict=True)
    )
    assert_identical(value, expected)
    assert_identical(unscaled(grads), true)
    assert_identical(states(ours), states(plain))
    assert not all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (states(ours), states(args))), strict=True)
    )


@pytest.mark.parametrize("parts", slow_but_for({3}, [1, 3]))
@pytest.mark.parametrize("name", slow_but_for({"auxiliary output"}, CASES))
def test_microbatches_run_one_after_the_other(name, parts, rng):
    fun, args, x, argnums, has_aux = arguments(CASES[name], rng)
    ours, looped, scale = nnx.clone(args), nnx.clone(args), jmp.StaticLossScale(SCALE)
    accumulate = jmp.nnx.accumulate_gradients(fun, parts, argnums, has_aux, loss_scale=scale)
    one = jmp.nnx.scaled_value_and_grad(fun, argnums, has_aux, loss_scale=scale)
    value, grads = nnx.jit(accumulate)(*ours, x)
    found = [nnx.jit(one)(*looped, x[i::parts]) for i in range(parts)]
    mean = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]) / parts, *(g for _, g in found))
    assert_near(grads, mean)
    assert_near(jax.tree.leaves(value)[0], sum(jax.tree.leaves(v)[0] for v, _ in found) / parts)
    assert_near(states(ours), states(looped))


def test_what_a_microbatch_that_is_left_out_did_is_undone(rng):
    model, good = Net(0), Net(0)
    x = jnp.asarray(rng.standard_normal((4, 8)), jnp.float32)
    options = {"loss_scale": jmp.StaticLossScale(SCALE), "on_nonfinite": "skip_microbatch"}
    both = jnp.stack([x, jnp.full_like(x, jnp.nan)], 1).reshape(8, 8)  # every other row
    loss, grads, skipped = nnx.jit(jmp.nnx.accumulate_gradients(of_model, 2, **options))(model, both)
    expected, true, none = nnx.jit(jmp.nnx.accumulate_gradients(of_model, 1, **options))(good, x)
    assert (int(skipped), int(none)) == (1, 0)
    assert_near((loss, grads), (expected, true))
    assert_near(states([model]), states([good]))


@pytest.mark.parametrize("holder", [lambda o: o, lambda o: o.opt_state, lambda o: jmp.DynamicLossScale(2.0**15)])
def test_an_optimizer_is_where_the_scale_is(holder):
    model = Net(0)
    optimizer = nnx.Optimizer(model, jmp.loss_scaled(optax.sgd(0.1)), wrt=nnx.Param)
    x = jnp.ones((4, 8))
    _, grads = nnx.jit(jmp.nnx.scaled_value_and_grad(of_model, loss_scale=holder(optimizer)))(model, x)
    static = jmp.nnx.scaled_value_and_grad(of_model, loss_scale=jmp.StaticLossScale(2.0**15))
    _, expected = nnx.jit(static)(Net(0), x)
    assert_identical(jax.tree.leaves(grads), jax.tree.leaves(expected))


def test_a_training_loop_compiles_once_and_moves_everything():
    model, traces = Net(0), []
    optimizer = nnx.Optimizer(model, jmp.loss_scaled(optax.sgd(0.1)), wrt=nnx.Param)
    loss_fn = jmp.nnx.autocast(of_model, "mixed_float16")

    @nnx.jit
    def train_step(model, optimizer, x):
        traces.append(x)
        loss, grads = jmp.nnx.scaled_value_and_grad(loss_fn, loss_scale=optimizer)(model, x)
        optimizer.update(model, grads)
        return loss

    losses = [float(train_step(model, optimizer, jnp.linspace(0, 3, 128).reshape(16, 8))) for _ in range(5)]
    assert len(traces) == 1
    assert losses[-1] < losses[0]
    assert model.drop.rngs.count[...] == 5
    assert jnp.all(model.norm.mean[...] != 0)


@pytest.mark.parametrize("transform", [jmp.scaled_value_and_grad, jmp.accumulate_gradients])
@pytest.mark.parametrize("argument", [Net(0), {"model": Net(0)}, nnx.Rngs(0)], ids=["module", "inside", "rngs"])
def test_the_plain_functions_refuse_modules(transform, argument):
    options = {"num_microbatches": 2} if transform is jmp.accumulate_gradients else {}
    function = transform(lambda model, x: jnp.mean(x), loss_scale=jmp.NoOpLossScale(), **options)
    with pytest.raises(errors.InvalidFunctionError, match=rf"jmp_lite\.nnx\.{transform.__name__}"):
        function(argument, jnp.ones((2, 8)))


@pytest.mark.parametrize("hold", [lambda m: m, lambda m: m.__call__, lambda m: functools.partial(of_model, m)])
def test_the_plain_functions_refuse_a_module_that_the_function_holds(hold):
    """The gradient would be that of the data."""
    for transform in (jmp.scaled_value_and_grad, functools.partial(jmp.accumulate_gradients, num_microbatches=2)):
        function = transform(hold(Net(0)), loss_scale=jmp.NoOpLossScale())
        with pytest.raises(errors.InvalidFunctionError, match="with the NNX module Net"):
            function(jnp.ones((2, 8)))


@pytest.mark.parametrize("transform", [jmp.autocast, jmp.with_policy])
def test_plain_wrappers_refuse_modules(transform):
    """Their statistics would stay as they are, and dropout would draw one mask for ever."""
    name, x = transform.__name__, jnp.ones((4, 2))
    with pytest.raises(errors.InvalidFunctionError, match=rf"^{name} .*jmp_lite\.nnx\.{name}"):
        transform(lambda model, x: model(x), "mixed_bfloat16")(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), x)
    graphdef, state = nnx.split(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    assert transform(lambda state, x: nnx.merge(graphdef, state)(x), "mixed_bfloat16")(state, x).shape == (4, 2)


class Collecting(nnx.Module):
    """Collects its results."""

    def __call__(self, x):
        self.sow(nnx.Intermediate, "seen", x)
        return jnp.mean(x)


CLOSED_OVER = {
    "autocast": lambda fun: jmp.autocast(fun, "mixed_bfloat16"),
    "nnx.autocast": lambda fun: jmp.nnx.autocast(fun, "mixed_bfloat16"),
    "scaled_value_and_grad": lambda fun: jmp.scaled_value_and_grad(fun, loss_scale=jmp.NoOpLossScale()),
    "nnx.scaled_value_and_grad": lambda fun: jmp.nnx.scaled_value_and_grad(fun, loss_scale=jmp.NoOpLossScale()),
}


@pytest.mark.parametrize("wrap", CLOSED_OVER.values(), ids=CLOSED_OVER)
def test_a_module_that_the_function_closes_over_cannot_change(wrap):
    model = Net(0)
    with pytest.raises(errors.InvalidFunctionError, match=r"not one of its arguments: Cannot .* Make the module"):
        wrap(lambda x: of_model(model, x))(jnp.ones((4, 8)))


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")  # flax 0.12.12, 2026-11
def test_what_grows_with_every_call_is_refused_however_often_it_was_called():
    model, x = Collecting(), jnp.ones((8, 4))
    for _ in range(2):
        with pytest.raises(errors.InvalidFunctionError, match="what `sow` collects grows"):
            jmp.nnx.accumulate_gradients(lambda w, model, x: w * model(x), 2, loss_scale=jmp.NoOpLossScale())(
                jnp.float32(1), model, x
            )
        model(x)


class Growing(nnx.Module):
    """Makes a variable in its first call."""

    def __call__(self, x):
        if not hasattr(self, "cache"):
            self.cache = nnx.Variable(jnp.zeros(()))
        return jnp.mean(x)


def loss_with_keyword(model, x, *, power=2):
    return jnp.mean(model(x) ** power)


CALLS = {
    "keyword": (loss_with_keyword, {"power": 4}),
    "partial": (functools.partial(loss_with_keyword, power=4), {}),
    "with_policy": (jmp.nnx.with_policy(functools.partial(loss_with_keyword, power=4), "full"), {}),
}


ARGNUMS = [0, -2, nnx.DiffState(0, nnx.Param), nnx.DiffState(-2, nnx.Param)]


@pytest.mark.covering(1)
@pytest.mark.parametrize("argnum", slow_but_for(ARGNUMS[::3], ARGNUMS), ids=str)
@pytest.mark.parametrize(("loss_fn", "keywords"), CALLS.values(), ids=CALLS)
def test_the_signature_is_that_of_the_function(loss_fn, keywords, argnum, rng):
    """Keywords, partial functions, positions counted from the end."""
    model, x = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)
    expected = nnx.grad(lambda model: jnp.mean(model(x) ** 4))(model)
    scale = jmp.StaticLossScale(SCALE)
    _, grads = jmp.nnx.scaled_value_and_grad(loss_fn, argnum, loss_scale=scale)(model, x, **keywords)
    assert_near(unscaled(grads), expected)
    _, grads = jmp.nnx.accumulate_gradients(loss_fn, 3, argnum, loss_scale=scale)(model, x, **keywords)
    assert_near(unscaled(grads), expected)


def test_nnx_takes_partial_functions_under_a_policy():
    model, x = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), jnp.ones((6, 4))
    for wrap in (jmp.nnx.with_policy, jmp.nnx.autocast):
        loss_fn = wrap(functools.partial(loss_with_keyword, power=4), "mixed_bfloat16")
        assert jnp.isfinite(nnx.value_and_grad(loss_fn)(model, x)[0])


@pytest.mark.parametrize("name", ["scaled_value_and_grad", "accumulate_gradients"])
def test_a_method_of_a_module_is_refused(name):
    """Its module would be a constant. A module that is called is its method ``__call__``."""
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    method = model.__call__
    settings = {"num_microbatches": 2} if name == "accumulate_gradients" else {}
    for fn in (model, method, functools.partial(method, jnp.ones((6, 4)))):
        with pytest.raises(errors.InvalidFunctionError, match=rf"^nnx\.{name} .* method of one, Linear\.__call__"):
            getattr(jmp.nnx, name)(fn, loss_scale=jmp.NoOpLossScale(), **settings)


def test_modules_in_containers_and_modules_that_are_shared(rng):
    """Gradients of the parameters, and of shared ones once, as `nnx.grad` returns them."""
    x, scale = jnp.asarray(rng.standard_normal((6, 4)), jnp.float32), jmp.StaticLossScale(SCALE)
    norms = [nnx.BatchNorm(4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(1))]
    shared = nnx.Linear(4, 4, rngs=nnx.Rngs(2))
    for fun, args, argnums in (
        (lambda models, x: jnp.mean(models[1](models[0](x, use_running_average=True)) ** 2), (norms,), 0),
        (lambda a, b, x: jnp.mean(a(x) * b(x)), (shared, shared), (0, 1)),
    ):
        expected = nnx.jit(nnx.grad(fun, argnums=argnums))(*args, x)
        _, grads = nnx.jit(jmp.nnx.accumulate_gradients(fun, 3, argnums, loss_scale=scale))(*args, x)
        assert jax.tree.structure(grads) == jax.tree.structure(expected)
        assert_near(unscaled(grads), expected)


def test_retries_need_a_scale_of_arrays():
    optimizer = nnx.Optimizer(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jmp.loss_scaled(optax.sgd(0.1)), wrt=nnx.Param)
    value_and_grad = jmp.scaled_value_and_grad(lambda w: w * 2.0, loss_scale=optimizer, max_retries=2)
    with pytest.raises(errors.InvalidLossScaleError, match=r"made of arrays, and that of an nnx\.Optimizer"):
        value_and_grad(1.0)


def test_a_loop_carries_no_new_variables():
    accumulate = jmp.nnx.accumulate_gradients(lambda w, model, x: w * model(x), 2, loss_scale=jmp.NoOpLossScale())
    with pytest.raises(errors.InvalidFunctionError, match="Call the model once before"):
        accumulate(1.0, Growing(), jnp.ones((2, 8)))
