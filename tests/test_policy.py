"""Policies: what they are built from, what they are written as, and what text means."""
# ruff: noqa: SIM300 - the expected value comes first

import copy
import dataclasses
import functools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import strategies

import jmp_lite as jmp
from jmp_lite._messages import edits, quote
from jmp_lite._policy import ALIASES

ACCEPTED = ", ".join(["half", *(name for names in jmp.dtype_to_names.values() for name in names)])
PARTS = (
    "Write parts as 'key=dtype', separated by single commas, with the keys params (p), compute (c), output (o), "
    "reduce (r)."
)
EIGHT_BITS = (
    " Only matmuls run in 8 bits, by a recipe beside the policy: write autocast(fun, 'mixed_bfloat16', "
    "dot=jmp_lite.quant.{})."
)
POLICIES = (
    "mixed_float16, mixed_bfloat16, 16-mixed, bf16-mixed, 16-true, bf16-true, 32-true, 64-true, o0, o1, o2, o3, one "
    "dtype for everything, or 'p=...,c=...,o=...,r=...' with any of the parts."
)


def triple(param, compute, output, reduce=None):
    """The policy with these NumPy names."""
    return jmp.Policy(*map(strategies.dtype_named, (param, compute, output)), reduce_dtype=reduce)


def exactly(text):
    return f"^{re.escape(text)}$"


# --- Construction -----------------------------------------------------------------------------------------------------

SPELLINGS = {
    "float16": [np.float16, jnp.float16, np.dtype("float16"), jnp.dtype("float16"), "f16", " FP16 ", np.dtype(">f2")],
    "bfloat16": [jnp.bfloat16, jnp.dtype("bfloat16"), np.dtype(jnp.bfloat16), "bf16", "bfloat16"],
    "float32": [np.float32, jnp.float32, np.dtype("float32"), np.dtype("<f4"), np.dtype(">f4"), "full", "float32"],
    "float64": [np.float64, jnp.float64, float, np.dtype("d"), "f64", "fp64"],
    "float8_e4m3fn": [jnp.float8_e4m3fn, jnp.dtype("float8_e4m3fn"), "e4m3", "f8_e4m3fn"],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_a_dtype_gives_one_policy(name):
    """Policies are equal, hash alike, print alike and hold ``np.dtype``, however their dtypes were given."""
    policies = [jmp.Policy(s, s, s, reduce_dtype=s) for s in SPELLINGS[name]]
    assert 1 == len(set(policies)) == len(set(map(str, policies))) == len(set(map(hash, policies)))
    assert all(policy == policies[0] for policy in policies)
    for field in dataclasses.fields(jmp.Policy):
        value = getattr(policies[-1], field.name)
        assert isinstance(value, np.dtype)
        assert name == value == strategies.dtype_named(name)


def test_policies_that_differ_in_one_field_are_unequal():
    """Every field takes part in equality."""
    policies = [triple(*fields) for fields in [("float32",) * 3, ("float16", *["float32"] * 2)]]
    policies += [triple("float32", "float16", "float32"), triple("float32", "float32", "float16")]
    policies += [triple("float32", "float32", "float32", "float16"), triple(*["float32"] * 4)]
    assert len(policies) == len(set(policies)) == len(set(map(str, policies)))
    assert all((first == second) == (first is second) for first in policies for second in policies)
    assert "float32" != policies[0]


def test_policy_is_frozen():
    """A policy cannot be changed, only replaced."""
    policy = jmp.get_policy("mixed_float16")
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.compute_dtype = np.dtype("float32")
    assert jmp.get_policy("float32") == dataclasses.replace(policy, compute_dtype="f32")


FIELDS = ("param_dtype", "compute_dtype", "output_dtype", "reduce_dtype")


def policy_with(field, value):
    """The float32 policy with one field of it given."""
    return jmp.Policy(**{**dict.fromkeys(FIELDS, np.float32), field: value})


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("value", "described"),
    [
        (jnp.int32, "int32"),
        (np.int8, "int8"),
        (np.uint8, "uint8"),
        (int, "int64"),
        (bool, "bool"),
        (jnp.complex64, "complex64"),
        (jax.dtypes.float0, "[('float0', 'V')]"),
        (np.dtype([("a", "f4")]), "[('a', '<f4')]"),
        (np.longdouble, np.dtype(np.longdouble).name),
        (jnp.float8_e8m0fnu, "float8_e8m0fnu"),
        (str, "<U0"),
        (object, repr(object)),
        (jnp.floating, repr(jnp.floating)),
        (3.0, "3.0"),
        (np.ones(2, np.float32), "float32[2]"),
        (np.float32(1), "np.float32(1.0)"),
        (b"f32", "b'f32'"),
        (jax.ShapeDtypeStruct, repr(jax.ShapeDtypeStruct)),
        ([], "[]"),
    ],
    ids=repr,
)
def test_dtype_that_is_not_floating_is_refused(field, value, described):
    """What is not a floating format of JAX is refused at construction, by field, with the accepted names."""
    recipe = EIGHT_BITS.format("INT8_TRAIN") if described == "int8" else ""
    text = f"{field} must be a floating-point dtype, got {described}.{recipe} Accepted names: {ACCEPTED}."
    for error in (jmp.errors.InvalidPolicyError, TypeError):
        with pytest.raises(error, match=exactly(text)):
            policy_with(field, value)


