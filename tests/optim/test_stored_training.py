"""What is stored trains like float32: torch's recorded runs, second moments over thousands of steps, and a long run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparisons import DATA, read_json, standard

import jmp_lite as jmp
from jmp_lite.optim import stored
from jmp_lite.optim._stored import decoded

BFLOAT16 = jnp.bfloat16


def scanned(step, carry, inputs):
    """Steps with the promotion that Optax needs."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(functools.partial(jax.lax.scan, step))(carry, inputs)


# --- torch ----------------------------------------------------------------------------------------


@functools.cache
def recorded():
    data = dict(np.load(DATA / "mlp_data.npz"))
    params = {name.removeprefix("init_"): jnp.asarray(data[name]) for name in data if name.startswith("init_")}
    return params, jnp.asarray(data["X"]), jnp.asarray(data["Y"], jnp.int32), jnp.asarray(data["IDX"], jnp.int32)


def cross_entropy(params, x, y):
    """In the dtype of the parameters, with logits in float32."""
    dtype = params["w1"].dtype

    def dense(x, kernel, bias):
        return x.astype(dtype) @ params[kernel] + params[bias][None]

    h = jax.nn.relu(dense(x, "w1", "b1")).astype(jnp.float32)
    h = jax.nn.standardize(h, epsilon=1e-5) * params["g"].astype(jnp.float32)[None]
    h = jax.nn.relu(dense(h + params["be"].astype(jnp.float32)[None], "w2", "b2"))
    logits = dense(h, "w3", "b3").astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def final_loss(params, state, seed=0):
    """The loss on all of the data after 300 steps of Adam at a rate of 1e-4."""
    tx = standard(optax.adam(1e-4))
    weights, x, y, rows = recorded()
    if params != "float32":
        tx = stored(tx, params=params, state=state, seed=seed)
        seen, opt_state = jmp.optim.from_full_precision(tx, weights)
    else:
        seen, opt_state = weights, tx.init(weights)

    def step(carry, rows):
        params, state = carry
        grads = jax.grad(cross_entropy)(params, x[rows], y[rows])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (seen, _), _ = scanned(step, (seen, opt_state), rows)
    return float(cross_entropy(seen, x, y))


@pytest.mark.parametrize(
    ("params", "state", "run"),
    [
        pytest.param("float32", "float32", "fp32", marks=pytest.mark.slow),
        pytest.param("nearest", "float32", "bf16", marks=pytest.mark.slow),
        pytest.param("split16", "float32", "kahan", marks=pytest.mark.slow),
        pytest.param("split8", "float32", "kahan", marks=pytest.mark.slow),
        ("stochastic", "float32", "sr1"),
    ],
)
def test_final_loss_is_that_of_torch(params, state, run):
    """Within 0.005: torch in float32 has 2.042, with bfloat16 rounded to nearest it stalls at 2.345."""
    assert abs(final_loss(params, state) - read_json("torch_sr_kahan.json")[run]["full"]) < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("params", ["split8", "stochastic"])
def test_final_loss_with_moments_of_8_bits(params):
    """Steps are 4 to 5 % longer in the mean, so as much further on the way down from 2.576; it shows at a low rate."""
    exact = read_json("torch_sr_kahan.json")["fp32"]["full"]
    assert abs(final_loss(params, "8bit") - exact) < 0.05 * (2.5758 - exact)


# --- Second moments -------------------------------------------------------------------------------

SIZE = 4096


def sizes(rng):
    return 10.0 ** rng.uniform(-4, 0, SIZE)


