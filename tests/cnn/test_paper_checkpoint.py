"""Files in the original code's format, written here from its description, against the module that reads them."""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from str_triton import Budget, STRConv2d, STRLinear, count, densify, sparsify
from str_triton.cnn.models import build
from str_triton.cnn.paper_checkpoint import load, main, save
from tests import oracle
from tests.cnn.original_networks import State, literal_mobilenet, literal_resnet50, mobilenet_state, resnet50_state
from tests.messages import holding, holds

METADATA = {
    "epoch": 100,
    "best_acc1": 74.31,
    "best_acc5": 92.0,
    "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
}
NETWORKS = {
    "ResNet50": (resnet50_state, literal_resnet50, "module."),
    "MobileNetV1": (mobilenet_state, literal_mobilenet, ""),
}


@pytest.fixture(scope="module", params=NETWORKS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, State, Callable, Path]:
    """Architecture, state dict without prefix, the literal network, and the file; ResNet50's is of several GPUs."""
    torch.manual_seed(1)
    make, literal, prefix = NETWORKS[request.param]
    state = make()
    path = tmp_path_factory.mktemp("original") / "model_best.pth"
    write(path, {prefix + key: tensor for key, tensor in state.items()}, arch=request.param)
    return request.param, state, literal, path


def write(path: Path, state: State, **entries) -> Path:
    torch.save({**METADATA, **entries, "state_dict": state}, path)
    return path


def equal_bits(ours: State, theirs: State) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[key].dtype == theirs[key].dtype
        and ours[key].shape == theirs[key].shape
        and ours[key].reshape(-1).view(torch.uint8).equal(theirs[key].reshape(-1).view(torch.uint8))
        for key in ours
    )


@torch.no_grad()
def test_a_loaded_network_computes_what_the_literal_formula_does(case, tmp_path: Path):
    arch, state, literal, path = case
    model, metadata = load(path)
    assert metadata == {**METADATA, "arch": arch, "data_parallel": arch == "ResNet50"}
    layers = [module for module in model.modules() if isinstance(module, STRConv2d | STRLinear)]
    assert len(layers) == {"ResNet50": 54, "MobileNetV1": 28}[arch]
    assert {(layer.g, layer.gradient) for layer in layers} == {("sigmoid", "masked")}
    assert not model.fc.bias.any()
    assert not model.fc.bias.requires_grad
    images = torch.randn(2, 3, 64, 64)
    expected = literal(state, images)
    outputs = model.eval()(images)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=0)

    # What becomes of it: a plain network with torchvision's names and the literal formula's weights.
    dense = densify(model).state_dict()
    for key, tensor in state.items():
        layer, _, entry = key.rpartition(".")
        if f"{layer}.sparseThreshold" not in state:
            assert torch.equal(dense[key], tensor), key
        elif entry == "weight":
            literal_weight = oracle.soft_threshold(tensor, state[f"{layer}.sparseThreshold"]).reshape(dense[key].shape)
            torch.testing.assert_close(dense[key], literal_weight, atol=1e-8, rtol=1e-6)
            assert torch.equal(dense[key] == 0, literal_weight == 0), key
    assert not dense.keys() - state.keys() - {"fc.bias"}
    safetensors.torch.save_file(dense, tmp_path / "dense.safetensors")
    saved = safetensors.torch.load_file(tmp_path / "dense.safetensors")
    again = build("resnet50" if arch == "ResNet50" else "mobilenetv1")
    again.load_state_dict(saved, strict=True)
    assert equal_bits(again.state_dict(), dense)
    torch.testing.assert_close(again.eval()(images), expected, atol=1e-5, rtol=0)
    # And in a network that is none of ours.
    assert not saved.pop("fc.bias").any()
    saved["fc.weight"] = saved["fc.weight"][:, :, None, None]
    torch.testing.assert_close(literal(saved, images), expected, atol=1e-5, rtol=0)


def test_saving_what_was_loaded_gives_every_tensor_bit_for_bit(case, tmp_path: Path):
    arch, _, _, path = case
    model, metadata = load(path)
    save(model, tmp_path / "again.pth", **metadata)
    before, after = (torch.load(file, weights_only=True) for file in (path, tmp_path / "again.pth"))
    assert equal_bits(after.pop("state_dict"), before["state_dict"])
    assert after == METADATA | {"arch": arch}


