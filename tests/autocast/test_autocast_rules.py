"""Which precision holds where: rules, policies per scope, regions, replaced matmuls; forward and backward."""

import collections
import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from support import jaxprs
from support.autocast_cases_common import mesh, x_and_w
from support.comparisons import assert_identical, slow_but_for

import jmp_lite as jmp
from jmp_lite.autocast import _api

LOW = "mixed_bfloat16"
# Eight rows per device: with a handful, the weight gradient is not work for a matrix unit.
X, W = jax.ShapeDtypeStruct((64, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
BF16, F16, F32 = "bfloat16", "float16", "float32"

# --- Precedence, on one matmul and one exponential in scope a/b ---


def in_scopes(x, w):
    with jax.named_scope("a"), jax.named_scope("b"):
        return jnp.exp(x @ w)


def dtypes(fun, policy=LOW, rules=(), primitives=("dot_general", "exp")):
    """The dtype in which each of some primitives runs."""
    found = jmp.explain(fun, policy, rules=rules)(X, W)
    return tuple(next(record.in_dtypes[0] for record in found if record.primitive == name) for name in primitives)


FP8 = jmp.quant.FP8
Rule = jmp.Rule
FULL_B = Rule("b", precision="full")
RULES = {
    "none": ([], BF16, F32),
    "a rule by itself": (FULL_B, F32, F32),
    "scope": ([Rule("a", precision="full")], F32, F32),
    "inner scope": ([FULL_B], F32, F32),
    "path": ([Rule("a/b", precision="full")], F32, F32),
    "alternatives": ([Rule("z|b", precision="full")], F32, F32),
    "flags": ([Rule("(?i)B", precision="full")], F32, F32),
    "everywhere": ([Rule(precision="full")], F32, F32),
    "primitive": ([Rule("a", "exp", "low")], BF16, BF16),
    "regular expression of a primitive": ([Rule(None, "dot_.*|ragged.*", "full")], F32, F32),
    "low": ([Rule("a", None, "low")], BF16, BF16),
    "dtype": ([Rule("a", None, jnp.float16)], F16, F32),
    "name of a dtype": ([Rule("a", None, "half")], F16, F32),
    "policy": ([Rule("a", None, "mixed_float16")], F16, F32),
    "parts of a policy": ([Rule("a", None, "p=f32,c=f16")], F16, F32),
    "name of float32": ([Rule("a", None, "f32")], F32, F32),
    "float32": ([Rule("a", None, jnp.float32)], F32, F32),
    "first match": ([Rule("b", "dot_general", "full"), Rule("a", None, "low")], F32, BF16),
    "first match, the other way": ([Rule("a", None, "low"), Rule("b", "dot_general", "full")], BF16, BF16),
    "auto shields": ([Rule("a/b", precision="auto"), Rule("a", precision="full")], BF16, F32),
}


@pytest.mark.parametrize(("rules", "product", "exponential"), RULES.values(), ids=RULES)
@pytest.mark.filterwarnings("ignore::jmp_lite.errors.UnmatchedRuleWarning")
def test_rules(rules, product, exponential):
    assert dtypes(in_scopes, rules=rules) == (product, exponential)


@pytest.mark.parametrize(("scope", "expected"), [("a", "rule"), (None, "rule"), ("z", "general")])
@pytest.mark.filterwarnings("ignore::jmp_lite.errors.UnmatchedRuleWarning")
def test_the_product_of_a_rule_goes_before_the_general_one(scope, expected):
    asked = []

    def dot(name):
        return lambda *args, **kwargs: asked.append(name) or jax.lax.dot_general(*args, **kwargs)

    jax.eval_shape(jmp.autocast(in_scopes, LOW, rules=Rule(scope, dot=dot("rule")), dot=dot("general")), X, W)
    assert set(asked) == {expected}


def twice(fun, *args):
    """Calls a function twice on one line."""
    for _ in range(2):
        fun(*args)


UNMATCHED = {
    "another path": (LOW, [Rule("b/a", precision="full")], "nearest name scopes are 'a' and 'a/b'"),
    "whole segments": (LOW, [Rule("aa", precision="full")], "'a'"),
    "whole primitive": (
        LOW,
        [Rule("a", "ex", "low")],
        "primitive 'ex' matched no equation of the program and does nothing. Did you mean 'exp'?",
    ),
    "absent primitive": (LOW, [Rule(None, "erf_inv", "low")], "nothing. The program has "),
    "another scope": (LOW, [Rule("b/a", "exp", "full")], "nearest name scopes are 'a' and 'a/b'"),
    "a primitive as a scope": (LOW, [Rule("dot_generol", precision="full")], "Rule(primitive='dot_general', ...)"),
    "misspelt": (LOW, [Rule("route", precision="full"), Rule("a", precision="auto")], "'route'"),
    "number": (LOW, [Rule(r"\d+/b", precision="full")], "nearest name scopes are 'a/b' and 'a'"),
    "map": (jmp.PolicyMap({"c": "full"}, default=LOW), [], "pattern 'c' of the PolicyMap"),
    "map, among others": (jmp.PolicyMap({"b": LOW, "heads": "full"}, default=LOW), [], "'heads'"),
}


@pytest.mark.parametrize(("policy", "rules", "named"), UNMATCHED.values(), ids=UNMATCHED)
@pytest.mark.parametrize(
    "order", [lambda f: f, lambda f: jax.grad(lambda x, w: f(x, w).sum())], ids=["forward", "grad"]
)
def test_what_matches_nothing_does_nothing_and_is_named_once(policy, rules, named, order):
    _api._interpreter.cache_clear()
    x, w = jnp.ones((16, 16)), jnp.ones((16, 16))
    run = jmp.autocast(order(in_scopes), policy, rules=rules)
    with pytest.warns(jmp.errors.UnmatchedRuleWarning, match=re.escape(named)) as caught:
        twice(run, x, w)
    assert [__file__] == [warning.filename for warning in caught]
    with pytest.warns(jmp.errors.UnmatchedRuleWarning, match=re.escape(named)):  # on another line
        jmp.autocast(order(in_scopes), policy, rules=rules)(x, w)
    with pytest.warns(jmp.errors.UnmatchedRuleWarning):
        assert dtypes(in_scopes, policy, rules) == (BF16, F32)


def searched(x, w):
    return jax.lax.while_loop(lambda c: jnp.max(c) > 1e-3, lambda c: 0.5 * jnp.tanh(scoped(c, w)), x)


@jax.named_scope("a")
def scoped(x, w, **how):
    return jnp.matmul(x, w, **how)


def no_dot(*args, **kwargs):
    raise AssertionError


REFUSED = {
    "search": (searched, {"precision": jnp.bfloat16}, "the condition of a loop depends on it"),
    "search, another dtype": (searched, {"precision": jnp.float16}, "the condition of a loop depends on it"),
    "search, a matmul": (searched, {"dot": no_dot}, "the condition of a loop depends on it"),
    "linear algebra": (
        lambda x, w: jnp.linalg.cholesky(scoped(x, w)),
        {"precision": jnp.bfloat16},
        "linear algebra depends on it",
    ),
    "solution": (
        lambda x, w: scoped(x, jnp.linalg.inv(w)),
        {"precision": jnp.bfloat16},
        "uses a result of linear algebra",
    ),
    "asked by the author": (
        lambda x, w: scoped(x, w, precision="highest"),
        {"precision": "low"},
        "precision=HIGHEST asks for more",
    ),
    "few terms": (lambda x, w: scoped(x[:, :3], w[:3]), {"precision": jnp.bfloat16}, "all consumers want float32"),
}


@pytest.mark.parametrize(("fun", "asks", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_rule_that_no_matmul_follows_says_so_once(fun, asks, reason):
    _api._interpreter.cache_clear()
    rule = Rule("a", **asks)
    x = w = 0.1 * jnp.eye(16)
    with pytest.warns(jmp.errors.UnmatchedRuleWarning, match=f"'a' changes no matmul: .*{reason}") as caught:
        twice(jmp.autocast(fun, LOW, rules=rule), x, w)
    assert len(caught) == 1


KEYED = [name for name, (_, asks, _) in REFUSED.items() if asks.get("precision") == jnp.bfloat16 or "author" in name]


@pytest.mark.parametrize("name", KEYED)
@pytest.mark.parametrize("default", ["full", "mixed_float16"])
def test_a_key_of_a_policy_map_that_no_matmul_follows_says_so_once(name, default):
    _api._interpreter.cache_clear()
    fun, _, reason = REFUSED[name]
    policies = jmp.PolicyMap({"a": "mixed_bfloat16"}, default=default)
    x = w = 0.1 * jnp.eye(16)
    with pytest.warns(jmp.errors.UnmatchedRuleWarning, match=f"pattern 'a' .*changes no matmul: .*{reason}") as caught:
        twice(jmp.autocast(fun, policies), x, w)
    assert len(caught) == 1


@pytest.mark.parametrize("policy", ["full", "mixed_bfloat16"])
def test_a_key_of_a_policy_map_that_a_matmul_follows_is_named_where_it_decides(policy):
    fun = lambda x, w: scoped(jnp.sin(x), w)  # noqa: E731
    other = {"full": "mixed_bfloat16", "mixed_bfloat16": "full"}[policy]
    [_, matmul] = jmp.explain(fun, jmp.PolicyMap({"a": policy}, default=other))(X, W)
    assert ("pattern 'a' of the PolicyMap" in matmul.reason) == (policy == "full")
    jax.eval_shape(jmp.autocast(fun, jmp.PolicyMap({"a": policy}, default=other)), X, W)  # warnings are errors


def test_a_program_without_scopes_is_told_how_to_open_one():
    _api._interpreter.cache_clear()
    run = jmp.autocast(jnp.matmul, LOW, rules=Rule("head", precision="full"))
    with pytest.warns(jmp.errors.UnmatchedRuleWarning, match=r"no name scopes; open one with jax\.named_scope\.$"):
        jax.eval_shape(run, X, W)


def test_a_rule_that_one_matmul_follows_is_quiet():
    fun = lambda x, w: jnp.exp(scoped(x, w) + scoped(x, w, precision="highest"))  # noqa: E731
    assert dtypes(fun, LOW, [Rule("a", precision=jnp.float16)])[0] == F16


def tanh_beside_activations(x, w):
    return jnp.tanh((x + 1) @ (w * 2))


IDLE = {
    "rule behind another": (
        {"rules": [Rule("a", precision="full"), Rule("a/b", precision="low")]},
        "scope 'a/b' decides",
    ),
    "rule behind a general one": (
        {"rules": [Rule(precision="low"), Rule(None, "exp", "full")]},
        "primitive 'exp' decides",
    ),
    "rule behind its double": (
        {"rules": [Rule("a", precision="full"), Rule("a", precision="low")]},
        "scope 'a' decides",
    ),
    "misspelt op": ({"ops": {"expp": jmp.OpClass.ALLOW}}, "no such primitive. Did you mean 'exp'?"),
    "calibrated on another program": (
        {"dot": FP8.replace(sites=(("z", FP8),))},
        "calibration of dot= matched no equation",
    ),
    "absent op": ({"ops": {"erf_inv": jnp.tanh}}, "no such primitive. The program has dot_general, exp"),
}
IDLE_DOTS = {
    "no weight": (tanh_beside_activations, {"dot": FP8}, "dot= changes no matmul"),
    "no matmul": (lambda x, w: jnp.exp(x) + w[:1], {"dot": FP8.replace(products="all")}, "dot= changes no matmul"),
    "of a rule without matmuls": (
        lambda x, w: jnp.exp(scoped(x, w)) + jax.named_scope("z")(jnp.tanh)(x),
        {"rules": [Rule("z", dot=FP8)]},
        "The rule for scope 'z' changes no matmul: there is none for it",
    ),
    "of a rule": (in_scopes, {"rules": [Rule("z", dot=FP8)]}, "rule for scope 'z' matched no equation"),
    "under full": (in_scopes, {"rules": [Rule("a", precision="full")], "dot": FP8}, "dot= changes no matmul"),
    "under the dot of a rule": (in_scopes, {"rules": [Rule("a", dot=FP8)], "dot": FP8}, "dot= changes no matmul"),
}


@pytest.mark.parametrize(("settings", "named"), IDLE.values(), ids=IDLE)
def test_what_decides_nothing_is_named_once(settings, named):
    _api._interpreter.cache_clear()
    run = jmp.autocast(in_scopes, LOW, **settings)
    with pytest.warns(jmp.errors.UnmatchedRuleWarning, match=re.escape(named)) as caught:
        twice(jax.eval_shape, run, X, W)
    assert len(caught) == 1


@pytest.mark.parametrize(("fun", "settings", "named"), IDLE_DOTS.values(), ids=IDLE_DOTS)
def test_recipe_that_replaces_nothing_is_named_once(fun, settings, named):
    _api._interpreter.cache_clear()
    run = jmp.autocast(fun, LOW, **settings)
    with pytest.warns(jmp.errors.UnmatchedRuleWarning) as caught:
        twice(jax.eval_shape, run, X, W)
    assert [named in str(warning.message) for warning in caught].count(True) == 1


@jax.jit
def shared(x, w):
    with jax.named_scope("shared"):
        return x @ w


@pytest.mark.parametrize("settings", [{"rules": [Rule("shared", precision="full")]}, {"dot": FP8}], ids=["rule", "dot"])
def test_functions_with_the_same_settings_are_told_apart(settings):
    """One has a use for them, in a program that both have, which is traced once; another, on another line, has none."""
    _api._interpreter.cache_clear()
    jax.eval_shape(jmp.autocast(shared, LOW, **settings), X, W)
    jax.eval_shape(jmp.autocast(lambda x, w: 2 * shared(x, w), LOW, **settings), X, W)
    with pytest.warns(jmp.errors.UnmatchedRuleWarning):
        jax.eval_shape(jmp.autocast(lambda x, w: jnp.exp(x), LOW, **settings), X, W)


def test_an_op_of_a_backward_rule_is_not_named():
    """The rule is traced when the function is differentiated, if it is."""
    doubled = jax.custom_vjp(lambda x: 2 * x)
    doubled.defvjp(lambda x: (2 * x, ()), lambda _, ct: (jnp.sin(ct),))
    run = jmp.autocast(lambda x, w: doubled(x @ w), LOW, ops={"sin": jmp.OpClass.ALLOW})
    jax.eval_shape(run, X, W)
    jax.eval_shape(jax.grad(lambda x, w: run(x, w).sum()), X, W)


def test_what_acts_is_not_named():
    _api._interpreter.cache_clear()
    rules = [Rule("a/b", precision="low"), Rule("a", dot=FP8), Rule(None, "exp", "full")]
    ops = {"exp": jmp.OpClass.DENY}
    jax.eval_shape(jmp.autocast(in_scopes, LOW, rules=rules[2:], ops=ops, dot=FP8), X, W)
    jax.eval_shape(jmp.autocast(jax.grad(lambda x, w: in_scopes(x, w).sum()), LOW, rules=rules[1:2]), X, W)


def test_rules_that_say_the_same_are_equal():
    assert Rule("a", precision="f32") == Rule("a", precision=jnp.float32) == Rule("a", precision="full")
    assert Rule("a", precision="bf16") == Rule("a", precision=jnp.bfloat16)
    assert Rule("a", result="f32") == Rule("a", None, "auto", result=jnp.float32)
    assert Rule("a", dot=no_dot) == Rule("a", precision="auto", dot=no_dot) != Rule("a", precision="auto")


@pytest.mark.parametrize("policy", ["full", LOW])
@pytest.mark.parametrize("precision", ["auto", "low", None])
def test_a_rule_under_float32_changes_nothing_but_the_matmul_that_it_gives(precision, policy):
    """Its name is in the reason where it changes something."""
    for given in ({"dot": lax.dot_general}, {}) if precision else ({"dot": lax.dot_general},):
        rule = Rule("a", precision=precision, **given)
        [product, exponential] = jmp.explain(in_scopes, policy, rules=rule)(X, W)
        of_policy = "compute dtype of the policy is float32"
        if policy == "full" and not given:
            assert (product.reason, exponential.reason) == (of_policy,) * 2
        elif given:
            assert product.reason == "replaced by dot_general"
        if policy == "full":
            assert (product.in_dtypes[0], exponential.in_dtypes[0]) == (F32, F32)
        else:
            assert (product.in_dtypes[0], exponential.in_dtypes[0]) == (BF16, BF16 if precision == "low" else F32)


POLICIES = {
    "map": ({"a": "full"}, LOW, [], F32, F32),
    "map, inner": ({"b": "full"}, LOW, [], F32, F32),
    "map, exact before pattern": ({"a/b": "full", ".*": "16-mixed"}, LOW, [], F32, F32),
    "map, another 16 bits": ({"a": "mixed_float16"}, LOW, [], F16, F32),
    "map, low in full": ({"a": LOW}, "full", [], BF16, F32),
    "rule before map": ({"a": "full"}, LOW, [Rule("b", precision="bf16")], BF16, F32),
    "rule before map, other": ({"a": LOW}, "full", [FULL_B], F32, F32),
    "auto in full": ({"a": "full"}, LOW, [Rule("a/b", precision="auto")], F32, F32),
    "low in full": ({"a": "full"}, LOW, [Rule("a/b", precision="low")], F32, F32),
}


@pytest.mark.parametrize(("policies", "default", "rules", "product", "exponential"), POLICIES.values(), ids=POLICIES)
def test_policy_maps(policies, default, rules, product, exponential):
    policy = jmp.PolicyMap(policies, default=default)
    assert dtypes(in_scopes, policy, rules) == (product, exponential)


# --- Regions ---

FULL, LOWER, OFF = jmp.full_precision, jmp.low_precision, jmp.no_autocast


def in_regions(fun, regions, form):
    """A function inside regions, the first outermost."""
    for region in reversed(regions):
        fun = form(fun, region)
    return fun


def with_context(fun, region):
    @functools.wraps(fun)
    def call(*args):
        with region():
            return fun(*args)

    return call


FORMS = {
    "decorator": lambda fun, region: region(fun),
    "called decorator": lambda fun, region: region()(fun),
    "context": with_context,
}
REGIONS = {
    "full": ([FULL], LOW, [], F32, F32),
    "low": ([LOWER], LOW, [], BF16, BF16),
    "off": ([OFF], LOW, [], F32, F32),
    "innermost: low": ([FULL, OFF, LOWER], LOW, [], BF16, BF16),
    "innermost: full": ([LOWER, FULL], LOW, [], F32, F32),
    "innermost: off": ([LOWER, OFF], LOW, [], F32, F32),
    "before a rule": ([FULL], LOW, [Rule(precision="low")], F32, F32),
    "before a rule, low": ([LOWER], LOW, [Rule(precision="full")], BF16, BF16),
    "low in float32": ([LOWER], F32, [], F32, F32),
}


@pytest.mark.parametrize(("regions", "policy", "rules", "product", "exponential"), REGIONS.values(), ids=REGIONS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.filterwarnings("ignore::jmp_lite.errors.UnmatchedRuleWarning")
def test_regions(form, regions, policy, rules, product, exponential):  # noqa: PLR0917
    fun = in_regions(in_scopes, regions, form)
    assert fun.__name__ == "in_scopes"
    assert dtypes(fun, policy, rules) == (product, exponential)
    assert dtypes(jax.jit(fun), policy, rules) == (product, exponential)


def test_what_leaves_a_region():
    """Made in full precision, a value stays float32; left alone, it counts as an input; what follows is low again."""
    for region, name in ((FULL, "tanh"), (OFF, "tanh")):
        fun = lambda x, w, region=region: jnp.tanh(region(jnp.matmul)(x, w)) @ w  # noqa: E731
        records = [r for r in jmp.explain(fun, LOW)(X, W) if r.primitive in ("dot_general", name)]
        assert [r.in_dtypes[0] for r in records] == [F32, F32, BF16]
        assert [r.tag for r in records] == (
            ["HIGH", "HIGH", "LOW"] if region is FULL else ["NEUTRAL", "NEUTRAL", "LOW"]
        )


def test_regions_do_nothing_without_autocast(rng):
    args = x_and_w(rng)
    for region, form in itertools.product((FULL, LOWER, OFF), FORMS.values()):
        assert_identical(form(in_scopes, region)(*args), in_scopes(*args))


EXACT = {
    "integers": lambda key, a: jnp.argmax(a) + 1,
    "uniform": lambda key, a: jax.random.uniform(key, (64,)),
    "normal": lambda key, a: jax.random.normal(key, (64,)),
    "bernoulli": lambda key, a: jax.random.bernoulli(key, 0.3, (4096,)),
    "categorical": lambda key, a: jax.random.categorical(key, jnp.zeros((64, 16))),
}


@pytest.mark.parametrize("fun", EXACT.values(), ids=EXACT)
def test_low_precision_leaves_what_must_be_exact(fun, key):
    """In a low region, and under a low rule, solvers, random numbers and integers are what they are elsewhere."""
    args = key, 4 * jnp.eye(16) + 0.1
    assert_identical(jmp.autocast(LOWER(fun), LOW)(*args), fun(*args))
    assert_identical(jmp.autocast(fun, LOW, rules=Rule(precision="low"))(*args), fun(*args))


# --- Through everything that holds programs, forward and backward ---


def product(x, w):
    return jnp.tanh(x @ w)


def custom_jvp(fun):
    function = jax.custom_jvp(fun)
    function.defjvp(lambda primals, tangents: jax.jvp(fun, primals, tangents))
    return function


def custom_vjp(fun):
    function = jax.custom_vjp(fun)
    function.defvjp(lambda *args: jax.vjp(fun, *args), lambda vjp, cotangent: vjp(cotangent))
    return function


def custom_vmap(fun):
    function = jax.custom_batching.custom_vmap(fun)
    function.def_vmap(lambda size, batched, x, w: (jax.vmap(fun, (0, None))(x, w), True))
    return jax.vmap(function, (0, None))


def scanned(fun):
    return lambda x, w: lax.scan(lambda c, _: (fun(c, w), None), x, length=2)[0]


def branched(fun):
    return lambda x, w: lax.cond(x[0, 0] > 0, fun, lambda x, w: x, x, w)


def sharded(fun):
    return jax.shard_map(fun, mesh=mesh(), in_specs=(P("d"), P()), out_specs=P("d"))


dots_saved = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
WITHIN = {
    "open": lambda fun: fun,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "remat with a policy": dots_saved,
    "scan": scanned,
    "cond": branched,
    "vmap": lambda fun: jax.vmap(fun, (0, None)),
    "shard_map": sharded,
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
    "custom_vmap": custom_vmap,
    "scan of remat": lambda fun: scanned(jax.checkpoint(fun)),
    "remat of scan": lambda fun: jax.checkpoint(scanned(fun)),
    "jit of cond in scan": lambda fun: jax.jit(scanned(branched(fun))),
    "remat of jit of custom_vjp": lambda fun: jax.checkpoint(jax.jit(custom_vjp(fun))),
    "shard_map of scan of remat": lambda fun: sharded(scanned(dots_saved(fun))),
}
ORDERS = {
    "forward": lambda cast, loss: cast(loss),
    "grad(autocast)": lambda cast, loss: jax.grad(cast(loss), (0, 1)),
    "autocast(grad)": lambda cast, loss: cast(jax.grad(loss, (0, 1))),
}


def scope_outside(within):
    """Two layers, the first in scope "router", each in its own construct."""

    def loss(x, w):
        with jax.named_scope("router"):
            x = within(product)(x, w)
        with jax.named_scope("mlp"):
            return jnp.mean(within(product)(x, w) ** 2)

    return loss


def scope_inside(within):
    """The same with the scopes inside one construct."""

    def layers(x, w):
        with jax.named_scope("router"):
            x = product(x, w)
        with jax.named_scope("mlp"):
            return product(x, w)

    return lambda x, w: jnp.mean(within(layers)(x, w) ** 2)


def products_by_scope(fun):
    """Counts matmuls by whether their scope holds "router", and the dtypes of their operands."""
    return collections.Counter(("router" in scope, *sorted(found)) for scope, found in jaxprs.contractions(fun, X, W))


@pytest.mark.covering(2)
@pytest.mark.parametrize("within", WITHIN.values(), ids=WITHIN)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("placed", [scope_outside, scope_inside])
def test_scopes_reach_into_and_through(within, order, placed):
    """By rule or by policy, each matmul of a scope is float32, forward and backward; every other one is bfloat16."""
    loss = placed(within)
    plain = products_by_scope(order(lambda fun: fun, loss))
    expected = {(True, F32): plain[True, F32], (False, BF16): plain[False, F32]}
    assert min(expected.values()) > 0
    rules = [Rule("router", precision="full")]
    assert products_by_scope(order(functools.partial(jmp.autocast, policy=LOW, rules=rules), loss)) == expected
    policy = jmp.PolicyMap({"router": "full"}, default=LOW)
    assert products_by_scope(order(functools.partial(jmp.autocast, policy=policy), loss)) == expected


@pytest.mark.covering(1)
@pytest.mark.parametrize("within", WITHIN.values(), ids=WITHIN)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_regions_reach_into_and_through(within, order):
    """So it is in a region around a construct: one in full precision, and one that is left alone within the other."""

    def loss(x, w):
        with jax.named_scope("router"):
            x = FULL(within(product))(x, w)
            x = FULL(OFF(within(product)))(x, w)
        return jnp.mean(within(product)(x, w) ** 2)

    plain = products_by_scope(order(lambda fun: fun, loss))
    found = products_by_scope(order(functools.partial(jmp.autocast, policy=LOW), loss))
    assert found == {(True, F32): plain[True, F32], (False, BF16): plain[False, F32]}


#: Each construct by itself or in another one.
TOGETHER = ("vmap", "custom_jvp", "custom_vmap", "remat with a policy", *(name for name in WITHIN if " of " in name))


@pytest.mark.parametrize("within", slow_but_for(TOGETHER, WITHIN))
def test_full_everywhere_is_the_plain_function(within, rng):
    """With a rule that leaves everything in float32 the bits are those of the function, value and gradient."""
    args, loss = x_and_w(rng), scope_inside(WITHIN[within])
    found = jax.jit(jax.value_and_grad(jmp.autocast(loss, LOW, rules=Rule(precision="full")), (0, 1)))
    assert_identical(found(*args), jax.jit(jax.value_and_grad(loss, (0, 1)))(*args))


# --- Linen opens scopes by itself ---


class Tied(nn.Module):
    """An embedding used at both ends, and a layer called by a method with another name."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 16)
        return embed.attend(nn.Dense(16)(embed(ids)))


@pytest.mark.covering(1)
@pytest.mark.parametrize("pattern", ["Embed_0", r"Embed_0\.attend", "Tied/Embed_0", ".*mbed_0"])
@pytest.mark.parametrize("order", ["forward", "autocast(grad)", "grad(autocast)"])
def test_methods_of_linen_modules_are_in_the_scope_of_the_module(pattern, order):
    model, ids = Tied(), jnp.arange(8)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    loss = lambda variables: jnp.sum(model.apply(variables, ids) ** 2)  # noqa: E731
    cast = functools.partial(jmp.autocast, policy=LOW, rules=Rule(pattern, precision="full"))
    fun = {"forward": cast(loss), "autocast(grad)": cast(jax.grad(loss)), "grad(autocast)": jax.grad(cast(loss))}[order]
    found = jaxprs.contractions(fun, variables)
    assert {("attend" in scope, *kinds) for scope, kinds in found} == {(True, F32), (False, BF16)}


@pytest.mark.parametrize("wrong", ["Tied/Dense_1", "Dense_1", "Tied/Dens_0"])
@pytest.mark.parametrize("form", ["apply", "loss"])
def test_the_scope_that_is_suggested_is_one_that_works(wrong, form):
    """Scopes of a loss start with the name of the model, and paths of a policy for ``apply`` do not."""
    model, ids = Tied(), jnp.arange(8)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    wrap = jmp.linen.autocast if form == "apply" else jmp.autocast
    run = lambda key: jaxprs.contractions(  # noqa: E731
        wrap(model.apply, jmp.PolicyMap({key: "full"}, default=LOW)), variables, ids
    )
    with pytest.warns(jmp.errors.UnmatchedRuleWarning) as caught:
        run(wrong)
    suggested = re.search(r"nearest name scopes are '(.*?)'", str(caught[0].message))[1]
    assert suggested == {"apply": "Dense_0", "loss": "Tied/Dense_0"}[form]
    assert ("Tied/Dense_0", {"float32"}) in run(suggested)  # warnings are errors


# --- Errors ---

INVALID = {
    "precision": (lambda: Rule("head", precision="fast"), jmp.errors.InvalidRuleError, "'fast'"),
    "precision of 8 bits": (lambda: Rule(precision=jnp.float8_e4m3fn), jmp.errors.InvalidRuleError, "float8_e4m3fn"),
    "precision of 64 bits": (lambda: Rule(precision="float64"), jmp.errors.InvalidRuleError, "float64"),
    "precision as a primitive": (lambda: Rule("head", "float32"), jmp.errors.InvalidRuleError, "precision='float32'"),
    "alias as a primitive": (lambda: Rule("head", "mixed_bfloat16"), jmp.errors.InvalidRuleError, "'mixed_bfloat16'"),
    "dtype as a primitive": (lambda: Rule("head", jnp.bfloat16), jmp.errors.InvalidRuleError, "bfloat16"),
    "result": (lambda: Rule("head", result=jnp.bfloat16), jmp.errors.InvalidRuleError, "bfloat16"),
    "dot of an exponential": (lambda: Rule("a", "exp", dot=FP8), jmp.errors.InvalidRuleError, "dot= is for matmuls"),
    "result of sums": (
        lambda: Rule(primitive="reduce_.*", result=jnp.float32),
        jmp.errors.InvalidRuleError,
        "primitive 'reduce_.*' matches none",
    ),
    "dot under full": (lambda: Rule("a", precision="f32", dot=FP8), jmp.errors.InvalidRuleError, "never be called"),
    "a kernel": (lambda: Rule(primitive="pallas_call", precision="low"), jmp.errors.InvalidRuleError, "'pallas_call'"),
    "a matmul for a kernel": (
        lambda: Rule(None, "ffi_call", dot=lax.dot_general),
        jmp.errors.InvalidRuleError,
        "'ffi_call'",
    ),
    "integers": (lambda: Rule(precision=jnp.int16), jmp.errors.InvalidRuleError, "int16"),
    "no precision": (lambda: Rule("head"), jmp.errors.InvalidRuleError, "'head' asks for nothing"),
    "scope": (lambda: Rule("head("), jmp.errors.InvalidPatternError, "head("),
    "primitive": (lambda: Rule(None, "[ex"), jmp.errors.InvalidPatternError, "[ex"),
    "flags in the middle": (lambda: Rule("a(?i)b"), jmp.errors.InvalidPatternError, "Write flags first, as in '(?i)"),
    "a scope that backtracks for ever": (
        lambda: jmp.autocast(jax.named_scope("a" * 40)(jnp.sin), LOW, rules=Rule("(a+)+", precision="full"))(1.0),
        jmp.errors.InvalidPatternError,
        "Pattern '(a+)+' would search path 'aaaa",
    ),
    "a number for a scope": (lambda: Rule(3, precision="full"), jmp.errors.InvalidRuleError, "scope must be a regular"),
    "a number for a primitive": (
        lambda: Rule("a", 3, "full"),
        jmp.errors.InvalidRuleError,
        "primitive must be a regular expression or None, got 3",
    ),
    "a matmul that is no function": (lambda: Rule("a", dot="fp8"), jmp.errors.InvalidRuleError, "got 'fp8'"),
    "a general one that is none": (
        lambda: jmp.explain(in_scopes, LOW, dot="fp8"),
        jmp.errors.InvalidRuleError,
        "dot must be a function",
    ),
    "a matmul of what is autocast already": (
        lambda: jmp.autocast(jmp.autocast(jnp.matmul, LOW, accumulation_dtype=jnp.float32), LOW, dot=FP8)(
            jnp.ones((8, 16)), jnp.ones((16, 16))
        ),
        jmp.errors.InvalidRuleError,
        "is autocast already. Give dot=",
    ),
    "no rules": (lambda: jmp.autocast(in_scopes, LOW, rules=None), jmp.errors.InvalidRuleError, "got None"),
    "no function": (lambda: jmp.autocast(3, LOW), TypeError, "3"),
    "no function to explain": (lambda: jmp.explain(3, LOW), TypeError, "3"),
    "not a rule": (
        lambda: jmp.autocast(in_scopes, LOW, rules=[("a", "full")]),
        jmp.errors.InvalidRuleError,
        "('a', 'full')",
    ),
    "a matmul by its place": (lambda: Rule("a", None, "low", FP8), TypeError, "positional arguments"),
    "rules that run out": (
        lambda: jmp.autocast(in_scopes, LOW, rules=iter([FULL_B])),
        jmp.errors.InvalidRuleError,
        "must be a sequence",
    ),
    "sums": (
        lambda: jmp.autocast(in_scopes, LOW, accumulation_dtype=jnp.bfloat16),
        jmp.errors.InvalidRuleError,
        "bfloat16",
    ),
    "two products": (
        lambda: jmp.autocast(in_scopes, LOW, dot=lax.dot_general, accumulation_dtype=jnp.float32),
        jmp.errors.InvalidRuleError,
        "accumulation_dtype",
    ),
    "save": (lambda: jmp.autocast(in_scopes, LOW, residuals="some"), jmp.errors.InvalidRuleError, "'some'"),
    "policy": (lambda: jmp.autocast(in_scopes, "fp99"), jmp.errors.UnknownDtypeError, "'fp99'"),
    "no policy": (lambda: jmp.autocast(in_scopes, None), jmp.errors.InvalidPolicyError, "None"),
    "8 bits": (lambda: jmp.explain(in_scopes, "c=float8_e4m3fn"), jmp.errors.InvalidPolicyError, "float8_e4m3fn"),
    "8 bits at the boundary": (
        lambda: jmp.with_policy(in_scopes, "c=float8_e4m3fn"),
        jmp.errors.InvalidPolicyError,
        "with_policy computes in at least 16 bits",
    ),
    "8 bits in a map": (
        lambda: jmp.linen.autocast(Tied().apply, jmp.PolicyMap({"a": "c=float8_e5m2"}, default=LOW)),
        jmp.errors.InvalidPolicyError,
        "float8_e5m2",
    ),
}


@pytest.mark.parametrize(("build", "error", "quoted"), INVALID.values(), ids=INVALID)
def test_what_means_nothing_is_refused_at_once(build, error, quoted):
    with pytest.raises(error, match=re.escape(quoted)):
        build()


def test_contradicting_patterns_are_reported():
    policy = jmp.PolicyMap({"[a]": "full", "[b]": "mixed_float16"}, default=LOW)
    with pytest.raises(jmp.errors.InvalidPolicyError, match="'a/b'"):
        jmp.autocast(in_scopes, policy)(jnp.ones((8, 16)), jnp.ones((16, 16)))
