from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run that nothing disturbed."""
    from tests.rnn.train_runs import RANK, begin  # not above: the tests of the layers need none of what it imports

    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert begin(folder, *RANK) == 0
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures, which take longer than a tiny run's training."""
    monkeypatch.setattr("rnn.train.report", lambda folder: "")
