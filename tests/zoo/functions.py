"""Models of packages for functions, flows, graphs, differential equations and inference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .model import Model, at_the_boundary, cross_entropy, fast_jit, integers, normal


def _equinox(model, loss, batch, **more) -> Model:
    """A model that is a tree of arrays and functions, of which the floating arrays are the parameters."""
    import equinox as eqx

    params, static = eqx.partition(model, eqx.is_inexact_array)
    evaluate = lambda params, batch: loss(eqx.combine(params, static), batch)  # noqa: E731
    return Model(evaluate, at_the_boundary(evaluate), params, batch, **more)


# --- Equinox ---


def equinox_mlp() -> Model:
    import equinox as eqx

    def loss(model, batch):
        return cross_entropy(jax.vmap(model)(batch["x"]), batch["labels"])

    def batch(rng):
        return {"x": normal(rng, (16, 24)), "labels": integers(rng, 10, (16,))}

    return _equinox(eqx.nn.MLP(24, 10, 32, 2, jax.nn.gelu, key=jax.random.key(0)), loss, batch)


def equinox_gru() -> Model:
    """A cell scanned over a sequence."""
    import equinox as eqx

    def loss(model, batch):
        cell, head = model

        def run(x):
            return head(jax.lax.scan(lambda h, x: (cell(x, h), None), jnp.zeros(32, x.dtype), x)[0])

        return cross_entropy(jax.vmap(run)(batch["x"]), batch["labels"])

    def batch(rng):
        return {"x": normal(rng, (8, 12, 16)), "labels": integers(rng, 10, (8,))}

    keys = jax.random.split(jax.random.key(0))
    return _equinox((eqx.nn.GRUCell(16, 32, key=keys[0]), eqx.nn.Linear(32, 10, key=keys[1])), loss, batch)


# --- Diffrax: a neural ODE with the default adjoint ---


def _neural_ode(controller, step, **more) -> Model:
    import diffrax
    import equinox as eqx

    def loss(field, batch):
        term = diffrax.ODETerm(lambda t, y, args: field(y))

        def solve(y):
            end = diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 1.0, step, y, stepsize_controller=controller)
            return end.ys[-1]

        return jnp.mean((jax.vmap(solve)(batch["x"]) - batch["y"]) ** 2)

    def batch(rng):
        return {"x": normal(rng, (8, 16)), "y": normal(rng, (8, 16))}

    field = eqx.nn.MLP(16, 16, 32, 2, jax.nn.softplus, key=jax.random.key(0))
    return _equinox(field, loss, batch, **more)


def neural_ode_fixed_steps() -> Model:
    import diffrax

    return _neural_ode(diffrax.ConstantStepSize(), 0.125)


def neural_ode_adaptive_steps() -> Model:
    import diffrax

    reason = "the size of the steps, and with it their number, is decided by a difference of products"
    return _neural_ode(diffrax.PIDController(rtol=1e-3, atol=1e-5), None, in_float32={"while": reason})


# --- FlowJAX ---


def spline_flow() -> Model:
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow

    flow = masked_autoregressive_flow(
        jax.random.key(0),
        base_dist=Normal(jnp.zeros(8)),
        transformer=RationalQuadraticSpline(knots=5, interval=4),
        flow_layers=2,
        nn_width=32,
    )
    # Values cross the knots of splines: errors of single draws differ by a factor of two, so many are averaged.
    return _equinox(flow, lambda flow, x: -jnp.mean(flow.log_prob(x)), lambda rng: normal(rng, (32, 8)), draws=256)


# --- Haiku ---


def haiku_resnet() -> Model:
    """The statistics that normalize are those of other images: a gradient through those of eight is mostly noise."""
    import haiku as hk

    def logits(images, is_training=False):
        net = hk.nets.ResNet(
            blocks_per_group=(1, 1, 1, 1),
            num_classes=10,
            bottleneck=False,
            channels_per_group=(16, 16, 32, 32),
            use_projection=(True, True, True, True),
        )
        return net(images, is_training=is_training)

    net = hk.without_apply_rng(hk.transform_with_state(logits))
    images = normal(np.random.default_rng(0), (8, 16, 16, 3))
    params, state = fast_jit(lambda key: net.init(key, images, is_training=True))(jax.random.key(0))

    def loss(params, batch):
        return cross_entropy(net.apply(params, batch["state"], batch["images"])[0], batch["labels"])

    def batch(rng):
        return {"images": normal(rng, (8, 16, 16, 3)), "labels": integers(rng, 10, (8,)), "state": state}

    return Model(loss, at_the_boundary(loss), params, batch)


def haiku_lstm() -> Model:
    import haiku as hk

    def logits(x):
        core = hk.LSTM(32)
        return hk.Linear(10)(
            hk.dynamic_unroll(core, x, jax.tree.map(lambda s: s.astype(x.dtype), core.initial_state(8)))[0]
        )

    net = hk.without_apply_rng(hk.transform(logits))

    def loss(params, batch):
        return cross_entropy(net.apply(params, batch["x"]), batch["labels"])

    def batch(rng):
        return {"x": normal(rng, (12, 8, 16)), "labels": integers(rng, 10, (12, 8))}

    params = fast_jit(net.init)(jax.random.key(0), jnp.ones((12, 8, 16)))
    return Model(loss, at_the_boundary(loss), params, batch)


# --- jraph, with perceptrons of Haiku ---


def graph_network() -> Model:
    import haiku as hk
    import jraph

    def mlp(*features):
        return hk.nets.MLP([32, 16], activation=jax.nn.silu)(jnp.concatenate(features, -1))

    def energy(graph):
        for _ in range(2):
            graph = jraph.GraphNetwork(mlp, mlp, mlp)(graph)
        return hk.Linear(1)(graph.globals)

    def graph(nodes, edges, senders, receivers):
        each = jnp.array([8, 8, 8, 8])
        return jraph.GraphsTuple(nodes, edges, receivers, senders, jnp.zeros((4, 16), nodes.dtype), each, 2 * each)

    net = hk.without_apply_rng(hk.transform(lambda *arrays: energy(graph(*arrays))))

    def batch(rng):
        offsets = 8 * np.repeat(np.arange(4), 16)
        ends = [jnp.asarray(offsets + rng.integers(0, 8, 64)) for _ in range(2)]
        return {"graph": (normal(rng, (32, 16)), normal(rng, (64, 16)), *ends), "energy": normal(rng, (4, 1))}

    def loss(params, batch):
        return jnp.mean((net.apply(params, *batch["graph"]) - batch["energy"]) ** 2)

    params = fast_jit(net.init)(jax.random.key(0), *batch(np.random.default_rng(0))["graph"])
    return Model(loss, at_the_boundary(loss), params, batch)


# --- NumPyro ---


def bayesian_network() -> Model:
    """The evidence lower bound of a network whose weights are random variables."""
    import numpyro
    from numpyro import distributions as dist
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    def model(x, y):
        w1 = numpyro.sample("w1", dist.Normal(jnp.zeros((16, 32)), 0.25).to_event(2))
        w2 = numpyro.sample("w2", dist.Normal(jnp.zeros((32, 8)), 0.25).to_event(2))
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ w1) @ w2, 0.5).to_event(2), obs=y)

    def batch(rng):
        return normal(rng, (24, 16)), normal(rng, (24, 8))

    guide = AutoNormal(model)
    inference = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    state = inference.init(jax.random.key(0), *batch(np.random.default_rng(0)))

    def loss(params, batch):
        constrained = inference.constrain_fn(params)
        return Trace_ELBO(num_particles=2).loss(jax.random.key(1), constrained, model, guide, *batch)

    unconstrained = inference.optim.get_params(state.optim_state)
    return Model(loss, at_the_boundary(loss), unconstrained, batch)
