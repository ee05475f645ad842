"""The C export: no warning or sanitizer report, and the network's scores to the last digits."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from str_triton import LowRankWeight
from str_triton.rnn.c_export import write_c
from str_triton.rnn.c_export.stored import StoredMatrix, StoredVector, quantize
from str_triton.rnn.finished_run import FinishedRun
from str_triton.rnn.models import Architecture, SequenceClassifier, compact
from tests.nn.recurrent.test_streaming import cut
from tests.rnn.c_program import COMPILER, SANITIZE, compiled, scores

INPUTS, OUTPUTS, HIDDEN = 5, 4, 12
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


def made_run(cell: str, *, standardised: bool = True, rank: int | None = 3, **options: object) -> FinishedRun:
    """Make a finished run with a random network; `rank` components of each matrix survive (None: dense)."""
    torch.manual_seed(0)
    model = Architecture("classify", cell, INPUTS, OUTPUTS, HIDDEN, **options).build(
        factorize="none" if rank is None else "both"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.uniform_(-1, 1)
            elif name.endswith(".u") or (parameter.dim() == 2 and not name.endswith(".v")):
                parameter.mul_(2)
    cut(model.rnn, rank or 1)
    mean, std = (torch.randn(INPUTS), torch.rand(INPUTS) + 0.5) if standardised else (None, None)
    names = tuple(f"class {i}" for i in range(OUTPUTS))
    return FinishedRun(Path("made"), {"data": "made */ up"}, compact(model).eval(), names, mean, std)


def sequences(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.normal(size=(length, INPUTS)).astype(np.float32) * 2 for length in lengths]


def torch_scores(run: FinishedRun, model: SequenceClassifier, frames: list[np.ndarray]) -> np.ndarray:
    def score(part: np.ndarray) -> Tensor:
        x = torch.from_numpy(part).to(next(model.parameters()).dtype)
        return model(x[None] if run.mean is None else ((x - run.mean) / run.std)[None])[0]

    with torch.no_grad():
        return torch.stack([score(part) for part in frames]).numpy()


def with_stored_weights(model: SequenceClassifier) -> SequenceClassifier:
    """Return a float64 copy of the network with the int8 weights of the C program."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, weight in [*model.rnn.factors().items(), *model.named_parameters()]:
            if isinstance(weight, LowRankWeight):
                stored = StoredMatrix.of(weight, int8=True)
                weight.u.copy_(torch.from_numpy(stored.rows.astype(np.float64) * stored.scale))
                weight.v.copy_(torch.from_numpy(stored.inner.astype(np.float64).T))
            elif weight.dim() == 1 and name.startswith("classifier"):
                weight.copy_(rounded(weight))
            elif weight.dim() == 2 and not name.endswith((".u", ".v")):
                weight.copy_(torch.from_numpy(StoredMatrix.of(weight, int8=True).weight()))
    rnn = model.rnn
    for suffix in (suffix for layer in range(rnn.num_layers) for suffix in rnn._suffixes(layer)):
        first, second = (getattr(rnn, f"{name}_{suffix}").data for name in rnn.biases)
        # The C program stores sums of biases: put them into the first bias, and zeros into the second.
        shared = {"gru": 2 * HIDDEN, "lstm": 4 * HIDDEN, "fastgrnn": 0}[rnn.cell]
        first[:shared] += second[:shared]
        second[:shared] = 0
        both = rounded(torch.cat([first, second[shared:]]))
        first.copy_(both[: len(first)])
        second[shared:] = both[len(first) :]
    return model


def rounded(bias: Tensor) -> Tensor:
    stored = StoredVector.of(bias.float().numpy(), int8=True)
    return torch.from_numpy(stored.values * float(stored.scale))


CASES = {
    "gru low-rank": made_run("gru", layers=2),
    "lstm low-rank, mean": made_run("lstm", layers=2, pooling="mean"),
    "fastgrnn low-rank": made_run("fastgrnn", layers=2),
    "gru dense, bidirectional, mean": made_run("gru", rank=None, bidirectional=True, pooling="mean"),
    "lstm dense": made_run("lstm", rank=None, standardised=False),
    "fastgrnn dense": made_run("fastgrnn", rank=None),
    "gru low-rank, bidirectional": made_run("gru", bidirectional=True),
}


