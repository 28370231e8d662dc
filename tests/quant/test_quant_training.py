"""Training with 8 bits and with pruned weights is as good as with float32: the models of ``examples/lowbit.py``."""

import os
import pathlib
import statistics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer

from jmp_lite._tree import path_string

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
SEEDS = range(5)
STEPS = 300


@pytest.fixture
def example(monkeypatch):
    """Imports a file of the examples into this process."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield __import__


@pytest.fixture
def compare(example, tmp_path):
    """Trains a model in some variants from some seeds; returns results and parameters of each, by variant."""
    Run = example("_lowbit_training").Run

    def compare(model, names, seeds):
        compared = {}
        for name in names:
            run, outcomes = Run(model, name, STEPS), []
            source = run.variant.trained_as or name
            for i, seed in enumerate(seeds):
                data, losses = model.load(seed), []
                if source == name:
                    *_, (params, losses) = run.train(data, seed)
                else:
                    params = compared[source][i][1]
                outcomes.append((run.measure(params, losses, data, tmp_path), params))
            compared[name] = outcomes
            scores = [result.score for result, _ in outcomes]
            print(  # pytest shows it with -s, and where the test fails
                f"{name:10} {statistics.mean(scores):.4f} +- {np.std(scores, ddof=1):.4f}, "
                f"{outcomes[0][0].num_bytes} bytes, {outcomes[0][0].zeros:.1%} zero:",
                *(f"{score:.4f}" for score in scores),
            )
        return compared

    return compare


def mean(outcomes):
    return statistics.mean(result.score for result, _ in outcomes)


def pruned_kernels(example, params):
    """The kernels that the example prunes, as NumPy arrays."""
    is_kernel = example("_lowbit_variants").is_kernel
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return [np.asarray(leaf) for path, leaf in leaves if is_kernel(path_string(path), leaf)]


def assert_sparse(example, compared, count):
    """80 % of each kernel is zero, to the element; 2 of 4 inputs in each group of the other."""
    for _, params in compared["sparse_80"]:
        kernels = pruned_kernels(example, params)
        assert len(kernels) == count
        assert [np.sum(kernel == 0) for kernel in kernels] == [round(0.8 * kernel.size) for kernel in kernels]
    for _, params in compared["sparse_2_4"]:
        kernels = pruned_kernels(example, params)
        assert len(kernels) == count
        for kernel in kernels:
            groups = kernel.reshape(-1, kernel.shape[-2] // 4, 4, kernel.shape[-1])
            assert (np.count_nonzero(groups, axis=2) == 2).all()


@pytest.mark.soak
def test_digits_are_recognized_as_well_as_with_float32(example, compare):
    """Mean of 5 seeds: 8 bits within a point, at least 3.7 times smaller; pruned within two."""
    compared = compare(example("_lowbit_models").MODELS["digits"], example("_lowbit_variants").VARIANTS, SEEDS)
    reference = mean(compared["fp32"])
    assert reference > 0.97
    for name in ("bf16", "fp8", "int8_qat", "w8a16", "w8a8"):
        assert mean(compared[name]) > reference - 0.01, name
    for name in ("fp8", "int8_qat", "w8a16", "w8a8"):
        assert compared["fp32"][0][0].num_bytes / compared[name][0][0].num_bytes >= 3.7
    for name in ("sparse_80", "sparse_2_4"):
        assert mean(compared[name]) > reference - 0.02, name
    assert_sparse(example, compared, count=2)


# --- A second data set ------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """float[n, 32] -> logits, float[n, 2]."""

    @nn.compact
    def __call__(self, x):
        for width in (128, 128):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(2)(x)


def tumours(models, digits_data):
    """Malignant or benign, from 30 measurements; half of the samples are for testing."""

    def load(seed):
        features, labels = load_breast_cancer(return_X_y=True)
        train, test = np.array_split(np.random.default_rng(seed).permutation(len(labels)), 2)
        features = (features - features[train].mean(0)) / features[train].std(0)
        features = np.pad(features, ((0, 0), (0, 2))).astype(np.float32)  # groups of 4
        labels = labels.astype(np.int32)

        def batch(step):
            return digits_data.batch(features[train], labels[train], size=32, step=step, seed=seed)

        return models.Data(batch, (features[test], labels[test]))

    return models.MODELS["digits"]._replace(
        load=load,
        init=jax.jit(lambda key: MLP().init(key, jnp.zeros((1, 32)))["params"]),
        loss=lambda params, batch: models.cross_entropy(MLP(), params, batch),
        score=lambda params, batch: models.accuracy(MLP(), params, batch),
    )


@pytest.mark.soak
def test_tumours_are_recognized_as_well_as_with_float32(example, compare):
    model = tumours(example("_lowbit_models"), example("_digits_data"))
    compared = compare(model, example("_lowbit_variants").VARIANTS, SEEDS)
    reference = mean(compared["fp32"])
    assert reference > 0.95
    for name in ("bf16", "fp8", "int8_qat", "w8a16", "w8a8"):
        assert mean(compared[name]) > reference - 0.01, name
    for name in ("sparse_80", "sparse_2_4"):
        assert mean(compared[name]) > reference - 0.02, name
    assert_sparse(example, compared, count=2)


# --- Text -------------------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_text_is_predicted_as_well_as_with_bfloat16(example, compare):
    """Held-out loss with float8 matmuls, those of attention included, within 2 %."""
    compared = compare(example("_lowbit_models").MODELS["gpt"], ("bf16", "fp8"), (0, 1))
    for (bf16, _), (fp8, _) in zip(compared["bf16"], compared["fp8"], strict=True):
        assert bf16.score < 2.6  # characters, each as likely as it is frequent: 3.1
        assert fp8.score < 1.02 * bf16.score
