import functools

import flax.linen as nn
import jax
import optax
from flax.training.train_state import TrainState

import jmp_lite as jmp
from digits import cross_entropy, test_x, test_y, train_x, train_y

model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(10)])
params = model.init(jax.random.key(0), train_x)
tx = jmp.loss_scaled(optax.adamw(1e-2))
state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def loss_fn(params, x, y):
    return cross_entropy(model.apply(params, x), y)


loss_fn = jmp.autocast(loss_fn, "mixed_float16")


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, x, y):
    value_and_grad = jmp.scaled_value_and_grad(loss_fn, loss_scale=state.opt_state)
    loss, grads = value_and_grad(state.params, x, y)
    return state.apply_gradients(grads=grads), loss


for _ in range(100):
    state, loss = train_step(state, train_x, train_y)

accuracy = (model.apply(state.params, test_x).argmax(-1) == test_y).mean()
print(f"loss {loss:.3f}, test accuracy {accuracy:.3f}")
