"""The evaluating program from outside: what it measures, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from str_triton import Budget, sparsify
from str_triton.cnn import data, evaluate, paper_checkpoint
from str_triton.cnn.evaluate import main
from str_triton.cnn.models import build
from str_triton.cnn.predictor import Predictor
from str_triton.training.interface import ImageInput, Interface
from tests.messages import holds

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time the network alone no longer than a test needs."""
    monkeypatch.setattr(evaluate, "SECONDS", 0.0)


def evaluated(folder: Path, *args: str) -> dict:
    """Return what the program writes for ``args``."""
    assert main([*args, "--device", "cpu", "--json", str(folder / "result.json")]) == 0
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of five images each, of which two are for testing."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 40, 50, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        name = folder / ("cats", "dogs")[number % 2] / f"{number}.png"
        name.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(name)
    return folder


def test_a_run_gives_what_its_summary_says(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    result = evaluated(tmp_path, str(whole_run))
    summary, config = (json.loads((whole_run / f"{name}.json").read_text()) for name in ("summary", "config"))
    assert (result["model"], result["data"], result["images"]) == (config["model"], config["data"], 359)
    assert result["top1"] == pytest.approx(summary["accuracy"], abs=0.003)
    assert result["top1"] < result["top5"] <= 1
    budget = Budget.from_json(whole_run / "budget.json")
    assert result["budget"]["rows"] == [
        {
            key: getattr(row, key)
            for key in ("name", "params", "nonzeros", "sparsity", "dense_flops", "flops", "covered")
        }
        for row in budget.rows
    ]
    for key in ("params", "nonzeros", "sparsity", "dense_flops", "flops", "uncovered_params", "total_sparsity"):
        assert result["budget"][key] == getattr(budget, key)
    assert result["images_per_second"] > 0
    assert result["model_images_per_second"] > 0
    assert (result["batch_size"], result["environment"]["device"]) == (64, "cpu")
    output = capsys.readouterr().out
    assert f"{whole_run}: resnet-digits on digits, 359 images" in output
    assert re.search(rf"total +{budget.params:,} +{budget.nonzeros:,} ", output)
    assert f"accuracy {100 * result['top1']:.2f} %  top-5 {100 * result['top5']:.2f} %  loss" in output
    assert re.search(
        r"throughput [\d,]+ images/s \(the network alone, batches of 64, cpu, threads: \d+\), [\d,]+", output
    )


def test_the_measures_are_those_of_all_images_whatever_the_batches(whole_run: Path, tmp_path: Path):
    model = build("resnet-digits", num_classes=10, in_channels=1)
    model.load_state_dict(safetensors.torch.load_file(whole_run / "model.safetensors"))
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    test = data.load("digits").test
    (images, labels), *rest = list(
        data.batches(test, batch_size=359, seed=0, epoch=0, augment=False, shuffle=False, workers=0)
    )
    assert not rest
    with torch.inference_mode():
        order = model.eval()(images).argsort(1, descending=True)
    hits = order == labels[:, None]
    result = evaluated(
        tmp_path, str(tmp_path / "weights.pth"), "--model", "resnet-digits", "--data", "digits", "--batch-size", "100"
    )
    assert result["top1"] == pytest.approx(hits[:, 0].double().mean().item(), abs=0.003)
    assert result["top5"] == pytest.approx(hits[:, :5].double().sum(1).mean().item(), abs=0.003)


@pytest.mark.parametrize("file", ["checkpoints/step-000000010.pt", "model.safetensors"])
def test_the_files_of_a_run_know_model_and_data_too(whole_run: Path, tmp_path: Path, file: str):
    result, whole = evaluated(tmp_path, str(whole_run / file)), evaluated(tmp_path, str(whole_run))
    assert (result["top1"], result["loss"], result["budget"]) == (whole["top1"], whole["loss"], whole["budget"])


def test_a_checkpoint_of_the_original_code_on_a_folder_of_images(tmp_path: Path, pictures: Path):
    """Data of two classes have no top-5."""
    model = sparsify(build("mobilenetv1", num_classes=2), g="sigmoid", gradient="masked", raw_threshold_init=-3.0)
    paper_checkpoint.save(model, tmp_path / "best.pth")
    result = evaluated(tmp_path, str(tmp_path / "best.pth"), "--data", f"imagefolder:{pictures}", "--batch-size", "1")
    assert (result["model"], result["images"], result["top5"]) == ("mobilenetv1", 2, None)
    assert result["top1"] in (0.0, 0.5, 1.0)
    assert result["budget"]["nonzeros"] == sum(
        int(module.sparse_weight.count_nonzero()) for module in model.modules() if hasattr(module, "sparse_weight")
    )


def test_images_are_seen_as_they_are(tmp_path: Path, pictures: Path):
    """Without the augmentation of training."""
    model = build("resnet20", num_classes=2)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    args = [str(tmp_path / "weights.pth"), "--model", "resnet20", "--data", f"imagefolder:{pictures}"]
    result = evaluated(tmp_path, *args)
    ((images, labels),) = data.batches(
        data.load(f"imagefolder:{pictures}").test,
        batch_size=2,
        seed=0,
        epoch=0,
        augment=False,
        shuffle=False,
        workers=0,
    )
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(model.eval()(images), labels)
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-4)


