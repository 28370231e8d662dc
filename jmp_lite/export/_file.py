"""One safetensors file: named arrays and a header, and a digest over every byte of it."""

import hashlib
import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from jmp_lite.errors import CorruptArtifactError, InvalidExportError

Arrays = dict[str, np.ndarray[Any, Any]]
PathLike = str | os.PathLike[str]

FORMAT = 1
#: What stands before the digest in the file. It is the only entry of the metadata, whose order would be random.
_MARK = b'"jmp_lite":"sha256:'
_LENGTH = 64
_UNKNOWN = b"0" * _LENGTH


def _digest(data: memoryview, at: int) -> str:
    """SHA-256 of a file, with zeros where the digest itself stands."""
    hashed = hashlib.sha256(data[:at])
    hashed.update(_UNKNOWN)
    hashed.update(data[at + _LENGTH :])
    return hashed.hexdigest()


def write(path: PathLike, arrays: Arrays, header: dict[str, Any]) -> str:
    """Writes arrays and a header, and returns the digest; what stood there before is replaced at once or not at all."""
    dtypes = {name: array.dtype.name for name, array in arrays.items()}
    text = json.dumps({"format": FORMAT, "dtypes": dtypes, **header}, sort_keys=True)
    try:
        data = bytearray(save(arrays, {"jmp_lite": f"sha256:{_UNKNOWN.decode()} {text}"}))
    except SafetensorError as error:
        raise InvalidExportError(f"The weights cannot be stored: {error}. Cast or leave out what is named.") from None
    at = data.index(_MARK + _UNKNOWN) + len(_MARK)
    digest = _digest(memoryview(data), at)
    data[at : at + _LENGTH] = digest.encode()
    target = pathlib.Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return digest


def read(path: PathLike, pinned: str | None) -> tuple[Arrays, dict[str, Any], str]:
    """Reads what ``write`` wrote, and returns its digest too.

    Raises:
        CorruptArtifactError: If the file is anything else, or its digest is not the pinned one.
    """
    data = pathlib.Path(path).read_bytes()
    name = repr(os.fspath(path))
    start = data.find(_MARK, 0, 8 + int.from_bytes(data[:8], "little"))
    if start < 0:
        raise CorruptArtifactError(
            f"{name} is no artifact of jmp_lite.export, or its header is damaged. Make one with jmp_lite.export.freeze."
        )
    at = start + len(_MARK)
    stored, found = data[at : at + _LENGTH].decode(errors="replace"), _digest(memoryview(data), at)
    if stored != found:
        raise CorruptArtifactError(
            f"{name} was changed after it was written: its digest is {found}, but it says {stored}. Copy it again, or "
            "freeze the model anew."
        )
    if pinned is not None and pinned.strip().lower().removeprefix("sha256:") != found:
        raise CorruptArtifactError(
            f"{name} is another artifact: digest={pinned!r} was asked for, it has {found!r}. Load the file that freeze "
            "returned this digest for, or pin the new one."
        )
    arrays, header = _parse(data, name)
    return arrays, header, found


def _parse(data: bytes, name: str) -> tuple[Arrays, dict[str, Any]]:
    """Takes a file apart whose digest is right."""
    try:
        length = int.from_bytes(data[:8], "little")
        text = json.loads(data[8 : 8 + length])["__metadata__"]["jmp_lite"]
        header = json.loads(text[len("sha256:") + _LENGTH :])
        found = header["format"]
        arrays = {
            key: np.frombuffer(view["data"], jnp.dtype(header["dtypes"][key])).reshape(view["shape"])
            for key, view in deserialize(data)  # type: ignore[no-untyped-call]
            if found == FORMAT
        }
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtifactError(f"{name} is not written as artifacts are: {error}. Freeze the model anew.") from None
    if found != FORMAT:
        raise CorruptArtifactError(
            f"{name} has format {found!r}, this version of jmp_lite reads {FORMAT}. Freeze the model anew, or use the "
            "version that wrote it."
        )
    return arrays, header
