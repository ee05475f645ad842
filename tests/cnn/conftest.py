from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny run that was not interrupted."""
    from tests.cnn.train_runs import begin  # not above: the tests of the data need none of what it imports

    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert begin(folder) == 0
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures, which take longer than a tiny run's training."""
    monkeypatch.setattr("str_triton.cnn.train.report", lambda folder: "")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return options for a network of two layers, which trains in a tenth of the time of the digits' network."""
    from str_triton.cnn import models  # see `whole_run`
    from tests.cnn.train_runs import two_layers

    monkeypatch.setitem(models.MODELS, "two-layers", two_layers)
    return ["--model", "two-layers"]


@pytest.fixture(scope="session")
def imagenet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a made-up ImageNet of 20 classes with 240 training and 60 validation images: a folder per class."""
    from tests.cnn.made_up_imagenet import write_imagefolder

    root = tmp_path_factory.mktemp("imagenet") / "folder"
    write_imagefolder(root)
    return root


@pytest.fixture(scope="session")
def imagenet_parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the same images in shards of the hub's layout."""
    from tests.cnn.made_up_imagenet import write_parquet

    root = tmp_path_factory.mktemp("imagenet") / "hub"
    write_parquet(root)
    return root
