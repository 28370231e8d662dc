"""Policies per module: which one a path gets, and what happens where two could apply."""
# ruff: noqa: SIM300 - the expected value comes first

import copy
import pickle
import re
import sys
import time
import timeit

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import strategies
from support.comparisons import slow_but_for

import jmp_lite as jmp
from jmp_lite._messages import quote
from jmp_lite._patterns import LONGEST_PATH

DEFAULT = "mixed_bfloat16"
EXAMPLE = "Write for example get_policy('mixed_bfloat16')."


def exactly(text):
    return f"^{re.escape(text)}$"


# --- Which policy a path gets -----------------------------------------------------------------------------------------

LOOKUPS = [
    # A pattern names a module wherever it is, and everything inside.
    ({"norm": "f32"}, "norm", "f32"),
    ({"norm": "f32"}, "norm/scale", "f32"),
    ({"norm": "f32"}, "decoder/norm", "f32"),
    ({"norm": "f32"}, "decoder/norm/inner/scale", "f32"),
    ({"decoder/norm": "f32"}, "model/decoder/norm/scale", "f32"),
    ({"scale": "f32"}, "decoder/norm/scale", "f32"),
    ({r"norm_\d+": "f32"}, "norm_12/scale", "f32"),
    ({".*norm.*": "f32"}, "decoder/layernorm_3/scale", "f32"),
    ({"a|b": "f32"}, "x/b/kernel", "f32"),
    ({"(?:a|b)/c": "f32"}, "b/c/kernel", "f32"),
    ({"encoder/.*/kernel": "f32"}, "encoder/layers_0/dense/kernel", "f32"),
    ({".*": "f32"}, "anything/at/all", "f32"),
    ({".*": "f32"}, "", "f32"),
    ({"(?i:norm)": "f32"}, "NORM/scale", "f32"),
    # Flags, for the whole pattern.
    ({"(?i)norm": "f32"}, "decoder/NORM/scale", "f32"),
    ({"(?i)norm|head": "f32"}, "decoder/Head", "f32"),
    ({"(?i)(?s)n.rm": "f32"}, "x/N\nRM", "f32"),
    ({"(?m)norm": "f32"}, "x\nnorm", DEFAULT),
    ({"(?a)\\w+": "f32"}, "é", DEFAULT),
    ({"(?x) norm  # of any layer": "f32"}, "decoder/norm", "f32"),
    ({"(?xi) norm  # ) |": "f32"}, "decoder/Norm", "f32"),
    # Plain keys of several segments, wherever they are.
    ({"a/b": "f32"}, "x/a/b/c", "f32"),
    ({"b/c": "f32"}, "a/b/c", "f32"),
    ({"a/c": "f32"}, "a/b/c", DEFAULT),
    ({"a/b/c/d": "f32"}, "a/b/c", DEFAULT),
    ({"a b": "f32"}, "x/a b", "f32"),
    ({"": "f32"}, "", "f32"),
    ({"": "f32"}, "a//b", "f32"),
    ({"/a": "f32"}, "x//a", "f32"),
    ({r"(\w)\1": "f32"}, "x/aa/y", "f32"),
    # Whole segments only.
    ({"norm": "f32"}, "layernorm/scale", DEFAULT),
    ({"norm": "f32"}, "norm_1/scale", DEFAULT),
    ({"norm": "f32"}, "prenorm", DEFAULT),
    ({"a|b": "f32"}, "ab/xb", DEFAULT),
    ({"norm/scale": "f32"}, "norm/bias", DEFAULT),
    ({"norm/scale": "f32"}, "norm/x/scale", DEFAULT),
    ({"norm": "f32"}, "norm\n", DEFAULT),
    ({"": "f32"}, "a/b", DEFAULT),
    ({}, "a/b", DEFAULT),
    ({"norm": "f32"}, "", DEFAULT),
    # A key that is the path, or its deepest ancestor, beats every pattern.
    ({"decoder/norm": "f32", "norm": "f16"}, "decoder/norm", "f32"),
    ({"decoder/norm": "f32", "norm": "f16"}, "decoder/norm/scale", "f32"),
    ({"decoder/norm": "f32", "norm": "f16"}, "encoder/norm/scale", "f16"),
    ({"decoder": "f32", ".*": "f16"}, "decoder/norm/scale", "f32"),
    ({"decoder": "f32", "decoder/norm": "f16"}, "decoder/norm/scale", "f16"),
    ({"decoder": "f32", "decoder/norm": "f16"}, "decoder/dense", "f32"),
    ({"decoder": "f32", "decoder/norm": "f16", "decoder/norm/scale": "bf16"}, "decoder/norm/scale", "bf16"),
    ({"decoder": "f32", "scale": "f16"}, "decoder/norm/scale", "f32"),
    ({"a.c": "f32", "a.*": "f16"}, "a.c", "f32"),
    ({"x+": "f32", "x.": "f16"}, "x+/y", "f32"),
    # Two patterns that ask for the same do not contradict each other.
    ({"norm": "f32", ".*norm": "full"}, "decoder/norm", "f32"),
]


