"""Autocast cases without control flow: layers, attention, linear algebra, random numbers, indexing, dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from support.autocast_cases_common import EVERY, NOWHERE, VALUES, Case, apart, normal, well_conditioned, with_key

# --- Layers ---


def moments(h, axes):
    return h.mean(axes, keepdims=True), h.var(axes, keepdims=True)


def normalized(axes, groups=None):
    def fun(x, w):
        h = x @ w
        grouped = h if groups is None else h.reshape(8, groups, -1)
        mean, var = moments(grouped, axes)
        return ((grouped - mean) * lax.rsqrt(var + 1e-5)).reshape(h.shape) @ w

    return fun


def rms_norm(x, w, scale):
    h = x @ w
    return (h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6) * scale[None]) @ w


def batch_norm_of_conv(x, kernel):
    h = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    mean, var = moments(h, (0, 1, 2))
    return jax.nn.silu((h - mean) * lax.rsqrt(var + 1e-5)), mean, var


def conv(x, kernel, **how):
    return jax.nn.silu(lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **how))


def transposed_conv(x, kernel):
    return jnp.tanh(lax.conv_transpose(x, kernel, (2, 2), "SAME"))


def cross_entropy(x, w):
    return optax.softmax_cross_entropy_with_integer_labels(x @ w, jnp.arange(8)).mean()


images = normal((2, 6, 6, 4), (3, 3, 4, 8))

LAYERS = {
    "mlp": Case(lambda x, w: jax.nn.relu(x @ w) @ w, apart),
    "bias": Case(lambda x, w, b: jnp.tanh(x @ w + b[None]) @ w + b[None], normal((8, 16), (16, 16), (16,))),
    "gelu": Case(lambda x, w: jax.nn.gelu(x @ w) @ w),
    "gelu, exact": Case(lambda x, w: jax.nn.gelu(x @ w, approximate=False) @ w),
    "silu": Case(lambda x, w: jax.nn.silu(x @ w) @ w),
    "elu, softplus and sigmoid": Case(lambda x, w: jax.nn.elu(x @ w) + jax.nn.softplus(x @ w) * jax.nn.sigmoid(x @ w)),
    "softmax": Case(lambda x, w: jax.nn.softmax(x @ w) @ w),
    "log_softmax": Case(lambda x, w: jax.nn.log_softmax(x @ w)),
    "logsumexp": Case(lambda x, w: jax.nn.logsumexp(x @ w, axis=-1)),
    "cross entropy": Case(cross_entropy),
    "layer norm": Case(normalized(-1)),
    "group norm": Case(normalized(-1, groups=2)),
    "RMS norm": Case(rms_norm, normal((8, 16), (16, 16), (16,))),
    "batch norm": Case(batch_norm_of_conv, images),
    "variance and norm": Case(lambda x, w: (jnp.var(x @ w, -1), jnp.std(x @ w), jnp.linalg.norm(x @ w, axis=-1))),
    "conv": Case(functools.partial(conv, window_strides=(2, 2), padding="SAME"), images),
    "conv, dilated": Case(functools.partial(conv, window_strides=(1, 1), padding="VALID", rhs_dilation=(2, 2)), images),
    "conv, depthwise": Case(
        functools.partial(conv, window_strides=(1, 1), padding="SAME", feature_group_count=4),
        normal((2, 6, 6, 4), (3, 3, 1, 8)),
    ),
    "conv, transposed": Case(transposed_conv, images),
    "einsum": Case(lambda x, w: jnp.einsum("bi,ij,kj->bk", x, w, w)),
    "einsum, batched": Case(lambda a, b: jnp.einsum("bhqd,bhkd->bhqk", a, b), normal((2, 2, 4, 16), (2, 2, 4, 16))),
    "dot that asks for float32": Case(lambda x, w: jnp.tanh(jnp.dot(x, w, preferred_element_type=jnp.float32)) @ w),
    "dot in the highest precision": Case(lambda x, w: jnp.dot(x, w, precision="highest")),
    "matrix and vector": Case(lambda x, w: x @ w[0] + x[:, 0] * (w @ w[1]).sum()),
    "ragged_dot": Case(
        lambda x, w: jnp.tanh(lax.ragged_dot(x, w, jnp.array([3, 0, 5], jnp.int32))), normal((8, 16), (3, 16, 4))
    ),
    "mixture of experts": Case(
        lambda x, w: jnp.einsum("bef,be->bf", jnp.einsum("bd,edf->bef", x, w), jax.nn.softmax(x[:, :8])),
        normal((8, 16), (8, 16, 4)),
    ),
}


# --- Attention ---


def attention(x, w, **how):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, m) for m in w)
    return jax.nn.dot_product_attention(q, k, v, **how)


def masked_attention(x, w, least):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, m) for m in w)
    logits = jnp.einsum("bqhe,bkhe->bhqk", q, k) / np.float32(np.sqrt(8))
    seen = jnp.tril(jnp.ones((8, 8), bool))[None, None]
    return jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(jnp.where(seen, logits, least)), v)


def added_mask(x, w):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, m) for m in w)
    mask = jnp.where(jnp.tril(jnp.ones((8, 8), bool)), 0.0, -1e9)[None, None]
    logits = jnp.einsum("bqhe,bkhe->bhqk", q, k) / np.float32(np.sqrt(8))
    return jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(logits + mask), v)


def rotated(x, w):
    angles = jnp.einsum("i,j->ij", jnp.arange(8.0), 1 / 100 ** jnp.linspace(0.0, 1.0, 8))
    a, b = jnp.split(x @ w, 2, -1)
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), a * jnp.sin(angles) + b * jnp.cos(angles)], -1)


def tokens(rng):
    x, w = normal((2, 8, 16), (16, 3, 2, 8))(rng)
    return x, jnp.moveaxis(w * np.float32(np.sqrt(6)), 1, 0)


ATTENTION = {
    "attention": Case(attention, tokens),
    "attention, causal": Case(attention, tokens, {"is_causal": True}),
    "attention, window": Case(attention, tokens, {"is_causal": True, "local_window_size": (3, 0)}),
    "attention, mask of -1e9": Case(functools.partial(masked_attention, least=-1e9), tokens),
    "attention, mask of -inf": Case(functools.partial(masked_attention, least=-jnp.inf), tokens),
    "attention, mask added": Case(added_mask, tokens),
    "rotary embedding": Case(rotated),
    "tied embedding": Case(lambda x, w: jnp.tanh(w[jnp.array([1, 5, 5, 0])] @ w.T) + x[:4], normal((8, 16), (16, 16))),
}

# --- Linear algebra, exact by default: only the matmuls around it are low ---


def factors(x, a):
    lower, s = jnp.linalg.cholesky(a), jnp.linalg.svd(a, compute_uv=False)
    return (x @ lower) * s[None]


LINEAR_ALGEBRA = {
    "fft": Case(lambda x, w: jnp.abs(jnp.fft.fft(x @ w)) ** 2 + jnp.fft.irfft(jnp.fft.rfft(x @ w))),
    # Solvers, their gradients and what they are made of multiply in float32.
    "solve": Case(lambda b, a: jnp.linalg.solve(a, (b @ a).T), well_conditioned, low=NOWHERE),
    "cholesky and svd": Case(factors, well_conditioned, low=NOWHERE),
    "triangular solve": Case(
        lambda b, a: jax.scipy.linalg.solve_triangular(a, (b @ a).T, lower=True), well_conditioned, low=NOWHERE
    ),
    "eigh, qr, inv and det": Case(
        lambda b, a: (jnp.linalg.eigh(a)[0], jnp.linalg.qr(a)[1], jnp.linalg.inv(a), jnp.linalg.slogdet(a)[1]),
        well_conditioned,
        modes=VALUES,
        exact=EVERY,
        low=NOWHERE,
    ),
    "sparse cg": Case(
        lambda b, a: jax.scipy.sparse.linalg.cg(lambda v: a @ v, b[0], tol=1e-6)[0], well_conditioned, low=NOWHERE
    ),
}

# --- Random numbers ---


def random_bits(key, x, w):
    keys = jax.random.split(key, 6)
    p = jax.nn.softmax(x)
    return (
        jax.random.uniform(keys[0], (8,)),
        jax.random.normal(keys[1], (8,)),
        jax.random.permutation(keys[2], x),
        jax.random.gamma(keys[3], 2.0, (4,)),
        jax.random.truncated_normal(keys[4], -1.0, 1.0, (8,)),
        jax.random.categorical(keys[5], jnp.log(p)),
        jax.random.bits(key, (4,)),
        jax.random.fold_in(key, 3),
    )


def dropout(key, x, w):
    keep = jax.random.bernoulli(key, 0.5, (8, 16))
    return keep, jnp.where(keep, x @ w, 0.0) @ w


RANDOM = {
    "random numbers": Case(random_bits, with_key(), modes=VALUES, exact=EVERY),
    "noise": Case(lambda key, x, w: (x + 0.1 * jax.random.normal(key, x.shape)) @ w, with_key()),
    "noise after a product": Case(lambda key, x, w: x @ w + 0.1 * jax.random.normal(key, x.shape), with_key()),
    "dropout": Case(dropout, with_key(), exact=(0,)),
    "old-style key": Case(lambda x, w: x @ w + jax.random.normal(jax.random.PRNGKey(3), x.shape)),
}

# --- Sorting, indexing, windows ---


def pooled(x, w):
    h = (x @ w)[None, :, :, None]
    largest = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return largest, lax.reduce_window(h, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME")


def updated(method):
    def fun(x, w):
        return getattr(jnp.ones((9, 16)).at[jnp.array([1, 1, 2])], method)((x @ w)[:3])

    return fun


def sliced(x, w):
    h = x @ w
    part = lax.dynamic_slice(h, (jnp.int32(2), jnp.int32(0)), (3, 16))
    return lax.dynamic_update_slice(h, part * 2, (0, 0)), jnp.pad(part, 1), jnp.roll(h, 3, 0), h[::-2], jnp.tile(h, 2)


def selected(x, w):
    h = x @ w
    return jnp.where(x > 0, h, x), jnp.clip(h, -0.5, 0.5), jnp.maximum(h, 0.1), jnp.abs(h), jnp.concatenate([x, h])


INDEXING = {
    "sort": Case(lambda x, w: jnp.sort(x @ w) @ w, apart),
    "top_k": Case(lambda x, w: lax.top_k(x @ w, 3), apart),
    "sort by key": Case(lambda x, w: lax.sort([x @ w, x * 3], num_keys=1), apart),
    "argmax and one_hot": Case(
        lambda x, w: (jnp.argmax(x @ w, -1), jax.nn.one_hot(jnp.argmin(x @ w, -1), 16), jnp.sum(x @ w > 0)),
        apart,
        modes=VALUES,
        exact=EVERY,
    ),
    "scatter, set": Case(lambda x, w: jnp.ones((9, 16)).at[jnp.array([1, 4, 2])].set((x @ w)[:3])),
    "scatter, add": Case(updated("add")),
    "scatter, multiply": Case(updated("multiply"), modes=VALUES),  # JAX has no derivative of it at repeated indices
    "scatter, max": Case(updated("max"), modes=VALUES),  # nor of this
    "gather": Case(lambda x, w: jnp.take_along_axis(x @ w, jnp.argsort(x, -1), -1) @ w[jnp.arange(16)[::-1]], apart),
    "segment_sum": Case(lambda x, w: jax.ops.segment_sum(x @ w, jnp.array([0, 1, 0, 2, 2, 1, 0, 0]), 3)),
    "slices": Case(sliced),
    "selection": Case(selected, apart),
    "windows": Case(pooled, apart),
    "max and min": Case(lambda x, w: ((x @ w).max(-1), lax.cummax(x @ w, axis=1), (x @ w).min()), apart),
    "cumulative sums": Case(lambda x, w: (jnp.cumsum(x @ w, 0), jnp.cumprod(1 + 0.1 * jnp.tanh(x @ w), 0))),
    "associative_scan": Case(lambda x, w: lax.associative_scan(jnp.add, x @ w)),
    "associative_scan, recurrent": Case(
        lambda x, w: lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (jnp.tanh(x @ w), x @ w))
    ),
}

# --- Dtypes and trees ---


def counted(n, on, x, w):
    return n + 1, ~on, jnp.where(on[:, None], x @ w, 0.0), (n[:, None] @ n[None]).sum(), jnp.sum(on)


def integers(rng):
    return jnp.asarray(rng.integers(0, 9, 8), jnp.int32), jnp.asarray(rng.integers(0, 2, 8), bool), *apart(rng)


def variables(x, w, *, mask=None, activation="relu", train=False, scale=2):
    h = x @ w if mask is None else x
    return {"h": getattr(jax.nn, activation)(h) * scale if train else h, "mask": mask}


def pytree(params, batch):
    h = jnp.tanh(batch[0] @ params["layers"][0]["w"])
    return {"out": (h @ params["layers"][1]["w"], None), "batch": batch, "empty": {}}


def trees(rng):
    x, w, v = normal((8, 16), (16, 16), (16, 4))(rng)
    return {"layers": [{"w": w}, {"w": v}], "nothing": None, "none": ()}, (x, [jnp.int32(3)])


def weak(x, w):
    return x @ w, jnp.asarray(2.0) * 3, jnp.sum(x) * 0 + 1, jnp.asarray(1) + 2


def halves(x, w):
    return x @ w, (x * 2).astype(jnp.float32) @ w.astype(jnp.float32), x.astype(jnp.float32)


DTYPES = {
    "integers and booleans": Case(counted, integers, exact=(0, 1, 3, 4)),
    "integers only": Case(lambda n: (n @ n, n[::-1] // 2), lambda rng: (jnp.arange(8),), modes=VALUES, exact=EVERY),
    "complex": Case(lambda x, w: lax.complex(x, x @ w) * jnp.exp(lax.complex(x * 0, x))),
    "complex product": Case(
        lambda x, w: jnp.abs(lax.complex(x, x) @ lax.complex(w, w)) ** 2, modes=VALUES, exact=EVERY, low=NOWHERE
    ),
    "float64": Case(
        lambda x, w: (jnp.tanh(x @ w) @ w, jnp.linalg.norm(x)),
        normal((8, 16), (16, 16), dtype=np.float64),
        exact=EVERY,
        context=lambda: jax.enable_x64(True),
    ),
    "float32 beside float64": Case(
        lambda x, w: (x @ w).astype(jnp.float64) @ w.astype(jnp.float64), context=lambda: jax.enable_x64(True)
    ),
    "bfloat16 and float16": Case(halves, normal((8, 16), (16, 16), dtype=jnp.bfloat16), exact=(0, 2)),
    "float16 beside float32": Case(lambda x, w: (x.astype(jnp.float16) * 2).astype(jnp.float32) @ w),
    "keys": Case(lambda key, x, w: (key, jax.random.split(key), x @ w), with_key(), exact=(0, 1)),
    "pass-through": Case(lambda x, w: (x, x @ w, w.T.T, jnp.float32(0.1)), exact=(0, 2, 3)),
    "nothing": Case(lambda: (), lambda rng: (), modes=VALUES),
    "constants": Case(lambda x, w: jnp.tanh(x @ jnp.asarray(np.eye(16, dtype=np.float32))) * np.float32(0.3) + w[:8]),
    "numpy arguments": Case(
        lambda x, w, s: np.float32(2) * (x @ w) * s,
        lambda rng: (*(np.asarray(a) for a in normal((8, 16), (16, 16))(rng)), np.float32(0.1)),
        whole=True,  # the gradient of the scale is a sum that may cancel
    ),
    "weak types": Case(weak, exact=(1, 2, 3)),
    "weakly typed argument": Case(
        lambda s, x, w: (s * 2, x @ w * s),
        lambda rng: (jnp.asarray(3.0), *normal((8, 16), (16, 16))(rng)),
        exact=(0,),
        whole=True,
    ),
    "Python scalars": Case(lambda x, w: {"h": x * 2 @ w, "n": 3, "f": 0.1, "on": True}, exact=(0, 2, 3)),
    "static keywords": Case(variables, apart, {"activation": "silu", "train": True, "mask": None, "scale": 2}),
    "trees": Case(pytree, trees),
    "bit cast": Case(
        lambda x, w: lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32), jnp.float32),
        exact=EVERY,
        modes=VALUES,
    ),
}

CASES = LAYERS | ATTENTION | LINEAR_ALGEBRA | RANDOM | INDEXING | DTYPES
