"""Laws of the matmul whose weight gradient is float32: it is ``lax.dot_general``, to every transformation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from support.comparisons import assert_identical, slow_but_for
from support.jaxprs import contractions, equations

import jmp_lite as jmp
from jmp_lite.products import _matmul
from jmp_lite.products._matmul import Matmul, matmul

DIMENSIONS = {
    "matrices": ((4, 3), (3, 5), (((1,), (0,)), ((), ()))),
    "transposed weight": ((4, 3), (5, 3), (((1,), (1,)), ((), ()))),
    "weight first": ((3, 5), (4, 3), (((0,), (1,)), ((), ()))),
    "sequences": ((2, 4, 3), (3, 5), (((2,), (0,)), ((), ()))),
    "heads": ((2, 4, 3), (3, 2, 5), (((2,), (0,)), ((), ()))),
    "two contracted, crossed": ((2, 4, 3), (3, 4, 5), (((1, 2), (1, 0)), ((), ()))),
    "experts": ((2, 4, 3), (2, 3, 5), (((2,), (1,)), ((0,), (0,)))),
    "experts last": ((4, 3, 2), (3, 5, 2), (((1,), (0,)), ((2,), (2,)))),
    "vectors": ((3,), (3,), (((0,), (0,)), ((), ()))),
}
DTYPES = ["bfloat16", "float16"]
cases = pytest.mark.parametrize("case", DIMENSIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def operands(case, dtype, rng):
    """Small whole numbers, so that every sum is exact; a 16-bit activation and a float32 weight, in both orders."""
    lhs, rhs, _ = DIMENSIONS[case]
    x, w = (rng.integers(-3, 4, shape).astype(np.float32) for shape in (lhs, rhs))
    return jnp.asarray(x).astype(dtype), jnp.asarray(w)


def functions(case, dtype):
    """The matmul, and ``lax.dot_general`` of what is cast first."""
    dims, dtype = DIMENSIONS[case][2], jnp.dtype(dtype)

    def plain(x, w):
        return lax.dot_general(x.astype(dtype), w.astype(dtype), dims, preferred_element_type=dtype)

    kind = Matmul(jnp.dtype(dtype), (("dimension_numbers", dims),), jnp.dtype(dtype))
    return (lambda x, w: matmul(x, w, kind)), plain


def total(fun):
    """A scalar that is not linear in the matmul."""
    return lambda x, w: jnp.sum(fun(x, w).astype(jnp.float32) ** 2)


TRANSFORMS = {
    "forward": lambda fun: fun,
    "jit": jax.jit,
    "gradient": lambda fun: jax.grad(total(fun), (0, 1)),
    "compiled gradient": lambda fun: jax.jit(jax.grad(total(fun), (0, 1))),
    "forward mode": lambda fun: lambda x, w: jax.jvp(fun, (x, w), (x, w)),
    "forward mode in one": lambda fun: lambda x, w: jax.jvp(lambda w: fun(x, w), (w,), (w,)),
    "linearize": lambda fun: lambda x, w: jax.linearize(fun, x, w)[1](x, w),
    "hessian": lambda fun: jax.hessian(total(fun), 1),
    "gradient of a gradient": lambda fun: jax.grad(
        lambda x, w: jnp.sum(jax.grad(total(fun), 1)(x, w) ** 2) / 2**10, (0, 1)
    ),
    "checkpoint": lambda fun: jax.grad(jax.checkpoint(total(fun)), (0, 1)),
    "vmap over x": lambda fun: lambda x, w: jax.vmap(fun, (0, None))(jnp.stack([x, 2 * x]), w),
    "vmap over w": lambda fun: lambda x, w: jax.vmap(fun, (None, -1))(x, jnp.stack([w, 2 * w], -1)),
    "vmap over both": lambda fun: lambda x, w: jax.vmap(fun, (0, 1))(jnp.stack([x, -x]), jnp.stack([w, w], 1)),
    "gradients per example": lambda fun: (
        lambda x, w: jax.vmap(jax.grad(total(fun), 1), (0, None))(jnp.stack([x, -x, 2 * x]), w)
    ),
    "gradient of vmap over x": lambda fun: (
        lambda x, w: jax.grad(total(jax.vmap(fun, (-1, None))), (0, 1))(jnp.stack([x, -x], -1), w)
    ),
    "gradient of vmap over w": lambda fun: (
        lambda x, w: jax.grad(total(jax.vmap(fun, (None, 1))), (0, 1))(x, jnp.stack([w, 2 * w], 1))
    ),
}


#: Those that take long to compile are shown on the matmuls that are least alike; by default one of these is under all
#: transformations, the others under those that move their axes.
LONG = {"hessian", "gradient of a gradient", "linearize", "checkpoint", "gradients per example", "forward mode in one"}
UNLIKE = {"sequences", "two contracted, crossed", "experts last"}
MOVING = {"gradient", "vmap over x", "vmap over w", "gradient of vmap over w"}
QUICK = {(case, name) for case in UNLIKE for name in TRANSFORMS if name in MOVING or case == "two contracted, crossed"}
EAGER = dict.fromkeys(("forward", "gradient"), lambda fun: fun)
PAIRS = [
    pytest.param(case, name, marks=() if (case, name) in QUICK else pytest.mark.slow)
    for case in DIMENSIONS
    for name in TRANSFORMS
    if name not in LONG or case in UNLIKE
]


@pytest.mark.parametrize(("case", "transform"), PAIRS)
def test_it_is_dot_general(case, transform, rng):
    """Same values, dtypes and shapes, bit for bit, where all sums are exact."""
    product, plain = (TRANSFORMS[transform](fun) for fun in functions(case, "bfloat16"))
    run = EAGER.get(transform, jax.jit)  # one compilation in place of one for each operation
    assert_identical(*run(lambda x, w: (product(x, w), plain(x, w)))(*operands(case, "bfloat16", rng)))


@pytest.mark.covering(1)
@cases
@dtypes
@pytest.mark.parametrize("axes", [None, (0, None), (None, 0), (0, 0)])
def test_operands_are_narrow_and_the_weight_gradient_is_not(case, dtype, axes, rng):
    """All three matmuls take 16-bit operands; that which makes the gradient of the weight returns float32.

    So they do for each of many examples or weights.
    """
    product, _ = functions(case, dtype)
    x, w = operands(case, dtype, rng)
    grad = jax.grad(total(product), (0, 1))
    if axes:
        grad = jax.vmap(grad, axes)
        x, w = (array if axis is None else array[None] for array, axis in zip((x, w), axes, strict=True))
    operands_of = [{v.aval.dtype.name for v in eqn.invars} for eqn in equations("dot_general", grad, x, w)]
    assert operands_of == [{dtype}] * 3
    results = [eqn.outvars[0].aval.dtype.name for eqn in equations("dot_general", grad, x, w)]
    assert sorted(results) == sorted([dtype, dtype, "float32"])


@dtypes
def test_the_gradient_is_rounded_once(dtype, rng):
    """Its error against float64 is that of a float32 sum, where a 16-bit matmul is off by half its own ulp.

    The CPU rounds it first, so the matmul of other platforms is run eagerly, on matrices, where the CPU can.
    """
    x = jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)
    g = jnp.asarray(rng.standard_normal((64, 8)), dtype)
    dims = {"dimension_numbers": (((0,), (0,)), ((), ())), "precision": None, "out_sharding": None}
    found = _matmul._product(
        x.astype(dtype), g, compute_dtype=jnp.dtype(dtype), preferred_element_type=jnp.float32, **dims
    )
    exact = np.asarray(x.astype(dtype), np.float64).T @ np.asarray(g, np.float64)
    magnitude = np.abs(np.asarray(x.astype(dtype), np.float64)).T @ np.abs(np.asarray(g, np.float64))
    assert np.max(np.abs(found - exact) / magnitude) < 64 * 2.0**-24


POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots without batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
}


@pytest.mark.parametrize("saved", POLICIES)
def test_residuals_are_those_of_dot_general(saved, rng):
    """Checkpoint policies know it for the matmul that it is."""
    dtype = jnp.dtype("bfloat16")
    x, weights = jnp.ones((4, 8)), [jnp.asarray(rng.standard_normal((8, 8)), jnp.float32) for _ in range(3)]

    def layers(dot):
        def fun(weights, x):
            for w in weights:
                x = jnp.tanh(dot(x.astype(dtype), w).astype(jnp.float32))
            return x.sum()

        return fun if saved == "none" else jax.checkpoint(fun, policy=POLICIES[saved])

    def residuals(dot):
        _, pullback = jax.vjp(layers(dot), weights, x)
        return sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(pullback))

    dims = (("dimension_numbers", (((1,), (0,)), ((), ()))),)
    kind = Matmul(dtype, dims, dtype)
    ours, plain = residuals(lambda x, w: matmul(x, w, kind)), residuals(lambda x, w: x @ w.astype(dtype))
    assert ours == plain


def test_autocast_gives_weights_float32_gradients_on_one_device_as_on_many(rng):
    """Everywhere, unless gradients are to be added up in 16 bits."""
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((8, 16), (16, 2)))

    def wide(policy, wrap=lambda fun: fun):
        fun = wrap(jax.grad(lambda w, x: jmp.autocast(lambda w, x: x @ w, policy)(w, x).sum()))
        return [eqn.params["preferred_element_type"] for eqn in equations("dot_general", fun, w, x)][-1] == jnp.float32

    narrow = jmp.Policy("float32", "bfloat16", "float32", reduce_dtype="bfloat16")
    assert wide("mixed_bfloat16")
    assert not wide(narrow)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    P = jax.sharding.PartitionSpec
    assert wide(
        "mixed_bfloat16", lambda fun: jax.shard_map(fun, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    )


def _linen():
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
    params = model.init(jax.random.key(0), jnp.ones((4, 6)))
    forward = jmp.linen.autocast(model.apply, "mixed_bfloat16")
    return lambda params, x: forward(params, x).sum(), params


def _nnx():
    model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    forward = jmp.nnx.autocast(lambda model, x: model(x), "mixed_bfloat16")
    return lambda params, x: forward(nnx.merge(graphdef, params), x).sum(), params


@pytest.mark.parametrize("make", [_linen, _nnx], ids=["linen", "nnx"])
def test_gradients_of_flax_layers_leave_their_products_in_float32(make):
    """The wrappers of both frameworks: weights and what is returned in float32, activations in 16 bits."""
    loss, params = make()
    found = equations("dot_general", jax.grad(loss), params, jnp.ones((4, 6)))
    results = [eqn.outvars[0].aval.dtype.name for eqn in found]
    assert sorted(results) == ["bfloat16"] * 2 + ["float32"] * 3


def _in_loop(x, w):
    return jax.lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ w.reshape(4, 8, 8)[i]), x)


WAYS = {
    "as it is": lambda x, w: x @ w.reshape(8, 32),
    "transposed": lambda x, w: x @ w.reshape(32, 8).T,
    "cut": lambda x, w: x @ w.reshape(4, 8, 8)[1] + x @ w.reshape(4, 8, 8)[2],
    "split": lambda x, w: x @ jnp.split(w.reshape(8, 32), 2, axis=1)[1],
    "joined": lambda x, w: x @ jnp.concatenate([w.reshape(8, 32)[:, :3], w.reshape(8, 32)[:, 5:]], axis=1),
    "in a loop": _in_loop,
    "scanned": lambda x, w: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w.reshape(4, 8, 8))[0],
    "under checkpoint": lambda x, w: jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, w.reshape(8, 32)),
    "under vmap": lambda x, w: jax.vmap(lambda x: x @ w.reshape(8, 32))(x),
    "in a branch": lambda x, w: jax.lax.cond(
        True, lambda: x @ w.reshape(8, 32), lambda: jnp.tanh(x) @ w.reshape(8, 32)
    ),
    "looked up and multiplied": lambda x, w: jnp.take(w.reshape(32, 8), jnp.arange(4), axis=0) @ w.reshape(32, 8).T,
}


@pytest.mark.parametrize("accumulate", slow_but_for([None], [None, jnp.float32]))
@pytest.mark.parametrize("way", slow_but_for(WAYS.keys() - {"split", "joined", "in a loop", "under vmap"}, WAYS))
def test_weights_that_were_moved_are_weights(way, accumulate, rng):
    """Transposed, cut, joined, carried through loops: every matmul that makes a part of the gradient is float32."""
    x, w = (jnp.asarray(rng.standard_normal(shape) / 3, jnp.float32) for shape in ((4, 8), (256,)))
    fun = jmp.autocast(WAYS[way], "mixed_bfloat16", accumulation_dtype=accumulate)
    grad = jax.grad(lambda w, x: fun(x, w).sum())
    plain = jax.grad(lambda w, x: WAYS[way](x, w).sum())
    forward = equations("dot_general", lambda w, x: WAYS[way](x, w), w, x)
    found = [eqn for eqn in equations("dot_general", grad, w, x) if "compute_dtype" in eqn.params]
    wide = [eqn for eqn in found if eqn.outvars[0].aval.dtype == jnp.float32]
    assert len(wide) >= len(forward)
    assert {v.aval.dtype.name for eqn in wide for v in eqn.invars} == {"bfloat16"}
    low, exact = jax.jit(lambda w, x: (grad(w, x), plain(w, x)))(w, x)
    error = np.linalg.norm(low - exact) / np.linalg.norm(exact)
    assert error < 4 * 4 * 2.0**-8  # four layers, in each of which four roundings to 16 bits follow one another


def test_float32_gradients_of_weights_keep_no_more_for_the_backward_pass(rng):
    """A scale is kept once, not once for every row, and a value that three matmuls read is rounded once."""
    x, params = (
        jnp.ones((64, 16)),
        {
            "w": jnp.asarray(rng.standard_normal((16, 16)), jnp.float32),
            "scale": jnp.ones(16),
            "table": jnp.asarray(rng.standard_normal((64, 16)), jnp.float32),
        },
    )

    def loss(params, x):
        hidden = ((x @ params["w"]) * params["scale"][None] + params["scale"][None]) @ params["w"]
        rows = jnp.take(params["table"], jnp.arange(64), axis=0)
        return (hidden + rows @ params["w"] + rows @ params["w"].T).sum()

    def residuals(policy):
        _, pullback = jax.vjp(jmp.autocast(loss, policy), params, x)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))

    narrow = jmp.Policy("float32", "bfloat16", "float32", reduce_dtype="bfloat16")
    assert residuals("mixed_bfloat16") <= residuals(narrow)


IN_LOW_PRECISION = {
    "scaled": lambda x, w: w * 0.5,
    "shifted": lambda x, w: w + 0.5,
    "two weights": lambda x, w: w - x[:1] * w,
    "a row": lambda x, w: w * x[:1],
    "a row, first": lambda x, w: x[:1] * w,
    "a row, added": lambda x, w: x[:1] + w,
    "a column": lambda x, w: w * x[:, :1],
}


@pytest.mark.parametrize("name", IN_LOW_PRECISION)
def test_in_low_precision_weights_are_rounded_and_their_gradients_are_not(name):
    """Whatever else takes part: numbers, rows, columns, other weights. The sum of 300 ones is no number of bfloat16."""
    fun, x, w = IN_LOW_PRECISION[name], jnp.full((300, 300), 1.0), jnp.full((300, 300), 1.0)
    low = jmp.autocast(jmp.low_precision(fun), "mixed_bfloat16")
    found, expected = (jax.vjp(run, x, w) for run in (low, fun))
    assert_identical(found[0], expected[0])
    for cotangents in zip(*(pullback(jnp.ones((300, 300))) for _, pullback in (found, expected)), strict=True):
        np.testing.assert_allclose(*cotangents, rtol=2**-12)


EXPLICIT = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2)
EXPLICIT_CASES = {
    "weights off the mesh": (lambda x, w: x @ w, None, None),
    "weights split": (lambda x, w: x @ w, jax.P(None, "model"), None),
    "per example": (lambda x, w: x @ w, None, (0, None)),
    "per example, weights split": (lambda x, w: x @ w, jax.P(None, "model"), (0, None)),
    "many weights": (lambda x, w: x @ w.reshape(16, 1), None, (None, 0)),
    "bias": (lambda x, w: (x @ w) * w[:1] + w[:1], None, None),
}


@pytest.mark.parametrize("case", EXPLICIT_CASES)
def test_explicit_meshes(case, rng):
    """Where shardings are in types, gradients have the types and the values that plain JAX gives them."""
    fun, spec, axes = EXPLICIT_CASES[case]
    x, w = (jnp.asarray(rng.integers(-3, 4, shape), jnp.float32) for shape in ((8, 16), (16, 16)))
    with jax.set_mesh(EXPLICIT):
        x = jax.device_put(x, jax.P("data", None))
        w = w if spec is None else jax.device_put(w, spec)

        def grad(fun):
            loss = jax.grad(lambda x, w: (fun(x, w).astype(jnp.float32) ** 2).sum(), 1)
            return jax.jit(jax.vmap(loss, axes) if axes else loss)(x, w)

        low = jmp.autocast(fun, "mixed_bfloat16")
        assert axes or contractions(low, x, w) == [("", {"bfloat16"})]
        found, plain = grad(low), grad(fun)
        assert jax.typeof(found) == jax.typeof(plain)
        np.testing.assert_allclose(found, plain, atol=0.05 * float(jnp.max(jnp.abs(plain))))
