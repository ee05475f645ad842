import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from str_triton.training.errors import UserError
from str_triton.training.metrics import read_metrics
from str_triton.training.run import Run
from tests.messages import holding


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def open_run(accelerator: Accelerator, path: Path, *, resume: bool = False) -> Run:
    return Run.open(accelerator, {"seed": 0}, path, resume=resume, program="train")


def test_a_resumed_run_goes_on_where_it_was(accelerator: Accelerator, tmp_path: Path):
    with open_run(accelerator, tmp_path / "run") as run:
        assert run.restore(10) is None
        run._began -= 1e6  # as if it had run for a million seconds
        run.log({"kind": "step", "step": 3, "loss": 1.0})
        run.save(3, {"weight": torch.ones(2)})
        run.log({"kind": "step", "step": 4, "loss": 0.5})
        expected = torch.rand(3)
    torch.rand(100)
    with open_run(accelerator, tmp_path / "run", resume=True) as run:
        state = run.restore(10)
        assert torch.equal(torch.rand(3), expected)
        assert (state["step"], state["weight"].tolist()) == (3, [1.0, 1.0])
        assert 1e6 <= run.elapsed() < 1.5e6
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [3]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [session["step"] for session in environment["resumed"]] == [3]


def test_a_run_of_more_processes_goes_on_with_the_first_ones_state(accelerator: Accelerator, tmp_path: Path):
    with open_run(accelerator, tmp_path / "run") as run:
        run.restore(10)
        run.save(3, {})
        expected = torch.rand(3)
    path = tmp_path / "run" / "checkpoints" / "step-000000003.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "random": state["random"] * 2}, path)
    with open_run(accelerator, tmp_path / "run", resume=True) as run:
        assert run.restore(10)["step"] == 3
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(accelerator: Accelerator, tmp_path: Path, loss: float):
    with open_run(accelerator, tmp_path / "run") as run:
        run.restore(10)
        run.require_finite(1, 0.5, [torch.zeros(3), torch.zeros(2, dtype=torch.int64)])
        with pytest.raises(UserError, match="by step 1; no checkpoint was made"):
            run.require_finite(1, loss)
        run.save(1, {})
        with pytest.raises(UserError, match=holding("step-000000001.pt")):
            run.require_finite(2, 0.5, [torch.zeros(3), torch.tensor([1.0, loss])])


def test_files_that_cannot_be_written_are_one_line(accelerator: Accelerator, tmp_path: Path):
    with open_run(accelerator, tmp_path / "run") as run, pytest.raises(UserError, match="No such file or directory"):
        run.write("nowhere/file", "text")
