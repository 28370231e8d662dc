"""What wraps the interpreter: caches, name scopes, arguments of every kind, what is kept for backward."""

import collections
import functools
import gc
import itertools
import warnings
import weakref

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import jaxprs
from support.autocast_cases_common import mesh, x_and_w
from support.comparisons import assert_identical, compilations, raw, slow_but_for

import jmp_lite as jmp
from jmp_lite._compat import source_line
from jmp_lite.autocast import _api
from jmp_lite.autocast._interpreter import Interpreter

LOW = "mixed_bfloat16"


def equations(fun, *args):
    return list(jaxprs._equations(jax.make_jaxpr(fun)(*args).jaxpr, ""))


# --- Caches ---


@jax.custom_vjp
def sine(x, w):
    return jnp.sin(x @ w)


sine.defvjp(lambda x, w: (jnp.sin(x @ w), (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


@jax.jit
def block(x, w):
    return jax.nn.gelu(jax.nn.relu(x @ w) @ w)


checkpointed = jax.checkpoint(block)


def step(carry, _):
    x, w = carry
    return (block(x, w), w), None


def loss(x, w):
    x = lax.scan(step, (checkpointed(x, w), w), None, length=2)[0][0]
    return jnp.mean(jax.nn.softmax(sine(x, w)) ** 2)


OPTIONS = {
    "plain": {},
    "rules": {"rules": jmp.Rule(None, "tanh", precision="full")},
    "sums": {"accumulation_dtype": jnp.float32},
    "residuals": {"residuals": "low"},
    "ops": {"ops": {"tanh": jmp.OpClass.DENY}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_warm_calls_compile_and_retype_nothing(options, rng, monkeypatch):
    """Called eagerly, wrapped again for every call: no compilation, and no program inside is traced again."""
    args, traced = x_and_w(rng), []
    run = lambda: jmp.autocast(loss, LOW, **options)(*args)  # noqa: E731
    run(), run()
    original = Interpreter._trace
    monkeypatch.setattr(Interpreter, "_trace", lambda *args: traced.append(1) or original(*args))
    with compilations() as compiled:
        run()
    assert not compiled
    assert len(traced) <= 1  # the program of a custom rule outside of jit, which JAX itself traces for every call


def test_under_jit_one_trace_per_signature(rng):
    """The function is traced once for arrays of a shape and dtype, and once more for others."""
    traces = []

    def fun(x, w):
        traces.append(x.shape)
        return x @ w

    x, w = x_and_w(rng)
    run = jax.jit(jmp.autocast(fun, LOW))
    run(x, w), run(2 * x, w), run(x, w + 1)
    assert traces == [(8, 16)]
    run(x[:4], w), run(x[4:], w)
    assert traces == [(8, 16), (4, 16)]


def test_a_program_called_often_is_retyped_once_per_kind_of_operand(rng, monkeypatch):
    x, w = x_and_w(rng)
    scopes, original = [], Interpreter._trace
    monkeypatch.setattr(Interpreter, "_trace", lambda *args: scopes.append(1) or original(*args))
    inner = jax.jit(lambda x, w: jnp.tanh(x @ w))

    def fun(x, w):
        for _ in range(6):
            x = inner(x, w)
        return x

    jax.make_jaxpr(jmp.autocast(fun, LOW))(x, w)
    assert len(scopes) <= 3  # of an input, of a matmul, and with other consumers at the end


HOLDERS = {
    "jit": lambda array: jax.jit(lambda x: jax.nn.relu(x @ array)),
    "custom_vjp": lambda array: jax.jit(lambda x: sine(x, array)),
    "scan": lambda array: lambda x: lax.scan(lambda c, _: (sine(c, array), None), x, length=2)[0],
    "cond": lambda array: lambda x: lax.cond(True, lambda x: jax.nn.relu(x @ array), lambda x: sine(x, array), x),
    "remat": lambda array: jax.checkpoint(lambda x: jax.nn.silu(x @ array)),
}
USES = {
    "autocast": lambda fun: jmp.autocast(fun, LOW),
    "grad(autocast)": lambda fun: jax.grad(jmp.autocast(fun, LOW)),
    "autocast(grad)": lambda fun: jmp.autocast(jax.grad(fun), LOW),
}


def called(holder, use, rng):
    """References to what a program was made of that ran, eager and under jit."""
    x, array = x_and_w(rng)
    inner = HOLDERS[holder](array)
    fun = lambda x: jnp.sum(inner(x))  # noqa: E731
    run = USES[use](fun)
    run(x), jax.jit(run)(x)
    return [weakref.ref(thing) for thing in (array, inner, fun)]


@pytest.mark.parametrize("holders", slow_but_for([("scan", "custom_vjp")], [("scan", "custom_vjp"), tuple(HOLDERS)]))
def test_nothing_is_kept_alive(holders, rng):
    """Once a function is gone, so are the arrays that it closed over.

    In one test: whatever comes after JAX has forgotten its programs is compiled again.
    """
    alive = {pair: called(*pair, rng) for pair in itertools.product(holders, USES)}
    jax.clear_caches()
    gc.collect()
    assert [pair for pair, refs in alive.items() if any(ref() is not None for ref in refs)] == []


def test_what_no_later_equation_reads_is_let_go():
    """Outside of jit, too, memory holds one step of a chain."""
    made, alive = [], []

    def step(x, **_):
        alive.append(sum(array() is not None for array in made))
        result = jnp.tanh(x).astype(jnp.float32)
        made.extend(map(weakref.ref, (x, result)))  # x is a cast of the last result
        return result

    chain = lambda x: jnp.tanh(jnp.tanh(jnp.tanh(jnp.tanh(x))))  # noqa: E731
    jmp.autocast(chain, "mixed_bfloat16", ops={"tanh": step})(jnp.ones(3))
    assert alive == [0, 1, 1, 1]


@pytest.mark.slow
def test_no_tracer_leaks(rng):
    with jax.checking_leaks():
        for use in USES.values():
            jax.jit(use(loss))(*x_and_w(rng))


# --- Scopes and source lines ---


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        with jax.named_scope("mine"):
            x = nn.remat(nn.Dense)(16, name="hidden")(x)
        return nn.Dense(16)(nn.LayerNorm()(jax.nn.gelu(x)))


def where(fun, variables):
    """Counts equations by scope, line and primitive, casts apart."""
    found = [(scope, source_line(eqn), eqn.primitive.name) for scope, eqn in equations(fun, variables)]
    wrapped = ("convert_element_type", "custom_jvp_call", "jit")
    return collections.Counter(key for key in found if key[2] not in wrapped)


def test_name_scopes_and_lines_are_those_of_the_program(rng):
    """Every equation but casts has the scope and, forward, the line that it had.

    JAX keeps the trace of a function of jnp, and of a matmul of ours, with the line of its first use at these shapes:
    no other test has five rows. Where gradients are added up in float32, a bias is repeated before it is cast.
    """
    x, model = x_and_w(rng)[0][:5], Model()
    policy = jmp.Policy(jnp.float32, jnp.bfloat16, jnp.float32, reduce_dtype=jnp.bfloat16)
    variables = model.init(jax.random.key(0), x)
    mean = lambda variables: jnp.mean(model.apply(variables, x) ** 2)  # noqa: E731
    assert where(jmp.autocast(mean, policy), variables) == where(mean, variables)
    grad, plain = jax.grad(jmp.autocast(mean, policy)), jax.grad(mean)
    scopes = [{(scope, name) for scope, _, name in where(fun, variables)} for fun in (grad, plain)]
    assert scopes[0] == scopes[1]
    assert where(jmp.autocast(plain, policy), variables) == where(plain, variables)


@pytest.mark.parametrize("order", ["grad(autocast)", "autocast(grad)"])
def test_names_of_modules_are_in_what_is_compiled(order, rng):
    x, model = x_and_w(rng)[0], Model()
    variables = model.init(jax.random.key(0), x)
    mean = lambda variables: jnp.mean(model.apply(variables, x) ** 2)  # noqa: E731
    fun = jax.grad(jmp.autocast(mean, LOW)) if order == "grad(autocast)" else jmp.autocast(jax.grad(mean), LOW)
    text = jax.jit(fun).lower(variables).as_text(debug_info=True)
    assert all(name in text for name in ("mine", "hidden", "Dense_0", "LayerNorm_0", "transpose("))


# --- Arguments and results ---


def test_what_is_no_array_passes_through(rng):
    """Python numbers, strings, None and functions stay what they are, in and out; trees keep their form."""
    x, w = x_and_w(rng)
    seen = []

    def fun(tree, flag, *rest, name=None, act=None, **kwargs):
        seen.append((flag, rest, name, kwargs["n"]))
        assert type(flag) is bool
        y = act(tree["x"] @ tree["w"][0]) if flag else tree["x"]
        return {"y": y, "name": name, "none": None, "n": kwargs["n"], "list": [tree["w"][0], act], "i": tree["i"]}

    tree = {"x": np.asarray(x), "w": (w, None), "i": np.int32(3)}
    args, kwargs = (tree, True, 2.5, "s"), {"name": "model", "act": jax.nn.relu, "n": 7}
    for flag in (True, False):
        found = jmp.autocast(fun, LOW)(tree, flag, *args[2:], **kwargs)
        assert seen[-1] == (flag, (2.5, "s"), "model", 7)
        assert (found["name"], found["none"], found["n"], found["list"][1]) == ("model", None, 7, jax.nn.relu)
        assert type(found["n"]) is int
        assert raw(found["list"][0]) == raw(w)
        assert raw(found["i"]) == raw(jnp.int32(3))
        assert found["y"].dtype == jnp.float32
        assert jax.tree.structure(found) == jax.tree.structure(fun(tree, flag, *args[2:], **kwargs))


NO_ARRAYS = {
    "strings": np.array(["a", "b"]),
    "bytes": np.array([b"a"]),
    "objects": np.array([None, 3], object),
    "dates": np.array(["2026-01-01"], "datetime64[D]"),
    "durations": np.array([3], "timedelta64[s]"),
    "a record": np.zeros(2, [("a", "f4")]),
}


@pytest.mark.parametrize("array", NO_ARRAYS.values(), ids=NO_ARRAYS)
def test_arrays_that_are_none_of_jax_pass_through(array):
    found = jmp.autocast(lambda x, array: (x @ x, array), LOW)(jnp.ones((8, 8)), array)
    assert found[1] is array
    assert len(jmp.explain(lambda x, array: x @ x, LOW)(jax.ShapeDtypeStruct((8, 8), jnp.float32), array)) == 1


@pytest.mark.parametrize("name", ["bool", "int8", "uint4", "float16", "bfloat16", "float8_e4m3fn", "complex64"])
def test_arrays_of_numpy_are_traced(name):
    array, seen = np.zeros(2, jnp.dtype(name)), []
    jmp.autocast(lambda array: seen.append(type(array)), LOW)(array)
    assert issubclass(seen[0], jax.core.Tracer)


def test_a_module_among_the_arguments_is_refused():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    run = jmp.autocast(lambda model, x: model(x), LOW)
    for call in (lambda: run(model, jnp.ones((2, 2))), lambda: run(x=jnp.ones((2, 2)), model=model)):
        with pytest.raises(jmp.errors.InvalidFunctionError, match="autocast"):
            call()


def test_slow_dtypes_are_warned_about_when_a_function_is_called(monkeypatch):
    """Each that the settings name, and none before."""
    asked = []
    monkeypatch.setattr(_api, "warn_if_slow", lambda dtype: asked.append(str(dtype)))
    policy = jmp.PolicyMap({"a": "mixed_float16", "b": "full"}, default=LOW)
    run = jmp.autocast(jnp.matmul, policy)
    assert not asked
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jmp.errors.UnmatchedRuleWarning)
        jax.eval_shape(run, jnp.ones((8, 8)), jnp.ones((8, 8)))
    assert sorted(asked) == ["bfloat16", "float16"]


def test_what_is_returned_has_the_name_and_the_signature_of_the_function():
    def layer(x, w):
        """A layer."""
        return x @ w

    run = jmp.autocast(layer, LOW)
    assert (run.__name__, run.__doc__, run.__wrapped__) == ("layer", "A layer.", layer)


KINDS = {
    "weak": lambda: jnp.asarray(2.0),
    "strong": lambda: jnp.float32(2.0),
    "integer": lambda: jnp.arange(3),
    "bool": lambda: jnp.array([True, False]),
    "bfloat16": lambda: jnp.ones(3, jnp.bfloat16),
    "complex": lambda: jnp.ones(3, jnp.complex64),
    "key": lambda: jax.random.key(0),
    "empty": lambda: jnp.zeros((0, 3)),
    "float8": lambda: jnp.ones(3, jnp.float8_e4m3fn),
    "negative zero": lambda: jnp.float32(-0.0),
    "nan": lambda: jnp.array([jnp.nan, jnp.inf, 1.00001], jnp.float32),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_what_passes_through_keeps_every_bit(make):
    """Arrays returned as they came keep bits, dtype and weak type, beside a matmul; also a closed-over one."""
    array = make()
    fun = lambda a, x: (a, x @ x, array, [a])  # noqa: E731
    for run in (jmp.autocast(fun, LOW), jax.jit(jmp.autocast(fun, LOW))):
        first, _, closed_over, (again,) = run(array, jnp.ones((2, 2)))
        for found in (first, again, closed_over):
            assert_identical(found, array)
            assert getattr(found, "weak_type", None) == getattr(array, "weak_type", None)


def test_weak_types_of_results(rng):
    x = x_and_w(rng)[0]
    fun = lambda x, s: (x * s, s * 2, jnp.sin(s), x.sum(), jnp.asarray(1.0) * 3)  # noqa: E731
    found, expected = (jax.eval_shape(f, x, jnp.asarray(2.0)) for f in (jmp.autocast(fun, LOW), fun))
    assert [(a.dtype, a.weak_type) for a in found] == [(a.dtype, a.weak_type) for a in expected]


def test_donation_and_shardings_are_kept_under_jit(rng):
    """Also those of a jit within: what it says of placement holds for the retyped program."""
    x, w = x_and_w(rng)
    sharding = NamedSharding(mesh(), P("d"))
    inner = jax.jit(jnp.matmul, in_shardings=(sharding, None), out_shardings=sharding)
    run = jax.jit(jmp.autocast(lambda x, w: inner(x, w) + x, LOW), donate_argnums=0, out_shardings=sharding)
    mine = jax.device_put(x, sharding)
    out = run(mine, w)
    assert mine.is_deleted()
    assert out.sharding.is_equivalent_to(sharding, 2)
    (pjit,) = [e for _, e in equations(jmp.autocast(inner, LOW), x, w) if e.primitive.name == "jit"][:1]
    assert pjit.params["out_shardings"] == (sharding,)
    assert {str(v.aval.dtype) for v in pjit.invars} == {str(v.aval.dtype) for v in pjit.outvars} == {"float32"}


# --- What is kept for the backward pass ---


class GPT(nn.Module):
    dtype: object = None

    @nn.compact
    def __call__(self, ids):
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        x = nn.Embed(64, 64, dtype=self.dtype)(ids)
        for _ in range(2):
            mask = nn.make_causal_mask(ids)
            x = x + nn.MultiHeadDotProductAttention(4, dtype=self.dtype)(norm()(x), mask=mask)
            x = x + dense(64)(nn.gelu(dense(256)(norm()(x))))
        logits = dense(64)(norm()(x)).astype(jnp.float32)
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_low_residuals(rng):
    """With residuals="low" the loss stays, less is kept than by Flax's own bfloat16, and no large float32."""
    ids = jnp.asarray(rng.integers(0, 64, (4, 64)), jnp.int32)
    variables = jax.jit(GPT().init)(jax.random.key(0), ids)
    losses = {
        "flax": lambda v: GPT(jnp.bfloat16).apply(v, ids),
        "all": jmp.autocast(lambda v: GPT().apply(v, ids), LOW),
        "low": jmp.autocast(lambda v: GPT().apply(v, ids), LOW, residuals="low"),
    }
    own = {leaf.shape for leaf in jax.tree.leaves(variables)}
    kept = {}
    for name, fun in losses.items():
        avals = jax.tree.leaves(jax.eval_shape(lambda v, fun=fun: jax.vjp(fun, v)[1], variables))
        kept[name] = [a for a in avals if a.dtype.kind != "i" and not (a.dtype == jnp.float32 and a.shape in own)]
    size = {name: sum(a.size * a.dtype.itemsize for a in avals) for name, avals in kept.items()}
    assert size["low"] <= 0.9 * size["flax"], size
    assert [a for a in kept["low"] if a.dtype == jnp.float32 and a.size >= 4096] == []
    values = {name: jax.jit(jax.value_and_grad(losses[name]))(variables) for name in ("all", "low")}
    np.testing.assert_allclose(values["low"][0], values["all"][0], rtol=2**-8)  # XLA may skip a rounding in one of them
    kept_all, kept_low = (jax.flatten_util.ravel_pytree(value[1])[0] for value in values.values())
    assert jnp.linalg.norm(kept_low - kept_all) <= 2**-6 * jnp.linalg.norm(kept_all)
