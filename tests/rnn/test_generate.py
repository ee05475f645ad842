"""Text of a language model: the most likely characters, samples with the model's probabilities, and errors."""

import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from str_triton.rnn.finished_run import FinishedRun
from str_triton.rnn.generate import generate, main
from str_triton.rnn.models import CELLS, Architecture, architecture_of, compact
from str_triton.rnn.train import to_safetensors
from str_triton.training.errors import UserError
from str_triton.training.interface import Interface

SYMBOLS = ("\ufffd", "\n", "a", "b", "c")


def text_run(cell: str = "gru") -> FinishedRun:
    torch.manual_seed(0)
    model = Architecture("lm", cell, len(SYMBOLS), len(SYMBOLS), 6, layers=2).build().eval()
    with torch.no_grad():
        model.decoder.weight.mul_(20)
        model.decoder.bias[0] = 1000  # the replacement character has the largest score
    return FinishedRun(Path("made"), {"data": "text", "task": "lm"}, model, SYMBOLS, None, None)


def written(run: FinishedRun, prompt: str, length: int, temperature: float = 1.0, seed: int = 0) -> str:
    return "".join(islice(generate(run, prompt, temperature, seed), length))


@pytest.mark.parametrize("cell", CELLS)
def test_temperature_0_takes_the_most_likely_character_of_the_whole_text(cell: str) -> None:
    run, text = text_run(cell), "abcab"
    for _ in range(20):
        scores, _ = run.model(torch.tensor([[SYMBOLS.index(c) for c in text]]))
        text += SYMBOLS[1 + int(scores[0, -1, 1:].argmax())]
    assert written(run, "abcab", 20, temperature=0) == text[5:]
    assert written(run, "abcab", 20, temperature=1e-320) == text[5:]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_characters_have_the_probabilities_of_the_model(temperature: float) -> None:
    run = text_run()
    scores, _ = run.model(torch.tensor([[2, 3]]))
    expected = (scores[0, -1, 1:] / temperature).softmax(0).tolist()
    counts = Counter(written(run, "ab", 1, temperature, seed) for seed in range(300))
    for symbol, probability in zip(SYMBOLS[1:], expected, strict=True):
        assert abs(counts[symbol] / 300 - probability) < 4 * math.sqrt(0.25 / 300)
    assert counts["\ufffd"] == 0


def test_a_seed_repeats_its_text_and_another_does_not() -> None:
    run = text_run()
    assert written(run, "a", 50, 2.0, seed=1) == written(run, "a", 50, 2.0, seed=1)
    assert written(run, "a", 50, 2.0, seed=1) != written(run, "a", 50, 2.0, seed=2)


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr("str_triton.rnn.generate.open_run", lambda folder: text_run())
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("saved")
def test_the_program_prints_the_prompt_and_so_many_characters(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--length", "30", "--temperature", "1.5", "--seed", "3"]
    assert main(["run", *options, "--prompt", "ab\x1bz"]) == 0
    out, error = capsys.readouterr()
    assert out == f"ab\\x1bz{written(text_run(), 'ab' + chr(27) + 'z', 30, 1.5, seed=3)}\n"
    assert error.count("\n") == 1
    assert "'z'" in error
    assert main(["run", *options]) == 0
    assert capsys.readouterr() == (written(text_run(), "\n", 30, 1.5, seed=3) + "\n", "")


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize(
    ("option", "value"),
    [("--length", "0"), ("--temperature", "-1"), ("--temperature", "nan"), ("--temperature", "inf"), ("--seed", "-1")],
)
def test_bad_options_are_one_line(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", f"{option}={value}"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert f"{option} {value}" in error.replace("-1.0", "-1")
    assert error.count("\n") == 1


def test_a_classifier_writes_no_text() -> None:
    model = Architecture("classify", "gru", 3, 2, 4).build().eval()
    run = FinishedRun(Path("made"), {"data": "har:x", "task": "classify"}, model, ("x", "y"), None, None)
    with pytest.raises(UserError, match=r"^made: .*har:x.*--task lm$"):
        generate(run, "a", 1.0, 0)


def test_an_output_that_is_not_one_character_is_refused(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((whole_run / "config.json").read_text())
    config |= {"task": "lm", "data": "text", "bidirectional": False, "hidden_size": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    architecture = architecture_of(config, len(SYMBOLS), len(SYMBOLS))
    model = compact(architecture.build())
    for symbols in (SYMBOLS, (*SYMBOLS[:-1], "cd"), (*SYMBOLS[:-1], "")):
        interface = Interface(symbols)
        (tmp_path / "interface.json").write_text(interface.text())
        (tmp_path / "model.safetensors").write_bytes(to_safetensors(model, architecture, interface))
        assert main([str(tmp_path), "--length", "1"]) == (0 if symbols == SYMBOLS else 2)
        assert (f"{symbols[-1]!r} is not one character" in capsys.readouterr().err) == (symbols != SYMBOLS)
