"""Floating-point formats: their names, what a mistyped name may mean, and which of them an accelerator runs fast."""

import functools
import re
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_lite._messages import nearest, quote, warn
from jmp_lite.errors import InvalidPolicyError, SlowDtypeWarning, UnknownDtypeError

DType = np.dtype[Any]

#: Scalar type -> its names, the one that ``str(policy)`` prints first. Keys and leading names are those of jmp.
dtype_to_names: dict[Any, tuple[str, ...]] = {
    jnp.bfloat16: ("bf16", "bfloat16"),
    jnp.float16: ("f16", "float16", "fp16"),
    jnp.float32: ("full", "f32", "float32", "fp32"),
    jnp.float64: ("f64", "float64", "fp64"),
    jnp.float8_e4m3fn: ("f8_e4m3fn", "float8_e4m3fn", "f8e4m3fn", "e4m3"),
    jnp.float8_e5m2: ("f8_e5m2", "float8_e5m2", "f8e5m2", "e5m2"),
    jnp.float8_e3m4: ("float8_e3m4",),
    jnp.float8_e4m3: ("float8_e4m3",),
    jnp.float8_e4m3b11fnuz: ("float8_e4m3b11fnuz",),
    jnp.float8_e4m3fnuz: ("float8_e4m3fnuz",),
    jnp.float8_e5m2fnuz: ("float8_e5m2fnuz",),
    jnp.float4_e2m1fn: ("float4_e2m1fn",),
}

#: Name -> scalar type: the inverse of ``dtype_to_names``.
name_to_dtype: dict[str, Any] = {name: dtype for dtype, names in dtype_to_names.items() for name in names}

ACCEPTED_NAMES = ", ".join(["half", *name_to_dtype])

FLOAT32 = np.dtype(np.float32)
#: The formats that a policy casts even when it does not name them.
STANDARD_FORMATS = frozenset({np.dtype(jnp.bfloat16), np.dtype(np.float16), FLOAT32})
#: Those of 16 bits.
NARROW_FORMATS = STANDARD_FORMATS - {FLOAT32}
#: Formats of which two numbers are stored in one byte, though NumPy uses one byte for each.
OF_4_BITS = frozenset(map(np.dtype, (jnp.int4, jnp.uint4, jnp.float4_e2m1fn)))


def half_dtype() -> DType:
    """Returns the 16-bit dtype of the current backend: bfloat16 on TPU, float16 elsewhere (as in jmp).

    Returns:
        ``np.dtype`` of ``bfloat16`` or ``float16``, decided by the first local device.

    Example:
        >>> jmp.half_dtype().itemsize
        2
    """
    on_tpu = jax.local_devices()[0].platform == "tpu"
    half: DType = np.dtype(jnp.bfloat16 if on_tpu else jnp.float16)
    return half


def parse_dtype(value: str) -> DType:
    """Returns the dtype with the given name; case and surrounding spaces do not matter.

    Args:
        value: ``"half"`` (see ``half_dtype``) or a name from ``dtype_to_names``, such as ``"bf16"`` or ``"float32"``.

    Returns:
        The ``np.dtype`` of that format.

    Raises:
        UnknownDtypeError: If nothing has that name.

    Example:
        >>> jmp.parse_dtype("bf16")
        dtype(bfloat16)
        >>> jmp.parse_dtype(" Float32 ")
        dtype('float32')
    """
    name = value.strip().lower() if isinstance(value, str) else ""
    if name == "half":
        return half_dtype()
    if name not in name_to_dtype:
        raise UnknownDtypeError(f"Unknown dtype {quote(value)}.{advice(name)} Accepted: {ACCEPTED_NAMES}.")
    dtype: DType = np.dtype(name_to_dtype[name])
    return dtype


#: Formats of 8 bits as people write them: fp8, int8, float8, 8-bit, w8a8.
_EIGHT_BITS = re.compile(r"(?<!\d)8(?!\d)")


