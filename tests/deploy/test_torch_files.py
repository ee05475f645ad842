"""Files of torch.save with other objects beside the tensors: the tensors are read, and nothing is run."""

import argparse
import collections
import contextlib
import datetime
import enum
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from str_triton.deploy import read_torch_file
from str_triton.deploy.torch_files import Opaque


class Harm:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm",)


class HarmByState:
    """An object whose state, when it is set, would be run."""

    def __reduce__(self) -> tuple:
        return nn.Linear, (1, 1), Harm()


class HarmByItems(list):
    def __reduce__(self) -> tuple:
        return list, (), None, iter([Harm()])


class Colour(enum.Enum):
    RED = 1


class Names(dict):
    pass


def training_state() -> tuple[dict, nn.Linear]:
    """Return what a training script might save, and its network."""
    network = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    others = {
        "args": argparse.Namespace(lr=0.1, output=Path("/runs/1"), started=datetime.datetime(2020, 1, 1)),
        "best": np.float64(76.1),
        "curve": np.arange(4.0),
        "random": np.random.get_state(),
        "phase": Colour.RED,
        "names": Names(a=1),
        "by_class": collections.defaultdict(list, {"cat": [1]}),
        "schedule": schedule.state_dict(),
        "optimizer": optimizer.state_dict(),
        "whole": network,
        "sparse": torch.eye(3).to_sparse(),
        "complex": 3j,
    }
    return {"weight": network.weight, "state": network.state_dict(), **others}, network


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_are_read_whatever_lies_beside_them(tmp_path: Path, protocol: int, zipped: bool):
    content, network = training_state()
    torch.save(content, tmp_path / "x", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    read = read_torch_file(tmp_path / "x")
    assert torch.equal(read["weight"], network.weight)
    assert not read["weight"].requires_grad
    assert torch.equal(read["state"]["bias"], network.bias)
    moments = content["optimizer"]["state"][0]
    assert torch.equal(read["optimizer"]["state"][0]["exp_avg"], moments["exp_avg"])
    assert read["by_class"] == {"cat": [1]}
    assert (read["args"].name, read["phase"].name) == ("argparse.Namespace", f"{__name__}.Colour")
    assert all(isinstance(read[key], Opaque) for key in ("args", "best", "phase", "names", "whole", "sparse"))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float8_e4m3fn, torch.bfloat16, torch.bool, torch.complex64])
def test_dtypes_beside_an_unknown_object(tmp_path: Path, dtype: torch.dtype):
    tensor = torch.tensor([0.0, 1.0, 1.0]).to(dtype)
    torch.save(
        {"a": tensor, "view": tensor[1:], "b": torch.tensor([1 + 2j]).conj(), "args": Colour.RED}, tmp_path / "x"
    )
    read = read_torch_file(tmp_path / "x")
    assert read["a"].dtype == dtype
    assert read["a"].tolist() == tensor.tolist()
    assert read["view"].tolist() == tensor[1:].tolist()
    assert read["b"].tolist() == [1 - 2j]


@pytest.mark.parametrize("harm", [Harm(), HarmByState(), HarmByItems()], ids=lambda harm: type(harm).__name__)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: object, zipped: bool, protocol: int):
    monkeypatch.chdir(tmp_path)
    content = {"a": torch.ones(2), "harm": harm}
    torch.save(content, "x", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_torch_file("x")["a"], torch.ones(2))
    assert os.listdir() == ["x"]


# What a pickler never writes: calls by the opcodes of protocol 0, attributes set on a class of torch, objects that are
# called although they are no globals, and a call through the rebuilding of tensor subclasses.
MKDIR = b"(S'harm'\nios\nmkdir\n"
HOSTILE = {
    "INST": MKDIR,
    "OBJ": b"(cos\nmkdir\nS'harm'\no",
    "BUILD on a class": b"ctorch.storage\nUntypedStorage\n(N}S'mkdir'\nS'harm'\nstb",
    "BUILD on a dtype": b"ctorch\nfloat32\n}S'harm'\nS'x'\nsb",
    "REDUCE of a dotted name": b"\x8c\x07builtins\x8c\x0c__import__.x\x93(S'os'\ntR",
    "subclass of nothing": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nmkdir\nN(S'harm'\ntNtR",
    "eval": b'cbuiltins\neval\n(S\'__import__("os").mkdir("harm")\'\ntR',
    "NEWOBJ": b"csubprocess\nPopen\n(](S'mkdir'\nS'harm'\net\x81",
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_hand_made_pickles_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: bytes):
    monkeypatch.chdir(tmp_path)
    parts = [pickle.dumps(number, 2) for number in (0x1950A86A20F9469CFC6C, 1001, {})]
    Path("x").write_bytes(b"".join([*parts, b"\x80\x04", program, b".", pickle.dumps([], 2)]))
    before = {name: vars(torch.UntypedStorage).get(name) for name in ("mkdir", "harm")}
    with contextlib.suppress(ValueError):
        read_torch_file("x")
    assert os.listdir() == ["x"]
    assert {name: vars(torch.UntypedStorage).get(name) for name in before} == before


def tar() -> bytes:
    """Return an archive of before PyTorch 0.4, which torch.load would unpack into a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def torch_script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1)), buffer)
    return buffer.getvalue()


def saved(content: object, cut: int = 0) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()[: len(buffer.getvalue()) - cut]


@pytest.mark.filterwarnings("ignore:.*TorchScript:UserWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "content", [lambda: b"", lambda: b"text", tar, torch_script, lambda: saved({"a": torch.ones(99)}, cut=300)]
)
def test_other_files_are_refused_in_one_line_without_torchs_advice(tmp_path: Path, content, recwarn):
    (tmp_path / "x").write_bytes(content())
    recwarn.clear()
    with pytest.raises(ValueError, match=r"^\S*x: not a file of weights") as refusal:
        read_torch_file(tmp_path / "x")
    assert not {"\n", "\x1b"} & set(str(refusal.value))
    assert not any(word in str(refusal.value) for word in ("weights_only", "two options", "trust"))
    assert not recwarn.list


def test_a_changed_byte_is_found(tmp_path: Path):
    content = bytearray(saved({"a": torch.full((99,), 7.5), "args": Colour.RED}))
    place = content.index(torch.full((9,), 7.5).numpy().tobytes())
    content[place + 3] ^= 1
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="CRC-32"):
        read_torch_file(tmp_path / "x")


def test_a_file_saved_without_checksums_is_read(tmp_path: Path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(9), "args": Colour.RED}, tmp_path / "x")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_torch_file(tmp_path / "x")["a"], torch.ones(9))


def test_a_zip_bomb_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data/0", bytes(2**24))
    with pytest.raises(ValueError, match="unpack to 16,777,216 bytes"):
        read_torch_file(tmp_path / "x")


def test_names_in_a_file_cannot_reach_the_terminal_as_commands(tmp_path: Path):
    parts = [pickle.dumps(number, 2) for number in (0x1950A86A20F9469CFC6C, 1001, {})]
    (tmp_path / "x").write_bytes(b"".join([*parts, b"ca\x1b[2Jb\n\x07c\n)R.", pickle.dumps([], 2)]))
    assert str(read_torch_file(tmp_path / "x")) == r"<a\x1b[2Jb.\x07c>"