def test_dtype_of_keys_and_jax_arrays_are_refused():
    """Values that need JAX to be made are refused like any other."""
    key = jax.random.key(0)
    for value, described in [(key.dtype, "key<fry>"), (jnp.ones(1), "float32[1]")]:
        with pytest.raises(
            jmp.errors.InvalidPolicyError, match=f"^compute_dtype must be .* got {re.escape(described)}"
        ):
            policy_with("compute_dtype", value)


@pytest.mark.parametrize("field", FIELDS[:3])
def test_none_is_refused(field):
    """``None``, which NumPy takes for float64, stands for a default in ``reduce_dtype`` only."""
    with pytest.raises(jmp.errors.InvalidPolicyError, match=f"^{field} must be a floating-point dtype, got None"):
        policy_with(field, None)
    assert policy_with("reduce_dtype", None).reduce_dtype is None


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("value", "advice"),
    [
        ("abc", ""),
        ("", ""),
        ("int8", EIGHT_BITS.format("INT8_TRAIN")),
        ("f", ""),
        ("p=f32", " Did you mean 'f32'?"),
        ("FLAOT16", " Did you mean 'float16'?"),
    ],
)
def test_unknown_name_in_a_field_is_quoted(field, value, advice):
    """A name that is not a format is quoted with its field; what it may stand for comes before the list."""
    text = f"Unknown dtype {value!r} for {field}.{advice} Accepted: {ACCEPTED}."
    with pytest.raises(jmp.errors.UnknownDtypeError, match=exactly(text)):
        policy_with(field, value)


@given(first=strategies.policies(), dtype=st.sampled_from(strategies.FORMATS))
def test_with_output_dtype_changes_nothing_else(first, dtype):
    """Only the output dtype differs, and setting it back gives the first policy."""
    dtype = strategies.dtype_named(dtype)
    second = first.with_output_dtype(dtype)
    assert dtype == second.output_dtype
    assert first == second.with_output_dtype(first.output_dtype)
    assert (first.param_dtype, first.compute_dtype, first.reduce_dtype) == (
        second.param_dtype,
        second.compute_dtype,
        second.reduce_dtype,
    )


def test_policy_for_any_path_is_the_policy():
    """A single policy answers for every module."""
    policy = jmp.get_policy("mixed_float16")
    assert all(policy is policy.policy_for(path) for path in ("", "a", "a/b/kernel"))


# --- Text -------------------------------------------------------------------------------------------------------------

