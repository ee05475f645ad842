"""docs/imagenet.md: its commands are the program's, and its arithmetic is right."""

import re
from pathlib import Path

import pytest

from str_triton.cnn import evaluate, export, train, training_schedule
from str_triton.cnn.recipes import RECIPES
from str_triton.training.options import read_command, read_options
from tests.check_commands import commands

DOCUMENT = (Path(__file__).parents[2] / "docs" / "imagenet.md").read_text()
IMAGES = 1_281_167


@pytest.mark.parametrize("command", [c for c in commands(DOCUMENT) if "cnn/train.py" in c])
def test_options_exist(command: str):
    args = command.partition("cnn/train.py ")[2].split()
    plain = [word for word in args if word not in ("--help", "--resume")]
    with pytest.raises(SystemExit) as leaving:
        train.COMMAND_LINE.read([*plain, "--describe"])
    assert leaving.value.code == 0


@pytest.mark.parametrize("command", [c for c in commands(DOCUMENT) if re.search(r"cnn[./](evaluate|export)", c)])
def test_commands_on_what_comes_out_exist(command: str):
    args = re.split(r"cnn/evaluate\.py|-m str_triton\.cnn\.export", command)[1].split()
    if "cnn.export" in command:
        read_command({"pack": export.Pack, "onnx": export.Onnx}, args, prog="x", description="")
    else:
        read_options(evaluate.Options, args, prog="x", description="")


def test_names_of_recipes():
    assert set(re.findall(r"resnet50-(?:str|dense)[\w.-]*\w", DOCUMENT)) <= RECIPES.keys()


def test_hours():
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) h \| ([\d.]+) h \|$", DOCUMENT, re.MULTILINE)
    assert len(rows) == 5
    for speed, *hours in rows:
        for epochs, text in zip((100, 10), hours, strict=True):
            assert float(text) == pytest.approx(
                epochs * IMAGES / int(speed.replace(",", "")) / 3600, rel=0.15, abs=0.05
            )
    assert "35,588 / R" in DOCUMENT
    assert round(100 * IMAGES / 3600) == 35_588


def test_a_scaled_learning_rate_prunes_from_the_same_epoch():
    config = RECIPES["resnet50-str-90.23"]()
    scaled = type(config)(**{**vars(config), "batch_size": 1024, "lr": 4 * config.lr})
    starts = [training_schedule.pruning_start(c, IMAGES // c.batch_size)[0] for c in (config, scaled)]
    assert starts[0] == starts[1]
