"""Recurrent layers in C: against the op in float64, whole networks against eager, files, and bad ones."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from str_triton import LowRankFastGRNN, LowRankGRU, LowRankLSTM, deploy
from str_triton.deploy.sparse.executions import EXECUTIONS
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import Graph, Input
from str_triton.deploy.sparse.graph.recurrent import LOW_RANK, SIZES, Recurrent
from str_triton.deploy.sparse.graph.refs import Ref
from str_triton.deploy.sparse.graph.signature import Leaf, Signature
from str_triton.deploy.sparse.runtime.recurrent import FEATURES
from str_triton.ops.low_rank_cell import CELLS
from tests.deploy.recurrent_networks import HIDDEN, INPUTS, Classifier

pytestmark = pytest.mark.usefixtures("kernels")

# hidden, rank (None: a dense matrix), batch, steps: below, at and above vectors, blocks and groups of sequences
SHAPES = [(1, 1, 1, 1), (5, 3, 5, 4), (16, None, 3, 3), (33, 9, 6, 2), (64, 8, 1, 7), (70, 40, 9, 3), (129, 17, 2, 2)]


def layer(cell: str, hidden: int, rank: int | None, *, features: int | None = None, reverse: bool = False) -> Recurrent:
    gates, biases, states, scalars = SIZES[cell]
    inner, names = rank or hidden, ["x", "h", "c"][: 1 + states]
    made = Recurrent("y", names, torch.randn(gates * hidden, inner) / inner**0.5, torch.randn(biases * hidden))
    made.label, made.cell, made.reverse = "rnn", cell, reverse
    made.v = torch.randn(hidden, rank) / hidden**0.5 if rank else None
    made.scale = torch.rand(scalars) if scalars else None
    if features:
        made.weight_in, made.bias_in = torch.randn(gates * hidden, features), torch.randn(gates * hidden)
    assert made.is_whole()
    return made


def test_the_sizes_of_cells_are_those_of_the_ops() -> None:
    ops = {name: (cell.gates, cell.bias_blocks, len(cell.states), cell.scalars) for name, cell in CELLS.items()}
    assert {name: ops[name] for name in SIZES} == SIZES  # of other cells torch executes the op


def inputs(node: Recurrent, batch: int, steps: int) -> dict[str, Tensor]:
    features = len(node.weight) if node.weight_in is None else node.weight_in.shape[1]
    states = {name: torch.randn(batch, node.hidden) for name in node.inputs[1:]}
    return {"x": torch.randn(steps, batch, features), **states}


def exact(node: Recurrent, values: dict[str, Tensor]) -> Tensor:
    """Return the node's value by the op, in float64."""
    x, *states = (values[name].double() for name in node.inputs)
    if node.weight_in is not None:
        x = x @ node.weight_in.double().t() + node.bias_in.double()
    v = torch.eye(node.hidden) if node.v is None else node.v
    scale = torch.empty(0) if node.scale is None else node.scale
    tensors = (tensor.double() for tensor in (node.weight, v, node.bias, scale))
    outputs, *finals = LOW_RANK(node.cell, x, *tensors, states, None, node.reverse, False, None)
    return torch.cat([outputs, *(final.unsqueeze(0) for final in finals[: node.states])])


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use two threads for the smallest layer, too."""
    monkeypatch.setattr("str_triton.native.recurrent.FEW", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("cell", SIZES)
def test_loops_against_float64(cell: str):
    for hidden, rank, batch, steps in SHAPES:
        for reverse in (False, True):
            # Few features are projected by the loop, many by one product for all steps.
            node = layer(cell, hidden, rank, features={None: 3, 9: FEATURES + 1}.get(rank), reverse=reverse)
            values = inputs(node, batch, steps)
            wanted = exact(node, values)
            shapes = {name: tuple(value.shape) for name, value in (values | {"y": wanted}).items()}
            names = {name for name, execution in EXECUTIONS.items() if execution.fits(node, shapes)}
            of_torch = {"torch_layer"} if rank in (None, 9) and cell in ("gru", "lstm") else set()
            # The largest matrix has many times the weights of its factors.
            is_tried = rank and (cell, hidden) != ("lstm", 129)
            assert names == {"loop", "dense"} | of_torch | ({"loop_dense"} if is_tried else set())
            for name in names:
                found = EXECUTIONS[name].run(node, values)
                torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", SIZES)
def test_the_loop_projects_several_steps_at_once(cell: str, reverse: bool):
    """Groups of fewer than four sequences take the inputs of four steps at a time; the last steps are fewer."""
    node = layer(cell, 37, 5, features=3, reverse=reverse)
    for batch, steps in ((1, 9), (2, 4), (3, 5), (1, 1), (6, 7), (2, 6)):
        values = inputs(node, batch, steps)
        found = EXECUTIONS["loop"].run(node, values)
        torch.testing.assert_close(found.double(), exact(node, values), rtol=0, atol=2e-5)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_threads(cell: str, two_threads):
    """Threads that share sequences or units give the right values; shared units give the same bits."""
    for hidden, rank, batch, steps in ((70, 40, 1, 3), (33, None, 1, 2), (33, 9, 3, 2), (70, 9, 1, 6), (33, 9, 7, 6)):
        node = layer(cell, hidden, rank, features=3 if steps > 4 else None)
        values = inputs(node, batch, steps)
        found = {name: EXECUTIONS[name].run(node, values) for name in ("loop", "loop_shared")}
        torch.testing.assert_close(found["loop"].double(), exact(node, values), rtol=0, atol=2e-5)
        assert torch.equal(found["loop"], found["loop_shared"])


def test_empty_batches_sequences_without_steps_and_views():
    node = layer("lstm", 12, 3)
    for batch, steps in ((0, 3), (2, 0), (2, 1)):
        values = inputs(node, batch, steps)
        found = EXECUTIONS["loop"].run(node, values)
        assert found.shape == (steps + 2, batch, 12)
        if batch * steps == 0:
            assert torch.equal(found[steps:], torch.stack([values["h"], values["c"]]))
    wide = inputs(node, 4, 6)
    views = {name: value.flip(0) for name, value in wide.items()}
    strided = {name: value.transpose(0, 1).contiguous().transpose(0, 1) for name, value in views.items()}
    assert torch.equal(EXECUTIONS["loop"].run(node, strided), EXECUTIONS["loop"].run(node, views))
    with pytest.raises(ValueError, match=r"\[T, B, 48\].*\[6, 4, 47\]"):
        EXECUTIONS["loop"].run(node, wide | {"x": wide["x"][..., :-1]})
    with pytest.raises(ValueError, match=r"\[4, 12\].*\[3, 12\]"):
        EXECUTIONS["loop"].run(node, wide | {"c": wide["c"][:3]})


class Packed(nn.Module):
    """A layer of torch's and one of this package on packed sequences, as a user packs them or gets them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GRU(INPUTS, HIDDEN), LowRankLSTM(HIDDEN, HIDDEN, max_rank=3)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor | PackedSequence, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, enforce_sorted=False)
        _, (h, _) = self.second(self.first(x)[0])
        return self.head(h[-1])