F16, BF16, F32, F64 = "float16", "bfloat16", "float32", "float64"
TEXTS = {
    "mixed_float16": (F32, F16, F32),
    "mixed_bfloat16": (F32, BF16, F32),
    "16-mixed": (F32, F16, F32),
    "bf16-mixed": (F32, BF16, F32),
    "16-true": (F16,) * 3,
    "bf16-true": (BF16,) * 3,
    "32-true": (F32,) * 3,
    "64-true": (F64,) * 3,
    "O0": (F32,) * 3,
    "O1": (F32, F16, F32),
    "O2": (F32, F16, F32),
    "O3": (F16,) * 3,
    "fp16": (F16,) * 3,
    "bf16": (BF16,) * 3,
    "fp32": (F32,) * 3,
    "full": (F32,) * 3,
    "half": (F16,) * 3,
    "p=f16": (F16,) * 3,
    "c=f16": (F32, F16, F16),
    "o=f16": (F32, F32, F16),
    "r=bf16": (F32, F32, F32, BF16),
    "p=f16,c=bf16": (F16, BF16, BF16),
    "p=f16,c=bf16,o=full": (F16, BF16, F32),
    "c=half,o=full": (F32, F16, F32),
    "o=f32,c=f16,p=bf16": (BF16, F16, F32),
    "params=float32,compute=bfloat16,output=float32": (F32, BF16, F32),
    "param=float32,compute=bfloat16,output=float32,reduce=float16": (F32, BF16, F32, F16),
    "p=f32,c=bf16,o=f32,r=f32": (F32, BF16, F32, F32),
    "p=f32,c=e4m3,o=bf16": (F32, "float8_e4m3fn", BF16),
    "c=float8_e5m2fnuz": (F32, "float8_e5m2fnuz", "float8_e5m2fnuz"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_stands_for_a_policy(text):
    """Every alias and every form of the grammar, whatever its case and white space."""
    expected = triple(*TEXTS[text])
    spaced = text.replace("=", " = ").replace(",", " ,\t")
    for spelling in (text, text.upper(), text.title(), f"  {text}\n", spaced, spaced.upper()):
        assert expected == jmp.get_policy(spelling)


@pytest.mark.parametrize("name", jmp.name_to_dtype)
def test_every_format_name_is_a_policy(name):
    """A lone format stands for all three dtypes."""
    dtype = np.dtype(jmp.name_to_dtype[name])
    assert jmp.Policy(dtype, dtype, dtype) == jmp.get_policy(name)


@pytest.mark.parametrize(
    ("expected", "policy"),
    [
        ("p=full,c=f16,o=full", triple(F32, F16, F32)),
        ("p=bf16,c=bf16,o=bf16", triple(BF16, BF16, BF16)),
        ("p=f64,c=full,o=f64,r=bf16", triple(F64, F32, F64, BF16)),
        ("p=full,c=f8_e4m3fn,o=f16,r=f8_e5m2", triple(F32, "float8_e4m3fn", F16, "f8_e5m2")),
        ("p=full,c=float4_e2m1fn,o=full", triple(F32, "float4_e2m1fn", F32)),
    ],
)
def test_policy_is_written_as_in_jmp(expected, policy):
    """``str`` is jmp's format, with ``r=`` only where it was given."""
    assert expected == str(policy) == f"{policy}"


@given(strategies.policies())
def test_text_of_a_policy_gives_it_back(policy):
    """``str``, pickle and copies of any policy lose nothing."""
    assert policy == jmp.get_policy(str(policy))
    assert str(policy) == str(jmp.get_policy(str(policy)))
    for again in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy), copy.copy(policy)):  # noqa: S301
        assert policy == again
        assert hash(policy) == hash(again)