def with_interface(path: Path, interface: Interface, model: str = "resnet20") -> torch.nn.Module:
    """Write the weights of a new network with its interface, and return it."""
    assert interface.images is not None
    network = build(model, num_classes=len(interface.outputs), in_channels=interface.images.channels).eval()
    safetensors.torch.save_file(dict(network.state_dict()), path, {"model": model, **interface.texts()})
    return network


@pytest.mark.parametrize(("crop", "channels"), [(0.5, 3), (None, 3), (None, 1)])
def test_images_are_seen_as_the_network_was_trained(
    tmp_path: Path, pictures: Path, crop: float | None, channels: int, capsys: pytest.CaptureFixture
):
    """The data alone would be 50x40 and normalised by their own statistics, for which a training image is missing."""
    shutil.copytree(pictures, tmp_path / "train")
    shutil.copytree(pictures, tmp_path / "val")
    (tmp_path / "train" / "cats" / "0.png").write_bytes(b"")
    file, given = tmp_path / "x.safetensors", [f"imagefolder:{tmp_path}", "--batch-size", "3"]
    for size in (24, 20):
        taken = ImageInput(channels, size, size, crop)
        numbers = ((99.0, 120.0, 90.0)[:channels], (30.0, 50.0, 70.0)[:channels])
        interface = Interface(("cats", "dogs"), numbers, taken)
        if size == 24:
            network = with_interface(file, interface)
        result = evaluated(tmp_path, str(file), "--data", *given, *(["--image-size", "20"] if size == 20 else []))
        own = Predictor(network, interface)
        paths = sorted((tmp_path / "val").glob("*/*.png"))
        pixels = own.normalise(torch.stack([own.pixels(str(path), str(path)) for path in paths]))
        labels = torch.tensor([interface.outputs.index(path.parent.name) for path in paths])
        with torch.inference_mode():
            expected = torch.nn.functional.cross_entropy(network(pixels), labels).item()
        assert result["loss"] == pytest.approx(expected, rel=1e-4)
        said = capsys.readouterr().err
        assert said == ("" if size == 24 else f"warning: --image-size 20: {file} was trained with images of 24x24\n")


def test_images_in_memory_too_are_seen_as_the_network_was_trained(whole_run: Path, tmp_path: Path):
    own = Interface.read(whole_run / "interface.json")
    other = Interface(own.outputs, ((1.0,), (2.0,)), ImageInput(1, 16, 16, None))
    network = with_interface(tmp_path / "x.safetensors", other, "resnet-digits")
    result = evaluated(tmp_path, str(tmp_path / "x.safetensors"), "--data", "digits")
    test = data.load("digits").test
    images = torch.nn.functional.interpolate(test.images, (16, 16), mode="bilinear", antialias=True)
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(network((images - 1.0) / 2), test.labels)
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_other_classes_or_another_order_are_refused(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture):
    numbers = ((99.0, 120.0, 90.0), (30.0, 50.0, 70.0))
    for names in (("dogs", "cats"), ("cats", "mice")):
        with_interface(tmp_path / "x.safetensors", Interface(names, numbers, ImageInput(3, 16, 16, None)))
        args = [str(tmp_path / "x.safetensors"), "--data", f"imagefolder:{pictures}", "--device", "cpu"]
        assert main(args) == 2
        ours, theirs = next((a, b) for a, b in zip(names, ("cats", "dogs"), strict=True) if a != b)
        error = capsys.readouterr().err
        assert holds(error, f"its class '{ours}' is '{theirs}' in the data .. order must match")
        assert error.count("\n") == 1