def test_packed_sequences_are_left_to_torch(quick):
    model, lengths = Packed().eval(), torch.tensor([2, 7, 4])
    x = torch.randn(7, 3, INPUTS)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    for example, reason in (((packed,), "packed sequences"), ((x, lengths), "torch.export")):
        compiled = deploy.compile_sparse(model, example, tune=False)
        assert compiled.left == {"first": "GRU", "second": "LowRankLSTM"}
        assert all(text in str(compiled) for text in ("first", "LowRankLSTM", reason))
        with torch.no_grad():
            torch.testing.assert_close(compiled(*example), model(*example))
            other = (example[0], lengths.flip(0)) if len(example) == 2 else (pack_sequence([x[:2, 0], x[:1, 1]]),)
            torch.testing.assert_close(compiled(*other), model(*other))
    alone = deploy.compile_sparse(nn.GRU(INPUTS, HIDDEN).eval(), x, tune=False)
    with pytest.raises(TypeError, match="PackedSequence"):
        alone(packed)


def only(cell: str, x: Tensor) -> Tensor:
    """Return an activation of x [n]: tanh by a GRU whose update gate is closed, sigmoid by a unit whose n is 1."""
    size, gates = len(x), SIZES[cell][0]
    node = Recurrent("y", ["x", "h"], torch.zeros(gates * size, 1), torch.zeros(gates * size), v=torch.zeros(size, 1))
    node.cell, infinite = cell, torch.full_like(x, float("inf"))
    parts = [-infinite, -infinite, x] if cell == "gru" else [x, infinite]
    return EXECUTIONS["loop"].run(node, {"x": torch.cat(parts).view(1, 1, -1), "h": torch.zeros(1, size)})[0, 0]


def test_activations():
    """The bounds that docs/sparse-execution.md states, over 700,000 values; NaN and infinity stay what they are."""
    small = torch.logspace(-30, 1.5, 50_000)
    ends = torch.linspace(80, 95, 200_000)  # where e^x leaves the range of float32
    grid = torch.cat([torch.linspace(-200, 200, 200_000), small, -small, ends, -ends])
    for cell, function, least in (("gru", torch.tanh, -1e9), ("mgu", torch.sigmoid, -87)):
        x = grid[grid > least]
        wanted = function(x.double())
        near = wanted.float().abs()
        unit = (torch.nextafter(near, torch.full_like(near, 2.0)) - near).double()
        error = float(((only(cell, x).double() - wanted).abs() / unit).max())
        assert error < 4, (cell, error)
        special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
        others = torch.cat([special, grid[grid <= least]])
        torch.testing.assert_close(only(cell, others), function(others), rtol=0, atol=1e-37, equal_nan=True)


def test_one_sequence_does_not_spoil_another():
    node = layer("gru", 20, 6)
    values = inputs(node, 6, 3)
    clean = EXECUTIONS["loop"].run(node, values)
    values["h"][2, 3] = float("nan")
    values["x"][1, 4, 0] = float("inf")
    found, wanted = EXECUTIONS["loop"].run(node, values), exact(node, values)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found[:, [0, 1, 3, 5]], clean[:, [0, 1, 3, 5]])
    torch.testing.assert_close(found[:, 4].double(), wanted[:, 4], rtol=0, atol=1e-5)


