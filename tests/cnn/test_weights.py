"""Weight files of every kind, read as the plain network's tensors."""

import argparse
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from str_triton import densify, sparsify
from str_triton.cnn import paper_checkpoint
from str_triton.cnn.models import build
from str_triton.cnn.pretrained import start_from
from str_triton.cnn.rebuild import rebuild
from str_triton.cnn.weights import load_weights, read_weights
from tests.cnn.train_runs import begin
from tests.messages import holding, holds
from tests.runs import same_bits

State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    return build("resnet20").state_dict()


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def prefixed(prefix: str) -> Callable[[State], object]:
    return lambda state: {prefix + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda state: {
            key: nn.Parameter(tensor) if tensor.is_floating_point() else tensor for key, tensor in state.items()
        },
        lambda state: {"state_dict": state, "arch": "resnet20", "best_acc1": 90.0},
        lambda state: {"model": state, "epoch": 3},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module."),
        prefixed("model."),
        lambda state: {"n_averaged": torch.tensor(3), **prefixed("module.")(state)},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "best": np.float64(76.1)},
    ],
    ids=[
        "bare",
        "parameters",
        "state_dict",
        "model",
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "Lightning",
        "AveragedModel",
        "torchvision",
    ],
)
def test_torch_files(tmp_path: Path, state: State, wrap: Callable[[State], object]):
    weights = read_weights(saved(tmp_path / "file.pth", wrap(state)))
    assert same_bits(weights, dict(state))
    assert not any(tensor.requires_grad for tensor in weights.values())


@pytest.mark.parametrize("prefix", ["backbone.", "encoder.backbone.", "blocks."])
def test_any_prefix_of_all_keys_is_removed_where_the_network_is_known(prefix: str, tmp_path: Path, state: State):
    path = saved(tmp_path / "file.pth", prefixed(prefix)(state))
    model = build("resnet20")
    load_weights(model, path)
    assert same_bits(dict(model.state_dict()), dict(state))
    assert same_bits(dict(rebuild(path, "resnet20").model.state_dict()), dict(state))
    model = build("resnet20", num_classes=7)
    start_from(path, model, "resnet20", 3, class_names=None)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


def test_safetensors_whatever_the_name_and_without_the_counts_of_batches(tmp_path: Path, state: State):
    kept = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    safetensors.torch.save_file(kept, tmp_path / "weights.bin")
    assert same_bits(read_weights(tmp_path / "weights.bin"), kept)
    model = build("resnet20")
    load_weights(model, tmp_path / "weights.bin")
    assert same_bits(dict(model.state_dict()), dict(state))


@pytest.mark.parametrize("method", ["str-exact", "str", "gmp"])
def test_a_run_and_its_checkpoint_hold_the_same_plain_weights(tmp_path: Path, quick: None, method: str):
    options = {"str-exact": ["--distribution", "learned"], "str": ["--raw-threshold-init", "-2"], "gmp": []}
    assert begin(tmp_path / "run", "--method", method, *options[method]) == 0
    weights = read_weights(tmp_path / "run")
    assert 0.2 < (weights["blocks.1.conv1.weight"] == 0).double().mean() < 1
    checkpoint = max((tmp_path / "run" / "checkpoints").iterdir())
    assert same_bits(read_weights(checkpoint), weights)


def test_an_unfinished_run_is_refused_and_its_checkpoint_read(whole_run: Path, tmp_path: Path):
    copy = shutil.copytree(whole_run, tmp_path / "run")
    (copy / "model.safetensors").unlink()
    for read in (read_weights, rebuild):
        with pytest.raises(ValueError, match=holding(f"{copy} .. model.safetensors .. --resume --run-dir {copy}")):
            read(copy)
    assert same_bits(read_weights(max((copy / "checkpoints").iterdir())), read_weights(whole_run))


@pytest.mark.parametrize("thresholded", [True, False])
def test_a_checkpoint_of_the_original_code(tmp_path: Path, thresholded: bool):
    model = build("mobilenetv1", num_classes=10)
    if thresholded:
        sparsify(model, g="sigmoid", gradient="masked", raw_threshold_init=-3.0)
    paper_checkpoint.save(model, tmp_path / "file.pth", data_parallel=True, epoch=3)
    weights = read_weights(tmp_path / "file.pth")
    assert same_bits(weights, dict(densify(model).state_dict()))
    assert weights["fc.weight"].shape == (10, 1024)
    again = build("mobilenetv1", num_classes=10)
    again.load_state_dict(weights)


class Harm:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm",)