def advice(name: str, policies: Collection[str] = ()) -> str:
    """Says what a name may mean that is neither a dtype nor a policy, as sentences to go after the first of a message.

    Args:
        name: The name.
        policies: Names of policies, where one may stand.

    Returns:
        The name that comes nearest, and where to ask for 8 bits; nothing where neither applies.
    """
    name = name.strip().lower()
    wants_8_bits = _EIGHT_BITS.search(name) is not None
    names = [known for known in (*policies, "half", *name_to_dtype) if bool(_EIGHT_BITS.search(known)) == wants_8_bits]
    near = nearest(name, names, len(name) // 2)
    sentences = [f" Did you mean {'the policy ' if near[0] in policies else ''}{near[0]!r}?"] if near else []
    if wants_8_bits:
        recipe = "INT8_TRAIN" if re.search("int|i8|w8", name) else "FP8"
        sentences.append(
            " Only matmuls run in 8 bits, by a recipe beside the policy: write autocast(fun, 'mixed_bfloat16', "
            f"dot=jmp_lite.quant.{recipe})."
        )
    return "".join(sentences)


def dtype_or_none(value: Any) -> DType | None:
    """Returns the dtype that a name, or anything that NumPy takes for a dtype, stands for, or ``None``."""
    try:
        return parse_dtype(value) if isinstance(value, str) else np.dtype(value) if value is not None else None
    except (TypeError, UnknownDtypeError):
        return None


def dtype_name(dtype: DType) -> str:
    """Returns the name of a floating dtype that comes first in ``dtype_to_names``, such as "bf16"."""
    return dtype_to_names[dtype.type][0]


def canonical(dtype: DType) -> DType:
    """Returns the dtype JAX gives to such an array: native, and float32 for float64 unless x64 is enabled."""
    seen: DType = np.dtype(jax.dtypes.canonicalize_dtype(dtype.newbyteorder("=")))
    return seen


def at_least_float32(dtype: DType) -> DType:
    """Returns the dtype in which a scaled loss or an unscaled gradient of the given dtype is kept."""
    dtype = canonical(dtype)
    wide = jnp.issubdtype(dtype, jnp.complexfloating) or dtype.itemsize > FLOAT32.itemsize
    return dtype if wide else FLOAT32


def is_floating(array: Any) -> bool:
    """Whether something has a floating dtype, not a complex one: an array, or the shape or type of one."""
    dtype = getattr(array, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.floating))


def faster_dtype(dtype: DType, platform: str, compute_capability: str | None = None) -> str | None:
    """Names the format to use instead of one that the hardware has no fast units for.

    Args:
        dtype: The compute dtype.
        platform: ``"cpu"``, ``"gpu"``, ``"cuda"`` or ``"tpu"``.
        compute_capability: Of an NVIDIA GPU, such as ``"8.0"``; anything else (other vendors) is not judged.

    Returns:
        The name of a better choice, or None where the format is fine or nothing is known.

    References:
        NVIDIA CUDA C++ Programming Guide, compute capabilities: bfloat16 matrix units from 8.0 (Ampere), float8 from
        8.9 (Ada) and 9.0 (Hopper). TPU matrix units multiply bfloat16 and have no float16 mode.
    """
    if platform == "tpu":
        return "bfloat16" if dtype == np.float16 else None
    major, _, minor = (compute_capability or "").partition(".")
    if platform not in ("gpu", "cuda") or not (major.isdigit() and minor.isdigit()):
        return None
    capability = (int(major), int(minor))
    if dtype == jnp.bfloat16 and capability < (8, 0):
        return "float16"
    if dtype.itemsize == 1 and capability < (8, 9):
        return "bfloat16" if capability >= (8, 0) else "float16"
    return None


@functools.cache
def warn_if_slow(dtype: DType) -> None:
    """Warns, once per dtype, if the first local device cannot run it fast.

    Warns:
        SlowDtypeWarning: Naming the better format.
    """
    device = jax.local_devices()[0]
    better = faster_dtype(dtype, device.platform, getattr(device, "compute_capability", None))
    if better is not None:
        warn(
            f"{device.device_kind} has no fast units for compute dtype {dtype.name}; use {better} instead, for example "
            f"jmp_lite.get_policy('mixed_{better}').",
            SlowDtypeWarning,
        )


def refuse_8_bits(dtypes: Iterable[DType], caller: str) -> None:
    """Raises for compute dtypes of fewer than 16 bits, which need scales."""
    for dtype in dtypes:
        if dtype.itemsize < 2:
            raise InvalidPolicyError(
                f"{caller} computes in at least 16 bits, got the compute dtype {dtype}. Name one of 16; for matmuls "
                f"in {dtype} write autocast(fun, policy, dot=jmp_lite.quant.FP8). Accepted names: {ACCEPTED_NAMES}."
            )
