"""Every family of networks in cnn and rnn comes back to the bit, and loads into the plain network."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from str_triton import LowRankWeight, densify, deploy, sparsify
from str_triton.cnn.models import MODELS, build
from str_triton.rnn.models import CELLS, Architecture, compact
from tests.deploy.packing import same_bits


@pytest.mark.parametrize(
    "name", ["resnet-digits", "resnet-small", "resnet18", "resnet20", "resnet50", "mobilenetv1:0.25"]
)
def test_networks_for_images(tmp_path: Path, name: str):
    with torch.device("meta"):
        model, plain = build(name, num_classes=10), build(name, num_classes=10)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.normal_() if tensor.is_floating_point() else tensor.fill_(3)
    sparsify(model, initial_threshold=1.5)
    summary = deploy.pack(model, tmp_path / "x")
    state = deploy.unpack(tmp_path / "x")
    assert same_bits(state, densify(model).state_dict())
    plain.load_state_dict(state, strict=True, assign=True)
    assert summary.nbytes < 0.3 * summary.dense_nbytes


def test_every_family_is_among_these():
    """The others are the classes of resnet-small, resnet18, resnet50 and mobilenetv1."""
    tested = {"resnet-digits", "resnet-small", "resnet18", "resnet20", "resnet50", "mobilenetv1"}
    assert set(MODELS) == tested | {"resnet-medium", "resnet34", "resnet101", "tf_mobilenetv1"}


def trained(model: nn.Module) -> nn.Module:
    """With thresholds that leave a part of the components, and of one matrix so many that dense is smaller."""
    matrices = [module for module in model.modules() if isinstance(module, LowRankWeight)]
    for index, matrix in enumerate(matrices):
        sizes = matrix.singular_values().sort(descending=True).values
        rank = len(sizes) - 1 if index == 1 else 3
        matrix.raw_threshold.data.fill_(float(((sizes[rank - 1] + sizes[rank]) / 2).log()))
    return model


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "options",
    [{"task": "classify"}, {"task": "classify", "layers": 2, "bidirectional": True}, {"task": "lm"}],
    ids=["classify", "bidirectional", "lm"],
)
def test_recurrent_networks(tmp_path: Path, cell: str, options: dict):
    architecture = Architecture(cell=cell, inputs=12, outputs=9, hidden_size=20, **options)
    model = trained(architecture.build())
    small = compact(model)
    ranks = small.rnn.ranks()
    summary = deploy.pack(model, tmp_path / "x")
    assert {name.removeprefix("rnn."): rank for name, rank in summary.ranks.items()} == ranks
    assert 0 < len(ranks) < len(model.rnn.factors())

    stored = deploy.unpack(tmp_path / "x", factors=True)
    assert same_bits(dict(sorted(stored.items())), dict(sorted(small.state_dict().items())))
    again = architecture.build(ranks=ranks)
    again.load_state_dict(stored, strict=True)

    plain = architecture.build(factorize="none")
    state = deploy.unpack(tmp_path / "x")
    plain.load_state_dict(state, strict=True)
    assert state.keys() == plain.state_dict().keys()
    assert all(
        torch.equal(state[name], stored[name])
        if name in stored
        else torch.equal(state[name], stored[f"{name}.u"] @ stored[f"{name}.v"].mT)
        for name in state
    )
    if model.rnn.has_dense:
        layer = model.rnn.torch_class(
            model.rnn.input_size, 20, model.rnn.num_layers, batch_first=True, bidirectional=model.rnn.bidirectional
        )
        layer.load_state_dict(
            {k.removeprefix("rnn."): v for k, v in state.items() if k.startswith("rnn.")}, strict=True
        )
    x = torch.randint(9, (2, 5)) if architecture.task == "lm" else torch.randn(2, 5, 12)
    outputs = [network.eval()(x) for network in (small, plain)]
    torch.testing.assert_close(*outputs)


def test_a_compact_and_a_dense_recurrent_network(tmp_path: Path):
    architecture = Architecture("classify", "gru", 12, 9, 20)
    small = compact(trained(architecture.build()))
    deploy.pack(small, tmp_path / "x")
    stored = deploy.unpack(tmp_path / "x", factors=True)
    assert same_bits(dict(sorted(stored.items())), dict(sorted(small.state_dict().items())))
    dense = architecture.build(factorize="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deploy.pack(dense, tmp_path / "x")
    assert same_bits(deploy.unpack(tmp_path / "x"), dense.state_dict())