@pytest.mark.parametrize(("policies", "path", "expected"), LOOKUPS, ids=[f"{list(m)}-{p!r}" for m, p, _ in LOOKUPS])
def test_policy_of_a_path(policies, path, expected):
    """Patterns, whole segments, exact keys and the default, in whatever order the keys are given."""
    for ordered in (policies, dict(reversed(policies.items()))):
        assert jmp.get_policy(expected) == jmp.PolicyMap(ordered, DEFAULT).policy_for(path)


AMBIGUOUS = [
    (
        {"norm": "f32", "layers_.*": "f16"},
        "layers_1/norm",
        "'layers_.*' (p=f16,c=f16,o=f16) and 'norm' (p=full,c=full,o=full)",
    ),
    (
        {"layer_.*": "bf16", ".*_norm": "f32"},
        "layer_norm",
        "'.*_norm' (p=full,c=full,o=full) and 'layer_.*' (p=bf16,c=bf16,o=bf16)",
    ),
    (
        {"a": "c=f16,o=f32", "b": "f32", "c": "c=f16,o=f32"},
        "x/a/b/c",
        "'a' (p=full,c=f16,o=full) and 'b' (p=full,c=full,o=full) and 'c' (p=full,c=f16,o=full)",
    ),
    ({"a": "f32", "b": "p=f32,r=f16"}, "x/a/b", "'a' (p=full,c=full,o=full) and 'b' (p=full,c=full,o=full,r=f16)"),
]


@pytest.mark.parametrize(("policies", "path", "listed"), AMBIGUOUS)
def test_contradicting_patterns_are_an_error_that_names_them(policies, path, listed):
    """Patterns that match one path with different policies are all named, whatever their order; other paths work."""
    text = f"Path {path!r} matches {listed}. Make the patterns exclusive, or name the path itself."
    for ordered in (policies, dict(reversed(policies.items()))):
        policy_map = jmp.PolicyMap(ordered, DEFAULT)
        for error in (jmp.errors.InvalidPolicyError, ValueError):
            with pytest.raises(error, match=exactly(text)):
                policy_map.policy_for(path)
        assert jmp.get_policy(DEFAULT) == policy_map.policy_for("other")


def test_naming_the_path_resolves_a_contradiction():
    """The remedy that the error proposes works."""
    policies = {"norm": "f32", "layers_.*": "f16", "layers_1/norm": "bf16"}
    assert jmp.get_policy("bf16") == jmp.PolicyMap(policies, DEFAULT).policy_for("layers_1/norm/scale")


def test_casts_report_a_contradiction():
    """A cast meets the contradiction at the path of the leaf."""
    policies = jmp.PolicyMap({"norm": "f32", "layers_.*": "f16"}, DEFAULT)
    with pytest.raises(jmp.errors.InvalidPolicyError, match=r"^Path 'layers_1/norm/scale' matches "):
        policies.cast_to_compute({"layers_1": {"norm": {"scale": jnp.ones(1)}}})


SEGMENTS = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=5)


