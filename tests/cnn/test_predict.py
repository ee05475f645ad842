"""The predicting program from outside: its classes are those of the test images, in whatever file the network lies."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from PIL import Image

from str_triton import deploy
from str_triton.cnn import data, evaluate
from str_triton.cnn.data.encoded import IMAGENET
from str_triton.cnn.export import main as export
from str_triton.cnn.models import build
from str_triton.cnn.predict import main
from str_triton.cnn.predictor import Predictor
from str_triton.cnn.rebuild import rebuild
from str_triton.training.interface import ImageInput, Interface
from tests.messages import holds

ROOT = Path(__file__).parents[2]
DIGITS = 12


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first test images of the digits as PNG files, some in a folder below."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "more").mkdir()
    for number, image in enumerate(data.load("digits").test.images[:DIGITS]):
        name = folder / ("more" if number % 2 else "") / f"{number:02d}.png"
        Image.fromarray(image[0].numpy()).save(name)
    (folder / "notes.txt").write_text("no image")
    return folder


def predicted(capsys: pytest.CaptureFixture, *args: object) -> dict[str, dict[str, float]]:
    """Return the probability of each class by image, as the program prints it with --json."""
    capsys.readouterr()
    assert main([*map(str, args), "--json", "--device", "cpu"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    records = map(json.loads, output.out.splitlines())
    return {record["image"]: {c["name"]: c["probability"] for c in record["classes"]} for record in records}


FILES = {"pack": "x.packed.safetensors", "onnx": "x.onnx", "sparse": "x.sparse"}


@pytest.fixture(scope="module")
def exported(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run's network in every kind of file."""
    folder = tmp_path_factory.mktemp("exported")
    for kind, name in FILES.items():
        assert export([kind, str(whole_run), str(folder / name)]) == 0
    shutil.copy(whole_run / "model.safetensors", folder / "alone.safetensors")
    return folder


def test_all_files_of_a_run_give_its_probabilities(
    whole_run: Path, exported: Path, digits: Path, capsys: pytest.CaptureFixture
):
    test = data.load("digits").test
    images = test.normalisation(test.images[:DIGITS])
    with torch.inference_mode():
        expected = rebuild(whole_run).model(images).softmax(1)
    for path in (whole_run, *(exported / name for name in (*FILES.values(), "alone.safetensors"))):
        found = predicted(capsys, path, digits, "--top", 10, "--batch-size", 5)
        assert sorted(found) == list(found)
        by_number = {int(Path(name).stem): classes for name, classes in found.items()}
        assert len(by_number) == DIGITS
        for number, row in enumerate(expected):
            assert sorted(by_number[number].values(), reverse=True) == list(by_number[number].values())
            own = torch.tensor([by_number[number][name] for name in "0123456789"])
            torch.testing.assert_close(own, row, rtol=0, atol=1e-4)


def test_the_lines_are_the_five_best(whole_run: Path, digits: Path, capsys: pytest.CaptureFixture):
    first, second = digits / "00.png", digits / "more" / "01.png"
    best = predicted(capsys, whole_run, first, second)
    assert main([str(whole_run), str(first), str(second)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[6]) == (str(first), str(second))
    assert len(lines) == 12
    names = [re.fullmatch(r" +\d+\.\d\d %  (\d)", line).group(1) for line in lines[1:6]]
    assert names == list(best[str(first)])


def test_an_image_on_standard_input(
    whole_run: Path, digits: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    image = digits / "00.png"
    (expected,) = predicted(capsys, whole_run, image).values()
    for arguments in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(image.read_bytes())))
        assert predicted(capsys, whole_run, *arguments) == {"standard input": expected}


