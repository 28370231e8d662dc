"""The header of a model file: the positions of its arrays, and how the program was frozen."""

import json
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jmp_lite._dtypes import OF_4_BITS

FORMAT = 1
#: The name under which the program stands among the weights.
PROGRAM = "__program__"
#: A name that safetensors keeps for itself.
RESERVED = "__metadata__"
#: What stands before our own text in the metadata: the kind of the digest, and its digits.
_DIGEST = "sha256:" + "0" * 64

#: What arrays may be of. A table, because NumPy evaluates some texts that it is asked for a dtype of.
_DTYPES: dict[str, np.dtype[Any]] = {
    kind.dtype.name: np.dtype(kind) for kind in vars(jnp).values() if isinstance(kind, type(jnp.float32))
}

Header = dict[str, Any]


class Slot(NamedTuple):
    """An array of the file; arrays are contiguous, without gaps."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Its bytes; two 4-bit numbers take one."""
        return (
            -(-math.prod(self.shape) // 2) if self.dtype in OF_4_BITS else math.prod(self.shape) * self.dtype.itemsize
        )


def pack(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Packs two 4-bit numbers per byte, the first in the low bits."""
    bits = array.ravel().view(np.uint8) & 15
    bits = np.pad(bits, (0, bits.size % 2))
    return bits[::2] | bits[1::2] << 4


def unpack(packed: np.ndarray[Any, Any], slot: Slot) -> np.ndarray[Any, Any]:
    """Undoes ``pack``."""
    bits = np.stack([packed & 15, packed >> 4], axis=1).ravel()
    return bits[: math.prod(slot.shape)].view(slot.dtype).reshape(slot.shape)


def parse(text: bytes, size: int) -> tuple[list[Slot], Header]:
    """Parses the JSON at the start of a file, before ``size`` bytes of arrays.

    Returns:
        The arrays in file order, and jmp_lite's header, with all entries present and of the right type.

    Raises:
        ValueError: If anything differs from what ``freeze`` writes; the message says what.
    """
    try:
        described = json.loads(text)
        header = json.loads(described.pop("__metadata__")["jmp_lite"][len(_DIGEST) :])
        _check_header(header)
        slots = _slots(described, header["dtypes"], header["packed"], size)
        _check_arrays({slot.name: slot for slot in slots}, header)
    except KeyError as error:
        raise ValueError(f"there is no {error}") from None
    except (TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return slots, header


def _check_header(header: Any) -> None:
    if type(header["format"]) is not int or header["format"] != FORMAT:
        raise ValueError(f"it has format {header['format']!r}, this version of jmp_lite reads {FORMAT}")
    optional = [header[name] for name in ("policy", "recipe")]
    texts = [header["jax"], header["program"], *(value for value in optional if value is not None)]
    platforms, quantized, packed = header["platforms"], header["quantized"], header["packed"]
    if not isinstance(platforms, list) or not platforms:
        raise ValueError(f"platforms are {platforms!r:.80}")
    texts += [*packed, *platforms, *header["dtypes"].values(), *quantized.values()]
    wrong = [value for value in texts if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"{wrong[0]!r:.80} stands where text should be")


def _slots(described: dict[str, Any], dtypes: dict[str, str], packed: dict[str, Any], size: int) -> list[Slot]:
    """Arrays by their position in the file, which they fill."""
    slots, end = [], 0
    for name, entry in sorted(described.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = _dtype(dtypes[name])
        shape = packed[name] if dtype in OF_4_BITS else entry["shape"]
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError(f"{name!r} has shape {shape!r:.80}")
        slot = Slot(name, tuple(shape), dtype)
        if entry["data_offsets"] != [end, end + slot.size]:
            raise ValueError(f"{name!r} does not lie where the array before it ends")
        slots.append(slot)
        end += slot.size
    if end != size:
        raise ValueError(f"its arrays have {end} bytes, but there are {size}")
    return slots


def _dtype(name: str) -> np.dtype[Any]:
    if name not in _DTYPES:
        raise ValueError(f"{name!r:.80} is not a dtype of an array")
    return _DTYPES[name]


def _check_arrays(slots: dict[str, Slot], header: Header) -> None:
    """Checks that the program exists, and that every array in the header exists."""
    if slots[PROGRAM].dtype != np.uint8 or len(slots[PROGRAM].shape) != 1:
        raise ValueError("its program is not a sequence of bytes")
    for name in header["dtypes"]:
        slots[name]
    for path, dtype in header["quantized"].items():
        _dtype(dtype)
        for part in ("values", "scale"):
            slots[f"{path}/{part}".removeprefix("/")]
