"""Autocast cases of whole models, written as their libraries are used without mixed precision."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from support.autocast_cases_common import Case

# Gradients of a model are compared as one vector: some of its arrays, such as the biases of keys, have no gradient
# but rounding errors. Most draws are off by an eighth of what is allowed; a few have activations so small that
# normalizing them enlarges their errors.
transformer = functools.partial(Case, depth=8, whole=True)
# A ReLU changes the derivative of what rounding moves across zero, of normal numbers the share 0.8 * ULP. In length
# of a gradient that is the root of the share, and with four of them twice the root: 0.11, on average over draws.
residual = functools.partial(Case, depth=8, grad_depth=32, whole=True)

# --- Flax Linen ---


class LinenTransformer(nn.Module):
    """A decoder with a float32 constant in its residual stream."""

    remat: bool = False
    scan: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 16)(ids) + self.param("position", nn.initializers.normal(0.5), (1, ids.shape[1], 16))
        if self.scan:
            layers = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
            x, _ = nn.scan(LinenBlock, **layers)(name="blocks")(x, None)
        else:
            cls = nn.remat(LinenBlock) if self.remat else LinenBlock
            for i in range(2):
                x, _ = cls(name=f"block{i}")(x, None)
        return nn.Dense(11)(nn.LayerNorm()(x))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(2, deterministic=True)(nn.LayerNorm()(x), mask=mask)
        y = nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))
        return x + y * np.float32(0.5), None


class LinenResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=False)
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(2):
            y = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
            x = nn.relu(x + norm()(nn.Conv(8, (3, 3), use_bias=False)(y)))
        return nn.Dense(5)(x.mean((1, 2)))


class LinenScannedCell(nn.Module):
    cell: type

    @nn.compact
    def __call__(self, x):
        step = lambda cell, carry, x: cell(carry, x)  # noqa: E731
        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        cell = self.cell(16)
        return scan(cell, cell.initialize_carry(jax.random.key(0), x[:, 0].shape), x)[1]


def images(rng):
    return jnp.asarray(rng.standard_normal((4, 8, 8, 3)), jnp.float32)


def ids(rng):
    return jnp.asarray(rng.integers(0, 11, (2, 8)), jnp.int32)


def sequences(rng):
    return jnp.asarray(rng.standard_normal((2, 6, 16)), jnp.float32)


def linen(model, data, case=Case, **how):
    """A Linen model as a case: variables and batch in, outputs and changed variables out."""
    init = jax.jit(model.init)

    def args(rng):
        batch = data(rng)
        return init(jax.random.key(int(rng.integers(2**31))), batch), batch

    return case(functools.partial(model.apply, mutable=["batch_stats"]), args, **how)


LINEN = {
    "Linen transformer": linen(LinenTransformer(), ids, transformer),
    "Linen transformer, remat": linen(LinenTransformer(remat=True), ids, transformer),
    "Linen transformer, scan": linen(LinenTransformer(scan=True), ids, transformer),
    "Linen ResNet": linen(LinenResNet(), images, residual),
    "Linen LSTM": linen(nn.RNN(nn.OptimizedLSTMCell(16)), sequences, transformer),
    "Linen LSTM, nn.scan": linen(LinenScannedCell(nn.LSTMCell), sequences, transformer),
    "Linen GRU, nn.scan": linen(LinenScannedCell(nn.GRUCell), sequences, transformer),
}

# --- Flax NNX ---


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(16, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.head = nnx.Embed(11, 16, rngs=rngs), nnx.Linear(16, 11, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class NnxResNet(nnx.Module):
    def __init__(self, rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.stem, self.head = conv(3, 8), nnx.Linear(8, 5, rngs=rngs)
        self.convs = nnx.List([conv(8, 8, use_bias=False) for _ in range(4)])
        self.norms = nnx.List([nnx.BatchNorm(8, rngs=rngs) for _ in range(4)])

    def __call__(self, x):
        x = self.stem(x)
        for i in (0, 2):
            y = nnx.relu(self.norms[i](self.convs[i](x)))
            x = nnx.relu(x + self.norms[i + 1](self.convs[i + 1](y)))
        return self.head(x.mean((1, 2)))


class NnxScan(nnx.Module):
    """A cell under nnx.scan, with the sequence along the first axis."""

    def __init__(self, cell, rngs):
        self.cell = cell(16, 16, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(None, nnx.Carry, 1), out_axes=(nnx.Carry, 1))
        def run(cell, carry, x):
            return cell(carry, x)

        return run(self.cell, self.cell.initialize_carry(x[:, 0].shape, nnx.Rngs(0)), x)[1]


def nnx_case(make, data, case=Case):
    """An NNX model as a case: its state and a batch in, outputs and the changed statistics out."""

    @functools.cache
    def graphdef():
        return nnx.split(make(nnx.Rngs(0)))[0]

    def args(rng):
        seed = int(rng.integers(2**31))
        return nnx.state(make(nnx.Rngs(seed))), data(rng)

    def fun(state, batch):
        model = nnx.merge(graphdef(), state)
        return model(batch), nnx.state(model, nnx.BatchStat)

    return case(fun, args)


def nnx_rnn(rngs):
    return nnx.RNN(nnx.OptimizedLSTMCell(16, 16, rngs=rngs))


NNX = {
    "NNX transformer": nnx_case(NnxTransformer, ids, transformer),
    "NNX ResNet": nnx_case(NnxResNet, images, residual),
    "NNX LSTM": nnx_case(nnx_rnn, sequences, transformer),
    "NNX LSTM, nnx.scan": nnx_case(functools.partial(NnxScan, nnx.LSTMCell), sequences, transformer),
    "NNX GRU, nnx.scan": nnx_case(functools.partial(NnxScan, nnx.GRUCell), sequences, transformer),
}

# --- Equinox: the model itself is the argument, with its functions and settings ---


class EquinoxTransformer(eqx.Module):
    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norms: list
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Embedding(11, 16, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(2, 16, key=keys[1])
        self.norms = [eqx.nn.LayerNorm(16), eqx.nn.RMSNorm(16)]
        self.mlp = eqx.nn.MLP(16, 16, 32, 1, activation=jax.nn.gelu, key=keys[2])
        self.head = eqx.nn.Linear(16, 11, key=keys[3])

    def __call__(self, ids):
        x = jax.vmap(self.embed)(ids)
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y, mask=jnp.tril(jnp.ones((8, 8), bool)))
        x = x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))
        return jax.vmap(self.head)(x)


def equinox(make, data, case=Case):
    def args(rng):
        return make(key=jax.random.key(int(rng.integers(2**31)))), data(rng)

    return case(lambda model, batch: jax.vmap(model)(batch), args)


def vectors(rng):
    return jnp.asarray(rng.standard_normal((8, 16)), jnp.float32)


EQUINOX = {
    "Equinox MLP": equinox(functools.partial(eqx.nn.MLP, 16, 4, 32, 2, jax.nn.silu), vectors, transformer),
    "Equinox transformer": equinox(EquinoxTransformer, ids, transformer),
}

# --- Haiku ---


@hk.transform
def haiku_mlp(x):
    return hk.nets.MLP([32, 32, 4], activation=jax.nn.silu)(x)


def haiku_args(rng):
    x = vectors(rng)
    return haiku_mlp.init(jax.random.key(int(rng.integers(2**31))), x), None, x


HAIKU = {"Haiku MLP": transformer(haiku_mlp.apply, haiku_args)}

CASES = LINEN | NNX | EQUINOX | HAIKU
