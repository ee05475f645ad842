"""The weights that `sparsify` leaves dense, and the model's record of them."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from str_triton import count, densify, sparsify
from str_triton.nn import matrices, thresholded_weights


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 4))
        self.body = nn.ModuleDict({"gru": nn.GRU(4, 4), "linear": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 2)
        self.up = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body["linear"](self.body["gru"](x + self.pos_embed)[0]) @ self.up[0])


GRU = ["body.gru.weight_ih_l0", "body.gru.weight_hh_l0"]
COVERED = [*GRU, "body.linear", "head"]


def names(model: nn.Module) -> list[str]:
    return [weight.name for weight in thresholded_weights(model)]


def excluded(model: nn.Module) -> set[str]:
    return {matrix.name for matrix in matrices(model) if matrix.excluded}


@pytest.mark.parametrize(
    ("options", "expected", "left"),
    [
        ({}, COVERED, set()),
        ({"exclude": ["pos_embed", "up"]}, COVERED, {"pos_embed", "up"}),
        ({"exclude": "body.gru"}, ["body.linear", "head"], set(GRU)),
        ({"exclude": "*.weight_ih*"}, ["body.gru.weight_hh_l0", "body.linear", "head"], {GRU[0]}),
        ({"include": "body.*"}, COVERED[:3], {"head", "pos_embed", "up"}),
        ({"parameters": ["up"], "exclude": "head"}, ["up", *COVERED[:3]], {"head"}),
        ({"parameters": "u*", "include": "head"}, ["up", "head"], {*COVERED[:3], "pos_embed"}),
        ({"exclude": lambda name, module: isinstance(module, nn.Linear)}, GRU, {"body.linear", "head"}),
    ],
)
def test_what_the_user_leaves_dense_is_remembered(options, expected, left):
    model = sparsify(Model(), **options)
    assert names(model) == expected
    assert excluded(model) == excluded(copy.deepcopy(model)) == left
    assert {matrix.name for matrix in matrices(model) if not matrix.covered} == {"pos_embed", "up"} - set(expected)
    densify(model)
    assert not excluded(model)


@pytest.mark.parametrize("option", [{"exclude": [0]}, {"exclude": 0}, {"include": [None]}])
def test_what_names_no_weight_is_refused(option):
    with pytest.raises(TypeError, match=f"{next(iter(option))} takes names, .*, got (0|None)"):
        sparsify(Model(), **option)


def test_modules_exclude_what_is_inside():
    model = Model()
    sparsify(model, exclude=model.body)
    assert names(model) == ["head"]
    assert excluded(model) == set(COVERED[:3])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_child_is_left_dense_or_refused():
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"0 \(torch\.jit has compiled"):
        sparsify(model, parameters=["0.weight"])
    sparsify(model)
    assert names(model) == ["1"]
    assert [matrix.name for matrix in matrices(model) if not matrix.covered] == ["0"]


class Reader(nn.Module):
    """Reads the weight of a child without calling it, as attention in timm's BEiT, EVA and Swin V2."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12, bias=False)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.linear(x, weight=self.qkv.weight, bias=None))


def test_a_weight_that_others_read_is_reported_and_can_be_named():
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match=r"dense weight of qkv .*parameters="):
        count(sparsify(Reader()), x)
    model = sparsify(Reader(), parameters=["qkv.weight"], initial_threshold=0.2)
    assert names(model) == ["qkv", "head"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = count(model, x).rows[0]
    assert row.flops == 3 * row.nonzeros < row.dense_flops
    expected = model(x)
    assert torch.equal(densify(model)(x), expected)


def frozen() -> Model:
    model = Model()
    model.body.requires_grad_(False)
    model.pos_embed.requires_grad_(False)
    return model


def test_frozen_weights_stay_dense_and_are_named_once():
    with pytest.warns(UserWarning, match="frozen") as caught:
        model = sparsify(frozen())
    (warning,) = caught
    assert all(name in str(warning.message) for name in COVERED[:3])
    assert "head" not in str(warning.message)
    assert "pos_embed" not in str(warning.message)  # No weight that sparsify would have taken.
    assert warning.filename == __file__
    assert names(model) == ["head"]
    assert excluded(model) == {*COVERED[:3], "pos_embed"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "body.*"}, COVERED[:3]),
        ({"include": "*"}, COVERED),
        ({"include": lambda name, module: name == "body.linear"}, ["body.linear"]),
        ({"exclude": "body.*"}, ["head"]),
        ({"parameters": ["pos_embed"], "exclude": "body.*"}, ["pos_embed", "head"]),
    ],
)
def test_frozen_weights_that_the_user_names(options, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = sparsify(frozen(), **options)
    assert names(model) == expected


def test_a_model_that_is_frozen_whole():
    with pytest.raises(ValueError, match=r"leave none of 4 weights, .* frozen"):
        sparsify(Model().requires_grad_(False))
