"""Programs in mixed precision that are as they should be, at the sizes of real ones: shapes stand for arrays."""

import dataclasses
import functools
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

import jmp_lite as jmp
from jmp_lite import analysis
from support.audit_faults import BF16, F16, F32, I32, Fault, array, as_users_have_it


@dataclasses.dataclass(frozen=True)
class Clean:
    """A program and its arguments; ``policy`` if it is to run under autocast."""

    fun: Callable
    args: tuple
    policy: str | None = None
    kwargs: dict = dataclasses.field(default_factory=dict)


def audited(case):
    """What ``audit`` says about a case, with the promotion of JAX as users have it."""
    with as_users_have_it():
        if isinstance(case, Fault):
            return analysis.audit(case.fun, **case.kwargs)(*case.args)
        return analysis.audit(functools.partial(case.fun, **case.kwargs), case.policy)(*case.args)


def lines_of(findings, kind):
    return {int(re.search(r":(\d+)", finding.source)[1]) for finding in findings if finding.kind == kind}


# --- Written by hand: islands of float32 in a stream of 16 bits ---


def norm(x, scale):
    y = x.astype(F32)
    y = y - y.mean(-1, keepdims=True)
    return (y * lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


def attend(x, params, heads=8):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, params[name].astype(x.dtype)) for name in "qkv")
    scores = jnp.einsum("bthk,bshk->bhts", q, k).astype(F32) / heads**0.5
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9)).astype(x.dtype)
    return jnp.einsum("bhts,bshk,hkd->btd", weights, v, params["o"].astype(x.dtype))


def transformer_loss(params, ids, dtype):
    x = params["embed"].astype(dtype)[ids] + params["position"].astype(dtype)

    def block(x, params):
        x = x + attend(norm(x, params["scale"]), params)
        y = jax.nn.gelu(norm(x, params["scale"]) @ params["up"].astype(x.dtype))
        return x + y @ params["down"].astype(x.dtype), None

    x, _ = lax.scan(jax.checkpoint(block), x, params["blocks"])
    logits = (norm(x, params["scale"]) @ params["embed"].T.astype(dtype)).astype(F32)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()


