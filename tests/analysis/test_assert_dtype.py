"""``assert_compute_dtype``: fails with the line, the shapes and the share of what is wider than said."""

import jax
import jax.numpy as jnp
import pytest
from support.audit_faults import BF16, F32, FAULTS, array, as_users_have_it

import jmp_lite as jmp
from jmp_lite import analysis

X, W = array(F32, 32, 16), array(F32, 16, 16)


def model(w, x):
    with jax.named_scope("body"):
        x = jnp.tanh(x @ w)
    with jax.named_scope("head"), jmp.full_precision():
        return x @ w


def test_wide_products_are_told_with_all_that_is_known():
    """One line for each: scope, primitive, source, dtypes and shapes, share, and where float32 comes from."""
    with pytest.raises(jmp.errors.ComputeDtypeError) as caught:
        analysis.assert_compute_dtype(model, BF16, policy="mixed_bfloat16")(W, X)
    first, line, last = str(caught.value).splitlines()
    assert first == "1 of 2 matmuls and kernels has operands wider than bfloat16:"
    start, _, rest = line.partition(": float32[32,16], float32[16,16], 50.0% of FLOPs, because ")
    assert start.startswith("  head/jmp.full_precision dot_general ")
    assert "test_assert_dtype.py:" in start
    assert rest.startswith("bfloat16 is cast or promoted to float32 at ")
    assert last.startswith("Cast there")


@pytest.mark.parametrize("allow", ["head", ["^head/"], [r"test_assert_dtype\.py"], ["dot_general"]])
def test_allowed_products_pass(allow):
    analysis.assert_compute_dtype(model, "bf16", allow=allow, policy="mixed_bfloat16")(W, X)


@pytest.mark.parametrize(
    ("dtype", "policy", "wide"),
    [("f32", None, 0), ("bf16", None, 2), ("bf16", "mixed_bfloat16", 1), ("f16", "mixed_float16", 1), ("f64", None, 0)],
)
def test_what_is_wide_depends_on_the_dtype(dtype, policy, wide):
    check = analysis.assert_compute_dtype(model, dtype, policy=policy)
    if not wide:
        check(W, X)
        return
    with pytest.raises(jmp.errors.ComputeDtypeError, match=f"^{wide} of 2 matmuls"):
        check(W, X)


def test_a_loss_is_checked_with_its_gradient():
    """A matmul may be narrow forward and wide backward."""
    fault = FAULTS["cotangents"]
    with as_users_have_it(), pytest.raises(jmp.errors.ComputeDtypeError, match=r"^1 of 2 .*\n.*float32\[") as caught:
        analysis.assert_compute_dtype(fault.fun, BF16)(*fault.args)
    assert f":{fault.line}:" in str(caught.value)


def test_kernels_count():
    fault = FAULTS["kernel"]
    with as_users_have_it(), pytest.raises(jmp.errors.ComputeDtypeError, match="pallas_call"):
        analysis.assert_compute_dtype(fault.fun, BF16)(*fault.args)


def test_many_lines_are_cut():
    def deep(x, w):
        for _ in range(15):
            x = x @ w
        return x

    with pytest.raises(jmp.errors.ComputeDtypeError) as caught:
        analysis.assert_compute_dtype(deep, BF16)(X, W)
    assert str(caught.value).splitlines()[-2] == "  and 5 more"


def test_pattern_that_allows_nothing_warns():
    """A typing error in a pattern is not silent, nor is one that is no longer needed."""
    with pytest.warns(jmp.errors.UnmatchedRuleWarning, match=r"allow='haed' allows nothing.*head"):
        analysis.assert_compute_dtype(model, "bf16", allow=["haed", "head"], policy="mixed_bfloat16")(W, X)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"dtype": "bflaot16"}, jmp.errors.InvalidRuleError, "'bflaot16'"),
        ({"dtype": None}, jmp.errors.InvalidRuleError, "None"),
        ({"dtype": jnp.int8}, jmp.errors.InvalidRuleError, "int8"),
        ({"dtype": BF16, "allow": ["["]}, jmp.errors.InvalidPatternError, r"'\['"),
        ({"dtype": BF16, "policy": "mixed_bfloat"}, jmp.errors.UnknownDtypeError, "mixed_bfloat"),
    ],
)
def test_mistakes_are_refused_at_once(arguments, error, said):
    with pytest.raises(error, match=said):
        analysis.assert_compute_dtype(model, **arguments)
