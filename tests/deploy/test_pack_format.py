"""docs/packed-format.md is enough to read a packed file: with the code on that page, and with code after its text."""

import hashlib
import json
import math
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from str_triton import deploy
from tests.deploy.packing import Everything, bits, holed

PAGE = (Path(__file__).parents[2] / "docs" / "packed-format.md").read_text()
DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I64": np.int64, "U8": np.uint8, "BOOL": np.bool_}


class Bits:
    """Bytes, bit by bit."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def next(self) -> int:
        bit = self.data[self.place // 8] >> self.place % 8 & 1
        self.place += 1
        return bit


def read_slowly(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A reader that follows the page's sentences one by one, a loop for each "in turn"."""
    content = path.read_bytes()
    (n,) = struct.unpack("<Q", content[0:8])
    header = json.loads(content[8 : 8 + n])
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "str_triton.packed"
    assert metadata["version"] == "1"
    before, stated, after = content[: 8 + n].partition(metadata["sha256"].encode())
    assert len(stated) == 64
    assert hashlib.sha256(before + b"0" * 64 + after).hexdigest() == metadata["sha256"]
    data = content[8 + n :]
    assert sum(end - begin for begin, end in (entry["data_offsets"] for entry in header.values())) == len(data)
    description = json.loads(metadata["content"])
    tensors = {}
    for name, about in description["tensors"].items():
        if "same_as" in about:
            tensors[name] = tensors[about["same_as"]]
            continue
        keys = [key for key in (name, f"{name}|values", f"{name}|positions", f"{name}|signs") if key in header]
        arrays = {key.removeprefix(name): data[slice(*header[key]["data_offsets"])] for key in keys}
        assert hashlib.sha256(b"".join(arrays.values())).hexdigest() == about["sha256"]
        stored = DTYPES[header[keys[0]]["dtype"]]
        if "" in arrays:
            flat = np.frombuffer(arrays[""], stored)
        else:
            flat = scattered(arrays, stored, math.prod(about["shape"]), about["low_bits"])
        tensors[name] = flat.astype(DTYPES[about["dtype"]]).reshape(about["shape"])
        assert np.count_nonzero(tensors[name]) == about["nonzeros"]
    return tensors, description


def scattered(arrays: dict[str, bytes], dtype: type, size: int, k: int) -> np.ndarray:
    values = np.frombuffer(arrays["|values"], dtype)
    first = math.ceil(len(values) * k / 8)
    low, high = Bits(arrays["|positions"][:first]), Bits(arrays["|positions"][first:])
    remainders = [sum(low.next() << place for place in range(k)) for _ in values]
    tensor, is_stored, place = np.zeros(size, dtype), np.zeros(size, bool), 0
    for value, remainder in zip(values, remainders, strict=True):
        quotient = 0
        while high.next() == 0:
            quotient += 1
        place += 2**k * quotient + remainder
        tensor[place], is_stored[place] = value, True
        place += 1
    if "|signs" in arrays:
        signs = Bits(arrays["|signs"])
        for place in np.flatnonzero(~is_stored):
            if signs.next():
                tensor[place] = -0.0
    return tensor


def read_by_the_page(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    names: dict[str, Any] = {}
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(code, "packed-format.md", "exec"), names)
    return names["read"](path)


@pytest.fixture(params=[read_slowly, read_by_the_page])
def read(request: pytest.FixtureRequest):
    return request.param


def assert_same_bits(arrays: dict[str, np.ndarray], state: dict[str, Tensor]) -> None:
    assert list(arrays) == list(state)
    for name, array in arrays.items():
        assert array.shape == tuple(state[name].shape), name
        assert array.dtype == state[name].numpy().dtype, name
        assert np.array_equal(np.ascontiguousarray(array).reshape(-1).view(np.uint8), bits(state[name]).numpy()), name


def test_every_encoding(tmp_path: Path, read):
    model = Everything()
    summary = deploy.pack(model, tmp_path / "x", metadata={"a": 1})
    assert {tensor.encoding for tensor in summary.tensors} == {"dense", "gaps", "bitmask", "shared"}
    assert any(tensor.sign_nbytes for tensor in summary.tensors)
    arrays, content = read(tmp_path / "x")
    assert_same_bits(arrays, deploy.unpack(tmp_path / "x", factors=True))
    assert content["metadata"] == {"a": 1}
    assert content["values"] == "float32"
    ((matrix, (u, v)),) = content["products"].items()
    np.testing.assert_allclose(arrays[u] @ arrays[v].T, deploy.unpack(tmp_path / "x")[matrix].numpy(), rtol=1e-6)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 0.8, 0.95, 0.999, 1.0])
def test_every_sparsity(tmp_path: Path, read, sparsity: float):
    state = {"w": holed(50, 60, sparsity=sparsity), "d": holed(50, 60, sparsity=sparsity, dtype=torch.float64)}
    state |= {"t": holed(3000, sparsity=sparsity) != 0, "n": (9 * holed(3000, sparsity=sparsity)).long()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deploy.pack(state, tmp_path / "x")
    assert_same_bits(read(tmp_path / "x")[0], state)


def test_rounded_values(tmp_path: Path, read):
    deploy.pack({"w": holed(50, 60), "b": torch.randn(3)}, tmp_path / "x", "float16")
    assert_same_bits(read(tmp_path / "x")[0], deploy.unpack(tmp_path / "x"))


def test_bfloat16(tmp_path: Path):
    state = {
        "w": holed(50, 60, dtype=torch.bfloat16),
        "d": torch.randn(4).bfloat16(),
        "n": torch.tensor([-0.0, torch.inf]),
    }
    deploy.pack(state, tmp_path / "x")
    assert_same_bits(read_by_the_page(tmp_path / "x")[0], {name: tensor.float() for name, tensor in state.items()})


@pytest.mark.parametrize("place", [100, -1])
def test_the_page_finds_damage(tmp_path: Path, read, place: int):
    deploy.pack({"w": holed(50, 60)}, tmp_path / "x")
    content = bytearray((tmp_path / "x").read_bytes())
    content[place] ^= 1
    (tmp_path / "x").write_bytes(content)
    with pytest.raises((AssertionError, json.JSONDecodeError)):
        read(tmp_path / "x")
