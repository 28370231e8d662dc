"""What verdicts on gradients and updates look at, leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support.comparisons import compiled_as_on, mesh

import jmp_lite as jmp
from jmp_lite import errors
from jmp_lite.scaling import _verdict

# The dtype of each leaf and which elements are finite, and whether that looks finite without a pass over memory.
LEAVES = {
    "all elements of 16 bits": ([(jnp.bfloat16, [1, 1, 0])], False),
    "float32 beside a smaller leaf of 16 bits": ([(jnp.float16, [1]), (jnp.float32, [0, 0])], False),
    "float32 beside no elements": ([(jnp.float32, []), (jnp.float32, [0, 0])], False),
    "the smallest of float32 for all": ([(jnp.float32, [0, 0]), (jnp.float32, [1])], True),
    "a small leaf of float32": ([(jnp.float32, [0] * _verdict.SMALL_LEAF)], False),
    "a large leaf of float32": ([(jnp.float32, [0] * (_verdict.SMALL_LEAF + 1))], True),
}


@pytest.mark.parametrize(("leaves", "looks_finite"), LEAVES.values(), ids=LEAVES)
def test_what_is_looked_at_to_count_updates(leaves, looks_finite):
    seen = [(jnp.dtype(dtype), jnp.asarray(np.array(finite, bool))) for dtype, finite in leaves]
    assert bool(_verdict.watched(seen)) == looks_finite


def test_integers_have_no_say():
    """Nothing unscales them; multiplied as gradients are, these would be infinite."""
    grads = {"w": jnp.full(3, 2.0**-100), "n": jnp.full(3, 2**30)}
    assert _verdict.judge(grads, jmp.StaticLossScale(2.0**-100), None)


def like(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("most", [1, 2, 3, 5, 6])
def test_groups_are_of_one_kind_and_no_larger_than_they_may_be(most):
    kinds = "abcabaaa"
    groups = _verdict._grouped(list(kinds), str, most)
    assert sorted("".join(group) for group in groups) == sorted(
        kind * n
        for kind, count in (("a", 5), ("b", 2), ("c", 1))
        for n in [most] * (count // most) + [count % most] * (count % most > 0)
    )
    assert "".join(groups[0]) == "a" * min(most, 5)


LIMIT = _verdict.SMALL_LEAF
#: Sizes of the leaves of bfloat16 and of float32, and how many elements each kernel reads of each leaf.
KERNELS = {
    "tpu": ([1], [1] * 17 + [LIMIT, LIMIT + 1, LIMIT + 1], [[1], [1] * 16, [1, LIMIT], [LIMIT + 1], [LIMIT + 1]]),
    "cuda": ([LIMIT + 1], [1] * 1025 + [LIMIT + 1] * 33, [[LIMIT + 1], [1] * 1024, [1], [LIMIT + 1] * 32, [LIMIT + 1]]),
    "cpu": ([1], [1, LIMIT + 1, LIMIT + 1], [[1], [1], [LIMIT + 1], [LIMIT + 1]]),
}


@pytest.mark.parametrize("platform", KERNELS)
def test_which_leaves_a_kernel_checks_together(platform, monkeypatch):
    """Each leaf is read once."""
    narrow, wide, expected = KERNELS[platform]
    seen = []

    def record(leaves, bound, holds=None):
        seen.append([x.size for x in leaves])
        return jnp.array(True)

    monkeypatch.setattr(_verdict, "_are_below", record)
    monkeypatch.setattr(_verdict, "_are_small_below", record)
    grads = [like((n,), jnp.bfloat16) for n in narrow] + [like((n,)) for n in wide]
    judge = lambda grads: _verdict.judge(grads, jmp.NoOpLossScale(), None)  # noqa: E731
    with compiled_as_on(platform):
        jax.eval_shape(jax.shard_map(judge, mesh=mesh(), in_specs=P(), out_specs=P()), grads)
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 64, 65])
def test_every_element_of_small_leaves_counts(size):
    """However they are folded."""
    good = np.ones(size, np.float32)
    assert bool(_verdict._are_small_below([good], jnp.float32(2)))
    for at in range(size):
        bad = good.copy()
        bad[at] = 2
        assert not bool(_verdict._are_small_below([bad], jnp.float32(2)))


#: A dtype of gradients, and half of the largest number of what their squares are added up in.
BOUNDED = dict.fromkeys(("float32", "bfloat16", "float16", "complex64"), 2.0**127) | {"float64": 2.0**1023}


@pytest.mark.parametrize("dtype", BOUNDED)
@pytest.mark.parametrize("elements", [1, 2, 1000])
def test_gradients_are_bounded_in_the_dtype_that_they_are_judged_in(dtype, elements):
    """Scaled as they are."""
    with jax.enable_x64(True):
        bound = _verdict._bound(jnp.float32(8), jnp.dtype(dtype), elements)
    assert bound.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    np.testing.assert_allclose(float(bound), 8 * BOUNDED[dtype] ** 0.5 / elements**0.5, rtol=1e-6)


AXES = {
    "none": ((), (), None),
    "that of an ensemble": (("a",), ("a",), None),
    "one": (("data",), (), r"Devices along 'data' see .* to jump\. Write step\('data'\)\.$"),
    "two": (("b", "a"), (), r"Devices along 'a' and 'b' see .* to jump\. Write step\(\('a', 'b'\)\)\.$"),
    "another than that of an ensemble": (("a", "b"), ("a",), r"Devices along 'b' see .* Write step\('b'\)\.$"),
}


@pytest.mark.parametrize("case", AXES)
def test_axes_that_were_forgotten_are_named(case, monkeypatch):
    of_verdict, of_scale, message = AXES[case]
    verdict, scale = jnp.array(True), jnp.float32(8)
    monkeypatch.setattr(_verdict, "varying_axes", lambda x: frozenset(of_verdict if x.dtype == jnp.bool_ else of_scale))
    if message is None:
        _verdict.refuse_forgotten_axes(verdict, scale, "jump", "step({})")
        return
    with pytest.raises(errors.MissingAxisError, match=message):
        _verdict.refuse_forgotten_axes(verdict, scale, "jump", "step({})")
