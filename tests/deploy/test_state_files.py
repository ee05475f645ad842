"""The place of the state dict in a checkpoint."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from str_triton import deploy
from str_triton.deploy import read_checkpoint
from tests.messages import holds

STATE = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
OTHER = {"weight": torch.zeros(2, 3), "bias": torch.ones(2)}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "state_dict_ema": OTHER, "arch": "x", "args": argparse.Namespace()},  # timm
        {"model": STATE, "model_ema": OTHER, "optimizer": {"state": {}, "param_groups": []}},  # torchvision
        {"state_dict": STATE, "pytorch-lightning_version": "2", "hyper_parameters": {}, "loops": {}},
        {"epoch": 3, "model_state_dict": STATE, "optimizer_state_dict": {"state": {0: {"step": 1}}}},
        {"net": STATE, "acc": 90.0},
        {"ema": STATE, "epoch": 1},
        {"teacher": STATE, "epoch": 1},
        {"model": {"state_dict": STATE, "name": "x"}},
    ],
    ids=lambda content: ",".join(content),
)
def test_the_state_dict_is_found(tmp_path: Path, content: dict[str, Any]):
    torch.save(content, tmp_path / "x")
    state = read_checkpoint(tmp_path / "x").state
    assert list(state) == list(STATE)
    assert all(torch.equal(state[key], STATE[key]) for key in STATE)


def test_what_else_a_file_holds(tmp_path: Path):
    torch.save({"state_dict": STATE, "arch": "resnet50", "epoch": 3}, tmp_path / "x")
    assert read_checkpoint(tmp_path / "x").others == {"arch": "resnet50", "epoch": 3}
    deploy.pack(STATE, tmp_path / "p", metadata={"model": "resnet18"})
    packed = read_checkpoint(tmp_path / "p")
    assert packed.others == {"model": "resnet18"}
    assert torch.equal(packed.state["weight"], STATE["weight"])
    safetensors.torch.save_file(STATE, tmp_path / "s")
    assert read_checkpoint(tmp_path / "s").others == {}


def within_itself() -> dict:
    content: dict = {"epoch": 1}
    content["model"] = content
    return content


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"generator": STATE, "critic": OTHER}, "several .. 'generator', 'critic'"),
        ({"model": {}}, "state dict .. empty"),
        ({"model": {"w": argparse.Namespace()}}, "'w' is argparse.Namespace"),
        ({"model": torch.nn.Linear(1, 1)}, "'model' is torch.nn.modules.linear.Linear"),
        (argparse.Namespace(), "state dict .. got argparse.Namespace"),
        (within_itself(), "key 'epoch' is int"),
        ({"w": torch.ones(2, device="meta")}, "'w' .. meta device"),
        ({"w": torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)}, "'w' .. nested tensor"),
        ({"w": torch.nested.nested_tensor([torch.ones(2)])}, "'w' .. nested tensor"),
        ({"\x1b[2J": 1}, r"key '\x1b[2J' is int"),
    ],
)
def test_a_file_without_one_is_refused(tmp_path: Path, content: object, message: str):
    torch.save(content, tmp_path / "x")
    with pytest.raises(ValueError, match=r"^\S*x: ") as refusal:
        read_checkpoint(tmp_path / "x")
    assert holds(str(refusal.value), message)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
        torch.eye(3).to_sparse_csr(),
    ],
    ids=["sparse", "quantized", "csr"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_that_cannot_be_packed_is_named(tmp_path: Path, tensor: torch.Tensor):
    torch.save({"a": tensor}, tmp_path / "x")
    with pytest.raises(ValueError, match="'a'"):
        deploy.pack(read_checkpoint(tmp_path / "x").state, tmp_path / "p")
    assert not (tmp_path / "p").exists()
