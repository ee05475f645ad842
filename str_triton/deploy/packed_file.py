"""The container of packed tensors: a safetensors file with a checksum of its header (docs/packed-format.md).

The file is not written by the safetensors library, because the order in its headers is not fixed. Here equal models
give equal bytes, and the header has a place for its checksum.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from str_triton.deploy.content import DTYPES, Array, Content, Shared, check, own_arrays, record
from str_triton.deploy.typed_json import loads, typed
from str_triton.files import write_atomically
from str_triton.programs import command

FORMAT, VERSION = "str_triton.packed", "1"
NO_DIGEST = "0" * 64  # the placeholder of the header's SHA-256 while it is computed


@dataclass(frozen=True)
class Part:
    """One array of the container: its safetensors dtype and shape, and its bytes [size] as uint8."""

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class PackedFile:
    """The content of a packed file. `size` is the number of the file's bytes."""

    content: Content
    parts: dict[str, Part]
    size: int


def digest(*data: bytes | NDArray[np.uint8]) -> str:
    """Return the SHA-256 of the concatenated bytes, in hexadecimal."""
    total = hashlib.sha256()
    for block in data:
        total.update(block if isinstance(block, bytes) else block.data)
    return total.hexdigest()


def write_packed(path: str | os.PathLike[str], parts: Mapping[str, Part], content: Content) -> int:
    """Write the file `path` atomically (`files.replacing`), and return its size in bytes.

    Raises ValueError for a content that `read_packed` would refuse, and OSError if the file cannot be written. No other
    file is left behind then.
    """
    # Arrays with wide elements come first, so that all are aligned.
    order = sorted(parts, key=lambda name: -DTYPES[parts[name].dtype].itemsize)
    arrays, end = {}, 0
    for name in order:
        begin, end = end, end + parts[name].data.size
        arrays[name] = Array(parts[name].dtype, parts[name].shape, (begin, end))
    metadata = {"format": FORMAT, "version": VERSION, "sha256": NO_DIGEST, "content": _json(record(content))}
    text = _json({"__metadata__": metadata, **{name: vars(array) for name, array in arrays.items()}}).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    check(typed(Content, loads(metadata["content"]), "content"), arrays, len(header) + end)
    header = header.replace(NO_DIGEST.encode(), digest(header).encode(), 1)
    write_atomically(path, header, *(parts[name].data for name in order))
    return len(header) + end


def read_packed(path: str | os.PathLike[str]) -> PackedFile:
    """Read a file and check every byte of it.

    Raises:
        ValueError: not a packed file, another version, a damaged or invalid header, or a damaged or missing tensor,
            which the message names.
        OSError: the file cannot be read.
    """
    data = np.frombuffer(Path(path).read_bytes(), np.uint8)
    begin, header = _header(path, data)
    metadata = header.pop("__metadata__")
    try:
        content = typed(Content, loads(metadata["content"]), "content")
        arrays = typed(dict[str, Array], header, "header")
        check(content, arrays, data.size)
    except ValueError as error:
        raise ValueError(f"{path}: the header has the right checksum and the wrong content: {error}") from None
    parts = {
        name: Part(array.dtype, array.shape, data[slice(*(begin + offset for offset in array.data_offsets))])
        for name, array in arrays.items()
    }
    whole = begin + max((array.data_offsets[1] for array in arrays.values()), default=0)
    for name, entry in content.tensors.items():
        if isinstance(entry, Shared):
            continue
        own = own_arrays(name, arrays)
        if any(begin + arrays[key].data_offsets[1] > data.size for key in own):
            raise ValueError(f"{path}: tensor {name!r} is cut off: the file has {data.size:,} of {whole:,} bytes")
        if digest(*(parts[key].data for key in own)) != entry.sha256:
            raise ValueError(f"{path}: tensor {name!r} is damaged: its bytes have another checksum")
    if data.size != whole:
        raise ValueError(f"{path}: {data.size - whole:,} bytes follow the last tensor")
    return PackedFile(content, parts, data.size)


def _header(path: str | os.PathLike[str], data: NDArray[np.uint8]) -> tuple[int, dict[str, Any]]:
    """Return the position at which the header ends, and the header. Check its format, version and checksum."""
    other = f"{path}: not a packed file; {command('pack')} makes one"
    if data.size < 8 or data[8:9].tobytes() != b"{":
        raise ValueError(other)
    end = 8 + struct.unpack("<Q", data[:8].tobytes())[0]
    if end > data.size:
        raise ValueError(f"{path}: the header is damaged or cut off: the file has {data.size:,} of {end:,} bytes")
    raw = data[:end].tobytes()
    try:
        header = loads(raw[8:])
    except ValueError as error:
        raise ValueError(f"{path}: the header is damaged: {error}") from None
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(other)
    version, stated = metadata.get("version"), metadata.get("sha256")
    if version != VERSION:
        raise ValueError(f"{path}: packed format version {version!r:.20}; this str_triton reads {VERSION}")
    if not isinstance(stated, str) or not stated.isascii() or len(stated) != len(NO_DIGEST):
        stated = ""
    if not stated or digest(raw.replace(stated.encode(), NO_DIGEST.encode(), 1)) != stated:
        raise ValueError(f"{path}: the header is damaged: its bytes have another checksum")
    if not isinstance(metadata.get("content"), str):
        raise ValueError(f"{path}: the header has no content")
    return end, header


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
