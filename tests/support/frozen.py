"""The model that the tests of export freeze."""

from flax import linen as nn


class MLP(nn.Module):
    """Two layers and a softmax, of which autocast does something different each."""

    @nn.compact
    def __call__(self, x):
        return nn.softmax(nn.Dense(8)(nn.LayerNorm()(nn.relu(nn.Dense(64)(x)))))
