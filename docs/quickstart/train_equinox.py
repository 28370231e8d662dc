import equinox as eqx
import jax
import optax

import jmp_lite as jmp
from digits import cross_entropy, test_x, test_y, train_x, train_y

model = eqx.nn.MLP(64, 10, width_size=128, depth=1, key=jax.random.key(0))
params, static = eqx.partition(model, eqx.is_inexact_array)


def loss_fn(params, x, y):
    return cross_entropy(jax.vmap(eqx.combine(params, static))(x), y)


loss_fn = jmp.autocast(loss_fn, "mixed_float16")
tx = jmp.loss_scaled(optax.adamw(1e-2))
opt_state = tx.init(params)


@eqx.filter_jit(donate="all-except-first")
def train_step(data, params, opt_state):
    value_and_grad = jmp.scaled_value_and_grad(loss_fn, loss_scale=opt_state)
    loss, grads = value_and_grad(params, *data)
    params, opt_state = jmp.apply_gradients(tx, grads, opt_state, params)
    return params, opt_state, loss


for _ in range(100):
    params, opt_state, loss = train_step((train_x, train_y), params, opt_state)

model = eqx.combine(params, static)
accuracy = (jax.vmap(model)(test_x).argmax(-1) == test_y).mean()
print(f"loss {loss:.3f}, test accuracy {accuracy:.3f}")