@needs_compiler
@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_the_program_gives_torchs_scores(case: str, weights: str, tmp_path: Path) -> None:
    run, frames = CASES[case], sequences(1, 29, 100)
    assert all(matrix.max_rank == 3 for matrix in run.model.rnn.factors().values())
    assert bool(run.model.rnn.factors()) == ("low-rank" in case)
    write_c(run, tmp_path, weights=weights)
    logits, best, _ = scores(compiled(tmp_path, *SANITIZE), frames, OUTPUTS)
    model = run.model if weights == "float32" else with_stored_weights(run.model)
    np.testing.assert_allclose(logits, torch_scores(run, model, frames), rtol=0, atol=1e-5)
    assert (best == logits.argmax(1)).all()
    # int8 changes a weight by at most 1/254 of the largest weight, and scores of about 1 by a few hundredths.
    exact = torch_scores(run, run.model, frames)
    np.testing.assert_allclose(logits, exact, rtol=0, atol=1e-5 if weights == "float32" else 0.05)


@needs_compiler
def test_a_sequence_of_ten_thousand_frames_loses_nothing(tmp_path: Path) -> None:
    run, frames = CASES["lstm low-rank, mean"], sequences(10_000)
    write_c(run, tmp_path)
    logits, _, _ = scores(compiled(tmp_path, "-O2", longest=10_000), frames, OUTPUTS)
    np.testing.assert_allclose(logits, torch_scores(run, copy.deepcopy(run.model).double(), frames), rtol=0, atol=1e-5)


def test_int8_is_off_by_half_a_step_at_most_and_takes_a_row_of_zeros() -> None:
    rows = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
    rows[2] = 0
    rounded_rows, scale = quantize(rows)
    assert rounded_rows.dtype == np.int8
    assert (np.abs(rounded_rows).max(1) == [127, 127, 0, 127, 127, 127]).all()
    assert (np.abs(rounded_rows * scale[:, None] - rows) <= np.abs(rows).max(1, keepdims=True) / 254 + 1e-6).all()


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_the_sizes_are_those_of_the_arrays(case: str, weights: str, tmp_path: Path) -> None:
    run = CASES[case]
    sizes = write_c(run, tmp_path / "My Model-1", weights=weights)
    source = (tmp_path / "My Model-1" / "my_model_1.c").read_text()
    arrays = re.findall(r"static const (weight|float) \w+\[(\d+)\]", source)
    matrices = sum(int(count) for kind, count in arrays if kind == "weight")
    biases = {"gru": 4, "lstm": 4, "fastgrnn": 2}[run.model.rnn.cell] * HIDDEN * len(run.model.rnn._suffixes(0))
    biases = biases * run.model.rnn.num_layers + OUTPUTS
    assert matrices == sum(own.numel() for own in run.model.parameters() if own.dim() == 2) + biases
    assert sizes.weights == matrices * (1 if weights == "int8" else 4)
    assert 4 * sum(int(count) for kind, count in arrays if kind == "float") < sizes.tables < sizes.flash
    header = (tmp_path / "My Model-1" / "my_model_1.h").read_text()
    assert ("not standardised" in header) == (run.mean is not None)
    assert ("After both passes" in header) == run.model.rnn.bidirectional
    fields = re.findall(r"^    (?:float|uint32_t) \w+\[(\d+)\];", header, re.M)
    assert sizes.state == 4 * sum(map(int, fields))
    assert f"{sizes.flash:,} bytes" in str(sizes)
    assert max(map(len, source.splitlines())) <= 120


def test_what_has_no_c_is_refused(tmp_path: Path) -> None:
    model = Architecture("lm", "gru", 5, 5, 4).build().eval()
    text = FinishedRun(Path("made"), {"data": "text"}, compact(model), tuple("abcde"), None, None)
    with pytest.raises(ValueError, match="made is a language model"):
        write_c(text, tmp_path)
    with pytest.raises(ValueError, match="2 bidirectional layers"):
        write_c(made_run("gru", layers=2, bidirectional=True), tmp_path)
    with pytest.raises(ValueError, match="weights must be one of float32, int8, got 'int4'"):
        write_c(made_run("gru"), tmp_path, weights="int4")
    broken = made_run("gru")
    with torch.no_grad():
        broken.model.classifier.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        write_c(broken, tmp_path)
    assert list(tmp_path.iterdir()) == []