@example("p=f32,")
@example("p=half,c=half,o=half,r=half")
@example("=")
@example("\ud800")
@example("p=\x00")
@settings(max_examples=300)
@given(strategies.policy_strings())
def test_any_text_is_a_policy_or_a_clean_error(text):
    """Text gives a policy whose text gives it back, or an error that quotes the text and helps."""
    result = strategies.result_or_error(jmp.get_policy, text)
    if isinstance(result, jmp.Policy):
        assert result == jmp.get_policy(str(result))
    else:
        assert isinstance(result, ValueError)
        assert quote(text) in str(result)
        assert any(advice in str(result) for advice in (ACCEPTED, PARTS, "Keep one of them."))


ERRORS = {
    "f": f"Unknown dtype 'f' in policy 'f'. Accepted dtypes: {ACCEPTED}; accepted policies: {POLICIES}",
    "": f"Unknown dtype '' in policy ''. Accepted dtypes: {ACCEPTED}; accepted policies: {POLICIES}",
    " Int8 ": (
        f"Unknown dtype 'Int8' in policy ' Int8 '.{EIGHT_BITS.format('INT8_TRAIN')} Accepted dtypes: {ACCEPTED}; "
        f"accepted policies: {POLICIES}"
    ),
    "p=f32,c= float": (
        "Unknown dtype 'float' in policy 'p=f32,c= float'. Did you mean 'float16'? Accepted dtypes: "
        f"{ACCEPTED}; accepted policies: {POLICIES}"
    ),
    "p=": f"Unknown dtype '' in policy 'p='. Accepted dtypes: {ACCEPTED}; accepted policies: {POLICIES}",
    "c=mixed_float16": (
        "Unknown dtype 'mixed_float16' in policy 'c=mixed_float16'. That is a whole policy: write it alone. Accepted "
        f"dtypes: {ACCEPTED}; accepted policies: {POLICIES}"
    ),
    "conpute=f16": (
        f"Unknown key 'conpute' in part 'conpute=f16' of policy 'conpute=f16'. Did you mean 'compute'? {PARTS}"
    ),
    "p=f32, X =f16": f"Unknown key 'X' in part 'X =f16' of policy 'p=f32, X =f16'. {PARTS}",
    "=f32": f"Unknown key '' in part '=f32' of policy '=f32'. {PARTS}",
    "c=f16=f32": f"Part 'c=f16=f32' of policy 'c=f16=f32' is not 'key=dtype'. {PARTS}",
    "p=f32,c=f16,": f"Part '' of policy 'p=f32,c=f16,' is not 'key=dtype'. {PARTS}",
    "p=f32,c": f"Part 'c' of policy 'p=f32,c' is not 'key=dtype'. {PARTS}",
    "p=f32;c=f16": f"Part 'p=f32;c=f16' of policy 'p=f32;c=f16' is not 'key=dtype'. {PARTS}",
    "p=f32,c=f16,c=bf16": "Key 'c' is given twice in policy 'p=f32,c=f16,c=bf16'. Keep one of them.",
    "c=f16, Compute=f16": "Key 'Compute' is given twice in policy 'c=f16, Compute=f16'. Keep one of them.",
}


@pytest.mark.parametrize("text", ERRORS)
def test_text_that_is_no_policy(text):
    """The message quotes the text, names the bad part and lists what is accepted."""
    for error in (jmp.errors.UnknownDtypeError, ValueError):
        with pytest.raises(error, match=exactly(ERRORS[text])):
            jmp.get_policy(text)


