"""Helpers of the tests of packed files: comparison to the bit, and a file with everything in it."""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from str_triton import LowRankLinear, deploy


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Equal names in equal order, shapes, dtypes and bits, those of NaN and -0.0 too."""
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and torch.equal(bits(a[name]), bits(b[name]))
        for name in a
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def holed(*shape: int, sparsity: float = 0.9, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values, of which a share is zero."""
    return torch.randn(shape, dtype=torch.float64).masked_fill(torch.rand(shape) < sparsity, 0).to(dtype)


class Everything(nn.Module):
    """A tensor of every encoding: gaps, a bitmask, dense, signs, shared, a scalar, an empty one, factors."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps = nn.Parameter(holed(40, 50))
        self.mask = nn.Parameter(holed(20, 50, sparsity=0.5))
        self.dense = nn.Parameter(torch.randn(7, 3))
        signs = holed(40, 30)
        self.signs = nn.Parameter(torch.where(torch.rand(40, 30) < 0.5, -signs, signs))
        self.shared = self.gaps
        self.linear = LowRankLinear(30, 20, max_rank=3)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("empty", torch.zeros(0, 4))


def file_of_everything(path: Path) -> Path:
    deploy.pack(Everything(), path, metadata={"note": "all of it"})
    return path


def header_of(file: bytes) -> tuple[int, dict]:
    """Return the offset of the data, and the header."""
    start = 8 + struct.unpack("<Q", file[:8])[0]
    return start, json.loads(file[8:start])


def content_of(file: bytes) -> dict[str, Any]:
    """Return the header's description of the tensors."""
    return json.loads(header_of(file)[1]["__metadata__"]["content"])


def sealed(header: dict | str, data: bytes) -> bytes:
    """Return the file with the right checksum in its header, which has a place for it."""
    if isinstance(header, dict):
        header["__metadata__"]["sha256"] = "0" * 64
        header = json.dumps(header)
    text = header.encode()
    raw = struct.pack("<Q", len(text)) + text
    return raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode(), 1) + data


def with_content(file: bytes, content: Any) -> bytes:
    """Return the file with another description of its tensors: JSON, or a text that is used unchanged."""
    start, header = header_of(file)
    header["__metadata__"]["content"] = content if isinstance(content, str) else json.dumps(content)
    return sealed(header, file[start:])
