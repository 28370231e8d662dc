"""NNX models in every style that Flax has; each has a part named "body" and a part named "head"."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from support.comparisons import slow_but_for


class Model(nnx.Module):
    def __init__(self, body):
        self.body, self.head = body, nnx.Linear(16, 3, rngs=nnx.Rngs(1))

    def __call__(self, x):
        with jax.named_scope("body"):
            x = self.run(x)
        with jax.named_scope("head"):
            return self.head(x)

    def run(self, x):
        return self.body(x)


class Custom(nnx.Module):
    """A layer that knows nothing of dtypes, with a constant that promotes what it meets to float32."""

    def __init__(self, rngs):
        self.w = nnx.Param(rngs.params.normal((16, 16)))
        self.table = jnp.ones((16, 16), jnp.float32)

    def __call__(self, x):
        return (x @ self.w[...]) @ self.w[...] * np.float32(0.5)


class Block(nnx.Module):
    """A residual block with a float32 constant."""

    def __init__(self, rngs):
        self.norm, self.up, self.down = nnx.LayerNorm(16, rngs=rngs), *(nnx.Linear(16, 16, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x)))) * np.float32(0.5)


class Image(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(1, 16, (2,), rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
        self.dense = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        return self.dense(nnx.relu(self.norm(self.conv(x[..., None]))).mean(-2))


class Tokens(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 16, rngs=rngs)

    def __call__(self, x):
        return self.embed.attend(self.embed((x[:, 0] > 0).astype(jnp.int32)))


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(jnp.stack([x] * 8, 1))[:, 0]


class Recurrent(nnx.Module):
    def __init__(self, cell, rngs):
        self.rnn = nnx.RNN(cell(16, 16, rngs=rngs))

    def __call__(self, x):
        return self.rnn(jnp.stack([x] * 3, 1))[:, -1]


class Decorated(nnx.Module):
    """Lifted transformations as decorators of methods."""

    def __init__(self, rngs):
        self.block = Block(rngs)

    @nnx.jit
    def __call__(self, x):
        return self.checkpointed(x)

    @nnx.remat
    def checkpointed(self, x):
        return self.block(x)


class Shared(Model):
    def run(self, x):
        return self.body(self.body(x))


class Scanned(Model):
    def run(self, x):
        return nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.body, x)


class Rematted(Model):
    def run(self, x):
        return nnx.remat(lambda block, x: block(x))(self.body, x)


class Vmapped(Model):
    def run(self, x):
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(self.body, x).mean(0)


class Looped(Model):
    def run(self, x):
        def step(_, carry):
            body, x = carry
            return body, body(x)

        return nnx.fori_loop(0, 3, step, (self.body, x.astype(jnp.float32)))[1]


class Unscanned(Model):
    """A recurrence written by hand, that starts in float32 and whose layer overwrites it."""

    def run(self, x):
        @nnx.scan(in_axes=(None, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def step(body, carry, x):
            return body(carry), x

        return step(self.body, jnp.ones(x.shape, jnp.float32), jnp.stack([x, x]))[0]


def stacked(n=3):
    return nnx.vmap(Block)(nnx.Rngs(0).split(n))


def linear(rngs, **settings):
    return nnx.Linear(16, 16, rngs=rngs, **settings)


def named(layer):
    return lambda rngs: Model(layer(rngs))


def forward(model, *args):
    """The function that most users wrap."""
    return model(*args)


MODELS = {
    "linear": named(linear),
    "custom": named(Custom),
    "block": named(Block),
    "list": named(lambda rngs: nnx.Sequential(*[Block(rngs) for _ in range(2)])),
    "einsum": named(lambda rngs: nnx.Einsum("ab,bc->ac", (16, 16), rngs=rngs)),
    "lora": named(lambda rngs: nnx.LoRALinear(16, 16, lora_rank=2, rngs=rngs)),
    "image": named(Image),
    "tokens": named(Tokens),
    "attention": named(Attention),
    "decorated": named(Decorated),
    "shared": lambda rngs: Shared(linear(rngs)),
    "scan": lambda rngs: Scanned(stacked()),
    "remat": lambda rngs: Rematted(Block(rngs)),
    "vmap": lambda rngs: Vmapped(stacked()),
    "fori_loop": lambda rngs: Looped(linear(rngs)),
    "scan from float32": lambda rngs: Unscanned(linear(rngs)),
    "lstm": named(functools.partial(Recurrent, nnx.LSTMCell)),
    "optimized lstm": named(functools.partial(Recurrent, nnx.OptimizedLSTMCell)),
    "gru": named(functools.partial(Recurrent, nnx.GRUCell)),
    "simple cell": named(functools.partial(Recurrent, functools.partial(nnx.SimpleCell, dtype=None))),
}

#: Parameters of a test; other recurrent cells, and other ways to put layers together, are left to the slow ones.
EVERY_MODEL = slow_but_for(
    MODELS.keys() - {"lstm", "gru", "simple cell", "einsum", "lora", "list", "fori_loop"}, MODELS
)
