"""The controllers under DistributedDataParallel, which may wrap the model before or after the controller is made."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from str_triton import (
    LowRankLinear,
    RankController,
    RankTarget,
    SparsityController,
    Target,
    count,
    count_ranks,
    parameter_groups,
    sparsify,
)
from tests.distributed.checks import Check, outcomes

INPUT = torch.randn(4, 12, generator=torch.Generator().manual_seed(2))


def sparse_network() -> nn.Module:
    torch.manual_seed(1)
    encoder = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True)
    return sparsify(nn.Sequential(nn.Linear(12, 12), encoder, nn.Linear(12, 3)))


def low_rank_network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(LowRankLinear(12, 20), nn.ReLU(), LowRankLinear(20, 3))


def train(
    model: nn.Module, control: Callable[[nn.Module], SparsityController | RankController], wrap_first: bool, **options
) -> nn.Module:
    """Train for 12 steps, each process on data of its own."""
    if wrap_first:
        network = DistributedDataParallel(model, **options)
        controller = control(model)
    else:
        controller = control(model)
        network = DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=1e-3), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(distributed.get_rank())
    for step in range(12):
        network(torch.randn(4, 12, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step((step + 1) / 12)
    return model


def values(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def equal_everywhere(tensor: Tensor) -> bool:
    first = tensor.clone()
    distributed.broadcast(first, 0)
    return torch.equal(first, tensor)


def check_sparsity(distribution: str, **options: bool) -> None:
    def control(model: nn.Module) -> SparsityController:
        return SparsityController(model, Target(sparsity=0.8), distribution=distribution, interval=3)

    models = [train(sparse_network(), control, wrap_first, **options) for wrap_first in (True, False)]
    assert count(models[0], INPUT).nonzeros == round(0.2 * count(models[0], INPUT).params)
    assert equal_everywhere(values(models[0]))
    assert torch.equal(*map(values, models))


def check_rank(distribution: str) -> None:
    """Once the ranks are settled, no threshold learns."""

    def control(model: nn.Module) -> RankController:
        return RankController(model, RankTarget(total_rank=6), distribution=distribution, interval=2)

    models = [train(low_rank_network(), control, wrap_first) for wrap_first in (True, False)]
    assert count_ranks(models[0]).total_rank == 6
    assert equal_everywhere(values(models[0]))
    assert torch.equal(*map(values, models))


def checks() -> dict[str, Check]:
    return {
        "fixed": lambda *_: check_sparsity("fixed"),
        "fixed, gradient_as_bucket_view": lambda *_: check_sparsity("fixed", gradient_as_bucket_view=True),
        "fixed, static_graph": lambda *_: check_sparsity("fixed", static_graph=True),
        "learned": lambda *_: check_sparsity("learned"),
        "rank, relative": lambda *_: check_rank("relative"),
        "rank, fixed": lambda *_: check_rank("fixed"),
        "rank, learned": lambda *_: check_rank("learned"),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return outcomes(checks, tmp_path_factory.mktemp("job"), size=2)


@pytest.mark.parametrize("name", checks())
def test_the_model_may_be_wrapped_before_the_controller_is_made(name: str, found: dict[str, str]) -> None:
    if found[name]:
        pytest.fail(found[name], pytrace=False)
