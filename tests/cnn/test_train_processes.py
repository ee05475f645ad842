"""The training program in two processes: the same results, one voice, and a common end."""

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from str_triton.cnn import models, train
from str_triton.training import job, run
from tests.cnn.train_runs import TINY, begin, resume
from tests.messages import holds
from tests.processes import Job, free_port, rank, run_job
from tests.runs import assert_same_result, last_checkpoint, same_bits

ROOT = Path(__file__).parents[2]
METHODS = {
    "str-exact": ["--distribution", "learned"],
    "str": ["--raw-threshold-init", "-3"],
    "gmp": ["--mask-interval", "2"],
    "dnw": [],
    "rigl": ["--mask-interval", "2"],
}


def group_norm_net(num_classes: int, in_channels: int) -> nn.Module:
    """Not a batch norm in it: what is computed of an image is the same whatever is beside it."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2, bias=False),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, num_classes),
    )


def use_group_norm_net(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(models.MODELS, "group-norm", group_norm_net)


def train_here(folder: Path, args: list[str], disturb: Callable[[], None] | None = None) -> int:
    """The program, in one of the processes; what each ends with goes beside the run's folder, without pictures."""
    models.MODELS["group-norm"] = group_norm_net
    train.report = lambda folder: ""
    finish, no_sync, inner = train.Experiment.finish, Accelerator.no_sync, []

    def record_and_finish(experiment: train.Experiment, opened: run.Run) -> None:
        state = {**experiment.state(), "rows": [row.nonzeros for row in experiment.budget.rows], "inner": len(inner)}
        torch.save(state, folder.with_name(f"{folder.name}-{rank()}.pt"))
        finish(experiment, opened)

    train.Experiment.finish = record_and_finish
    Accelerator.no_sync = lambda accelerator, model: inner.append(model) or no_sync(accelerator, model)
    if disturb is not None:
        disturb()
    return train.main([*args, "--run-dir", str(folder)])


def train_together(folder: Path, *options: str, disturb: Callable[[], None] | None = None, size: int = 2) -> Job:
    return run_job(folder.parent, train_here, folder, [*TINY, *options], disturb, size=size)


def ends_of(folder: Path) -> list[dict]:
    return [torch.load(folder.with_name(f"{folder.name}-{number}.pt"), weights_only=True) for number in range(2)]


@pytest.fixture(scope="module")
def whole_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Job]:
    """A job of two processes that nothing disturbed, and how it ended."""
    folder = tmp_path_factory.mktemp("job") / "run"
    return folder, train_together(folder, disturb=warn_in_all)


def test_process_0_alone_prints_and_writes(whole_job: tuple[Path, Job]):
    folder, ended = whole_job
    assert ended.codes == [0, 0]
    assert ended.out[0].count("report: ") == 1
    assert "epoch 2/2" in ended.out[0]
    assert ended.err[0].count("UserWarning: look out") == 1
    assert ended.out[1] == ended.err[1] == ""
    assert {path.name for path in folder.parent.iterdir()} == {"run", "run-0.pt", "run-1.pt"} | {
        f"{kind}{number}" for kind in ("out", "err") for number in range(2)
    }
    expected = {
        "interface.json",
        "budget.csv",
        "budget.json",
        "checkpoints",
        "config.json",
        "environment.json",
        "events",
        "lock",
    }
    expected |= {"metrics.jsonl", "model.safetensors", "report.html", "summary.json"}
    assert {path.name for path in folder.iterdir()} == expected
    assert len(list((folder / "events").iterdir())) == 1


@pytest.mark.parametrize("method", METHODS)
def test_processes_agree_to_the_bit(tmp_path: Path, method: str):
    """With batch norm, whose running statistics are then process 0's; masks and growth included."""
    folder = tmp_path / "run"
    assert train_together(folder, "--method", method, *METHODS[method]).codes == [0, 0]
    first, second = ends_of(folder)
    assert first.keys() == second.keys()
    for key in first:
        assert same_bits(first[key], second[key]), key
    saved = last_checkpoint(folder)
    assert same_bits(first["model"], saved["model"]) or method == "str-exact"  # which saves the exact thresholds


