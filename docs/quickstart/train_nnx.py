import optax
from flax import nnx

import jmp_lite as jmp
from digits import cross_entropy, test_x, test_y, train_x, train_y


class Net(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.BatchNorm(128, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(self.body(x)))))


def loss_fn(model, x, y):
    return cross_entropy(model(x), y)


loss_fn = jmp.nnx.autocast(loss_fn, "mixed_float16")
model = Net(nnx.Rngs(0))
tx = jmp.loss_scaled(optax.adamw(1e-2))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, x, y):
    value_and_grad = jmp.nnx.scaled_value_and_grad(loss_fn, loss_scale=optimizer)
    loss, grads = value_and_grad(model, x, y)
    optimizer.update(model, grads)
    return loss


for _ in range(100):
    loss = train_step(model, optimizer, train_x, train_y)

model.eval()
accuracy = (model(test_x).argmax(-1) == test_y).mean()
print(f"loss {loss:.3f}, test accuracy {accuracy:.3f}")
