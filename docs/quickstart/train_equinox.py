import equinox as eqx
import jax
import optax

import jmp_lite as jmp
from digits import cross_entropy, test_x, test_y, train_x, train_y

keys = jax.random.split(jax.random.key(0))
model = eqx.nn.Sequential(
    [
        eqx.nn.Linear(64, 128, key=keys[0]),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Dropout(0.2),
        eqx.nn.Linear(128, 10, key=keys[1]),
    ]
)
params, static = eqx.partition(model, eqx.is_inexact_array)


def loss_fn(params, x, y, key):
    model = eqx.combine(params, static)
    keys = jax.random.split(key, len(x))
    logits = jax.vmap(lambda x, key: model(x, key=key))(x, keys)
    return cross_entropy(logits, y)


loss_fn = jmp.autocast(loss_fn, "mixed_float16")
tx = jmp.loss_scaled(optax.adamw(1e-2))
opt_state = tx.init(params)


@eqx.filter_jit(donate="all-except-first")
def train_step(data, params, opt_state):
    value_and_grad = jmp.scaled_value_and_grad(loss_fn, loss_scale=opt_state)
    loss, grads = value_and_grad(params, *data)
    params, opt_state = jmp.apply_gradients(tx, grads, opt_state, params)
    return params, opt_state, loss


for step in range(100):
    data = train_x, train_y, jax.random.key(step)
    params, opt_state, loss = train_step(data, params, opt_state)

model = eqx.nn.inference_mode(eqx.combine(params, static))
accuracy = (jax.vmap(model)(test_x).argmax(-1) == test_y).mean()
print(f"loss {loss:.3f}, test accuracy {accuracy:.3f}")
