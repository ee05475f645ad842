"""Small modules: errors, signals, schedules, meter, progress."""

import io
import os
import signal
from pathlib import Path

import datasets
import pytest
import torch
from rich.console import Console

from str_triton.training.errors import Interrupted, UserError, as_user_error, run_program
from str_triton.training.hub import read_splits
from str_triton.training.meter import Meter, Throughput
from str_triton.training.progress import ProgressBar
from str_triton.training.schedules import decayed_thresholds, warmup_cosine
from str_triton.training.signals import StopRequest


def raising(error: BaseException):
    def program() -> None:
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("--lr 0: it must be above 0"), 2, "error: --lr 0: it must be above 0\n"),
        (Interrupted(signal.SIGINT, "stopped"), 130, "stopped\n"),
        (Interrupted(signal.SIGTERM, "stopped"), 143, "stopped\n"),
        (SystemExit(2), 2, ""),
        (SystemExit(), 0, ""),
    ],
)
def test_exit_codes(error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture):
    assert run_program(raising(error)) == code
    assert capsys.readouterr().err == message


def test_success_is_0_and_a_bug_keeps_its_traceback():
    assert run_program(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        run_program(raising(ZeroDivisionError()))


def test_as_user_error_gives_one_line_and_leaves_other_errors_alone():
    with pytest.raises(UserError, match=r"^/nowhere: No such file or directory$"), as_user_error(OSError):
        open("/nowhere")
    with pytest.raises(UserError, match=r"^two lines$"), as_user_error(ValueError):
        raise ValueError("two\n  lines")
    with pytest.raises(KeyError), as_user_error(OSError, ValueError):
        raise KeyError("bug")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(number: int):
    before = signal.getsignal(number)
    caught = []
    signal.signal(number, lambda *arguments: caught.append(arguments[0]))
    try:
        with StopRequest() as stop:
            assert stop.signum is None
            os.kill(os.getpid(), number)
            assert (stop.signum, caught) == (number, [])
            os.kill(os.getpid(), number)
            assert caught == [number]
    finally:
        signal.signal(number, before)


def test_a_signal_that_a_launcher_passes_on_is_the_same_request(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    before = signal.getsignal(signal.SIGTERM)
    caught = []
    signal.signal(signal.SIGTERM, lambda *arguments: caught.append(arguments[0]))
    try:
        with StopRequest(patience=5.0) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert (stop.signum, caught) == (signal.SIGTERM, [])
            now += 5.1
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_warmup_cosine():
    assert [warmup_cosine(x, 0.2) for x in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])
    assert warmup_cosine(0.0, 0.0) == 1.0
    assert warmup_cosine(1.0, 1.0) == pytest.approx(1.0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decayed_thresholds_are_what_sgd_does(momentum: float):
    raw = torch.nn.Parameter(torch.tensor([-3200.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([raw], lr=1.0, momentum=momentum, weight_decay=2e-3)
    rates = [0.1 * warmup_cosine(step / 200, 0.1) for step in range(200)]
    expected = []
    for rate in rates:
        raw.grad = torch.zeros_like(raw)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        expected.append(raw.item())
    assert list(decayed_thresholds(-3200.0, rates, 2e-3, momentum)) == pytest.approx(expected, rel=1e-9)


def test_meter_weighs_batches_by_their_size():
    meter = Meter(torch.device("cpu"))
    outputs = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    meter.add(torch.tensor(1.0), outputs, torch.tensor([0, 1, 0]))
    meter.add(torch.tensor(5.0), outputs[:1], torch.tensor([1]))
    assert meter.means() == (2.0, 0.5)
    meter.reset()
    assert meter.means() == (0.0, 0.0)


def test_pace_leaves_halts_out(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    throughput = Throughput()
    throughput.add(30)
    now = 102.0
    with throughput.paused():
        now = 110.0
    throughput.add(10)
    assert throughput.per_second() == 20.0
    throughput.reset()
    now = 111.0
    assert throughput.per_second() == 0.0


def text_of(console: Console) -> str:
    return console.file.getvalue()


def test_progress_in_a_file_is_an_occasional_line():
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    bar = ProgressBar(100, 10, console=console)
    assert bar.due
    bar.show(20, "loss 0.5")
    assert not bar.due
    bar.close()
    assert text_of(console).startswith("loss 0.5  20 %  0:0")
    assert text_of(console).endswith(" left\n")
    assert "\x1b" not in text_of(console)


def test_progress_on_a_terminal_is_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    bar = ProgressBar(100, console=console)
    bar.show(50, "loss 0.5")
    bar.close()
    assert "━" in text_of(console)
    assert "loss 0.5" in text_of(console)


def test_bars_of_the_hubs_library_come_from_the_first_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for process in ("0", "1"):
        folder = tmp_path / process
        folder.mkdir()
        datasets.Dataset.from_dict({"a": [1, 2]}).to_parquet(folder / "train.parquet")
        datasets.enable_progress_bars()  # undo the settings of other tests
        capfd.readouterr()
        monkeypatch.setenv("RANK", process)
        try:
            assert len(read_splits(str(folder), ":")["train"]) == 2
        finally:
            datasets.enable_progress_bars()
        assert bool(capfd.readouterr().err) == (process == "0")
