import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from str_triton.training.checkpoints import Checkpoints, random_state, set_random_state, set_random_state_of
from str_triton.training.errors import UserError


def state(step: int) -> dict:
    return {"step": step, "weights": torch.full((20_000,), float(step)), "nested": {"lr": [0.1, None, True, "text"]}}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def test_nothing_saved_loads_as_none(checkpoints: Checkpoints):
    assert checkpoints.load() is None


def test_the_last_two_are_kept_and_the_newest_is_loaded(checkpoints: Checkpoints):
    for step in (8, 9, 10, 100):
        checkpoints.save(step, state(step))
    assert checkpoints.steps() == [10, 100]
    assert len(list(checkpoints.directory.iterdir())) == 2
    loaded = checkpoints.load()
    assert loaded["step"] == 100
    assert torch.equal(loaded["weights"], state(100)["weights"])
    assert loaded["nested"] == state(100)["nested"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    checkpoints: Checkpoints, damage: str, capsys: pytest.CaptureFixture
):
    for step in (1, 2):
        path = checkpoints.save(step, state(step))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    bad = {"cut": path.read_bytes()[: len(content) // 2], "flipped": bytes(content), "empty": b"", "text": b"hello"}
    path.write_bytes(bad[damage])
    assert checkpoints.load()["step"] == 1
    assert f"{path} is damaged" in capsys.readouterr().err
    assert checkpoints.steps() == [1]
    checkpoints.save(3, state(3))
    assert checkpoints.steps() == [1, 3]  # the damaged checkpoint does not count towards the two that are kept


def test_damaged_checkpoints_alone_are_an_error(checkpoints: Checkpoints):
    for step in (1, 2):
        checkpoints.save(step, state(step)).write_bytes(b"")
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        checkpoints.load()


def test_a_full_disk_leaves_the_last_checkpoint_whole(checkpoints: Checkpoints, file_size_limit: Callable):
    checkpoints.save(1, state(1))
    too_large = pytest.raises(UserError, match=r"cannot be written: .*the last complete one is .*1\.pt")
    with too_large, file_size_limit(40_000):
        checkpoints.save(2, state(2))
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step-000000001.pt"]
    assert torch.equal(checkpoints.load()["weights"], state(1)["weights"])


def test_what_a_kill_left_of_a_write_is_removed(checkpoints: Checkpoints):
    checkpoints.save(1, state(1))
    (checkpoints.directory / ".step-000000002.pt.0123abcd").write_bytes(b"half")
    assert checkpoints.load()["step"] == 1
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step-000000001.pt"]


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.randn()), float(torch.randn(()))


def test_random_states_survive_a_checkpoint(checkpoints: Checkpoints):
    np.random.randn()  # NumPy now holds a second Gaussian in reserve
    checkpoints.save(1, {"step": 1, "random": random_state()})
    expected = [draws() for _ in range(3)]
    set_random_state(checkpoints.load()["random"])
    assert [draws() for _ in range(3)] == expected


def test_a_process_without_a_random_state_gets_one_of_its_own():
    states = [random_state(), random_state()]
    drawn = []
    for process in (0, 1, 2, 3, 2):
        set_random_state_of(process, states)
        drawn.append(draws())
    set_random_state(states[0])
    assert drawn[0] == drawn[1] == draws()
    assert drawn[2] == drawn[4]
    for place in range(3):  # the states of Python, NumPy and torch
        assert len({numbers[place] for numbers in drawn}) == 3