def transformer_params(n=12, d=512, heads=8, vocabulary=1000, length=512):
    shapes = dict.fromkeys("qkv", (n, d, heads, d // heads))
    shapes |= {"o": (n, heads, d // heads, d), "up": (n, d, 4 * d), "down": (n, 4 * d, d), "scale": (n, d)}
    rest = {"embed": (vocabulary, d), "position": (length, d), "scale": (d,)}
    blocks = {name: array(F32, *shape) for name, shape in shapes.items()}
    return {"blocks": blocks, **{name: array(F32, *shape) for name, shape in rest.items()}}


def routed(params, x):
    """A mixture of experts: the router in float32, dropout, ReLU, and dense experts in bfloat16."""
    with jmp.full_precision():
        scores = x.astype(F32) @ params["router"]
    gates, which = lax.top_k(jax.nn.softmax(scores), 2)
    kept = jax.random.bernoulli(jax.random.key(0), 0.9, x.shape)
    x = jnp.where(kept, x / jnp.asarray(0.9, BF16), 0)
    y = jax.nn.relu(jnp.einsum("td,edf->tef", x, params["experts"].astype(BF16)))
    y = jnp.take_along_axis(y, which[..., None], 1) * gates[..., None].astype(BF16)
    return y.astype(F32).sum(1).mean()


def accumulated(w, xs):
    """Gradients of microbatches, added up in float32."""

    def step(total, x):
        def loss(w):
            return (jnp.tanh(x @ w.astype(BF16)).astype(F32) ** 2).mean()

        return total + jax.grad(loss)(w), None

    return lax.scan(step, jnp.zeros(w.shape, F32), xs)[0]


def reduced(w, x):
    """A loss on several devices, whose gradients are added up in float32."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(w, x):
        grads = jax.grad(lambda w: jnp.tanh(x @ w.astype(BF16)).astype(F32).mean())(w)
        return lax.pmean(grads, "d")

    return jax.shard_map(shard, mesh=mesh, in_specs=(jax.P(), jax.P("d")), out_specs=jax.P(), check_vma=False)(w, x)


def positions(x, w):
    """Rotary positions, with the angles in float32."""
    angles = jnp.arange(4096, dtype=F32)[:, None] / 10000 ** (jnp.arange(64, dtype=F32) / 64)
    y = (x @ w).astype(BF16)
    return y * jnp.cos(angles).astype(BF16) + jnp.roll(y, 1, -1) * jnp.sin(angles).astype(BF16)


def marked(x, w):
    """A matmul that is meant to be in float32, and says so."""
    x = x @ w
    with jmp.full_precision():
        return x.astype(F32) @ w.astype(F32)


# --- Flax, with its dtype= ---


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (3, 3), dtype=BF16)(x)
        for _ in range(2):
            y = nn.relu(nn.BatchNorm(use_running_average=False, dtype=BF16)(nn.Conv(64, (3, 3), dtype=BF16)(x)))
            x = x + nn.GroupNorm(8, dtype=BF16)(y)
        x = nn.max_pool(x, (2, 2))
        return nn.Dense(10, dtype=BF16)(x.astype(F32).mean((1, 2)))


def linen_loss(params, x, labels):
    logits, _ = LinenNet().apply({"params": params}, x, mutable=["batch_stats"])
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(F32), labels).mean()


def linen_params():
    with as_users_have_it():
        variables = jax.eval_shape(LinenNet().init, jax.random.key(0), array(F32, 8, 32, 32, 3))
    return variables["params"]


class NnxLayer(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(256, dtype=BF16, rngs=rngs)
        self.up, self.down = (nnx.Linear(256, 256, dtype=BF16, rngs=rngs) for _ in range(2))
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.drop(nnx.silu(self.up(self.norm(x)))))


def nnx_loss():
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: NnxLayer(nnx.Rngs(0))), nnx.Param, ...)

    def loss(params, rest, x):
        return (nnx.merge(graph, params, rest)(x).astype(F32) ** 2).mean()

    return loss, (params, rest, array(BF16, 4, 128, 256))


# --- A whole training step under autocast ---


def training_step(params, opt_state, ids):
    loss = jmp.autocast(functools.partial(transformer_loss, dtype=F32), "mixed_float16")
    loss, grads = jmp.scaled_value_and_grad(loss, loss_scale=opt_state)(params, ids)
    params, opt_state = jmp.apply_gradients(jmp.loss_scaled(optax.adamw(1e-3)), grads, opt_state, params)
    return params, opt_state, loss


def step_case():
    params = transformer_params(n=2)
    state = jax.eval_shape(jmp.loss_scaled(optax.adamw(1e-3)).init, params)
    return Clean(training_step, (params, state, array(I32, 2, 512)))


def as_loss(fun):
    """The mean square of what a model returns."""

    def loss(*args):
        leaves = [leaf for leaf in jax.tree.leaves(fun(*args)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum(jnp.mean(jnp.square(leaf.astype(F32))) for leaf in leaves)

    return loss


X, W, IDS = array(BF16, 4096, 64), array(BF16, 64, 64), array(I32, 4, 512)
EXPERTS = {"router": array(F32, 256, 8), "experts": array(F32, 8, 256, 256)}
IMAGES = (array(F32, 8, 32, 32, 3), array(I32, 8))

BY_HAND = {
    "transformer, bfloat16": Clean(transformer_loss, (transformer_params(), IDS), kwargs={"dtype": BF16}),
    "transformer, float16": Clean(transformer_loss, (transformer_params(), IDS), kwargs={"dtype": F16}),
    "experts": Clean(routed, (EXPERTS, array(BF16, 512, 256))),
    "accumulated gradients": Clean(accumulated, (array(F32, 64, 64), array(BF16, 32, 8, 64))),
    "gradients over devices": Clean(reduced, (array(F32, 64, 64), array(BF16, 64, 64))),
    "rotary positions": Clean(positions, (X, W)),
    "marked": Clean(marked, (X, W)),
    "float32": Clean(functools.partial(transformer_loss, dtype=F32), (transformer_params(), IDS)),
    "Linen ResNet, dtype=": Clean(linen_loss, (linen_params(), *IMAGES)),
    "NNX layer, dtype=": Clean(*nnx_loss()),
}


def mixed(params, x):
    """Four experts whose results a gate in float32 weighs: a matmul of a handful of terms."""
    gate = jax.nn.softmax(x @ params["router"])
    hidden = jax.nn.relu(jnp.einsum("bd,edh->beh", x, params["up"]))
    results = jnp.einsum("beh,ehd->bed", hidden, params["down"])
    return jnp.mean(jnp.square(x + jnp.einsum("be,bed->bd", gate, results)))


MIXED = {"router": array(F32, 64, 4), "up": array(F32, 4, 64, 128), "down": array(F32, 4, 128, 64)}

UNDER_AUTOCAST = {
    "mixture": Clean(mixed, (MIXED, array(F32, 256, 64))),
    "transformer": Clean(functools.partial(transformer_loss, dtype=F32), (transformer_params(), IDS)),
    "experts": Clean(lambda p, x: routed(p, x.astype(BF16)), (EXPERTS, array(F32, 512, 256))),
}
