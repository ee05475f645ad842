"""The C export: no warning or sanitizer report, and the network's scores to the last digits."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from str_triton import LowRankGRU, LowRankRNN, LowRankWeight, deploy
from str_triton.deploy.c_export import Sizes, demo_template, spotter_template, template
from str_triton.deploy.c_export.export import identifier
from str_triton.deploy.c_export.stored import StoredMatrix, StoredVector, quantize
from str_triton.deploy.c_export.text import comment
from str_triton.deploy.recurrent_classifier import RecurrentClassifier
from tests.deploy.c_program import COMPILER, SANITIZE, compiled, scores
from tests.deploy.recurrent_networks import CASES, HIDDEN, INPUTS, OUTPUTS, SUMMED, Case, Classifier, projected
from tests.nn.recurrent.test_streaming import cut

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


def exported(case: Case, folder: Path, weights: str = "float32", **options: object) -> Sizes:
    return deploy.export_c(case.model, folder, weights=weights, mean=case.mean, std=case.std, **options)


def sequences(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.normal(size=(length, INPUTS)).astype(np.float32) * 2 for length in lengths]


def torch_scores(case: Case, model: Classifier | RecurrentClassifier, frames: list[np.ndarray]) -> np.ndarray:
    dtype = next(model.parameters()).dtype

    def score(part: np.ndarray) -> Tensor:
        x = case.standardised(torch.from_numpy(part).to(dtype))
        return model(x[None] if model.rnn.batch_first else x[:, None])[0]

    with torch.no_grad():
        return torch.stack([score(part) for part in frames]).numpy()


def with_stored_weights(model: Classifier) -> Classifier:
    """Return a float64 copy of the network with the int8 weights of the C program."""
    model = copy.deepcopy(model)
    classifier = RecurrentClassifier.of(model)
    model.rnn = rnn = classifier.rnn
    model.double()
    with torch.no_grad():
        for name, weight in [*rnn.factors().items(), *model.named_parameters()]:
            if isinstance(weight, LowRankWeight):
                stored = StoredMatrix.of(weight, int8=True)
                weight.u.copy_(torch.from_numpy(stored.rows.astype(np.float64) * stored.scale))
                weight.v.copy_(torch.from_numpy(stored.inner.astype(np.float64).T))
            elif weight.dim() == 1 and name.startswith("head"):
                weight.copy_(rounded(weight))
            elif weight.dim() == 2 and not name.endswith((".u", ".v")):
                weight.copy_(torch.from_numpy(StoredMatrix.of(weight, int8=True).weight()))
    for suffix in (suffix for layer in range(rnn.num_layers) for suffix in rnn._suffixes(layer)):
        if not rnn.bias:
            continue
        first, second = (getattr(rnn, f"{name}_{suffix}").data for name in rnn.biases)
        # The C program stores sums of biases: put them into the first bias, and zeros into the second.
        shared = SUMMED[rnn.cell] * HIDDEN
        first[:shared] += second[:shared]
        second[:shared] = 0
        both = rounded(torch.cat([first, second[shared:]]))
        first.copy_(both[: len(first)])
        second[shared:] = both[len(first) :]
    return model


def rounded(bias: Tensor) -> Tensor:
    stored = StoredVector.of(bias.float().numpy(), int8=True)
    return torch.from_numpy(stored.values * float(stored.scale))


@needs_compiler
@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_the_program_gives_torchs_scores(case: str, weights: str, tmp_path: Path) -> None:
    run, frames = CASES[case], sequences(1, 29, 100)
    if isinstance(run.model.rnn, LowRankRNN):
        assert all(matrix.max_rank == 3 for matrix in run.model.rnn.factors().values())
        assert bool(run.model.rnn.factors()) == ("low-rank" in case)
    exported(run, tmp_path, weights)
    logits, best, _ = scores(compiled(tmp_path, *SANITIZE), frames, OUTPUTS)
    model = run.model if weights == "float32" else with_stored_weights(run.model)
    np.testing.assert_allclose(logits, torch_scores(run, model, frames), rtol=0, atol=1e-5)
    assert (best == logits.argmax(1)).all()
    # int8 changes a weight by at most 1/254 of the largest weight, and scores of about 1 by a few hundredths.
    exact = torch_scores(run, run.model, frames)
    np.testing.assert_allclose(logits, exact, rtol=0, atol=1e-5 if weights == "float32" else 0.05)


@needs_compiler
@pytest.mark.parametrize(("weights", "bound"), [("float32", 1e-5), ("int8", 0.05)])
@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True, "pooling": "mean"}], ids=str)
def test_an_lstm_with_projections(options: dict[str, Any], weights: str, bound: float, tmp_path: Path) -> None:
    run, frames = projected(**options), sequences(1, 29, 100)
    exported(run, tmp_path, weights)
    logits, _, _ = scores(compiled(tmp_path, *SANITIZE), frames, OUTPUTS)
    np.testing.assert_allclose(logits, torch_scores(run, run.model, frames), rtol=0, atol=bound)
    assert type(run.model.rnn) is nn.LSTM


@needs_compiler
def test_a_sequence_of_ten_thousand_frames_loses_nothing(tmp_path: Path) -> None:
    run, frames = CASES["lstm low-rank, mean"], sequences(10_000)
    exported(run, tmp_path)
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
    sizes = exported(run, tmp_path / "My Model-1", weights)
    source = (tmp_path / "My Model-1" / "my_model_1.c").read_text()
    arrays = re.findall(r"static const (weight|float) \w+\[(\d+)\]", source)
    matrices = sum(int(count) for kind, count in arrays if kind == "weight")
    rnn = RecurrentClassifier.of(run.model).rnn
    blocks = len(rnn.biases) * rnn.gates - SUMMED[rnn.cell]
    biases = blocks * HIDDEN * rnn.num_layers * (1 + rnn.bidirectional) + OUTPUTS
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


class Other(Classifier):
    """A classifier whose scores are not those of the last states or of the mean output."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class WithNorm(Classifier):
    """A classifier with a layer that has no C."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__(rnn)
        self.norm = nn.LayerNorm(HIDDEN)


def not_finite() -> nn.Module:
    model = Classifier(LowRankGRU(INPUTS, HIDDEN))
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Classifier(LowRankGRU(INPUTS, HIDDEN, 2, bidirectional=True)), "Classifier .*2 bidirectional"),
        (not_finite(), "Classifier .*NaN or infinite"),
        (nn.Linear(3, 4), "Linear .*0 recurrent"),
        (nn.GRU(3, 4), "GRU has nothing beside"),
        (Classifier(nn.RNN(INPUTS, HIDDEN)), "rnn is an nn.RNN"),
        (WithNorm(nn.GRU(INPUTS, HIDDEN)), r"norm \(LayerNorm\)"),
        (Other(nn.GRU(INPUTS, HIDDEN)), "Other's scores are neither"),
    ],
)
def test_a_module_without_c_is_refused_by_name(model: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        deploy.export_c(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int4"}, "float32, int8.* 'int4'"),
        ({"outputs": "abc"}, "3 names .*4 classes"),
        ({"mean": torch.zeros(INPUTS)}, "mean and std"),
        ({"mean": [0.0] * INPUTS, "std": [1.0] * INPUTS}, "mean .*tensor.* list"),
        ({"mean": torch.zeros(3), "std": torch.ones(INPUTS)}, r"mean .*\[5\].* \[3\]"),
        ({"mean": torch.zeros(INPUTS), "std": torch.zeros(INPUTS)}, "std must be positive"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        deploy.export_c(CASES["nn.LSTM"].model, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_a_layer_is_compacted_for_the_program(tmp_path: Path) -> None:
    """A trained layer with its thresholds gives the same program as its compact form; the module does not change."""
    torch.manual_seed(0)
    model = Classifier(LowRankGRU(INPUTS, HIDDEN, dropout=0.5, num_layers=2)).train()
    cut(model.rnn, 2)
    before = copy.deepcopy(model.state_dict())
    deploy.export_c(model, tmp_path / "x")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    frames = sequences(30)
    logits, _, _ = scores(compiled(tmp_path / "x"), frames, OUTPUTS)
    np.testing.assert_allclose(logits, torch_scores(Case(model, None, None), model.eval(), frames), rtol=0, atol=1e-5)
    assert "MAX_RANK = 2" in (tmp_path / "x" / "x.c").read_text()


def test_a_network_without_a_spotter_refuses_the_folder_of_one_with_a_spotter(tmp_path: Path) -> None:
    """The old spotter would compile with the new network."""
    exported(CASES["nn.LSTM"], tmp_path / "x")
    before = (tmp_path / "x" / "x.c").read_text()
    (tmp_path / "x" / "x_spotter.c").write_text("")
    with pytest.raises(FileExistsError, match=r"x_spotter\.c.*remove"):
        exported(CASES["nn.GRU, no bias"], tmp_path / "x")
    assert (tmp_path / "x" / "x.c").read_text() == before


def test_no_header_of_ours_has_the_name_of_one_that_the_programs_include() -> None:
    files = (template.HEADER, template.SOURCE, spotter_template.HEADER, spotter_template.SOURCE, demo_template.DEMO)
    included = {name for file in files for name in re.findall(r"#include <(\w+)\.h>", file.template)}
    assert {"math", "stdio"} <= included
    assert {identifier(Path(name)) for name in included} == {f"rnn_{name}" for name in included}


def test_a_comment_has_no_trigraphs_and_does_not_end_early() -> None:
    assert comment("a ???/ /*/ \u00e9?") == "a ? ? ?/ / * / _?"