@given(path=st.lists(SEGMENTS, min_size=1, max_size=4), depth=st.integers(1, 4))
def test_escaped_ancestor_matches_and_others_do_not(path, depth):
    """Any name, escaped, is a pattern for itself and for what is inside; with a letter more it is not."""
    ancestor, whole = "/".join(path[:depth]), "/".join(path)
    expected = jmp.get_policy("f16")
    assert expected == jmp.PolicyMap({re.escape(ancestor): "f16"}, DEFAULT).policy_for(whole)
    assert expected == jmp.PolicyMap({re.escape(ancestor): "f16"}, DEFAULT).policy_for(f"model/{whole}")
    assert jmp.get_policy(DEFAULT) == jmp.PolicyMap({re.escape(ancestor): "f16"}, DEFAULT).policy_for(f"{ancestor}x")


@given(st.text())
@settings(max_examples=200)
def test_any_text_is_a_pattern_or_a_clean_error(text):
    """A key is a pattern, with which any path can be looked up, or an error that quotes it."""
    policies = strategies.result_or_error(jmp.PolicyMap, {text: "f16"}, DEFAULT)
    if isinstance(policies, jmp.errors.InvalidPatternError):
        assert quote(text) in str(policies)
    else:
        for path in ("", "a/b", text, f"a/{text}/b"):
            assert policies.policy_for(path) in (jmp.get_policy("f16"), jmp.get_policy(DEFAULT))
        assert jmp.get_policy("f16") == policies.policy_for(text)


# --- Construction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("[", "unterminated character set at position 0"),
        ("(norm", "missing ), unterminated subpattern at position 0"),
        ("a)|(b", "unbalanced parenthesis at position 1"),
        ("*", "nothing to repeat at position 0"),
        ("a\\", "bad escape (end of pattern) at position 1"),
        ("norm(?i)", "global flags not at the start of the expression at position 4"),
        ("(?L)norm", "bad inline flags: cannot use 'L' flag with a str pattern at position 3"),
        ("a{99999999999999999999}", "the repetition number is too large"),
    ],
)
def test_pattern_that_is_no_regular_expression(pattern, reason):
    """A broken pattern is quoted with what Python says about it and a remedy, when the map or the rule is built."""
    remedy = "Write flags first, as in '(?i)norm'." if "flags" in reason else "A name as it is is re.escape(name)."
    text = f"Pattern {pattern!r} is not a regular expression: {reason}. {remedy}"
    for build in (lambda: jmp.PolicyMap({"ok": "f32", pattern: "f32"}, DEFAULT), lambda: jmp.Rule(pattern)):
        for error in (jmp.errors.InvalidPatternError, ValueError):
            with pytest.raises(error, match=exactly(text)):
                build()


BACKTRACKING = {
    "repeated repetition": ("(a+)+b", "a" * 50),
    "repeated repetition, at the end": ("(a+)+", f"{'a' * 50}x"),
    "repeated words": (r"(\w+\s?)*!", "decoder/attention_projection_of_queries_and_of_keys"),
    "repeated choice": ("(a|a)*b", "a" * 80),
    "overlapping choice": ("(a|b|ab)*c", "ab" * 40),
    "anything, again and again": ("(.*)*x", "decoder/" + "y" * 80),
    "many repetitions": (".*.*.*.*.*x", "abc" * 300),
    "blanks that stand for nothing": ("(?x)(a+) +b", "a" * 60),
    "blanks within": ("(?x:(a+) +)b", "a" * 60),
    "a comment": ("(?x)(a+)# letters\n+b", "a" * 60),
}


@pytest.mark.parametrize("name", slow_but_for({"repeated words", "many repetitions", "a comment"}, BACKTRACKING))
def test_pattern_that_backtracks_for_ever_is_cut_off(name):
    """A search that would take longer than the universe ends with an error that names the pattern and the path."""
    pattern, path = BACKTRACKING[name]
    text = f"Pattern {pattern!r} would search path {quote(path)} for ever. Repeat nothing that is itself repeated."
    with pytest.raises(jmp.errors.InvalidPatternError, match=exactly(text)):
        jmp.PolicyMap({pattern: "f32"}, DEFAULT).policy_for(path)


