"""The model of fusion, beside bytes and launches counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jmp_lite.analysis._estimation._dataflow import dataflow
from jmp_lite.analysis._estimation._launches import launches

N = 64
SIZE, ROW = N * N * 4, N * 4
STEPS = 8


def f32(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def i32(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.int32)


X = f32(N, N)
VECTOR = f32(N)


def of(fun, *shapes):
    return list(launches(dataflow(jax.make_jaxpr(fun)(*shapes))))


def total(found):
    return sum(launch.bytes * launch.trips for launch in found), sum(launch.trips for launch in found)


def softmax(x):
    exponential = jnp.exp(x - x.max(-1, keepdims=True))
    return exponential / exponential.sum(-1, keepdims=True)


def stacked(x, ws):
    return lax.scan(lambda x, w: (x @ w, None), x, ws)[0]


def with_states(x, ws):
    return lax.scan(lambda x, w: (x @ w, x @ w), x, ws)


def picked(table, index):
    return table.at[index].get(mode="promise_in_bounds")


CASES = {
    "a chain of elementwise functions is one launch": (lambda x: jnp.tanh(x) * 2 + 1, [X], 2 * SIZE, 1),
    "a sum takes in what it adds up": (lambda x: jnp.sum(jnp.square(x)), [X], SIZE + 4, 1),
    "siblings read what they share once": (lambda x: (x * 2, x + 1), [X], 3 * SIZE, 1),
    "a matmul reads both operands": (lambda x, w: x @ w, [X, X], 3 * SIZE, 1),
    "bias and residual are part of a product": (
        lambda x, w, b, r: x @ w + b[None] + r,
        [X, X, VECTOR, X],
        4 * SIZE + ROW,
        1,
    ),
    "an activation is not": (lambda x, w: jnp.tanh(x @ w), [X, X], 5 * SIZE, 2),
    "a transpose is read as it lies by a product": (lambda x, w: x.T @ w, [X, X], 3 * SIZE, 1),
    "but not one that moves heads": (
        lambda x, w: x.reshape(4, 16, N).transpose(1, 0, 2).reshape(N, N) @ w,
        [X, X],
        5 * SIZE,
        2,
    ),
    "a gather reads its rows alone": (picked, [f32(1000, N), i32(N, 1)], 2 * SIZE + ROW, 1),
    "a slice reads its part alone": (lambda x: x[: N // 2] * 2, [X], SIZE, 1),
    "one element per row of zeros is a comparison": (
        lambda index, g: jax.vjp(lambda x: jnp.take_along_axis(x, index, 1), jnp.zeros((N, N)))[1](g)[0],
        [i32(N, 1), f32(N, 1)],
        SIZE + 2 * ROW,
        1,
    ),
    "an update in place touches its part alone": (
        lambda x, row: lax.dynamic_update_slice(x, row, (0, 0)),
        [X, f32(1, N)],
        2 * ROW,
        1,
    ),
    "a maximum of short rows is computed again, a sum is not": (softmax, [X], 3 * SIZE + 2 * ROW, 2),
    "what stands twice is computed once": (lambda x, w: jnp.tanh(x @ w) + jnp.tanh(x @ w), [X, X], 5 * SIZE, 2),
    "what nobody uses is not computed": (lambda x, w: (x @ w, x * 2)[1], [X, X], 2 * SIZE, 1),
    "a call is written into the program around it": (lambda x: jax.jit(jnp.tanh)(x) * 2, [X], 2 * SIZE, 1),
    "a loop runs as often as it is long": (stacked, [X, f32(STEPS, N, N)], STEPS * 3 * SIZE, STEPS),
    "what a loop stacks and uses is filled, written and copied": (
        with_states,
        [X, f32(STEPS, N, N)],
        STEPS * (3 * SIZE + 2 * SIZE) + STEPS * SIZE,
        2 * STEPS + 1,
    ),
    "of branches the most expensive counts": (
        lambda branch, x: lax.switch(branch, [lambda x: jnp.tanh(x @ x), lambda x: x + 1, lambda x: x @ x], x),
        [i32(), X],
        4 * SIZE + 8,  # and the number of the branch, clamped
        3,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_and_launches_are_those_counted_by_hand(case):
    fun, shapes, moved, count = CASES[case]
    assert total(of(fun, *shapes)) == (moved, count)


def test_a_while_loop_counts_once():
    found = of(lambda x: lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x), X)
    assert sum(launch.trips for launch in found if launch.part == "matmuls") == 1


def test_what_is_cheaper_to_write_than_to_compute_again_is_written():
    """Of four arrays and for two launches; of one array it is computed again."""

    def twice(*arrays):
        shared = sum(arrays[1:], arrays[0])
        return shared.sum(0), shared @ shared.T

    def uses(*arrays):
        shared = sum(arrays[1:], arrays[0])
        return (shared * 2).T @ arrays[0], shared.sum(0), (shared + 1)[: N // 2].sum(1)

    assert total(of(twice, X, X))[0] == 2 * SIZE + SIZE + (SIZE + ROW) + (SIZE + SIZE)
    assert total(of(uses, X))[0] < total(of(uses, X, X, X, X))[0]


@pytest.mark.parametrize(("contracted", "copies"), [((1, 1), 0), ((1, 0), 1), ((0, 0), 2)])
def test_products_in_8_bits_want_their_sums_along_the_last_axis(contracted, copies):
    x = jax.ShapeDtypeStruct((N, N), jnp.float8_e4m3fn)

    def product(x, w):
        axes = tuple((axis,) for axis in contracted)
        return lax.dot_general(x, w, (axes, ((), ())), preferred_element_type=jnp.float32)

    parts = [launch.part for launch in of(product, x, x)]
    assert (parts.count("quantize"), parts.count("matmuls")) == (copies, 1)


def test_parts_are_told_apart():
    def fun(x, w):
        x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
        return jnp.tanh(x @ w)

    assert sorted(launch.part for launch in of(fun, X, X)) == ["casts", "casts", "matmuls", "other"]


# --- Programs of every kind ---


def dropped(x):
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x, 0)


def sharded(x):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("data")
    return jax.shard_map(lambda x: lax.psum(x @ x.T, "data"), mesh=mesh, in_specs=spec, out_specs=jax.P())(x)


@jax.custom_vjp
def straight(x):
    return jnp.round(x)


straight.defvjp(lambda x: (straight(x), None), lambda _, g: (g,))

PROGRAMS = {
    "random bits": dropped,
    "several devices": sharded,
    "its own rule": jax.grad(lambda x: straight(x).sum()),
    "recomputation": jax.grad(lambda x: jax.checkpoint(lambda x: jnp.tanh(x @ x))(x).sum()),
    "linear algebra": lambda x: jnp.linalg.solve(x @ x.T, x),
    "sorting": lambda x: jnp.sort(x)[: N // 2],
    "cumulative sums": lambda x: jnp.cumsum(x, 0),
    "groups of rows": lambda x: lax.ragged_dot(x, jnp.ones((2, N, N)), jnp.array([3, N - 3], jnp.int32)),
    "transforms": lambda x: jnp.fft.fft(x).real,
    "a callback": lambda x: jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((N, N), jnp.float32), x),
    "a result that is an input": lambda x: (x, 1.0),
    "nothing": lambda _: 1.0,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_any_program_has_launches(name):
    found = of(PROGRAMS[name], X)
    moved, count = total(found)
    if name in ("nothing", "a result that is an input"):
        assert (moved, count) == (0, 0)
    else:
        assert moved >= SIZE // 2
        assert count >= 1


# --- Copies for matmuls ---


def narrow(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("dtype", "multiple"), [(jnp.bfloat16, 8), (jnp.float16, 8), (jnp.float8_e4m3fn, 16), (jnp.float32, 1)]
)
@pytest.mark.parametrize("size", [60, 64, 100])
def test_sizes_are_filled_up_to_a_multiple(size, dtype, multiple):
    """Both operands are copied with zeros, and a consumer cuts the result."""
    full = -(-size // multiple) * multiple
    width = jnp.dtype(dtype).itemsize

    def fun(x, w):
        return -lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=dtype)

    found = of(fun, narrow(size, size, dtype=dtype), narrow(size, size, dtype=dtype))
    [matmul] = [launch for launch in found if launch.part == "matmuls"]
    assert matmul.bytes == 3 * full * full * width
    copied = 2 * (size * size + full * full) * width if full != size else 0
    assert total(found)[0] == matmul.bytes + copied + 2 * size * size * width
    assert matmul.flops == 2 * size**3


def test_product_with_a_vector_is_not_filled_up():
    found = of(lambda x, w: x @ w, narrow(60, 60), narrow(60, 1))
    assert [launch.bytes for launch in found] == [2 * (60 * 60 + 60 + 60)]


@pytest.mark.parametrize(("rows", "count"), [(False, 1), (True, 2)], ids=["elementwise", "softmax"])
def test_launch_that_works_by_rows_takes_in_no_maximum_of_everything(rows, count):
    def fun(x):
        y = jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True) if rows else jnp.exp(x)
        y = y.astype(jnp.bfloat16)
        return y, jnp.max(y)

    written = [launch for launch in of(fun, f32(256, 512)) if launch.bytes >= 256 * 512 * 2]
    assert len(written) - rows == count
