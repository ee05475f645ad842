"""--pretrained: what training starts from, in which it is resumed, and what does not fit."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from str_triton import densify, sparsify
from str_triton.cnn import paper_checkpoint, train
from str_triton.cnn.config import METHODS
from str_triton.cnn.models import build
from str_triton.cnn.pretrained import classifier_keys, start_from
from str_triton.training.config import make_accelerator
from str_triton.training.interface import Interface
from tests.cnn.train_runs import TINY, begin, resume, run
from tests.messages import holding, holds
from tests.runs import Killed, after_calls, assert_same_result, kill, last_checkpoint

LAYERS = ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "blocks.1.shortcut.0", "head"]


def digits_net(seed: int = 1, **options) -> nn.Module:
    """As a run builds it; no entry of its state has the value that a fresh network has."""
    torch.manual_seed(seed)
    model = build("resnet-digits", **{"num_classes": 10, "in_channels": 1} | options)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else torch.tensor(7))
    return model


def saved(model: nn.Module, path: Path) -> dict[str, Tensor]:
    state = model.state_dict()
    torch.save(state, path)
    return state


def prepared(*args: str) -> nn.Module:
    """The network before the first step of a run with these arguments."""
    config = train.COMMAND_LINE.read([*TINY, *args])
    try:
        return train.Experiment.prepare(config, make_accelerator(config)).model
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_the_trained_weights(method: str, tmp_path: Path):
    network = digits_net()
    if method == "keep-zeros":
        nn.init.zeros_(network.head.weight[0])
    state = saved(network, tmp_path / "dense.pth")
    start = ["--raw-threshold-init", "-3200"] if method == "str" else []
    model = prepared("--method", method, "--pretrained", str(tmp_path / "dense.pth"), *start)
    ours = {k: v for k, v in model.state_dict(keep_vars=True).items() if not k.endswith("threshold_options")}
    raws = {f"{name}.raw_threshold" for name in LAYERS} if method.startswith("str") else set()
    assert ours.keys() == state.keys() | raws
    for key, tensor in state.items():
        # dnw and rigl are sparse from the start
        trained = ours[key].where(ours[key] != 0, tensor) if method in ("dnw", "rigl") else ours[key]
        assert torch.equal(trained, tensor), key
    if method == "str":
        assert {ours[key].item() for key in raws} == {-3200.0}


def test_a_run_that_starts_from_a_trained_network_is_better_from_the_start(
    tmp_path: Path, quick: None, whole_run: Path, capsys: pytest.CaptureFixture[str]
):
    """And starts from the folder of another, whose state dict is that of the file in it."""
    options = ["--method", "dense", "--epochs", "1", "--lr", "0.01"]
    assert begin(tmp_path / "dense", "--method", "dense", "--epochs", "6", "--lr", "0.3") == 0
    assert begin(tmp_path / "more", *options, "--pretrained", str(tmp_path / "dense")) == 0
    assert f"weights  from {tmp_path / 'dense'}\n" in capsys.readouterr().out
    assert begin(tmp_path / "file", *options, "--pretrained", str(tmp_path / "dense" / "model.safetensors")) == 0
    assert begin(tmp_path / "fresh", *options) == 0
    accuracy = {
        name: json.loads((tmp_path / name / "summary.json").read_text())["accuracy"]
        for name in ("dense", "more", "file", "fresh")
    }
    assert accuracy["more"] == accuracy["file"] > 0.6 > 2 * accuracy["fresh"]
    config = json.loads((tmp_path / "more" / "config.json").read_text())
    assert config["pretrained"] == str(tmp_path / "dense")


def test_a_checkpoint_of_the_papers_code_is_a_start(tmp_path: Path):
    torch.manual_seed(0)
    theirs = sparsify(build("mobilenetv1", num_classes=10), g="sigmoid", gradient="masked", raw_threshold_init=-5.0)
    paper_checkpoint.save(theirs, tmp_path / "model_best.pth", epoch=100, data_parallel=True)
    ours = build("mobilenetv1", num_classes=10)
    start_from(tmp_path / "model_best.pth", ours, "mobilenetv1", 3, class_names="abcdefghij")
    dense = densify(theirs).state_dict()
    assert (dense["model.3.3.weight"] == 0).any()
    assert all(torch.equal(ours.state_dict()[key], tensor) for key, tensor in dense.items())
    assert ours.fc.bias.requires_grad


def test_a_new_classifier_leaves_the_rest_to_the_file(tmp_path: Path):
    state = saved(digits_net(num_classes=12), tmp_path / "dense.pt")
    torch.manual_seed(0)
    fresh = build("resnet-digits", num_classes=10, in_channels=1)
    model = prepared("--method", "dense", "--pretrained", str(tmp_path / "dense.pt"), "--new-classifier")
    assert classifier_keys("resnet-digits", 1) == ["head.weight", "head.bias"]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, (fresh.state_dict() if key.startswith("head") else state)[key]), key


def test_a_new_classifier_for_as_many_classes_or_for_a_file_without_one(tmp_path: Path):
    trained = digits_net()
    saved(trained, tmp_path / "whole.pt")
    torch.save({k: v for k, v in trained.state_dict().items() if not k.startswith("head")}, tmp_path / "headless.pt")
    for name in ("whole.pt", "headless.pt"):
        torch.manual_seed(0)
        model = build("resnet-digits", num_classes=10, in_channels=1)
        before = model.head.weight.clone()
        start_from(tmp_path / name, model, "resnet-digits", 1, class_names=None)
        assert torch.equal(model.head.weight, before)
        assert torch.equal(model.stem.weight, trained.stem.weight)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv1:0.25", "resnet-small"])
def test_the_classifier_is_what_follows_the_classes(name: str):
    layer = "head" if name == "resnet-small" else "fc"
    assert classifier_keys(name, 3) == [f"{layer}.weight", f"{layer}.bias"]


def test_a_resumed_run_needs_the_file_no_more(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "dense.safetensors"
    safetensors.torch.save_file(digits_net().state_dict(), file)
    options = ["--pretrained", str(file), "--lr", "0.01", "--new-classifier"]
    assert begin(tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        after_calls(patch, train, "learning_rate", 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert begin(tmp_path / "run", *options) == 143
    file.unlink()
    assert resume(tmp_path / "run", *options) == 0
    assert_same_result(tmp_path / "run", tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_still_starts_from_the_file(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    file, folder = tmp_path / "dense.pth", tmp_path / "run"
    state = saved(digits_net(), file)
    with monkeypatch.context() as patch:
        after_calls(patch, train, "learning_rate", 1, kill)
        with pytest.raises(Killed):
            begin(folder, "--pretrained", str(file), "--lr", "1e-9", "--weight-decay", "0")
    file.rename(tmp_path / "away.pth")
    assert resume(folder) == 2
    assert capsys.readouterr().err == f"error: {file}: No such file or directory\n"
    (tmp_path / "away.pth").rename(file)
    assert resume(folder) == 0
    weight = last_checkpoint(folder)["model"]["stem.weight"]
    torch.testing.assert_close(weight[0], state["stem.weight"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("theirs", "names", "said"),
    [
        ("0123456789", "0123456789", ""),
        ("abcdeABCDE", "abcdefghij", "its class 'A' is 'f' in the data .. classifier is kept; --new-classifier"),
        ("0123456789", "abcdefghij", "the network has numbers .. order of the classes cannot be compared"),
        ("abcdefghij", "0123456789", "the data have numbers .. order of the classes cannot be compared"),
    ],
)
def test_other_classes_with_the_old_classifier_are_a_warning(
    theirs: str, names: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    model, file = build("resnet-digits", num_classes=10, in_channels=1), tmp_path / "x.safetensors"
    metadata = {"model": "resnet-digits", **Interface(tuple(theirs)).texts()}
    safetensors.torch.save_file(model.state_dict(), file, metadata)
    start_from(file, model, "resnet-digits", 1, class_names=names)
    error = capsys.readouterr().err
    assert error.count("\n") == bool(said)
    assert holds(error, said)


def test_the_same_classes_in_another_order_are_refused(whole_run: Path, tmp_path: Path):
    """Also by a checkpoint alone."""
    checkpoint = shutil.copy(max((whole_run / "checkpoints").iterdir()), tmp_path / "x.pt")
    for path in (whole_run, whole_run / "model.safetensors", checkpoint):
        model = build("resnet-digits", num_classes=10, in_channels=1)
        with pytest.raises(ValueError, match=holding("its class '8' is '9' in the data .. order .. --new-classifier")):
            start_from(path, model, "resnet-digits", 1, class_names="0123456798")
        start_from(path, model, "resnet-digits", 1, class_names=None)


# What a person can get wrong.


def changed(**changes: Tensor) -> dict[str, Tensor]:
    return digits_net().state_dict() | {key.replace("__", "."): value for key, value in changes.items()}


FILES = {
    "another": (
        lambda: build("resnet20").state_dict(),
        "another, model resnet-digits: the model has no key 'conv1.weight'",
    ),
    "wider": (lambda: changed(stem__weight=torch.zeros(48, 1, 3, 3)), "key 'stem.weight' has the shape [48, 1, 3, 3]"),
    "colour": (lambda: digits_net(in_channels=3).state_dict(), "key 'stem.weight' has the shape [32, 3, 3, 3], the mo"),
    "wider and classes": (
        lambda: changed(norm__bias=torch.zeros(48)) | {"head.bias": torch.zeros(1000)},
        "key 'norm.bias' has the shape [48], the model's is [32]",
    ),
    "classes": (
        lambda: digits_net(num_classes=1000).state_dict(),
        "1000 classes, the data have 10 (head.weight); --new-classifier",
    ),
    "more": (lambda: changed(tail__weight=torch.zeros(1)), "the model has no key 'tail.weight'"),
    "less": (
        lambda: {k: v for k, v in changed().items() if k != "norm.running_var"},
        "key 'norm.running_var' is missing",
    ),
    "nan": (lambda: changed(stem__weight=torch.full((32, 1, 3, 3), math.nan)), "key 'stem.weight' holds NaN"),
    "text": (b"not weights", "text: not a file of weights"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_does_not_fit_is_one_line_and_exit_code_2(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    content, message = FILES[name]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content(), tmp_path / name)
    expect_one_line(["--pretrained", str(tmp_path / name)], message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--pretrained", "nowhere.pth"], "nowhere.pth: No such file or directory"),
        (["--pretrained", "."], "not a run with weights"),
        (["--new-classifier"], "name one with --pretrained FILE"),
        (
            ["resnet50-str-exact-90-finetune", "--data", "digits"],
            "resnet50-str-exact-90-finetune starts from a trained dense network: name it with --pretrained FILE",
        ),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    expect_one_line(args, message, tmp_path, capsys)


def expect_one_line(args: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(*args, "--device", "cpu", "--run-dir", str(folder / "run")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error, error
    assert not (folder / "run").exists()
