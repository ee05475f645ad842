"""The study of methods on CIFAR-10: its order, its lines, and a run through the training program."""

from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from benchmarks.studies import cifar, cnn_runs
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
    for file in (cifar.RUNS, cifar.TUNING):
        monkeypatch.setattr(file, "path", tmp_path / file.path.name)
    monkeypatch.setattr(cifar, "EPOCHS", 1)
    monkeypatch.setattr("str_triton.cnn.train.report", lambda folder: "")
    main = cnn_runs.train.main
    monkeypatch.setattr(cnn_runs.train, "main", lambda args: run_main(main, args))


@pytest.fixture
def tuned(small: None) -> None:
    for model, lr, accuracy in (("resnet20", 0.1, 0.5), ("resnet20", 0.2, 0.6), ("resnet-medium", 0.4, 0.7)):
        cifar.TUNING.append({"model": model, "lr": lr, "accuracy": accuracy})


def test_every_line_can_be_run_again() -> None:
    assert {run["line"] for run in cifar.RUNS.read()} <= set(cifar.LINES)


def test_the_leaders_at_90_percent_come_first() -> None:
    keys = [(key["line"], key["target"], key["seed"]) for key in cifar.wanted("resnet20")]
    assert keys[:3] == [("dense", 0.0, 0), ("str-exact", 0.9, 0), ("gmp, global", 0.9, 0)]
    assert all(target == 0 for line, target, _ in keys if line.startswith(("dense", "str, ")))


def test_a_run_meets_its_target_and_is_not_repeated(photographs: str, tuned: None) -> None:
    key = {"model": "resnet20", "line": "str-exact", "target": 0.9, "seed": 1}
    unfinished = cifar.FOLDERS / "resnet20-str-exact-0.9-1"
    unfinished.mkdir(parents=True)
    (unfinished / LOCK).touch()  # left by a run that was killed before its first checkpoint
    cifar.train_line(key, photographs, threads=1)
    (line,) = cifar.RUNS.read()
    assert line["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert (line["lr"], line["epochs"], len(line["density"])) == (0.2, 1, 22)
    assert 0 < line["flops"] < 1
    assert not list(cifar.RUNS.missing([key]))
    assert not any(cifar.FOLDERS.iterdir())


def test_tuning_does_not_see_the_test_images(photographs: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "TUNING_EPOCHS", 1)
    monkeypatch.setattr(cifar, "LRS", (0.2,))
    (Path(photographs.removeprefix("hub:")) / "test-00000.parquet").write_bytes(b"not a parquet file")
    for _ in range(2):
        cifar.tune(["resnet20"], photographs, threads=1)
    (line,) = cifar.TUNING.read()
    assert (line["model"], line["lr"], line["sparsity"]) == ("resnet20", 0.2, 0.0)


def test_a_network_starts_from_the_dense_one_and_learns_from_it(photographs: str, tuned: None) -> None:
    key = {"model": "resnet20", "line": "str-exact, from dense, teacher", "target": 0.9, "seed": 0}
    cifar.train_line(key, photographs, threads=1)
    (kept,) = cifar.FOLDERS.iterdir()
    assert kept.name == "resnet20-dense-0-0"
    options = cifar.options_of(key)
    assert options[options.index("--pretrained") + 1] == options[options.index("--teacher") + 1] == str(kept)
    (line,) = cifar.RUNS.read()
    assert (line["line"], line["lr"]) == (key["line"], 0.1)
