import functools
from typing import Any

import flax.linen as nn
import jax
import optax
from flax.training.train_state import TrainState

import jmp_lite as jmp
from digits import cross_entropy, test_x, test_y, train_x, train_y


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(128)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return nn.Dense(10)(x)


class State(TrainState):
    batch_stats: Any


model = Net()
variables = model.init(jax.random.key(0), train_x, train=False)
tx = jmp.loss_scaled(optax.adamw(1e-2))
state = State.create(apply_fn=model.apply, tx=tx, **variables)


def loss_fn(params, batch_stats, x, y, key):
    logits, updated = model.apply(
        {"params": params, "batch_stats": batch_stats},
        x,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": key},
    )
    return cross_entropy(logits, y), updated["batch_stats"]


loss_fn = jmp.autocast(loss_fn, "mixed_float16")


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, x, y):
    key = jax.random.fold_in(jax.random.key(1), state.step)
    grad_fn = jmp.scaled_value_and_grad(loss_fn, has_aux=True, loss_scale=state)
    (loss, seen), grads = grad_fn(state.params, state.batch_stats, x, y, key)
    old, state = state.batch_stats, state.apply_gradients(grads=grads)
    # A step that overflowed may have seen infinite activations.
    good = jmp.metrics(state.opt_state)["last_finite"]
    return state.replace(batch_stats=jmp.select_tree(good, seen, old)), loss


for _ in range(100):
    state, loss = train_step(state, train_x, train_y)

variables = {"params": state.params, "batch_stats": state.batch_stats}
accuracy = (model.apply(variables, test_x, train=False).argmax(-1) == test_y).mean()
print(f"loss {loss:.3f}, test accuracy {accuracy:.3f}")