REPEATED = [(r"(?:block_\d+/)+norm", "block_1/block_2/norm"), ("(a+)+b", f"{'a' * 15}b"), (".*a.*b.*c.*", "xaxbxc")]


@pytest.mark.parametrize(("pattern", "path"), REPEATED)
def test_repeated_groups_that_end_are_patterns_like_others(pattern, path):
    """What costs little is found, however it is written."""
    assert jmp.get_policy("f32") == jmp.PolicyMap({pattern: "f32"}, DEFAULT).policy_for(f"model/{path}/scale")


def test_a_pause_is_not_taken_for_backtracking(monkeypatch):
    """Such as a collection of garbage."""
    pauses = iter([0.0, 9.0] + [0.0] * 1000)
    now = 0.0

    def thread_time():
        nonlocal now
        now += next(pauses)
        return now

    monkeypatch.setattr("time.thread_time", thread_time)
    assert jmp.get_policy("f32") == jmp.PolicyMap({"(a+)+b": "f32"}, DEFAULT).policy_for(f"{'a' * 15}b")


@pytest.mark.parametrize("key", ["/", "//"])
def test_keys_of_nothing_match_nothing(key):
    tree = {"a": {"b": jnp.ones(2)}}
    assert jmp.PolicyMap({key: "f16"}, "full").cast_to_param(tree)["a"]["b"].dtype == jnp.float32


def test_patterns_are_searched_for_in_paths_of_up_to_1000_characters():
    """The limit holds for regular expressions alone: names are looked up in paths of any length."""
    longest = f"{'x' * (LONGEST_PATH - 5)}/head"
    pattern, name = jmp.PolicyMap({"hea.": "f32"}, DEFAULT), jmp.PolicyMap({"head": "f32"}, DEFAULT)
    for policies, path in ((pattern, longest), (name, longest), (name, f"{longest}/{longest}")):
        assert jmp.get_policy("f32") == policies.policy_for(path)
    with pytest.raises(jmp.errors.InvalidPatternError, match=r"^Patterns are .* up to 1000 .*\.\.\. has 1001\. Give"):
        pattern.policy_for(f"x{longest}")


def lookups_by_search(policies, path):
    """What a path gets if every key is searched for."""
    ancestors = ["/".join(path.split("/")[:n]) for n in range(path.count("/") + 1, 0, -1)]
    exact = [policies[ancestor] for ancestor in ancestors if ancestor in policies]
    found = [policy for key, policy in policies.items() if re.search(rf"(?:^|/)(?:{key})(?:/|\Z)", path)]
    return [jmp.get_policy(policy) for policy in (exact[:1] or found or [DEFAULT])]


NAMES = st.lists(st.sampled_from(["a", "b", "ab", "a1", ""]), min_size=1, max_size=4).map("/".join)


@given(keys=st.lists(st.one_of(NAMES, st.sampled_from(["a.", ".*", r"a\d", "a|b"])), max_size=4), path=NAMES)
@settings(max_examples=300)
def test_names_are_found_as_if_they_were_searched_for(keys, path):
    """Looking names up in a table is a faster way to do the same."""
    policies = {key: ("f32", "f16")[i % 2] for i, key in enumerate(keys)}
    expected = lookups_by_search(policies, path)
    found = strategies.result_or_error(jmp.PolicyMap(policies, DEFAULT).policy_for, path)
    assert isinstance(found, jmp.errors.InvalidPolicyError) if len(set(expected)) > 1 else found == expected[0]


SIZES = {
    "paths": lambda i: f"layer_{i}/sub_0/kernel",
    "modules": lambda i: f"layer_{i}",
    "names": lambda i: f"layer_{i}/sub_3",
    "of another model": lambda i: f"block_{i}/sub_0/kernel",
}


