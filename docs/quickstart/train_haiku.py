import functools

import haiku as hk
import jax
import optax

import jmp_lite as jmp
from digits import cross_entropy, test_x, test_y, train_x, train_y


def forward(x, is_training):
    x = hk.Linear(128)(x)
    x = hk.BatchNorm(True, True, decay_rate=0.9)(x, is_training)
    x = jax.nn.relu(x)
    if is_training:
        x = hk.dropout(hk.next_rng_key(), 0.2, x)
    return hk.Linear(10)(x)


model = hk.transform_with_state(forward)
params, statistics = model.init(jax.random.key(0), train_x, True)


def loss_fn(params, statistics, x, y, key):
    logits, statistics = model.apply(params, statistics, key, x, True)
    return cross_entropy(logits, y), statistics


loss_fn = jmp.autocast(loss_fn, "mixed_float16")
tx = jmp.loss_scaled(optax.adamw(1e-2))
opt_state = tx.init(params)


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def train_step(params, statistics, opt_state, data):
    grad_fn = jmp.scaled_value_and_grad(loss_fn, has_aux=True, loss_scale=opt_state)
    (loss, seen), grads = grad_fn(params, statistics, *data)
    params, opt_state = jmp.apply_gradients(tx, grads, opt_state, params)
    # A step that overflowed may have seen infinite activations.
    good = jmp.metrics(opt_state)["last_finite"]
    return params, jmp.select_tree(good, seen, statistics), opt_state, loss


for step in range(100):
    data = train_x, train_y, jax.random.key(step)
    params, statistics, opt_state, loss = train_step(
        params, statistics, opt_state, data
    )

logits, _ = model.apply(params, statistics, None, test_x, False)
print(f"loss {loss:.3f}, test accuracy {(logits.argmax(-1) == test_y).mean():.3f}")