def assert_rounding_alone(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare whole tensors: rounding may carry a weight across its threshold, where its gradient ends."""
    for name, value in expected.items():
        assert (actual[name] - value).double().norm() <= 2e-3 * value.double().norm(), name


def test_processes_and_parts_change_rounding_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None):
    use_group_norm_net(monkeypatch)
    options = ["--model", "group-norm"]
    assert begin(tmp_path / "alone", *options) == 0
    assert begin(tmp_path / "parts", *options, "--accumulate", "4") == 0
    assert train_together(tmp_path / "job", *options, "--accumulate", "2").codes == [0, 0]
    assert ends_of(tmp_path / "job")[1]["inner"] == 10  # a part in each step that did not synchronise
    alone, parts, together = (last_checkpoint(tmp_path / name)["model"] for name in ("alone", "parts", "job"))
    initial = models.build("group-norm", num_classes=10, in_channels=1).state_dict()
    assert_rounding_alone(parts, alone)
    assert_rounding_alone(together, alone)
    assert (alone["0.weight"] - initial["0.weight"]).abs().max() > 1e-2


# What happens in a process, before it begins.


def on_step(step: int, act: Callable[[], None], *ranks: int) -> None:
    """Have ``act`` happen in the course of a step, in these processes."""
    original, calls = train.learning_rate, []

    def learning_rate(*args: object) -> float:
        calls.append(None)
        if len(calls) == step and rank() in ranks:
            act()
        return original(*args)

    train.learning_rate = learning_rate


def warn_in_all() -> None:
    on_step(2, lambda: warnings.warn("look out", stacklevel=1), 0, 1)


def raise_(error: Exception) -> None:
    raise error


def break_data() -> None:
    batches = train.batches

    def broken(*args: object, **kwargs: object):
        for number, batch in enumerate(batches(*args, **kwargs)):
            if number == 2 and rank() == 1:
                raise OSError("image 7 is broken")
            yield batch

    train.batches = broken


def have_a_bug() -> None:
    job.HEARTBEAT = 0.5
    on_step(3, lambda: raise_(ZeroDivisionError("a bug")), 1)


def die() -> None:
    job.HEARTBEAT = 0.5
    on_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL), 1)


def die_first() -> None:
    job.HEARTBEAT = 0.5
    on_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL), 0)


def die_while_the_other_hangs() -> None:
    on_step(3, lambda: time.sleep(1000), 0)
    die()
    job.HEARTBEAT = 0.1


def take_the_network_away() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "nowhere0"


def stop_twice() -> None:
    """SIGTERM to all processes, which the launcher passes on."""
    run.AGREE_SECONDS = 0.0
    on_step(3, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)], 0, 1)


def stop_one() -> None:
    run.AGREE_SECONDS = 0.0
    on_step(7, lambda: os.kill(os.getpid(), signal.SIGINT), 1)


def test_bad_data_in_one_process_is_one_line_from_all(tmp_path: Path):
    ended = train_together(tmp_path / "run", disturb=break_data)
    assert ended.codes == [2, 2]
    assert "".join(ended.err) == "error: image 7 is broken\n"


def test_a_bug_in_one_process_is_one_traceback_from_all(tmp_path: Path):
    ended = train_together(tmp_path / "run", disturb=have_a_bug)
    assert ended.codes == [1, 1]
    assert "".join(ended.err).count("Traceback") == 1
    assert ended.err[1].endswith("ZeroDivisionError: a bug\n")


@pytest.mark.parametrize(("how", "dead"), [(die, 1), (die_first, 0), (die_while_the_other_hangs, 1)])
def test_when_a_process_dies_the_others_leave(tmp_path: Path, how: Callable[[], None], dead: int):
    ended = train_together(tmp_path / "run", disturb=how)
    assert ended.codes[dead] == -signal.SIGKILL
    assert ended.codes[1 - dead] == 2  # by itself: one that waited for the dead would be killed by `run_job`
    assert ended.err[dead] == ""
    said = [line for line in ended.err[1 - dead].splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert f"error: process {dead} of 2 has died" in said[0]
    assert "Traceback" not in ended.err[1 - dead]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "--epochs 0 .. at least 1"),
        (["--batch-size", "63"], "--batch-size 63 .. 2 processes"),
        (["--no-such-option"], "no-such-option"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path: Path, options: list[str], message: str):
    ended = train_together(tmp_path / "run", *options)
    assert ended.codes == [2, 2]
    assert sum(holds(text, message) for text in ended.err) == 1
    assert sum(map(bool, ended.err)) == 1
    assert not (tmp_path / "run").exists()


def test_processes_that_cannot_meet_are_told_of_the_interface(tmp_path: Path):
    ended = train_together(tmp_path / "run", disturb=take_the_network_away)
    assert ended.codes == [2, 2]
    assert "".join(ended.err).startswith("error: the processes cannot reach each other: ")
    assert "".join(ended.err).endswith("; GLOO_SOCKET_IFNAME names the network interface to use, such as eth0\n")
    assert "".join(ended.err).count("\n") == 1


@pytest.mark.parametrize(("how", "step", "code"), [(stop_twice, 3, 143), (stop_one, 7, 130)])
def test_a_stopped_job_goes_on_in_the_same_bits(
    tmp_path: Path, whole_job: tuple[Path, Job], how: Callable[[], None], step: int, code: int
):
    folder = tmp_path / "run"
    ended = train_together(folder, disturb=how)
    assert ended.codes == [code, code]
    assert "".join(ended.err).startswith(f"stopped after step {step}, which is saved; continue with: ")
    assert "".join(ended.err).count("\n") == 1
    assert run_job(tmp_path, train_here, folder, ["--resume"]).codes == [0, 0]
    assert_same_result(folder, whole_job[0])


def test_a_run_goes_on_in_another_number_of_processes(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch):
    """The batch is that of all processes together: without batch norm the result is the same but for rounding."""
    use_group_norm_net(monkeypatch)
    options = ["--model", "group-norm"]
    assert begin(tmp_path / "alone", *options) == 0
    assert train_together(tmp_path / "run", *options, disturb=stop_twice).codes == [143, 143]
    assert resume(tmp_path / "run", "--accumulate", "2") == 0
    alone, fewer = last_checkpoint(tmp_path / "alone"), last_checkpoint(tmp_path / "run")
    assert fewer["step"] == 10
    assert_rounding_alone(fewer["model"], alone["model"])


def test_torchrun_stops_cleanly_and_accelerate_launch_goes_on(tmp_path: Path):
    folder, variables = tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    options = ["cnn/train.py", *TINY, "--epochs", "10", "--run-dir", str(folder)]
    command = [sys.executable, "-m", *f"torch.distributed.run --nproc-per-node 2 --master-port {free_port()}".split()]
    with subprocess.Popen(
        [*command, *options], cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as launcher:
        while not list(folder.glob("checkpoints/*.pt")):
            assert launcher.poll() is None, launcher.stderr.read()
            time.sleep(0.02)
        launcher.send_signal(signal.SIGTERM)
        _, error = launcher.communicate(timeout=120)
    assert error.count("which is saved; continue with") == 1
    step = last_checkpoint(folder)["step"]
    assert f"stopped after step {step}," in error
    words = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port"
    command = [sys.executable, "-m", "accelerate.commands.launch", *words.split(), str(free_port())]
    options = ["cnn/train.py", "--resume", "--run-dir", str(folder)]
    ended = subprocess.run([*command, *options], cwd=ROOT, env=variables, text=True, capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("report: ") == 1
    assert last_checkpoint(folder)["step"] == 50
