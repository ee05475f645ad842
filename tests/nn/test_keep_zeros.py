"""sparsify(keep_zeros=True): a pruned model is fine-tuned, no zero is revived and no survivor lost."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from str_triton import SparsityController, Target, count, densify, parameter_groups, sparsify
from str_triton.nn import thresholded_weights


class Everything(nn.Module):
    """Layers that become ours, and ones that keep their forward; the decoder has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.gru = nn.GRU(8, 8, bidirectional=True)
        self.down = nn.Linear(16, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.decoder = nn.Linear(8, 9)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.up(self.conv(self.embedding(tokens).permute(1, 2, 0))).permute(2, 0, 1)
        x = self.down(self.gru(x)[0])
        return self.decoder(x + self.attention(x, x, x)[0])


def pruned(model: nn.Module, share: float = 0.7) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.masked_fill_(torch.rand_like(parameter) < share, 0.0)
    return model


def zeros(model: nn.Module) -> dict[str, Tensor]:
    """Return, for each weight of a plain model, where it is zero."""
    return {name: value == 0 for name, value in model.named_parameters() if value.dim() > 1}


def train(model: nn.Module, optimizer: Optimizer, steps: int = 15) -> None:
    for step in range(steps):
        tokens = torch.randint(9, (6, 3), generator=torch.Generator().manual_seed(step))
        torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS = {
    "sgd": lambda groups: SGD(groups, lr=0.3, momentum=0.9, nesterov=True),
    "adam": lambda groups: Adam(groups, lr=1e-2, amsgrad=True),
    "adamw": lambda groups: AdamW(groups, lr=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_zero_is_revived_and_no_survivor_lost(optimizer, dtype):
    torch.manual_seed(0)
    model = pruned(Everything()).to(dtype)
    before, tokens = zeros(model), torch.randint(9, (5, 2))
    start, weights = model(tokens), copy.deepcopy(model.state_dict())
    sparsify(model, keep_zeros=True)
    assert torch.equal(model(tokens), start)
    train(model, OPTIMIZERS[optimizer](parameter_groups(model, weight_decay=0.1)))
    sparse = model(tokens)
    densify(model)
    after = zeros(model)
    if dtype == torch.float32:
        assert torch.equal(model(tokens), sparse)
        assert all(torch.equal(after[name], kept) for name, kept in before.items())
    assert not any((kept & ~after[name]).any() for name, kept in before.items())
    moved = [
        (value != weights[name])[~before[name]].float().mean()
        for name, value in model.named_parameters()
        if name in before
    ]
    assert min(moved) > 0.5


@pytest.mark.parametrize("stale", ["momentum", "muon"])
def test_zeros_stay_whatever_the_optimizer_does(stale):
    """Momentum from before the pruning, and steps that do not go weight by weight."""
    torch.manual_seed(0)
    model = Everything()
    if stale == "momentum":
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        train(model, optimizer, steps=2)
    before = zeros(pruned(model))
    sparsify(model, keep_zeros=True)
    if stale == "muon":
        optimizer = Muon([weight.dense for weight in thresholded_weights(model) if weight.dense.dim() == 2][1:], lr=0.1)
    train(model, optimizer, steps=3)
    raised = sum(int((weight.dense[weight.raw.isinf()] != 0).sum()) for weight in thresholded_weights(model))
    assert raised > 100
    after = zeros(densify(model))
    assert all(torch.equal(after[name], kept) for name, kept in before.items())


def test_a_survivor_that_lands_on_zero_goes_on():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 1.0]]))
    model = sparsify(model, keep_zeros=True)
    optimizer = SGD([model.weight], lr=1.0, momentum=0.5)
    seen = []
    for _ in range(3):
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(densify(copy.deepcopy(model)).weight.tolist()[0])
    assert seen == [[0.0, 0.0], [0.0, -0.5], [0.0, -1.75]]


def test_the_zeros_are_saved_and_come_back():
    source = sparsify(pruned(Everything()), keep_zeros=True)
    with pytest.warns(UserWarning, match="finds no zeros"):
        other = sparsify(Everything(), keep_zeros=True)
    other.load_state_dict(source.state_dict())
    train(other, SGD(parameter_groups(other, 0.0), lr=0.1))
    for first, second in zip(thresholded_weights(source), thresholded_weights(other), strict=True):
        assert torch.equal(first.sparse == 0, second.sparse == 0)


def test_what_it_excludes(tmp_path):
    with pytest.raises(ValueError, match="leave them out"):
        sparsify(pruned(nn.Sequential(nn.Linear(4, 4))), keep_zeros=True, granularity="filter")
    model = sparsify(pruned(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), keep_zeros=True)
    with pytest.raises(ValueError, match=r"thresholds of '0' are infinite, .*gradient='masked'"):
        SparsityController(model, Target(sparsity=0.9))
    budget = count(model, torch.zeros(1, 4))
    budget.to_json(tmp_path / "budget.json")
    assert type(budget).from_json(tmp_path / "budget.json") == budget
    assert [row.threshold for row in budget.rows] == [None, None]


def test_the_way_on_from_the_present_zeros():
    """The way that a controller's refusal names: zeros stay, and more follow."""
    torch.manual_seed(0)
    model = pruned(Everything())
    before = zeros(model)
    controller = SparsityController(sparsify(model, gradient="masked"), Target(sparsity=0.9), interval=2)
    optimizer = SGD(parameter_groups(model, weight_decay=0.1), lr=0.1, momentum=0.9)
    for step in range(8):
        train(model, optimizer, steps=1)
        controller.step((step + 1) / 8)
    after = zeros(densify(model))
    assert all(after[name][kept].all() for name, kept in before.items())
    assert count(model, torch.zeros(2, 1, dtype=torch.long)).sparsity == pytest.approx(0.9, abs=1e-3)
