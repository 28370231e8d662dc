"""What can be frozen: models of all frameworks, arguments of all kinds, and what is refused."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx, struct
from support.comparisons import assert_close, assert_identical
from support.lowbit import normal

import jmp_lite as jmp
from jmp_lite import export
from jmp_lite.quant._array import dequantize_tree, is_quantized, quantize_tree


def frozen(path, apply, params, *args, **settings):
    export.freeze(apply, params, *args, path=path, **settings)
    return export.load(path)


@pytest.mark.slow
def test_frameworks(rng, key, seed, tmp_path):
    """Linen is above; NNX by split, Equinox by partition or whole, Haiku, a bare function with closures."""
    path, x = tmp_path / "m", normal(rng, 3, 16)
    recipe = {"recipe": "w8a16"}

    graph, state = nnx.split(nnx.Linear(16, 5, rngs=nnx.Rngs(seed % 2**31)))
    served = frozen(path, lambda state, x: nnx.merge(graph, state)(x), state, x, **recipe)
    assert is_quantized(served.params["kernel/value"])
    assert_close(served(x), nnx.merge(graph, quantize_tree(state))(x), ulps=16)

    model = eqx.nn.MLP(16, 5, 8, 2, key=key)
    arrays, static = eqx.partition(model, eqx.is_array)
    held = quantize_tree(arrays, axes=lambda path, leaf: range(1, leaf.ndim))
    served = frozen(path, lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x), held, x)
    assert served.params["layers/0/weight"].scale.shape == (8, 1)
    assert_close(served(x), jax.vmap(eqx.combine(dequantize_tree(held), static))(x), ulps=64)
    assert_close(frozen(path, lambda model, x: jax.vmap(model)(x), model, x)(x), jax.vmap(model)(x), ulps=64)

    net = hk.without_apply_rng(hk.transform(lambda x: jnp.tanh(hk.Linear(5)(x))))
    params = net.init(key, x)
    assert_close(frozen(path, net.apply, params, x, **recipe)(x), net.apply(quantize_tree(params), x), ulps=64)

    table = normal(rng, 16)
    served = frozen(path, lambda w, x: {"y": (x * table[None] + w, None), "n": 3}, 2.0, {"a": x}["a"])
    assert_close(served(x)["y"][0], x * table[None] + 2.0, ulps=4)
    assert served.params == {}


def test_trees_of_arguments(rng, tmp_path):
    """Dicts, tuples, None, integers and keys go in; the free size may be shared."""
    b = jax.export.symbolic_shape("b")[0]
    batch = {
        "x": jax.ShapeDtypeStruct((b, 4), jnp.bfloat16),
        "ids": (jax.ShapeDtypeStruct((b,), jnp.int32), None),
    }

    def apply(w, batch, key):
        noise = jax.random.normal(key, (4,), jnp.bfloat16)
        return (batch["x"] + noise[None]) @ w, batch["ids"][0] + 1

    w = normal(rng, 4, 3, dtype=jnp.bfloat16)
    served = frozen(tmp_path / "m", apply, w, batch, jax.random.key(0))
    given = {"x": normal(rng, 7, 4, dtype=jnp.bfloat16), "ids": (jnp.arange(7, dtype=jnp.int32), None)}
    assert_identical(served(given, jax.random.key(1)), jax.jit(apply)(w, given, jax.random.key(1)))
    assert str(served.in_avals[0]["x"].shape) == "(b, 4)"
    given["ids"] = (jnp.arange(6, dtype=jnp.int32), None)
    with pytest.raises(ValueError, match=r"args\[0\]\['(x|ids)'\]"):
        served(given, jax.random.key(1))


@struct.dataclass
class Own:
    """A container that no other program knows."""

    x: jax.Array


W = jnp.eye(2)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (lambda f: f(jnp.dot, {"k": jax.random.key(0)}, W), r"Leaf 'k' is key<fry>\[\], which no safetensors"),
        (lambda f: f(jnp.dot, {"a/b": W, "a": {"b": W}}, W), "Two things would be stored as 'a/b'"),
        (lambda f: f(jnp.dot, {"__program__": W}, W), "Two things would be stored as '__program__'"),
        (lambda f: f(jnp.dot, {"__metadata__": W}, W), "Two things would be stored as '__metadata__'"),
        (lambda f: f(lambda w, x: Own(x), W, W), "containers that only this program knows.*Own"),
        (lambda f: f(lambda w, own: own.x, W, Own(W)), "containers that only this program knows.*Own"),
        (lambda f: f(jnp.dot, W, W, platforms=["gpu"]), r"platforms=\['gpu'\]: 'gpu' is not a platform. Accepted: cpu"),
        (lambda f: f(jnp.dot, W, W, platforms=[]), "nothing is not a platform"),
        (lambda f: f(jnp.dot, W, W, platforms=3), "platforms=3: 3 is not a platform"),
        (lambda f: f(lambda w, x: jax.debug.print("{}", x) or w @ x, W, W), "cannot be written .*calls back to Python"),
    ],
)
def test_refusals_say_what_to_do(tmp_path, freeze, message):
    """What cannot be frozen leaves no file."""
    with pytest.raises(jmp.errors.InvalidExportError, match=message):
        freeze(functools.partial(export.freeze, path=tmp_path / "m"))
    assert not list(tmp_path.iterdir())


def test_float64_needs_to_be_enabled(tmp_path):
    """Weights that this process would round are not rounded."""
    with jax.enable_x64(True):
        export.freeze(jnp.dot, jnp.ones((2, 2), jnp.float64), jnp.ones((2, 2), jnp.float64), path=tmp_path / "m")
        assert export.load(tmp_path / "m")(jnp.ones((2, 2), jnp.float64)).dtype == jnp.float64
    with pytest.raises(jmp.errors.PlatformMismatchError, match="needs float64 for 'params'"):
        export.load(tmp_path / "m")
