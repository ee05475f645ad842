"""The word spotter: a window's scores are those of a clip, a word is reported once, an error is one line."""

import dataclasses
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from str_triton.rnn.data.audio import RATE, LogMel, resample, to_int16, write_wav
from str_triton.rnn.finished_run import FinishedRun
from str_triton.rnn.listen import Detection, Listener, main
from str_triton.rnn.models import Architecture
from tests.messages import holds

WORDS = ("low", "high", "silence", "unknown")


def tone(frequency: float, seconds: float, loudness: float = 0.3) -> np.ndarray:
    time = np.arange(int(seconds * RATE)) / RATE
    return np.round(32767 * loudness * np.sin(2 * np.pi * frequency * time)).astype(np.int16)


def made_run(cell: str = "gru", pooling: str = "mean", **options: object) -> FinishedRun:
    torch.manual_seed(0)
    model = Architecture("classify", cell, 32, len(WORDS), 8, pooling=pooling, **options).build(ranks={}).eval()
    mean, std = torch.full((32,), -8.0), torch.full((32,), 4.0)
    return FinishedRun(Path("made"), {"data": "speech-commands:x", "task": "classify"}, model, WORDS, mean, std)


def tones_run() -> FinishedRun:
    """Make a FastGRNN with weights set by hand that detects energy in the lower or in the upper bands."""
    run = made_run("fastgrnn")
    rnn, classifier = run.model.rnn, run.model.classifier
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
        rnn.zeta_l0.fill_(10)
        rnn.nu_l0.fill_(-10)
        rnn.bias_gate_l0.fill_(-10)  # no memory: h equals the candidate
        rnn.weight_ih_l0[0, :8] = rnn.weight_ih_l0[1, 24:] = 0.1
        classifier.weight[0, 0] = classifier.weight[1, 1] = 40
        classifier.weight[0, 1] = classifier.weight[1, 0] = -40
        classifier.bias.copy_(torch.tensor([0.0, 0.0, 2.0, 0.0]))
    return run


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_each_window_has_the_scores_of_a_clip(cell: str, pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made_run(cell, pooling, layers=2)
    sound = torch.from_numpy((np.random.default_rng(0).normal(size=40_100) * 3000).astype(np.int16))
    seen: list[Tensor] = []
    monkeypatch.setattr(Listener, "_decide", lambda self, probabilities: seen.append(probabilities) or iter(()))
    listener = Listener(run)
    for piece in sound.split(1234):
        assert list(listener(piece)) == []
    frames = (LogMel()(sound[None])[0] - run.mean) / run.std
    windows = frames.unfold(0, 99, 10).transpose(1, 2)
    assert len(seen) == len(windows) == 16
    torch.testing.assert_close(torch.stack(seen), run.model(windows).softmax(1), rtol=0, atol=1e-5)


def detect(run: FinishedRun, sound: np.ndarray) -> list[Detection]:
    listener = Listener(run)
    return [*listener(torch.from_numpy(sound)), *listener.end()]


def test_words_are_said_once_at_their_time() -> None:
    silence = np.zeros(2 * RATE, np.int16)
    sound = np.concatenate([silence, tone(300, 0.8), silence, tone(6000, 0.8), silence, tone(300, 0.8), silence])
    found = detect(tones_run(), sound)
    assert [word for _, word, _ in found] == ["low", "high", "low"]
    for (seconds, _, probability), expected in zip(found, (2.4, 5.2, 8.0), strict=True):
        assert abs(seconds - expected) < 0.3
        assert 0.6 <= probability <= 1


def test_silence_and_unknown_are_no_words_and_neither_is_quiet() -> None:
    run, sound = tones_run(), np.concatenate([np.zeros(RATE, np.int16), tone(300, 2), np.zeros(RATE, np.int16)])
    assert [word for _, word, _ in detect(run, sound)] == ["low"]
    for name in ("silence", "unknown"):
        assert detect(dataclasses.replace(run, outputs=(name, *WORDS[1:])), sound) == []
    with torch.no_grad():  # a network that detects a word everywhere
        run.model.classifier.bias[0] = 1000
    assert detect(run, np.zeros(3 * RATE, np.int16)) == []
    assert len(detect(run, tone(300, 3))) == 1


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr("str_triton.rnn.listen.open_run", lambda folder: tones_run())
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("saved")
def test_the_program_reads_files_and_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = np.concatenate([np.zeros(RATE, np.int16), tone(300, 1), np.zeros(RATE, np.int16)])
    write_wav(tmp_path / "x.wav", sound)
    (tmp_path / "x.raw").write_bytes(sound.tobytes())
    write_wav(tmp_path / "fast.wav", to_int16(resample(sound / 32768, RATE, 44_100)), 44_100)
    outputs = []
    for source, options in (("x.wav", []), ("x.raw", ["--rate", "16000"]), ("fast.wav", [])):
        assert main(["run", *options, str(tmp_path / source)]) == 0
        outputs.append(capsys.readouterr().out)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / source).read_bytes())))
        assert main(["run", *options]) == 0
        outputs.append(capsys.readouterr().out)
    for out in outputs:
        first, last = out.splitlines()
        assert re.fullmatch(r" +1\.\d s  low  \d+%", first)
        assert re.fullmatch(r"3\.0 s of sound; a window of 1 s takes \d+ ms: real-time factor \d+\.\d{3}", last)


