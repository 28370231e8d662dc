"""Hypothesis strategies: arbitrary pytrees, policies and policy strings; what the leaves drawn are and hold.

Arrays are built when a value is drawn, so draw inside ``jax.enable_x64`` where it matters.
"""

import collections
import dataclasses
import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import jmp_lite as jmp

STANDARD = ("float16", "bfloat16", "float32")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e3m4", "float8_e4m3")
FLOAT8_FNUZ = ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3b11fnuz")
FORMATS = (*STANDARD, "float64", *FLOAT8, *FLOAT8_FNUZ, "float4_e2m1fn")
OTHERS = ("bool", "int8", "int32", "uint8", "uint32", "complex64")

#: Numbers that every format of at least 4 bits holds exactly.
EXACT = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
SHAPES = ((), (0,), (3,))


class Pair(NamedTuple):
    """A node of the kind that Optax states are made of."""

    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """A node of the kind that Flax states are made of, with one field that is not data."""

    params: Any
    extra: Any
    name: str = dataclasses.field(default="state", metadata={"static": True})


def dtype_named(name):
    """The dtype of any format of JAX."""
    return np.dtype(getattr(jnp, name, name))


@st.composite
def numpy_arrays(draw, names=(*FORMATS, *OTHERS, "complex128", "int64"), numbers=EXACT):
    """NumPy arrays of every dtype; floating ones sometimes in foreign byte order."""
    dtype = dtype_named(draw(st.sampled_from(names)))
    shape = draw(st.sampled_from(SHAPES))
    size = int(np.prod(shape))
    values = draw(st.lists(st.sampled_from(numbers), min_size=size, max_size=size))
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.asarray(values, np.float64).reshape(shape).astype(dtype)
    foreign = dtype.name in ("float16", "float32", "float64") and draw(st.booleans())
    return array.astype(dtype.newbyteorder(">")) if foreign else array


def jax_arrays(names=(*FORMATS, *OTHERS)):
    """JAX arrays of every dtype that x64 allows."""
    return numpy_arrays(names).map(to_jax)


def to_jax(array):
    """A JAX array of the dtype that JAX has for a NumPy array."""
    return jnp.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype.newbyteorder("=")))


def numpy_scalars():
    """NumPy scalars such as ``np.float16(2)``."""
    return numpy_arrays().map(lambda array: array.reshape(-1)[:1]).filter(len).map(lambda array: array[0])


def keys():
    """PRNG keys, typed and raw, single and in arrays."""
    seeds = st.integers(0, 2**31 - 1)
    typed = seeds.map(jax.random.key)
    return typed | seeds.map(jax.random.PRNGKey) | typed.map(lambda key: jax.random.split(key, 3))


def float0_arrays():
    """What JAX returns as the gradient of an integer."""
    return st.sampled_from(SHAPES).map(lambda shape: np.zeros(shape, jax.dtypes.float0))


def python_scalars():
    """Python numbers and booleans."""
    numbers = st.sampled_from(EXACT)
    return st.booleans() | st.integers(-8, 8) | numbers | numbers.map(lambda x: complex(x, -x))


def not_arrays():
    """Leaves that no array operation can touch."""
    strange = [np.str_("name"), np.array(["a", "b"]), np.array([None, 1], object), object(), len, b"bytes"]
    specs = st.sampled_from([jax.ShapeDtypeStruct((2,), jnp.float32), jax.sharding.PartitionSpec("x")])
    return st.text(max_size=3) | st.sampled_from(strange) | specs | float0_arrays()


def loss_scales():
    """Loss scales of all three kinds."""
    powers = st.integers(0, 24).map(lambda exponent: 2.0**exponent)
    dynamic = powers.map(jmp.DynamicLossScale)
    return dynamic | powers.map(jmp.StaticLossScale) | st.just(jmp.NoOpLossScale())


def leaves():
    """Leaves of every kind; loss scales, which are nodes, are not among them."""
    return st.one_of(jax_arrays(), numpy_arrays(), numpy_scalars(), keys(), python_scalars(), not_arrays())


def trees(of=None):
    """Pytrees of lists, tuples, dicts, NamedTuples, dataclasses, ``None`` and nested empty containers."""
    of = leaves() if of is None else of
    names = st.text(string.ascii_lowercase, min_size=1, max_size=3)
    empty = st.sampled_from([None, (), [], {}, ([], {}), collections.OrderedDict()])

    def nodes(children):
        named = st.dictionaries(names, children, max_size=3)
        return (
            st.lists(children, max_size=3)
            | st.lists(children, max_size=3).map(tuple)
            | named
            | named.map(collections.OrderedDict)
            | st.builds(Pair, children, children)
            | st.builds(State, children, children)
        )

    nested = st.recursive(of | empty, nodes, max_leaves=6)
    return nested | st.lists(of | nested, max_size=6)


def policies(names=FORMATS):
    """Policies of every combination of formats."""
    formats = st.sampled_from(names).map(dtype_named)
    reduce = st.none() | formats
    return st.builds(
        lambda param, compute, output, reduce: jmp.Policy(param, compute, output, reduce_dtype=reduce),
        formats,
        formats,
        formats,
        reduce,
    )


def policy_strings():
    """Text: anything at all, and text made of the pieces that policies are made of."""
    words = ["p", "params", "c", "o", "r", "=", "==", ",", ",,", " ", "\t", "mixed_", "-true", "-mixed", "O2", "x", ";"]
    pieces = st.sampled_from([*words, *jmp.name_to_dtype, "half", "\x00", "\ud800", "\u017f", "\u0130"])
    parts = st.tuples(st.sampled_from("pcor"), st.sampled_from([*jmp.name_to_dtype, "half", "int8"])).map("=".join)
    return st.text() | st.lists(pieces, max_size=8).map("".join) | st.lists(parts, max_size=5).map(",".join)


# --- What came out, and what a leaf is ---


def result_or_error(function, *args):
    """What a function returns, or the ``JmpLiteError`` it raises; any other exception passes through."""
    try:
        return function(*args)
    except jmp.errors.JmpLiteError as error:
        return error


def is_array(leaf):
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def is_key(leaf):
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def kind_of(leaf):
    """One of "floating", "complex", "other number" (or key) and "not selectable"."""
    if isinstance(leaf, (bool, int)) or is_key(leaf):
        return "other number"
    if isinstance(leaf, (float, complex)) and not is_array(leaf):
        return "floating" if isinstance(leaf, float) else "complex"
    if not is_array(leaf):
        return "not selectable"
    if leaf.dtype.name in FORMATS:
        return "floating"
    return {"c": "complex", "b": "other number", "i": "other number", "u": "other number"}.get(
        leaf.dtype.kind, "not selectable"
    )


def value_of(leaf):
    """What a leaf holds, as something that ``==`` compares exactly."""
    if is_key(leaf):
        return np.asarray(jax.random.key_data(leaf)).tolist()
    if kind_of(leaf) in ("floating", "complex") and is_array(leaf):
        return np.asarray(leaf, np.complex128 if kind_of(leaf) == "complex" else np.float64).tolist()
    return leaf.tolist() if is_array(leaf) else leaf


def dtypes_of(tree):
    return jax.tree.map(lambda leaf: leaf.dtype, tree)
