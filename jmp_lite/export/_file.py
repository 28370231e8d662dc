"""One safetensors file: named arrays and a header, and a digest over every byte of it."""

import hashlib
import io
import json
import os
import pathlib
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save

from jmp_lite._dtypes import OF_4_BITS
from jmp_lite.errors import CorruptArtifactError, InvalidExportError
from jmp_lite.export._header import FORMAT, PROGRAM, Header, Slot, pack, parse, unpack

Arrays = dict[str, NDArray[Any]]
PathLike = str | os.PathLike[str]

#: What stands before the digest in the file. It is the only entry of the metadata, whose order would be random.
_MARK = b'"jmp_lite":"sha256:'
_LENGTH = 64
_UNKNOWN = b"0" * _LENGTH
#: The longest header that safetensors reads.
_LONGEST = 100_000_000
#: Bytes that are read and hashed at a time.
_CHUNK = 1 << 20
#: Where arrays begin in memory, so that JAX takes them over without a copy.
_ALIGNMENT = 64


def write(path: PathLike, arrays: Arrays, header: dict[str, Any]) -> str:
    """Writes arrays and a header, and returns the digest; replaces an existing file atomically."""
    dtypes = {name: array.dtype.name for name, array in arrays.items()}
    packed = {name: array.shape for name, array in arrays.items() if array.dtype in OF_4_BITS}
    arrays = {name: pack(array) if name in packed else array for name, array in arrays.items()}
    ours = {
        "format": FORMAT,
        "dtypes": dtypes,
        "packed": packed,
        "program": hashlib.sha256(arrays[PROGRAM].data).hexdigest(),
    }
    text = json.dumps({**ours, **header}, sort_keys=True)
    try:
        data = bytearray(save(arrays, {"jmp_lite": f"sha256:{_UNKNOWN.decode()} {text}"}))
    except SafetensorError as error:
        raise InvalidExportError(f"The weights cannot be stored: {error}. Cast or leave out what is named.") from None
    at = data.index(_MARK + _UNKNOWN) + len(_MARK)
    digest = hashlib.sha256(data).hexdigest()
    data[at : at + _LENGTH] = digest.encode()
    target = pathlib.Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return digest


def read(path: PathLike, pinned: str | None) -> tuple[Arrays, Header, str]:
    """Reads a file that ``write`` wrote, every byte once and in place, and also returns the digest.

    Raises:
        CorruptArtifactError: If the file is not an artifact, or its digest is not the pinned one.
    """
    name = repr(os.fspath(path))
    with pathlib.Path(path).open("rb") as file:
        length, text = _read_header(file)
        at = text.find(_MARK) + len(_MARK)
        if at < len(_MARK):
            raise CorruptArtifactError(
                f"{name} is not an artifact of jmp_lite.export, or its header is damaged. Make one with "
                "jmp_lite.export.freeze."
            )
        hashed = hashlib.sha256(length + text[:at] + _UNKNOWN + text[at + _LENGTH :])
        wrong: ValueError | None = None
        slots: list[Slot] = []
        header: Header = {}
        try:
            slots, header = parse(text, os.fstat(file.fileno()).st_size - len(length) - len(text))
        except ValueError as error:
            wrong = error
        blocks = [_read_block(file, slot.size, hashed) for slot in slots]
        while rest := file.read(_CHUNK):
            hashed.update(rest)
    found = hashed.hexdigest()
    _check_digest(name, text[at : at + _LENGTH].decode(errors="replace"), found, pinned)
    if wrong is not None:
        raise CorruptArtifactError(f"{name} is not written as artifacts are: {wrong}. Freeze the model again.")
    return {slot.name: _array(slot, block) for slot, block in zip(slots, blocks, strict=True)}, header, found


def _array(slot: Slot, block: NDArray[np.uint8]) -> NDArray[Any]:
    return unpack(block, slot) if slot.dtype in OF_4_BITS else block.view(slot.dtype).reshape(slot.shape)


def _read_header(file: io.BufferedReader) -> tuple[bytes, bytes]:
    """The length of the header, as stored in the file, and the header, which may be truncated."""
    length = file.read(8)
    return length, file.read(min(int.from_bytes(length, "little"), _LONGEST))


def _read_block(file: io.BufferedReader, size: int, hashed: Any) -> NDArray[np.uint8]:
    """The next bytes of a file, hashed while in cache; zeros past its end."""
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    block = memory[start : start + size]
    for at in range(0, size, _CHUNK):
        part = block.data[at : at + _CHUNK]
        hashed.update(part[: file.readinto(part)])
    return block


def _check_digest(name: str, stored: str, found: str, pinned: str | None) -> None:
    if stored != found:
        raise CorruptArtifactError(
            f"{name} was changed after it was written: its digest is {found}, but it says {stored}. Copy it again, or "
            "freeze the model again."
        )
    if not (pinned is None or isinstance(pinned, str)):
        raise CorruptArtifactError(f"digest must be the text that freeze returned, or None, got {pinned!r}.")
    if pinned is not None and pinned.strip().lower().removeprefix("sha256:") != found:
        raise CorruptArtifactError(
            f"{name} is another artifact: digest={pinned!r} was asked for, it has {found!r}. Load the file that freeze "
            "returned this digest for, or pin the new one."
        )