@pytest.mark.skipif(sys.gettrace() is not None, reason="counting lines takes as long again")
@pytest.mark.parametrize("key", SIZES.values(), ids=SIZES)
def test_three_hundred_keys_and_three_thousand_leaves_cost_a_tenth_of_a_second(key):
    """Building the map and casting once; the best of five, as machines are shared."""
    tree = {f"layer_{i}": {f"sub_{j}": {"kernel": np.ones(1, np.float32)} for j in range(10)} for i in range(300)}

    def build_and_cast():
        jmp.PolicyMap({key(i): "full" for i in range(300)}, DEFAULT).cast_to_param(tree)

    # Processor time of this thread, and not of collecting the garbage of other tests.
    assert min(timeit.repeat(build_and_cast, timer=time.thread_time, repeat=5, number=1)) < 0.1


# --- Keys that match nothing ------------------------------------------------------------------------------------------

PARAMS = {
    "decoder": {"head": {"kernel": np.ones(1, np.float32)}, "layers_0": {"norm": np.ones(1, np.float32)}},
    "encoder": {"Dense_0": {"kernel": np.ones(1, np.float32), "bias": np.ones(1, np.float32)}},
}
MISSPELT = {
    "letters swapped": ("haed", "decoder/head"),
    "a letter too few": ("decode/head", "decoder/head"),
    "a letter too many": ("heads", "decoder/head"),
    "another letter": ("decoder/haad", "decoder/head"),
    "another case": ("dense_0", "encoder/Dense_0"),
    "dots": ("decoder.haed", "decoder/head"),
    "collection": ("params/decoder/head", "decoder/head"),
    "pattern": (r"layer_\d+", "decoder/layers_0"),
    "with another number": ("layer_7", "decoder/layers_0"),
    "anything around": (".*haed", "decoder/head"),
    "names that stand elsewhere": ("encoder/head", "decoder/head"),
    "names that stand elsewhere, with a dot": ("encoder.head", "decoder/head"),
    "a leaf": ("kernal", "decoder/head/kernel"),
    "anchors": ("^decoder$", "decoder"),
    "anchor at the end": ("decoder/head$", "decoder/head"),
    "slash at the end": ("decoder/", "decoder"),
    "slash at the start": ("/decoder/head", "decoder/head"),
}


@pytest.mark.parametrize("cast", ["cast_to_param", "cast_to_compute"])
@pytest.mark.parametrize(("key", "meant"), MISSPELT.values(), ids=MISSPELT)
def test_misspelt_key_is_told_once_with_the_nearest_path(key, meant, cast):
    """The first cast of a tree with a name near it tells, at the line of the caller; no later one does."""
    policies = jmp.PolicyMap({key: "f32"}, DEFAULT)
    text = f"No path matches {key!r} (nearest: {meant!r}) of the PolicyMap. Write keys as the segments of paths are"
    with pytest.warns(jmp.errors.UnmatchedRuleWarning, match=f"^{re.escape(text)}") as caught:
        getattr(policies, cast)(PARAMS)
    assert [__file__] == [warning.filename for warning in caught]
    for again in (policies.cast_to_param, policies.cast_to_compute, policies.cast_to_output):
        again(PARAMS)
        again({"head": PARAMS["decoder"]})


BATCH = {"image": np.ones(1, np.float32), "label": np.ones(1, np.int32)}
QUIET = {
    "matches": ({"head": "f32"}, [PARAMS]),
    "no map": ({}, [PARAMS]),
    "parameters, then a batch": ({"head": "f32"}, [PARAMS, BATCH]),
    "a batch, then parameters": ({"head": "f32"}, [BATCH, np.ones(1, np.float32), PARAMS]),
    "a batch alone": ({"decoder": "f32", "heda": "f32"}, [BATCH, (), None, np.ones(1, np.float32)]),
    "one tree after the other": ({"generator": "f32", "discriminator": "f16"}, [{"generator": PARAMS}]),
    "modules alike": ({"encoder/head": "f32", "q_norm/scale": "f16"}, [{"decoder": PARAMS["decoder"]}]),
    "long paths alike": ({"block_0/sub_0/kernel": "f32"}, [{"layer_0": {"sub_0": {"kernel": np.ones(1)}}}]),
    "a name near that another key has": ({"encoder": "f32", "decoder": "f16"}, [{"encoder": PARAMS["encoder"]}]),
    "the other layers are elsewhere": ({"layers_0": "f32", "layers_7": "f16"}, [PARAMS]),
    "the other layers are elsewhere, all": ({"layers_7/norm": "f16"}, [PARAMS]),
    "found in another tree before": ({"heads": "f32"}, [{"heads": PARAMS["decoder"]}, PARAMS]),
    "a pattern within the path of a key": ({"norm": "f32", "decoder/layers_0/norm": "f16"}, [PARAMS]),
}