def network(node: Recurrent, execution: str = "loop") -> deploy.SparseModel:
    """Return a layer as a network, as an export of any number of steps would give it."""
    names = node.inputs
    leaves = [
        Leaf(torch.float32, ("T", "B", len(node.weight))),
        *[Leaf(torch.float32, ("B", node.hidden))] * node.states,
    ]
    structure, returns = pytree.tree_flatten(((0,) * len(names), {}))[1], pytree.tree_flatten(0)[1]
    graph = Graph([*(Input(name, []) for name in names), node], [Ref("y")])
    example = [(2, 2, len(node.weight)), *[(2, node.hidden)] * node.states]
    signature = Signature(structure, leaves, [], returns, [])
    return deploy.SparseModel(graph, signature, {"y": Choice(execution)}, {}, [], example)


@pytest.mark.filterwarnings("ignore:pack")
@pytest.mark.parametrize("cell", ["lstm", "fastgrnn"])
def test_mutated_files(cell: str, tmp_path: Path):
    """A record that somebody changed is refused in one line, or the network runs."""
    node = layer(cell, 6, 2)
    values = tuple(inputs(node, 2, 2).values())
    network(node).save(tmp_path / "net")
    loaded = deploy.load_sparse(tmp_path / "net")
    assert torch.equal(loaded(*values), network(node)(*values))
    record, tensors = deploy.inspect(tmp_path / "net").metadata["sparse"], deploy.unpack(tmp_path / "net")
    draw, refused = random.Random(0), []
    wrong: list = ["gru", "mgu", "x", 0, -1, 2.5, None, True, [], {}, {"tensor": "y|weight"}, {"tensor": "y|bias"}]
    wrong += [{"ref": "x"}, "y", ["x", "h", "x"], ["x"], ["y", "y"]]
    fields = next(entry for entry in record["nodes"] if entry["kind"] == "Recurrent")
    for _ in range(40):
        changed, others = copy.deepcopy(record), dict(tensors)
        if draw.random() < 0.3:
            others["y|weight"] = torch.randn(draw.choice([(4, 2), (24, 3), (7, 2), (24,), (0, 2)]))
            others |= {"y|scale": torch.tensor([0.5, 1e38])} if cell == "fastgrnn" and draw.random() < 0.5 else {}
        else:
            place = next(entry for entry in changed["nodes"] if entry["kind"] == "Recurrent")
            place[draw.choice(list(fields))] = draw.choice(wrong)
        deploy.pack(others, tmp_path / "changed", metadata={"sparse": changed}, plain_zeros=True)
        try:
            deploy.load_sparse(tmp_path / "changed")(*values)
        except (TypeError, ValueError) as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert not any("\n" in message for message in refused)


NETWORKS = {
    "gru": lambda: Classifier(
        LowRankGRU(INPUTS, HIDDEN, batch_first=True, ranks={"weight_hh_l0": 3, "weight_ih_l0": 2})
    ),
    "lstm": lambda: nn.LSTM(INPUTS, HIDDEN, 2, bias=False, bidirectional=True, dropout=0.5),
    "fastgrnn": lambda: Classifier(LowRankFastGRNN(INPUTS, HIDDEN, bidirectional=True, max_rank=4), "mean"),
}


@pytest.mark.filterwarnings("ignore:.*controller")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, tmp_path: Path):
    model = NETWORKS[name]().eval()
    states = tuple(torch.randn(4, 2, HIDDEN) for _ in range(2))
    example = (torch.randn(7, 2, INPUTS), states) if name == "lstm" else (torch.randn(2, 7, INPUTS),)
    compiled = deploy.compile_sparse(model, example, tune=False)
    assert isinstance(compiled, deploy.SparseModel)
    recurrent = [(node, choice.execution) for node, choice in compiled.layers() if isinstance(node, Recurrent)]
    assert [execution for _, execution in recurrent] == ["loop"] * {"gru": 1, "lstm": 4, "fastgrnn": 2}[name]
    assert all(node.weight_in is not None for node, _ in recurrent)
    compiled.save(tmp_path / "net")
    loaded = deploy.load_sparse(tmp_path / "net")
    for steps, batch in ((7, 2), (1, 2), (3, 1), (9, 5)):
        x = torch.randn(steps, batch, INPUTS)
        states = tuple(torch.randn(4, batch, HIDDEN) for _ in range(2))
        args = (x, states) if name == "lstm" else (x.transpose(0, 1) if name == "gru" else x,)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(*pytree.tree_map(Tensor.double, args))
        found = compiled(*args)
        for ours, theirs in zip(pytree.tree_leaves(found), pytree.tree_leaves(exact), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)
        if loaded.signature.fits(pytree.tree_leaves(args)):
            assert all(map(torch.equal, pytree.tree_leaves(loaded(*args)), pytree.tree_leaves(found)))
