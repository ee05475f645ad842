"""The packed file: any changed byte is found, a damaged tensor is named, and a write that fails leaves nothing."""

import json
import os
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from str_triton import deploy
from tests.deploy.packing import Everything, file_of_everything, header_of, holed, same_bits, sealed
from tests.messages import holds

Change = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    return file_of_everything(tmp_path_factory.mktemp("packed") / "x").read_bytes()


def refusal(path: Path, content: bytes) -> str:
    """Why the content is refused, by both readers, in one line that begins with the file."""
    path.write_bytes(content)
    messages = []
    for reader in (deploy.unpack, deploy.inspect):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: ") as error:
            reader(path)
        messages.append(str(error.value).removeprefix(f"{path}: "))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    return messages[0]


def test_it_is_a_safetensors_file(tmp_path: Path, whole: bytes):
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)
    with safetensors.safe_open(path, "pt") as file:
        assert (file.metadata()["format"], file.metadata()["version"]) == ("str_triton.packed", "1")
        assert set(json.loads(file.metadata()["content"])) == {"tensors", "products", "values", "budget", "metadata"}
        assert torch.equal(file.get_tensor("dense"), deploy.unpack(path)["dense"])
        assert "gaps|values" in file.keys()  # noqa: SIM118 (the file is no dict)
    start, header = header_of(whole)
    sizes = {"F32": 4, "I64": 8, "U8": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            assert (start + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0, "aligned"


def test_any_changed_byte_is_found(tmp_path: Path):
    """A file with every kind of part, byte by byte: its length, header, padding and data."""
    model = {
        "gaps": holed(10, 30),
        "dense": torch.randn(3),
        "signs": torch.full((300,), -0.0),
        "scalar": torch.ones(()),
    }
    model["signs"][::90] = 1.0
    path = tmp_path / "x"
    deploy.pack(model | {"shared": model["dense"]}, path)
    whole = path.read_bytes()
    assert b"gaps|positions" in whole
    assert b"signs|signs" in whole
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= (0x01, 0x20, 0xFF)[place % 3]  # 0x20: the other case of a letter
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: "):
            deploy.unpack(path)
    path.write_bytes(whole)
    assert same_bits(deploy.unpack(path), model | {"shared": model["dense"]})


def test_the_damaged_tensor_is_named(tmp_path: Path, whole: bytes):
    start, header = header_of(whole)
    named = set()
    for name, entry in header.items():
        if name == "__metadata__" or entry["data_offsets"][0] == entry["data_offsets"][1]:
            continue
        for place in (entry["data_offsets"][0], entry["data_offsets"][1] - 1):
            changed = bytearray(whole)
            changed[start + place] ^= 1
            tensor = name.split("|")[0]
            assert holds(refusal(tmp_path / "x", changed), f"'{tensor}' .. damaged .. checksum")
            named.add(tensor)
    assert named == {"gaps", "mask", "dense", "signs", "linear.weight.u", "linear.weight.v", "linear.bias", "count"}


def test_swapped_and_missing_bytes(tmp_path: Path, whole: bytes):
    start, _ = header_of(whole)
    assert "is damaged" in refusal(tmp_path / "x", whole[:start] + whole[start:][::-1])
    assert "is damaged" in refusal(tmp_path / "x", whole[:start] + bytes(len(whole) - start))
    assert holds(refusal(tmp_path / "x", whole + b"ab"), "2 bytes .. last tensor")


def test_a_file_that_is_cut_off_loads_nothing(tmp_path: Path, whole: bytes):
    start, header = header_of(whole)
    for length in (*range(0, start, 397), start - 1):
        message = refusal(tmp_path / "x", whole[:length])
        assert message.startswith("not a packed file") or holds(message, "header .. cut off")
    for length in (*range(start, len(whole), 97), len(whole) - 1):
        message = refusal(tmp_path / "x", whole[:length])
        name = re.fullmatch(rf"tensor '(.*)' is cut off: the file has {length:,} of {len(whole):,} bytes", message)[1]
        own = [header[key] for key in header if key.split("|")[0] == name]
        assert max(start + entry["data_offsets"][1] for entry in own) > length


def test_another_version_says_which(tmp_path: Path, whole: bytes):
    start, header = header_of(whole)
    header["__metadata__"]["version"] = "7"
    assert holds(refusal(tmp_path / "x", sealed(header, whole[start:])), "version '7' .. reads 1")
    header["__metadata__"] |= {"version": "1"}
    (tmp_path / "x").write_bytes(sealed(header, whole[start:]))
    assert deploy.inspect(tmp_path / "x").version == "1"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"no model",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 20) + b'{"__metadata__":"a"} ',
        safetensors.torch.save({"a": torch.ones(2)}),
        safetensors.torch.save({"a": torch.ones(2)}, {"format": "pt"}),
    ],
    ids=range(8),
)
def test_other_files_are_no_packed_ones(tmp_path: Path, content: bytes):
    assert holds(refusal(tmp_path / "x", content), "not a packed file .. python -m str_triton pack")


@pytest.mark.parametrize("text", [b"{" * 100_000, b'{"a":[' + b"[" * 100_000, b'{"\xff":1}', b'{"a"}'], ids=range(4))
def test_a_header_that_is_no_json(tmp_path: Path, text: bytes):
    assert holds(refusal(tmp_path / "x", struct.pack("<Q", len(text)) + text), "header .. not JSON")


def test_a_missing_file_and_folder(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="none"):
        deploy.unpack(tmp_path / "none")
    with pytest.raises(OSError, match="folder"):
        deploy.pack({"a": holed(20, 50)}, tmp_path / "folder" / "x")


def test_pack_writes_exactly_the_path(tmp_path: Path):
    path = tmp_path / "model"
    deploy.pack(Everything(), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    deploy.pack({"a": holed(20, 50)}, str(path))  # the old file is replaced
    assert list(deploy.unpack(path)) == ["a"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path):
    with pytest.raises(OSError, match="exists and is no regular file") as caught:
        deploy.pack({"weight": torch.zeros(3)}, tmp_path)
    assert caught.value.filename == str(tmp_path)
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.*"))


@pytest.mark.parametrize("old", [None, b"the old file"])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, file_size_limit: Callable, old: bytes | None):
    path = tmp_path / "model"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(OSError, match="File too large"), file_size_limit(1000):
        deploy.pack(Everything(), path)
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == (
        [] if old is None else [("model", old)]
    )


def test_a_real_limit_on_the_size_of_files(tmp_path: Path):
    """The program meets a disk that takes no more: one line, exit code 2, and nothing is left."""
    model = nn.Linear(300, 300)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    result = subprocess.run(
        [sys.executable, "-m", "str_triton", "pack", str(tmp_path / "model.pt")],
        # coverage would write its data under the limit too.
        env={name: value for name, value in os.environ.items() if name != "COVERAGE_PROCESS_CONFIG"},
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {tmp_path / 'model.packed.safetensors'}: File too large\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]
