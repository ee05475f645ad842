"""Batch norm's recomputed statistics: against the definition, and what must not change."""

import copy

import pytest
import torch
from torch import Tensor, nn

from str_triton import SparsityController, Target, refresh_batch_norm, sparsify


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 2), nn.Softmax(1)
    )


def inputs(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 3, 6, 6, generator=generator) for _ in range(count)]


def test_the_statistics_are_the_means_over_the_batches():
    model, batches = network(), inputs()
    model[1].momentum, model[1].num_batches_tracked = 0.3, torch.tensor(7)
    refresh_batch_norm(model, batches)
    hidden = [model[0](batch).double() for batch in batches]
    mean = torch.stack([each.mean((0, 2, 3)) for each in hidden]).mean(0)
    variance = torch.stack([each.var((0, 2, 3)) for each in hidden]).mean(0)
    torch.testing.assert_close(model[1].running_mean.double(), mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model[1].running_var.double(), variance, atol=1e-6, rtol=1e-5)
    assert model[1].momentum == 0.3
    assert model[1].num_batches_tracked == 7


def test_a_second_norm_sees_what_the_first_one_normalizes():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    refresh_batch_norm(model, [torch.tensor([[0.0, 10.0], [4.0, 30.0]])])
    torch.testing.assert_close(model[1].running_mean, torch.zeros(2))
    torch.testing.assert_close(model[1].running_var, torch.full((2,), 2.0), atol=1e-4, rtol=1e-4)


def test_modes_weights_and_random_numbers_stay():
    model = network()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.named_parameters()}
    state = torch.get_rng_state()
    refresh_batch_norm(model, inputs())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, "label"), lambda x: [x], lambda x: {"input": x}])
def test_kinds_of_batches(wrap):
    model, same = network(), network()
    same.load_state_dict(model.state_dict())
    refresh_batch_norm(model, inputs())
    refresh_batch_norm(same, (wrap(batch) for batch in inputs()))
    assert torch.equal(model[1].running_var, same[1].running_var)


def test_an_error_leaves_everything_as_it_was():
    model = network()
    model(inputs()[0])
    before, training = copy.deepcopy(model.state_dict()), model.training
    with pytest.raises(ValueError, match="empty"):
        refresh_batch_norm(model, [])
    with pytest.raises(RuntimeError):
        refresh_batch_norm(model, [inputs()[0], torch.zeros(5, 2, 6, 6)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training == training
    assert model[1].momentum == 0.1


def test_norms_without_running_statistics_need_no_batch():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    refresh_batch_norm(model, [])


def test_training_goes_on_as_without_it():
    """Also inside exact(), where the thresholds are others than those of training."""
    weights = []
    for refreshing in (False, True):
        torch.manual_seed(0)
        model = sparsify(network())
        controller = SparsityController(model, Target(sparsity=0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step, batch in enumerate(inputs(8)):
            model(batch).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            controller.step((step + 1) / 8)
            if refreshing:
                with controller.exact():
                    refresh_batch_norm(model, inputs(2))
        weights.append([value.detach().clone() for value in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))
