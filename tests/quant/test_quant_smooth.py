"""Smoothing and compensated rounding: which weights, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from support.comparisons import assert_identical, slow_but_for
from support.lowbit import normal, relative

import jmp_lite as jmp
from jmp_lite import quant
from jmp_lite.quant import _sites

JITTED = jax.jit(lambda w, x: jnp.tanh(x @ w))


def layer(h, w):
    return nn.silu(h @ w), None


def attention(p, x):
    heads = jnp.einsum("bd,dhk->bkh", x, p[0])
    return jnp.einsum("bkh,hke->be", heads, p[1])


def in_while(p, x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p[0])), (0, x))[1]


def in_cond(p, x):
    return lax.cond(x[0, 0] > -100, lambda: x @ p[0], lambda: jnp.ones_like(x) @ p[1])


#: By name: the function, shapes of its weights, and which of them are smoothed.
CASES = {
    "two layers": (lambda p, x: jnp.tanh(x @ p[0]) @ p[1] + p[2], [(16, 32), (32, 5), (1, 5)], [0, 1]),
    "weight on the left": (lambda p, x: (p[0] @ x.T).T, [(8, 16)], [0]),
    "transposed": (lambda p, x: x @ p[0].astype(jnp.bfloat16).astype(jnp.float32).T, [(8, 16)], [0]),
    "one program, two weights": (lambda p, x: JITTED(p[1], JITTED(p[0], x)), [(16, 16)] * 2, [0, 1]),
    "scan": (lambda p, x: lax.scan(layer, x, p[0])[0], [(3, 16, 16)], [0]),
    "scan, checkpoint": (lambda p, x: lax.scan(jax.checkpoint(layer), x, p[0])[0], [(3, 16, 16)], [0]),
    "a layer of a stack": (lambda p, x: x @ p[0][1], [(3, 16, 16)], [0]),
    "while": (in_while, [(16, 16)], [0]),
    "cond": (in_cond, [(16, 8), (16, 8)], [0]),
    "attention": (attention, [(16, 2, 8), (2, 8, 16)], [0, 1]),
    "merged heads": (lambda p, x: x @ p[0].reshape(16, 8), [(2, 8, 8)], [0]),
    "experts": (lambda p, x: jnp.einsum("bd,edh->ebh", x, p[0]), [(3, 16, 4)], [0]),
    "ragged": (lambda p, x: lax.ragged_dot(x, p[0], jnp.array([3, 4, 1])), [(3, 16, 4)], [0]),
    "vmap": (lambda p, x: jax.vmap(lambda row: row @ p[0])(x), [(16, 4)], [0]),
    "taken twice": (lambda p, x: x @ p[0] + jnp.sin(x) @ p[0], [(16, 4)], [0]),
    "looked up too": (lambda p, x: x @ p[0].T + p[0][3, 0] + x @ p[1], [(8, 16), (16, 8)], [1]),
    "summed first": (lambda p, x: x @ (p[0] + 1) + x @ p[1], [(16, 8)] * 2, [1]),
    "over both axes": (lambda p, x: x @ p[0] @ p[0].T + x @ p[1], [(16, 8), (16, 16)], [1]),
    "carried": (
        lambda p, x: x @ lax.scan(lambda w, _: (w[:, ::-1], None), p[0], length=2)[0] + x @ p[1],
        [(16, 8)] * 2,
        [1],
    ),
    "out of a branch": (
        lambda p, x: x @ p[0] + x @ lax.cond(x[0, 0] > 0, lambda: p[0], lambda: p[0].T) + x @ p[1],
        [(16, 16)] * 2,
        [1],
    ),
    "out of a loop": (
        lambda p, x: x @ p[0] + x @ lax.scan(lambda _, i: (None, p[0]), None, jnp.arange(2))[1][0] + x @ p[1],
        [(16, 8)] * 2,
        [1],
    ),
    "slices out of a loop": (
        lambda p, x: x @ p[0][0] + x @ lax.scan(lambda _, w: (None, w.T), None, p[0])[1][1].T + x @ p[1],
        [(2, 16, 8), (16, 8)],
        [1],
    ),
    "returned": (lambda p, x: (x @ p[0], p[0], x @ p[1]), [(16, 8)] * 2, [1]),
    "convolution": (
        lambda p, x: (
            lax.conv_general_dilated(x[..., None], p[0], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))[..., 0]
            @ p[1]
        ),
        [(3, 1, 1), (16, 8)],
        [1],
    ),
}


def weights(rng, shapes):
    return [normal(rng, *shape) / 4 for shape in shapes]


def wide(rng):
    """Activations of which single channels are a hundred times as large as others."""
    return normal(rng, 8, 16) * jnp.exp2(jnp.round(3 * normal(rng, 1, 16)))


QUICK = {
    *("two layers", "transposed", "one program, two weights", "scan, checkpoint", "while", "cond", "attention"),
    *("experts", "ragged", "vmap", "looked up too"),
}
#: Cases in which compensated rounding does what it does in others, once it has found the weights.
ALIKE = {"two layers", "one program, two weights", "while", "vmap", "looked up too"}


@pytest.mark.parametrize("case", CASES)
def test_which_weights_are_found(case):
    """Traced alone: with the axes that they are contracted over; others that matmuls take have other uses."""
    fun, shapes, expected = CASES[case]
    params, x = [jnp.ones(shape) for shape in shapes], jnp.ones((8, 16))
    found = _sites.call(fun, (params, x), {})
    axes = quant.contracted_axes(fun)(params, x)
    reached = range(2) if case == "cond" else expected  # in some branch
    assert found.contracted == {str(number): axes[number] for number in reached}
    assert not found.refused & found.contracted.keys()
    sites = [site for site in found.places.values() if site]
    assert {site.weight for site in sites} == found.contracted.keys()
    for site in sites:
        assert site.shape == shapes[int(site.weight)]
        assert tuple(sorted(site.order)) == site.contracted == found.contracted[site.weight]
        assert np.prod([site.shape[axis] for axis in site.order]) == 16 or case in ("two layers", "attention")


@pytest.mark.parametrize("case", slow_but_for(QUICK, CASES))
def test_smoothed_functions_compute_the_same(case, rng):
    """Bit for bit: factors are powers of two. What is looked up, summed, returned or carried keeps its weights.

    A compiler may add up in another order: by an ulp of the largest term for each of the 32 terms, in three layers.
    """
    fun, shapes, expected = CASES[case]
    params, x = weights(rng, shapes), wide(rng)
    run, smoothed = quant.smooth(fun, params, [(x,), (x / 2,)])
    changed = [number for number, pair in enumerate(zip(params, smoothed, strict=True)) if np.any(pair[0] != pair[1])]
    assert changed == expected
    if "one program" not in case:  # compiled
        assert_identical(run(smoothed, x)[0], fun(params, x)[0])
    both = jax.jit(lambda smoothed, params, x: (run(smoothed, x), fun(params, x)))(smoothed, params, x)
    for found, exact in zip(*map(jax.tree.leaves, both), strict=True):
        assert relative(found, exact) < 3 * 32 * 2**-24


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_factors_are_those_of_the_paper_to_a_power_of_two(alpha, rng):
    w, x = normal(rng, 16, 8), [wide(rng), wide(rng)]
    _, smoothed = quant.smooth(lambda w, x: x @ w, w, [(x[0],), (x[1],)], alpha=alpha)
    of_x, of_w = np.max([np.abs(b).max(0) for b in x], axis=0), np.abs(w).max(1)
    exact = of_x**alpha / of_w ** (1 - alpha)
    found = np.asarray(smoothed / w)
    assert np.all(found == found[:, :1])
    assert np.all(np.frexp(found)[0] == 0.5)
    assert np.all(np.abs(np.log2(found[:, 0] / exact)) <= 0.5 + 1e-6)


@pytest.mark.parametrize("policy", ["full", "mixed_bfloat16"])
def test_smoothing_helps_where_channels_differ(policy, rng):
    """Of 8 bits for activations with channels 2**8 apart, under autocast, and as a file would hold the weights."""
    w = normal(rng, 16, 32)
    x = normal(rng, 64, 16) * jnp.where(jnp.arange(16) == 3, 256.0, 1.0)[None]
    w = w.at[3].divide(256)
    exact = x @ w
    run, smoothed = quant.smooth(lambda w, x: x @ w, w, [(x,)])

    def error(fun, params):
        return relative(jmp.autocast(fun, policy, dot=quant.W8A8)(params, x), exact)

    assert error(lambda w, x: x @ w, w) > 0.2
    assert error(run, smoothed) < 0.02
    held = quant.quantize_tree(smoothed, axes=quant.contracted_axes(run)(smoothed, x))
    assert relative(run(held.dequantize(), x), exact) < 0.02


def test_channels_of_zeros_and_flax(rng):
    model, x = nn.Dense(8), wide(rng).at[:, 2].set(0)
    params = model.init(jax.random.key(0), x)
    run, smoothed = quant.smooth(model.apply, params, [(x,)])
    assert_identical(run(smoothed, x), model.apply(params, x))
    np.testing.assert_array_equal(smoothed["params"]["kernel"][2], params["params"]["kernel"][2])
    assert quant.contracted_axes(run)(smoothed, x)["params"]["kernel"] == (0,)


def product(p, x, *, is_tied=False):
    return (x @ p["w"]) @ p["w"].T if is_tied else x @ p["w"]


def test_quantized_parameters_keep_their_factors(rng):
    """Factors belong to paths: what stands there may become two arrays, and others may come and go."""
    params, x = {"a": normal(rng, 16, 16), "w": normal(rng, 16, 8)}, wide(rng)

    def fun(p, x):
        return jnp.tanh(x @ p["a"]) @ p["w"] + p.get("0", 0.0)

    run, smoothed = quant.smooth(fun, params, [(x,)])
    exact = fun(params, x)
    assert_identical(run({"0": jnp.zeros((1, 8)), **smoothed}, x), exact)
    for small in (quant.quantize_tree(smoothed), {**smoothed, "a": quant.quantize_array(smoothed["a"], axes=[0])}):
        expected = run(quant.dequantize_tree(small), x)
        assert relative(run(small, x), expected) < 1e-6
        assert relative(run(small, x), exact) < 0.03
    assert relative(run(quant.gptq(run, smoothed, [(x,)], "int8"), x), exact) < 0.03


def test_calls_that_use_a_weight_otherwise_are_refused(rng):
    """Or it is left alone, if a batch was such a call."""
    params, x = {"w": normal(rng, 16, 16)}, wide(rng)
    run, smoothed = quant.smooth(product, params, [(x,)])
    with pytest.raises(jmp.errors.InvalidRecipeError, match=r"'w' was smoothed .* uses it in another way"):
        run(smoothed, x, is_tied=True)
    with pytest.raises(jmp.errors.InvalidRecipeError, match="parameters lack 'w'"):
        run({"v": smoothed["w"]}, x)
    both = {"w": normal(rng, 16, 16), "v": normal(rng, 16, 16)}

    def often(p, x, mode):
        return product(p, x, is_tied=mode == "tied") @ p["v"]

    run, smoothed = quant.smooth(often, both, [(x, "plain"), (x, "tied")])
    assert_identical(smoothed["w"], both["w"])
    assert_identical(run(smoothed, x, "tied"), often(both, x, "tied"))
    assert_identical(run(smoothed, np.asarray(x), "plain"), often(both, x, "plain"))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_factors_beyond_the_range_of_float16(alpha):
    """Factors are multiplied in float32, whatever the dtypes of weights and activations."""
    w, x = jnp.full((8, 2), 6e-8, jnp.float16).at[:, 1].set(0), jnp.full((1, 8), 5e4, jnp.float16)
    run, smoothed = quant.smooth(lambda w, x: x @ w, w, [(x,)], alpha=alpha)
    np.testing.assert_allclose(run(smoothed, x), x @ w, rtol=2**-9)


def test_weights_that_become_integers_are_left_alone(rng):
    params = [10 * normal(rng, 16, 4), normal(rng, 16, 4)]

    def fun(p, x):
        return x @ p[0].astype(jnp.int8).astype(jnp.float32) + x @ p[1]

    _, smoothed = quant.smooth(fun, params, [(wide(rng),)])
    assert_identical(smoothed[0], params[0])
    assert np.any(smoothed[1] != params[1])


def test_empty_batches_say_nothing(rng):
    w, x = normal(rng, 16, 4), wide(rng)
    for batches in ([(x,), (x[:0],)], [(x[:0],), (x,)]):
        _, smoothed = quant.smooth(lambda w, x: x @ w, w, batches)
        assert_identical(smoothed, quant.smooth(lambda w, x: x @ w, w, [(x,)])[1])


# --- Compensated rounding ---


def correlated(rng, n=32, rows=512):
    return normal(rng, rows, n) @ (normal(rng, n, n) * jnp.exp2(-jnp.arange(n) / 4)[:, None])


@pytest.mark.parametrize("spec", ["int4:tile16", "int4:tile32", "int8:channel:margin4", "e2m1:tile16"])
def test_compensated_weights_change_products_less(spec, rng):
    """With the same scales; and scales, shapes and dtypes are those of ``quantize_tree``."""
    x, w = correlated(rng), normal(rng, 32, 8)
    nearest = quant.quantize_tree(w, quant._spec.parse_spec(spec))
    found = quant.gptq(lambda w, x: x @ w, w, [(x[:256],), (x[256:],)], spec)
    assert_identical(found.scale, nearest.scale)
    assert (found.values.dtype, found.dtype) == (nearest.values.dtype, nearest.dtype)
    assert relative(x @ found, x @ w) < 0.6 * relative(x @ nearest, x @ w)


def reference(w, x, scale):
    """Row by row in float64, the inverse of what is left of the matrix taken again for each: the definition."""
    moment = np.asarray(x, np.float64).T @ np.asarray(x, np.float64)
    moment += 0.01 * np.mean(np.diag(moment)) * np.eye(len(moment))
    w, rounded = np.array(w, np.float64), np.zeros(w.shape)
    for row in range(len(w)):
        rounded[row] = np.clip(np.rint(w[row] / scale[row]), -7, 7)
        inverse = np.linalg.inv(moment[row:, row:])
        w[row:] -= np.outer(inverse[:, 0], (w[row] - rounded[row] * scale[row]) / inverse[0, 0])
    return rounded


def test_pruned_weights_stay_pruned(rng):
    x, w = correlated(rng), jnp.where(jnp.arange(32)[:, None] % 4 < 2, 0, normal(rng, 32, 8))
    found = quant.gptq(lambda w, x: x @ w, w, [(x,)], "int8")
    assert not jnp.any((w == 0) & (found != 0))
    assert relative(x @ found, x @ w) < relative(x @ quant.quantize_tree(w), x @ w)


def test_compensated_weights_are_those_of_the_definition(rng):
    """But for ties that float32 breaks otherwise, of which each changes the rows below."""
    x, w = correlated(rng, 16), normal(rng, 16, 64)
    found = quant.gptq(lambda w, x: x @ w, w, [(x,)], "int4:tile16")
    expected = reference(w, x, np.broadcast_to(found.scale, (16, 64)))
    same = np.all(np.asarray(found.values, np.float64) == expected, axis=0)
    assert same.mean() > 0.9


@pytest.mark.parametrize("case", slow_but_for(QUICK - ALIKE, CASES))
def test_every_weight_that_products_take_is_quantized(case, rng):
    fun, shapes, _ = CASES[case]
    params, x = weights(rng, shapes), wide(rng)
    nearest = quant.quantize_tree(params, axes=quant.contracted_axes(fun)(params, x))
    found = quant.gptq(fun, params, [(x,)], "int8")
    assert jax.tree.structure(found) == jax.tree.structure(nearest)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(nearest), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert np.max(np.abs(np.asarray(ours, np.float32) - np.asarray(theirs, np.float32)), initial=0) < 64


def test_orders_of_channels_make_no_difference(rng):
    """A weight that meets its channels in two orders has one matrix of them."""
    p, x = normal(rng, 4, 6, 16), correlated(rng, 24, 128).reshape(128, 4, 6)

    def first(p, x):
        return x.reshape(-1, 24) @ p.reshape(24, 16)

    def second(p, x):
        return x.transpose(0, 2, 1).reshape(-1, 24) @ p.transpose(1, 0, 2).reshape(24, 16)

    once, twice = (
        quant.gptq(fun, p, [(x,)], "int4:tile24") for fun in (first, lambda p, x: (first(p, x), second(p, x)))
    )
    assert np.mean(np.asarray(once.values) == np.asarray(twice.values)) > 0.99


@pytest.mark.parametrize("size", [1e-25, 1e-19, 1.0, 1e18])
def test_activations_of_any_size(size, rng):
    x, w = correlated(rng), normal(rng, 32, 8)
    found = quant.gptq(lambda w, x: x @ w, w, [(x * size,)], "int4:tile32")
    assert relative(x @ found, x @ w) < 0.6 * relative(
        x @ quant.quantize_tree(w, quant.QuantSpec("int4", tile=32)), x @ w
    )


def test_other_leaves_stand_among_weights(rng):
    """Functions, texts, numbers, integers and what has no elements, before and behind them."""
    w = {"body": normal(rng, 16, 16), "head": normal(rng, 16, 4)}
    others = {
        "a": jnp.tanh,
        "a2": "text",
        "a3": jnp.arange(3),
        "a4": jnp.zeros((0, 16)),
        "g": 0.5,
        "none": None,
        "z": 2,
    }

    def fun(p, x):
        return p["a"](x @ p["body"]) @ p["head"] * p["g"] + p["a3"].sum().astype(jnp.float32)

    params, x = {**w, **others}, wide(rng)
    assert _sites.call(fun, (params, x), {}).contracted == {"body": (0,), "head": (0,)}
    run, smoothed = quant.smooth(fun, params, [(x,)])
    compensated = quant.gptq(fun, params, [(x,)], "int8")
    for found in (smoothed, compensated):
        assert all(found[name] is leaf for name, leaf in others.items())
        assert all(np.any(np.asarray(found[name]) != leaf) for name, leaf in w.items())
    assert_identical(run(smoothed, x), fun(params, x))
    assert relative(fun(compensated, x), fun(params, x)) < 0.03


def test_activations_of_zeros_say_nothing(rng):
    """Nothing that was lost would show; and batches are added up."""
    w, x = normal(rng, 16, 4), correlated(rng, 16, 64)
    fun = lambda w, x: x @ w  # noqa: E731
    assert_identical(quant.gptq(fun, w, [(0 * x,)], "int8").values, quant.quantize_tree(w).values)
    whole, parts = (
        quant.gptq(fun, w, batches, "int4:tile16") for batches in ([(x,)], [(0 * x,), (x[:40],), (x[40:],)])
    )
    assert np.mean(np.asarray(whole.values) == np.asarray(parts.values)) > 0.95


def test_weights_that_no_batch_reached_are_rounded_to_nearest(rng):
    w, x = normal(rng, 16, 4), wide(rng)
    never = quant.gptq(lambda w, x: lax.cond(x.sum() > 1e9, lambda: x @ w, lambda: x[:, :4]), w, [(x,)], "int8")
    assert_identical(never.values, quant.quantize_tree(w).values)
    kept = quant.gptq(
        lambda p, x: x @ p["embed"] @ p["w"], {"embed": quant.quantize_array(w), "w": w.T}, [(x,)], "int8"
    )
    assert kept["embed"].shape == (16, 4)
    assert quant.gptq(lambda p, x: x @ p["embed"] @ p["w"], {"embed": w, "w": w.T}, [(x,)], "int8")["embed"] is w
    with pytest.raises(jmp.errors.InvalidRecipeError, match="Nothing of"):
        quant.gptq(lambda w, x: x + w.sum(), w, [(x,)], "int8")


# --- Bad input ---

BAD = {
    "no function": (lambda w, x: quant.smooth(3, w, [(x,)]), "smooth"),
    "no batches": (lambda w, x: quant.smooth(jnp.matmul, w, []), "no batches"),
    "a batch that is not a tuple": (
        lambda w, x: quant.smooth(jnp.matmul, w, [x]),
        r"such as \(x,\), got float32\[8, 16\]",
    ),
    "under jit": (
        lambda w, x: jax.jit(lambda w: quant.smooth(lambda w, x: x @ w, w, [(x,)])[1])(w),
        "smooth looks at numbers, and there are none while JAX traces",
    ),
    "gptq under jit": (
        jax.jit(lambda w, x: quant.gptq(lambda w, x: x @ w, w, [(x,)], "int8")),
        "gptq looks at numbers",
    ),
    "calibrate under jit": (
        jax.jit(lambda w, x: quant.calibrate(lambda dot: jnp.dot, "w8a8_static", [(w, x)]) and x),
        "calibrate looks at numbers",
    ),
    "alpha": (lambda w, x: quant.smooth(lambda w, x: x @ w, w, [(x,)], alpha=2), "alpha must be a number from 0 to 1"),
    "alpha of text": (lambda w, x: quant.smooth(lambda w, x: x @ w, w, [(x,)], alpha="a"), "alpha must be"),
    "no weight": (lambda w, x: quant.smooth(lambda w, x: x @ (w * w), w, [(x,)]), "No weight can be smoothed"),
    "quantized": (
        lambda w, x: quant.smooth(lambda w, x: x @ w, quant.quantize_tree(w), [(x,)]),
        "No weight can be smoothed",
    ),
    "not finite": (lambda w, x: quant.smooth(lambda w, x: x @ w, w, [(x / 0,)]), "not finite"),
    "gptq of no function": (lambda w, x: quant.gptq("a", w, [(x,)]), "gptq"),
    "gptq of no batches": (lambda w, x: quant.gptq(jnp.matmul, w, []), "no batches"),
    "gptq of no format": (lambda w, x: quant.gptq(lambda w, x: x @ w, w, [(x,)], "int3"), "int3"),
    "gptq of a tile": (lambda w, x: quant.gptq(lambda w, x: x @ w, w, [(x,)], "int4:tile7"), "tiles of 7 do not"),
    "gptq not finite": (lambda w, x: quant.gptq(lambda w, x: x @ w, w, [(x / 0,)], "int8"), "not finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case, rng):
    call, message = BAD[case]
    with pytest.raises(jmp.errors.JmpLiteError, match=message):
        call(normal(rng, 16, 4), wide(rng))
