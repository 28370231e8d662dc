"""Programs with one mistake each, on the line that ends in ``# fault``, and what ``audit`` is to call it."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental import pallas as pl

import jmp_lite as jmp

BF16, F16, F32, I32 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32


@contextlib.contextmanager
def as_users_have_it():
    """The promotion of dtypes and shapes that JAX has by default."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A program, its arguments, and the kind of finding that it is worth."""

    kind: str
    fun: Callable
    args: tuple
    where: object = None
    """The function or class that holds the line, if it is not ``fun``."""
    kwargs: dict = dataclasses.field(default_factory=dict)

    @property
    def line(self):
        """Number of the line that ends in ``# fault``."""
        lines, first = inspect.getsourcelines(self.where or self.fun)
        [number] = [first + i for i, line in enumerate(lines) if line.rstrip().endswith("# fault")]
        return number


# --- Numbers ---


def large_factor(x):
    y = x + 1
    return y * 1e5  # fault


def large_mask(scores, mask):
    masked = jnp.where(mask, scores, -1e9)  # fault
    return jax.nn.softmax(masked.astype(F32))


def large_additive_mask(scores, mask):
    return scores + (1 - mask) * -1e9  # fault


def zero_epsilon(x):
    return x * lax.rsqrt(x + 1e-8)  # fault


def zero_floor(x, norm):
    norm = jnp.maximum(norm, 1e-12)  # fault
    return x / norm


def subnormal_epsilon(x, norm):
    return x / (norm + 1e-7)  # fault


def bound_of_one(p):
    p = jnp.clip(p, 1e-3, 0.999)  # fault
    return jnp.log(p) + jnp.log(1 - p)


def bound_of_one_in_log1p(p):
    p = jnp.minimum(p, 0.9999)  # fault
    return jnp.log1p(-p)


def positions(x):
    steps = jnp.arange(1000, dtype=BF16)  # fault
    return x * steps[:, None]


def counted(x, ids):
    which = jnp.argmax(ids, axis=-1)
    return x + which.astype(F16)  # fault


def looked_up(ids, table):
    hot = jax.nn.one_hot(ids, 300, dtype=BF16)
    return hot @ table  # fault


# --- Sums ---


def softmax(x):
    return jax.nn.softmax(x)  # fault


def log_sum_exp(x):
    top = x.max(-1, keepdims=True)
    e = jnp.exp(x - top)  # fault
    return jnp.log(e.sum(-1)) + top[..., 0]


def raw_mean(x):
    return lax.reduce_sum(x, [1]) / x.shape[1]  # fault


def length_of(x):
    squares = x * x  # fault
    return jnp.sqrt(squares.sum(-1))


def variance(x):
    mean = x.mean(-1)
    return jnp.square(x).mean(-1) - mean**2  # fault


def variance_of_narrow(x):
    x = x.astype(F32)
    return jnp.square(x).mean(-1) - jnp.square(x.mean(-1))  # fault


def carried_sum(x):
    def step(total, row):
        return total + row, None  # fault

    return lax.scan(step, jnp.zeros(x.shape[1:], x.dtype), x)[0]


def segments(x, ids):
    return jax.ops.segment_sum(x, ids, num_segments=4)  # fault


def running(x):
    return jnp.cumsum(x, axis=0)  # fault


def router(x, w):
    scores = x @ w  # fault
    return lax.top_k(scores, 2)


def choice(x, w):
    logits = x @ w + 1  # fault
    return jnp.argmax(logits, axis=-1)


def rounded_logits(x, w):
    logits = x @ w  # fault
    return jax.nn.softmax(logits.astype(F32), axis=-1)


# --- Dtypes ---


def constant_promotes(x, w):
    x = x @ w
    x = x * np.full(16, 0.5, np.float32)  # fault
    x = jnp.tanh(x)
    return x @ w


def uncast_weight(x, w, head):
    x = jax.nn.relu(x @ w)
    return x @ head  # fault


def island_without_a_way_back(x, w):
    def norm(x):
        x = x.astype(F32)  # fault
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

    y = x @ w
    return norm(y) @ w


def leak_in_scan(x, w):
    def layer(h, w):
        y = (h @ w) * jnp.ones(16, F32)  # fault
        return (y @ w.T).astype(BF16), None

    return lax.scan(layer, x, w)[0]


