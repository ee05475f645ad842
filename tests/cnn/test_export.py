"""The exporting program from outside: what it writes works elsewhere, and what it refuses."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from str_triton import Budget, densify, deploy, sparsify
from str_triton.cnn import evaluate
from str_triton.cnn.export import main
from str_triton.cnn.models import build
from str_triton.cnn.weights import read_weights
from tests.messages import holds
from tests.runs import same_bits


def exported(*args: object) -> None:
    assert main([str(arg) for arg in args]) == 0


def trained(whole_run: Path) -> nn.Module:
    model = build("resnet-digits", num_classes=10, in_channels=1)
    model.load_state_dict(read_weights(whole_run))
    return model.eval()


def test_a_packed_run_gives_back_every_bit_and_has_a_card(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "digits.safetensors"
    exported("pack", whole_run, out)
    assert same_bits(deploy.unpack(out), read_weights(whole_run))
    assert same_bits(read_weights(out), read_weights(whole_run))
    summary = deploy.inspect(out)
    assert summary.budget.nonzeros == Budget.from_json(whole_run / "budget.json").nonzeros
    interface = json.loads((whole_run / "interface.json").read_text())
    facts = {"model": "resnet-digits", "num_classes": 10, "image_shape": [1, 8, 8]}
    assert summary.metadata == facts | interface
    assert out.stat().st_size < (whole_run / "model.safetensors").stat().st_size / 4
    assert f"wrote {out} and {tmp_path / 'digits.md'}" in capsys.readouterr().out
    card = (tmp_path / "digits.md").read_text()
    accuracy = json.loads((whole_run / "summary.json").read_text())["accuracy"]
    assert f"| accuracy on the test images | {100 * accuracy:.2f} % |" in card
    assert "| blocks.0.conv1 | 9,216 |" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)  # what the card tells people to run
    assert same_bits(dict(names["model"].state_dict()), read_weights(whole_run))
    assert not names["model"].training

    # A packed file knows its network: it can be evaluated and packed again.
    assert evaluate.main([str(out), "--data", "digits", "--device", "cpu"]) == 0
    exported("pack", out, tmp_path / "half.safetensors", "--values", "float16", "--image-size", "8")
    half = deploy.unpack(tmp_path / "half.safetensors")
    assert half["head.weight"].equal(read_weights(whole_run)["head.weight"].half().float())


def test_densified_weights_have_torchvisions_names(tmp_path: Path):
    """Spelled out here; a plain network of these names takes them with strict=True."""
    expected = {"conv1.weight", "fc.weight", "fc.bias"}
    norms = ["bn1"]
    for stage in range(1, 5):
        for block in range(2):
            at = f"layer{stage}.{block}"
            expected |= {f"{at}.conv1.weight", f"{at}.conv2.weight"}
            norms += [f"{at}.bn1", f"{at}.bn2"]
        if stage > 1:
            expected.add(f"layer{stage}.0.downsample.0.weight")
            norms.append(f"layer{stage}.0.downsample.1")
    entries = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected |= {f"{norm}.{entry}" for norm in norms for entry in entries}
    model = sparsify(build("resnet18", num_classes=7), initial_threshold=0.02)
    weights = densify(model).state_dict()
    assert set(weights) == expected
    torch.save(weights, tmp_path / "weights.pth")
    out = tmp_path / "packed.safetensors"
    exported("pack", tmp_path / "weights.pth", out, "--model", "resnet18", "--image-size", "32")
    plain = build("resnet18", num_classes=7)
    plain.load_state_dict(deploy.unpack(out), strict=True)
    assert same_bits(dict(plain.state_dict()), dict(weights))
    assert out.stat().st_size < 0.6 * (tmp_path / "weights.pth").stat().st_size


def test_an_onnx_file_computes_the_same_for_any_number_of_images(
    whole_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture
):
    out = tmp_path / "digits.onnx"
    exported("onnx", whole_run, out)
    output = capfd.readouterr()
    assert re.fullmatch(
        rf"wrote {out}: [\d,]+ bytes, images \[batch, 1, 8, 8\] -> scores \[batch, 10\]; "
        r"largest difference to PyTorch \S+\n",
        output.out,
    )
    assert output.err == ""
    content = onnx.load(out)
    onnx.checker.check_model(content, full_check=True)
    assert {"Conv", "Relu", "Gemm"} <= {node.op_type for node in content.graph.node}
    assert "BatchNormalization" not in {node.op_type for node in content.graph.node}
    assert str(Path(__file__).parents[2]).encode() not in out.read_bytes()
    zeros = sum(int((numpy_helper.to_array(tensor) == 0).sum()) for tensor in content.graph.initializer)
    budget = Budget.from_json(whole_run / "budget.json")
    assert zeros >= budget.params - budget.nonzeros
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    model = trained(whole_run)
    for batch in (1, 2, 7):
        images = torch.randn(batch, 1, 8, 8)
        (scores,) = session.run(None, {"images": images.numpy()})
        with torch.inference_mode():
            np.testing.assert_allclose(scores, model(images).numpy(), atol=1e-4, rtol=0)


def test_an_onnx_file_that_computes_something_else_is_not_written(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("str_triton.deploy.onnx_export.export.TOLERANCE", -1.0)
    assert main(["onnx", str(whole_run), str(tmp_path / "digits.onnx")]) == 2
    assert re.match(r"error: \w+: as ONNX its outputs differ by ", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_sparse_network_runs_from_its_file(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "digits.sparse"
    exported("sparse", whole_run, out, "--batch-size", "2")
    compiled = deploy.load_sparse(out)
    model = trained(whole_run)
    for batch in (2, 5):
        images = torch.randn(batch, 1, 8, 8)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(images), model(images), atol=1e-4, rtol=0)
    printed = capsys.readouterr()
    assert "blocks.1.conv2" in printed.out
    assert printed.out.endswith(f"\nwrote {out}\n")
    assert printed.err.startswith("compiling ")


def test_the_size_of_the_images_is_known_without_the_data(whole_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("model.safetensors", "interface.json"):
        (run / name).symlink_to(whole_run / name)
    config = json.loads((whole_run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"data": "imagefolder:elsewhere"}))
    exported("pack", run, tmp_path / "x.safetensors")
    assert deploy.inspect(tmp_path / "x.safetensors").metadata["image_shape"] == [1, 8, 8]


def test_the_card_says_no_accuracy_of_images_of_another_size(whole_run: Path, tmp_path: Path):
    for size in ("8", "12"):
        exported("pack", whole_run, tmp_path / size, "--image-size", size)
        card = (tmp_path / f"{size}.md").read_text()
        assert f"images of 1x{size}x{size}" in card
        assert "| data | digits |" in card
        assert ("accuracy" in card) == (size == "8")


@pytest.mark.parametrize("content", ["{}", "", '{"accuracy": null}', "[1]"])
def test_a_damaged_summary_is_named(whole_run: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("model.safetensors", "config.json"):
        (run / name).symlink_to(whole_run / name)
    (run / "summary.json").write_text(content)
    assert main(["pack", str(run), str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert holds(error, f"{run / 'summary.json'} .. damaged .. accuracy")
    assert error.count("\n") == 1


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(
    whole_run: Path, tmp_path: Path, package: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["onnx", str(whole_run), str(tmp_path / "digits.onnx")]) == 2
    error = capsys.readouterr().err
    assert holds(error, f"error: .. {package} .. pip install 'str-triton[onnx]'")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pack", "nowhere", "out"], "nowhere: No such file"),
        (["pack", "state.pth", "out"], "state.pth: .. network"),
        (["onnx", "state.pth", "out", "--model", "resnet-digits"], "state.pth .. run"),
        (["onnx", "state.pth", "out", "--model", "resnet20"], "resnet20 .. 'stem.weight'"),
        (["sparse", "run", "nowhere/out"], "nowhere/out .. no such directory"),
        (["sparse", "run", "run"], "run is a directory"),
        (["sparse", "run", "/dev/full"], "/dev/full .. no regular file"),
        (["sparse", "run", "out", "--batch-size", "0"], "--batch-size 0"),
        (["pack", "run", "out", "--image-size", "0"], "--image-size 0"),
        (["pack", "run", "out", "--image-size", "5000"], "--image-size 5000 .. 4096"),
        (["pack", "run", "out.md"], "out.md .. model card"),
        (["pack", "moved", "out"], "with --image-size"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    whole_run: Path,
    tmp_path: Path,
    args: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(whole_run)
    torch.save(trained(whole_run).state_dict(), "state.pth")
    Path("moved").mkdir()
    torch.save(trained(whole_run).state_dict(), "moved/model.safetensors")
    config = json.loads((whole_run / "config.json").read_text())
    Path("moved/config.json").write_text(json.dumps(config | {"data": "imagefolder:elsewhere"}))
    assert main(args) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert holds(output.err, message)
    assert output.err.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
