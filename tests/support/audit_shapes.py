"""Other shapes of the faults in ``audit_faults``: the same mistake, written differently."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from support.audit_faults import BF16, F16, F32, SCORES, Fault, X, array, as_users_have_it

# --- Numbers ---


def filled_mask(scores, mask):
    return lax.select(mask, scores, jnp.full_like(scores, -1e9))  # fault


def written_mask(scores):
    return jax.nn.softmax(scores.at[:, 3].set(-1e9).astype(F32))  # fault


def mask_of_two_numbers(scores, mask):
    bias = jnp.where(mask, 0.0, -1e9).astype(F16)  # fault
    return scores + bias


def mask_in_a_map(scores, mask):
    def masked(row, keeps):
        return jnp.where(keeps, row, -1e9)  # fault

    return jax.vmap(masked)(scores, mask)


def clipped_below(x):
    return jnp.log(jnp.clip(x, 1e-9, 1.0))  # fault


def power_of_epsilon(x, norm):
    return x * (norm + 1e-8) ** -0.5  # fault


def squared_bound(x):
    x = jnp.minimum(x, 0.999)  # fault
    return x / jnp.sqrt(1 - x * x)


def bound_by_select(x):
    x = jnp.where(x > 0.999, 0.999, x)  # fault
    return jnp.log1p(-x)


def bound_of_a_slope(x):
    x = jnp.clip(x, -1 + 1e-4, 1 - 1e-4)  # fault
    return jnp.arccos(x)


def gumbel(u):
    u = jnp.clip(u, 1e-3, 0.9999)  # fault
    return -jnp.log(-jnp.log(u))


def scattered_ones(ids, table):
    hot = jnp.zeros((8, 300), BF16).at[jnp.arange(8), ids].set(1)
    return hot @ table  # fault


# --- Sums ---


def subtracted_logarithm(x):
    return x - jax.nn.logsumexp(x, -1, keepdims=True)  # fault


def powers_of_two(x):
    e = jnp.exp2(x - x.max(-1, keepdims=True))  # fault
    return e / (e.sum(-1, keepdims=True) + 1e-3)


def reciprocal_of_the_sum(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))  # fault
    return e * (1 / e.sum(-1, keepdims=True))


def divided_last(x, values):
    e = jnp.exp(x - x.max(-1, keepdims=True))  # fault
    return (e @ values) / e.sum(-1, keepdims=True)


def sum_of_squares(x):
    total, squares = x.sum(-1), (x * x).sum(-1)
    return (squares - total**2 / 16) / 15  # fault


def inner_variance(x):
    return jnp.einsum("bi,bi->b", x, x) / 16 - x.mean(-1) ** 2  # fault


def negated(x):
    mean = x.mean(-1)
    return -(mean * mean) + (x * x).mean(-1)  # fault


# --- Dtypes ---


class LinenLayers(nn.Module):
    """The cast is in a layer of the framework; the line is that of its call."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, dtype=BF16)(x)
        x = nn.LayerNorm()(x)  # fault
        return nn.Dense(16)(x)


class NnxLayers(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.norm, self.last = (
            nnx.Linear(16, 16, dtype=BF16, rngs=rngs),
            nnx.RMSNorm(16, rngs=rngs),
            nnx.Linear(16, 16, rngs=rngs),
        )

    def __call__(self, x):
        x = self.norm(self.first(x))  # fault
        return self.last(x)


class EquinoxLayers(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear

    def __call__(self, x):
        x = jax.vmap(self.first)(x)
        x = x / jnp.ones(16, F32)  # fault
        return jax.vmap(self.last)(x)


def haiku_layers(x):
    x = hk.Linear(16, name="first")(x)
    x = x + hk.get_parameter("position", (16,), F32, jnp.zeros)  # fault
    return hk.Linear(16, name="last")(x)


def of_linen():
    with as_users_have_it():
        variables = jax.eval_shape(LinenLayers().init, jax.random.key(0), array(BF16, 32, 16))
    return LinenLayers().apply, (variables, X)


def of_nnx():
    graph, state = nnx.split(NnxLayers())
    return (lambda state, x: nnx.merge(graph, state)(x)), (state, X)


def of_equinox():
    def linear(dtype):
        shapes = eqx.filter_eval_shape(eqx.nn.Linear, 16, 16, key=jax.random.key(0))
        return jax.tree.map(lambda leaf: array(dtype, *leaf.shape), shapes)

    return EquinoxLayers.__call__, (EquinoxLayers(linear(BF16), linear(F32)), X)


def of_haiku():
    model = hk.without_apply_rng(hk.transform(haiku_layers))
    low = {"w": array(BF16, 16, 16), "b": array(BF16, 16)}
    high = {"w": array(F32, 16, 16), "b": array(F32, 16)}
    return model.apply, ({"~": {"position": array(F32, 16)}, "first": low, "last": high}, X)


MASK = array(bool, 8, 64)
SHAPES = {
    "mask by full_like": Fault("literal-out-of-range", filled_mask, (SCORES, MASK)),
    "mask by at": Fault("literal-out-of-range", written_mask, (SCORES,)),
    "mask of two numbers": Fault("literal-out-of-range", mask_of_two_numbers, (SCORES, MASK)),
    "mask in vmap": Fault("literal-out-of-range", mask_in_a_map, (SCORES, MASK)),
    "clip from below": Fault("literal-out-of-range", clipped_below, (SCORES,)),
    "power of an epsilon": Fault("literal-out-of-range", power_of_epsilon, (SCORES, array(F16, 8, 1))),
    "bound that is squared": Fault("literal-out-of-range", squared_bound, (X,)),
    "bound by select": Fault("literal-out-of-range", bound_by_select, (X,)),
    "bound of an arc": Fault("literal-out-of-range", bound_of_a_slope, (X,)),
    "bound of a logarithm": Fault("literal-out-of-range", gumbel, (X,)),
    "one-hot by scatter": Fault("one-hot-product", scattered_ones, (array(jnp.int32, 8), array(BF16, 300, 16))),
    "log_softmax": Fault("softmax-in-16-bits", subtracted_logarithm, (SCORES,)),
    "powers of two": Fault("softmax-in-16-bits", powers_of_two, (SCORES,)),
    "reciprocal": Fault("softmax-in-16-bits", reciprocal_of_the_sum, (X,)),
    "division after the matmul": Fault("softmax-in-16-bits", divided_last, (SCORES, array(F16, 64, 16))),
    "variance of sums": Fault("cancellation", sum_of_squares, (X,)),
    "variance by einsum": Fault("cancellation", inner_variance, (X,)),
    "variance by a sum": Fault("cancellation", negated, (X,)),
    "Linen layers": Fault("float32-leak", *of_linen(), LinenLayers),
    "NNX layers": Fault("float32-leak", *of_nnx(), NnxLayers),
    "Equinox layers": Fault("float32-leak", *of_equinox(), EquinoxLayers),
    "Haiku layers": Fault("float32-leak", *of_haiku(), haiku_layers),
}