def accumulated_and_kept(x, w):
    x = lax.dot(x, w, preferred_element_type=F32)  # fault
    return jnp.tanh(x) @ w


def cotangents(w, x):
    scores = lax.dot(x, w.astype(BF16), preferred_element_type=F32)  # fault
    return jax.nn.log_softmax(scores)[:, 0].mean()


def kernel(x, w):
    def double(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2

    y = (x @ w).astype(F32)
    return pl.pallas_call(double, out_shape=array(F32, 8, 16))(y)  # fault


def gathered(x, w):
    def shard(x, w):
        whole = lax.all_gather(w, "d", tiled=True)  # fault
        return x @ whole.astype(BF16)

    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(shard, mesh=mesh, in_specs=(jax.P(), jax.P("d")), out_specs=jax.P(), check_vma=False)(x, w)


def reduced_gradients(w, x):
    def shard(w, x):
        grads = jax.grad(lambda w: (x @ w.astype(BF16)).sum().astype(F32))(w)
        return lax.psum(grads, "d")  # fault

    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(shard, mesh=mesh, in_specs=(jax.P(), jax.P("d")), out_specs=jax.P(), check_vma=False)(w, x)


def gradient_of_bias(params, x):
    w, b = params
    return ((x @ w) + b).astype(F32).mean()  # fault


def highest(x, w):
    x = x @ w
    return jnp.dot(x, w, precision="highest")  # fault


# --- Models ---


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, dtype=BF16, use_bias=False)(x)
        x = x * self.param("scale", nn.initializers.ones, (16,))  # fault
        return x @ self.param("head", nn.initializers.ones, (16, 4))


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(16, dtype=BF16, name=name)(x) for name in "qkv")
        weights = jax.nn.softmax(q @ k.T)  # fault
        return weights @ v


