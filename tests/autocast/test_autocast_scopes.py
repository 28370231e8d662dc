"""Which setting holds in a name scope: regions, readings of scopes, patterns, and the precision that they give."""

import jax.numpy as jnp
import pytest
from jax import lax

import jmp_lite as jmp
from jmp_lite.autocast import _rules
from jmp_lite.autocast._api import settings_from
from jmp_lite.autocast._regions import innermost
from jmp_lite.autocast._rules import Precision, Rule
from jmp_lite.autocast._values import Known, Origin, Tag, Value
from jmp_lite.products._matmul import RoundsOperands

BF16, F16, F32 = (jnp.dtype(name) for name in ("bfloat16", "float16", "float32"))
FULL, LOW, OFF = "jmp.full_precision", "jmp.low_precision", "jmp.no_autocast"


def settings(policy="mixed_bfloat16", *rules, root="", **given):
    return settings_from(
        policy, **{"ops": None, "dot": None, "accumulation_dtype": None} | given, rules=rules, root=root
    )


REGIONS = {
    "": None,
    "a/b": None,
    "jmp.mine/b": None,
    FULL: FULL,
    f"a/{LOW}/b": LOW,
    f"{LOW}/a/{FULL}/b": FULL,
    f"{LOW}/jmp.mine": LOW,
    f"my{FULL}": None,
    OFF: OFF,
}


@pytest.mark.parametrize(("scope", "region"), REGIONS.items())
def test_the_innermost_region_decides(scope, region):
    assert innermost(scope) == region


READINGS = {
    "a/b": ("a/b",),
    "a.decode/b": ("a.decode/b", "a/b"),
    "a/b.decode": ("a/b.decode", "a/b"),
    "a.x/b.y": ("a.x/b.y", "a/b"),
    "a/1.5": ("a/1.5",),
    "": ("",),
}


@pytest.mark.parametrize(("scope", "readings"), READINGS.items())
def test_names_of_methods_may_be_left_out(scope, readings):
    assert _rules._readings(scope) == readings
    assert _rules._path_in_model(scope, "") == readings[-1]
    assert _rules._path_in_model(f"Model.apply/{scope}" if scope else "Model", "Model") == readings[-1]


MATCHES = [
    (Rule("b", precision="full"), "a/b/c", "exp", True),
    (Rule("b", precision="full"), "a/bb/c", "exp", False),
    (Rule("b", "exp", "full"), "a/b", "exp", True),
    (Rule("b", "exp", "full"), "a/b", "exp2", False),
    (Rule("b", "exp", "full"), "a", "exp", False),
    (Rule(None, "exp", "full"), "", "exp", True),
    (Rule(precision="full"), "", "exp", True),
    (Rule("a/b", precision="full"), "a.decode/b", "exp", True),
    (Rule("a.decode", precision="full"), "a.decode/b", "exp", True),
]


@pytest.mark.parametrize(("rule", "scope", "primitive", "expected"), MATCHES)
def test_what_a_rule_holds_for(rule, scope, primitive, expected):
    assert rule.matches(scope, primitive) is expected
    found = settings("mixed_bfloat16", rule)
    assert (found.rule_for(scope, primitive) is rule) is expected
    assert found.rule_for(f"{scope}/{FULL}", primitive) is None


def test_the_first_rule_that_holds_decides():
    rules = Rule("z", precision="low"), Rule("a", precision="full"), Rule("a", precision="low")
    assert settings("mixed_bfloat16", *rules).rule_for("a", "exp") is rules[1]
    assert settings("mixed_bfloat16", *rules).rule_for("b", "exp") is None


def dot(*args, **params):
    return lax.dot_general(*args, **params)