@pytest.mark.parametrize(("policies", "trees"), QUIET.values(), ids=QUIET)
def test_trees_that_the_keys_are_not_meant_for_are_no_reason_to_warn(policies, trees):
    """Batches, parts of models and the trees of other models pass in silence: warnings are errors here."""
    policy_map = jmp.PolicyMap(policies, DEFAULT)
    for tree in trees * 2:
        policy_map.cast_to_compute(tree)
        policy_map.cast_to_param(tree)


def test_key_that_is_found_by_a_look_up_is_not_told():
    """Whoever asks by path has used the key."""
    policies = jmp.PolicyMap({"heads": "f32"}, DEFAULT)
    policies.policy_for("model/heads/kernel")
    policies.cast_to_compute(PARAMS)


def test_many_misspelt_keys_are_one_warning():
    """Five are named, the others counted; those that match are not."""
    misspelt = "ead haed headx hea headd heads heda hed"
    policies = jmp.PolicyMap({"norm": "f32", **dict.fromkeys(misspelt.split(), "f32")}, DEFAULT)
    with pytest.warns(jmp.errors.UnmatchedRuleWarning, match=r" 'headd' \(nearest: .*\) and 3 more of") as caught:
        policies.cast_to_compute(PARAMS)
    assert len(caught) == 1


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda map_: pickle.loads(pickle.dumps(map_))])  # noqa: S301
def test_copies_tell_too(again):
    """A copy of a map that has told nothing tells; one with patterns can be copied after it was used."""
    policies = again(jmp.PolicyMap({"haed": "f32", "(?:.*norm)+": "f16"}, DEFAULT))
    with pytest.warns(jmp.errors.UnmatchedRuleWarning, match="'haed'"):
        policies.cast_to_compute(PARAMS)


@pytest.mark.parametrize(
    ("policies", "default", "text"),
    [
        ([("a", "f32")], "f32", "policies must map patterns to policies, got [('a', 'f32')]. Write {pattern: policy}."),
        ("f32", "f32", "policies must map patterns to policies, got 'f32'. Write {pattern: policy}."),
        ({3: "f32"}, "f32", "A pattern of a PolicyMap must be a string, got 3."),
        ({b"a": "f32"}, "f32", "A pattern of a PolicyMap must be a string, got b'a'."),
        (
            {"a": jmp.PolicyMap({}, "f32")},
            "f32",
            "The policy of 'a' is itself a PolicyMap. Merge the two into one.",
        ),
        ({}, jmp.PolicyMap({}, "f32"), "The policy of 'default' is itself a PolicyMap. Merge the two into one."),
        (
            {"a": None},
            "f32",
            f"A policy must be a string, a Policy or a PolicyMap, got None. {EXAMPLE}",
        ),
    ],
)
def test_map_of_something_else(policies, default, text):
    """What is not a mapping from strings to policies is refused and quoted."""
    for error in (jmp.errors.InvalidPolicyError, TypeError):
        with pytest.raises(error, match=exactly(text)):
            jmp.PolicyMap(policies, default)


@pytest.mark.parametrize(("policies", "default"), [({"a": "f61"}, "f32"), ({"a": "f32"}, "f61")])
def test_unknown_policy_in_a_map(policies, default):
    """A policy string that cannot be parsed is reported as by ``get_policy``."""
    with pytest.raises(jmp.errors.UnknownDtypeError, match=r"^Unknown dtype 'f61' in policy 'f61'\."):
        jmp.PolicyMap(policies, default)


