"""Weights stored in 8 or 4 bits: one array, or all kernels of a tree."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._compat import INLINE, register_flax_serialization
from jmp_lite._dtypes import FLOAT32, OF_4_BITS, canonical
from jmp_lite._messages import first_few, quote
from jmp_lite._tree import NOT_WEIGHTS, Opaque, is_array, path_string
from jmp_lite.errors import InvalidRecipeError
from jmp_lite.quant._scale import dequantize, rounded
from jmp_lite.quant._spec import QuantSpec, Specs, parse_spec
from jmp_lite.quant._tiles import amax_of_tiles, tile_lengths, tile_scale

T = TypeVar("T")

#: What code does with a weight by way of attributes: moves and sums.
_OF_ARRAYS = frozenset(
    {
        *("T", "mT", "at", "clip", "diagonal", "dot", "flatten", "max", "mean", "min", "ravel", "repeat", "reshape"),
        *("squeeze", "std", "sum", "swapaxes", "take", "transpose", "var"),
    }
)

_OPERATORS = (
    *("getitem", "iter", "neg", "pos", "abs", "eq", "ne", "lt", "le", "gt", "ge"),
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rpow", "rmatmul"),
)

#: Which axes share a scale: numbers of axes, ``None`` for all of them, a function of path and leaf, or a tree.
Axes = Sequence[int] | Callable[[str, Any], Sequence[int] | None] | Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedArray(Opaque):
    """An array stored as 8-bit or 4-bit numbers and float32 scales: a weight that layers accept unchanged.

    It is a pytree of ``values`` and ``scale``, and replaces an array in Linen and Haiku parameters, NNX variables,
    Equinox modules and checkpoints. Functions of ``jax.numpy``, operators (``x @ w``, ``w * x``) and indexing treat it
    as the array ``values * scale``; policy casts leave it alone. It has no gradient: use it for inference.

    Linen and NNX layers accept it (except ``WeightNorm`` and ``SpectralNorm``, which decompose a kernel), and so do
    Equinox and Haiku layers except convolutions, which pass their kernel straight to ``lax``. Functions of ``jax.lax``
    raise a JAX error that mentions ``__jax_array__``: call ``dequantize_tree`` inside the function. A loop slices
    values and scales, so a stack of layers needs a scale per layer, as ``quantize_tree`` gives it.

    Args:
        values: ``int8``, ``float8_e4m3fn``, ``float8_e5m2``, ``int4`` or ``float4_e2m1fn`` of any shape.
        scale: ``float32`` of the same rank, with size 1 along axes that share a scale, and the number of tiles along
            axes with tiles. Split, stack and shard both like any other array.
        dtype: Dtype of the dequantized array.

    Example:
        >>> w = jmp.quant.quantize_array(jnp.array([[64.0, 254.0], [-127.0, 128.0]]), axes=[0])
        >>> print(w.values)
        [[  64  127]
         [-127   64]]
        >>> print(jnp.ones((1, 2)) @ w, w.nbytes)
        [[-63. 382.]] 12
        >>> [x.dtype.name for x in jax.tree.leaves(jmp.get_policy("bf16").cast_to_compute({"w": w}))]
        ['int8', 'float32']

    References:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        arXiv:1712.05877, with zero point 0. qwix's ``QArray`` and AQT's ``QTensor`` are the same idea.
    """

    values: Any
    scale: Any
    dtype: Any = FLOAT32
    __array_priority__ = 100  # operators of NumPy arrays leave it to those of this class

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        register_flax_serialization(QuantizedArray, _state_dict, _from_state_dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantized array."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales together; two 4-bit numbers take one byte, as in files and on accelerators."""
        return _nbytes(self.values) + _nbytes(self.scale)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """Returns ``values * scale``, computed in float32, in ``dtype`` or else in the array's dtype."""
        return dequantize(self.values, self.scale, self.dtype if dtype is None else dtype)

    def astype(self, dtype: Any) -> jax.Array:
        """Returns the dequantized array in another dtype."""
        return self.dequantize(dtype)

    def __jax_array__(self) -> jax.Array:
        return self.dequantize()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        del copy
        return np.asarray(self.dequantize(), dtype)

    def __len__(self) -> int:
        return len(self.values)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_ARRAYS:
            return getattr(self.dequantize(), name)
        raise AttributeError(
            f"{name!r} is not an attribute of a QuantizedArray. What it stands for is array.dequantize(), or "
            "quant.dequantize_tree(params) for a whole tree."
        )

    def __repr__(self) -> str:
        return f"QuantizedArray({quote(self.values)}, scale={quote(self.scale)}, dtype={self.dtype})"