def test_the_order_of_classes_without_names_is_said_to_be_unknown(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture
):
    numbers = ((99.0, 120.0, 90.0), (30.0, 50.0, 70.0))
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    args = [str(tmp_path / "x.safetensors"), "--data", f"imagefolder:{folder}", "--device", "cpu"]
    with_interface(tmp_path / "x.safetensors", Interface(("0", "1"), numbers, ImageInput(3, 16, 16, None)))
    assert main(args) == 0
    assert holds(capsys.readouterr().err, "warning: .. the network has numbers .. order of the classes")
    with_interface(tmp_path / "x.safetensors", Interface(("cats", "dogs"), numbers, ImageInput(3, 16, 16, None)))
    for name, label in (("cats", "0"), ("dogs", "1")):
        (folder / name).rename(folder / label)
    assert main(args) == 0
    assert holds(capsys.readouterr().err, "warning: .. the data have numbers .. order of the classes")
    for label, name in (("0", "10"), ("1", "9")):  # numbers, but not from 0 on
        (folder / label).rename(folder / name)
    assert main(args) == 2


def test_corrupt_images_end_it_or_are_counted(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, pictures: Path
):
    """One of four test images is cut short."""
    for part in ("train", "val"):
        shutil.copytree(pictures, tmp_path / part)
        for name in ("0", "2", "4"):
            (tmp_path / part / "cats" / f"{name}.png").unlink()
    damaged = tmp_path / "val" / "dogs" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    torch.save(build("resnet20", num_classes=2).state_dict(), tmp_path / "weights.pth")
    args = [str(tmp_path / "weights.pth"), "--model", "resnet20", "--data", f"imagefolder:{tmp_path}"]
    assert main([*args, "--device", "cpu"]) == 2
    assert re.fullmatch(f"error: .*{damaged}.*\n", capsys.readouterr().err)
    (tmp_path / "train" / "dogs" / "3.png").write_bytes(b"")  # of no account in testing
    result = evaluated(tmp_path, *args, "--skip-corrupt")
    assert (result["images"], result["corrupt"]) == (6, 1)
    assert re.fullmatch(f"warning: left out: .*{damaged}.*\n", capsys.readouterr().err)


def test_the_process_ends_with_the_exit_code():
    command = [sys.executable, "cnn/evaluate.py", "nowhere"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert holds(result.stderr, "error: nowhere: No such file")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "nowhere: No such file"),
        (["empty"], "empty: .. weights"),
        (["text"], "text: .. file of weights"),
        (["state.pth", "--data", "digits"], "state.pth: .. network"),
        (["state.pth", "--model", "resnet-digits"], "state.pth .. run"),
        (["state.pth", "--model", "resnet20"], "state.pth .. resnet20 .. 'stem.weight'"),
        (["run", "--model", "resnet-small"], "run .. resnet-small .. 'head.weight' .. [10, 64]"),
        (["run", "--model", "vgg"], "no model vgg"),
        (
            ["five.pth", "--data", "digits", "--model", "resnet-digits"],
            "five.pth .. digits .. 5 classes .. 10 classes",
        ),
        (["color.pth", "--data", "digits", "--model", "resnet-digits"], "digits .. 1 colour .. color.pth 3"),
        (["run", "--data", "imagefolder:empty"], "empty"),
        (["run", "--data", "cifar"], "'cifar'"),
        (["run", "--data-dir", "there"], "--data-dir there"),
        (["run", "--batch-size", "0"], "--batch-size 0"),
        (["run", "--workers", "-1"], "--workers -1"),
        (["run", "--json", "nowhere/x.json"], "--json nowhere/x.json"),
        (["run", "--json", "."], "--json . .. directory"),
        (["damaged"], "config.json .. python cnn/train.py"),
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
    Path("empty").mkdir()
    Path("text").write_text("Here be weights.")
    Path("run").symlink_to(whole_run)
    shutil.copytree(whole_run, "damaged")
    Path("damaged/config.json").write_text("{")
    for name, classes, channels in (("state", 10, 1), ("five", 5, 1), ("color", 10, 3)):
        model = build("resnet-digits", num_classes=classes, in_channels=channels)
        torch.save(model.state_dict(), f"{name}.pth")
    assert main([*args, "--device", "cpu"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert holds(output.err, message)
    assert output.err.count("\n") == 1
