"""The small questions that decisions ask, each by itself: of numbers, sizes, values, wants, equations and settings."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from support import jaxprs

import jmp_lite as jmp
from jmp_lite.autocast import _demand, _ops
from jmp_lite.autocast._api import settings_from
from jmp_lite.autocast._control_flow import _left
from jmp_lite.autocast._residuals import saves_low
from jmp_lite.autocast._rules import Precision
from jmp_lite.autocast._values import (
    Known,
    Origin,
    Tag,
    Value,
    as_dtype,
    is_as_large,
    is_eligible,
    is_exact,
    is_in_range,
)
from jmp_lite.products._matmul import RoundsOperands, product_of

BF16, F16, F32 = (jnp.dtype(name) for name in ("bfloat16", "float16", "float32"))
LARGEST = float(np.finfo(np.float32).max)
[B, C] = export.symbolic_shape("b, c")


# --- Numbers ---

#: A number and a dtype: what the dtype makes of it, and whether that is as good as the number.
NUMBERS = {
    (0.0, F16): (0.0, True),
    (0.5, F16): (0.5, True),
    (0.1, BF16): (0.10009765625, True),
    (65504.0, F16): (65504.0, True),
    (65519.0, F16): (65504.0, True),
    (-65530.0, F16): (-65504.0, True),
    (1e6, F16): (65504.0, False),
    (-1e9, F16): (-65504.0, False),
    (1e-9, F16): (0.0, False),
    (2.0**-24, F16): (2.0**-24, True),
    (1.2 * 2.0**-24, F16): (2.0**-24, False),
    (-LARGEST, BF16): (-float(jnp.finfo(BF16).max), True),
    (LARGEST, F16): (65504.0, False),
    (float("inf"), F16): (float("inf"), True),
    (float("-inf"), BF16): (float("-inf"), True),
}


@pytest.mark.parametrize(("number", "dtype"), NUMBERS)
def test_numbers_in_16_bits(number, dtype):
    """The largest number stands for what is beyond it, whatever NumPy is told to do about overflow and underflow."""
    held, is_good = NUMBERS[number, dtype]
    is_in_range.cache_clear()
    with np.errstate(all="raise"):
        found = as_dtype(number, dtype)
        assert (found.dtype, float(found)) == (dtype, held)
        assert is_in_range(number, dtype) is is_good
        assert is_exact(number, dtype) is (held == number)


# --- Sizes ---

SIZES = {(4, 4): True, (3, 4): False, (5, 4): True, (B, B): True, (2 * B, B): True, (B, C): False, (B, 4): False}


@pytest.mark.parametrize(("a", "b"), SIZES)
def test_sizes_that_cannot_be_compared_count_as_smaller(a, b):
    assert is_as_large(a, b) is SIZES[a, b]


# --- Values ---

PARAMETERS = {(Tag.NEUTRAL, Origin.INPUT), (Tag.NEUTRAL, Origin.MOVED)}
IN_16_BITS = {(tag, Origin.MOVED) for tag in Tag}
COMPUTED = {(Tag.NEUTRAL, Origin.COMPUTED)}


def test_what_a_value_is():
    """Parameters are arguments that were only moved; what was computed and not touched is an activation."""
    kinds = list(itertools.product(Tag, Origin))
    for question, expected in {
        "is_weight": PARAMETERS,
        "is_parameter": PARAMETERS | IN_16_BITS,
        "is_activation": COMPUTED,
    }.items():
        assert {kind for kind in kinds if getattr(Value(None, Known(*kind)), question)} == expected
        assert not any(getattr(Value(None, Known(*kind, 1.0)), question) for kind in kinds)
    assert {tag for tag in Tag if tag.is_rounded} == {Tag.LOW, Tag.SOFT}
    assert list(Tag) == sorted(Tag) == [Tag.NEUTRAL, Tag.LOW, Tag.SOFT, Tag.HIGH]
    assert [tag.value for tag in Tag] == [0, 1, 2, 3]


def test_what_leaves_a_loop_is_computed_unless_a_search_found_it_or_it_is_a_tangent():
    kept = {Origin.FOUND, Origin.TANGENT}
    assert {origin: _left(origin) for origin in Origin} == {
        origin: origin if origin in kept else Origin.COMPUTED for origin in Origin
    }


def test_only_float32_arrays_are_held_otherwise():
    dtypes = ("float32", "float64", "float16", "bfloat16", "int32", "bool", "complex64", "float8_e4m3fn")
    assert [name for name in dtypes if is_eligible(jax.core.ShapedArray((), jnp.dtype(name)))] == ["float32"]
    assert not is_eligible(jax.typeof(jax.random.key(0)))
    assert not is_eligible(jax.ShapeDtypeStruct((), F32))


# --- Wants ---

WANTS = ("LOW", "EITHER", "HIGH", "KEPT", "PLACE", "SOLVED", "TESTED", "SUMMED")


def test_wants_are_sets_of_flags():
    flags = [getattr(_demand, name) for name in WANTS]
    assert flags == [1 << i for i in range(len(WANTS))]
    assert _demand.AS_WRITTEN == _demand.SOLVED | _demand.TESTED
    assert _demand.FLOAT32 == _demand.HIGH | _demand.SUMMED
    assert _demand.joined([]) == 0
    assert _demand.joined(flags) == sum(flags)


def test_float32_is_for_what_all_consumers_want_in_it_or_one_that_decides():
    deciding, rounding = {"PLACE", "SOLVED", "TESTED"}, {"LOW", "EITHER"}
    for kinds in itertools.chain.from_iterable(itertools.combinations(WANTS, n) for n in range(4)):
        want = sum(getattr(_demand, kind) for kind in kinds)
        expected = bool(deciding & set(kinds)) or (bool(kinds) and not rounding & set(kinds))
        assert _demand.is_float32(want) is expected, kinds


# --- Equations ---


def last(fun, *shapes):
    """The last equation of a function of float32 arrays, or of a program that it calls."""
    jaxpr = jax.make_jaxpr(fun)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr
    return jaxpr.eqns[-1]


ADDS_AXES = {
    "before": (lambda x: x.reshape(1, 3), [(3,)], True),
    "behind": (lambda x: x.reshape(3, 1), [(3,)], True),
    "between": (lambda x: x.reshape(2, 1, 3), [(2, 3)], True),
    "to a number": (lambda x: x.reshape(1, 1), [()], True),
    "beside one of one element": (lambda x: x.reshape(1, 3, 1), [(1, 3)], True),
    "none": (lambda x: x.reshape(3, 1), [(1, 3)], False),
    "another form": (lambda x: x.reshape(2, 3, 1), [(6,)], False),
    "fewer": (lambda x: x.reshape(6), [(2, 3)], False),
    "broadcast": (lambda x: lax.broadcast_in_dim(x, (2, 3), (1,)), [(3,)], True),
    "arithmetic": (lambda x: x + 1, [(3,)], False),
}


@pytest.mark.parametrize(("fun", "shapes", "expected"), ADDS_AXES.values(), ids=ADDS_AXES)
def test_what_adds_axes(fun, shapes, expected):
    assert _ops.adds_axes(last(fun, *shapes)) is expected


def rows(n):
    """Takes so many rows."""
    return lambda x: x[jnp.arange(n) % 2]


OFTEN = {
    "four": (rows(4), [(2, 3)], False),
    "five": (rows(5), [(2, 3)], True),
    "each batch its own": (
        lambda x: jnp.take_along_axis(x, jnp.zeros((8, 4), jnp.int32), 1),
        [(8, 3)],
        False,
    ),
    "each batch its own, often": (
        lambda x: jnp.take_along_axis(x, jnp.zeros((8, 5), jnp.int32), 1),
        [(8, 3)],
        True,
    ),
    "so many as there are": (lambda x, y: x[jnp.zeros(y.shape, jnp.int32)], [(2, 3), (B,)], True),
    "a slice at a place": (lambda x: lax.dynamic_slice(x, (jnp.int32(0),), (1,)), [(2,)], True),
    "a slice": (lambda x: x[:1], [(2,)], False),
}


@pytest.mark.parametrize(("fun", "shapes", "expected"), OFTEN.values(), ids=OFTEN)
def test_what_may_read_an_element_more_than_a_handful_of_times(fun, shapes, expected):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    [found] = [eqn for name in ("gather", "dynamic_slice", "slice") for eqn in jaxprs.equations(name, fun, *args)]
    assert _ops.takes_repeatedly(found) is expected


PRODUCTS = {
    "matrices": ("ij,jk->ik", [(2, 5), (5, 2)], False, False),
    "of four terms": ("ij,jk->ik", [(2, 4), (4, 2)], False, True),
    "of two times two terms": ("ijk,jkl->il", [(9, 2, 2), (2, 2, 9)], False, True),
    "of two times three terms": ("ijk,jkl->il", [(9, 2, 3), (2, 3, 9)], False, False),
    "of no term": ("ij,jk->ik", [(2, 0), (0, 2)], False, True),
    "of an unknown number of terms": ("ij,jk->ik", [(2, B), (B, 2)], False, False),
    "vectors": ("i,i->", [(5,), (5,)], True, False),
    "vectors of a batch": ("bi,bi->b", [(3, 5), (3, 5)], True, False),
    "a vector and a matrix": ("i,ij->j", [(5,), (5, 2)], False, False),
    "a matrix and a vector of a batch": ("bij,bj->bi", [(3, 2, 5), (3, 5)], False, False),
}


@pytest.mark.parametrize(("equation", "shapes", "is_inner", "is_handful"), PRODUCTS.values(), ids=PRODUCTS)
def test_matmuls_that_gain_nothing_from_a_matrix_unit(equation, shapes, is_inner, is_handful):
    numbers = {
        "ij,jk->ik": (((1,), (0,)), ((), ())),
        "ijk,jkl->il": (((1, 2), (0, 1)), ((), ())),
        "i,i->": (((0,), (0,)), ((), ())),
        "bi,bi->b": (((1,), (1,)), ((0,), (0,))),
        "i,ij->j": (((0,), (0,)), ((), ())),
        "bij,bj->bi": (((2,), (1,)), ((0,), (0,))),
    }[equation]
    eqn = last(lambda x, y: lax.dot_general(x, y, numbers), *shapes)
    assert (_ops.is_inner(eqn), _ops.is_handful(eqn)) == (is_inner, is_handful)


KEYS = {
    "sort": (lambda x, y: lax.sort(x), 0),
    "sort of two": (lambda x, y: lax.sort((x, y), num_keys=1), 1),
    "sort of two by both": (lambda x, y: lax.sort((x, y), num_keys=2), 2),
    "sort of three": (lambda x, y: lax.sort((x, y, y), num_keys=2), 2),
    "top_k": (lambda x, y: lax.top_k(x, 1), 1),
    "approx_top_k": (lambda x, y: lax.approx_max_k(x, 1), 1),
    "argmax": (lambda x, y: lax.argmax(x, 0, jnp.int32), 1),
    "argmin": (lambda x, y: lax.argmin(x, 0, jnp.int32), 1),
    "maximum": (lax.max, 0),
}


@pytest.mark.parametrize(("fun", "n"), KEYS.values(), ids=KEYS)
def test_operands_that_places_are_chosen_by(fun, n):
    assert _ops.keys_of(last(fun, (8,), (8,))) == n


INTEGERS = {
    "floor": (jnp.floor, True),
    "ceil": (jnp.ceil, True),
    "round": (lax.round, True),
    "int": (lambda x: x.astype(jnp.int32), True),
    "uint": (lambda x: x.astype(jnp.uint8), True),
    "bool": (lambda x: lax.convert_element_type(x, bool), False),
    "bfloat16": (lambda x: x.astype(jnp.bfloat16), False),
    "sign": (jnp.sign, False),
}


@pytest.mark.parametrize(("fun", "expected"), INTEGERS.values(), ids=INTEGERS)
def test_what_makes_integers_of_floats(fun, expected):
    assert _ops.rounds_to_integers(last(fun, (8,))) is expected


@jax.jit
def softplus(x):
    """By the name of an activation of JAX."""
    return jnp.log1p(jnp.exp(x))


@pytest.mark.parametrize(
    ("fun", "expected"),
    [
        *((getattr(jax.nn, name), True) for name in sorted(_ops.ACTIVATIONS)),
        (softplus, False),
        (jax.nn.relu, False),
        (jax.nn.gelu, False),
        (jax.jit(lambda x: (jax.nn.softplus(x), x)), False),
        (jnp.tanh, False),
    ],
)
def test_activations_are_those_of_jax(fun, expected):
    assert _ops.is_activation(last(fun, (8,))) is expected
    slope = last(lambda x: jax.jvp(fun, (x,), (x,))[1], (8,)) if expected else last(jnp.tanh, (8,))
    assert _ops.is_activation(slope) is False


DIMS = (((1,), (0,)), ((), ()))
ALGORITHM = {
    "lhs_precision_type": np.float32,
    "rhs_precision_type": np.float32,
    "accumulation_type": np.float32,
    "lhs_component_count": 1,
    "rhs_component_count": 1,
    "num_primitive_operations": 1,
    "allow_imprecise_accumulation": False,
}
NARROW = {"lhs_precision_type": jnp.bfloat16, "rhs_precision_type": jnp.bfloat16}
ASKED = {
    "float32": ({}, "DotAlgorithm"),
    "bfloat16": (NARROW, ""),
    "bfloat16, more than once": (NARROW | {"num_primitive_operations": 3}, "DotAlgorithm"),
    "bfloat16, twice": (NARROW | {"num_primitive_operations": 2}, "DotAlgorithm"),
}


@pytest.mark.parametrize(("changes", "asked"), ASKED.values(), ids=ASKED)
def test_algorithms_that_ask_for_more_than_16_bits(changes, asked):
    algorithm = lax.DotAlgorithm(**ALGORITHM | changes)
    eqn = last(lambda x, y: lax.dot_general(x, y, DIMS, precision=algorithm), (8, 8), (8, 8))
    assert _ops.asked_precision(eqn) == asked


# --- Settings ---

MAP = jmp.PolicyMap({"a": "mixed_float16", "b": "full"}, default="mixed_bfloat16")


def dot(*args, **params):
    return lax.dot_general(*args, **params)


class Recipe(RoundsOperands):
    """A recipe that rounds nothing."""

    __call__ = staticmethod(dot)


class PerScope(Recipe):
    """One that differs between scopes."""

    depends_on_scope = True


#: The dtypes that values may be held in, and whether functions replace primitives, and whether scopes matter.
SETTINGS = {
    "a policy": ("mixed_bfloat16", {}, {BF16}, False, False),
    "float32": ("full", {}, set(), False, False),
    "a map": (MAP, {}, {BF16, F16}, False, True),
    "a rule of another dtype": ("mixed_bfloat16", {"rules": jmp.Rule("a", precision=F16)}, {BF16, F16}, False, True),
    "a rule in float32": ("mixed_bfloat16", {"rules": jmp.Rule("a", precision="f32")}, {BF16}, False, True),
    "a rule under float32": ("full", {"rules": jmp.Rule("a", precision="bf16")}, {BF16}, False, True),
    "a matmul": ("full", {"dot": dot}, set(), True, False),
    "a recipe": ("full", {"dot": Recipe()}, set(), True, False),
    "a recipe for each scope": ("full", {"dot": PerScope()}, set(), True, True),
    "a function": ("full", {"ops": {"tanh": jnp.tanh}}, set(), True, False),
    "a class": ("full", {"ops": {"tanh": jmp.OpClass.DENY}}, set(), False, False),
    "a class and a function": ("full", {"ops": {"tanh": jmp.OpClass.DENY, "z": jnp.tanh}}, set(), True, False),
    "sums": ("mixed_float16", {"accumulation_dtype": "float32"}, {F16}, False, False),
}
NO_SETTINGS = {"rules": (), "ops": None, "dot": None, "accumulation_dtype": None}


@pytest.mark.parametrize(("policy", "given", "dtypes", "replaces", "depends"), SETTINGS.values(), ids=SETTINGS)
def test_what_settings_say(policy, given, dtypes, replaces, depends):
    settings = settings_from(policy, **NO_SETTINGS | given)
    assert (settings.dtypes, settings.has_replacements, settings.depends_on_scope) == (dtypes, replaces, depends)
    assert settings.accumulates is ("accumulation_dtype" in given)
    assert settings.root == ""
    assert settings_from(policy, **NO_SETTINGS | given, root="model").root == "model"
    assert hash(settings) == hash(settings_from(policy, **NO_SETTINGS | given))


def test_ops_in_any_order_are_the_same_settings():
    ops = {"tanh": jmp.OpClass.DENY, "exp": jmp.OpClass.FOLLOW}
    first, second = (
        settings_from("half", **NO_SETTINGS | {"ops": dict(items)}) for items in (ops.items(), [*ops.items()][::-1])
    )
    assert first == second
    assert first.ops_by_name == ops


@pytest.mark.parametrize(
    ("dtype", "reduce_dtype", "widens"), [(BF16, F32, True), (BF16, BF16, False), (BF16, F16, True), (F32, BF16, False)]
)
def test_gradients_of_weights_are_widened_where_they_are_added_up_in_another_dtype(dtype, reduce_dtype, widens):
    assert Precision("auto", dtype, reduce_dtype=reduce_dtype).widens_gradients is widens


@pytest.mark.parametrize(
    ("numbers", "policy", "expected"),
    [
        ((0.1, 1e4), "half", True),
        ((1e9,), "mixed_float16", False),
        ((1e9,), "mixed_bfloat16", True),
        ((1e9,), MAP, False),
        ((1e9,), "full", True),
    ],
)
def test_a_number_is_in_range_if_every_dtype_holds_it(numbers, policy, expected):
    settings = settings_from(policy, **NO_SETTINGS)
    assert [settings.is_in_range(number) for number in numbers] == [expected] * len(numbers)


def test_a_recipe_says_by_default_that_it_takes_the_place_of_dot_general_everywhere():
    recipe = Recipe()
    assert (recipe.depends_on_scope, recipe.scopes) == (False, frozenset())
    assert recipe.takes(has_weight=True) is recipe.takes(has_weight=False) is True
    assert recipe.turned([True, False]) is recipe.at("a") is recipe
    assert recipe.speed("dot_general") == ""
    assert recipe.speed("conv_general_dilated").startswith(", at the speed of")
    for given in (recipe, dot):
        assert product_of(given, "dot_general") is given
        assert product_of(given, "conv_general_dilated") is None


# --- Residuals ---

WIDE, NARROW_ARRAY = (jax.core.ShapedArray((64, 64), jnp.dtype(name)) for name in ("float32", "bfloat16"))
SMALL, ROW, COLUMN = (jax.core.ShapedArray(shape, F32) for shape in ((63, 65), (1, 64), (64, 1)))
SAVED = {
    "a matmul": (lax.dot_general_p, [WIDE, WIDE], {}, True),
    "a sum": (lax.reduce_sum_p, [WIDE], {}, True),
    "a maximum": (lax.reduce_max_p, [WIDE], {}, True),
    "a cast to 16 bits": (lax.convert_element_type_p, [WIDE], {"new_dtype": BF16}, True),
    "a cast to float32": (lax.convert_element_type_p, [SMALL], {"new_dtype": F32}, False),
    "16 bits": (lax.exp_p, [NARROW_ARRAY], {}, True),
    "16 bits beside float32": (lax.mul_p, [NARROW_ARRAY, WIDE], {}, False),
    "float32": (lax.exp_p, [WIDE], {}, False),
    "small float32": (lax.exp_p, [SMALL], {}, True),
    "a row": (lax.exp_p, [ROW], {}, True),
    "a row and a column": (lax.mul_p, [ROW, COLUMN], {}, False),
    "a row, broadcast": (lax.broadcast_in_dim_p, [ROW], {"shape": (64, 64)}, False),
    "a row, broadcast to few": (lax.broadcast_in_dim_p, [ROW], {"shape": (63, 64)}, True),
    "what does not broadcast": (lax.concatenate_p, [SMALL, SMALL], {"shape": None}, True),
    "what has no dtype": (lax.exp_p, [SMALL, object()], {}, True),
}


@pytest.mark.parametrize(("primitive", "operands", "params", "saved"), SAVED.values(), ids=SAVED)
def test_low_residuals_leave_out_what_is_large_and_float32(primitive, operands, params, saved):
    """From 4096 elements on."""
    assert saves_low(primitive, *operands, **params) is saved
