"""Models that others wrote, in mixed precision: what autocast promises holds for them too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import decoding, measure, minilm
from zoo.table import MODELS

import jmp_lite as jmp
from jmp_lite import analysis

# Packages warn of what they will remove; such warnings are theirs to heed.
pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]
BF16, FP16 = measure.BF16, measure.FP16
autocast = functools.partial(jmp.autocast, policy=BF16)
# With `--dist=loadgroup` one process runs the tests of a model, which share its errors.
grouped = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in MODELS]
each_model = pytest.mark.parametrize("name", grouped)


@functools.cache
def errors(name):
    """The errors of a model's gradients; computed once for the tests of one process."""
    return measure.errors(MODELS[name]())


# --- Gradients ---


@each_model
def test_every_product_of_the_gradient_is_low(name):
    model = MODELS[name]()
    found = measure.products(jax.grad(autocast(model.loss)), *model.draw(0))
    assert found
    assert measure.left_in_float32(found, model.in_float32) == []


@each_model
def test_the_gradient_in_bfloat16_is_as_good_as_the_models_own(name):
    assert errors(name)[BF16] <= 1.1 * errors(name)["own"]


@each_model
def test_the_gradient_in_float16_is_finite_and_better_than_in_bfloat16(name):
    assert np.isfinite(errors(name)[FP16])
    # All in float32, as rightly in some loops, both errors are zero.
    assert errors(name)[FP16] < errors(name)[BF16] or errors(name)[BF16] == errors(name)[FP16] == 0


@each_model
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_an_audit_finds_nothing_wrong(name, policy):
    """But that the test of an adaptive step depends on everything, so that nothing can be lower."""
    model = MODELS[name]()
    found = jmp.analysis.audit(model.loss, policy)(*model.draw(0)).findings
    kinds = {finding.kind for finding in found if finding.severity != "note"}
    assert kinds == ({"nothing-low"} if "adaptive" in name else set())


# --- Text of GPT-2 ---


decoder = functools.cache(decoding.decoder)
each_way = pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])


@each_way
def test_every_product_of_generating_is_low(sample):
    generate = autocast(functools.partial(decoder().generate, sample=sample))
    found = measure.products(generate, decoder().params, decoder().prompts)
    assert any("while" in product.scope.split("/") for product in found)
    assert measure.left_in_float32(found, {}) == []


@each_way
def test_the_text_is_that_of_float32_where_tokens_are_not_tied(sample):
    exact, found = (decoding.tokens(decoder(), cast, sample=sample) for cast in (lambda fun: fun, autocast))
    assert len(np.unique(exact[:, decoding.LENGTH :])) > 8
    for difference in decoding.differences(decoder(), autocast, exact, found, sample=sample):
        assert difference.rounding < 0.02 * difference.largest
        assert 0 <= difference.gap <= 2 * difference.rounding


# --- Vectors of MiniLM ---


@pytest.mark.skipif(not minilm.installed(), reason=f"needs {minilm.PACKAGE}, which `nox -s zoo` installs")
def test_vectors_of_trained_weights():
    lm = minilm.load()
    exact, own, found = (minilm.vectors(lm, encode) for encode in (lm.encode, lm.own, autocast(lm.encode)))
    ours, theirs = minilm.likeness(exact, found), minilm.likeness(exact, own)
    assert ours.mean_cosine >= theirs.mean_cosine - 1e-4
    assert ours.least_cosine >= theirs.least_cosine - 1e-4
    assert ours.same_nearest >= 0.97


@pytest.mark.skipif(not minilm.installed(), reason=f"needs {minilm.PACKAGE}, which `nox -s zoo` installs")
def test_vectors_of_quantized_weights():
    """Of activations with outliers, in 8 bits; and of weights in 4, that are rounded to nearest or compensated."""
    lm = minilm.load()
    exact = minilm.vectors(lm, lm.encode)

    def found(model):
        return minilm.likeness(exact, minilm.vectors(model, model.encode))

    smoothed = found(minilm.with_recipe(minilm.smoothed(lm, 0.5), "w8a8"))
    assert smoothed.mean_cosine >= 0.998
    assert smoothed.mean_cosine >= found(minilm.with_recipe(lm, "w8a8")).mean_cosine
    compensated = found(minilm.compensated(lm, "int4:tile128"))
    assert compensated.mean_cosine >= 0.97
    assert compensated.mean_cosine >= found(minilm.with_recipe(lm, "w4a16")).mean_cosine + 0.02


@pytest.mark.skipif(not minilm.installed(), reason=f"needs {minilm.PACKAGE}, which `nox -s zoo` installs")
def test_layers_with_outliers_are_kept_from_8_bits():
    lm = minilm.load()
    batches = minilm.texts_in_batches(lm)
    found = analysis.recommend(minilm.contrast(lm), lm.params, batches, tolerance=0.05, formats=("w8a8", "bfloat16"))
    formats = {line.scope.partition("layer/")[2]: line.format for line in found.lines}
    peaks = minilm.peaks(lm, *batches[0])
    layers = sorted(peaks, key=peaks.__getitem__)
    assert {formats[layer] for layer in layers[-4:]} == {"bfloat16"}
    assert {formats[layer] for layer in layers[:4]} == {"w8a8"}
    assert found.error <= 0.05


# --- Arrays of qwix ---


@pytest.mark.parametrize("tiled_axes", [{}, {0: 16}])
def test_arrays_of_qwix_are_taken_over(tiled_axes):
    qwix = pytest.importorskip("qwix")
    kernel = jax.random.normal(jax.random.key(0), (64, 8))
    theirs = qwix.quantize(kernel, "int8", channelwise_axes=[1], tiled_axes=tiled_axes)
    ours = jmp.quant.QuantizedArray(theirs.qvalue, theirs.scale.astype(jnp.float32))
    np.testing.assert_allclose(ours.dequantize(), qwix.dequantize(theirs), rtol=2**-23)
