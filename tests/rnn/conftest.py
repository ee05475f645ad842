from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny run that was not interrupted."""
    from tests.rnn.train_runs import RANK, begin  # not at the top: the layers' tests do not need its imports

    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert begin(folder, *RANK) == 0
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the report, which takes longer than a tiny run's training."""
    monkeypatch.setattr("str_triton.rnn.train.report", lambda folder: "")