@pytest.mark.parametrize("seconds", [0.7, 1.0, 1.0025, 1.3])
def test_a_clip_is_judged_by_the_windows_that_it_has(seconds: float) -> None:
    (found,) = detect(tones_run(), tone(300, seconds))
    assert found.word == "low"
    assert found.seconds == pytest.approx(max(1.0, seconds) / 2, abs=0.06)
    assert detect(tones_run(), np.zeros(int(seconds * RATE), np.int16)) == []


def test_a_clip_of_one_second_has_the_scores_of_training() -> None:
    run, sound = made_run(), torch.from_numpy(tone(300, 1))
    with torch.no_grad():
        run.model.classifier.bias[0] = 3  # sure enough to be detected
        expected = run.model((LogMel()(sound[None]) - run.mean) / run.std).softmax(1)[0]
    (found,) = detect(run, sound.numpy())
    assert (found.word, found.probability) == ("low", pytest.approx(float(expected[0]), abs=1e-5))


@pytest.mark.usefixtures("saved")
def test_the_program_hears_a_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_wav(tmp_path / "x.wav", tone(300, 1))
    assert main(["run", str(tmp_path / "x.wav")]) == 0
    assert holds(capsys.readouterr().out, "low .. 1.0 s of sound; a window")
    write_wav(tmp_path / "x.wav", tone(300, 0.4))
    assert main(["run", str(tmp_path / "x.wav")]) == 0
    assert capsys.readouterr().out.endswith("\n0.4 s of sound\n")


def test_bad_input_is_one_line(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object) -> str:
        assert main([str(argument) for argument in args]) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"error: .*\n", error)
        return error

    write_wav(tmp_path / "x.wav", tone(300, 1))
    (tmp_path / "x.raw").write_bytes(bytes(100))
    assert "trained on japanese-vowels" in refused(whole_run, tmp_path / "x.wav")
    assert "no such folder" in refused(tmp_path / "none", tmp_path / "x.wav")
    assert "none.wav: No such file" in refused(whole_run, tmp_path / "none.wav")
    assert "missing: RUN" in refused()
    monkeypatch.setattr("str_triton.rnn.listen.open_run", lambda folder: made_run(bidirectional=True))
    assert "a bidirectional network needs the end" in refused("run", tmp_path / "x.wav")
    monkeypatch.setattr("str_triton.rnn.listen.open_run", lambda folder: tones_run())
    assert "--rate 12" in refused("run", tmp_path / "x.raw", "--rate", "12")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "standard input is empty" in refused("run")