class LinenRouter(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("router", nn.initializers.ones, (16, 4))
        scores = x.astype(BF16) @ w.astype(BF16)  # fault
        return lax.top_k(jax.nn.softmax(scores.astype(F32)), 2)


class NnxNorm(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(16, 16, dtype=BF16, rngs=nnx.Rngs(0))

    def __call__(self, x):
        x = self.linear(x)
        variance = jnp.mean(x * x, -1) - jnp.mean(x, -1) ** 2  # fault
        return x * lax.rsqrt(variance + 1e-2)[:, None]


class NnxMemory(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(16, 16, dtype=BF16, rngs=nnx.Rngs(0))
        self.table = nnx.Variable(jnp.ones((16, 16)))

    def __call__(self, x):
        x = jnp.tanh(self.linear(x))
        return x @ self.table[...]  # fault


class EquinoxGate(eqx.Module):
    w: jax.Array
    gate: np.ndarray

    def __call__(self, x):
        x = x @ self.w
        x = x * self.gate  # fault
        return x @ self.w


class EquinoxPooling(eqx.Module):
    w: jax.Array

    def __call__(self, x):
        x = x @ self.w
        total, _ = lax.scan(lambda total, row: (total + row, None), jnp.zeros(16, BF16), x)  # fault
        return total / x.shape[0]


def linen(cls):
    with as_users_have_it():
        variables = jax.eval_shape(cls().init, jax.random.key(0), array(F32, 32, 16))
    return cls().apply, (variables, array(BF16, 32, 16))


def of_nnx(cls):
    graph, state = nnx.split(cls())
    return (lambda state, x: nnx.merge(graph, state)(x)), (state, array(BF16, 32, 16))


def similarities(x):
    x = jnp.tanh(x)
    return x @ x.T  # fault


def loss_in_scope(w, x):
    with jax.named_scope("head"):
        return jnp.mean((x @ w) ** 2)  # fault


X, W, SCORES = array(BF16, 32, 16), array(BF16, 16, 16), array(F16, 8, 64)
X32, W32 = array(F32, 32, 16), array(F32, 16, 16)

FAULTS = {
    "1e5 in float16": Fault("literal-out-of-range", large_factor, (SCORES,)),
    "mask of -1e9": Fault("literal-out-of-range", large_mask, (SCORES, array(bool, 8, 64))),
    "additive mask of -1e9": Fault("literal-out-of-range", large_additive_mask, (SCORES, array(F16, 8, 64))),
    "epsilon of zero": Fault("literal-out-of-range", zero_epsilon, (SCORES,)),
    "floor of zero": Fault("literal-out-of-range", zero_floor, (SCORES, array(F16, 8, 1))),
    "subnormal epsilon": Fault("epsilon-subnormal", subnormal_epsilon, (SCORES, array(F16, 8, 1))),
    "bound of one": Fault("literal-out-of-range", bound_of_one, (X,)),
    "bound of one, log1p": Fault("literal-out-of-range", bound_of_one_in_log1p, (X,)),
    "positions": Fault("integer-rounded", positions, (array(BF16, 1000, 16),)),
    "counts": Fault("integer-rounded", counted, (array(F16, 8), array(F32, 8, 5000))),
    "one-hot product": Fault("one-hot-product", looked_up, (array(I32, 8), array(BF16, 300, 16))),
    "softmax": Fault("softmax-in-16-bits", softmax, (X,)),
    "logsumexp": Fault("softmax-in-16-bits", log_sum_exp, (SCORES,)),
    "mean": Fault("statistics-in-16-bits", raw_mean, (SCORES,)),
    "norm": Fault("statistics-in-16-bits", length_of, (SCORES,)),
    "variance": Fault("cancellation", variance, (X,)),
    "variance of 16 bits": Fault("cancellation-in-float32", variance_of_narrow, (X,)),
    "carried sum": Fault("narrow-accumulation", carried_sum, (X,)),
    "segment_sum": Fault("narrow-accumulation", segments, (X, array(I32, 32))),
    "cumsum": Fault("narrow-accumulation", running, (X,)),
    "router": Fault("scores-rounded", router, (X, W)),
    "argmax": Fault("scores-rounded", choice, (X, W)),
    "logits": Fault("logits-rounded", rounded_logits, (X, W)),
    "constant": Fault("float32-leak", constant_promotes, (X, W)),
    "weight": Fault("float32-leak", uncast_weight, (X, W, W32)),
    "island": Fault("float32-leak", island_without_a_way_back, (X, W)),
    "scan": Fault("float32-leak", leak_in_scan, (X, array(BF16, 3, 16, 16))),
    "accumulation": Fault("float32-leak", accumulated_and_kept, (X, W)),
    "cotangents": Fault("float32-cotangents", cotangents, (W32, X)),
    "kernel": Fault("float32-kernel", kernel, (array(BF16, 8, 16), W)),
    "all_gather": Fault("float32-collective", gathered, (X, W32)),
    "psum of gradients": Fault("float32-reduction", reduced_gradients, (W32, X)),
    "bias": Fault("gradient-sum-in-16-bits", gradient_of_bias, ((W, array(BF16, 16)), X)),
    "highest": Fault("highest-precision", highest, (X32, W32), kwargs={"policy": "mixed_bfloat16"}),
    "Linen scale": Fault("float32-leak", *linen(LinenBlock), LinenBlock),
    "Linen attention": Fault("softmax-in-16-bits", *linen(LinenAttention), LinenAttention),
    "Linen router": Fault("scores-rounded", *linen(LinenRouter), LinenRouter),
    "NNX norm": Fault("cancellation", *of_nnx(NnxNorm), NnxNorm),
    "NNX table": Fault("float32-leak", *of_nnx(NnxMemory), NnxMemory),
    "Equinox gate": Fault(
        "float32-leak", EquinoxGate.__call__, (EquinoxGate(W, np.ones(16, np.float32)), X), EquinoxGate
    ),
    "Equinox pooling": Fault("narrow-accumulation", EquinoxPooling.__call__, (EquinoxPooling(W), X), EquinoxPooling),
    "recipe": Fault(
        "recipe-not-applied",
        similarities,
        (X32,),
        kwargs={"policy": "mixed_bfloat16", "dot": jmp.quant.FP8},
    ),
    "nothing low": Fault(
        "nothing-low",
        loss_in_scope,
        (W32, X32),
        kwargs={"policy": "mixed_bfloat16", "rules": [jmp.Rule("head", precision="full")]},
    ),
}
