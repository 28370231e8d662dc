"""What records of decisions hold, one by one: texts that are cut, lines, classes, tags and figures."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jmp_lite as jmp
from jmp_lite.autocast import _explain

LOW = "mixed_bfloat16"
BF16, F32 = "bfloat16", "float32"
X, W = jax.ShapeDtypeStruct((64, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)


def records(fun, *args, primitive=None, policy=LOW, **settings):
    """The records of a function, or those of one primitive."""
    found = jmp.explain(fun, policy, **settings)(*args or (X, W))
    return [record for record in found if primitive in (None, record.primitive)]


# --- Texts ---

LONG, LONGER, LONGEST = "b" * 20, "c" * 23, "d" * 60
TAILS = {
    "nothing": ("", ""),
    "one": ("a", "a"),
    "two": ("a/b", "a/b"),
    "all of 46 letters": (f"a/{LONG}/{LONGER}", f".../{LONG}/{LONGER}"),
    "of 48 letters": (f"ab/{LONG}/{LONGER}", f".../{LONG}/{LONGER}"),
    "of 49 letters": (f"ab/{LONG}/{LONGER}c", f".../{LONGER}c"),
    "longer than there is room": (f"a/{LONGEST}", f".../{LONGEST}"),
    "alone": (LONGEST, LONGEST),
    "short": (f"a/{LONG}/b", f"a/{LONG}/b"),
}
FIVE = (F32, "int8") * 5
LISTS = {
    "none": ((), ""),
    "kinds": ((F32, BF16, "uint8", "int32", "float8_e4m3fn", "bool"), "f32, bf16, u8, i32, f8_e4m3fn, bool"),
    "four": ((F32,) * 4, "f32, f32, f32, f32"),
    "five": ((F32,) * 5, "f32 x5"),
    "runs": ((F32,) * 6 + ("int32",) + (F32,) * 2, "f32 x6, i32, f32, f32"),
    "48 letters": ((*FIVE, "abc"), "f32, i8, " * 5 + "abc"),
    "49 letters": ((*FIVE, "abcd"), "f32, i8, " * 5 + "..."),
    "many": (FIVE * 4, "f32, i8, " * 5 + "..."),
}


@pytest.mark.parametrize(("path", "tail"), TAILS.values(), ids=TAILS)
def test_of_a_path_whole_names_are_left_out(path, tail):
    assert _explain._tail(path) == tail


@pytest.mark.parametrize(("dtypes", "cell"), LISTS.values(), ids=LISTS)
def test_of_dtypes_the_first_are_listed(dtypes, cell):
    assert _explain._listed(dtypes) == cell


def test_a_place_is_the_innermost_function_in_a_scope():
    [record] = records(jnp.exp, X)
    of = functools.partial(record._replace, scope="", source="a.py:1 (f.<locals>.g.<locals>.h)")
    assert _explain._where(of()) == "a.py:1 (h)"
    assert _explain._where(of(scope="x/y")) == "a.py:1 (h) in x/y"
    assert _explain._where(of(source="", scope="x")) == "x"
    assert _explain._where(of(source="")) == "somewhere"


# --- Lines ---


def left_alone(x, w):
    """Its loop and its call run as written."""
    inner = jax.jit(jnp.matmul)
    return jmp.no_autocast(lambda x, w: lax.scan(lambda c, _: (inner(c, w), c @ w), x, None, length=3))(x, w)


def test_matmuls_in_what_runs_as_written_have_their_line_or_that_of_the_call():
    """And the scope, the class of their primitive, and how often they run."""
    jnp.matmul(jnp.ones((2, 2)), jnp.ones((2, 2)))
    [loop] = records(left_alone, primitive="scan")
    found = records(left_alone, primitive="dot_general", dot=lax.dot_general)
    assert len(found) == 2
    for record in found:
        assert "test_autocast_records.py" in record.source
        assert record.scope.startswith("jmp.no_autocast")
        assert (record.op_class, record.tag, record.reason) == ("allow", loop.tag, loop.reason)
        assert (record.in_dtypes, record.out_dtypes, record.trips, record.casts) == ((F32, F32), (F32,), 3, 0)
        assert (record.group, record.flops, record.skips_dot) == ("float32", 2 * 64 * 16 * 16, True)
    assert {record.skips_dot for record in records(left_alone, primitive="dot_general")} == {False}


@jax.jit
def elsewhere(x):
    """A user's function, with lines of its own."""
    return jnp.tanh(jnp.exp(x))


def test_what_the_user_wrote_in_a_call_has_its_own_line():
    found = {record.primitive: record.source for record in records(lambda x: elsewhere(x) + 1, X)}
    assert len({found["jit"], found["exp"]}) == 2
    assert all("test_autocast_records.py" in source for source in found.values())
    assert "(elsewhere)" in found["exp"]
    assert "(elsewhere)" not in found["jit"]


def test_what_is_replaced_holds_nothing():
    twice = lambda x, w: lax.scan(lambda x, _: (x @ w, None), x, None, length=2)[0]  # noqa: E731
    op = lambda w, x, **params: [x.astype(jnp.float32)]  # noqa: E731
    assert [r.primitive for r in records(twice, ops={"scan": op})] == ["scan"]
    assert [r.primitive for r in records(twice)] == ["scan", "dot_general"]