MAP = jmp.PolicyMap(
    {"a": "mixed_float16", "b": "full", "c": jmp.Policy(F32, BF16, F32, reduce_dtype=BF16)}, default="bf16"
)
OF_FLOAT32, IN_A = "compute dtype of the policy is float32", "pattern 'a' of the PolicyMap"
#: Settings and a scope; the mode, the compute dtype, the reason, what is asked, and what else is not as by default.
PRECISIONS = {
    "a policy": (settings(), "a", "auto", BF16, OF_FLOAT32, "", {}),
    "float32": (settings("full"), "a", "full", F32, OF_FLOAT32, "", {}),
    "a key": (settings(MAP), "x/a", "auto", F16, IN_A, "dtype", {}),
    "a key in float32": (settings(MAP), "b", "full", F32, "pattern 'b' of the PolicyMap", "", {}),
    "a key of another sum": (
        settings(MAP),
        "c",
        "auto",
        BF16,
        "pattern 'c' of the PolicyMap",
        "dtype",
        {"reduce_dtype": BF16},
    ),
    "no key": (settings(MAP), "z", "auto", BF16, OF_FLOAT32, "", {}),
    "a key in a model": (settings(MAP, root="M"), "M/a", "auto", F16, IN_A, "dtype", {}),
    "sums": (settings(accumulation_dtype=F32), "a", "auto", BF16, OF_FLOAT32, "", {"accumulates": True}),
    "a matmul": (settings(dot=dot), "a", "auto", BF16, OF_FLOAT32, "", {"dot": dot}),
    "a matmul under float32": (settings("full", dot=dot), "a", "auto", F32, OF_FLOAT32, "", {"dot": dot}),
    "full": (settings(), FULL, "full", BF16, "in a full_precision region", "", {}),
    "low": (settings(), LOW, "low", BF16, "in a low_precision region", "", {}),
    "low under float32": (settings("full"), LOW, "full", F32, "in a low_precision region", "", {}),
    "off": (settings(), f"{LOW}/{OFF}", "off", BF16, "in a no_autocast region", "", {"leaves_whole": True}),
    "off under float32": (settings("full"), OFF, "off", F32, "in a no_autocast region", "", {"leaves_whole": True}),
    "a rule in full": (settings("bf16", Rule("a", precision="full")), "a", "full", BF16, "rule for scope 'a'", "", {}),
    "a rule in full for a primitive": (
        settings("bf16", Rule("a", "exp", "full")),
        "a",
        "full",
        BF16,
        "rule for scope 'a', primitive 'exp'",
        "",
        {"leaves_whole": True},
    ),
    "a rule in low": (
        settings("bf16", Rule("a", precision="low")),
        "a",
        "low",
        BF16,
        "rule for scope 'a'",
        "dtype",
        {},
    ),
    "a rule in low for a primitive": (
        settings("bf16", Rule("a", "exp", "low")),
        "a",
        "low",
        BF16,
        "rule for scope 'a', primitive 'exp'",
        "dtype",
        {},
    ),
    "a rule in auto": (settings("bf16", Rule(precision="auto")), "a", "auto", BF16, "rule for all", "", {}),
    "a rule of a dtype": (
        settings("full", Rule("a", precision=F16)),
        "a",
        "auto",
        F16,
        "rule for scope 'a'",
        "dtype",
        {},
    ),
    "a rule of a matmul": (
        settings("bf16", Rule("a", dot=dot)),
        "a",
        "auto",
        BF16,
        "rule for scope 'a'",
        "dot",
        {"dot": dot},
    ),
    "a rule of a matmul and a dtype": (
        settings("bf16", Rule("a", precision=F16, dot=dot)),
        "a",
        "auto",
        F16,
        "rule for scope 'a'",
        "dot",
        {"dot": dot},
    ),
    "a rule of a result": (
        settings("bf16", Rule("a", result=F32)),
        "a",
        "auto",
        BF16,
        "rule for scope 'a'",
        "",
        {"result": F32},
    ),
    "a rule in low under float32": (settings("full", Rule("a", precision="low")), "a", "full", F32, OF_FLOAT32, "", {}),
    "a rule of a matmul under float32": (
        settings("full", Rule("a", dot=dot)),
        "a",
        "auto",
        F32,
        "rule for scope 'a'",
        "dot",
        {"dot": dot},
    ),
}


@pytest.mark.parametrize(
    ("given", "scope", "mode", "dtype", "reason", "asked", "others"), PRECISIONS.values(), ids=PRECISIONS
)
def test_the_precision_in_a_scope(given, scope, mode, dtype, reason, asked, others):  # noqa: PLR0917
    expected = Precision(mode, dtype, reason=reason, asked=asked, **{"reduce_dtype": F32} | others)
    found = given.precision(scope, "exp")
    assert found._replace(asked="") == expected._replace(asked="")
    assert found.asked == asked or innermost(scope)


def test_patterns_of_the_user_are_named():
    recipe = type("Recipe", (RoundsOperands,), {"scopes": frozenset({"y", "x"}), "__call__": staticmethod(dot)})()
    rules = Rule("a", precision="full"), Rule(None, "exp", "low"), Rule("z", dot=recipe)
    found = settings(MAP, *rules, root="M").patterns
    assert {name: pattern.scope for name, pattern in found.items()} == {
        "rule for scope 'a'": "a",
        "rule for primitive 'exp'": None,
        "rule for scope 'z'": "z",
        IN_A: "a",
        "pattern 'b' of the PolicyMap": "b",
        "pattern 'c' of the PolicyMap": "c",
        "calibration of dot= of the rule for scope 'z'": "x",
    }
    assert found[IN_A].path("M/a/b") == "a/b"
    assert found["rule for scope 'a'"].path("M/a/b") == "M/a/b"
    holds = {
        name: [pattern.holds(scope, "exp") for scope in ("M/a", "M/x/a/b", "x", "z")] for name, pattern in found.items()
    }
    assert holds["rule for scope 'a'"] == holds[IN_A] == [True, True, False, False]
    assert holds["rule for primitive 'exp'"] == [True] * 4
    assert holds["calibration of dot= of the rule for scope 'z'"] == [False, False, True, False]
    assert settings(dot=recipe).patterns.keys() == {"calibration of dot="}
    assert settings(dot=dot).patterns == {}


def test_only_a_recipe_is_turned_to_the_side_of_the_weight():
    class Turned(RoundsOperands):
        def turned(self, are_weights):
            return tuple(are_weights)

    weight, low = Value(None, Known(Tag.NEUTRAL, Origin.INPUT)), Value(None, Known(Tag.LOW))
    precision = Precision("auto", BF16, Turned())
    assert precision.turned([low, weight, weight]).dot == (False, True)
    assert Precision("auto", BF16, dot).turned([low, weight]).dot is dot
    assert Precision("auto", BF16).turned([low, weight]).dot is None
