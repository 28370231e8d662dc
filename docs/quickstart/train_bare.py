import functools

import jax
import jax.numpy as jnp
import optax

import jmp_lite as jmp
from digits import cross_entropy, test_x, test_y, train_x, train_y


def init(key):
    keys = jax.random.split(key)
    return {
        "hidden": jax.random.normal(keys[0], (64, 128)) / 8,
        "bias": jnp.zeros(128),
        "head": jax.random.normal(keys[1], (128, 10)) / 12,
    }


def forward(params, x):
    return jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["head"]


def loss_fn(params, x, y):
    return cross_entropy(forward(params, x), y)


loss_fn = jmp.autocast(loss_fn, "mixed_float16")
params = init(jax.random.key(0))
tx = jmp.loss_scaled(optax.adamw(1e-2))
opt_state = tx.init(params)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, opt_state, x, y):
    value_and_grad = jmp.scaled_value_and_grad(loss_fn, loss_scale=opt_state)
    loss, grads = value_and_grad(params, x, y)
    params, opt_state = jmp.apply_gradients(tx, grads, opt_state, params)
    return params, opt_state, loss


for _ in range(100):
    params, opt_state, loss = train_step(params, opt_state, train_x, train_y)

accuracy = (forward(params, test_x).argmax(-1) == test_y).mean()
print(f"loss {loss:.3f}, test accuracy {accuracy:.3f}")