def test_maps_are_values():
    """Maps with the same rules are equal and hash alike in any order and spelling; they pickle, copy and print."""
    first = jmp.PolicyMap({"b": "f32", r"a_\d+": "p=f32,c=f16"}, default="mixed_bfloat16")
    second = jmp.PolicyMap({r"a_\d+": jmp.get_policy("c=f16"), "b": "full"}, default="bf16-mixed")
    assert first == second
    assert hash(first) == hash(second)
    assert (
        str(first)
        == str(second)
        == r"a_\d+: p=full,c=f16,o=f16; b: p=full,c=full,o=full; default: p=full,c=bf16,o=full"
    )
    assert first == eval(repr(first), {"PolicyMap": jmp.PolicyMap})  # noqa: S307
    for again in (pickle.loads(pickle.dumps(first)), copy.deepcopy(first), copy.copy(first)):  # noqa: S301
        assert first == again
        assert hash(first) == hash(again)
        assert first.policy_for("a_1/w") == again.policy_for("a_1/w")


@pytest.mark.parametrize(
    "other",
    [
        jmp.PolicyMap({"a": "f32"}, "bf16"),
        jmp.PolicyMap({"a": "f16"}, "f32"),
        jmp.PolicyMap({"b": "f32"}, "f32"),
        jmp.PolicyMap({}, "f32"),
        jmp.get_policy("f32"),
    ],
    ids=str,
)
def test_maps_with_other_rules_are_unequal(other):
    """Patterns, policies and the default all take part in equality."""
    assert jmp.PolicyMap({"a": "f32"}, "f32") != other


def test_map_is_used_wherever_a_policy_is():
    """``get_policy`` returns a map as it is."""
    policies = jmp.PolicyMap({"a": "f32"}, DEFAULT)
    assert policies is jmp.get_policy(policies)


def test_map_keeps_no_link_to_the_dict_it_was_made_from():
    """Changing the dict later changes nothing."""
    rules = {"a": "f32"}
    policies = jmp.PolicyMap(rules, DEFAULT)
    rules["a"] = "f16"
    assert jmp.get_policy("f32") == policies.policy_for("a")


def test_text_of_a_map_is_not_taken_for_a_policy():
    """A map has no text form to parse: its printed form is refused, not misread."""
    with pytest.raises(jmp.errors.UnknownDtypeError):
        jmp.get_policy(str(jmp.PolicyMap({"a": "f32"}, DEFAULT)))


# --- Casts ------------------------------------------------------------------------------------------------------------

NETWORK = jmp.PolicyMap(
    {r"norm_\d+": "f32", "head": "p=f32,c=bf16,o=f32", "head/bias": "f16", "table": "p=f8_e5m2,c=f16,o=f32"},
    default="p=f32,c=f16,o=bf16",
)


def network(dtype=np.float32):
    """Parameters of a small network, with leaves that no cast may touch."""
    return {
        "dense": {"kernel": jnp.ones(2, dtype), "step": jnp.int32(1)},
        "norm_0": {"scale": np.ones(2, dtype)},
        "head": {"kernel": jnp.ones(2, dtype), "bias": jnp.ones(2, dtype)},
        "table": strategies.Pair(jnp.ones(2, dtype), None),
        "scale": jmp.DynamicLossScale(2.0**17),
        "key": jax.random.key(0),
    }


@pytest.mark.parametrize(
    ("cast", "expected"),
    [
        ("cast_to_param", ["float32", "float32", "float32", "float16", "float8_e5m2"]),
        ("cast_to_compute", ["float16", "float32", "bfloat16", "float16", "float16"]),
        ("cast_to_output", ["bfloat16"] * 5),
    ],
)
def test_each_leaf_is_cast_by_the_policy_of_its_path(cast, expected):
    """Parameters and computation follow the path; outputs, which have none, follow the default."""
    before = network(jnp.float32)
    after = getattr(NETWORK, cast)(before)
    leaves = [after["dense"]["kernel"], after["norm_0"]["scale"], after["head"]["kernel"], after["head"]["bias"]]
    assert expected == [leaf.dtype.name for leaf in [*leaves, after["table"].first]]
    assert before["scale"] is after["scale"]
    assert before["key"] is after["key"]
    assert before["dense"]["step"] is after["dense"]["step"]