ADVICE = {
    # Policies with a typing error, a separator of another system, or parts in another order.
    "mixed_bflaot16": "Did you mean the policy 'mixed_bfloat16'?",
    "mixed_flot16": "Did you mean the policy 'mixed_float16'?",
    "MIXED-BFLOAT16": "Did you mean the policy 'mixed_bfloat16'?",
    "mixed-bf16": "Did you mean the policy 'mixed_bfloat16'?",
    "bfloat16-mixed": "Did you mean the policy 'bf16-mixed'?",
    "16_mixed": "Did you mean the policy '16-mixed'?",
    "O4": "Did you mean the policy 'o0'?",
    # Dtypes.
    "bf61": "Did you mean 'bf16'?",
    "flaot16": "Did you mean 'float16'?",
    "c=float61": "Did you mean 'float16'?",
    "c=bflot16": "Did you mean 'bfloat16'?",
    "c=mixed_bfloat16": "That is a whole policy: write it alone.",
    # Formats of 8 bits.
    **dict.fromkeys(
        ["fp8", "FP8", "f8", "float8", "mixed_float8", "mixed_fp8", "fp8-mixed", "8-mixed", "8bit", "8-bit", "c=fp8"],
        EIGHT_BITS.format("FP8").strip(),
    ),
    **dict.fromkeys(
        ["int8", "i8", "uint8", "mixed_int8", "int8-mixed", "c=int8", "p=f32,c=int8,o=f32", "w8a8"],
        EIGHT_BITS.format("INT8_TRAIN").strip(),
    ),
    "c=f8_e4m3": f"Did you mean 'f8_e4m3fn'?{EIGHT_BITS.format('FP8')}",
    # Nothing comes near.
    "nonsense": "",
    "tensor cores": "",
    "x" * 10_000: "",
}


@pytest.mark.parametrize("text", ADVICE, ids=lambda text: text[:20])
def test_advice_comes_before_the_list(text):
    """The nearest name and the way to 8 bits stand right after what was wrong; a long input is cut."""
    with pytest.raises(jmp.errors.UnknownDtypeError, match=r"^Unknown dtype '") as caught:
        jmp.get_policy(text)
    problem, _, accepted = str(caught.value).partition(" Accepted dtypes: ")
    first, _, advice = problem.partition(f"in policy {quote(text)}.")
    assert ADVICE[text] == advice.strip()
    assert ACCEPTED in accepted
    assert len(first) < 250


@pytest.mark.parametrize("alias", [*ALIASES, *jmp.name_to_dtype])
def test_name_with_a_swap_is_recognized(alias):
    """Two letters swapped in any name of at least four characters: the name is offered, or the text means another."""
    if len(alias) < 4:
        return
    swapped = alias[:-3] + alias[-2] + alias[-3] + alias[-1]
    result = strategies.result_or_error(jmp.get_policy, swapped)
    assert isinstance(result, jmp.Policy) or "Did you mean" in str(result)


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("", "", 0),
        ("a", "", 1),
        ("head", "head", 0),
        ("haed", "head", 1),
        ("hed", "head", 1),
        ("hzad", "head", 1),
        ("ab", "ba", 1),
        ("abc", "cab", 2),
        ("kitten", "sitting", 3),
        ("abcdef", "uvwxyz", 5),
        ("a" * 50, "b", 5),
    ],
)
def test_edits(first, second, distance):
    """Insertions, deletions, replacements and swaps count one each, in both directions, up to the limit of 4."""
    assert distance == edits(first, second, 4) == edits(second, first, 4)


@given(st.text("ab1", max_size=6), st.text("ab1", max_size=6), st.text("ab1", max_size=6))
def test_edits_are_a_measure(first, second, third):
    """Only equal texts are zero edits apart; a letter more or less at the end is at most one edit more."""
    distance = edits(first, second, 20)
    assert (distance == 0) == (first == second)
    assert abs(len(first) - len(second)) <= distance <= max(len(first), len(second))
    assert distance == edits(first + third, second + third, 20)


@pytest.mark.parametrize(
    "spec", [None, 3, jnp.float16, np.dtype("float16"), b"bf16", ["bf16"], {"a": "full"}], ids=repr
)
def test_what_is_neither_text_nor_policy(spec):
    """Anything else is quoted and refused."""
    text = f"A policy must be a string, a Policy or a PolicyMap, got {spec!r}. "
    example = "PolicyMap({...}, default='full')" if isinstance(spec, dict) else "get_policy('mixed_bfloat16')"
    text += f"Write for example {example}."
    for error in (jmp.errors.InvalidPolicyError, TypeError):
        with pytest.raises(error, match=exactly(text)):
            jmp.get_policy(spec)
        with pytest.raises(error, match=exactly(text)):
            jmp.with_policy(jnp.sin, spec)


