"""What takes the place of lax.dot_general under autocast: the user's matmuls, and sums of matmuls in float32."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import jaxprs
from support.autocast_cases_common import normal, x_and_w
from support.comparisons import assert_identical, compiled_as_on, slow_but_for

import jmp_lite as jmp
from jmp_lite.products._matmul import RoundsOperands

LOW = "mixed_bfloat16"
X, W = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
BF16, F16, F32 = "bfloat16", "float16", "float32"
ORDERS = {
    "forward": lambda cast, loss: cast(loss),
    "grad(autocast)": lambda cast, loss: jax.grad(cast(loss), (0, 1)),
    "autocast(grad)": lambda cast, loss: cast(jax.grad(loss, (0, 1))),
}


def layers(x, w):
    """Two matmuls, the first in scope "router"."""
    with jax.named_scope("router"):
        x = jax.jit(jnp.matmul)(x, w)
    return jnp.mean(jnp.tanh(jax.jit(jnp.matmul)(jnp.tanh(x), w)) ** 2)


# --- The user's matmuls ---


def recording(seen):
    def dot(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
        seen.append((str(lhs.dtype), str(rhs.dtype), str(preferred_element_type)))
        return lax.dot_general(lhs, rhs, dimension_numbers, preferred_element_type=jnp.float32)

    return dot


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("place", ["argument", "rule"])
def test_a_product_of_the_users(order, place):
    """It has the signature of lax.dot_general, and is given the compute dtype; autocast(grad) asks it backward too."""
    seen = []
    dot = recording(seen)
    options = {"dot": dot} if place == "argument" else {"rules": [jmp.Rule("router", dot=dot)]}
    cast = functools.partial(jmp.autocast, policy=LOW, **options)
    shapes = jax.eval_shape(ORDERS[order](cast, layers), X, W)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(shapes)} == {F32}
    calls = {"forward": 1, "grad(autocast)": 1, "autocast(grad)": 3}[order] * (2 if place == "argument" else 1)
    assert seen == [(BF16, BF16, BF16)] * calls


@pytest.mark.filterwarnings("ignore:dot= changes no matmul")
def test_a_product_of_the_users_is_not_asked_in_full_precision():
    seen = []
    jax.eval_shape(jmp.autocast(layers, LOW, rules=jmp.Rule(precision="full"), dot=recording(seen)), X, W)
    jax.eval_shape(jmp.autocast(jmp.full_precision(jnp.matmul), LOW, dot=recording(seen)), X, W)
    assert not seen


def test_a_product_of_the_users_is_asked_under_a_policy_of_float32():
    """It may compute in 8 bits what stands in a program that is float32 otherwise."""
    seen = []
    jax.eval_shape(jmp.autocast(jnp.matmul, F32, dot=recording(seen)), X, W)
    assert seen == [(F32, F32, F32)]


@pytest.mark.parametrize("result", [BF16, F16, F32])
def test_a_float32_result_of_the_users_product_is_kept(result):
    """What follows it runs in float32 then, also in a loop; any other result is held in the compute dtype."""
    dot = lambda lhs, rhs, dims, **_: lax.dot_general(lhs, rhs, dims, preferred_element_type=result)  # noqa: E731
    step = lambda h, w: jnp.tanh(h @ w)  # noqa: E731
    scanned = lambda h, w: lax.scan(lambda h, _: (step(h, w), None), h, None, length=2)[0]  # noqa: E731
    looped = lambda h, w: lax.fori_loop(0, 2, lambda i, h: step(step(h, w), w), h)  # noqa: E731
    for fun in (step, scanned, looped):
        records = jmp.explain(lambda x, w, fun=fun: fun(x, w) @ w, LOW, dot=dot)(X, W)
        found = [r.in_dtypes[0] for r in records if r.primitive == "tanh"]
        expected = F32 if result == F32 else BF16
        assert found[0] == expected, fun


def test_the_product_of_a_rule_goes_before_that_of_all():
    """Outside of its scope the other one is asked."""
    asked = {"rule": [], "all": []}
    dots = {name: recording(seen) for name, seen in asked.items()}
    jax.eval_shape(jmp.autocast(layers, LOW, rules=jmp.Rule("router", dot=dots["rule"]), dot=dots["all"]), X, W)
    assert [len(seen) for seen in asked.values()] == [1, 1]


def test_the_result_of_a_product_is_what_comes_out(rng):
    x, w = x_and_w(rng)
    half = lambda *args, **params: lax.dot_general(*args, **params) * jnp.bfloat16(0.5)  # noqa: E731
    expected = (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)
    assert_identical(jmp.autocast(jnp.matmul, LOW, dot=half)(x, w), 0.5 * expected)


class Recipe(RoundsOperands):
    """A recipe that writes down what it is asked, and what it multiplies."""

    depends_on_scope = True

    def __init__(self, *, only_weights=False):
        self.only_weights, self.scope, self.turns, self.seen = only_weights, "", [], []

    def __call__(self, lhs, rhs, *others, **params):
        result = params["preferred_element_type"]
        self.seen.append((self.scope, str(lhs.dtype), str(rhs.dtype), str(result)))
        return self.multiply(lhs.astype(result), rhs.astype(result), *others, **params)

    multiply = staticmethod(lax.dot_general)

    def instead_of(self, primitive):
        found = {"dot_general": None, "conv_general_dilated": lax.conv_general_dilated_p.bind}
        if primitive == "dot_general":
            return self
        if primitive not in found:
            return None
        other = copy.copy(self)
        other.multiply = found[primitive]
        return other

    def takes(self, *, has_weight):
        return has_weight or not self.only_weights

    def turned(self, are_weights):
        self.turns.append(tuple(are_weights))
        return self

    def at(self, scope):
        other = copy.copy(self)
        other.scope = scope
        return other


IMAGE, KERNEL = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 3, 8, 8), (4, 3, 2, 2)))


def convolution(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "VALID")


def groups(x, w):
    return lax.ragged_dot(x, jnp.stack([w, w]), jnp.array([4, 4], jnp.int32))


def in_scope(x, w):
    with jax.named_scope("here"):
        return jnp.tanh(x @ w)


#: Functions, and for each matmul which operands are weights, and the operands and the result that a recipe sees.
ASKED = {
    "a weight": (in_scope, (X, W), [(True, True)], [("here", BF16, F32, F32)]),
    "an activation": (
        lambda x, w: in_scope(jnp.tanh(x), w),
        (X, W),
        [(False, True)],
        [("here", BF16, F32, F32)],
    ),
    "a weight on both sides, for a matmul": (
        lambda x, w: in_scope(x, w) @ w[:, :4],
        (X, W),
        [(True, True), (False, True)],
        [("here", F32, F32, BF16), ("", BF16, F32, F32)],
    ),
    "layers": (
        lambda x, w: in_scope(in_scope(x, w), w),
        (X, W),
        [(True, True), (False, True)],
        [("here", F32, F32, BF16), ("here", BF16, F32, F32)],
    ),
    "a convolution": (
        lambda x, w: jnp.tanh(convolution(x, w)),
        (IMAGE, KERNEL),
        [(True, True)],
        [("", F32, F32, BF16)],
    ),
    "a convolution for a loss": (convolution, (IMAGE, KERNEL), [(True, True)], [("", F32, F32, BF16)]),
    "groups": (lambda x, w: jnp.tanh(groups(x, jnp.tanh(w))), (X, W), [(True, False)], []),
}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.filterwarnings("ignore:dot= changes no matmul")
def test_what_a_recipe_is_asked(name):
    """It knows the scope and which operands are weights, and rounds these itself."""
    fun, args, turns, seen = ASKED[name]
    recipe = Recipe()
    assert jax.eval_shape(jmp.autocast(fun, LOW, dot=recipe), *args) == jax.eval_shape(fun, *args)
    assert recipe.seen == seen
    assert [turn for turn in recipe.turns if turn] == turns


def test_a_recipe_for_weights_is_not_asked_for_matmuls_without():
    found = {}
    for only_weights in (False, True):
        recipe = Recipe(only_weights=only_weights)
        fun = lambda x, w: jnp.tanh(x @ w) @ jnp.tanh(w + 1)  # noqa: E731
        jax.eval_shape(jmp.autocast(fun, LOW, dot=recipe), X, W)
        found[only_weights] = len(recipe.seen)
    assert found == {False: 2, True: 1}


#: Dtypes of the operands and of the result that the program wrote, and whether a function takes the matmul's place.
WRITTEN = {
    "bfloat16": (BF16, BF16, BF16, True),
    "float16": (F16, F16, F16, True),
    "bfloat16 into float32": (BF16, BF16, F32, True),
    "float32 into bfloat16": (F32, F32, BF16, True),
    "integers": ("int32", "int32", "int32", False),
    "small integers": ("int16", "int16", "int16", False),
    "8 bits": ("float8_e4m3fn", "float8_e4m3fn", F32, False),
    "complex": ("complex64", "complex64", "complex64", False),
}


@pytest.mark.parametrize(("lhs", "rhs", "result", "replaced"), WRITTEN.values(), ids=WRITTEN)
@pytest.mark.filterwarnings("ignore:dot= changes no matmul")
def test_a_matmul_of_other_dtypes_keeps_them_though_its_function_is_the_users(lhs, rhs, result, replaced):
    """Floats of 16 and 32 bits; its operands are given as they are."""
    seen = []

    def dot(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
        seen.append((str(lhs.dtype), str(rhs.dtype), str(preferred_element_type)))
        return lax.dot_general(lhs, rhs, dimension_numbers, preferred_element_type=preferred_element_type)

    fun = lambda x, w: lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=result)  # noqa: E731
    args = jax.ShapeDtypeStruct((8, 16), lhs), jax.ShapeDtypeStruct((16, 16), rhs)
    run = jmp.autocast(fun, LOW, dot=dot)
    assert jax.eval_shape(run, *args).dtype == result
    assert seen == [(lhs, rhs, result)] * replaced
    [record] = jmp.explain(fun, LOW, dot=dot)(*args)
    assert (record.in_dtypes, record.out_dtypes) == ((lhs, rhs), (result,))
    assert record.reason == ("replaced by dot" if replaced else "not a matmul of float32 arrays")
    [record] = jmp.explain(fun, LOW)(*args)
    assert (record.reason, record.tag) == ("not a matmul of float32 arrays", "HIGH" if result == F32 else "NEUTRAL")


def test_why_a_matmul_of_other_dtypes_is_not_replaced():
    image, kernel = (jax.ShapeDtypeStruct(array.shape, BF16) for array in (IMAGE, KERNEL))
    x, w = (jax.ShapeDtypeStruct(array.shape, BF16) for array in (X, W))
    for fun, args in ((convolution, (image, kernel)), (groups, (x, w))):
        *_, record = jmp.explain(fun, LOW, dot=rounding)(*args)
        assert record.reason == "not a matmul of float32 arrays; dot= replaces only dot_general"


@jax.custom_jvp
def affine(x, w):
    return x @ w


affine.defjvp(lambda primals, tangents: (affine(*primals), tangents[0] @ primals[1] + primals[0] @ tangents[1]))


def rounding(lhs, rhs, dimension_numbers, **params):
    """Multiplies whole numbers; its derivative is that of a matmul."""
    lhs, rhs = (x + lax.stop_gradient(jnp.round(x) - x) for x in (lhs, rhs))
    return lax.dot_general(lhs, rhs, dimension_numbers, **params)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("side", [0, 1])
def test_in_a_tangent_a_product_that_rounds_is_linear(side, dtype):
    """A small tangent is not rounded away, on either side, and in a model of 16 bits neither."""
    ones = jnp.ones((8, 8), dtype)
    args, tangents = (ones, ones), [0 * ones, 0 * ones]
    tangents[side] = ones * 2.0**-6
    slope = jax.jvp(jmp.autocast(affine, LOW, dot=rounding), args, tuple(tangents))[1]
    assert jnp.array_equal(slope, jnp.full((8, 8), 2.0**-3))


WRONG = {
    "no array": (lambda *operands, **params: 1.0, "returned 1.0"),
    "another shape": (lambda *operands, **params: jnp.ones(3, jnp.bfloat16), r"returned bfloat16\[3\]"),
    "integers": (lambda *operands, **params: jnp.ones((8, 16), jnp.int32), r"returned int32\[8,16\]"),
    "none": (lambda *operands, **params: None, "returned None"),
}


@pytest.mark.parametrize(("op", "found"), WRONG.values(), ids=WRONG)
def test_a_function_that_returns_something_else_than_the_primitive_is_refused(op, found):
    with pytest.raises(jmp.errors.InvalidOpError, match=rf"'tanh' {found}.*must return float32\[8,16\]; any floating"):
        jax.eval_shape(jmp.autocast(jnp.tanh, LOW, ops={"tanh": op}), X)


PLACES = np.zeros((8, 2), np.int32)
SEVERAL = {
    "too few": (lambda x, **params: [x[:, :2]], r"returned bfloat16\[8,2\]\. It"),
    "too many": (lambda x, **params: [x[:, :2], jnp.asarray(PLACES), jnp.asarray(PLACES)], "returned"),
    "floats for integers": (lambda x, **params: [x[:, :2], x[:, :2]], "returned"),
    "other integers": (lambda x, **params: [x[:, :2], jnp.asarray(PLACES, jnp.uint8)], "returned"),
    "a number": (lambda x, **params: [x[:, :2], 3], r"returned bfloat16\[8,2\], 3\. It"),
}


@pytest.mark.parametrize(("op", "found"), SEVERAL.values(), ids=SEVERAL)
def test_a_function_in_place_of_a_primitive_with_several_results_returns_all(op, found):
    with pytest.raises(jmp.errors.InvalidOpError, match=rf"'top_k' {found}.*float32\[8,2\], int32\[8,2\]; any"):
        jax.eval_shape(jmp.autocast(lambda x: lax.top_k(x, 2), LOW, ops={"top_k": op}), X)
    right = lambda x, **params: [x[:, :2], jnp.asarray(PLACES)]  # noqa: E731
    found = jax.eval_shape(jmp.autocast(lambda x: lax.top_k(x, 2), LOW, ops={"top_k": right}), X)
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [jnp.float32, jnp.int32]


# --- Sums of matmuls in float32 ---

SHAPES = {
    "matrices": ("ij,jk->ik", (8, 64), (64, 16)),
    "batch": ("bij,bjk->bik", (4, 8, 64), (4, 64, 8)),
    "attention logits": ("bqhd,bkhd->bhqk", (2, 8, 4, 64), (2, 8, 4, 64)),
    "attention values": ("bhqk,bkhd->bqhd", (2, 4, 8, 64), (2, 64, 4, 8)),
    "contraction before a free axis": ("abij,bjad->baid", (4, 4, 8, 64), (4, 64, 4, 8)),
}


QUICK = (SHAPES["matrices"], SHAPES["contraction before a free axis"])


@pytest.mark.parametrize("shapes", slow_but_for(QUICK, SHAPES.values()), ids=SHAPES)
def test_sums_in_float32_run_on_every_backend(shapes, rng):
    """Products that add up in float32 run here, batched, mapped and differentiated, and are no worse than without."""
    equation, *operands = shapes
    x, w = normal(*operands)(rng)
    fun = functools.partial(jnp.einsum, equation)
    loss = lambda x, w: jnp.sum(jnp.sin(fun(x, w)))  # noqa: E731
    for accumulate, rounding in ((None, 2.0**-7), (jnp.float32, 2.0**-8)):  # rounded once, it is half an ulp off
        cast = functools.partial(jmp.autocast, policy=LOW, accumulation_dtype=accumulate)
        run = jax.jit(lambda x, w, cast=cast: (cast(fun)(x, w), jax.grad(cast(loss), (0, 1))(x, w)))
        _, grads = run(x, w)
        mapped = jax.jit(jax.vmap(jax.grad(cast(loss), (0, 1))))(x[None], w[None])
        for found, expected in zip(jax.tree.leaves(mapped), grads, strict=True):
            np.testing.assert_allclose(found[0], expected, rtol=0.05, atol=0.05)
        exact = np.asarray(fun(*(np.asarray(a.astype(jnp.bfloat16), np.float32) for a in (x, w))))
        assert np.max(np.abs(cast(fun)(x, w) - exact) - rounding * np.abs(exact)) < 1e-5


@pytest.mark.parametrize("order", list(ORDERS)[1:])
def test_sums_in_float32_keep_backward_products_in_16_bits(order):
    """Products are of 16-bit operands, forward and backward; forward ones return float32."""
    policy = jmp.Policy(jnp.float32, jnp.bfloat16, jnp.float32, reduce_dtype=jnp.bfloat16)
    cast = functools.partial(jmp.autocast, policy=policy, accumulation_dtype=jnp.float32)
    with compiled_as_on("cuda"):
        equations = list(jaxprs._equations(jax.make_jaxpr(ORDERS[order](cast, layers))(X, W).jaxpr, ""))
    found = [eqn for _, eqn in equations if eqn.primitive.name == "dot_general"]
    assert {str(v.aval.dtype) for eqn in found for v in eqn.invars} == {BF16}
    in_float32 = [eqn for eqn in found if eqn.outvars[0].aval.dtype == jnp.float32]
    assert len(in_float32) == (2 if order == "grad(autocast)" else 6)
