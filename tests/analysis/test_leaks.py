"""A float32 matmul is told from its dtypes and its data, not from the line that it shares with others."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from support.audit_clean import as_users_have_it
from support.audit_faults import BF16, F32, array

from jmp_lite import analysis

W, X = array(F32, 64, 64), array(F32, 32, 64)


def dense(x, w):
    return x @ w


def on_one_line(p, x):
    """A matmul of three terms, which follows its operands, and a leak, on one line."""
    handful, w = p
    y = x.astype(BF16) @ w.astype(BF16)
    return (y.astype(F32)[:, :3] @ handful).sum() + (y.astype(F32) @ w).sum()  # leak


def in_a_helper(p, x):
    """All matmuls are on the line of a helper."""
    handful, w = p
    y = dense(x.astype(BF16), w.astype(BF16))
    y = jnp.tanh(dense(y.astype(F32), w))  # leak
    return dense(y.astype(BF16), w.astype(BF16)).astype(F32).sum() + handful.sum()


def recomputed(p, x):
    """The same in a scan with recomputation."""
    handful, w = p

    def layer(x, _):
        return jnp.tanh(dense(x.astype(F32), w).astype(BF16)), None  # leak

    x = dense(x.astype(BF16), w.astype(BF16))
    x, _ = jax.lax.scan(jax.checkpoint(layer), x, None, length=3)
    return x.astype(F32).sum() + handful.sum()


def line_of(fun):
    lines, first = inspect.getsourcelines(fun)
    return first + next(i for i, line in enumerate(lines) if line.rstrip().endswith("# leak"))


@pytest.mark.parametrize("fun", [on_one_line, in_a_helper, recomputed])
def test_leak_and_its_gradients_are_one_finding(fun):
    with as_users_have_it():
        found = analysis.audit(fun)((array(F32, 3, 5), W), X)
    [leak] = [f for f in found.findings if f.severity != "note"]
    assert leak.kind == "float32-leak"
    assert leak.share == pytest.approx(sum(r.flop_share for r in found.matmuls if "float32" in r.operands), abs=0.03)
    assert f":{line_of(fun)}:" in leak.source


def adapter(p, x):
    """A matmul of rank 4 follows its operands, and so do its gradients, which sum more terms."""
    return jnp.mean(jnp.square(x @ p[0] @ p[1]))


def mixture(w, x):
    """A mixture of three softmaxes."""
    weights = jax.nn.softmax(x @ w[:, :3])
    likelihoods = jax.nn.softmax(jnp.stack([x @ w, x @ w * 0.5, x @ w * 0.2], 1))
    return -jnp.log(jnp.einsum("bk,bkc->bc", weights, likelihoods)).mean()


@pytest.mark.parametrize(
    ("fun", "args"),
    [(adapter, ([array(F32, 64, 4), array(F32, 4, 64)], array(F32, 4, 32, 64))), (mixture, (W, X))],
    ids=["adapter", "mixture"],
)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_gradients_of_a_handful_of_terms_are_no_leak(fun, args, policy):
    assert analysis.audit(fun, policy)(*args).findings == ()
