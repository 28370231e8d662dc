"""``freeze``: a function and its parameters as one file."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import export

from jmp_lite._functions import check_function
from jmp_lite._messages import quote
from jmp_lite._policy import Policy, PolicyLike, PolicyMap, get_policy
from jmp_lite._tree import is_array, path_string
from jmp_lite.autocast import autocast
from jmp_lite.errors import InvalidExportError
from jmp_lite.export._compat import without_source_lines
from jmp_lite.export._file import PathLike, write
from jmp_lite.export._header import PROGRAM, RESERVED
from jmp_lite.quant import DotRecipe, contracted_axes, get_recipe
from jmp_lite.quant._array import dequantize_tree, is_quantized, kernels_of, quantize_tree

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def freeze(
    apply: Callable[..., Any],
    params: Any,
    *args: Any,
    path: PathLike,
    policy: PolicyLike | None = None,
    recipe: str | DotRecipe | None = None,
    platforms: Sequence[str] | None = None,
) -> str:
    """Writes ``apply(params, *args)`` as one file: program, weights and precision.

    The loaded function returns bit for bit the results of ``jax.jit`` of the frozen function here: ``apply``, or
    ``autocast(apply, policy, dot=recipe)`` if a policy is given, on dequantized weights.

    The recipe sets how to store weights. Kernels (see ``quant.quantize_tree``) are stored in the format of
    ``recipe.rhs``, or of ``lhs`` if that is ``None``, with one scale per output channel, shared along the contracted
    axes of any framework (``quant.contracted_axes``). If some parameters are already quantized, all are stored
    unchanged: quantize them yourself to choose leaves, axes or formats. If the recipe also quantizes activations
    (``W8A8``, ``FP8``), matmuls use the recipe, which quantizes the kernels again: to the stored numbers, if those have
    the recipe's scales, one per output channel. Everything else is float32 unless the policy says otherwise. If the
    recipe does not quantize activations (``W8A16``), matmuls follow the policy.

    Args:
        apply: Function that ``jax.jit`` accepts: ``model.apply`` of Linen and Haiku, ``lambda state, x:
            nnx.merge(graphdef, state)(x)``, ``lambda model, x: model(x)`` for Equinox, or any other.
        params: Its first argument. Arrays become weights in the file under their paths; other leaves become constants
            of the program.
        *args: Its other arguments, as arrays or ``jax.ShapeDtypeStruct`` in dicts, lists, tuples and ``None``. Only
            shapes and dtypes matter; a free size comes from ``jax.export.symbolic_shape("batch, 28, 28")``.
        path: File to write, by convention ``*.safetensors``.
        policy: Policy to compute under; ``None`` runs ``apply`` as written.
        recipe: How to quantize, or its name; from ``quant.calibrate``, scales become constants of the program.
        platforms: Where it will run: any of ``"cpu"``, ``"cuda"``, ``"rocm"``, ``"tpu"``; by default the platform of
            this process.

    Returns:
        The SHA-256 digest of the file; pin it with ``load(path, digest=...)``.

    Raises:
        InvalidExportError: If a leaf cannot be stored, two have the same path, arguments or results are not trees of
            arrays in built-in containers, or a platform does not exist.
        InvalidRecipeError: If the recipe quantizes no weight, or its name is unknown.
        UnknownDtypeError: If the policy string cannot be parsed.

    Example:
        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/model.safetensors"
        >>> rows = jax.ShapeDtypeStruct(jax.export.symbolic_shape("rows, 4"), jnp.float32)
        >>> digest = jmp.export.freeze(
        ...     lambda p, x: x @ p["w"], {"w": jnp.eye(4)}, rows, path=path, policy="mixed_bfloat16", recipe="w8a16"
        ... )
        >>> print(jmp.export.load(path, digest=digest)(jnp.ones((1, 4))))
        [[1. 1. 1. 1.]]

    References:
        ``jax.export`` and its compatibility guarantees (docs.jax.dev, "Exporting and serializing staged-out
        computations"); safetensors (github.com/huggingface/safetensors). Sculley et al., "Hidden Technical Debt in
        Machine Learning Systems", on training and serving that compute different things.
    """
    check_function(apply, "freeze")
    resolved = None if policy is None else get_policy(policy)
    chosen = None if recipe is None else get_recipe(recipe)
    targets = _checked_platforms(platforms)
    run = _with_precision(apply, resolved, chosen)
    weights, rebuild = _split(_held(apply, params, args, chosen))

    def frozen(*args: Any, weights: dict[str, Any]) -> Any:
        return run(dequantize_tree(rebuild(weights)), *args)

    specs, weight_specs = jax.tree.map(_spec, (args, weights))
    platforms, serialized = _serialized(frozen, targets, specs, weight_specs)
    header = {
        "jax": jax.__version__,
        "platforms": platforms,
        "policy": None if resolved is None else str(resolved),
        "quantized": _quantized(rebuild(weights)),
        "recipe": None if chosen is None else str(chosen),
    }
    return write(path, {**weights, PROGRAM: np.frombuffer(serialized, np.uint8)}, header)


def _serialized(
    frozen: Callable[..., Any], targets: Sequence[str] | None, specs: Any, weight_specs: Any
) -> tuple[list[str], bytes]:
    """Returns the platforms of a program, and the program as stored in the file."""
    try:
        exported = export(jax.jit(frozen), platforms=targets)(*specs, weights=weight_specs)
    except NotImplementedError as error:
        raise InvalidExportError(
            f"The function cannot be written to a file: {error}. Take calls back to Python out of it, such as "
            "jax.debug.print."
        ) from None
    try:
        return list(exported.platforms), without_source_lines(exported).serialize()
    except ValueError as error:
        raise InvalidExportError(
            f"Arguments or results stand in containers that only this program knows: {error}. Take and return dicts, "
            "lists and tuples of arrays."
        ) from None


def _checked_platforms(platforms: Sequence[str] | None) -> tuple[str, ...] | None:
    if platforms is None:
        return None
    listed = tuple(platforms) if isinstance(platforms, (list, tuple)) else (platforms,)
    unknown = [repr(platform) for platform in listed if platform not in PLATFORMS]
    if unknown or not listed:
        raise InvalidExportError(
            f"platforms={platforms!r}: {', '.join(unknown) or 'nothing'} is not a platform. Accepted: "
            f"{', '.join(PLATFORMS)}."
        )
    return listed


# --- Precision ------------------------------------------------------------------------------------


def _with_precision(
    apply: Callable[..., Any], policy: Policy | PolicyMap | None, recipe: DotRecipe | None
) -> Callable[..., Any]:
    """The function to freeze, of dequantized parameters."""
    if recipe is None or None in (recipe.lhs, recipe.rhs):
        return apply if policy is None else autocast(apply, policy)
    return autocast(apply, "full" if policy is None else policy, dot=recipe)


# --- Weights --------------------------------------------------------------------------------------


def _held(apply: Callable[..., Any], params: Any, args: tuple[Any, ...], recipe: DotRecipe | None) -> Any:
    """Parameters in their stored form."""
    if recipe is None or any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        return params
    spec: Any = recipe.rhs or recipe.lhs
    plain = dataclasses.replace(spec, stochastic=False)
    found = contracted_axes(apply)(params, *args)
    axes = None if plain.granularity == "tensor" else found
    return quantize_tree(params, plain, where=kernels_of(found), axes=axes)


def _split(params: Any) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    """Extracts the arrays of a tree, by path, and returns a function that puts arrays back."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    weights: dict[str, Any] = {}
    places: list[tuple[str | None, Any]] = []
    for key_path, leaf in leaves:
        name = path_string(key_path)
        if not is_array(leaf):
            places.append((None, leaf))
            continue
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise InvalidExportError(
                f"Leaf {name!r} is {quote(leaf)}, which no safetensors file can hold. Keep it out of the "
                "parameters (of NNX: nnx.split(model, nnx.Param, ...)), or store jax.random.key_data(leaf)."
            )
        name = name or "params"
        if name in weights or name in (PROGRAM, RESERVED):
            raise InvalidExportError(f"Two things would be stored as {name!r}, one of them {quote(leaf)}. Rename one.")
        weights[name] = _as_jax_would(name, np.asarray(leaf))
        places.append((name, None))

    def rebuild(arrays: dict[str, Any]) -> Any:
        return jax.tree.unflatten(treedef, [leaf if name is None else arrays[name] for name, leaf in places])

    return weights, rebuild


def _as_jax_would(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The numbers in the dtype that the program receives, in the order in which safetensors writes the buffer."""
    native = np.asarray(array, array.dtype.newbyteorder("="), order="C")
    narrow = native.astype(jax.dtypes.canonicalize_dtype(native.dtype), copy=False)
    if jnp.issubdtype(native.dtype, jnp.integer) and (narrow != native).any():
        raise InvalidExportError(
            f"Leaf {name!r} is {quote(array)} with numbers that {narrow.dtype} cannot hold. Enable 64-bit types "
            "with jax_enable_x64, or store smaller numbers."
        )
    return narrow


def _quantized(params: Any) -> dict[str, str]:
    """The dequantized dtype of each quantized leaf, by path."""
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
    return {path_string(path): node.dtype.name for path, node in nodes if is_quantized(node)}


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an argument, without its sharding."""
    array = leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else jnp.asarray(leaf)
    return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype, allow_extended_dtype=True))
