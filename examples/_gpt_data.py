"""Characters of the Python standard library: the text that every machine with Python has."""

import os
import string
from pathlib import Path
from typing import NamedTuple

import numpy as np

HELD_OUT = ("inspect.py", "os.py")
ALPHABET = "\n" + string.ascii_letters + string.digits + string.punctuation + " "
UNKNOWN = ALPHABET.index("?")
_CODES = np.full(256, UNKNOWN, np.int32)
_CODES[np.frombuffer(ALPHABET.encode(), np.uint8)] = np.arange(len(ALPHABET))


class Text(NamedTuple):
    """Characters as positions in ``ALPHABET``, int32[n] each; the held-out files are not among those for training."""

    train: np.ndarray
    held_out: np.ndarray


def encode(source: bytes) -> np.ndarray:
    """Characters as numbers, int32[n]; what is not printable ASCII becomes a question mark."""
    return _CODES[np.frombuffer(source.replace(b"\r", b"").expandtabs(8), np.uint8)]


def decode(codes: np.ndarray) -> str:
    """Numbers as characters."""
    return "".join(ALPHABET[code] for code in codes)


def load() -> Text:
    """Reads the modules that lie beside ``os.py``."""
    folder = Path(os.__file__).parent
    files = sorted(folder.glob("*.py"))
    if not all((folder / name).exists() for name in HELD_OUT):
        raise SystemExit(f"error: the standard library in {folder} has no sources")
    train = b"".join(file.read_bytes() for file in files if file.name not in HELD_OUT)
    held_out = b"".join((folder / name).read_bytes() for name in HELD_OUT)
    return Text(encode(train), encode(held_out))


def batch(codes: np.ndarray, *, size: int, length: int, step: int, seed: int) -> np.ndarray:
    """Random excerpts of one step, int32[size, length]; they depend on nothing but the arguments."""
    starts = np.random.default_rng((seed, step)).integers(0, len(codes) - length + 1, size)
    return codes[starts[:, None] + np.arange(length)]


def excerpts(codes: np.ndarray, *, count: int, length: int) -> np.ndarray:
    """Excerpts at equal distances, always the same, int32[count, length]."""
    starts = np.linspace(0, len(codes) - length, count).astype(int)
    return codes[starts[:, None] + np.arange(length)]
