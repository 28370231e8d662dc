"""Draws the pictures of the README and of the first pages.

- ``docs/_static/digits.png``: the curves of ``examples/digits.py``.
- ``docs/_static/ranges.png``: gradients of a trained model, and what float16 keeps of them.

python docs/pictures.py
"""

import functools
import pathlib
import subprocess
import sys
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jmp_lite as jmp

DOCS = pathlib.Path(__file__).parent
PICTURES = DOCS / "_static"
STEPS = 2000


def digits() -> None:
    """Trains a small ResNet in three precisions."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, DOCS.parent / "examples/digits.py", "--output", folder], check=True)
        (PICTURES / "digits.png").write_bytes((pathlib.Path(folder) / "digits.png").read_bytes())


def ranges() -> None:
    """Trains a perceptron on handwritten digits in float32, and counts its gradients."""
    x, y = map(jnp.asarray, load_digits(return_X_y=True))
    model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(10)])
    params, tx = model.init(jax.random.key(0), x[:1]), optax.adamw(3e-3)

    def loss_fn(params: object) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x / 16), y).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: object, state: object) -> object:
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    grads = jax.grad(loss_fn)(params)["params"]
    del grads["layers_2"]["bias"]  # ten numbers
    found = jmp.analysis.ranges(grads, "gradient")
    print(found.table("float16"), *jmp.analysis.diagnose(found), sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        [picture] = jmp.analysis.report(found).save_png(folder)
        (PICTURES / "ranges.png").write_bytes(picture.read_bytes())


if __name__ == "__main__":
    digits()
    ranges()
