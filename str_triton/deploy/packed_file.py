"""The container of packed tensors: a safetensors file whose header is protected by a checksum (docs/packed-format.md).

Written here and not by the safetensors library, whose headers have no fixed order: equal models give equal bytes, and
the checksum has its place.
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
import torch
from numpy.typing import NDArray

from str_triton.files import write_atomically

# safetensors' names of the dtypes that can be stored.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FORMAT, VERSION = "str_triton.packed", "1"
NO_DIGEST = "0" * 64  # what stands for the header's SHA-256 while it is computed


@dataclass(frozen=True)
class Part:
    """One tensor of the container: its safetensors dtype and shape, and its bytes [size] as uint8."""

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class PackedFile:
    """What a packed file holds: `content` is the description of the tensors, `size` the file's bytes."""

    content: dict[str, Any]
    parts: dict[str, Part]
    size: int


def digest(*data: bytes | NDArray[np.uint8]) -> str:
    """SHA-256 of all the bytes, one after the other, in hexadecimal."""
    total = hashlib.sha256()
    for block in data:
        total.update(block)
    return total.hexdigest()


def write_packed(path: str | os.PathLike[str], parts: Mapping[str, Part], content: Mapping[str, Any]) -> int:
    """Write the file `path`, whole or not at all (`files.replacing`), and return its size in bytes.

    Raises OSError where it cannot be written; nothing is left beside it then.
    """
    # Wide elements first, so that all are aligned.
    order = sorted(parts, key=lambda name: -DTYPES[parts[name].dtype].itemsize)
    entries, end = {}, 0
    for name in order:
        begin, end = end, end + parts[name].data.size
        entries[name] = {"dtype": parts[name].dtype, "shape": parts[name].shape, "data_offsets": (begin, end)}
    metadata = {"format": FORMAT, "version": VERSION, "sha256": NO_DIGEST, "content": _json(content)}
    text = _json({"__metadata__": metadata, **entries}).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    header = header.replace(NO_DIGEST.encode(), digest(header).encode(), 1)
    write_atomically(path, header, *(parts[name].data for name in order))
    return len(header) + end


def read_packed(path: str | os.PathLike[str]) -> PackedFile:
    """The file, every byte of it checked.

    Raises:
        ValueError: not a packed file, one of another version, a damaged header, or a damaged or missing tensor, which
            the message names.
        OSError: the file cannot be read.
    """
    data = np.frombuffer(Path(path).read_bytes(), np.uint8)
    begin, header = _header(path, data)
    metadata = header.pop("__metadata__")
    content = json.loads(metadata["content"])
    parts = {
        name: Part(entry["dtype"], tuple(entry["shape"]), data[slice(*(begin + o for o in entry["data_offsets"]))])
        for name, entry in header.items()
    }
    whole = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    for name, entry in content["tensors"].items():
        if "sha256" not in entry:
            continue  # stored under another name
        own = own_parts(name, parts)
        if any(begin + header[key]["data_offsets"][1] > data.size for key in own):
            raise ValueError(f"{path}: tensor {name!r} is cut off: the file has {data.size:,} of {whole:,} bytes")
        if digest(*(part.data for part in own.values())) != entry["sha256"]:
            raise ValueError(f"{path}: tensor {name!r} is damaged: its bytes have another checksum")
    if data.size != whole:
        raise ValueError(f"{path}: {data.size - whole:,} bytes follow the last tensor")
    return PackedFile(content, parts, data.size)


def own_parts(name: str, parts: Mapping[str, Part]) -> dict[str, Part]:
    """What is stored of a tensor, in the order of its checksum: itself if dense, else values, positions and signs."""
    keys = (name, *part_names(name))
    return {key: parts[key] for key in keys if key in parts}


def part_names(name: str) -> tuple[str, str, str]:
    """Under what the values, positions and signs of a sparse tensor are stored."""
    return f"{name}|values", f"{name}|positions", f"{name}|signs"


def _header(path: str | os.PathLike[str], data: NDArray[np.uint8]) -> tuple[int, dict[str, Any]]:
    """Where the header ends, and what it says once format, version and checksum are known to be right."""
    other = f"{path}: not a packed file; python -m str_triton pack makes one"
    if data.size < 8 or data[8:9].tobytes() != b"{":
        raise ValueError(other)
    end = 8 + struct.unpack("<Q", data[:8])[0]
    if end > data.size:
        raise ValueError(f"{path}: the header is damaged or cut off: the file has {data.size:,} of {end:,} bytes")
    raw = data[:end].tobytes()
    try:
        header = json.loads(raw[8:])
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: the header is damaged: it is no JSON") from None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(other)
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path}: packed format version {metadata.get('version')}; this str_triton reads {VERSION}")
    stated = str(metadata.get("sha256"))
    if digest(raw.replace(stated.encode(errors="replace"), NO_DIGEST.encode(), 1)) != stated:
        raise ValueError(f"{path}: the header is damaged: its bytes have another checksum")
    return end, header


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
