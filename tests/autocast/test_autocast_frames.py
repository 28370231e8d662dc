"""How the variables of a program are held while it is evaluated: constants, literals, casts, and when they go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmp_lite.autocast._api import settings_from
from jmp_lite.autocast._interpreter import Frame, Interpreter
from jmp_lite.autocast._values import INPUT, Known, Origin, Tag, Value

BF16, F16, F32 = (jnp.dtype(name) for name in ("bfloat16", "float16", "float32"))
X = jnp.full((3,), 1.00390625)  # rounded by bfloat16
SETTINGS = {
    policy: settings_from(policy, rules=(), ops=None, dot=None, accumulation_dtype=None)
    for policy in ("mixed_float16", "mixed_bfloat16", "full")
}


def frame(fun, *operands, policy="mixed_bfloat16"):
    """A frame of a function of arrays like X, and its variables."""
    jaxpr = jax.make_jaxpr(fun)(*[X] * len(operands))
    return Frame(jaxpr, operands, SETTINGS[policy]), jaxpr.jaxpr


# --- Constants and literals ---

CONSTANTS = {
    "small": (np.float32([0.5, -3]), "NEUTRAL"),
    "a mask": (np.float32([0, -1e9]), "HIGH"),
    "a mask of infinity": (np.float32([0, -np.inf]), "NEUTRAL"),
    "not a number": (np.float32([np.nan, 1]), "NEUTRAL"),
    "not a number beside a large one": (np.float32([np.nan, 1e9]), "HIGH"),
    "the largest of float16": (np.float32([65504]), "NEUTRAL"),
    "empty": (np.zeros((0, 3), np.float32), "NEUTRAL"),
    "integers": (np.array([10**9]), "NEUTRAL"),
    "doubles": (np.array([1e9]), "NEUTRAL"),
    "a number of NumPy": (np.float32(-1e9), "HIGH"),
    "an array of JAX": (jnp.float32([1e9]), "NEUTRAL"),
    "an integer": (3, "NEUTRAL"),
}


@pytest.mark.parametrize(("constant", "tag"), CONSTANTS.values(), ids=CONSTANTS)
def test_constants_that_float16_cannot_hold_ask_for_float32(constant, tag):
    """Where bfloat16 computes they do not."""
    for policy, expected in (("mixed_float16", tag), ("mixed_bfloat16", "NEUTRAL"), ("full", "NEUTRAL")):
        found, _ = frame(lambda x: x, Value(X, INPUT), policy=policy)
        assert found._tag_of_constant(constant).name == expected


def test_constants_are_inputs_and_literals_are_copies_of_their_numbers():
    table = np.arange(3, dtype=np.float32)
    found, jaxpr = frame(lambda x: (x * table, x + 2.5, x + jnp.nan, x.astype(jnp.int32) + 7), Value(X, INPUT))
    [constant] = jaxpr.constvars
    assert found.values[constant].known == Known(Tag.NEUTRAL, Origin.INPUT)
    literals = [found.read(v).known for eqn in jaxpr.eqns for v in eqn.invars if hasattr(v, "val")]
    assert literals == [Known(Tag.NEUTRAL, Origin.REPEATED, number) for number in (2.5, None, None)]


# --- Casts ---

MADE = Known(Tag.HIGH)


def test_what_is_computed_is_cast_once_and_what_is_given_every_time():
    """So that the gradient of a weight that is used often adds up in float32."""
    found, jaxpr = frame(lambda x, y: x * y, Value(X, INPUT), Value(X, MADE))
    given, made = jaxpr.invars
    assert found.array(made, BF16) is found.array(made, BF16) is not found.array(made, F16)
    assert found.array(given, BF16) is not found.array(given, BF16)
    for v in jaxpr.invars:
        assert found.array(v, BF16).dtype == BF16
        assert found.array(v, F32) is found.array(v, None) is found.values[v].array


def test_only_floats_of_32_bits_are_cast():
    low = X.astype(BF16)
    jaxpr = jax.make_jaxpr(lambda a, b: (a + 1, b + 1.5))(jnp.arange(3), low).jaxpr
    found = Frame(jaxpr, [Value(jnp.arange(3), MADE), Value(low, MADE)], SETTINGS["mixed_float16"])
    assert [found.array(v, F16) is found.values[v].array for v in jaxpr.invars] == [True, True]
    literals = [v for eqn in jaxpr.eqns for v in eqn.invars if hasattr(v, "val")]
    assert [np.result_type(found.array(v, F16)) for v in literals] == [np.int32, BF16]


def test_literals_are_cast_where_16_bits_are_asked_for():
    found, jaxpr = frame(lambda x: x + 0.1, Value(X, INPUT))
    literal = jaxpr.eqns[-1].invars[1]
    for dtype in (None, F32):
        assert found.array(literal, dtype) is literal.val
    assert found.array(literal, BF16) == jnp.bfloat16(0.1)
    assert found.array(literal, BF16).dtype == BF16


def test_an_array_of_one_number_is_filled_anew():
    """In its own shape; a cast would be kept for the backward pass."""
    number = Known(Tag.NEUTRAL, Origin.REPEATED, 0.5)
    program = lambda x: Frame(jaxpr, [Value(x, number)], SETTINGS["mixed_bfloat16"]).array(v, BF16)  # noqa: E731
    for x in (X, jnp.float32(0.5)):
        jaxpr = jax.make_jaxpr(lambda x: x * 2)(x)
        [v] = jaxpr.jaxpr.invars
        filled = jax.make_jaxpr(program)(x)
        assert not any(eqn.invars == filled.jaxpr.invars for eqn in filled.jaxpr.eqns)
        assert (program(x).shape, program(x).dtype, float(jnp.max(program(x)))) == (x.shape, BF16, 0.5)


def test_weights_are_read_as_they_are_held():
    found, jaxpr = frame(lambda x, y: x * y + 1.5, Value(X, INPUT), Value(X, MADE))
    given, made = jaxpr.invars
    assert found.weight_or_array(given, BF16) is X
    assert found.weight_or_array(made, BF16).dtype == BF16
    assert found.weight_or_array(jaxpr.eqns[-1].invars[1], BF16).dtype == BF16


# --- What is let go ---


def test_variables_and_their_casts_are_let_go_after_their_last_use():
    found, jaxpr = frame(lambda x, y: (x * y, y + 1, y), Value(X, MADE), Value(X, MADE))
    first, second = jaxpr.invars
    for v in (first, second):
        found.array(v, BF16)
    found.forget(0)
    assert (first in found.values, (first, BF16) in found.casts) == (False, False)
    assert (second in found.values, (second, BF16) in found.casts) == (True, True)
    found.forget(1)
    assert second in found.values  # it is a result


# --- Results ---


def test_results_have_their_written_dtypes_and_weak_types():
    fun = lambda x, s, key: (x @ x, s * 2, key, x.astype(jnp.float16), x > 0)  # noqa: E731
    args = jnp.eye(8), jnp.asarray(2.0), jax.random.key(0)
    jaxpr = jax.make_jaxpr(fun)(*args)
    results = Interpreter(SETTINGS["mixed_bfloat16"], {}).run(jaxpr, args)
    for found, aval in zip(results, jaxpr.out_avals, strict=True):
        assert (found.dtype, found.shape, getattr(found, "weak_type", False)) == (
            aval.dtype,
            aval.shape,
            getattr(aval, "weak_type", False),
        )