def _operator(name: str) -> Callable[..., Any]:
    """An operator on the array that a quantized one stands for."""
    return lambda array, *others: getattr(array.dequantize(), name)(*others)


for _name in _OPERATORS:
    setattr(QuantizedArray, f"__{_name}__", _operator(f"__{_name}__"))


def _nbytes(array: Any) -> int:
    """Also of a ``jax.ShapeDtypeStruct``."""
    bits = 4 if array.dtype in OF_4_BITS else 8 * array.dtype.itemsize
    return int(-(-math.prod(array.shape) * bits // 8))


jax.tree_util.register_dataclass(QuantizedArray, data_fields=["values", "scale"], meta_fields=["dtype"])


def is_quantized(node: Any) -> bool:
    """Whether a node of a tree is a quantized array."""
    return isinstance(node, QuantizedArray)


# --- Serialization with Flax: the arrays only; the dtype comes from the template -------------------


def _state_dict(array: QuantizedArray) -> dict[str, Any]:
    return {"values": array.values, "scale": array.scale}


def _from_state_dict(array: QuantizedArray, state: Any) -> QuantizedArray:
    saved = state if isinstance(state, dict) and state.keys() == {"values", "scale"} else None
    if saved is None or np.dtype(saved["values"].dtype) != np.dtype(array.values.dtype):
        was = quote(state if saved is None else saved["values"])
        raise InvalidRecipeError(
            f"The template has {array!r}, but {was} was saved. Quantize the template as what was saved was quantized."
        )
    return dataclasses.replace(array, **saved)


# --- One array --------------------------------------------------------------------------------------


def _shared_axes(axes: Sequence[int] | None, ndim: int, name: str) -> tuple[int, ...]:
    """Axis numbers, counted from 0."""
    if axes is None:
        return tuple(range(ndim))
    try:
        listed = [range(ndim)[axis] for axis in axes]
    except (IndexError, TypeError):
        listed = [-1]
    if len(set(listed)) != len(listed) or -1 in listed:
        raise InvalidRecipeError(
            f"axes={axes!r} of {name} with {ndim} axes must be distinct numbers of axes that share a scale, or None "
            "for all. One scale per output channel of a kernel (inputs, outputs) is axes=[0]."
        )
    return tuple(listed)


def _checked_spec(dtype: Any) -> QuantSpec:
    """A spec, its text, that of the weight in a recipe, or a format with one scale per channel."""
    dtype = (dtype.rhs or dtype.lhs) if isinstance(dtype, Specs) else dtype
    dtype = parse_spec(dtype) if isinstance(dtype, str) and ":" in dtype else dtype
    spec = dtype if isinstance(dtype, QuantSpec) else QuantSpec(dtype, "channel")
    if spec.stochastic:
        raise InvalidRecipeError(
            f"Arrays are held rounded to nearest, got {spec}. Write for example QuantSpec('e4m3', 'channel'), or "
            "'e4m3'."
        )
    return spec


def _quantize(name: str, x: Any, spec: QuantSpec, axes: Sequence[int] | None) -> QuantizedArray:
    if is_quantized(x):
        raise InvalidRecipeError(
            f"{name} is quantized already: {x!r}. Dequantize it first (quant.dequantize_tree), or leave it out with "
            "where=."
        )
    if not is_array(x) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise InvalidRecipeError(
            f"{name} is {quote(x)}; only floating arrays can be quantized. Leave it out with where=."
        )
    shared = _shared_axes(axes, x.ndim, name)
    lengths = tile_lengths(x.shape, shared, spec.tile)
    if lengths is None:
        n = math.prod(x.shape[axis] for axis in shared)
        raise InvalidRecipeError(
            f"{name} is {quote(x)}: tiles of {spec.tile} do not divide the {n} numbers along axes {list(shared)}. "
            "Choose a tile that does, or leave it out with quantize_tree(where=)."
        )
    values, scale = _values_and_scale(x, spec, lengths)
    return QuantizedArray(values, scale, canonical(x.dtype))


@functools.partial(jax.jit, static_argnums=(1, 2), inline=INLINE)
def _values_and_scale(x: Any, spec: QuantSpec, lengths: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    amax = amax_of_tiles(x, lengths, spec.dtype)
    scale, whole = tile_scale(amax if spec.amax is None else jnp.where(jnp.isfinite(amax), spec.amax, amax), spec)
    return rounded(x, spec.dtype, scale * whole, None, saturates=spec.amax is None), scale * whole


def quantize_array(x: Any, dtype: Any = jnp.int8, axes: Sequence[int] | None = None) -> QuantizedArray:
    """Quantizes one array to nearest; its largest magnitude becomes the largest number of the format.

    Args:
        x: Floating array of any shape.
        dtype: ``int8``, ``float8_e4m3fn`` (``"e4m3"``) or ``float8_e5m2`` (``"e5m2"``); a ``QuantSpec``, including its
            ``margin``, ``pow2``, ``tile`` and ``amax``, or its text (``"int4:tile32"``); or a recipe such as ``W4A16``,
            for its kernel spec.
        axes: Axes that share a scale; ``None`` for all of them, one scale for the whole array.

    Returns:
        A ``QuantizedArray`` of the shape of ``x``; its scale has size 1 along ``axes``.

    Raises:
        InvalidRecipeError: If the format is unknown, ``x`` is not a floating array, an axis does not exist, or tiles do
            not divide it.

    Example:
        >>> jmp.quant.quantize_array(jnp.ones((64, 8)), axes=[0])
        QuantizedArray(int8[64, 8], scale=float32[1, 8], dtype=float32)

    References:
        Wu et al., "Integer Quantization for Deep Learning Inference", arXiv:2004.09602: int8 weights need one scale
        per output channel.
    """
    return _quantize("x", x, _checked_spec(dtype), axes)


# --- Trees -------------------------------------------------------------------------------------------


def kernels_of(axes: Any) -> Callable[[str, Any], bool]:
    """Returns a ``where`` by what ``contracted_axes`` found: ``None`` for an array that no matmul takes."""
    return lambda path, leaf: axes is not None and _is_kernel(path, leaf)


def _is_kernel(path: str, leaf: Any) -> bool:
    """The default of ``where`` in ``quantize_tree``."""
    is_floating = is_quantized(leaf) or (is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating))
    name = path.rpartition("/")[2].lower()
    return is_floating and leaf.ndim >= 2 and name not in NOT_WEIGHTS and "embed" not in path.lower()


def _inner(path: str, leaf: Any) -> tuple[int, ...]:
    """The default of ``axes``."""
    del path
    return tuple(range(1 if leaf.ndim > 2 else 0, leaf.ndim - 1))


#: In the place of axes, of what no matmul takes.
_NO_PRODUCT = object()


def _of_leaves(axes: Axes, treedef: Any) -> list[Axes]:
    is_for_all = isinstance(axes, Sequence) and all(isinstance(axis, (int, np.integer)) for axis in axes)
    is_function = callable(axes) and jax.tree_util.all_leaves([axes])  # modules of Equinox are called too
    if axes is None or is_function or is_for_all:
        return [axes] * treedef.num_leaves
    try:
        listed = treedef.flatten_up_to(axes)
    except (ValueError, TypeError) as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise InvalidRecipeError(
            f"axes is a tree of another structure than the parameters: {said}. Give what contracted_axes(fun)(params, "
            "*args) returns for these parameters."
        ) from None
    return [_NO_PRODUCT if axes is None else axes for axes in listed]


def quantize_tree(
    params: T, dtype: Any = jnp.int8, *, where: Callable[[str, Any], bool] = _is_kernel, axes: Axes = _inner
) -> T:
    """Quantizes the weights of a trained model: in 8 bits they take a quarter of the float32 bytes.

    Args:
        params: Parameters of any framework: dicts, ``FrozenDict``, ``nnx.State``, modules of Equinox.
        dtype: As for ``quantize_array``.
        where: ``where(path, leaf)`` chooses leaves by path (``decoder/layers_3/kernel``) and by leaf. By default
            floating arrays of two or more axes that are not called ``bias``, ``b``, ``scale`` or ``offset`` and whose
            path does not contain ``embed``, ignoring case: kernels, but not biases, norm scales or embedding tables.
            For a table, which is looked up, pass ``axes=[1]``: one scale per row.
        axes: Axes that share a scale: the result of ``contracted_axes(fun)(params, *args)``, a tree like the
            parameters, whose ``None`` leaves (not used in a matmul) stay unquantized. Or axis numbers as for
            ``quantize_array``, or ``axes(path, leaf)``, which returns them. By default the inputs of a kernel (inputs,
            outputs), and all axes but the first and the last of larger ones, so experts and stacked layers have their
            own scales; all axes for a spec of granularity ``"tensor"``.

    Returns:
        The tree with a ``QuantizedArray`` in place of each chosen leaf.

    Raises:
        InvalidRecipeError: If the format is unknown, no leaf is chosen, or a chosen leaf is not a floating array, is
            already quantized, lacks one of the axes, or its tiles do not divide it.

    Example:
        >>> params = {"embed": jnp.ones((9, 4)), "dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
        >>> jmp.quant.quantize_tree(params)["dense"]
        {'bias': Array([0., 0., 0.], dtype=float32), 'kernel': QuantizedArray(int8[4, 3], scale=float32[1, 3], ...)}

    References:
        Post-training quantization of weights as in Dettmers et al., "LLM.int8()", arXiv:2208.07339, and torchao's
        ``quantize_``, which leave embedding tables alone too.
    """
    spec = _checked_spec(dtype)
    if spec.granularity == "tensor" and axes is _inner:
        axes = None
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    paths, leaves = [path_string(path) for path, _ in with_paths], [leaf for _, leaf in with_paths]

    def quantized(path: str, leaf: Any, axes: Any) -> Any:
        if axes is _NO_PRODUCT or not where(path, leaf):
            return leaf
        shared = axes(path, leaf) if callable(axes) and is_array(leaf) else axes
        return _quantize(f"Leaf {path!r}", leaf, spec, shared)

    results = list(map(quantized, paths, leaves, _of_leaves(axes, treedef)))
    if leaves and all(map(operator.is_, results, leaves)):
        raise InvalidRecipeError(
            f"Nothing of {first_few([path or 'the array' for path in paths])} is quantized: quantize_tree takes by "
            "default floating arrays of two or more axes that a matmul uses, and no embeddings. Choose others by where "
            "and axes, or leave out the recipe."
        )
    tree: T = jax.tree.unflatten(treedef, results)
    return tree


def dequantize_tree(tree: T, dtype: Any = None) -> T:
    """Replaces quantized arrays with ordinary ones.

    Args:
        tree: Any pytree.
        dtype: Floating dtype of the arrays; by default the dtype of each before quantization.

    Returns:
        The tree; all other leaves are the same objects.

    Example:
        >>> quantized = jmp.quant.quantize_tree({"kernel": jnp.eye(2), "bias": jnp.ones(2)})
        >>> print(jmp.quant.dequantize_tree(quantized)["kernel"])
        [[1. 0.]
         [0. 1.]]
    """

    def dequantized(node: Any) -> Any:
        return node.dequantize(dtype) if is_quantized(node) else node

    mapped: T = jax.tree.map(dequantized, tree, is_leaf=is_quantized)
    return mapped


def nbytes(tree: T) -> T:
    """Returns the bytes of each leaf; a quantized array counts its numbers, two 4-bit ones per byte, and its scales.

    Args:
        tree: Any pytree, of arrays or ``jax.ShapeDtypeStruct``.

    Returns:
        The tree with an ``int`` in place of each array, quantized or not, and ``None`` in place of other leaves.

    Example:
        >>> params = {"kernel": jnp.ones((128, 8)), "bias": jnp.zeros(8)}
        >>> small = jmp.quant.quantize_tree(params, jmp.quant.W4A16.rhs)
        >>> jmp.quant.nbytes(params), jmp.quant.nbytes(small)
        ({'bias': 32, 'kernel': 4096}, {'bias': 32, 'kernel': 544})
        >>> sum(jax.tree.leaves(jmp.quant.nbytes(small)))
        576
    """

    def held(node: Any) -> int | None:
        if isinstance(node, QuantizedArray):
            return node.nbytes
        return _nbytes(node) if is_array(node) or isinstance(node, jax.ShapeDtypeStruct) else None

    mapped: T = jax.tree.map(held, tree, is_leaf=is_quantized)
    return mapped
