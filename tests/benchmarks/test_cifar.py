"""The study of methods on CIFAR-10: its order, its lines, and a run through the training program."""

from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from benchmarks import cifar
from str_triton.training.run_folder import LOCK
from tests.runs import run_main

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


def jpeg(index: int) -> bytes:
    file = BytesIO()
    pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two classes of noise in the layout of CIFAR-10 on the hub, with columns img and label."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for split, count in (("train", 160), ("test", 20)):
        rows = {"img": [{"bytes": jpeg(i), "path": None} for i in range(count)], "label": [i % 2 for i in range(count)]}
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{split}-00000.parquet")
    return f"hub:{tmp_path / 'data'}"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar, "OUTPUT", tmp_path / "lines.jsonl")
    monkeypatch.setattr(cifar, "TUNING", tmp_path / "tuning.jsonl")
    monkeypatch.setattr(cifar, "EPOCHS", {"resnet20": 1})
    monkeypatch.setattr("str_triton.cnn.train.report", lambda folder: "")
    main = cifar.train.main
    monkeypatch.setattr(cifar.train, "main", lambda args: run_main(main, args))


def test_every_line_can_be_run_again() -> None:
    lines = {(run["model"], run["line"]) for run in cifar.read(cifar.OUTPUT)}
    assert lines <= {(key.model, key.line) for model in cifar.EPOCHS for key in cifar.wanted(model)}


def test_the_leaders_at_90_percent_come_first() -> None:
    keys = cifar.wanted("resnet20")
    assert [(key.line, key.target, key.seed) for key in keys[:3]] == [
        ("dense", 0.0, 0),
        ("str-exact", 0.9, 0),
        ("gmp, global", 0.9, 0),
    ]
    assert len(keys) == len(set(keys))


def test_a_run_meets_its_target_and_is_not_repeated(photographs: str, small: None) -> None:
    key = cifar.Key("resnet20", "str-exact", 0.9, 1)
    assert key in cifar.missing(["resnet20"])
    unfinished = cifar.RUNS / "resnet20-str-exact-0.9-1"
    unfinished.mkdir(parents=True)
    (unfinished / LOCK).touch()  # left by a run that was killed before its first checkpoint
    cifar.run(key, photographs, threads=1)
    (line,) = cifar.read(cifar.OUTPUT)
    assert line["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert (line["lr"], line["epochs"], len(line["density"])) == (cifar.LR["resnet20"], 1, 22)
    assert 0 < line["flops"] < 1
    assert key not in cifar.missing(["resnet20"])
    assert not any(cifar.RUNS.iterdir())


def test_tuning_does_not_see_the_test_images(photographs: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "TUNING_EPOCHS", 1)
    monkeypatch.setattr(cifar, "LRS", (0.2,))
    (Path(photographs.removeprefix("hub:")) / "test-00000.parquet").write_bytes(b"not a parquet file")
    for _ in range(2):
        cifar.tune(["resnet20"], photographs, threads=1)
    (line,) = cifar.read(cifar.TUNING)
    assert (line["model"], line["lr"], line["sparsity"]) == ("resnet20", 0.2, 0.0)
