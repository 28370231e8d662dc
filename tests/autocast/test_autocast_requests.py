"""What is said of settings that change nothing, word for word: all of it, once, and nothing else."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jmp_lite as jmp
from jmp_lite.autocast import _api

LOW = "mixed_bfloat16"
X, W = jax.ShapeDtypeStruct((64, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
Rule, FP8, OpClass = jmp.Rule, jmp.quant.FP8, jmp.OpClass
NO_SCOPES = "The program has no name scopes; open one with jax.named_scope."
AS_PRIMITIVE = "Did you mean the primitive? Write"
DECIDES_NOTHING = (
    "decides nothing: wherever it matches, an earlier rule or a region decides. Put it first, or delete it."
)
UNMATCHED = "matched no equation of the program and does nothing."
UNITS = "their units take 16-bit operands and accumulate in float32"
NEAREST = "The nearest name scopes"
SHOWS = "jmp.explain shows the scopes of all equations."
DECISIONS = "jmp.explain shows all decisions."


def dot(*args, **params):
    return lax.dot_general(*args, **params)


def convolution(x, w):
    """Along the rows."""
    return lax.conv_general_dilated(x[:, None], w[:, None, :1], (1,), "SAME").sum(1, keepdims=True)[:, 0] * w[:1, :1]


def scoped(x, w):
    """Matmuls in four scopes, exponentials in one."""
    for name in ("aa", "bb", "cc", "dd"):
        with jax.named_scope(name):
            x = jnp.exp(x @ w) if name == "aa" else x @ w
    return x


def plain(x, w):
    return jnp.exp(x @ w)


def through(fun):
    """In a call, twice, so that what is known of a program comes from where it was traced first."""
    inner = jax.jit(fun)
    return lambda x, w: inner(inner(x, w), w)


def looped(fun):
    return lambda x, w: lax.scan(lambda x, _: (fun(x, w), None), x, None, length=2)[0]


PLACES = {"open": lambda fun: fun, "in jit": through, "in scan": looped}

#: What a program in each place is told.
SAID = {
    "a scope between four": (
        scoped,
        {"rules": Rule("ee", precision="full")},
        [f"The rule for scope 'ee' {UNMATCHED} The nearest name scopes are 'aa' and 'bb' and 'cc'. {SHOWS}"],
    ),
    "no scopes": (
        plain,
        {"rules": Rule("ee", precision="full")},
        [f"The rule for scope 'ee' {UNMATCHED} {NO_SCOPES}"],
    ),
    "two typing errors": (
        plain,
        {"rules": Rule(None, "axx", "low")},
        [f"The rule for primitive 'axx' {UNMATCHED} Did you mean 'exp'?"],
    ),
    "three typing errors": (
        lambda x, w: jnp.tanh(plain(x, w)),
        {"rules": Rule(None, "abcd", "low")},
        [f"The rule for primitive 'abcd' {UNMATCHED} The program has PRIMITIVES."],
    ),
    "a primitive with two typing errors, as a scope": (
        plain,
        {"rules": Rule("dot_gexyral", precision="full")},
        [
            f"The rule for scope 'dot_gexyral' {UNMATCHED} {AS_PRIMITIVE} Rule(primitive='dot_general', ...).",
        ],
    ),
    "a primitive with three typing errors, as a scope": (
        plain,
        {"rules": Rule("dot_gxyzral", precision="full")},
        [f"The rule for scope 'dot_gxyzral' {UNMATCHED} {NO_SCOPES}"],
    ),
    "a short primitive, as a scope": (
        plain,
        {"rules": Rule("exp", precision="full")},
        [f"The rule for scope 'exp' {UNMATCHED} {AS_PRIMITIVE} Rule(primitive='exp', ...)."],
    ),
    "a short primitive with a typing error, as a scope": (
        plain,
        {"rules": Rule("exq", precision="full")},
        [f"The rule for scope 'exq' {UNMATCHED} {NO_SCOPES}"],
    ),
    "a primitive in another scope": (
        scoped,
        {"rules": Rule("bb", "exp", "full")},
        [
            f"The rule for scope 'bb', primitive 'exp' {UNMATCHED} {NEAREST} are 'bb' and 'aa' and 'cc'. {SHOWS}",
        ],
    ),
    "two of three": (
        scoped,
        {"rules": [Rule("ee", precision="full"), Rule("aa", precision="full"), Rule(None, "exq", "full")]},
        [
            f"The rule for scope 'ee' {UNMATCHED} The nearest name scopes are 'aa' and 'bb' and 'cc'. {SHOWS}",
            f"The rule for primitive 'exq' {UNMATCHED} Did you mean 'exp'?",
        ],
    ),
    "behind another": (
        scoped,
        {"rules": [Rule("aa", precision="full"), Rule("aa", "exp", "low"), Rule("bb", precision="full")]},
        [
            f"The rule for scope 'aa', primitive 'exp' {DECIDES_NOTHING}",
        ],
    ),
    "two ops of four": (
        scoped,
        {"ops": {"tanh": OpClass.DENY, "exp": OpClass.DENY, "dot_generla": OpClass.DENY, "dot_general": OpClass.ALLOW}},
        [
            "ops= names 'dot_generla', and the program has no such primitive. Did you mean 'dot_general'?",
            "ops= names 'tanh', and the program has no such primitive. The program has PRIMITIVES.",
        ],
    ),
    "a recipe without weights": (
        lambda x, w: plain(x * 2, w * 2),
        {"dot": FP8},
        [
            "dot= changes no matmul: dot_general does not run as it asks: "
            'REASON; dot= replaces only matmuls with a weight: its products="weights". ' + DECISIONS
        ],
    ),
    "a matmul of a rule for a convolution": (
        lambda x, w: jax.named_scope("aa")(convolution)(x, w) + jnp.exp(x),
        {"rules": Rule("aa", dot=dot)},
        [
            (
                "The rule for scope 'aa' changes no matmul: conv_general_dilated does not run as it asks: matmuls and "
                f"convolutions: {UNITS}; dot= replaces only dot_general. {DECISIONS}"
            ),
        ],
    ),
    "a matmul for none": (
        lambda x, w: jnp.exp(x),
        {"dot": dot},
        [f"dot= changes no matmul: there is none for it. {DECISIONS}"],
    ),
    "a matmul of a rule and one for all": (
        scoped,
        {"rules": Rule("aa|bb|cc|dd", dot=dot), "dot": dot},
        [f"dot= changes no matmul: there is none for it. {DECISIONS}"],
    ),
    "nothing": (scoped, {"rules": Rule("aa", dot=dot), "dot": dot, "ops": {"exp": OpClass.DENY}}, []),
}


def told(fun, settings):
    _api._interpreter.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            jax.eval_shape(jmp.autocast(fun, LOW, **settings), X, W)
    assert {warning.category for warning in caught} <= {jmp.errors.UnmatchedRuleWarning}
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize("place", PLACES)
def test_what_changes_nothing_is_said_once(name, place):
    fun, settings, said = SAID[name]
    fun = PLACES[place](fun)
    primitives = sorted({record.primitive for record in jmp.explain(fun, LOW)(X, W)})
    few = ", ".join(primitives[:3]) + (f" and {len(primitives) - 3} more" if len(primitives) > 3 else "")
    reason = next((r.reason for r in jmp.explain(fun, LOW)(X, W) if r.primitive == "dot_general"), "")
    assert told(fun, settings) == [text.replace("PRIMITIVES", few).replace("REASON", reason) for text in said]


def test_decisions_are_not_said_again_where_they_are_explained():
    """Only settings that match nothing are."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jmp.explain(lambda x, w: jnp.exp(x), LOW, dot=dot)(X, W)
    with pytest.warns(jmp.errors.UnmatchedRuleWarning, match=UNMATCHED):
        jmp.explain(plain, LOW, rules=Rule("z", precision="full"))(X, W)
