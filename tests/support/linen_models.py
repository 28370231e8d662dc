"""Linen models in every style that Flax has; each has a part named "body" and a part named "head"."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from support.comparisons import slow_but_for


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(16, name="body")(x)))


class Setup(nn.Module):
    def setup(self):
        self.body, self.head = nn.Dense(16), nn.Dense(3)

    def __call__(self, x):
        return self.head(self.encode(x))

    def encode(self, x):
        return nn.relu(self.body(x))


class Attributes(nn.Module):
    body: nn.Module
    head: nn.Module

    def __call__(self, x):
        return self.head(self.body(x))


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.Dense(x.shape[-1], name="body")
        return nn.Dense(3, name="head")(body(body(body(x))))


class Image(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (2,), name="body")(x[..., None])
        x = nn.BatchNorm(use_running_average=False, name="norm")(x)
        return nn.Dense(3, name="head")(nn.relu(x).mean(-1))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(2, name="body")(jnp.stack([x] * 8, 1))
        return nn.Dense(3, name="head")(x[:, 0])


class Block(nn.Module):
    """A residual block, with a constant that promotes what it meets to float32."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(x.shape[-1], name="down")(nn.relu(nn.Dense(6, name="up")(nn.LayerNorm(name="norm")(x))))
        return x + y * np.float32(0.5), None


class Single(Block):
    def __call__(self, x):
        return super().__call__(x)[0]


SCAN = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


class Lifted(nn.Module):
    """Three blocks under a lifted transformation of their class."""

    lift: object
    pair: bool = True

    @nn.compact
    def __call__(self, x):
        y = self.lift(name="body")(x)
        return nn.Dense(3, name="head")(y[0] if self.pair else y)


class Vmapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        experts = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        return nn.Dense(3, name="head")(experts(x.shape[-1], name="body")(x).mean(0))


class ScannedFunction(nn.Module):
    """A scan over a function whose float32 carry the layer overwrites, as recurrent code does."""

    @nn.compact
    def __call__(self, x):
        def step(body, carry, x):
            return body(carry), x

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        carry, _ = scan(nn.Dense(16, name="body"), jnp.ones((x.shape[0], 16)), jnp.stack([x, x]))
        return nn.Dense(3, name="head")(carry)


class ScannedMethod(nn.Module):
    @functools.partial(nn.scan, variable_broadcast="params", split_rngs={"params": False})
    @nn.compact
    def step(self, carry, x):
        carry = nn.Dense(16, name="body")(jnp.concatenate([carry, x], -1))
        return carry, carry

    @nn.compact
    def __call__(self, x):
        carry, _ = self.step(jnp.zeros((x.shape[0], 16)), jnp.stack([x, x]))
        return nn.Dense(3, name="head")(carry)


class Looped(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.Dense(x.shape[-1], name="body")
        x = body(x)
        x, _ = nn.while_loop(
            lambda _, carry: carry[1] < 3,
            lambda body, carry: (body(carry[0]), carry[1] + 1),
            body,
            (x.astype(jnp.float32), 0),
        )
        return nn.Dense(3, name="head")(x)


class Recurrent(nn.Module):
    cell: object

    @nn.compact
    def __call__(self, x):
        sequence = jnp.stack([x] * 3, 1)
        return nn.Dense(3, name="head")(nn.RNN(self.cell(16, name="body"))(sequence)[:, -1])


class LowRank(nn.Module):
    """Adds a low-rank term to a layer in whose scope it lives."""

    base: nn.Dense

    def setup(self):
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x):
        a = self.param("A", nn.initializers.normal(), (x.shape[-1], 2))
        b = self.param("B", nn.initializers.normal(), (2, self.base.features))
        return self.base(x) + x @ a @ b


class SharedScope(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(LowRank(nn.Dense(16, name="body"))(x))


# --- Models for one test each ---


class Everything(nn.Module):
    """Batch statistics, dropout, a cache of activations, sown values, and more than one method."""

    @nn.compact
    def __call__(self, x, bias=None, *, train=False):
        x = nn.Dense(16, name="body")(x)
        last = self.variable("cache", "last", jnp.zeros, x.shape, x.dtype)
        total = self.variable("cache", "total", jnp.zeros, x.shape, jnp.float32)
        if self.is_mutable_collection("cache"):
            last.value, total.value = x, total.value + x
        x = nn.BatchNorm(not self.is_mutable_collection("batch_stats"), momentum=0.5, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        self.sow("intermediates", "kept", x)
        return x if bias is None else x + bias

    def encode(self, x, scale=2):
        return self(x) * scale


class SelfNormalizing(nn.Module):
    """Changes one of its parameters, and one element of another."""

    @nn.compact
    def __call__(self, x):
        w, b = (self.param(name, nn.initializers.normal(1.0), (3,)) for name in "wb")
        self.put_variable("params", "w", w * 2)
        self.put_variable("params", "b", b.at[0].set(0))
        self.put_variable("params", "new", w)
        return (x * w).sum()


class Typed(nn.Module):
    """Returns its arguments."""

    def __call__(self, *args, **kwargs):
        return args, kwargs


class Remembering(nn.Module):
    """A step that replaces its state: a variable, carried by the scan."""

    @nn.compact
    def __call__(self, carry, x):
        state = self.variable("state", "h", jnp.zeros, x.shape)
        state.value = nn.Dense(x.shape[-1], name="body")(x)
        return carry, state.value


# --- The table ---

MODELS = {
    "compact": Compact,
    "setup": Setup,
    "attributes": lambda: Attributes(nn.Dense(16), nn.Dense(3)),
    "nested attributes": lambda: Attributes(nn.Sequential([nn.Dense(16), Single()]), nn.Dense(3)),
    "shared": Shared,
    "image": Image,
    "attention": Attention,
    "scan": lambda: Lifted(functools.partial(nn.scan(Block, length=3, **SCAN))),
    "remat": lambda: Lifted(nn.remat(Block)),
    "jit": lambda: Lifted(nn.jit(Block)),
    "scan of remat": lambda: Lifted(nn.scan(nn.remat(Block), length=3, **SCAN)),
    "remat_scan": lambda: Lifted(nn.remat_scan(Single, lengths=(2, 2)), pair=False),
    "vmap": Vmapped,
    "scan of a function": ScannedFunction,
    "scan of a method": ScannedMethod,
    "while": Looped,
    "lstm": lambda: Recurrent(nn.LSTMCell),
    "optimized lstm": lambda: Recurrent(nn.OptimizedLSTMCell),
    "gru": lambda: Recurrent(nn.GRUCell),
    "simple cell": lambda: Recurrent(nn.SimpleCell),
    "share_scope": SharedScope,
}

#: Parameters of a test; other recurrent cells, and other ways to put layers together, are left to the slow ones.
EVERY_MODEL = slow_but_for(
    MODELS.keys() - {"lstm", "gru", "simple cell", "setup", "attributes", "jit", "remat"}, MODELS
)


def random_variables(model, x, rng):
    """Variables of a model without running it: normal parameters, everything else one."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: rng.normal(scale=0.5, size=leaf.shape).astype(leaf.dtype), shapes["params"])
    rest = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    return {**rest, "params": params}
