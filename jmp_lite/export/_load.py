"""``load``: a frozen model as a function."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import default_export_platform, deserialize
from jax.interpreters import mlir

from jmp_lite._policy import PolicyLike, get_policy
from jmp_lite.errors import CorruptArtifactError, PlatformMismatchError, PolicyMismatchError
from jmp_lite.export._compat import parse_program
from jmp_lite.export._file import Arrays, PathLike, read
from jmp_lite.export._header import PROGRAM, Header
from jmp_lite.quant import DotRecipe, get_recipe
from jmp_lite.quant._array import QuantizedArray


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Served:
    """A frozen model: a function of arrays that holds its weights.

    It is jitted. Call it with arrays of the shapes and dtypes in ``in_avals``.

    Attributes:
        policy: Its policy, as text; ``None`` if it was frozen without one.
        recipe: Its recipe, as text, or ``None``.
        platforms: Where it runs: ``"cpu"``, ``"cuda"``, ``"rocm"``, ``"tpu"``.
        params: Weights by path; quantized ones as ``QuantizedArray``.
        in_avals: Shapes and dtypes of the arguments, in their containers.
        out_avals: The same for the result.
        jax_version: The JAX version that froze it.
        digest: SHA-256 of the file.

    Example:
        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/model.safetensors"
        >>> digest = jmp.export.freeze(lambda w, x: x @ w, jnp.eye(3), jnp.ones((2, 3)), path=path, recipe="w8a16")
        >>> served = jmp.export.load(path)
        >>> served
        Served((float32[2,3]) -> float32[2,3], policy=None, recipe='lhs=none,rhs=int8:channel,grad=none', ...)
        >>> served.params
        {'': QuantizedArray(int8[3, 3], scale=float32[1, 3], dtype=float32)}
    """

    policy: str | None
    recipe: str | None
    platforms: tuple[str, ...]
    params: dict[str, Any]
    in_avals: Any
    out_avals: Any
    jax_version: str
    digest: str
    _weights: dict[str, jax.Array]
    _program: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """Runs the program.

        Raises:
            ValueError: From JAX, if the arguments have other shapes, dtypes or containers.
        """
        return self._program(*args, weights=self._weights)

    def __repr__(self) -> str:
        taken, given = (jax.tree.map(str, avals) for avals in (self.in_avals, self.out_avals))
        signature = f"({', '.join(_plain(aval) for aval in taken)}) -> {_plain(given)}"
        return (
            f"Served({signature}, policy={self.policy!r}, recipe={self.recipe!r}, platforms={list(self.platforms)}, "
            f"{sum(weight.nbytes for weight in self._weights.values())} bytes of weights)"
        )


def _plain(tree: Any) -> str:
    return str(tree).replace("'", "")


def load(
    path: PathLike,
    *,
    policy: PolicyLike | None = None,
    recipe: str | DotRecipe | None = None,
    digest: str | None = None,
) -> Served:
    """Loads a file that ``freeze`` wrote; it needs neither the model's code nor its framework.

    It rejects a file with any change, or with a malformed header or program. This protects against damage, not
    tampering: anyone who can write the file can also write a whole new one, so pass the ``digest`` for files from
    places that you do not control. JAX runs the program without further checks, and crafted bytes may crash its parser.
    On a CPU, weights are read once, directly into the memory where they are used.

    Args:
        path: The file.
        policy: The expected policy; ``None`` accepts any.
        recipe: The expected recipe; ``None`` accepts any.
        digest: The digest that ``freeze`` returned, to accept only that file.

    Returns:
        A function of the arguments given to ``freeze``; its attributes describe it.

    Raises:
        CorruptArtifactError: If the file is not an artifact, was changed, is malformed, or does not match ``digest``.
        FileNotFoundError: If the file does not exist.
        PlatformMismatchError: If it was frozen for other platforms, by an incompatible JAX, or with float64, which is
            not enabled here.
        PolicyMismatchError: If the policy or the recipe differs from the one it was frozen with.

    Example:
        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/model.safetensors"
        >>> digest = jmp.export.freeze(
        ...     lambda w, x: x @ w, jnp.eye(3), jnp.ones((2, 3)), path=path, policy="mixed_bfloat16"
        ... )
        >>> print(jmp.export.load(path, policy="mixed_bfloat16", digest=digest)(jnp.ones((2, 3))))
        [[1. 1. 1.]
         [1. 1. 1.]]
        >>> jmp.export.load(path, policy="mixed_float16")
        Traceback (most recent call last):
        jmp_lite.errors.PolicyMismatchError: The artifact was frozen with policy 'p=full,c=bf16,o=full', but is ...

    References:
        ``jax.export.deserialize``; see ``freeze``.
    """
    arrays, header, found = read(path, digest)
    _check("policy", header["policy"], None if policy is None else str(get_policy(policy)))
    _check("recipe", header["recipe"], None if recipe is None else str(get_recipe(recipe)))
    here = default_export_platform()
    if here not in header["platforms"]:
        raise PlatformMismatchError(
            f"{str(path)!r} was frozen for {', '.join(header['platforms'])}, but this process runs on {here}. Freeze "
            f"it with platforms={[*header['platforms'], here]}."
        )
    exported = _take_program(repr(str(path)), arrays, header)
    weights = {name: _on_device(repr(str(path)), name, arrays.pop(name)) for name in list(arrays)}
    in_avals, _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    return Served(
        header["policy"],
        header["recipe"],
        tuple(header["platforms"]),
        _params(weights, header["quantized"]),
        tuple(in_avals),
        jax.tree.unflatten(exported.out_tree, exported.out_avals),
        header["jax"],
        found,
        weights,
        jax.jit(exported.call),
    )


def _take_program(path: str, arrays: Arrays, header: Header) -> Any:
    """Takes the program out of the arrays, parses it to its last operation, and checks it against the others."""
    data: Any = arrays.pop(PROGRAM).data
    try:
        if hashlib.sha256(data).hexdigest() != header["program"]:
            raise TypeError("it is not the one that the header describes")
        exported = deserialize(data)
        del data  # the program may be most of the file
        with mlir.make_ir_context():
            parse_program(exported)
        _, taken = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        jax.tree.unflatten(exported.out_tree, exported.out_avals)
        if _types(taken["weights"]) != _types(arrays) or list(exported.platforms) != header["platforms"]:
            raise TypeError("it takes other weights than the file has, or runs elsewhere than the header says")
    except Exception as error:
        if isinstance(error, ValueError) and header["jax"] != jax.__version__:
            raise PlatformMismatchError(
                f"{path} was frozen with JAX {header['jax']}, and JAX {jax.__version__} cannot read its program: "
                f"{error} Freeze the model again."
            ) from None
        raise CorruptArtifactError(
            f"{path} has a program that cannot be read: {type(error).__name__}: {error!s:.300}. Freeze the model again."
        ) from error
    return exported


def _types(arrays: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (tuple(array.shape), array.dtype) for name, array in arrays.items()}


def _on_device(path: str, name: str, array: np.ndarray[Any, Any]) -> jax.Array:
    """The array on its device, without a copy if this memory can be used."""
    weight: jax.Array = jax.device_put(array, may_alias=True)
    if weight.dtype != array.dtype:
        raise PlatformMismatchError(
            f"{path} needs {array.dtype} for {name!r}. Set jax.config.update('jax_enable_x64', True) before."
        )
    return weight


def _check(what: str, frozen: str | None, expected: str | None) -> None:
    if expected is not None and frozen != expected:
        said = f"with {what} {frozen!r}" if frozen is not None else f"without a {what}"
        raise PolicyMismatchError(
            f"The artifact was frozen {said}, but is expected to have {expected!r}. Load it with the {what} that it "
            f"was frozen with, or freeze the model again."
        )


def _params(weights: dict[str, jax.Array], quantized: dict[str, str]) -> dict[str, Any]:
    """Weights by path, with quantized ones reassembled."""
    params: dict[str, Any] = {}
    for name, weight in weights.items():
        parent, _, part = name.rpartition("/")
        if parent not in quantized or part not in ("values", "scale"):
            params[name] = weight
        elif parent not in params:
            values, scale = (weights[f"{parent}/{part}".removeprefix("/")] for part in ("values", "scale"))
            params[parent] = QuantizedArray(values, scale, jnp.dtype(quantized[parent]))
    return params