def test_policy_as_static_argument():
    """Equal policies, however they were built, share one compilation."""
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def cast(policy, x):
        traces.append(policy)
        return policy.cast_to_compute(x)

    for policy in ("c=f16", "p=f32,c=float16", triple(F32, F16, F16)):
        assert np.float16 == cast(jmp.get_policy(policy), jnp.ones(2)).dtype
    assert 1 == len(traces)


# --- Defects of jmp and mpx -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [np.dtype("float32"), "float32", jnp.float32, np.float32], ids=repr)
def test_jmp_policy_str_of_np_dtype(spelling):
    """Defect 9 of jmp: a policy of ``np.dtype`` or names can be written."""
    assert "p=full,c=full,o=full" == str(jmp.Policy(spelling, spelling, spelling))


def test_jmp_policy_of_anything():
    """Defect 9 of jmp: ``Policy(jnp.int32, 'abc', None)`` does not get past its construction."""
    with pytest.raises(
        jmp.errors.InvalidPolicyError, match=r"^param_dtype must be a floating-point dtype, got int32\."
    ):
        jmp.Policy(jnp.int32, "abc", None)


def test_jmp_get_policy_of_a_policy():
    """Defect 9 of jmp: a policy is returned as it is."""
    policy = jmp.get_policy("mixed_float16")
    assert policy is jmp.get_policy(policy)


@pytest.mark.parametrize("text", ["p=f32, c=f16", "P=f32,C=F16", " p = f32 ,c=f16 "])
def test_jmp_get_policy_with_spaces_and_upper_case(text):
    """Defect 9 of jmp: spaces and case are forgiven."""
    assert triple(F32, F16, F16) == jmp.get_policy(text)


@pytest.mark.parametrize("text", ["p=f32,c=f16,", "c=f16=f32"])
def test_jmp_get_policy_raw_unpacking_error(text):
    """Defect 9 of jmp: a stray comma or equals sign is explained."""
    with pytest.raises(jmp.errors.UnknownDtypeError, match=re.escape(f"{text!r} is not 'key=dtype'")):
        jmp.get_policy(text)


def test_jmp_get_policy_error_names_only_what_works():
    """Defect 9 of jmp: every name that the error text lists is accepted."""
    with pytest.raises(jmp.errors.UnknownDtypeError) as caught:
        jmp.get_policy("float")
    dtypes, aliases = re.search(r"dtypes: (.*); accepted policies: (.*), one dtype", str(caught.value)).groups()
    assert all(isinstance(jmp.get_policy(name), jmp.Policy) for name in f"{dtypes}, {aliases}".split(", "))


def test_jmp_get_policy_last_key_wins():
    """Defect 9 of jmp: a key given twice is an error."""
    with pytest.raises(jmp.errors.UnknownDtypeError, match=r"^Key 'c' is given twice in policy 'c=f32,c=f16'\."):
        jmp.get_policy("c=f32,c=f16")


@pytest.mark.parametrize("name", ["fp16", "fp32", "mixed_float16", "f8_e4m3fn", "e5m2"])
def test_jmp_get_policy_missing_names(name):
    """Defect 9 of jmp: the names that users know, and float8, are there."""
    assert isinstance(jmp.get_policy(name), jmp.Policy)


def test_jmp_policy_is_a_leaf():
    """Defect 10 of jmp: a policy is one leaf of a tree and an argument of ``jit`` only as a static one."""
    assert [jmp.get_policy("bf16")] == jax.tree.leaves(jmp.get_policy("bf16"))
    with pytest.raises(TypeError, match="Policy"):
        jax.jit(lambda policy: policy.param_dtype.itemsize)(jmp.get_policy("bf16"))