def test_an_empty_standard_input_and_a_missing_run_are_named(
    whole_run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert main([str(whole_run)]) == 2
    assert holds(capsys.readouterr().err, "standard input is empty")
    assert main([]) == 2
    assert "missing: RUN|FILE (" in capsys.readouterr().err


def test_an_onnx_file_of_another_name(exported: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    expected = predicted(capsys, exported / FILES["onnx"], digits)
    for name in ("x.ONNX", "x"):
        shutil.copy(exported / FILES["onnx"], tmp_path / name)
        assert predicted(capsys, tmp_path / name, digits) == expected


@pytest.mark.filterwarnings("ignore:pack")
def test_a_recurrent_network_is_named(tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"cell": "gru"}')
    sound = Interface(("yes", "no"), ((0.0,), (1.0,)))
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors", sound.texts())
    deploy.pack({"x": torch.zeros(2)}, tmp_path / "x.packed", metadata={"run": {}, **sound.record()})
    metadata = {"network": "GRU", "outputs": '["yes", "no"]'}
    deploy.export_onnx(
        torch.nn.Linear(1, 2), torch.zeros(1, 1), inputs=["frames"], outputs=["scores"], metadata=metadata
    ).save(tmp_path / "x.onnx")
    for name in ("run", "x.safetensors", "x.packed", "x.onnx"):
        assert main([str(tmp_path / name), str(digits)]) == 2
        error = capsys.readouterr().err
        assert holds(error, f"{tmp_path / name} is a recurrent network .. rnn/listen.py .. rnn/generate.py")
        assert error.count("\n") == 1


@pytest.mark.parametrize(("crop", "size"), [(0.875, None), (None, 40), (0.875, 48)])
def test_photographs_are_cropped_and_scaled_as_in_testing(crop: float | None, size: int | None, tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 90, 110, 3), dtype=np.uint8)
    if crop is None:
        pixels = pixels[:, :50, :60]
    for number, image in enumerate(pixels):
        name = tmp_path / ("cats", "dogs")[number % 2] / f"{number}.jpg"
        name.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(name)
    loaded = data.load(f"imagefolder:{tmp_path}", image_size=size)
    interface = loaded.interface()
    side = size or 224
    assert interface == Interface(("cats", "dogs"), interface.standardisation, ImageInput(3, side, side, crop))
    assert Interface.of(json.loads(interface.text())) == interface
    ((tested, _),) = data.batches(loaded.test, batch_size=2, seed=0, epoch=0, augment=False, shuffle=False, workers=0)
    predictor = Predictor(lambda images: images, interface)
    files = map(str, tmp_path.glob("*/*.jpg"))
    own = [predictor.normalise(predictor.pixels(file, file)[None])[0] for file in files]
    assert all(any(torch.equal(image, other) for other in own) for image in tested)


def test_class_names_come_from_the_data():
    assert data.load("digits").class_names == tuple("0123456789")


def test_weights_without_an_interface_take_one_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture):
    model = build("resnet20", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    Image.fromarray(np.zeros((9, 12, 3), np.uint8)).save(tmp_path / "black.png")
    args = [str(tmp_path / "x.pt"), str(tmp_path / "black.png"), "--model", "resnet20"]
    assert main(args) == 2
    assert "--interface" in capsys.readouterr().err
    names = ("ant", "bee", "cat")
    interface = Interface(names, (IMAGENET.mean, IMAGENET.std), ImageInput(3, 16, 16, None))
    (tmp_path / "i.json").write_text(interface.text())
    (classes,) = predicted(capsys, *args, "--interface", tmp_path / "i.json").values()
    black = IMAGENET(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with torch.inference_mode():
        expected = dict(zip(names, model.eval()(black).softmax(1)[0].tolist(), strict=True))
    assert classes == pytest.approx(expected, abs=1e-5)
    (tmp_path / "i.json").write_text(Interface(names[:2], interface.standardisation, interface.images).text())
    assert main([*args, "--interface", str(tmp_path / "i.json")]) == 2
    assert holds(capsys.readouterr().err, "3 scores .. names 2")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("head.weight", math.nan, "key 'head.weight' holds NaN or infinite numbers"),
        ("norm.running_var", -1.0, "the network's scores of .. NaN"),
    ],
)
def test_a_network_of_no_numbers_is_refused(
    key: str, value: float, message: str, whole_run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    file, run = tmp_path / "x.safetensors", whole_run / "model.safetensors"
    with safetensors.safe_open(run, "pt") as content:
        metadata = content.metadata()
    weights = safetensors.torch.load_file(run)
    weights[key][0] = value
    safetensors.torch.save_file(weights, file, metadata)
    for program, args in ((main, [digits / "00.png", "--json"]), (evaluate.main, ["--data", "digits"])):
        assert program([str(file), *map(str, args), "--device", "cpu"]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert holds(output.err, message)
        assert output.err.count("\n") == 1


def test_a_compiled_network_has_no_plain_weights(exported: Path, capsys: pytest.CaptureFixture):
    assert evaluate.main([str(exported / FILES["sparse"]), "--data", "digits", "--device", "cpu"]) == 2
    assert holds(capsys.readouterr().err, f"{exported / FILES['sparse']} .. compiled network .. predict")


def test_the_files_hold_the_interface(whole_run: Path, exported: Path):
    expected = json.loads((whole_run / "interface.json").read_text())
    assert expected["outputs"] == list("0123456789")
    size = {"channels": 1, "height": 8, "width": 8}
    assert expected["images"] == {**size, "crop": None, "resize": "bilinear, antialiased"}
    for name in (FILES["pack"], FILES["sparse"]):
        metadata = deploy.inspect(exported / name).metadata
        assert {key: metadata[key] for key in expected} == expected
    properties = {entry.key: entry.value for entry in onnx.load(exported / FILES["onnx"]).metadata_props}
    assert {key: json.loads(properties[key]) for key in expected} == expected
    card = (exported / FILES["pack"]).with_suffix(".md").read_text()
    mean = expected["standardisation"]["mean"][0]
    assert f"mean {mean:g}, " in card
    assert "| classes | 10: 0; 1; 2; 3; 4; 5; 6; 7; 8; 9 (" in card  # names may hold commas


def test_a_corrupt_image_ends_it_or_is_left_out(
    whole_run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    shutil.copy(digits / "00.png", tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    shutil.copy(digits / "02.png", tmp_path / "c.png")
    assert main([str(whole_run), str(tmp_path)]) == 2
    assert re.fullmatch(rf"error: {tmp_path / 'b.png'}: not a readable image .*\n", capsys.readouterr().err)
    assert main([str(whole_run), str(tmp_path), "--skip-corrupt", "--json", "--batch-size", "2"]) == 0
    output = capsys.readouterr()
    assert [json.loads(line)["image"] for line in output.out.splitlines()] == [
        str(tmp_path / "a.png"),
        str(tmp_path / "c.png"),
    ]
    assert re.fullmatch(rf"warning: left out: {tmp_path / 'b.png'}: .*\n", output.err)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "nowhere.png"], "nowhere.png: no such file"),
        (["run", "empty"], "empty: .. no image"),
        (["nowhere", "x.png"], "nowhere: No such file"),
        (["text", "x.png"], "text: .. file of weights"),
        (["text.onnx", "x.png"], "text.onnx .. ONNX"),
        (["state.pth", "x.png"], "state.pth: .. network"),
        (["run", "x.png", "--top", "0"], "--top 0"),
        (["run", "x.png", "--batch-size", "0"], "--batch-size 0"),
        (["run", "x.png", "--interface", "text"], "text: "),
        (["run", "x.png", "--interface", "sound.json"], "sound.json .. images"),
        (["run", "x.png", "--interface", "colour.json"], "run .. images of 3 x 8 x 8"),
        (["odd", "x.png"], "odd: .. 10 scores .. 2 names"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    whole_run: Path,
    digits: Path,
    tmp_path: Path,
    args: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("run").symlink_to(whole_run)
    for name in ("text", "text.onnx"):
        Path(name).write_text("Here be weights.")
    shutil.copy(digits / "00.png", "x.png")
    Path("sound.json").write_text(Interface(("a", "b")).text())
    colour = Interface(tuple("0123456789"), ((0.0,) * 3, (1.0,) * 3), ImageInput(3, 8, 8, None))
    Path("colour.json").write_text(colour.text())
    Path("odd").mkdir()
    shutil.copy(whole_run / "config.json", "odd")
    safetensors.torch.save_file(dict(rebuild(whole_run).model.state_dict()), "odd/model.safetensors")
    Path("odd/interface.json").write_text(Interface(("a", "b")).text())
    torch.save(build("resnet-digits", num_classes=10, in_channels=1).state_dict(), "state.pth")
    assert main([*args, "--device", "cpu"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert holds(output.err, message)
    assert output.err.count("\n") == 1


def test_the_process_ends_with_the_exit_code(tmp_path: Path):
    command = [sys.executable, "cnn/predict.py", "nowhere", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
