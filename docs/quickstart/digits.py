"""Handwritten digits, and the loss that all tabs share."""

import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

x, y = load_digits(return_X_y=True)
split = train_test_split(x / 16, y, random_state=0)
train_x, test_x, train_y, test_y = map(jnp.asarray, split)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
