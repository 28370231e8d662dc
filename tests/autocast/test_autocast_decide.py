"""The decision about one equation, given how its operands are held: row by row of the table, and what is near a row."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jmp_lite.autocast import _demand
from jmp_lite.autocast._decide import decide
from jmp_lite.autocast._ops import classify
from jmp_lite.autocast._rules import Precision
from jmp_lite.autocast._values import Known, Origin, Tag, Value

BF16, F16, F32 = (jnp.dtype(name) for name in ("bfloat16", "float16", "float32"))

#: How an operand is held, by a letter or two.
HELD = {
    "input": Known(Tag.NEUTRAL, Origin.INPUT),
    "state": Known(Tag.NEUTRAL, Origin.SCALED),
    "weight": Known(Tag.NEUTRAL, Origin.MOVED),
    "made": Known(Tag.NEUTRAL, Origin.COMPUTED),
    "copy": Known(Tag.NEUTRAL, Origin.REPEATED),
    "half": Known(Tag.NEUTRAL, Origin.REPEATED, 0.5),
    "tenth": Known(Tag.NEUTRAL, Origin.REPEATED, 0.1),
    "large": Known(Tag.NEUTRAL, Origin.REPEATED, 1e9),
    "low": Known(Tag.LOW),
    "soft": Known(Tag.SOFT),
    "high": Known(Tag.HIGH),
    "low copy": Known(Tag.LOW, Origin.REPEATED),
    "high copy": Known(Tag.HIGH, Origin.REPEATED),
    "random": Known(Tag.HIGH, Origin.AS_WRITTEN),
    "solved": Known(Tag.HIGH, Origin.SOLVED),
    "found": Known(Tag.HIGH, Origin.FOUND),
    "tangent": Known(Tag.NEUTRAL, Origin.TANGENT),
}
FULL, ROW = (8, 16), (1, 16)


def decided(fun, *operands, want="EITHER", shapes=None, precision=None, dtypes=None):
    """The decision about the last equation of a function, of operands that are held so."""
    shapes = shapes or [FULL] * len(operands)
    precision = precision or Precision("auto", BF16, reason="asked")
    jaxpr = jax.make_jaxpr(fun)(*(jax.ShapeDtypeStruct(shape, F32) for shape in shapes)).jaxpr
    eqn, held = jaxpr.eqns[-1], {}
    for v, name in zip(jaxpr.invars, operands, strict=True):
        known = HELD[name]
        held[v] = Value(jax.ShapeDtypeStruct(v.aval.shape, precision.dtype if known.tag is Tag.LOW else F32), known)
    values = [
        held[v] if not hasattr(v, "val") else Value(v.val, Known(Tag.NEUTRAL, Origin.REPEATED, float(v.val)))
        for v in eqn.invars
    ]
    wants = sum(getattr(_demand, kind) for kind in want.split())
    return decide(eqn, values, classify(eqn, {}), precision, (wants,) * len(eqn.outvars))


def transposed(x):
    return x.T


def pooled(x):
    return lax.reduce_window(x, 0.0, lax.add, (2, 2), (2, 2), "VALID")


def taken(x):
    return lax.dynamic_slice(x, (0, 0), (1, 16))


def scaled(x):
    return x * 0.1


def halved(x):
    return x * 0.5


def shifted(x):
    return x + 0.1


#: A function, how its operands are held, who wants the result; how it runs, the tag of the result, and the reason.
ROWS = {
    "constant": [
        (transposed, ["half"], "EITHER", "BOUND NEUTRAL", "a constant"),
        (transposed, ["half"], "LOW", "BOUND NEUTRAL", "a constant"),
        (jnp.negative, ["half"], "EITHER", "LOWERED NEUTRAL", "no decision"),
    ],
    "moved": [
        (transposed, ["low"], "LOW", "LOWERED LOW", "moved"),
        (transposed, ["soft"], "LOW", "LOWERED LOW", "moved"),
        (transposed, ["made"], "LOW", "LOWERED LOW", "moved"),
        (transposed, ["high"], "LOW", "BOUND HIGH", "follows an operand that needs float32"),
        (transposed, ["input"], "LOW", "LOWERED NEUTRAL", "no decision"),
        (transposed, ["weight"], "LOW", "LOWERED NEUTRAL", "no decision"),
        (transposed, ["made"], "LOW EITHER", "LOWERED NEUTRAL", "no decision"),
        (jnp.negative, ["made"], "LOW", "LOWERED NEUTRAL", "no decision"),
    ],
    "taken": [
        (taken, ["low"], "EITHER", "WIDE LOW", "read in its own precision"),
        (taken, ["soft"], "EITHER", "LOWERED LOW", "follows its operands"),
        (taken, ["high"], "EITHER", "BOUND HIGH", "follows an operand that needs float32"),
    ],
    "as precise in 16 bits": [
        (transposed, ["low"], "EITHER", "LOWERED LOW", "as precise"),
        (jnp.negative, ["low"], "HIGH", "LOWERED LOW", "as precise"),
        (lax.max, ["low", "low"], "HIGH", "LOWERED LOW", "as precise"),
        (lax.max, ["low", "soft"], "HIGH", "BOUND HIGH", "all consumers"),
        (lax.max, ["low", "high"], "EITHER", "BOUND HIGH", "follows an operand that needs float32"),
        (halved, ["low"], "HIGH", "WEIGHTS LOW", "as precise"),
        (halved, ["soft"], "HIGH", "BOUND HIGH", "all consumers"),
        (lambda x: x / 0.5, ["low"], "HIGH", "LOWERED LOW", "as precise"),
        (lambda x: 0.5 / x, ["low"], "HIGH", "BOUND HIGH", "all consumers"),
        (lax.mul, ["low", "half"], "HIGH", "WEIGHTS LOW", "as precise"),
        (lambda x: x + 0.5, ["low"], "HIGH", "BOUND HIGH", "all consumers"),
        (lax.mul, ["low", "low"], "HIGH", "BOUND HIGH", "all consumers"),
    ],
    "wanted": [
        (lax.tanh, ["low"], "HIGH", "BOUND HIGH", "all consumers"),
        (lax.tanh, ["input"], "SUMMED", "BOUND HIGH", "all consumers"),
        (lax.tanh, ["low"], "PLACE LOW", "BOUND HIGH", "all consumers"),
        (lax.tanh, ["low"], "KEPT", "BOUND HIGH", "all consumers"),
        (lax.gt, ["low", "high"], "HIGH", "BOUND NEUTRAL", "follows an operand that needs float32"),
        (lax.add, ["low", "low"], "SUMMED", "WEIGHTS LOW", "follows its operands"),
        (lax.add, ["low", "soft"], "SUMMED", "WIDE LOW", "added before"),
        (lax.add, ["low", "low"], "SUMMED HIGH", "BOUND HIGH", "all consumers"),
        (lax.sub, ["low", "low"], "SUMMED", "BOUND HIGH", "all consumers"),
        (lax.add, ["low", "made"], "SUMMED", "BOUND HIGH", "all consumers"),
        (lax.add, ["low", "low copy"], "SUMMED", "BOUND HIGH", "all consumers"),
        (lambda x: x + 1, ["low"], "SUMMED", "BOUND HIGH", "all consumers"),
    ],
    "scaled before it is rounded": [
        (scaled, ["low"], "EITHER", "WIDE LOW", "scaled by a number"),
        (lax.mul, ["low", "tenth"], "LOW EITHER", "WIDE LOW", "scaled by a number"),
        (lambda x: x / 0.1, ["low"], "EITHER", "WIDE LOW", "scaled by a number"),
        (lambda x: 0.1 / x, ["low"], "EITHER", "LOWERED LOW", "follows its operands"),
        (scaled, ["made"], "EITHER", "LOWERED NEUTRAL", "no decision"),
    ],
    "pooled": [
        (pooled, ["low"], "EITHER", "BOUND SOFT", "summed in float32"),
        (pooled, ["soft"], "LOW", "BOUND SOFT", "summed in float32"),
        (pooled, ["low"], "HIGH", "BOUND HIGH", "all consumers"),
        (pooled, ["high"], "EITHER", "BOUND HIGH", "follows an operand that needs float32"),
        (pooled, ["input"], "EITHER", "LOWERED NEUTRAL", "no decision"),
    ],
    "levels off": [
        (lax.logistic, ["low"], "EITHER HIGH", "BOUND SOFT", "saturates"),
        (lax.logistic, ["low"], "EITHER SUMMED", "BOUND SOFT", "saturates"),
        (lax.logistic, ["low"], "EITHER LOW", "LOWERED LOW", "follows its operands"),
        (lax.logistic, ["high"], "EITHER HIGH", "BOUND HIGH", "saturates"),
        (lax.logistic, ["input"], "EITHER HIGH", "LOWERED NEUTRAL", "no decision"),
        (lax.sin, ["low"], "EITHER", "BOUND HIGH", "steep"),
        (lax.square, ["low"], "EITHER HIGH", "LOWERED LOW", "follows its operands"),
        (lax.gt, ["soft", "low"], "EITHER", "BOUND NEUTRAL", "saturates"),
        (lax.gt, ["low", "low"], "EITHER", "LOWERED NEUTRAL", "as precise"),
        (shifted, ["soft"], "EITHER", "BOUND SOFT", "saturates"),
        (lambda x: 1 - x, ["soft"], "LOW", "BOUND SOFT", "saturates"),
        (lax.neg, ["soft"], "EITHER", "LOWERED LOW", "follows its operands"),
        (lax.neg, ["soft"], "EITHER HIGH", "BOUND SOFT", "saturates"),
        (lax.add, ["soft", "low"], "EITHER HIGH", "WIDE LOW", "added before"),
        (lambda x: lax.top_k(x, 2), ["soft"], "EITHER", "BOUND SOFT", "saturates"),
        (lambda x: lax.top_k(x, 2), ["low"], "EITHER", "LOWERED LOW", "as precise"),
    ],
    "multiplied for a product": [
        (lax.mul, ["low", "high"], "LOW", "ROUNDED LOW", "multiplied by"),
        (lax.mul, ["made", "high"], "LOW", "ROUNDED LOW", "multiplied by"),
        (lax.mul, ["input", "high"], "LOW", "BOUND HIGH", "follows an operand that needs float32"),
        (lax.mul, ["low", "high"], "LOW EITHER", "BOUND HIGH", "follows an operand that needs float32"),
        (lax.mul, ["low", "high copy"], "LOW", "WIDE LOW", "scaled or shifted in float32 for a matmul"),
        (lax.mul, ["low", "input"], "LOW", "WEIGHTS LOW", "multiplied by"),
        (lax.mul, ["low", "soft"], "LOW", "WEIGHTS LOW", "multiplied by"),
        (lax.add, ["low", "high"], "LOW", "BOUND HIGH", "follows an operand that needs float32"),
        (lax.mul, ["made", "made"], "LOW", "LOWERED NEUTRAL", "no decision"),
    ],
    "neutral": [
        (lax.add, ["input", "input"], "EITHER", "LOWERED NEUTRAL", "no decision"),
        (lax.add, ["made", "low copy"], "EITHER", "LOWERED NEUTRAL", "no decision"),
    ],
    "promotes": [
        (lax.add, ["low", "input"], "EITHER", "BOUND HIGH", "a float32 argument"),
        (lax.add, ["soft", "state"], "EITHER", "BOUND HIGH", "a float32 argument"),
        (lax.add, ["low", "made"], "EITHER", "WEIGHTS LOW", "follows its operands"),
        (lax.add, ["low", "weight"], "EITHER", "WEIGHTS LOW", "follows its operands"),
        (lax.sub, ["input", "low copy"], "EITHER", "LOWERED NEUTRAL", "no decision"),
    ],
    "shifted": [
        (lax.sub, ["low", "high copy"], "EITHER", "BOUND SOFT", "scaled or shifted in float32"),
        (lax.sub, ["low", "high copy"], "LOW", "WIDE LOW", "scaled or shifted in float32 for a matmul"),
        (lax.sub, ["low", "high copy"], "LOW EITHER", "WIDE LOW", "scaled or shifted in float32 for a matmul"),
        (lax.sub, ["low", "high copy"], "LOW HIGH", "BOUND SOFT", "scaled or shifted in float32"),
        (lax.mul, ["soft", "copy"], "EITHER", "BOUND SOFT", "scaled or shifted in float32"),
        (lax.mul, ["soft", "low"], "EITHER", "WEIGHTS LOW", "follows its operands"),
        (transposed, ["soft"], "EITHER", "BOUND SOFT", "scaled or shifted in float32"),
        (scaled, ["soft"], "EITHER", "BOUND SOFT", "scaled or shifted in float32"),
        (lax.add, ["low", "tenth"], "EITHER HIGH", "BOUND SOFT", "scaled or shifted in float32"),
        (lax.add, ["low", "tenth"], "EITHER", "WEIGHTS LOW", "follows its operands"),
        (lax.add, ["soft", "soft"], "EITHER HIGH", "BOUND SOFT", "scaled or shifted in float32"),
        (lax.add, ["soft", "soft"], "EITHER", "WIDE LOW", "added before"),
        (lax.mul, ["soft", "soft"], "EITHER HIGH", "WEIGHTS LOW", "follows its operands"),
    ],
    "follows": [
        (lax.tanh, ["low"], "EITHER", "LOWERED LOW", "follows its operands"),
        (lax.mul, ["low", "low"], "EITHER", "WEIGHTS LOW", "follows its operands"),
        (lax.div, ["low", "low"], "EITHER", "LOWERED LOW", "follows its operands"),
        (lax.tanh, ["soft"], "LOW", "LOWERED LOW", "follows its operands"),
    ],
}
CASES = [pytest.param(*row, id=f"{name} {i}") for name, rows in ROWS.items() for i, row in enumerate(rows)]


@pytest.mark.parametrize(("fun", "operands", "want", "expected", "reason"), CASES)
def test_rows_of_the_table(fun, operands, want, expected, reason):
    found = decided(fun, *operands, want=want)
    assert f"{found.how.name} {found.results[0].tag.name}" == expected, found.reason
    assert found.reason.startswith(reason)


# --- Other precisions ---

HALF = {
    "float16": Precision("auto", F16, reason="asked"),
    "gradients in 16 bits": Precision("auto", BF16, reason="asked", reduce_dtype=BF16),
    "low": Precision("low", BF16, reason="asked"),
    "full": Precision("full", BF16, reason="asked"),
    "off": Precision("off", BF16, reason="asked"),
}


def matmul(x, w):
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())))


def solver(x):
    return lax.linalg.cholesky_p.bind(x)


UNDER = {
    "float16": [
        (lambda x: x * 1e9, ["low"], "EITHER", "BOUND HIGH", "uses a number"),
        (lax.mul, ["soft", "large"], "EITHER", "BOUND HIGH", "uses a number"),
        (lambda x: x + 1e9, ["input"], "EITHER", "BOUND HIGH", "uses a number"),
        (scaled, ["low"], "EITHER", "WIDE LOW", "scaled by a number"),
        (lax.max, ["low", "large"], "EITHER", "LOWERED LOW", "as precise"),
    ],
    "gradients in 16 bits": [
        (transposed, ["input"], "LOW", "LOWERED LOW", "moved"),
        (lax.add, ["low", "weight"], "EITHER", "LOWERED LOW", "follows its operands"),
        (matmul, ["low", "input"], "EITHER", "LOWERED LOW", "matmuls"),
        (matmul, ["low", "input"], "HIGH", "PRODUCT HIGH", "all consumers want float32, which is free"),
        (lax.mul, ["low", "half"], "HIGH", "LOWERED LOW", "as precise"),
    ],
    "low": [
        (lax.exp, ["low"], "HIGH", "LOWERED LOW", "asked"),
        (lax.exp, ["input"], "EITHER", "LOWERED LOW", "asked"),
        (lax.add, ["input", "low"], "EITHER", "WEIGHTS LOW", "asked"),
        (lax.exp, ["random"], "EITHER", "BOUND HIGH", "computed from random numbers"),
        (lax.add, ["random", "copy"], "EITHER", "BOUND HIGH", "computed from random numbers"),
        (lax.add, ["random", "input"], "EITHER", "WEIGHTS LOW", "asked"),
        (lax.add, ["copy", "copy"], "EITHER", "WEIGHTS LOW", "asked"),
        (solver, ["low"], "EITHER", "BOUND HIGH", "linear algebra"),
        (matmul, ["low", "low"], "SOLVED", "PRODUCT LOW", "matmuls"),
        (matmul, ["solved", "low"], "EITHER", "PRODUCT LOW", "matmuls"),
    ],
    "full": [
        (matmul, ["low", "input"], "EITHER", "BOUND HIGH", "asked"),
        (lax.tanh, ["low"], "EITHER", "BOUND HIGH", "asked"),
        (lax.gt, ["low", "low"], "EITHER", "BOUND NEUTRAL", "asked"),
    ],
    "off": [
        (matmul, ["low", "input"], "EITHER", "BOUND NEUTRAL", "asked"),
        (lax.exp, ["low"], "HIGH", "BOUND NEUTRAL", "asked"),
    ],
    "auto": [
        (matmul, ["low", "input"], "EITHER", "PRODUCT LOW", "matmuls"),
        (matmul, ["low", "input"], "HIGH", "PRODUCT HIGH", "all consumers want float32, which is free"),
        (matmul, ["low", "input"], "SUMMED", "PRODUCT HIGH", "all consumers want float32, which is free"),
        (matmul, ["low", "input"], "PLACE LOW", "PRODUCT HIGH", "all consumers want float32, which is free"),
        (matmul, ["low", "input"], "KEPT", "PRODUCT LOW", "matmuls"),
        (matmul, ["low", "input"], "HIGH EITHER", "PRODUCT LOW", "matmuls"),
        (matmul, ["solved", "input"], "EITHER", "BOUND HIGH", "uses a result of linear algebra"),
        (matmul, ["low", "input"], "SOLVED", "BOUND HIGH", "linear algebra depends on it"),
        (matmul, ["low", "input"], "TESTED", "BOUND HIGH", "the condition of a loop depends on it"),
        (matmul, ["low", "input"], "SOLVED TESTED LOW", "BOUND HIGH", "linear algebra depends on it"),
        (lax.tanh, ["solved"], "EITHER", "BOUND HIGH", "follows an operand that needs float32"),
        (lax.tanh, ["low"], "TESTED", "BOUND HIGH", "the condition of a loop depends on it"),
    ],
}
UNDER_CASES = [pytest.param(name, *row, id=f"{name} {i}") for name, rows in UNDER.items() for i, row in enumerate(rows)]


@pytest.mark.parametrize(("precision", "fun", "operands", "want", "expected", "reason"), UNDER_CASES)
def test_what_precisions_change(precision, fun, operands, want, expected, reason):  # noqa: PLR0917
    shapes = [(16, 16)] * len(operands)
    found = decided(fun, *operands, want=want, shapes=shapes, precision=HALF.get(precision))
    assert f"{found.how.name} {found.results[0].tag.name}" == expected, found.reason
    assert found.reason.startswith(reason)


@pytest.mark.parametrize(
    ("shapes", "is_free"), [([(8, 16), (16, 6)], True), ([(8, 16), (16, 16)], True), ([(7, 15), (15, 15)], True)]
)
def test_a_result_in_float32_is_free_if_it_is_no_larger_than_its_operands_in_16_bits(shapes, is_free):
    (m, k), (_, n) = shapes
    assert is_free is ((m * k + k * n) * 2 >= m * n * 4)
    found = decided(matmul, "low", "low", want="HIGH", shapes=shapes)
    assert (found.results[0].tag is Tag.HIGH) is is_free


# --- Where results come from ---

ORIGINS = [
    (shifted, ["input"], "SCALED"),
    (lax.neg, ["input"], "SCALED"),
    (lax.mul, ["input", "state"], "SCALED"),
    (lax.div, ["state", "copy"], "SCALED"),
    (lax.add, ["input", "made"], "COMPUTED"),
    (lax.tanh, ["input"], "COMPUTED"),
    (lax.max, ["input", "input"], "COMPUTED"),
    (transposed, ["input"], "MOVED"),
    (transposed, ["weight"], "MOVED"),
    (transposed, ["state"], "COMPUTED"),
    (taken, ["input"], "MOVED"),
    (lambda x: lax.concatenate([x, x], 0), ["input"], "MOVED"),
    (lambda x, y: lax.concatenate([x, y], 0), ["input", "made"], "COMPUTED"),
    (lambda x: x.reshape(1, 16, 16), ["input"], "MOVED"),
    (lambda x: lax.broadcast_in_dim(x, (2, 16, 16), (1, 2)), ["input"], "REPEATED"),
    (lambda x: lax.broadcast_in_dim(x, (1, 16, 16), (1, 2)), ["input"], "MOVED"),
    (lambda x: lax.broadcast_in_dim(x, (1, 16, 16), (1, 2)), ["copy"], "REPEATED"),
    (lambda x: lax.convert_element_type(x, BF16), ["input"], "MOVED"),
    (lax.add, ["copy", "copy"], "REPEATED"),
    (lambda x: x * 2, ["copy"], "REPEATED"),
    (lax.exp, ["copy"], "REPEATED"),
    (lax.tanh, ["copy"], "COMPUTED"),
    (lax.add, ["copy", "made"], "COMPUTED"),
    (transposed, ["copy"], "REPEATED"),
    (transposed, ["found"], "FOUND"),
    (lax.neg, ["found"], "FOUND"),
    (lax.tanh, ["found"], "COMPUTED"),
    (lax.max, ["found", "made"], "COMPUTED"),
    (shifted, ["solved"], "SOLVED"),
    (lax.tanh, ["solved"], "SOLVED"),
    (lax.add, ["solved", "copy"], "SOLVED"),
    (lax.add, ["solved", "made"], "COMPUTED"),
    (lax.exp, ["solved"], "COMPUTED"),
    (shifted, ["random"], "AS_WRITTEN"),
    (lax.exp, ["random"], "AS_WRITTEN"),
    (lax.add, ["random", "copy"], "AS_WRITTEN"),
    (lax.add, ["random", "input"], "COMPUTED"),
    (lax.add, ["tangent", "input"], "TANGENT"),
    (lax.add, ["random", "tangent"], "TANGENT"),
    (solver, ["input"], "SOLVED"),
    (lambda x: lax.bitcast_convert_type(x, jnp.int32), ["input"], "AS_WRITTEN"),
    (lambda x: lax.dot_general(x, x, (((1,), (0,)), ((), ())), precision="highest"), ["input"], "COMPUTED"),
    (matmul, ["input", "input"], "COMPUTED"),
    (lambda: lax.iota("float32", 16), [], "COMPUTED"),
    (lambda: lax.broadcasted_iota("float32", (16, 16), 0), [], "REPEATED"),
    (lambda: lax.broadcast(1.0, (16,)), [], "REPEATED"),
]


@pytest.mark.parametrize(("fun", "operands", "origin"), ORIGINS)
def test_where_results_come_from(fun, operands, origin):
    found = decided(fun, *operands, shapes=[(16, 16)] * len(operands))
    assert found.results[0].origin.name == origin


def test_where_results_come_from_in_what_is_left_alone():
    """What is made of parameters there is one, if nothing else takes part."""
    for operands, origin in ((["input", "weight"], "MOVED"), (["input", "made"], "COMPUTED"), (["made"], "COMPUTED")):
        fun = lax.max if len(operands) == 2 else lax.tanh
        assert decided(fun, *operands, precision=HALF["off"]).results[0].origin.name == origin
    assert decided(lax.tanh, "weight", precision=HALF["off"]).results[0].origin.name == "MOVED"


def test_gains_of_solutions_are_solutions():
    """A matmul between linear algebra and linear algebra."""
    for operands, want, origin in (
        (("solved", "made"), "SOLVED", "SOLVED"),
        (("solved", "made"), "EITHER", "COMPUTED"),
        (("made", "made"), "SOLVED", "COMPUTED"),
    ):
        found = decided(matmul, *operands, want=want, shapes=[(16, 16)] * 2)
        assert found.results[0].origin.name == origin


NUMBERS = [
    (lambda: lax.broadcast(0.5, (16,)), [], 0.5),
    (transposed, ["half"], 0.5),
    (lambda x: x.reshape(8, 16, 1), ["half"], 0.5),
    (lax.neg, ["half"], None),
    (lambda x: lax.convert_element_type(x, BF16), ["half"], None),
    (transposed, ["copy"], None),
]


@pytest.mark.parametrize(("fun", "operands", "number"), NUMBERS)
def test_numbers_that_results_are_filled_with(fun, operands, number):
    assert decided(fun, *operands).results[0].number == number


def test_what_treats_operands_separately_keeps_what_is_known_of_each():
    found = decided(lambda x, y: lax.optimization_barrier((x, y)), "low", "high")
    assert [known.tag for known in found.results] == [Tag.LOW, Tag.HIGH]
    assert found.dtype is None
    found = decided(lambda x, y: lax.sort((x, y)), "soft", "input")
    assert [known.tag for known in found.results] == [Tag.SOFT, Tag.NEUTRAL]


@pytest.mark.parametrize(
    ("operands", "tangent"), [(("tangent", "low"), 0), (("low", "tangent"), 1), (("low", "low"), None)]
)
def test_a_matmul_knows_the_operand_in_which_it_is_linear(operands, tangent):
    assert decided(matmul, *operands, shapes=[(16, 16)] * 2).tangent == tangent


def test_dtypes_that_operands_are_cast_to():
    assert decided(lax.tanh, "low").dtype == BF16
    assert decided(lax.exp, "low").dtype == decided(lax.tanh, "high").dtype == F32
    assert decided(lax.tanh, "input").dtype == F32
    assert decided(lax.mul, "low", "high", want="LOW").dtype is None
    assert decided(lambda x: x.astype(BF16), "low").dtype is None
    found = decided(matmul, "low", "input", want="HIGH", shapes=[(16, 16)] * 2)
    assert (found.dtype, found.result_dtype, found.takes_weights) == (BF16, F32, True)
    found = decided(matmul, "low", "input", shapes=[(16, 16)] * 2, precision=HALF["gradients in 16 bits"])
    assert (found.dtype, found.result_dtype, found.takes_weights) == (BF16, BF16, False)
    assert decided(lax.add, "low", "weight").takes_weights
    assert not decided(lax.tanh, "low").takes_weights
    assert decided(lax.add, "low", "weight", precision=HALF["low"]).takes_weights
    assert not decided(lax.exp, "low", precision=HALF["low"]).takes_weights