def test_outputs_are_cast_from_every_dtype_that_the_map_names():
    """A module in float8 or float64 does not smuggle its format past ``cast_to_output``."""
    with jax.enable_x64(True):
        policies = jmp.PolicyMap({"head": "f8_e4m3fn", "solver": "f64"}, default="mixed_bfloat16")
        outputs = {
            "head": jnp.ones(2, "float8_e4m3fn"),
            "x": jnp.ones(2, "float64"),
            "e5m2": jnp.ones(2, "float8_e5m2"),
        }
        cast = policies.cast_to_output(outputs)
        assert ["float32", "float32", "float8_e5m2"] == [cast[name].dtype.name for name in outputs]
        assert outputs["e5m2"] is cast["e5m2"]


def test_with_output_dtype_changes_the_default_alone():
    """The rules stay; only what the model returns changes."""
    changed = NETWORK.with_output_dtype(jnp.float32)
    assert jmp.get_policy("p=f32,c=f16,o=f32") == changed.default
    assert NETWORK.policies == changed.policies
    assert NETWORK == changed.with_output_dtype("bf16")
    for path in ("head/kernel", "head/bias", "norm_0", "x/norm_7/scale"):
        assert NETWORK.policy_for(path) == changed.policy_for(path)


def test_paths_go_through_every_kind_of_container():
    """Dicts, lists, tuples, named tuples and dataclasses all give segments; a module may be a root."""
    policies = jmp.PolicyMap({"layers/0": "f16", "first": "bf16", "params": "f16", "1": "bf16"}, default="f32")
    tree = {"layers": [jnp.ones(1)], "pair": strategies.Pair(jnp.ones(1), jnp.ones(1)), "t": (jnp.ones(1), jnp.ones(1))}
    state = strategies.State(jnp.ones(1), None)
    cast = policies.cast_to_compute(tree)
    assert "float16" == cast["layers"][0].dtype
    assert ["bfloat16", "float32"] == [leaf.dtype.name for leaf in cast["pair"]]
    assert ["float32", "bfloat16"] == [leaf.dtype.name for leaf in cast["t"]]
    assert "float16" == policies.cast_to_compute(state).params.dtype
    assert "float32" == policies.cast_to_compute(jnp.ones(1)).dtype


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"])
def test_function_under_a_map_computes_each_module_in_its_dtype(transform):
    """Under a map each parameter arrives in the dtype of its path, and the result leaves in that of the default."""
    seen = {}

    def model(params, x):
        seen.update({name: leaf.dtype.name for name, leaf in params.items()}, x=x.dtype.name)
        hidden = x * params["dense"].astype(x.dtype)
        return hidden * params["norm"].astype(x.dtype)

    policies = jmp.PolicyMap({"norm": "f32"}, default="p=f32,c=f16,o=bf16")
    apply = transform(jmp.with_policy(model, policies))
    params = {"dense": jnp.ones(2), "norm": jnp.ones(2)}
    assert "bfloat16" == apply(params, jnp.ones(2)).dtype
    assert {"dense": "float16", "norm": "float32", "x": "float16"} == seen
    grads = jax.grad(lambda p: jnp.sum(apply(p, jnp.ones(2))))(params)
    assert {"dense": np.float32, "norm": np.float32} == jax.tree.map(lambda g: g.dtype, grads)


def test_equal_maps_share_one_compilation():
    """As a static argument a map is known by its rules."""
    traces = []

    @jax.jit
    def outer(x):
        return x

    def cast(policies, x):
        traces.append(policies)
        return policies.cast_to_compute(x)

    compiled = jax.jit(cast, static_argnums=0)
    for rules in ({"a": "f16", "b": "f32"}, {"b": "full", "a": "float16"}):
        assert "float16" == compiled(jmp.PolicyMap(rules, DEFAULT), {"a": outer(jnp.ones(1))})["a"].dtype
    assert 1 == len(traces)


def test_pattern_that_python_may_read_otherwise_one_day_is_quiet():
    """A nested bracket is a pattern today, and no reason for a warning."""
    assert jmp.PolicyMap({"[[]": "bf16"}, default="full").policy_for("[") == jmp.get_policy("bf16")