SOURCES = {
    "normal": (lambda rng, n: 1e-2 * rng.standard_normal((n, SIZE)), 0.03),
    "sparse": (lambda rng, n: 1e-2 * rng.standard_normal((n, SIZE)) * (rng.random((n, SIZE)) < 0.02), 0.03),
    "decades": (lambda rng, n: sizes(rng) * rng.standard_normal((n, SIZE)), 0.03),
    "100 times smaller": (
        lambda rng, n: sizes(rng) * rng.standard_normal((n, SIZE)) * np.where(np.arange(n) < n // 2, 1, 0.01)[:, None],
        0.10,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_second_moments_are_right_on_average(source, rng):
    """After 3000 steps: the root of what is stored over that of float32, in the geometric mean; none is lost.

    Sizes of gradients lie in the range of the format; no step is more than twice as long as the longest of float32.
    """
    make, limit = SOURCES[source]
    grads = jnp.asarray(make(rng, 3000), jnp.float32)
    inner = standard(optax.adam(1.0))
    tx = stored(inner, params="split8", state="8bit")
    params = jnp.zeros(SIZE, BFLOAT16)

    def step(carry, grads):
        state, full_state = carry
        updates, full_state = inner.update(grads, full_state, jnp.zeros(SIZE))
        own, _ = inner.update(grads, decoded(state.inner_state, state.layout), jnp.zeros(SIZE))
        _, state = tx.update(grads, state, params)
        return (state, full_state), (jnp.max(jnp.abs(own)), jnp.max(jnp.abs(updates)))

    (state, full_state), (longest, longest_full) = scanned(step, (tx.init(params), inner.init(jnp.zeros(SIZE))), grads)
    found = np.float64(decoded(state.inner_state, state.layout)[0].nu)
    exact = np.float64(full_state[0].nu)
    in_range = exact > 2.0**-54
    assert np.mean(in_range) > 0.9
    assert np.all(found[in_range] > 0)
    ratio = np.sqrt(found[in_range & (found > 0)] / exact[in_range & (found > 0)])
    assert abs(np.exp(np.mean(np.log(ratio))) - 1) < limit
    # The first steps are Adam's own: there moments are a few gradients.
    assert np.max(longest) <= 2 * np.max(longest_full)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decay", "name", "limit"),
    [(0.9, "slog", 0.22), (0.99, "slog", 0.65), (0.999, "bfloat16", 0.07), (0.9999, "bfloat16", 0.25)],
)
def test_noise_of_averages(decay, name, limit):
    """Of gradients without a mean, relative to the average itself."""
    inner, params = optax.ema(decay, debias=False), jnp.zeros(SIZE, BFLOAT16)
    tx = stored(inner, params="split8", state={"ema": name})

    def step(carry, key):
        state, full_state = carry
        grads = 1e-3 * jax.random.normal(key, (SIZE,))
        return (tx.update(grads, state, params)[1], inner.update(grads, full_state)[1]), None

    keys = jax.random.split(jax.random.key(0), min(round(6 / (1 - decay)), 20_000))
    (state, full_state), _ = scanned(step, (tx.init(params), inner.init(jnp.zeros(SIZE))), keys)
    noise = decoded(state.inner_state, state.layout).ema - full_state.ema
    assert jnp.std(noise) < limit * jnp.std(full_state.ema)


# --- A long run -----------------------------------------------------------------------------------


def student(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"][None]) @ params["w2"]


ROWS = 64


@functools.cache
def weights(seed):
    """Those of the teacher, and those that the student begins with."""
    rng = np.random.default_rng(seed)
    return tuple(
        {
            "w1": jnp.asarray(rng.standard_normal((16, 64)) / 4, jnp.float32),
            "b1": jnp.zeros(64),
            "w2": jnp.asarray(rng.standard_normal((64, 4)) / 8, jnp.float32),
        }
        for _ in range(2)
    )


def loss_after(params, state, steps, seed):
    """Of a student on new noisy examples, and on the same without the noise."""
    truth, start = weights(seed)
    tx = standard(optax.adam(optax.linear_schedule(5e-4, 0.0, steps)))
    if params != "float32":
        tx = stored(tx, params=params, state=state, seed=seed % 2**32)
        seen, opt_state = jmp.optim.from_full_precision(tx, start)
    else:
        seen, opt_state = start, tx.init(start)

    def loss_fn(params, x, noise):
        return jnp.mean((student(jmp.cast_to_full(params), x) - student(truth, x) - noise) ** 2)

    def step(carry, key):
        params, state = carry
        x, noise = (jax.random.normal(k, (ROWS, n)) for k, n in zip(jax.random.split(key), (16, 4), strict=True))
        updates, state = tx.update(jax.grad(loss_fn)(params, x, 0.1 * noise), state, params)
        return (optax.apply_updates(params, updates), state), None

    (seen, opt_state), _ = scanned(step, (seen, opt_state), jax.random.split(jax.random.key(seed), steps))
    full = seen if params == "float32" else jmp.optim.full_precision_params(opt_state, seen)
    x, noise = (jax.random.normal(jax.random.key(seed + 1), (4096, n)) for n in (16, 4))
    return float(loss_fn(full, x, 0.1 * noise)), float(loss_fn(full, x, 0.0))


@pytest.mark.slow
def test_twenty_thousand_steps(seed):
    """At a rate at which bfloat16 rounded to nearest stalls, 8 bits end within 5 % of float32."""
    exact, excess = loss_after("float32", "float32", 20_000, seed)
    assert loss_after("nearest", "float32", 20_000, seed)[1] > 3 * excess
    for params in ("split8", "stochastic"):
        found, more = loss_after(params, "8bit", 20_000, seed)
        assert abs(found / exact - 1) < 0.05, (params, found, exact)
        assert more < 1.05 * excess, (params, more, excess)