def small_file(folder: Path, change: Callable[[State], object] = lambda state: None, **entries) -> Path:
    state = mobilenet_state(classes=10)
    changed = change(state)
    return write(
        folder / "file.pth", changed if isinstance(changed, dict) else state, **{"arch": "MobileNetV1", **entries}
    )


def test_a_dense_compatible_file_is_a_plain_network(tmp_path: Path):
    def plain(state: State) -> State:
        kept = {key: tensor for key, tensor in state.items() if not key.endswith("sparseThreshold")}
        kept["fc.weight"][0] = 0
        return kept

    path = small_file(tmp_path, plain)
    model, metadata = load(path)
    assert not any(isinstance(module, STRConv2d | STRLinear) for module in model.modules())
    assert count(model, torch.zeros(1, 3, 32, 32)).rows[27].nonzeros == 9 * 1024
    save(model, tmp_path / "again.pth", **metadata)
    before, after = (torch.load(file, weights_only=True)["state_dict"] for file in (path, tmp_path / "again.pth"))
    assert equal_bits(after, before)


def test_a_network_trained_here_goes_into_the_format(tmp_path: Path):
    model = sparsify(build("mobilenetv1", num_classes=10), g="sigmoid", gradient="masked", raw_threshold_init=-5.0)
    save(model, tmp_path / "file.pth", epoch=3)
    content = torch.load(tmp_path / "file.pth", weights_only=True)
    assert (content["arch"], content["epoch"]) == ("MobileNetV1", 3)
    assert list(content["state_dict"]) == list(mobilenet_state(10))
    loaded, _ = load(tmp_path / "file.pth")
    assert equal_bits(loaded.state_dict(), model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    loaded(images).sum().backward()
    assert loaded.model[3][0].weight.grad is not None
    assert loaded.model[3][0].raw_threshold.grad is not None


def without(key: str) -> Callable[[State], object]:
    return lambda state: state.pop(key)


def with_(key: str, value: object) -> Callable[[State], object]:
    return lambda state: state.update({key: value})


@pytest.mark.parametrize(
    ("change", "entries", "message"),
    [
        (lambda state: None, {"arch": "ResNet50"}, "ResNet50 .. no key 'model.0.0.weight'"),
        (lambda state: None, {"arch": "ResNet18"}, "'arch' .. 'ResNet18' .. 'ResNet50' or 'MobileNetV1'"),
        (without("model.3.4.running_var"), {}, "MobileNetV1 .. 'model.3.4.running_var' is missing"),
        (without("model.2.3.sparseThreshold"), {}, "MobileNetV1 .. 'model.2.3.sparseThreshold' is missing"),
        (with_("fc.bias", torch.zeros(10)), {}, "MobileNetV1 .. no key 'fc.bias'"),
        (with_("fc.weight", torch.zeros(10, 1024)), {}, "'fc.weight' .. [10, 1024]"),
        (
            with_("model.5.0.sparseThreshold", torch.zeros(1)),
            {},
            "'model.5.0.sparseThreshold' .. shape [1] .. expected [1, 1]",
        ),
        (
            with_("model.0.1.bias", torch.zeros(32).half()),
            {},
            "'model.0.1.bias' .. torch.float16 .. expected torch.float32",
        ),
        (with_("model.0.1.bias", 3), {}, "'model.0.1.bias' .. tensor, got int"),
        (
            lambda state: {f"module.{k}" if "fc" not in k else k: v for k, v in state.items()},
            {},
            "has no key 'fc.weight'",
        ),
        (lambda state: {**state, 3: torch.zeros(1)}, {}, "key 3 .. text"),
        (lambda state: {"": torch.zeros(1)}, {}, "has no key ''"),
    ],
)
def test_what_does_not_fit_is_named(change, entries, message, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = small_file(tmp_path, change, **entries)
    with pytest.raises(ValueError, match=holding(message)) as refusal:
        load(path)
    assert main([str(path)]) == 2
    assert capsys.readouterr() == ("", f"error: {refusal.value}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no torch file", "file of weights"),
        (b"", "file of weights"),
        ({"conv1.weight": torch.zeros(3)}, "no state dict .. 'state_dict' .. 'conv1.weight'"),
        ({}, "no state dict .. 'state_dict' .. empty"),
        ({"state_dict": {}}, "'arch' .. None"),
        ({"state_dict": {}, "arch": ["ResNet50"]}, "'arch' .. ['ResNet50']"),
        ({"state_dict": {}, "arch": "ResNet50"}, "ResNet50 .. 'conv1.weight' is missing"),
        (torch.zeros(3), "dictionary .. 'state_dict'"),
    ],
)
def test_another_file_is_refused(content, message, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert main([str(path)]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {path}: ")
    assert holds(output.err, message)
    assert (output.err.count("\n"), output.out) == (1, "")


def test_a_cut_file_and_none_at_all(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = small_file(tmp_path)
    path.write_bytes(path.read_bytes()[:100_000])
    assert main([str(path)]) == 2
    assert main([str(tmp_path / "nothing.pth")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert holds(lines[0], f"{path} .. file of weights")
    assert [holds(line, f"error: {tmp_path / 'nothing.pth'} .. No such file") for line in lines[1:]] == [True]


def test_other_objects_in_a_file_are_neither_run_nor_saved(tmp_path: Path):
    path = small_file(tmp_path)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"args": argparse.Namespace(lr=0.1)}, path)
    model, metadata = load(path)
    assert str(metadata["args"]) == "<argparse.Namespace>"
    with pytest.raises(TypeError, match="Namespace"):
        save(model, tmp_path / "again.pth", args=metadata["args"])


def test_what_the_format_has_no_place_for_is_not_saved(tmp_path: Path):
    def refused(model: nn.Module, message: str, **metadata) -> None:
        with pytest.raises(ValueError, match=message):
            save(model, tmp_path / "file.pth", **metadata)

    plain = build("mobilenetv1", num_classes=10)
    refused(sparsify(copy.deepcopy(plain)), r"key 'model.0.0.sparseThreshold': g is 'exp'")
    refused(
        sparsify(copy.deepcopy(plain), g="sigmoid", granularity="filter"),
        r"'model.0.0.sparseThreshold' has the shape \[32, 1, 1, 1\], expected \[1, 1\]",
    )
    refused(sparsify(copy.deepcopy(plain), g="sigmoid", exclude="fc"), "key 'fc.sparseThreshold' is missing")
    refused(plain, "arch='ResNet50': the network is MobileNetV1", arch="ResNet50")
    refused(plain, "state_dict comes from the network", state_dict={})
    refused(build("resnet18"), r"key 'layer1.0.conv1.weight' has the shape \[64, 64, 3, 3\], expected \[64, 64, 1, 1\]")
    refused(nn.Linear(2, 2), "Linear: .* resnet50 and mobilenetv1")
    refused(copy.deepcopy(plain).half(), "key 'model.0.0.weight' has the dtype torch.float16")
    nn.init.ones_(plain.fc.bias)
    refused(plain, "key 'fc.bias' is not zero")
    assert not list(tmp_path.iterdir())


def test_the_program_prints_and_converts(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = small_file(tmp_path)
    dense, csv, json = (tmp_path / name for name in ("dense.safetensors", "budget.csv", "budget.json"))
    assert main([str(path), "--to", str(dense), "--budget", str(csv)]) == 0
    lines = capsys.readouterr().out.splitlines()
    entries = "epoch 100 .. best_acc1 74.31 .. best_acc5 92.0 .. arch MobileNetV1 .. data_parallel False"
    assert holds(lines[0], f"{path} .. {entries}")
    assert main([str(path), "--budget", str(json)]) == 0
    model, _ = load(path)
    budget = count(model, torch.zeros(1, 3, 224, 224))
    assert Budget.from_csv(csv) == Budget.from_json(json) == budget
    assert "\n".join(lines[2:]) == str(budget)
    assert 0.05 < budget.sparsity < 0.95
    assert budget.rows[3].threshold == pytest.approx(torch.sigmoid(model.model[2][0].raw_threshold).item())
    plain = build("mobilenetv1", num_classes=10)
    plain.load_state_dict(safetensors.torch.load_file(dense))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain.eval()(images), model.eval()(images))
    assert main([str(path), "--to", "dense.pt"]) == 2
    assert main([str(path), "--budget", str(tmp_path / "nowhere" / "x.csv")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert holds(errors[0], "error: --to dense.pt .. .safetensors")
    assert holds(errors[1], f"{tmp_path / 'nowhere'} .. No such file")
