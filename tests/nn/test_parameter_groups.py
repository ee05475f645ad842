"""Every trainable parameter in exactly one group: by module type, identity and dimensions, never by name."""

import pytest
import torch
from torch import nn

from str_triton import LowRankLinear, RankController, RankTarget, parameter_groups, sparsify
from str_triton.nn import Control, thresholded_weights


class Misnamed(nn.Module):
    """Names that say the opposite of what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Linear(4, 4)
        self.bn_raw_threshold = nn.Linear(4, 4, bias=False)
        self.weight_conv = nn.LayerNorm((3, 4))
        self.raw_threshold = nn.Parameter(torch.zeros(2, 2))
        self.bias = nn.Parameter(torch.zeros(5, 5))
        self.scale = nn.Parameter(torch.tensor(1.0))


def names_by_group(model: nn.Module, groups: list[dict]) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def decays(groups: list[dict]) -> dict[str, float]:
    return {group["name"]: group["weight_decay"] for group in groups}


def test_types_and_dimensions_decide_and_names_do_not():
    model = sparsify(Misnamed())
    assert names_by_group(model, parameter_groups(model, 1e-4)) == {
        "weights": {"norm.weight", "bn_raw_threshold.weight", "raw_threshold", "bias"},
        "thresholds": {"norm.raw_threshold", "bn_raw_threshold.raw_threshold"},
        "norms": {"norm.bias", "weight_conv.weight", "weight_conv.bias", "scale"},
    }


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.LayerNorm(4),
        nn.LayerNorm((2, 3, 4)),
        nn.RMSNorm((3, 4)),
        nn.GroupNorm(2, 4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_norms(norm):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), norm)
    groups = parameter_groups(model, 1e-4, norm_weight_decay=1e-6)
    assert names_by_group(model, groups) == {
        "weights": {"0.weight"},
        "norms": {f"1.{name}" for name, _ in norm.named_parameters()},
    }
    assert decays(groups) == {"weights": 1e-4, "norms": 1e-6}
    assert parameter_groups(model, 1e-4)[1]["weight_decay"] == 0.0


@pytest.mark.parametrize("granularity", ["layer", "filter", "weight", "global"])
def test_every_trainable_parameter_once(granularity):
    model = nn.Sequential(nn.Embedding(9, 8), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 9), nn.LSTM(9, 3))
    model[2].weight = model[0].weight
    sparsify(model.append(model[2]), granularity=granularity)
    groups = parameter_groups(model, 1e-4)
    everything = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(everything) == len(set(everything))
    assert set(everything) == {id(parameter) for parameter in model.parameters()}
    thresholds = next(group for group in groups if group["name"] == "thresholds")["params"]
    assert {id(raw) for raw in thresholds} == {id(weight.raw) for weight in thresholded_weights(model)}
    torch.optim.SGD(groups, lr=0.1)  # refuses a parameter in two groups


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = sparsify(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    model[0].raw_threshold.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    groups = parameter_groups(model, 1e-4)
    assert [group["name"] for group in groups] == ["weights", "norms"]
    assert names_by_group(model, groups) == {"weights": {"0.weight"}, "norms": {"1.weight", "1.bias"}}
    assert parameter_groups(nn.ReLU(), 1e-4) == []


def test_plain_models_and_the_order_of_groups():
    names = [group["name"] for group in parameter_groups(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), 0.1)]
    assert names == ["weights", "norms"]
    model = sparsify(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)))
    assert [group["name"] for group in parameter_groups(model, 0.1)] == ["weights", "thresholds", "norms"]
    assert all(set(group) == {"params", "weight_decay", "name"} for group in parameter_groups(model, 0.1))


def test_decay_of_thresholds():
    model = sparsify(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert decays(parameter_groups(model, 1e-4))["thresholds"] == 1e-4  # the paper's way
    assert decays(parameter_groups(model, 1e-4, 1e-3))["thresholds"] == 1e-3
    assert decays(parameter_groups(model, 1e-4, 0.0))["thresholds"] == 0.0
    for layer in model:
        layer.control = Control()
    assert decays(parameter_groups(model, 1e-4))["thresholds"] == 0.0
    assert decays(parameter_groups(model, 1e-4, 1e-3))["thresholds"] == 1e-3


def test_only_the_thresholds_that_a_controller_holds_go_without_decay():
    model = sparsify(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model[1].control = Control()
    thresholds = [group for group in parameter_groups(model, 1e-4) if group["name"] == "thresholds"]
    assert [(group["params"], group["weight_decay"]) for group in thresholds] == [
        ([model[0].raw_threshold], 1e-4),
        ([model[1].raw_threshold], 0.0),
    ]


def test_factored_matrices():
    model = nn.Sequential(LowRankLinear(4, 5), nn.LayerNorm(5), LowRankLinear(5, 3, bias=False))
    groups = parameter_groups(model, 1e-4, norm_weight_decay=1e-6)
    assert [group["name"] for group in groups] == ["weights", "thresholds", "spectra", "norms"]
    assert names_by_group(model, groups) == {
        "weights": {"0.weight.u", "0.weight.v", "2.weight.u", "2.weight.v"},
        "thresholds": {"0.weight.raw_threshold", "2.weight.raw_threshold"},
        "spectra": {"0.weight.m", "2.weight.m"},
        "norms": {"0.bias", "1.weight", "1.bias"},
    }
    assert decays(groups) == {"weights": 1e-4, "thresholds": 1e-4, "spectra": 1e-4, "norms": 1e-6}
    torch.optim.SGD(groups, lr=0.1)


def test_decay_of_spectra_and_their_thresholds():
    model = nn.Sequential(LowRankLinear(4, 5), LowRankLinear(5, 5, recurrent=True))
    groups = parameter_groups(model, 0.0, 5e-3, spectrum_weight_decay=1e-3)  # the paper's lambda on m and s
    assert decays(groups) == {"weights": 0.0, "thresholds": 5e-3, "spectra": 1e-3, "norms": 0.0}
    assert decays(parameter_groups(model, 1e-4, spectrum_weight_decay=0.0))["spectra"] == 0.0
    RankController(model, RankTarget(total_rank=4), distribution="learned")
    groups = parameter_groups(model, 1e-4)
    assert decays(groups) == {"weights": 1e-4, "thresholds": 0.0, "spectra": 0.0, "norms": 0.0}
    RankController(model, RankTarget(total_rank=4))  # which freezes the thresholds
    assert [group["name"] for group in parameter_groups(model, 1e-4)] == ["weights", "spectra", "norms"]


def test_compact_matrices_are_weights():
    groups = parameter_groups(LowRankLinear(9, 9, max_rank=2).compact(), 1e-4)
    assert [(group["name"], len(group["params"])) for group in groups] == [("weights", 2), ("norms", 1)]
