"""Tensors packed and unpacked: every bit of every dtype comes back, and what holds zeros takes less."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from str_triton import Budget, LayerBudget, LowRankLinear, LowRankWeight, count, count_ranks, densify, deploy, sparsify
from str_triton.nn import Control
from tests.deploy.packing import Everything, bits, content_of, holed, same_bits, with_content
from tests.messages import holding, holds

State = dict[str, Tensor]
SPECIAL = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 3.4e38])
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


def packed(model: nn.Module | State, path: Path, **options) -> deploy.PackedSummary:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return deploy.pack(model, path, **options)


def round_trip(state: State, path: Path, **options) -> dict[str, deploy.PackedTensor]:
    """The tensors of the summary by name, once the state came back to the bit."""
    summary = packed(state, path, **options)
    assert deploy.inspect(path) == summary
    assert summary.nbytes == path.stat().st_size
    assert same_bits(deploy.unpack(path), state)
    return {tensor.name: tensor for tensor in summary.tensors}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_bit_of_floating_point_comes_back(tmp_path: Path, dtype: torch.dtype):
    special = SPECIAL.to(dtype)
    state = {
        "gaps": holed(40, 50, dtype=dtype),
        "mask": holed(40, 50, sparsity=0.55, dtype=dtype),
        "dense": holed(40, 50, sparsity=0, dtype=dtype),
        "special": special,
        "special among zeros": torch.cat([torch.zeros(3000, dtype=dtype), special, torch.zeros(500, dtype=dtype)]),
        "many negative zeros": torch.where(torch.rand(50, 60) < 0.5, -0.0, holed(50, 60, dtype=torch.float64)).to(
            dtype
        ),
        "nothing else": torch.full((30, 30), -0.0, dtype=dtype),
    }
    kinds = {name: tensor.encoding for name, tensor in round_trip(state, tmp_path / "x").items()}
    assert kinds.pop("dense") == kinds.pop("special") == "dense"
    assert kinds.pop("gaps") == "gaps"
    assert set(kinds.values()) <= {"gaps", "bitmask"}


@pytest.mark.parametrize("dtype", [*WHOLE, torch.bool], ids=str)
def test_whole_numbers_and_truth_values(tmp_path: Path, dtype: torch.dtype):
    high = 2 if dtype is torch.bool else 100
    zeros = torch.rand(3000) < 0.9
    state = {
        "sparse": torch.randint(1, high, (3000,)).masked_fill(zeros, 0).to(dtype).reshape(3, 10, 100),
        "dense": torch.randint(1, high, (30, 10)).to(dtype),
    }
    if dtype.is_signed:
        state["lowest"] = torch.zeros(3000, dtype=dtype)
        state["lowest"][5] = torch.iinfo(dtype).min  # the bits of -0.0
    tensors = round_trip(state, tmp_path / "x")
    assert tensors["sparse"].encoding in ("gaps", "bitmask")
    assert tensors["sparse"].nonzeros == int((~zeros).sum())
    assert "lowest" not in tensors or tensors["lowest"].nonzeros == 1


def test_shapes_without_elements_scalars_and_strides(tmp_path: Path):
    wide = holed(30, 40, 5)
    state = {
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5),
        "zero": torch.tensor(0),
        "none": torch.zeros(200, 100),
        "transposed": wide.transpose(0, 2),
        "every other": wide[::2, 1:],
        "channels last": holed(8, 16, 3, 3).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1, 5).expand(300, 5),
        "one": torch.zeros(5000).index_fill(0, torch.tensor(4999), 2.0),
        "": torch.ones(3),
        'name with "quotes" | and ü': torch.ones(3),
    }
    tensors = round_trip(state, tmp_path / "x")
    assert tensors["none"].nbytes == 0
    assert tensors["one"].nbytes < 16
    assert tensors["zero"].encoding == "dense"
    assert all(tensor.is_contiguous() for tensor in deploy.unpack(tmp_path / "x").values())


def test_the_smallest_form_is_taken(tmp_path: Path):
    state = {f"{percent}": holed(200, 100, sparsity=percent / 100) for percent in (0, 2, 5, 40, 60, 80, 99)}
    tensors = round_trip(state, tmp_path / "x")
    kinds = {name: tensor.encoding for name, tensor in tensors.items()}
    assert kinds == {
        "0": "dense",
        "2": "dense",
        "5": "bitmask",
        "40": "bitmask",
        "60": "bitmask",
        "80": "gaps",
        "99": "gaps",
    }
    for tensor in tensors.values():
        assert tensor.nbytes <= tensor.dense_nbytes == 80_000
        assert tensor.nonzeros == int(state[tensor.name].count_nonzero())


def test_negative_zeros_take_a_bit_each_or_nothing_where_they_are_plain(tmp_path: Path):
    weight = torch.randn(200, 500)
    state = {"weight": weight * (torch.rand(200, 500) < 0.1)}  # half of the zeros are negative
    kept, plain = packed(state, tmp_path / "kept"), packed(state, tmp_path / "plain", plain_zeros=True)
    (own,) = kept.tensors
    assert same_bits(deploy.unpack(tmp_path / "kept"), state)
    assert own.sign_nbytes == -(-(100_000 - own.nonzeros) // 8)
    assert "signs of negative zeros" in str(kept)
    assert "signs" not in str(plain)
    assert plain.tensors[0].nbytes == own.nbytes - own.sign_nbytes
    unpacked = deploy.unpack(tmp_path / "plain")["weight"]
    assert torch.equal(unpacked, state["weight"])
    assert not torch.signbit(unpacked[unpacked == 0]).any()
    assert torch.signbit(state["weight"][state["weight"] == 0]).any(), "the given tensors stay as they are"
    few = {"weight": holed(200, 500)}
    few["weight"][0, :3] = -0.0
    assert round_trip(few, tmp_path / "few")["weight"].sign_nbytes == 0, "three values take less than a mask"


def test_shared_tensors_are_stored_once_and_come_back_shared(tmp_path: Path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 20)
            self.decoder = nn.Linear(20, 50)
            self.decoder.weight = self.embedding.weight
            self.same = self.decoder

    model = Tied()
    summary = packed(model, tmp_path / "x")
    state = deploy.unpack(tmp_path / "x")
    assert same_bits(state, model.state_dict())
    assert state["embedding.weight"] is state["decoder.weight"] is state["same.weight"]
    assert [tensor.encoding for tensor in summary.tensors] == ["dense", "shared", "dense", "shared", "shared"]
    assert summary.dense_nbytes == 4 * (50 * 20 + 50)
    sparsify(model, initial_threshold=1.0)
    summary = packed(model, tmp_path / "x")
    state = deploy.unpack(tmp_path / "x")
    assert same_bits(state, densify(model).state_dict())
    assert state["embedding.weight"] is state["same.weight"]
    assert summary.is_smaller


def test_views_of_one_storage_are_not_shared(tmp_path: Path):
    whole = torch.randn(10, 10)
    state = {"whole": whole, "top": whole[:5], "transposed": whole.T, "row": whole[0]}
    assert {tensor.encoding for tensor in round_trip(state, tmp_path / "x").values()} == {"dense"}


@pytest.mark.parametrize("values", ["float16", "bfloat16"])
def test_weights_are_rounded_vectors_stay(tmp_path: Path, values: str):
    dtype = getattr(torch, values)
    state = {
        "weight": holed(100, 100),
        "dense": torch.randn(5, 5, dtype=torch.float64),
        "narrow": torch.randn(5, 5).bfloat16(),
        "bias": torch.randn(100),
        "running_var": torch.tensor([1e30]),
        "count": torch.randint(9, (4, 4)),
        "special": torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0]]),
    }
    packed(state, tmp_path / "x", values=values)
    unpacked = deploy.unpack(tmp_path / "x")
    expected = {
        name: tensor.to(dtype).to(tensor.dtype) if name in ("weight", "dense", "special") else tensor
        for name, tensor in state.items()
    }
    expected["special"][0, 0] = unpacked["special"][0, 0]
    assert unpacked["special"][0, 0].isnan()
    assert same_bits(unpacked, expected)
    summary = deploy.inspect(tmp_path / "x")
    stored = {tensor.name: tensor.stored_dtype for tensor in summary.tensors}
    assert stored["weight"] == stored["dense"] == values
    assert (stored["bias"], stored["narrow"], stored["count"]) == ("float32", "bfloat16", "int64")
    assert f"rounded to {values}" in str(summary)


def test_what_rounds_to_zero_is_a_zero(tmp_path: Path):
    state = {"weight": torch.full((100, 100), 1e-9)}
    state["weight"][0] = 1.0
    assert packed(state, tmp_path / "x", values="float16").tensors[0].nonzeros == 100
    assert torch.equal(deploy.unpack(tmp_path / "x")["weight"], state["weight"].half().float())


@pytest.mark.parametrize(("values", "value"), [("float16", 70_000.0), ("float16", -65_520.0), ("bfloat16", 3.4e38)])
def test_a_value_that_would_become_infinite_is_refused_by_name(tmp_path: Path, values: str, value: float):
    state = {"fine": torch.ones(2, 2), "layer.weight": torch.tensor([[1.0, value]])}
    with pytest.raises(ValueError, match=rf"'layer.weight' holds {value:g}, and {values} ends at".replace("+", r"\+")):
        deploy.pack(state, tmp_path / "x", values)
    assert not list(tmp_path.iterdir())


def test_thresholded_layers_store_what_their_forward_uses(tmp_path: Path):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16, 40)).double()
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16, 40)).double()
    sparsify(model, initial_threshold=0.1, granularity="filter")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed(model, tmp_path / "x")
    assert same_bits(model.state_dict(), before)
    state = deploy.unpack(tmp_path / "x")
    plain.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    assert torch.equal(plain.eval()(images), model.eval()(images))
    assert same_bits(state, densify(model).state_dict())


def test_attention_and_bare_layers(tmp_path: Path):
    attention = sparsify(nn.MultiheadAttention(16, 4), initial_threshold=0.1)
    packed(attention, tmp_path / "x")
    assert same_bits(deploy.unpack(tmp_path / "x"), densify(attention).state_dict())
    layer = sparsify(nn.Linear(40, 30), initial_threshold=0.1)
    packed(layer, tmp_path / "x")
    assert same_bits(deploy.unpack(tmp_path / "x"), densify(layer).state_dict())


def cut(layer: LowRankLinear, rank: int) -> LowRankLinear:
    """The layer with all but its `rank` largest components below the threshold."""
    sizes = layer.weight.singular_values().sort(descending=True).values
    layer.weight.raw_threshold.data.fill_(float((sizes[rank - 1] + sizes[rank]).log() - torch.tensor(2.0).log()))
    assert layer.weight.rank == rank
    return layer


def test_low_rank_layers_are_stored_compact(tmp_path: Path):
    model = nn.Sequential(cut(LowRankLinear(40, 30), 4), cut(LowRankLinear(20, 30), 18), nn.Linear(30, 2))
    summary = packed(model, tmp_path / "x")
    compact = nn.Sequential(model[0].compact(), model[1].compact(), model[2])
    stored = deploy.unpack(tmp_path / "x", factors=True)
    assert same_bits(stored, {name: stored[name] for name in stored} | compact.state_dict())
    assert sorted(stored) == ["0.bias", "0.weight.u", "0.weight.v", "1.bias", "1.weight", "2.bias", "2.weight"]
    assert summary.ranks == {"0.weight": 4}
    assert summary.budget == count_ranks(model)
    assert summary.dense_nbytes == 4 * (40 * 30 + 30 + 20 * 30 + 30 + 62)
    assert holds(str(summary), "1 matrix .. rank 4")
    again = nn.Sequential(LowRankLinear(40, 30, ranks={"weight": 4}), LowRankLinear(20, 30, ranks={}), nn.Linear(30, 2))
    again.load_state_dict(stored, strict=True)
    plain = nn.Sequential(nn.Linear(40, 30), nn.Linear(20, 30), nn.Linear(30, 2))
    state = deploy.unpack(tmp_path / "x")
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(state["0.weight"], model[0].to_dense().weight)
    assert same_bits({"w": state["0.weight"]}, {"w": stored["0.weight.u"] @ stored["0.weight.v"].mT})


def test_a_compact_matrix_is_stored_as_it_is(tmp_path: Path):
    """Components may stand in any order, and be no smaller than the dense matrix."""
    model = LowRankLinear(6, 5, max_rank=5, thresholded=False)
    model.weight.u.data *= torch.arange(1, 6)
    packed(model, tmp_path / "x")
    assert same_bits(
        dict(sorted(deploy.unpack(tmp_path / "x", factors=True).items())), dict(sorted(model.state_dict().items()))
    )
    bare = LowRankWeight(6, 5, 2)
    packed(bare, tmp_path / "x")
    torch.testing.assert_close(deploy.unpack(tmp_path / "x"), {"weight": bare.weight().detach()})


def test_shared_factors(tmp_path: Path):
    layer = cut(LowRankLinear(40, 30), 3)
    other = LowRankLinear(40, 30)
    other.weight = layer.weight
    summary = packed(nn.ModuleList([layer, other]), tmp_path / "x")
    state = deploy.unpack(tmp_path / "x")
    assert state["0.weight"] is state["1.weight"]
    assert summary.dense_nbytes == 4 * (40 * 30 + 60)
    torch.testing.assert_close(state["0.weight"], layer.weight.weight().detach())


def test_wrappers_are_looked_through(tmp_path: Path):
    model = sparsify(nn.Sequential(nn.Linear(30, 20)), initial_threshold=0.1)
    packed(torch.compile(nn.DataParallel(model)), tmp_path / "x")
    low_rank = nn.Sequential(LowRankLinear(30, 20, max_rank=2))
    assert packed(nn.DataParallel(low_rank), tmp_path / "y").budget == count_ranks(low_rank)
    assert same_bits(deploy.unpack(tmp_path / "x"), densify(model).state_dict())


def test_equal_models_give_equal_bytes(tmp_path: Path):
    torch.manual_seed(1)
    packed(Everything(), tmp_path / "a")
    torch.manual_seed(1)
    packed(Everything(), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_model_without_zeros_is_stored_dense_and_this_is_said(tmp_path: Path):
    model = nn.Linear(100, 100)
    with pytest.warns(UserWarning, match="all are stored dense"):
        summary = deploy.pack(model, tmp_path / "x")
    assert not summary.is_smaller
    assert "stored dense" in str(summary)
    assert same_bits(deploy.unpack(tmp_path / "x"), model.state_dict())
    assert summary.nbytes < summary.dense_nbytes + 2000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deploy.pack({"weight": holed(100, 100)}, tmp_path / "x")
        deploy.pack(LowRankLinear(100, 100, max_rank=2), tmp_path / "x")


def test_budget_and_metadata_are_kept(tmp_path: Path):
    model = sparsify(nn.Sequential(nn.Linear(30, 20)), initial_threshold=0.1)
    budget = count(model, torch.zeros(1, 30))
    summary = packed(model, tmp_path / "x", budget=budget, metadata={"run": "a", "top1": 74.31, "ranks": (1, 2)})
    assert deploy.inspect(tmp_path / "x") == summary
    assert (
        summary.budget
        == budget
        == Budget([LayerBudget("0", 600, budget.nonzeros, 600, budget.flops, pytest.approx(0.1))])
    )
    assert summary.metadata == {"run": "a", "top1": 74.31, "ranks": [1, 2]}
    assert packed(model, tmp_path / "x").budget is None


def test_a_budget_with_weights_that_are_not_covered_is_kept_and_one_written_before_is_read(tmp_path: Path):
    rows = [LayerBudget("a", 600, 6, 600, 6, 0.1), LayerBudget("b", 10, 10, 0, 0, covered=False)]
    summary = packed({"a": holed(20, 30)}, tmp_path / "x", budget=Budget(rows))
    assert deploy.inspect(tmp_path / "x").budget == summary.budget == Budget(rows)
    content = content_of((tmp_path / "x").read_bytes())
    assert [row.pop("covered") for row in content["budget"]["rows"]] == [True, False]
    (tmp_path / "before").write_bytes(with_content((tmp_path / "x").read_bytes(), content))
    assert all(row.covered for row in deploy.inspect(tmp_path / "before").budget.rows)


def test_a_model_whose_controller_is_not_done_is_packed_with_a_warning(tmp_path: Path):
    model = sparsify(nn.Sequential(nn.Linear(30, 20)), initial_threshold=0.1)
    model[0].control = Control(status="at 0.5")
    with pytest.warns(UserWarning, match=r"at 0\.5.*finish") as caught:
        deploy.pack(nn.DataParallel(model), tmp_path / "x")
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize(
    ("layer", "compute"),
    [
        (nn.Linear(8, 8), lambda layer: prune.l1_unstructured(layer, "weight", 0.9)),
        (nn.Linear(8, 8), parametrizations.weight_norm),
        (nn.LSTM(8, 8), lambda layer: parametrizations.spectral_norm(layer, "weight_hh_l0")),
    ],
)
def test_weights_that_other_code_computes_are_refused_by_name(tmp_path: Path, layer: nn.Module, compute: Callable):
    model = sparsify(nn.Sequential(layer))
    compute(model[0])
    with pytest.raises(ValueError, match=r"'0.*' is no plain Parameter any more .*: remove what computes it"):
        deploy.pack(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match=r"'0.*' is no plain Parameter any more .*: remove what computes it"):
        densify(model)


def test_the_table(tmp_path: Path):
    summary = packed({"conv.weight": torch.eye(100), "bias": torch.ones(3)}, tmp_path / "x")
    assert str(summary).splitlines()[:6] == [
        "tensor                   shape  stored as  elements  nonzeros  sparsity  bytes",
        "------------------------------------------------------------------------------",
        "conv.weight            100x100       gaps    10,000       100   99.00 %    500",
        "(vectors and scalars)               dense         3         3    0.00 %     12",
        "------------------------------------------------------------------------------",
        "total                                        10,003       103   98.97 %    512",
    ]
    assert holds(str(summary), f"{summary.nbytes / 1e3:.1f} kB .. 40.0 kB .. {summary.nbytes / 400.12:.1f} %")


class Extra(nn.Linear):
    def get_extra_state(self) -> str:
        return "more"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"a": torch.ones(2), "b": [1.0]}, "'b' is list"),
        ({3: torch.ones(2)}, "names .. got 3"),
        (nn.Sequential(Extra(2, 2)), "'0._extra_state' is str"),
        (nn.Linear(2, 2, device="meta"), "'weight' .. meta device"),
        (nn.LazyLinear(2), "'weight' is lazy .. run the model once"),
        ({"a": torch.eye(3).to_sparse()}, "'a' .. torch.sparse_coo"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "'a' is complex128"),
        ({"a": torch.ones(2), "a|values": torch.ones(2)}, "'a|values' .. packed format"),
        ({"__metadata__": torch.ones(2)}, "'__metadata__' .. packed format"),
    ],
)
def test_what_cannot_be_packed_is_named(tmp_path: Path, model: object, message: str):
    with pytest.raises(ValueError, match=holding(message)) as refusal:
        deploy.pack(model, tmp_path / "x")
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments(tmp_path: Path):
    model = {"a": torch.ones(2)}
    with pytest.raises(ValueError, match=r"values .*'float32', 'float16', 'bfloat16'.* 'int8'"):
        deploy.pack(model, tmp_path / "x", "int8")
    with pytest.raises(TypeError, match=r"model .*got list"):
        deploy.pack([1], tmp_path / "x")
    with pytest.raises(TypeError, match=holding("a Budget or a RankBudget .. got dict")):
        deploy.pack(model, tmp_path / "x", budget={})
    with pytest.raises(TypeError, match=r"metadata .*set"):
        deploy.pack(model, tmp_path / "x", metadata={"a": {1}})
    with pytest.raises(TypeError, match="metadata must be"):
        deploy.pack(model, tmp_path / "x", metadata={"a": float("nan")})
    assert not list(tmp_path.iterdir())
    assert bits(model["a"]).numel() == 8
