from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from str_triton.rnn.models import CELLS, Architecture, LanguageModel, SequenceClassifier, compact, copy_weights
from str_triton.rnn.recipes import Config


def architecture(task: str = "classify", cell: str = "gru", **options: object) -> Architecture:
    return Architecture(task=task, cell=cell, inputs=5, outputs=7, hidden_size=6, **options)


def test_the_programs_offer_every_cell():
    assert get_args(get_type_hints(Config)["cell"]) == tuple(CELLS)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_does_not_change_the_scores(cell: str, bidirectional: bool):
    model = architecture(cell=cell, bidirectional=bidirectional, layers=2, dropout=0.5).build().eval()
    x, lengths = torch.randn(4, 9, 5), torch.tensor([3, 9, 1, 6])
    scores = model(x, lengths)
    assert scores.shape == (4, 7)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(scores[row], model(x[row : row + 1, :length])[0], rtol=1e-4, atol=1e-6)


def test_scores_come_from_the_last_states_of_both_directions():
    """Compare with the last states of nn.GRU's last layer."""
    model = architecture(bidirectional=True, layers=2).build(factorize="none")
    gru = nn.GRU(5, 6, 2, batch_first=True, bidirectional=True)
    gru.load_state_dict(model.rnn.state_dict())
    x = torch.randn(3, 8, 5)
    outputs, _ = gru(x)
    last = torch.cat([outputs[:, -1, :6], outputs[:, 0, 6:]], dim=1)
    torch.testing.assert_close(model(x), model.classifier(last))


@pytest.mark.parametrize("cell", CELLS)
def test_a_text_in_pieces_gives_the_scores_of_the_whole(cell: str):
    model = architecture("lm", cell, dropout=0.5).build().eval()
    assert isinstance(model, LanguageModel)
    characters = torch.randint(7, (3, 10))
    whole, _ = model(characters)
    assert whole.shape == (3, 10, 7)
    first, state = model(characters[:, :4])
    second, _ = model(characters[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    changed = characters.clone()
    changed[:, 6:] = 0
    torch.testing.assert_close(model(changed)[0][:, :6], whole[:, :6])  # the following characters have no influence


def test_dropout_is_in_training_alone():
    model = architecture(dropout=0.5).build()
    x = torch.randn(4, 9, 5)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("cell", CELLS)
def test_compact_computes_the_same_and_leaves_the_model_alone(cell: str):
    model = architecture(cell=cell).build().eval()
    with torch.no_grad():
        for factor in model.rnn.factors().values():
            sizes = factor.singular_values().sort().values
            factor.raw_threshold.fill_(((sizes[-2] + sizes[-3]) / 2).log())
    x = torch.randn(4, 9, 5)
    small = compact(model)
    assert set(small.rnn.ranks().values()) == {2}
    assert isinstance(small, SequenceClassifier)
    torch.testing.assert_close(small(x), model(x))
    assert all(factor.raw_threshold is not None for factor in model.rnn.factors().values())
    rebuilt = architecture(cell=cell).build(ranks=small.rnn.ranks()).eval()
    rebuilt.load_state_dict(small.state_dict())
    assert torch.equal(rebuilt(x), small(x))


def test_weights_of_a_dense_network_are_copied_as_their_largest_components():
    dense = architecture().build(factorize="none").eval()
    full, cut = architecture().build().eval(), architecture().build(ranks={"weight_hh_l0": 2}).eval()
    copy_weights(dense, full)
    copy_weights(dense, cut)
    x = torch.randn(4, 9, 5)
    torch.testing.assert_close(full(x), dense(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(cut.rnn.weight_ih_l0, dense.rnn.weight_ih_l0)
    assert torch.equal(cut.classifier.weight, dense.classifier.weight)
    u, sigma, vh = torch.linalg.svd(dense.rnn.weight_hh_l0.detach(), full_matrices=False)
    torch.testing.assert_close(cut.rnn.weight_hh_l0.weight().detach(), (u[:, :2] * sigma[:2]) @ vh[:2])


def test_mean_pooling_leaves_padding_out():
    torch.manual_seed(0)
    model = Architecture("classify", "gru", 3, 4, 5, bidirectional=True, pooling="mean").build().eval()
    x, lengths = torch.randn(3, 6, 3), torch.tensor([6, 2, 4])
    for row, length in enumerate(lengths):
        alone = model(x[row : row + 1, :length])
        outputs = model.rnn(x[row : row + 1, :length])[0]
        torch.testing.assert_close(alone, model.classifier(outputs.mean(1)))
        torch.testing.assert_close(model(x, lengths)[row : row + 1], alone)
