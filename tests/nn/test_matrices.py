import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from str_triton.nn import matrices, sparsify


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 3, 2))
        self.scale = nn.Parameter(torch.randn(4))
        self.register_buffer("table", torch.randn(3, 3))


class Conv1D(nn.Module):
    """Transformers' linear layer with a transposed weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))
        self.bias = nn.Parameter(torch.zeros(3))


Conv1D.__module__ = "transformers.pytorch_utils"


def rows(model):
    return {matrix.name: matrix.covered for matrix in matrices(model)}


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(3, 2), {"": True}),
        (nn.ConvTranspose2d(2, 3, 3), {"": True}),
        (nn.Bilinear(2, 3, 4), {"": True}),
        (nn.EmbeddingBag(4, 2), {"": True}),
        (Conv1D(), {"": True}),
        (nn.BatchNorm2d(3), {}),
        (nn.LayerNorm([3, 4]), {}),
        (nn.PReLU(), {}),
        (Experts(), {"up": False}),
        (nn.GRUCell(2, 3), {"weight_ih": True, "weight_hh": True}),
        (nn.LSTM(2, 3, proj_size=1), {"weight_ih_l0": True, "weight_hh_l0": True, "weight_hr_l0": True}),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), {"in_proj_weight": True, "out_proj": True}),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            {"q_proj_weight": True, "k_proj_weight": True, "v_proj_weight": True, "out_proj": True},
        ),
        (nn.ParameterList([torch.randn(2, 2), torch.randn(2)]), {"0": False}),
        (nn.LazyLinear(3), {"": True}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_kinds(module, expected):
    assert rows(module) == expected


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
        lambda module: parametrize.register_parametrization(module, "weight", Symmetric()),
    ],
    ids=["weight_norm", "spectral_norm", "new weight_norm", "new spectral_norm", "orthogonal", "prune", "own"],
)
def test_a_weight_computed_from_others_is_one_matrix(compute):
    model = nn.Sequential(compute(nn.Linear(3, 3)), nn.Linear(3, 3))
    assert rows(model) == {"0": True, "1": True}
    first = next(matrices(model))
    assert first.attribute == "weight"
    assert {id(p) for p in first.sources} == {id(p) for n, p in model[0].named_parameters() if "bias" not in n}


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


def test_a_shared_weight_belongs_to_the_first_module():
    model = nn.ModuleDict({"norm": nn.LayerNorm(2), "embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3)})
    model["head"].weight = model["embed"].weight
    assert rows(model) == {"embed": True}


def test_a_parameter_without_a_layer_is_named_by_its_path():
    assert rows(nn.ModuleDict({"experts": Experts()})) == {"experts.up": False}


def test_raw_thresholds_are_no_matrices():
    assert rows(sparsify(nn.Sequential(nn.Linear(3, 2)), granularity="weight")) == {"0": True}