# --- Reasons ---

LOOPS = {
    "counts": (lambda c: c[0] < 3, False),
    "looks at what it carries": (lambda c: c[1][0, 0] < 3, True),
    "looks at both": (lambda c: (c[1][0, 0] < 3) & (c[0] < 3), True),
}


@pytest.mark.parametrize(("test", "is_tested"), LOOPS.values(), ids=LOOPS)
def test_a_loop_says_that_its_condition_depends_on_floats(test, is_tested):
    loop = lambda x, w: lax.while_loop(test, lambda c: (c[0] + 1, jnp.tanh(c[1])), (0, x))  # noqa: E731
    [record] = records(loop, primitive="while")
    assert ("floats that its condition depends on" in record.reason) is is_tested
    [scan] = records(lambda x, w: lax.scan(lambda c, _: (jnp.tanh(c), None), x, None, length=2), primitive="scan")
    assert scan.reason == "holds programs, which autocast enters"


USERS = {
    "linear algebra": lambda x, w: jnp.linalg.qr(x @ w),
    "the condition of a loop": lambda x, w: lax.while_loop(lambda c: c[0, 0] < 3, lambda c: c @ w, w),
}


@pytest.mark.parametrize(("user", "fun"), USERS.items(), ids=USERS)
def test_a_matmul_says_who_needs_it_as_written(user, fun):
    """In low precision nobody does."""
    assert {r.reason for r in records(fun, primitive="dot_general")} == {f"{user} depends on it: as written"}
    lower = records(jmp.low_precision(fun), primitive="dot_general")
    assert {(r.in_dtypes, r.out_dtypes) for r in lower} == {((BF16, BF16), (BF16,))}


# --- Casts of the program ---

CONVERSIONS = {
    "float32 to 16 bits": (F32, BF16, "NEUTRAL", "a cast of the original program"),
    "16 bits to float32": (BF16, F32, "HIGH", "a cast of the original program"),
    "float32 to an integer": (F32, "int32", "NEUTRAL", "a cast of the original program"),
    "an integer to float32": ("int32", F32, "NEUTRAL", "a cast of the original program"),
    "a bool to float32": ("bool", F32, "NEUTRAL", "a cast of the original program"),
    "an integer to 16 bits": ("int32", BF16, "NEUTRAL", "a cast of the original program"),
    "16 bits to others": (BF16, "float16", "NEUTRAL", "a cast of the original program"),
    "8 bits to float32": ("float8_e4m3fn", F32, "HIGH", "a cast of the original program"),
}


@pytest.mark.parametrize(("before", "after", "tag", "reason"), CONVERSIONS.values(), ids=CONVERSIONS)
def test_only_a_narrower_float_asks_for_float32(before, after, tag, reason):
    fun = lambda x: lax.convert_element_type(x, after)  # noqa: E731
    [record] = records(fun, jax.ShapeDtypeStruct((3,), before))
    assert (record.tag, record.reason, record.in_dtypes, record.out_dtypes) == (tag, reason, (before,), (after,))


@pytest.mark.parametrize(
    ("fun", "tag"),
    [(lambda x: x, "NEUTRAL"), (jnp.exp, "HIGH")],
    ids=["an argument", "an exponential"],
)
def test_a_cast_of_float32_to_float32_keeps_what_is_known(fun, tag):
    """From a weak type to a strong one."""
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, weak_type=True)
    [record] = records(lambda x, w: jnp.tanh(fun(x).astype(jnp.float32)) @ w, x, W, primitive="convert_element_type")
    assert (record.tag, record.reason.partition(":")[0]) == (tag, "already float32 in the original program")


# --- Figures ---


def test_what_is_explained_is_a_function():
    with pytest.raises(TypeError, match="explain takes a function"):
        _explain.explained(3, None, (), {})


def test_a_record_has_no_figures_but_those_of_its_matmul():
    [record] = records(jnp.exp, X)
    assert (record.group, record.flops, record.trips, record.casts, record.skips_dot) == ("", 0, 1, 0, False)
    [record] = records(jnp.matmul, X, W)
    assert (record.group, record.flops, record.trips, record.casts) == ("low", 2 * 64 * 16 * 16, 1, 2)
    [record] = records(lambda x: x @ jnp.ones((16, 16), jnp.bfloat16).astype(F32), X, primitive="dot_general")
    assert record.casts == 2


GROUPS = {
    "bfloat16": (BF16, BF16, "low"),
    "float32": (F32, F32, "low"),
    "float16 and float32": ("float16", F32, "low"),
    "8 bits": ("float8_e4m3fn", "float8_e4m3fn", "low"),
    "integers": ("int8", "int8", "other"),
    "complex": ("complex64", "complex64", "other"),
    "an integer and float32": ("int8", F32, "other"),
}


@pytest.mark.parametrize(("lhs", "rhs", "group"), GROUPS.values(), ids=GROUPS)
def test_groups_of_matmuls_follow_their_operands(lhs, rhs, group):
    fun = lambda x, w: lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=F32)  # noqa: E731
    if "complex64" in (lhs, rhs):
        fun = jnp.matmul
    args = (jax.ShapeDtypeStruct((64, 16), lhs), jax.ShapeDtypeStruct((16, 16), rhs))
    assert [record.group for record in records(fun, *args, primitive="dot_general")] == [group]