THRESHOLDED = sparsify(nn.Conv2d(3, 4, 1)).state_dict()
NO_G = {key: tensor for key, tensor in THRESHOLDED.items() if key != "threshold_options"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no weights", "file of weights .. damaged"),
        (b"", "file of weights .. damaged"),
        (b"\xff\0\0\0\0\0\0\0{'a'", "file of weights"),
        (Harm(), "mkdir .. model.state_dict()"),
        (nn.Linear(2, 2), "state dict .. got torch.nn.modules.linear.Linear"),
        (torch.zeros(3), "state dict .. got Tensor"),
        ({}, "state dict .. empty"),
        ({"epoch": 3, "weights": {}}, "'epoch' is int"),
        ({"state_dict": {0: torch.zeros(3)}}, "key 0 .. text"),
        (
            {"arch": "ResNet50", "state_dict": {"conv1.weight": torch.zeros(3)}},
            "ResNet50 .. 'conv1.weight' .. shape [3]",
        ),
        ({"arch": "vgg", "state_dict": {"a.sparseThreshold": torch.zeros(1, 1)}}, "'arch' .. 'vgg'"),
        (NO_G, "'raw_threshold' .. which g"),
        (THRESHOLDED | {"threshold_options": torch.zeros(9)}, "'threshold_options' .. g"),
    ],
)
def test_another_file_is_refused_and_nothing_in_it_is_run(
    tmp_path: Path, content: object, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("file").write_bytes(content)
    else:
        torch.save(content, "file")
    with pytest.raises(ValueError, match=r"^file: ") as refusal:
        read_weights("file")
    assert holds(str(refusal.value), message)
    assert "\n" not in str(refusal.value)
    assert os.listdir() == ["file"]


def test_a_missing_file_and_a_folder_without_a_run(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="none"):
        read_weights(tmp_path / "none")
    with pytest.raises(ValueError, match="not a run with weights"):
        read_weights(tmp_path)


def without(key: str) -> Callable[[State], object]:
    return lambda state: {name: tensor for name, tensor in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layer2.0.bn1.bias"), "'layer2.0.bn1.bias' is missing"),
        (lambda state: {"extra": torch.zeros(1), **state}, "no key 'extra'"),
        (lambda state: {"loss.weight": torch.zeros(1), **prefixed("net.model.")(state)}, "no key 'loss.weight'"),
        (lambda state: {"model.fc.bias": torch.zeros(1), **prefixed("net.model.")(state)}, "no key 'model.fc.bias'"),
        (
            lambda state: state | {"fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)},
            "'fc.weight' .. has the shape [10, 64] .. model's is [1000, 64]",
        ),
    ],
)
def test_weights_of_another_network_name_the_first_key_that_does_not_fit(
    tmp_path: Path, state: State, change: Callable[[State], object], message: str
):
    path = saved(tmp_path / "file.pth", change(dict(state)))
    model = build("resnet20")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="^" + str(path)) as refusal:
        load_weights(model, path)
    assert holds(str(refusal.value), f"{path} .. {message}")
    assert same_bits(dict(model.state_dict()), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_weights_become_the_models(tmp_path: Path, state: State, dtype: torch.dtype):
    path = saved(tmp_path / "file.pth", {key: t.to(dtype) if t.is_floating_point() else t for key, t in state.items()})
    model = build("resnet20")
    load_weights(model, path)
    assert torch.equal(model.fc.weight, state["fc.weight"].to(dtype).float())


def coded(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("fc.weight", lambda tensor: (tensor * 100).to(torch.int8), "torch.int8"),
        ("fc.weight", lambda tensor: (tensor * 100).long(), "torch.int64"),
        ("fc.weight", lambda tensor: tensor > 0, "torch.bool"),
        ("fc.weight", lambda tensor: tensor.to(torch.float8_e5m2), "torch.float8_e5m2"),
        ("fc.weight", lambda tensor: torch.complex(tensor, tensor), "torch.complex64"),
        ("fc.weight", lambda tensor: tensor.to_sparse(), "torch.sparse_coo"),
        ("fc.weight", lambda tensor: tensor.to_sparse_csr(), "torch.sparse_csr"),
        ("fc.weight", coded, "quantized"),
        ("fc.weight", lambda tensor: tensor.double() * 1e60, "too large"),
        ("fc.weight", lambda tensor: tensor * math.nan, "NaN"),
        ("bn1.running_var", lambda tensor: tensor.half() * math.inf, "infinite"),
        ("bn1.num_batches_tracked", lambda tensor: tensor + 0.5, "torch.float32"),
        ("bn1.num_batches_tracked", lambda tensor: tensor + 1j, "torch.complex64"),
    ],
)
def test_weights_that_would_become_others_are_refused(
    tmp_path: Path, state: State, key: str, change: Callable[[Tensor], Tensor], message: str
):
    path = saved(tmp_path / "file.pth", dict(state) | {key: change(state[key])})
    model = build("resnet20")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"key '{key}'") as refusal:
        load_weights(model, path)
    assert holds(str(refusal.value), message)
    assert same_bits(dict(model.state_dict()), before)
